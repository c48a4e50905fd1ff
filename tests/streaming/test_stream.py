"""Compression layer by layer: the same tensors as through memory, whatever happens on the way."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

import krony
from krony import KronyConfig, KronyError, compress
from krony.cli.app import main
from krony.models.loading import load_model
from krony.models.source import ModelSource
from krony.storage import tensor_files
from krony.storage.locks import working_in
from krony.storage.shards import Shards, TensorFile
from krony.storage.tensor_files import Checkpoint, read_header
from krony.streaming.plan import choose, prepare
from krony.streaming.stream import run
from processes import Process
from small_models import BUILDERS, gpt2, llama
from streamed_runs import Stop

CALIBRATED = ("neurons", "als", "svd", "flap", "wanda")


def digest(folder: Path) -> str:
    """Over names, dtypes, shapes and bytes of the tensors, sorted by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    made = hashlib.sha256()
    for name in sorted(found):
        value = found[name]
        made.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        made.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def text(rows: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 64), generator=torch.Generator().manual_seed(2))


def both_ways(source: Path, config: KronyConfig, tmp_path: Path, reads: bool = False, **options) -> tuple[Path, Path]:
    ids = text() if reads or config.init in CALIBRATED else None
    model = load_model(str(source))
    report = compress(model, config, calibration=ids)
    model.save_pretrained(tmp_path / "memory")
    plan = prepare(ModelSource.find(str(source)), config, reads=reads)
    streamed = run(plan, tmp_path / "stream", calibration=ids, **options)
    assert streamed.layers == report.layers and streamed.made_with == report.made_with
    assert (streamed.params_before, streamed.params_after) == (report.params_before, report.params_after)
    return tmp_path / "memory", tmp_path / "stream"


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize(
    "init", ["van-loan", "prune", "random", "neurons", "als", "svd", "flap", "wanda", "magnitude", "random-neurons"]
)
def test_it_is_what_memory_gives(family, init, tmp_path):
    BUILDERS[family]().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    assert (tmp_path / "source/model.safetensors.index.json").exists()
    config = KronyConfig("keep=0.5", init=init)
    memory, stream = both_ways(tmp_path / "source", config, tmp_path, shard_size=150_000)
    assert digest(memory) == digest(stream)
    for name in ("config.json", "generation_config.json"):
        assert (memory / name).read_text() == (stream / name).read_text()
    index = json.loads((stream / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory", "source", "stream"]
    ids = text(1)
    assert torch.equal(load_model(str(stream))(ids).logits, load_model(str(memory))(ids).logits)


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("init", ["van-loan", "prune", "random"])
def test_the_errors_of_outputs_where_text_is_given_and_not_needed(family, init, tmp_path):
    BUILDERS[family]().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    memory, stream = both_ways(tmp_path / "source", KronyConfig("keep=0.5", init=init), tmp_path, reads=True)
    assert digest(memory) == digest(stream)
    with pytest.raises(KronyError, match="the plan was made without"):
        plan = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init=init))
        run(plan, tmp_path / "other", calibration=text())


def test_a_plan_that_is_run_twice_gives_the_same(tmp_path):
    gpt2().save_pretrained(tmp_path / "source")
    plan = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune"))
    assert run(plan, tmp_path / "one").made_with == run(plan, tmp_path / "two").made_with
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()


