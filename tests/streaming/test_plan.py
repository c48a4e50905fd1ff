"""Which way a model is compressed, and the memory and space that this is said to take."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import Gemma4TextConfig, GPT2Config

import krony
from krony import KronyConfig, KronyError
from krony.cli.app import main
from krony.models.loading import load_model
from krony.models.source import ModelSource
from krony.storage.tensor_files import Checkpoint
from krony.streaming.plan import choose, prepare
from krony.streaming.stream import run
from small_models import at_random, llama
from streamed_runs import CALIBRATED, text

# Run apart: a process starts with the peak of the one that it was forked from, which here has held a model.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("init", "more"),
    [("van-loan", []), ("neurons", []), ("neurons", ["--reconstruct", "2"]), ("neurons", ["--allocation", "global"])],
)
def test_it_stays_within_the_memory_that_the_dry_run_names(init, more, tokenizer, tmp_path, capsys, monkeypatch):
    """Peak resident memory as GNU time has it, for a model of 1.6 GB."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 12, "hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 8192}
    krony_config = llama(**shape).to(torch.bfloat16)
    krony_config.save_pretrained(tmp_path / "source")
    del krony_config
    tokenizer.save_pretrained(tmp_path / "source")
    options = ["compress", str(tmp_path / "source"), str(tmp_path / "out"), "--scheme", "keep=0.5", "--init", init]
    if init == "neurons":
        options += ["--layers", "0-1", "--calibration", "python-docs", "--calibration-tokens", "6144"]
    options += [*more, "--stream"]
    monkeypatch.setattr(sys, "argv", ["krony", *options, "--dry-run", "--json", str(tmp_path / "dry.json")])
    with pytest.raises(SystemExit):
        main()
    named = json.loads((tmp_path / "dry.json").read_text())["memory_bytes"]
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "krony", *options]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert 0.7 * named < peak < 1.1 * named


@pytest.fixture
def in_the_cache(gpt2_folder, tmp_path, monkeypatch):
    """A model in the hub's cache as the hub's client keeps it: names of a snapshot link to blobs."""
    repository = tmp_path / "hub/models--some--model"
    for folder in ("blobs", "refs", "snapshots/c0ffee"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    for file in gpt2_folder.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (repository / "snapshots/c0ffee" / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_a_name_in_the_cache_streams(in_the_cache, gpt2_folder):
    """The same plan as for the folder; without --stream a name is loaded, as before."""
    config = GPT2Config.from_pretrained(gpt2_folder)
    source, plain = ModelSource("some/model", None, config), ModelSource.find(str(gpt2_folder))
    asked = {"dtype": "auto", "device": "cpu"}
    way = choose(source, KronyConfig("keep=0.5", init="van-loan"), wanted=True, **asked)
    assert way.folder == in_the_cache / "snapshots/c0ffee"
    assert way.layout == choose(plain, KronyConfig("keep=0.5", init="van-loan"), wanted=True, **asked).layout
    assert choose(source, KronyConfig("keep=0.5", init="van-loan"), wanted=None, **asked) is None


def test_a_name_that_is_not_in_the_cache_says_how_to_get_it(in_the_cache, gpt2_folder):
    (in_the_cache / "snapshots/c0ffee/model.safetensors").unlink()
    config = GPT2Config.from_pretrained(gpt2_folder)
    for name in ("some/model", "other/model", "no name!"):
        with pytest.raises(
            KronyError, match=r"nor in the hub's cache, so download it first .* --include '\*.safetensors'"
        ):
            choose(
                ModelSource(name, None, config), KronyConfig("keep=0.5", init="prune"), wanted=True, dtype="auto",
                device="cpu",
            )  # fmt: skip


REFUSED = [
    (["--init", "neurons", "--calibration", "python-docs", "--tune", "3"], "--tune trains all layers together"),
    (["--init", "random", "--reinit", "all"], "--reinit draws the full model at random"),
    (["--init", "prune", "--device", "auto"], "--device auto spreads the full model over devices"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_needs_the_whole_model_says_so(options, words, gpt2_folder, tmp_path, monkeypatch, capsys):
    arguments = ["compress", str(gpt2_folder), str(tmp_path / "out"), "--scheme", "keep=0.5", *options, "--stream"]
    monkeypatch.setattr(sys, "argv", ["krony", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_layers_that_share_keys_and_values_run_together(tmp_path):
    """Gemma 4's last layers use those of earlier ones: from file to file it can be compressed without text alone."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 12, "global_head_dim": 12, "intermediate_size": 144, "max_position_embeddings": 64}
    sizes |= {"vocab_size": 257, "vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma4TextConfig(**sizes, num_kv_shared_layers=2, sliding_window=8, layer_types=kinds)
    at_random(config).save_pretrained(tmp_path)
    source, asked = ModelSource.find(str(tmp_path)), {"wanted": True, "dtype": "auto", "device": "cpu"}
    with pytest.raises(KronyError, match="some of its layers use keys and values of earlier ones"):
        choose(source, KronyConfig("keep=0.5", init="neurons"), **asked)
    with pytest.raises(KronyError, match="some of its layers use keys and values of earlier ones"):
        choose(source, KronyConfig("keep=0.5", init="van-loan"), reads=True, **asked)
    assert choose(source, KronyConfig("keep=0.5", init="van-loan"), **asked) is not None


def test_the_rule_which_way_is_taken(gpt2_folder, monkeypatch):
    def way(init, wanted=None, reads=False, **options):
        config = KronyConfig("keep=0.5", init=init, **options)
        asked = {"wanted": wanted, "dtype": "auto", "device": "cpu", "reads": reads}
        return choose(ModelSource.find(str(gpt2_folder)), config, **asked) is not None

    assert way("van-loan") and way("prune") and way("random") and not way("van-loan", wanted=False)
    assert not way("neurons") and way("neurons", wanted=True)
    assert not way("neurons", allocation="global", reconstruct=2)
    assert way("neurons", wanted=True, allocation="global", reconstruct=2)
    assert not way("van-loan", reads=True) and way("van-loan", wanted=True, reads=True)
    monkeypatch.setattr("krony.streaming.plan.memory", lambda: 100_000)  # a small machine
    assert way("neurons") and not way("neurons", wanted=False)
    assert way("neurons", allocation="global", reconstruct=2)


@pytest.mark.parametrize("init", ["van-loan", "neurons"])
def test_a_dry_run_tells_the_bytes(init, gpt2_folder, tmp_path, monkeypatch, capsys):
    options = ["--scheme", "keep=0.5", "--init", init, "--stream"]
    arguments = ["compress", str(gpt2_folder), str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", ["krony", *arguments, "--dry-run", "--json", str(tmp_path / "dry.json")])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code and [p.name for p in tmp_path.iterdir()] == ["dry.json"]
    said = json.loads((tmp_path / "dry.json").read_text())
    assert "layer by layer" in capsys.readouterr().out and said["stream"]
    assert said["read_bytes"] == Checkpoint(gpt2_folder).bytes
    assert (said["kept_bytes"] > 0) == (init == "neurons")
    stream = prepare(ModelSource.find(str(gpt2_folder)), KronyConfig("keep=0.5", init=init))
    run(stream, tmp_path / "out", calibration=text() if init in CALIBRATED else None)
    assert said["write_bytes"] == Checkpoint(tmp_path / "out").bytes
    assert said["params_after"] == krony.models.surgery.count_parameters(load_model(str(tmp_path / "out")))
