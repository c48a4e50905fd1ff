"""The validation loss: every token once, in any number of processes."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from krony.data.rows import Rows
from krony.healing.validation import validation_loss
from krony.models import precision
from krony.runtime import distributed
from processes import together
from small_models import gpt2


def rows(count: int) -> Rows:
    generator = np.random.default_rng(0)
    return Rows(generator.integers(0, 256, count * 32).astype(np.uint16), 32)


@torch.no_grad()
def by_hand(model, some: Rows) -> float:
    """Over all predicted tokens of all rows at once."""
    ids = torch.stack([some[index]["input_ids"] for index in range(len(some))])
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("batch", [1, 2, 4, 100])
def test_a_smaller_last_batch_counts_for_less(monkeypatch, batch):
    monkeypatch.setattr("krony.models.precision.fast_dtype", lambda _: torch.float32)
    model = gpt2().double()
    assert validation_loss(model, rows(5), batch=batch) == pytest.approx(by_hand(model, rows(5)), rel=1e-6)


def losses_found(out: str) -> None:
    """All that a process does: the losses of one, four and five rows, in batches of one and two."""
    precision.fast_dtype = lambda _: torch.float32
    distributed.init()
    model, ran = gpt2().double(), []
    model.register_forward_hook(lambda *_: ran.append(1))
    found = [validation_loss(model, rows(count), batch=batch) for count in (1, 4, 5) for batch in (1, 2)]
    torch.save((found, len(ran)), f"{out}-{distributed.rank()}.pt")


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_finds_the_same(tmp_path, monkeypatch, processes):
    """One row is fewer than processes, five don't divide."""
    monkeypatch.setattr("krony.models.precision.fast_dtype", lambda _: torch.float32)
    out = tmp_path / "found"
    together(processes, tmp_path / "processes", losses_found, str(out))
    model = gpt2().double()
    expected = [by_hand(model, rows(count)) for count in (1, 4, 5) for _ in (1, 2)]
    times = set()
    for rank in range(processes):
        found, ran = torch.load(f"{out}-{rank}.pt")
        assert found == pytest.approx(expected, rel=1e-6)
        times.add(ran)
    assert len(times) == 1  # those of a sharded model wait for each other in every pass