def test_what_is_too_large_for_the_wanted_dtype_is_refused(tmp_path):
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 1e6
    model.save_pretrained(tmp_path / "source")
    plan = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune"), dtype="float16")
    with pytest.raises(KronyError, match=r"ln_f\.weight has values that are not finite in float16"):
        run(plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("init", ["prune", "neurons"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_too(init, dtype, tmp_path):
    llama().to(dtype).save_pretrained(tmp_path / "source")
    memory, stream = both_ways(tmp_path / "source", KronyConfig("keep=0.75", init=init, layers="odd"), tmp_path)
    assert digest(memory) == digest(stream)


def test_names_without_the_base_models_prefix_as_gpt2_has_them_on_the_hub(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "source")
    tensors = {n.removeprefix("transformer."): v for n, v in load_file(tmp_path / "source/model.safetensors").items()}
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(3)}  # which old checkpoints have
    save_file(tensors | masks, tmp_path / "source/model.safetensors", {"format": "pt"})
    memory, stream = both_ways(tmp_path / "source", KronyConfig("keep=0.5", init="van-loan"), tmp_path)
    assert digest(memory) == digest(stream)


def test_other_layers_than_mlps(tmp_path):
    llama(tie_word_embeddings=False, vocab_size=260).save_pretrained(tmp_path / "source")
    config = KronyConfig("keep=0.5", init="van-loan", modules="o_proj|up_proj|lm_head")
    memory, stream = both_ways(tmp_path / "source", config, tmp_path)
    assert digest(memory) == digest(stream)


@pytest.mark.parametrize("init", ["van-loan", "neurons"])
def test_an_interrupted_run_goes_on_where_it_stopped(init, tmp_path):
    llama().save_pretrained(tmp_path / "source")
    config, ids = KronyConfig("keep=0.5", init=init), text() if init in CALIBRATED else None
    memory, _ = both_ways(tmp_path / "source", config, tmp_path)
    out = tmp_path / "out"
    for at in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(prepare(ModelSource.find(str(tmp_path / "source")), config), out, calibration=ids, progress=Stop(at))
        assert not out.exists() and (tmp_path / "out.work").is_dir()
    last, said = Stop(), []
    run(
        prepare(ModelSource.find(str(tmp_path / "source")), config),
        out,
        calibration=ids,
        progress=last,
        say=said.append,
    )
    assert last.seen == [3] and said == ["resuming after model.layers.2, unit 3 of 4"]
    assert digest(out) == digest(memory) and not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device")], ids=repr)
def test_a_run_that_lacks_memory_or_space_keeps_what_is_done(error, tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "source")
    config, out, said = KronyConfig("keep=0.5", init="van-loan"), tmp_path / "out", []
    memory, _ = both_ways(tmp_path / "source", config, tmp_path)
    usual, calls = Shards.put, iter(range(12))  # more than one layer's

    def put(*args, **options):
        if next(calls, None) is None:
            raise error
        return usual(*args, **options)

    stream = prepare(ModelSource.find(str(tmp_path / "source")), config)
    with monkeypatch.context() as short, pytest.raises(type(error)):
        short.setattr(Shards, "put", put)
        run(stream, out, say=said.append)
    assert not out.exists() and said == [
        f"{tmp_path / 'out.work'} holds what is done: the same call resumes from there"
    ]
    run(stream, out, say=said.append)
    assert digest(out) == digest(memory) and said[1].startswith("resuming after model.layers.")


def test_a_full_disk_while_text_is_measured_keeps_what_is_done(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "source")
    config, out = KronyConfig("keep=0.5", allocation="global"), tmp_path / "out"
    usual, calls = tensor_files.save_file, iter(range(4))

    def save(*args, **options):
        if next(calls, None) is None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return usual(*args, **options)

    stream = prepare(ModelSource.find(str(tmp_path / "source")), config, reads=True)
    with monkeypatch.context() as short, pytest.raises(KronyError, match="can't be stored there"):
        short.setattr(tensor_files, "save_file", save)
        run(stream, out, calibration=text())
    assert (tmp_path / "out.work").is_dir()
    said = []
    run(stream, out, calibration=text(), say=said.append)
    assert said and said[0].startswith("resuming after") and out.is_dir()


def test_interrupted_before_anything_is_done_nothing_is_left(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    stream = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune"))
    with pytest.raises(KeyboardInterrupt):
        run(stream, tmp_path / "out", progress=Stop(0))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_other_settings_do_not_go_on_from_there(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    first = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune"))
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path / "out", progress=Stop(2))
    other = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.75", init="prune"))
    with pytest.raises(KronyError, match=r'out.work is from a run with scheme "keep=0.5" \(now "keep=0.75"\)'):
        run(other, tmp_path / "out")
    file = tmp_path / "source/model.safetensors"
    os.utime(file, (0, 0))
    with pytest.raises(KronyError, match=r"out.work is from a run with files"):
        run(
            prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune")), tmp_path / "out"
        )


def test_two_processes_do_not_work_at_one_out(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    lock = working_in(tmp_path / "out.work")
    stream = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune"))
    with ThreadPoolExecutor(1) as other:  # to a lock, another thread is what another process is
        other.submit(lock.__enter__).result()
        with pytest.raises(KronyError, match=f"out is in use by process {os.getpid()} on "):
            run(stream, tmp_path / "out")
        other.submit(lock.__exit__, None, None, None).result()
    (tmp_path / "out.work/checkpoint-3").mkdir(parents=True)
    with pytest.raises(KronyError, match="is in the way"):
        run(stream, tmp_path / "out")
    assert (tmp_path / "out.work/checkpoint-3").is_dir()


def killed(source: Path, out: Path, config: KronyConfig, at: int) -> None:
    """All that a process does: it streams, and kills itself in the middle of writing tensor ``at``."""
    put, count = TensorFile.put, 0

    def half(self, name, values, at_element=0, **options):
        nonlocal count
        count += 1
        if count == at:
            put(self, name, values.flatten()[: values.numel() // 2], options.get("at", at_element))
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, name, values, options.get("at", at_element))

    TensorFile.put = half
    run(prepare(ModelSource.find(str(source)), config), out, calibration=text() if config.needs_text_for else None)


@pytest.mark.parametrize(
    "options",
    [{"init": "van-loan"}, {"init": "neurons"}, {"init": "neurons", "allocation": "global", "reconstruct": 2}],
    ids=str,
)
def test_a_killed_process_is_resumed_from(options, tmp_path):
    """Killed in the middle of writing a tensor, then taken up by a process that lives."""
    llama().save_pretrained(tmp_path / "source")
    config = KronyConfig("keep=0.5", **options)
    memory, _ = both_ways(tmp_path / "source", config, tmp_path)
    code, said = Process(tmp_path / "process", killed, tmp_path / "source", tmp_path / "out", config, 20).ended()
    assert code == -signal.SIGKILL, said
    ids = text() if config.needs_text_for else None
    stream, last = prepare(ModelSource.find(str(tmp_path / "source")), config), Stop()
    run(stream, tmp_path / "out", calibration=ids, progress=last)
    assert last.seen[0] > 0
    assert digest(tmp_path / "out") == digest(memory) and not (tmp_path / "out.work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("init", ["van-loan", "neurons"])
def test_ten_kills_at_random_moments(init, tokenizer, tmp_path):
    """A checkpoint of 200 MB, and the command line, killed from outside ten times."""
    model = llama(num_hidden_layers=8, hidden_size=768, intermediate_size=2048, vocab_size=8192)
    model.save_pretrained(tmp_path / "source", max_shard_size="60MB")
    tokenizer.save_pretrained(tmp_path / "source")
    assert sum(f.stat().st_size for f in (tmp_path / "source").glob("*.safetensors")) > 190e6
    command = [sys.executable, "-m", "krony", "compress", str(tmp_path / "source")]
    options = ["--scheme", "keep=0.5", "--init", init]
    if init == "neurons":
        options += ["--calibration", "python-docs", "--calibration-tokens", "4096"]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), *options, "--stream"], check=True, capture_output=True)
    seconds = time.monotonic() - start
    subprocess.run([*command, str(tmp_path / "memory"), *options, "--no-stream"], check=True, capture_output=True)
    moments, kills = random.Random(0), 0
    while kills < 10:
        process = subprocess.Popen([*command, str(tmp_path / "out"), *options, "--stream"], stdout=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.3, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        kills += process.wait() == -signal.SIGKILL
        if (tmp_path / "out").exists():
            assert digest(tmp_path / "out") == digest(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")  # it ended before it was killed
    subprocess.run([*command, str(tmp_path / "out"), *options, "--stream"], check=True, capture_output=True)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole") == digest(tmp_path / "memory")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["memory", "out", "source", "whole"]


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


def test_values_that_are_not_finite_are_named_and_nothing_is_left(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "source")
    stream = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="van-loan"))
    with pytest.raises(KronyError, match=r"model\.safetensors: model\.layers\.2\.self_attn\.q_proj\.weight has values"):
        run(stream, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("init", ["van-loan", "neurons"])
def test_a_full_disk_leaves_nothing(init, tmp_path):
    llama().save_pretrained(tmp_path / "source")
    stream = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init=init))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(KronyError, match=r"model\.safetensors can't be written: File too large"):
            run(stream, tmp_path / "out", calibration=text() if init in CALIBRATED else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_that_lacks_a_tensor(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    with pytest.raises(KronyError, match=r"incomplete: there is no model\.layers\.1\.mlp\.up_proj\.weight"):
        prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune"))


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


def test_the_command_keeps_tokenizer_and_card(gpt2_folder, tmp_path, monkeypatch):
    arguments = ["compress", str(gpt2_folder), str(tmp_path / "out"), "--scheme", "keep=0.5", "--init", "van-loan"]
    monkeypatch.setattr(sys, "argv", ["krony", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    there = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= there
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_tensor_files_are_what_safetensors_reads(tmp_path):
    values = {
        "b": torch.arange(6, dtype=torch.int64).view(2, 3),
        "a": torch.randn(5, 7).bfloat16(),
        "c": torch.ones(()),
    }
    file = TensorFile(tmp_path / "x.safetensors", {n: (v.dtype, tuple(v.shape)) for n, v in values.items()})
    file.create()
    file.put("b", values["b"])
    file.put("c", values["c"])
    file.put("a", values["a"][:2], at=0)
    file.put("a", values["a"][2:], at=14)
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(values) and all(torch.equal(read[n], v) for n, v in values.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    entries = {e.name: e for e in read_header(file.path)}
    assert torch.equal(entries["a"].read(1, 3), values["a"][1:3]) and torch.equal(entries["c"].read(), values["c"])
    assert torch.equal(torch.cat(list(entries["b"].pieces())), values["b"].flatten())


def test_shards_hold_about_what_they_are_asked_to(tmp_path):
    layout = {f"t{n}": (torch.float32, (100,)) for n in range(10)}
    shards = Shards(tmp_path, layout, shard_size=1000)
    shards.create()
    assert shards.exist() and len(shards.files) == 5
    shards.files[0].path.unlink()
    assert not shards.exist()
