"""Whether a model is the paper's GPT-2 124M: by its config and the norms that Table 4 prints, not by its name."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from krony.models.surgery import find_groups, model_shape, take_out
from krony.reproduce.figures import TABLE4

TOLERANCE = 0.01  # of a norm; the paper prints three digits, and other weights differ by far more
COUNTS_FROM = (0, 1)  # the paper doesn't say from which number it counts layers


@dataclass(frozen=True)
class Likeness:
    """What a model has in common with GPT-2 124M.

    Attributes:
        is_gpt2: whether it is GPT-2 124M.
        reason: why it is or why it isn't, in words that follow "by" or "because".
        counts_from: the number of the first layer in Table 4, where its norms are nearest to the model's.
    """

    is_gpt2: bool
    reason: str
    counts_from: int = 0


def has_gpt2s_config(model: PreTrainedModel) -> bool:
    """Whether class, number of parameters and MLPs are those of GPT-2 124M; the model may be on the meta device."""
    return model.config.model_type == "gpt2" and model_shape(model, find_groups(model)).is_gpt2


def likeness(model: PreTrainedModel) -> Likeness:
    """Compares a model's config with GPT-2 124M's, and the norms of its MLPs with the originals of Table 4."""
    if not has_gpt2s_config(model):
        return Likeness(False, "its config is another")
    groups = find_groups(model)

    def farthest(counts_from: int) -> tuple[float, str]:
        """The largest relative difference from a printed norm, and which it is."""
        found = []
        for paper in TABLE4:
            site = groups[paper.layer - counts_from].sites[paper.matrix - 1]
            ours, theirs = take_out(model, site.name)[0].double().norm().item(), paper.frobenius[0]
            found.append((abs(ours / theirs - 1), f"{site.name} has norm {ours:.1f} and Table 4 prints {theirs:g}"))
        return max(found)

    counts_from = min(COUNTS_FROM, key=lambda first: farthest(first)[0])
    difference, words = farthest(counts_from)
    if difference > TOLERANCE:
        return Likeness(False, f"{words}, though its config is GPT-2's", counts_from)
    return Likeness(True, f"its config and the norms of Table 4, within {difference:.2%}", counts_from)
