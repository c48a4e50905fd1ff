"""Small training runs, the same in one process and, sharded, in two. As a program it is what torchrun starts."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from healing_runs import TINY, heal, noise, text
from krony import KronyConfig, KronyError, compress
from krony.models import precision
from krony.models.copies import copy_without_values
from krony.runtime import distributed
from small_models import BUILDERS

DEVICE = os.environ.get("KRONY_TEST_DEVICE", "cpu")


@dataclass(frozen=True)
class Case:
    """A run: ``terms`` 0 leaves the model dense."""

    kind: str
    terms: int
    dtype: torch.dtype
    taught: bool
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.kind}-{self.terms}-{self.dtype}-{self.taught}-{self.checkpointing}"

    @property
    def tolerance(self) -> float:
        """How far apart weights may be, relative to the largest."""
        return 1e-9 if self.dtype == torch.float64 else 1e-5


QUICK = (
    Case("gpt2", 1, torch.float64, taught=True),
    Case("llama", 4, torch.float32, taught=False, checkpointing=True),
)
SLOW = tuple(
    case
    for kind in ("gpt2", "llama")
    for terms in (0, 1, 4)
    for dtype in (torch.float64, torch.float32)
    for taught in (False, True)
    if (case := Case(kind, terms, dtype, taught)) not in QUICK
)
RECIPE = replace(TINY, evaluations=3, text=0.25)


def built(case: Case):
    """The model before the run: scalars, biases, a tied head, and left factors of one row of ``m1`` each."""
    model = BUILDERS[case.kind]().to(case.dtype)
    if case.terms:
        wide, narrow = (48, 12) if case.kind == "gpt2" else (36, 12)
        compress(model, KronyConfig(f"{wide}x{narrow}:{case.terms}", init="van-loan", scalars=True))
    return model


def run(case: Case, folder: Path, *, shard: bool, resume: bool = False):
    """The report and the state of the model after the run."""
    precision.fast_dtype = lambda _: torch.float32
    model, teacher = built(case), None
    recipe = RECIPE
    if case.taught:
        teacher = BUILDERS[case.kind]().to(case.dtype)
        recipe = replace(recipe, hidden=1.0)
    if not distributed.is_first():
        model, teacher = as_another_gives_it(model, case), teacher and as_another_gives_it(teacher, case)
    options = {"shard": shard, "device": DEVICE, "freeze": "none", "keep_anyway": True, "resume": resume}
    options["gradient_checkpointing"] = case.checkpointing
    report = heal(model, *text(29).split(5), work=folder, recipe=recipe, teacher=teacher, **options)
    if not case.taught:
        state = [value.cpu() for value in model.state_dict().values()]
        assert all(map(torch.equal, state, distributed.from_first(state)))  # each process has the result
    return report, model.state_dict()


def as_another_gives_it(model, case: Case):
    """The model as another process than the first may give it: on the meta device, or with values of its own."""
    if case.taught:
        return copy_without_values(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def run_to_no_avail(folder: Path) -> None:
    """Text that training makes worse at, then a learning rate that ends in no number: the model is as it was before.

    The first run stops early. In every process.
    """
    distributed.init(DEVICE, shards=True)
    case = Case("llama", 1, torch.float32, taught=False)
    model, before = built(case), built(case).state_dict()
    train, validation = text(104).split(4)[0], noise()
    reckless = replace(TINY, learning_rate=0.05, final_rate=0.05, warm_up=0)
    options = {"shard": True, "device": DEVICE, "freeze": "none"}
    report = heal(model, train, validation, work=folder / "worse.work", recipe=reckless, **options)
    assert not report.improved and 0 < report.tokens < len(train) * train.length
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    try:
        heal(
            model, train, validation, work=folder / "nan.work", recipe=replace(reckless, learning_rate=1e30), **options
        )
    except KronyError as error:
        assert "lower the learning rate" in str(error)
    else:
        raise AssertionError("a loss that is no number went unnoticed")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(p.data) is torch.Tensor and p.requires_grad for p in model.parameters())


def main() -> None:
    """Runs, or resumes, every case whose name is an argument, in the folder that is the first argument."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for case in (*QUICK, *SLOW):
        for suffix, resume in (("", False), ("-resumed", True)):
            if case.name + suffix not in names:
                continue
            asked = distributed.asks_for_shards()  # by accelerate launch
            report, state = run(case, folder / f"{case.name}{suffix}.work", shard=not asked, resume=resume)
            if distributed.is_first():
                torch.save((report.curve, report.validation, state), folder / f"{case.name}{suffix}.pt")


if __name__ == "__main__":
    distributed.init(DEVICE, shards=True)
    main()
