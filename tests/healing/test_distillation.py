"""The teacher's loss, against its formula."""

from dataclasses import replace

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from krony.healing.distillation import distance, distil
from krony.healing.recipes import RECIPES
from krony.models.divergence import Goal, divergence


def pair(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=generator, dtype=torch.float64) for _ in range(2))


def test_distance_is_relative_to_the_teachers_state():
    ours, theirs = pair(2, 3, 5)
    expected = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).square().mean()
    torch.testing.assert_close(distance([ours], [theirs]), expected)
    both = distance([ours, theirs], [theirs, theirs])  # the mean over layers
    torch.testing.assert_close(both, expected / 2)
    torch.testing.assert_close(distance([100 * ours], [100 * theirs]), expected)
    assert distance([torch.zeros(2, 5)], [torch.zeros(2, 5)]) == 0  # no 0/0


class Logits:
    """Compares logits as they are."""

    loss = staticmethod(divergence)


def test_the_parts_add_up():
    (logits, wanted), (states, their_states) = pair(2, 4, 7), pair(2, 4, 5)
    ids = torch.tensor([[1, 2, 3, 4], [6, 5, 0, 1]])
    outputs = ModelOutput(logits=logits, hidden_states=(states, 2 * states))
    teacher = ModelOutput(logits=wanted, hidden_states=(their_states, their_states))
    recipe = replace(RECIPES["quick"], text=0.25, hidden=3.0, temperature=2.0)
    text = F.cross_entropy(logits[:, :-1].reshape(-1, 7), ids[:, 1:].reshape(-1))
    expected = 0.75 * divergence(logits, wanted, Goal(2.0)) + 0.25 * text
    expected = expected + 3 * distance([2 * states], [their_states])  # not the embeddings' own
    torch.testing.assert_close(distil(outputs, teacher, ids, recipe, Logits()), expected)
