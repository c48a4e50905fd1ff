"""Runs that a scheduler stops: by SIGTERM at any step or in a validation, and by the death of a process."""

import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from healing_runs import TINY, heal, text
from krony import KronyConfig, compress
from krony.healing import callbacks, trainer
from krony.healing.checkpoints import find_last
from krony.models import precision
from krony.runtime.signals import Interrupt
from processes import krony, started, together
from small_models import gpt2

ROWS = 121  # 29 steps of 4 rows; validated, and saved, at every second
PATIENT = replace(TINY, patience=99)


def build():
    model = gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    return model


def run(work: Path, *, stop_at: int | None = None, resume: bool = False):
    """Losses, validation losses and weights of a run that gets SIGTERM in a step, if any is named."""
    model = build()

    def tell(done: int, *_) -> None:
        if done == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"device": "cpu", "recipe": PATIENT, "progress": tell, "resume": resume}
    report = heal(model, *text(ROWS).split(5), work=work, **options)
    return report.curve, report.validation, list(model.state_dict().values())


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    return run(tmp_path_factory.mktemp("unstopped"))


def check_same(one, other) -> None:
    assert one[:2] == other[:2]
    assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


@pytest.mark.parametrize("step", [1, 2, 28, 29, "any", "another"])
def test_sigterm_at_any_step_leaves_a_checkpoint_of_it_from_which_the_run_goes_on(step, tmp_path, unstopped):
    """At even steps a validation is due, and there may be no time for it: the resumed run makes up for it."""
    step = step if isinstance(step, int) else random.randrange(3, 28)
    with pytest.raises(Interrupt, match="SIGTERM"):
        run(tmp_path, stop_at=step)
    assert find_last(tmp_path).name == f"checkpoint-{step}"
    check_same(run(tmp_path, resume=True), unstopped)


@pytest.mark.parametrize("step", [2, 16, 28])
def test_sigterm_in_a_validation(step, tmp_path, monkeypatch, unstopped):
    """It ends before its next batch, and a validation that was cut short leaves no loss."""
    validate, finished = trainer.validation_loss, []

    def told(model, rows, *, batch, check):
        left = iter([step == now[0], False, False, False])

        def then_stop() -> None:
            check()
            if next(left):
                os.kill(os.getpid(), signal.SIGTERM)

        loss = validate(model, rows, batch=batch, check=then_stop)
        finished.append(loss)
        return loss

    now = [0]
    monkeypatch.setattr(trainer, "validation_loss", told)
    monkeypatch.setattr(
        callbacks.StopAtBadLoss, "on_step_end", lambda _, a, state, c, **__: now.__setitem__(0, state.global_step)
    )
    with pytest.raises(Interrupt):
        run(tmp_path)
    assert find_last(tmp_path).name == f"checkpoint-{step}" and len(finished) == step // 2
    monkeypatch.setattr(trainer, "validation_loss", validate)
    check_same(run(tmp_path, resume=True), unstopped)


def test_sigterm_twice_at_the_validation_that_is_made_up_for(tmp_path, monkeypatch, unstopped):
    """The second comes before the resumed run has trained: it saves nothing, and the next one goes on all the same."""
    with pytest.raises(Interrupt):
        run(tmp_path, stop_at=16)
    before = (tmp_path / "checkpoint-16/trainer_state.json").stat().st_mtime_ns
    validate = trainer.validation_loss

    def told(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args, **options)

    monkeypatch.setattr(trainer, "validation_loss", told)
    with pytest.raises(Interrupt):
        run(tmp_path, resume=True)
    assert (tmp_path / "checkpoint-16/trainer_state.json").stat().st_mtime_ns == before
    monkeypatch.setattr(trainer, "validation_loss", validate)
    check_same(run(tmp_path, resume=True), unstopped)


def shared(work: Path, stops: dict[int, tuple[int, signal.Signals]], resume: bool = False) -> None:
    """One of several processes; ``stops`` says at which step which signal comes to which of them."""
    precision.fast_dtype = lambda _: torch.float32
    step, number = stops.get(int(os.environ["RANK"]), (None, None))

    def tell(done: int, *_) -> None:
        if done == step:
            os.kill(os.getpid(), number)

    model = build()
    options = {"device": "cpu", "recipe": PATIENT, "progress": tell, "resume": resume}
    try:
        report = heal(model, *text(ROWS).split(5), work=work, **options)
    except Interrupt as interrupt:
        raise SystemExit(128 + interrupt.number) from None
    if os.environ["RANK"] == "0":
        torch.save((report.curve, report.validation, list(model.state_dict().values())), work / "out.pt")


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    """At a step where a validation is due; resumed, two processes end as two that nothing stopped."""
    (tmp_path / "whole").mkdir()
    together(2, tmp_path / "first", shared, tmp_path / "whole", {})
    work = tmp_path / "stopped"
    ends = [process.ended() for process in started(2, tmp_path / "second", shared, work, {1: (16, signal.SIGTERM)})]
    assert [code for code, _ in ends] == [143, 143], ends
    assert find_last(work).name == "checkpoint-16"
    together(2, tmp_path / "third", shared, work, {}, True)
    check_same(torch.load(work / "out.pt"), torch.load(tmp_path / "whole/out.pt"))


@pytest.fixture
def command(gpt2_folder, tmp_path):
    """The arguments of ``krony heal``."""
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{"one two three four " * 8} {i}"}}\n' for i in range(40)))
    options = ["--data", tmp_path / "text.jsonl", "--length", 32, "--device", "cpu", "--epochs", 2]
    return ["heal", *map(str, [gpt2_folder, tmp_path / "out", *options])]


def dying(command: list[str], work: Path) -> None:
    """``krony heal``; the second process is killed as soon as there is a checkpoint."""
    if os.environ["RANK"] == "1":
        inner = callbacks.ShowProgress.on_step_end

        def on_step_end(self, args, state, control, **options) -> None:
            inner(self, args, state, control, **options)
            if find_last(work):
                os.kill(os.getpid(), signal.SIGKILL)

        callbacks.ShowProgress.on_step_end = on_step_end
    krony(*command)


def test_the_death_of_a_process_ends_the_others_with_a_sentence(command, tmp_path):
    """In a run without torchrun, which would end the others itself."""
    (code, said), (killed, _) = (p.ended() for p in started(2, tmp_path / "run", dying, command, tmp_path / "out.work"))
    assert (code, killed) == (2, -signal.SIGKILL), said
    last = find_last(tmp_path / "out.work")
    words = f"process 0 ends because another process of this run has, which may have said why; resume from {last}"
    assert words in " ".join(said.split())
    assert "Traceback" not in said and not (tmp_path / "out").exists()
    together(2, tmp_path / "again", krony, *command, "--resume")
    assert (tmp_path / "out/model.safetensors").exists()


def without_text(command: list[str]) -> None:
    """``krony heal``; the text's name is wrong in the second process."""
    if os.environ["RANK"] == "1":
        command[command.index("--data") + 1] += "l"
    krony(*command)


def test_what_one_process_alone_finds_wrong_is_what_it_says(command, tmp_path):
    """The text is missing on its machine; the other ends as well, and nothing is left."""
    ends = [process.ended() for process in started(2, tmp_path / "run", without_text, command)]
    assert [code for code, _ in ends] == [2, 2], ends
    said = [" ".join(err.split()) for _, err in ends]
    assert "No such file or directory" in said[1] and "another process of this run has" in said[0], said
    assert not (tmp_path / "out").exists()
