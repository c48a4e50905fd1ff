"""Healing in processes that torchrun starts: a signal to one stops all, and the death of one ends the others."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from krony.healing.checkpoints import find_last

TESTS = str(Path(__file__).parents[1])
LONG = 301  # rows: 74 steps, with a checkpoint every five


WORKER = """
import pathlib, sys, time, torch
sys.path.insert(0, {tests!r})
from krony import KronyConfig, compress
from krony.models import precision
from krony.runtime import distributed
from krony.healing.checkpoints import LostProcessError
from krony.runtime.signals import Stopped, interruptible
from healing_runs import TINY, heal, text
from small_models import gpt2
precision.fast_dtype = lambda _: torch.float32
device = distributed.init()
model = gpt2(attn_pdrop=0.1).to({dtype})
compress(model, KronyConfig("keep=0.5", init="van-loan"))
work = pathlib.Path({work!r})

def watch(done, *_):
    if done == {stop_at}:  # the signal comes in the middle of this step
        (work / f"step-{{done}}").touch()
        time.sleep(2)

try:
    with interruptible(lambda: "stopped"):
        options = {{"device": "cpu", "resume": {resume}, "progress": watch, "shard": {shard}}}
        report = heal(model, *text({rows}).split(5), work=work, **options)
except (Stopped, LostProcessError) as end:
    (work / f"end-{{distributed.rank()}}").write_text(str(end))
    raise
if distributed.is_first():
    torch.save((report.curve, list(model.state_dict().values()), report.validation), {out!r})
"""


def start(tmp_path, name, *, processes=1, rows=40, resume=False, work=None, dtype="torch.float32", **more):
    script, out = tmp_path / f"{name}.py", tmp_path / f"{name}.pt"
    work = str(work or tmp_path / f"{name}.work")
    filled = {"rows": rows, "work": work, "resume": resume, "out": str(out), "dtype": dtype}
    filled |= {"stop_at": None, "shard": False} | more
    script.write_text(WORKER.format(tests=TESTS, **filled))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *launcher, str(script)], stderr=subprocess.PIPE), out


def signalled_at_eight(tmp_path, name, to=None, **options) -> tuple[int, str]:
    """Sends a signal in the middle of the eighth step, and returns the exit code and what was printed.

    ``to`` is the number of a process that torchrun has started; None means what the test has started.
    """
    work = tmp_path / "stopped.work"
    process, _ = start(tmp_path, "stopped", rows=LONG, work=work, stop_at=8, **options)
    while not (work / "step-8").exists():
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        time.sleep(0.02)
    number = process.pid
    if to is not None:
        number = sorted(map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split()))[to]
    os.kill(number, getattr(signal, name))
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors.decode()


def stopped_at_eight(tmp_path, name, to=None, **options) -> tuple[int, str]:
    """As ``signalled_at_eight``; the last checkpoint is then of the eighth step."""
    code, said = signalled_at_eight(tmp_path, name, to, **options)
    work = tmp_path / "stopped.work"
    assert sorted(path.name for path in work.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-8"], said
    return code, said


@pytest.mark.parametrize(
    ("to", "shard"), [(1, True), *(pytest.param(to, False, marks=pytest.mark.slow) for to in (0, None))]
)
def test_a_signal_stops_all_processes_after_the_same_step(tmp_path, to, shard):
    """To the launcher, which hands it on, or to one process: a scheduler may send either. Each process exits with 143;
    torchrun itself exits with 1 whatever its processes do.
    """
    _, said = stopped_at_eight(tmp_path, "SIGTERM", to, processes=2, shard=shard)
    assert [(tmp_path / f"stopped.work/end-{rank}").read_text() for rank in (0, 1)] == ["143", "143"], said
    assert find_last(tmp_path / "stopped.work").name == "checkpoint-8"


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "shard"), [(0, False), (1, True)])
def test_a_process_that_dies_ends_the_others(tmp_path, dies, shard):
    """Killed without a chance to say anything, as by the kernel when memory runs out."""
    code, said = signalled_at_eight(tmp_path, "SIGKILL", dies, processes=2, shard=shard)
    assert code != 0 and "exitcode: -9" in said
    ends = list((tmp_path / "stopped.work").glob("end-*"))
    assert [end.name for end in ends] == [f"end-{1 - dies}"], said
    words = f"process {1 - dies} ends because another process of this run has, which may have said why; resume"
    assert ends[0].read_text().startswith(words) and "checkpoint-5, the last checkpoint" in ends[0].read_text()
