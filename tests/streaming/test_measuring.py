"""What is measured layer by layer on the text: the tensors are those of the steps on the full model, to the bit."""

import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig

from krony import KronyConfig, KronyError, compress
from krony.cli.app import main
from krony.compression import moments, reconstruction
from krony.models.loading import load_model
from krony.models.source import ModelSource
from krony.models.surgery import find_groups, take_out
from krony.storage.tensor_files import Checkpoint
from krony.streaming.plan import choose, prepare
from krony.streaming.stream import run
from small_models import BUILDERS, llama
from streamed_runs import Stop

CONFIGS = (
    {"init": "neurons", "reconstruct": 3},
    {"init": "van-loan", "reconstruct": 3},
    {"init": "als", "modules": "mlp|o_proj|c_proj", "reconstruct": 3},
    {"init": "neurons", "token_weighting": False, "layers": "odd", "reconstruct": 3},
    {"init": "neurons", "allocation": "global"},
    {"init": "neurons", "allocation": "global", "layers": "1-2"},
    {"init": "neurons", "allocation": "global", "layers": "0-1", "max_width": 96},
    {"init": "neurons", "allocation": "global", "reconstruct": 3},
    {"init": "flap", "allocation": "global"},
)
GLOBAL = KronyConfig("keep=0.5", allocation="global", reconstruct=2)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """The errors of these tiny models are below what bfloat16 sees."""
    monkeypatch.setattr(reconstruction, "fast_dtype", lambda _: torch.float32)


@pytest.fixture
def source(tmp_path) -> Path:
    """A model whose last MLP needs few neurons, so that an allocation is not even."""
    model = llama()
    take_out(model, find_groups(model)[2].sites[-1].name)[0][:, 12:] *= 1e-3
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    return tmp_path / "source"


def text(rows: int = 80) -> torch.Tensor:
    """More than one batch of the model's forward pass, the last one smaller."""
    return torch.randint(0, 256, (rows, 64), generator=torch.Generator().manual_seed(2))


def streamed(source: Path, out: Path, config: KronyConfig, **options):
    return run(prepare(ModelSource.find(str(source)), config, reads=True), out, calibration=text(), **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read() for name, entry in Checkpoint(folder).entries.items()}


def assert_same(one: Path, two: Path) -> None:
    first, second = tensors(one), tensors(two)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "sample"),
    [(c, n) for c in CONFIGS for n in (16_384, 1_024) if n == 16_384 or KronyConfig("keep=0.5", **c).needs_gradient],
    ids=str,
)
@pytest.mark.parametrize("family", list(BUILDERS))
def test_it_is_what_the_full_model_gives(family, options, sample, tmp_path, monkeypatch):
    """Also where the sensitivity is measured on a part of the text."""
    monkeypatch.setattr(moments, "SENSITIVITY_TOKENS", sample)
    model = BUILDERS[family]()
    take_out(model, find_groups(model)[1].sites[-1].name)[0][:, 12:] *= 1e-3
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    if options.get("modules"):  # matrices one by one, some of which read the same inputs
        options = options | {"modules": "mlp" if family == "gpt2" else "mlp|q_proj|k_proj"}
    config = KronyConfig("keep=0.5", **options)
    report = compress(model, config, calibration=text())
    model.save_pretrained(tmp_path / "memory")
    got = streamed(tmp_path / "source", tmp_path / "stream", config)
    assert_same(tmp_path / "memory", tmp_path / "stream")
    assert (got.layers, got.made_with, got.params_after) == (report.layers, report.made_with, report.params_after)
    assert (tmp_path / "memory/config.json").read_text() == (tmp_path / "stream/config.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "source", "stream"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_too(dtype, tmp_path):
    llama().to(dtype).save_pretrained(tmp_path / "source")
    model = load_model(str(tmp_path / "source"))  # its positions are in float32
    compress(model, GLOBAL, calibration=text())
    model.save_pretrained(tmp_path / "memory")
    streamed(tmp_path / "source", tmp_path / "stream", GLOBAL)
    assert_same(tmp_path / "memory", tmp_path / "stream")


def test_layers_that_the_allocation_leaves_dense(source, tmp_path):
    """Their tensors are copied, and the inputs of the other layers stay in order."""
    config = KronyConfig("keep=0.75", allocation="global", reconstruct=2)
    model = load_model(str(source))
    report = compress(model, config, calibration=text())
    assert 0 < len(report.layers) < 9
    model.save_pretrained(tmp_path / "memory")
    streamed(source, tmp_path / "stream", config)
    assert_same(tmp_path / "memory", tmp_path / "stream")


def test_a_few_groups_at_a_time_give_the_same(source, tmp_path, monkeypatch):
    """Where the inputs of a layer's groups don't fit, the layer runs again for the next ones."""
    config = KronyConfig("keep=0.5", init="van-loan", modules="mlp", reconstruct=2)
    streamed(source, tmp_path / "one", config)
    monkeypatch.setattr(reconstruction, "MEMORY", 1)
    streamed(source, tmp_path / "two", config)
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("config", "units"),
    [(KronyConfig("keep=0.5", reconstruct=2), 2 + 3 + 3 + 1), (GLOBAL, 2 + 3 + 3 + 3 + 1)],
    ids=["uniform", "global"],
)
def test_an_interrupted_run_resumes_after_any_unit(config, units, source, tmp_path):
    """Forward, backward, moments if there is an allocation, factors, and the rest."""
    whole = streamed(source, tmp_path / "whole", config)
    for at in range(1, units):
        with pytest.raises(KeyboardInterrupt):
            streamed(source, tmp_path / "out", config, progress=Stop(at))
    last, said = Stop(), []
    again = streamed(source, tmp_path / "out", config, progress=last, say=said.append)
    assert last.seen == [units - 1] and again.layers == whole.layers
    assert said == [f"resuming after model.layers.2, unit {units - 1} of {units}"]
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


