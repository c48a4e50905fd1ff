"""Training runs: what trains, what stays, and that they can be stopped, resumed and shared without a trace."""

import copy
import json
import math
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from healing_runs import TINY, heal, noise, run_and_save, text
from krony import KronyConfig, KronyError, compress
from krony.data.rows import Rows
from krony.healing import training
from krony.healing.options import DEFAULTS, HealOptions
from krony.healing.recipes import RECIPES
from krony.healing.validation import validation_loss
from krony.models.divergence import divergence
from krony.models.export import slim
from processes import Process, together
from small_models import gpt2, llama

TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (12, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small(ids):
    model = llama()
    compress(model, KronyConfig("keep=0.5"), calibration=ids)
    return model


def test_it_learns(small, tmp_path):
    train, validation = text().split(4)
    seen = []
    report = heal(small, train, validation, work=tmp_path, progress=lambda *a: seen.append(a))
    assert report.loss_after < report.loss_before - 0.5
    assert report.tokens == 14 * 4 * 32 and seen[-1][:2] == (14, 14) and "tokens/s" in seen[-1][2]
    assert report.curve[-1][0] <= report.tokens and report.curve[0][1] > report.curve[-1][1]
    assert not small.training and all(p.requires_grad for p in small.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_trained_in_float32(ids, tmp_path, dtype):
    """Steps that a weight in half precision can't see add up, as in a model that was float32 all along."""
    train, validation = text().split(4)
    curves = []
    for kind in (dtype, torch.float32):
        model = llama().to(dtype).to(kind)
        before = copy.deepcopy(model.state_dict())
        recipe = replace(TINY, learning_rate=1e-5, final_rate=1e-5)
        report = heal(model, train, validation, work=tmp_path / str(kind), recipe=recipe, freeze="none")
        curves.append([loss for _, loss in report.curve])
        assert all(p.dtype == kind for p in model.parameters())
    assert curves[0] == curves[1]
    assert any(not torch.equal(value.float(), before[name].float()) for name, value in model.state_dict().items())


@pytest.mark.parametrize("rate", [1e-6, 1e-4])
def test_the_loss_of_half_precision_is_that_of_the_rounded_weights(rate, tmp_path, monkeypatch):
    """A rate at which most weights round to what they were, and one at which they move."""
    monkeypatch.setattr("krony.models.precision.fast_dtype", lambda _: torch.float32)
    model, (train, validation) = gpt2().bfloat16(), text().split(4)
    model.config.dtype = torch.bfloat16  # as it is loaded
    recipe = replace(TINY, learning_rate=rate, final_rate=rate)
    report = heal(model, train, validation, work=tmp_path, recipe=recipe, freeze="none", device="cpu", keep_anyway=True)
    assert model.config.dtype == model.dtype == torch.bfloat16
    assert report.loss_after == pytest.approx(validation_loss(model.float(), validation), rel=1e-7)


def test_a_teacher_in_float16_where_products_are_in_bfloat16(small, tmp_path, monkeypatch):
    monkeypatch.setattr("krony.models.precision.fast_dtype", lambda _: torch.bfloat16)
    teacher = gpt2().half()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    report = heal(small, *text().split(4), work=tmp_path, teacher=teacher, device="cpu")
    assert report.improved
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_it_ends_in_its_best_state(small, tmp_path):
    """The validation text is something else, so that training makes it worse and worse."""
    train, _ = text(200).split(4)
    noise = Rows(torch.randint(0, 256, (8 * 32,), generator=torch.Generator().manual_seed(3)).numpy(), 32)
    report = heal(small, train, noise, work=tmp_path)
    with torch.no_grad():
        losses = [
            float(small(input_ids=row[None], labels=row[None]).loss) for row in (noise[i]["labels"] for i in range(8))
        ]
    assert sum(losses) / 8 == pytest.approx(report.loss_after, rel=1e-2)  # bfloat16 in the trainer
    assert report.tokens < 49 * 4 * 32  # it stopped early


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_nothing_improves_is_left_as_it_was(small, tmp_path, dtype):
    """The learning rate is far too high; the state before training is the best."""
    small = small.to(dtype)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    reckless = replace(TINY, learning_rate=0.05, final_rate=0.05, warm_up=0)
    train, _ = text().split(4)
    report = heal(small, train, noise(), work=tmp_path / "a", recipe=reckless, freeze="none")
    assert not report.improved and report.loss_trained > report.loss_before == report.loss_after
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert not small.training and all(p.requires_grad and p.dtype == dtype for p in small.parameters())
    assert not {"forward", "_is_accelerate_prepared"} & set(vars(small)) and small.config.use_cache
    kept = heal(small, train, noise(), work=tmp_path / "b", recipe=reckless, freeze="none", keep_anyway=True)
    assert not kept.improved and kept.loss_after == kept.loss_trained == report.loss_trained
    assert not any(torch.equal(p, before[name]) for name, p in small.named_parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"epochs": 1.5, "patience": None}], ids=["stopped early", "one epoch and a half"]
)
def test_a_complete_run_takes_no_step_when_it_is_resumed_wherever_its_folder_is(small, tmp_path, changes):
    (train, _), recipe = text(60).split(4), replace(TINY, **changes)
    first, second, third = (copy.deepcopy(small) for _ in range(3))
    options = {"recipe": recipe, "keep_anyway": True}
    report = heal(first, train, noise(), work=tmp_path / "work", **options)
    moved = (tmp_path / "work").rename(tmp_path / "moved")
    written = {file: file.stat().st_mtime_ns for file in moved.glob("checkpoint-*/*")}
    again = heal(second, train, noise(), work=moved, resume=True, **options)
    assert written == {file: file.stat().st_mtime_ns for file in moved.glob("checkpoint-*/*")}
    assert again.tokens == report.tokens and again.loss_after == report.loss_after
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    last = max(moved.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    assert again.seconds > state["stateful_callbacks"]["Clock"]["attributes"]["before"] > 0
    best = moved / f"checkpoint-{state['best_global_step']}"
    assert best != last
    shutil.rmtree(best)
    with pytest.raises(KronyError, match=rf"{best.name} is missing, the best checkpoint of this run"):
        heal(third, train, noise(), work=moved, resume=True, **options)


def test_a_checkpoint_of_an_earlier_version_knows_no_seconds(small, tmp_path):
    model, (train, validation) = copy.deepcopy(small), text().split(4)
    heal(model, train, validation, work=tmp_path)
    last = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    shutil.rmtree(last)  # so that there are steps left, and a checkpoint to write
    for file in tmp_path.glob("checkpoint-*/trainer_state.json"):
        state = json.loads(file.read_text())
        del state["stateful_callbacks"]["Clock"]
        state["best_global_step"], state["best_model_checkpoint"] = state["global_step"], str(file.parent)
        file.write_text(json.dumps(state))
    report = heal(small, train, validation, work=tmp_path, resume=True)
    assert report.tokens == 14 * 4 * 32 and last.is_dir() and report.seconds > 0


def test_one_row_is_enough_to_validate_on(small, tmp_path):
    train, validation = text(11).split(1)
    assert heal(small, train, validation, work=tmp_path).tokens == 2 * 4 * 32  # whole steps only


def test_slim_is_exact_after_healing(small, ids, tmp_path):
    train, validation = text(20).split(4)
    heal(small, train, validation, work=tmp_path, freeze="right")
    expected = small(ids).logits
    torch.testing.assert_close(slim(small).model(ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_teacher_is_followed(ids, tmp_path):
    """What the student says comes nearer to the teacher, whatever the text is."""
    teacher, model = llama(tie_word_embeddings=False), llama(tie_word_embeddings=False)
    with torch.no_grad():
        for one in (teacher, model):
            one.lm_head.weight.mul_(30)  # a model at random has no opinions, and its MLPs hardly any say
            for layer in one.model.layers:
                layer.mlp.down_proj.weight.mul_(30)
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    noise = Rows(ids.flatten().repeat(8).numpy(), 32)
    train, validation = noise.split(4)
    recipe = replace(TINY, learning_rate=1e-3)

    @torch.no_grad()
    def apart() -> float:
        return divergence(model(ids).logits, teacher(ids).logits).item()

    before = apart()
    heal(model, train, validation, work=tmp_path, recipe=recipe, teacher=teacher)
    assert apart() < 0.7 * before


@pytest.mark.parametrize("steps", [1, 9, 14, 19, 61, 576, 999])
def test_it_validates_at_most_as_often_as_the_recipe_says(small, tmp_path, steps):
    recipe = replace(TINY, evaluations=10)
    rows = Rows(np.zeros(steps * 4 * 32, dtype=np.uint16), 32)
    made = training._arguments(small, rows, recipe, tmp_path, HealOptions(device="cpu"))
    assert min(steps, 5) <= math.ceil(made.max_steps / made.eval_steps) <= 10  # the last step is always validated
    assert made.eval_steps % made.logging_steps == 0 and made.save_steps == made.eval_steps


def test_the_papers_recipes(small, tmp_path, monkeypatch):
    """Section 4.1: 120 sequences of 1024 a step as 5 times 24, cosine from 6e-5 to 6e-6; then 320 at 6e-6."""
    rows = Rows(np.zeros(640 * 1024, dtype=np.uint16), 1024)
    made = training._arguments(small, rows, RECIPES["paper"], tmp_path, HealOptions(device="cpu"))
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (24, 5)
    assert made.max_steps == 15 and made.lr_scheduler_kwargs == {"min_lr": 6e-6} and made.max_grad_norm == 1.0
    made = training._arguments(small, rows, RECIPES["paper-final"], tmp_path, HealOptions(device="cpu"))
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps == 320
    assert made.lr_scheduler_type == "constant_with_warmup" and made.warmup_steps == 0 and made.learning_rate == 6e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda:1"}, "device is 'cuda:1': healing takes cpu or cuda"),
        ({"freeze": "left"}, "'left' is unknown: it is one of none, right, inherited"),
        ({"recipe": replace(TINY, hidden=1.0), "teacher": llama(num_hidden_layers=2)}, "the teacher has 2 layers of"),
        ({"recipe": replace(TINY, sequences=99)}, "one step of this recipe takes 99"),
        ({"validation": Rows(np.zeros(0), 32)}, "no row to validate on"),
        ({"train": Rows(np.zeros(5000, dtype=np.uint16), 80)}, "rows of 80 tokens: the model takes 64"),
        ({"resume": True}, "holds no checkpoint: there is nothing to resume"),
        ({"teacher": gpt2(vocab_size=300)}, "the teacher knows 300 tokens and the model 257"),
    ],
)
def test_mistakes(small, tmp_path, changes, words):
    train, validation = text(20).split(4)
    options = {"train": train, "validation": validation, "recipe": TINY, "work": tmp_path} | changes
    with pytest.raises(KronyError, match=words):
        heal(small, **options)


@pytest.mark.parametrize(
    ("processes", "batch", "at_once", "times"), [(1, 24, 24, 5), (2, 24, 20, 3), (8, 24, 15, 1), (1, 7, 6, 20)]
)
def test_any_number_of_processes_shares_a_step(small, tmp_path, monkeypatch, processes, batch, at_once, times):
    monkeypatch.setattr(training.distributed, "count", lambda: processes)
    rows = Rows(np.zeros(120 * 32, dtype=np.uint16), 32)
    recipe = replace(RECIPES["paper"], batch=batch)
    made = training._arguments(small, rows, recipe, tmp_path, HealOptions(device="cpu"))
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == (at_once, times)
    monkeypatch.setattr(training.distributed, "count", lambda: 7)
    with pytest.raises(KronyError, match="120 sequences per step can't be shared by 7 processes"):
        training.check_run(small, Rows(np.zeros(120 * 32), 32), rows, recipe=recipe, teacher=None, options=DEFAULTS)


def test_a_dense_model_has_no_factors_to_train_alone(tmp_path):
    train, validation = text(20).split(4)
    with pytest.raises(KronyError, match="leaves a dense model nothing to train"):
        heal(llama(), train, validation, work=tmp_path, freeze="inherited")
    assert heal(llama(), train, validation, work=tmp_path).loss_after > 0  # the control


def test_a_loss_that_is_no_number_stops_it(small, tmp_path):
    train, validation = text(60).split(4)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(KronyError, match=r"loss is nan at step .*: lower the learning rate; .*checkpoint-\d+, the"):
        heal(small, train, validation, work=tmp_path, recipe=replace(TINY, learning_rate=1e30, warm_up=0))
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


def curve_of(tmp_path, name, **options):
    """The losses and the end of a run in float64."""
    model = gpt2().double()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    report = heal(model, *text(20).split(4), work=tmp_path / name, device="cpu", **options)
    return report.curve, list(model.parameters())


def test_gradient_checkpointing_changes_nothing(tmp_path, monkeypatch):
    from torch.utils import checkpoint

    ran, original = [], checkpoint.checkpoint

    def counted(*args, **options):
        ran.append(1)
        return original(*args, **options)

    plain, expected = curve_of(tmp_path, "plain")
    monkeypatch.setattr(checkpoint, "checkpoint", counted)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    curve, parameters = curve_of(tmp_path, "checkpointed", gradient_checkpointing=True)
    assert ran and np.allclose(curve, plain, rtol=1e-6, atol=0)
    for one, other in zip(expected, parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_compiled_it_learns_the_same(tmp_path):
    plain, _ = curve_of(tmp_path, "plain")
    curve, _ = curve_of(tmp_path, "compiled", compile=True)
    assert np.allclose(curve, plain, rtol=1e-5, atol=0)


def start(folder, work, **options) -> Process:
    """``run_and_save`` in a process of its own."""
    return Process(folder, run_and_save, work, folder / "saved.pt", **options)


def finish(process) -> tuple:
    code, said = process.ended()
    assert code == 0, said[-2000:]
    return torch.load(process.folder / "saved.pt")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_two_processes_are_one_with_twice_the_accumulation(tmp_path, dtype, tolerance):
    for count in (1, 2):
        work, out = tmp_path / f"{count}.work", tmp_path / f"{count}.pt"
        together(count, tmp_path / f"of-{count}", run_and_save, work, out, rows=41, dtype=dtype)
    alone, whole, losses = torch.load(tmp_path / "1.pt")
    shared, halves, their_losses = torch.load(tmp_path / "2.pt")
    assert [tokens for tokens, _ in alone] == [tokens for tokens, _ in shared]
    assert [loss for _, loss in alone] == pytest.approx([loss for _, loss in shared], rel=max(tolerance, 1e-6))
    # five rows: neither process can have as many as the other, and none may count twice
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in their_losses], rel=max(tolerance, 1e-7))
    for a, b in zip(whole, halves, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=100 * tolerance)


