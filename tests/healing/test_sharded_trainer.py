"""Sharded runs of two processes against whole ones of one: losses, weights, checkpoints and resuming."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from krony import KronyError
from krony.healing.sharded_trainer import ShardedTrainer
from krony.models import precision
from processes import started
from sharded_runs import QUICK, SLOW, run, run_to_no_avail

PROGRAM = Path(__file__).parents[1] / "sharded_runs.py"


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=2"
ACCELERATE = """-m accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1
--mixed_precision no --dynamo_backend no --main_process_port 0"""


def sharded(launcher, folder, *names, device="cpu"):
    """Runs the cases of these names in two processes, and returns what they leave: curve, validation and state."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KRONY_TEST_DEVICE": device}
    command = [sys.executable, *launcher.split(), str(PROGRAM), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr
    return [torch.load(folder / f"{name}.pt") for name in names]


def assert_same(case, expected, actual):
    """Losses are float32 whatever the weights are; checked are all weights, buffers and losses."""
    (curve, validation, state), (their_curve, their_validation, their_state) = expected, actual
    for one, other in ((curve, their_curve), (validation, their_validation)):
        assert [at for at, _ in one] == [at for at, _ in other]
        assert [loss for _, loss in one] == pytest.approx([loss for _, loss in other], rel=1e-6)
    assert list(state) == list(their_state)
    for name, value in state.items():
        torch.testing.assert_close(their_state[name], value, rtol=case.tolerance, atol=case.tolerance, msg=name)


def whole(case, folder, **options):
    report, state = run(case, folder, shard=False, **options)
    return report.curve, report.validation, {name: value.cpu() for name, value in state.items()}


def without_last(work, copied):
    """A copy of a work folder as it was before its last checkpoint."""
    shutil.copytree(work, copied)
    steps = sorted(int(path.name.rpartition("-")[2]) for path in copied.glob("checkpoint-*"))
    assert len(steps) > 1
    shutil.rmtree(copied / f"checkpoint-{steps[-1]}")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(precision, "fast_dtype", lambda _: torch.float32)


def test_two_processes_with_half_of_everything_are_one_with_all(tmp_path):
    """Also: any checkpoint is a model, and a run resumes with shards or without, whatever it was started with."""
    case, other = QUICK
    expected = whole(case, tmp_path / "one.work")
    without_last(tmp_path / "one.work", tmp_path / f"{case.name}-resumed.work")
    first, resumed, second = sharded(ACCELERATE, tmp_path, case.name, f"{case.name}-resumed", other.name)
    assert_same(case, expected, first)
    assert_same(case, expected, resumed)
    assert_same(other, whole(other, tmp_path / "other.work"), second)
    work = tmp_path / f"{case.name}.work"
    states = [AutoModelForCausalLM.from_pretrained(path).state_dict() for path in work.glob("checkpoint-*")]
    assert any(all(torch.equal(state[name], value) for name, value in first[2].items()) for state in states)
    without_last(work, tmp_path / "again.work")
    assert_same(case, first, whole(case, tmp_path / "again.work", resume=True))


def test_a_checkpoint_without_the_state_of_the_optimiser(tmp_path):
    """As in a folder that another machine does not share. Trainer would start a new one without a word."""
    with pytest.raises(KronyError, match=r"optimizer.pt is missing: resume in a folder that all processes share"):
        ShardedTrainer._load_optimizer_and_scheduler(SimpleNamespace(optimizer=None, lr_scheduler=None), str(tmp_path))


def test_training_to_no_avail(tmp_path):
    """Early stopping, no gain, and a loss that is no number: ``run_to_no_avail`` checks in each process."""
    ends = [process.ended() for process in started(2, tmp_path / "processes", run_to_no_avail, tmp_path)]
    assert all(code == 0 and "Warning" not in said for code, said in ends), ends


@pytest.mark.slow
def test_all_kinds_of_models(tmp_path):
    """Dense, one term and four; with and without a teacher; both precisions."""
    results = sharded(TORCHRUN, tmp_path, *(case.name for case in SLOW))
    for number, (case, result) in enumerate(zip(SLOW, results, strict=True)):
        assert_same(case, whole(case, tmp_path / f"{number}.work"), result)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_gpus_are_one(tmp_path, monkeypatch, launcher):
    """NCCL gathers and reduces there, beside the computation. As far apart as sums in another order are."""
    monkeypatch.setattr("sharded_runs.DEVICE", "cuda")
    results = sharded(launcher, tmp_path, *(case.name for case in QUICK), device="cuda")
    for number, (case, result) in enumerate(zip(QUICK, results, strict=True)):
        assert_same(case, whole(case, tmp_path / f"{number}.work"), result)