@pytest.mark.parametrize("config", [GLOBAL, KronyConfig("keep=0.5", reconstruct=2, layers="1-2")], ids=["all", "upper"])
def test_files_are_deleted_when_no_unit_needs_them(config, source, tmp_path):
    """Stopped before the last unit: only the rankings are left, which say what the layout is."""
    with pytest.raises(KeyboardInterrupt):
        streamed(source, tmp_path / "out", config, progress=Stop(11 if config.allocation == "global" else 7))
    left = {path.name.partition("-")[0] for path in (tmp_path / "out.work").glob("*.safetensors")}
    assert left == ({"ranking"} if config.allocation == "global" else set())


@pytest.mark.parametrize("at", [1, 3, 5, 7, 9, 11])
def test_a_run_resumes_where_layers_return_tuples(at, tmp_path):
    """GPT-Neo's model takes the first element of what a layer returns; a new process has seen none return."""
    options = {"num_layers": 3, "hidden_size": 48, "num_heads": 4, "attention_types": [[["global"], 3]]}
    model = AutoModelForCausalLM.from_config(
        GPTNeoConfig(vocab_size=257, max_position_embeddings=64, bos_token_id=256, eos_token_id=256, **options)
    )
    model.save_pretrained(tmp_path / "source")
    config = KronyConfig("keep=0.5", allocation="global")
    streamed(tmp_path / "source", tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path / "source", tmp_path / "out", config, progress=Stop(at))
    streamed(tmp_path / "source", tmp_path / "out", config)
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_an_empty_folder_out_does_not_end_the_work(source, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        streamed(source, tmp_path / "out", GLOBAL, progress=Stop(4))
    last = Stop()
    streamed(source, tmp_path / "out", GLOBAL, progress=last)
    assert last.seen[0] == 4


def test_the_work_of_another_version_is_done_again(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        streamed(source, tmp_path / "out", GLOBAL, progress=Stop(4))
    lines = tmp_path / "out.work/done.jsonl"
    lines.write_text(lines.read_text().replace("forward", "moments"))
    last = Stop()
    streamed(source, tmp_path / "out", GLOBAL, progress=last)
    assert last.seen[0] == 0


def test_gradients_that_are_not_finite(source, tmp_path, monkeypatch):
    monkeypatch.setattr("krony.streaming.blockwise.drawn_likelihood", lambda logits, _: (logits * float("inf")).sum())
    with pytest.raises(KronyError, match="the gradients of the model's loss are not finite"):
        streamed(source, tmp_path / "out", GLOBAL)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_several_processes_are_refused_before_they_meet(source, monkeypatch):
    """A launcher has started two, and neither has said so to torch yet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("krony.streaming.plan.memory", lambda: 100_000)
    asked = {"dtype": "auto", "device": "cpu"}
    assert choose(ModelSource.find(str(source)), GLOBAL, wanted=None, **asked) is None
    with pytest.raises(KronyError, match="that works in one process, and there are 2"):
        choose(ModelSource.find(str(source)), GLOBAL, wanted=True, **asked)


def test_a_file_that_is_missing_is_named(source, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        streamed(source, tmp_path / "out", GLOBAL, progress=Stop(8))
    (tmp_path / "out.work/moments-00001-0.safetensors").unlink()
    with pytest.raises(KronyError, match=r"moments-00001-0\.safetensors is missing, which the interrupted run left"):
        streamed(source, tmp_path / "out", GLOBAL)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("limit", [10_000, 100_000])
def test_a_full_disk_leaves_nothing(limit, source, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(KronyError, match=r"can't be (written|stored)"):
            streamed(source, tmp_path / "out", GLOBAL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_without_text(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    plan = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="van-loan", reconstruct=2))
    with pytest.raises(KronyError, match="reconstruct needs calibration text"):
        run(plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def krony(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["krony", "compress", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code or 0


@pytest.mark.parametrize(
    "options", [{}, {"reconstruct": 2}, {"allocation": "global"}, {"allocation": "global", "reconstruct": 2}]
)
def test_a_dry_run_names_the_disk_space(options, source, tmp_path):
    """What is in OUT.work beside the model, at any time: at most what is named, and not much less."""
    stream = prepare(ModelSource.find(str(source)), KronyConfig("keep=0.5", **options))
    found = []

    def progress(done: int, total: int, what: str) -> None:
        found.append(sum(file.stat().st_size for file in (tmp_path / "out.work").glob("*.safetensors")))

    run(stream, tmp_path / "out", calibration=text(), progress=progress)
    headers = 200 * len(list(source.glob("*.safetensors"))) * 10
    named = stream.kept_bytes(text().numel())
    assert 0.5 * named < max(found) < named + headers


@pytest.mark.parametrize("options", [["--reconstruct", 5], ["--allocation", "global"]], ids=str)
def test_a_dry_run_names_more_memory(options, gpt2_folder, tmp_path, monkeypatch):
    named = []
    for more in ([], options):
        size = ["--scheme", "keep=0.5", "--calibration", "python-docs", "--stream"]
        written = ["--dry-run", "--json", tmp_path / "dry.json"]
        assert krony(monkeypatch, gpt2_folder, tmp_path / "out", *size, *more, *written) == 0
        named.append(json.loads((tmp_path / "dry.json").read_text()))
    config = json.loads((gpt2_folder / "config.json").read_text())
    if "--reconstruct" in options:  # the default text's inputs and targets at least
        assert named[1]["memory_bytes"] - named[0]["memory_bytes"] > 2 * 4 * 49_152 * config["n_embd"]
    else:  # moments of every layer
        assert named[1]["kept_bytes"] - named[0]["kept_bytes"] > 4 * config["n_layer"] * (4 * config["n_embd"]) ** 2
    assert not (tmp_path / "out").exists()


def test_the_command_on_the_demo(tmp_path, monkeypatch):
    model = tmp_path / "demo"
    ModelSource.find("demo").load().save_pretrained(model)
    ModelSource.find("demo").save_tokenizer(model)
    options = ["--scheme", "keep=0.5", "--calibration", "python-docs", "--calibration-tokens", 2048]
    options += ["--allocation", "global", "--reconstruct", 5]
    assert krony(monkeypatch, model, tmp_path / "stream", *options, "--stream") == 0
    assert krony(monkeypatch, model, tmp_path / "memory", *options, "--no-stream", "--no-cache") == 0
    assert_same(tmp_path / "memory", tmp_path / "stream")
    made_with = json.loads((tmp_path / "stream/config.json").read_text())["quantization_config"]["made_with"]
    assert made_with["reconstruct"] == 5 and made_with["allocation"] == "global"
    assert load_model(str(tmp_path / "stream"))(torch.arange(8)[None]).logits.isfinite().all()