LONG = 301  # rows: 74 steps, with a checkpoint after every fifth


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """Curve, weights and validation losses of a run that nothing stops."""
    place = tmp_path_factory.mktemp("unstopped")
    return finish(start(place / "complete", place / "work", rows=LONG))


def checkpoints(work) -> list[str]:
    return sorted(path.name for path in work.glob("checkpoint-*"))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_a_checkpoint_of_that_step(tmp_path, name, code, unstopped):
    """Between two checkpoints of the schedule; resumed, the run ends with the weights of one that nothing stopped."""
    work = tmp_path / "work"
    process = start(tmp_path / "stopped", work, rows=LONG, stop_at=8)
    while not (work / "step-8").exists():
        assert process.is_alive(), process.printed("err")[-2000:]
        time.sleep(0.02)
    process.send(getattr(signal, name))
    returned, said = process.ended()
    assert returned == code and checkpoints(work) == ["checkpoint-5", "checkpoint-8"], said
    if name == "SIGTERM":
        _, expected, losses = unstopped
        _, resumed, their_losses = finish(start(tmp_path / "resumed", work, rows=LONG, resume=True))
        assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))
        assert losses == their_losses


def test_killed_and_resumed_ends_with_the_same_weights(tmp_path, unstopped):
    """SIGKILL somewhere after the first checkpoint; bit for bit."""
    curve, expected, losses = unstopped
    work = tmp_path / "work"
    process = start(tmp_path / "killed", work, rows=LONG)
    while not list(work.glob("checkpoint-*/trainer_state.json")) and process.is_alive():
        time.sleep(0.02)
    time.sleep(float(np.random.default_rng(os.getpid()).uniform(0, 1)))
    process.send(signal.SIGKILL)
    process.ended()
    again, resumed, their_losses = finish(start(tmp_path / "resumed", work, rows=LONG, resume=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, resumed, strict=True))
    assert again == curve and losses == their_losses
