"""What a folder's files ask for is bounded before any memory is taken."""

import os

import pytest

from krony import KronyError, load_model
from krony.models import folder_checks
from small_models import gpt2


@pytest.mark.parametrize("name", ["num_labels", "num_experts", "n_groups"])
def test_counts_of_things_that_are_made(folder, change, name):
    change("config.json", **{name: 10**9})
    with pytest.raises(KronyError, match=f"{name} is 1000000000: no model has so many"):
        load_model(str(folder))


def test_a_number_per_layer_counts_no_layers(folder, change):
    change("config.json", vocab_size_per_layer_input=262_144)  # Gemma 3n's
    load_model(str(folder))


def test_layers_that_the_files_do_not_hold(folder, change):
    change("config.json", n_layer=900)
    with pytest.raises(KronyError, match=r"config\.json describes .* parameters, and the files hold"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"output_attentions": True}),
        ("config.json", {"max_new_tokens": 0}),
        ("generation_config.json", {"max_new_tokens": 0}),
        ("generation_config.json", {"temperature": "x"}),
        ("tokenizer_config.json", {"model_max_length": "x"}),
        ("tokenizer_config.json", {"chat_template": [{"name": "../../out", "template": "x"}]}),
    ],
)
def test_what_can_be_read_and_not_saved_is_known_before_the_work(
    folder, change, file, values, tmp_path, monkeypatch, capsys
):
    """Either OUT is written, or one sentence stands there before anything was computed."""
    from krony.cli import compress_job
    from krony.cli.app import main

    worked = []
    own = compress_job.compress
    monkeypatch.setattr(compress_job, "compress", lambda *a, **o: (worked.append(1), own(*a, **o))[1])
    change(file, **values)
    out = tmp_path / "out" / "model"
    options = ["--scheme", "keep=0.5", "--init", "van-loan", "--no-stream"]
    monkeypatch.setattr("sys.argv", ["krony", "compress", str(folder), str(out), *options])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    said = capsys.readouterr().err
    assert (code == 0 and worked and out.is_dir()) or (
        code == 2 and not worked and said.count("\n") == 1 and not out.exists()
    )
    assert not list(tmp_path.glob("out*.jinja")) and not list(tmp_path.parent.glob("out*.jinja"))


def test_a_damaged_tokenizer_is_not_left_out_without_a_word(folder, tmp_path, monkeypatch, capsys):
    """van-loan reads no text, so only the saving needs the tokenizer."""
    from krony.cli.app import main

    (folder / "tokenizer.json").write_text('{"model": {}}')
    out = tmp_path / "out"
    arguments = ["compress", str(folder), str(out), "--scheme", "keep=0.5", "--init", "van-loan"]
    monkeypatch.setattr("sys.argv", ["krony", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "no tokenizer can be loaded from there" in capsys.readouterr().err
    assert not out.exists()


def test_a_model_without_a_tokenizer_is_saved_without(tmp_path):
    from krony.models.source import ModelSource

    gpt2().save_pretrained(tmp_path / "model")
    source = ModelSource.find(str(tmp_path / "model"))
    source.check_saves()
    source.save(source.load(), tmp_path / "copy")
    assert not source.has_tokenizer and (tmp_path / "copy/model.safetensors").exists()
    assert not list((tmp_path / "copy").glob("token*"))


@pytest.mark.parametrize("name", ["n_positions", "some_size", "hidden_size"])
def test_numbers_that_no_rule_names(folder, change, name):
    change("config.json", **{name: 10**8})
    with pytest.raises(KronyError, match=f"{name} is 100000000: no model is so large"):
        load_model(str(folder))


def test_numbers_that_count_nothing_may_be_large(folder, change):
    change("config.json", rope_theta=1e11, rope_base=2_000_000_000, max_length=10**9)
    assert load_model(str(folder))


def test_modules_that_are_made_are_bounded(folder, monkeypatch):
    monkeypatch.setattr(folder_checks, "MOST_MODULES", 20)
    with pytest.raises(KronyError, match="more than 20 modules: no model has so many"):
        load_model(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_pipe_in_the_folder_is_not_read(folder, file):
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(KronyError, match=r"is a pipe or a device|there is no config\.json"):
        load_model(str(folder))


def test_a_config_longer_than_memory_is_not_read(folder):
    os.truncate(folder / "config.json", 2**40)
    with pytest.raises(KronyError, match=r"config\.json has 1,099,511,627,776 bytes"):
        load_model(str(folder))


def test_outputs_have_names_whatever_the_config_says(folder, change, ids):
    change("config.json", return_dict=False)
    assert load_model(str(folder))(ids).logits.ndim == 3
