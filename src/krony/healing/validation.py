"""The validation loss: every token of every row counts once, in any number of processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from krony.data.rows import Rows
from krony.models.precision import fast_products
from krony.runtime import distributed


def _nothing() -> None:
    """Nobody asks for an end."""


@torch.no_grad()
def validation_loss(
    model: PreTrainedModel, rows: Rows, *, batch: int = 1, check: Callable[[], None] = _nothing
) -> float:
    """The mean loss of ``model``, which is in eval mode, over all predicted tokens of ``rows``, nats per token.

    Processes share the rows and sum what they find, so each of them has to call it. Unlike a padded loader, no row
    counts twice, and a last batch that is smaller counts for less. All processes run equally many batches, as sharded
    models require; what a process without rows finds does not count.

    Args:
        batch: rows at once.
        check: called before every forward pass, in all processes equally often; what it raises ends the validation.
    """
    own = range(distributed.rank(), len(rows), distributed.count())
    most = len(range(0, len(rows), distributed.count()))  # rows of the first process
    sums = torch.zeros(2, dtype=torch.float64)  # loss and predicted tokens
    for start in range(0, most, batch):
        check()
        mine = own[start : start + batch]
        ids = torch.stack([rows[index]["input_ids"] for index in mine or [0]])  # (batch, length)
        ids = ids.to(model.device)
        with fast_products(model):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        predicted = len(mine) * (rows.length - 1)
        sums += torch.tensor([loss.item() * predicted, predicted], dtype=torch.float64)
    total, predicted = distributed.all_reduce_sum(sums).tolist()
    return total / predicted
