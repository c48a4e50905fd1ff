"""A run that ends before it is done, whatever ends it, leaves what the same call resumes from, or nothing."""

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
from safetensors import SafetensorError

from krony import KronyConfig, KronyError
from krony.models.source import ModelSource
from krony.storage import tensor_files
from krony.storage.locks import working_in
from krony.storage.shards import Shards, TensorFile
from krony.streaming.plan import prepare
from krony.streaming.stream import run
from processes import Process
from small_models import llama
from streamed_runs import CALIBRATED, Stop, both_ways, digest, text


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


def test_the_same_weights_with_another_config_do_not_go_on_from_there(tmp_path):
    source, config, ids = tmp_path / "source", KronyConfig("keep=0.5"), text()
    llama().save_pretrained(source)
    with pytest.raises(KeyboardInterrupt):
        run(prepare(ModelSource.find(str(source)), config), tmp_path / "out", calibration=ids, progress=Stop(2))
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"hidden_act": "relu"}))
    with pytest.raises(KronyError, match=r"out.work is from a run with config"):
        run(prepare(ModelSource.find(str(source)), config), tmp_path / "out", calibration=ids)


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
