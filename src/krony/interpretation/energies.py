"""How much each factor of a layer contributes to its output on a text, and where in the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from krony.errors import KronyError
from krony.interpretation.views import Side
from krony.kronecker.linear import KroneckerLinear

CONTEXTS = 3  # the strongest places that are kept for each group


class Energies:
    """Adds up what the factors of one layer contribute while the model reads one sequence after the other.

    The first token of a sequence is left out: its states are so much larger than all others in many models (Sun et al.,
    Massive activations in large language models, 2024) that nothing else would count. Without it a group's energy at a
    token is, for

    - ``outputs``: the squared norm of what the factor adds to the group's outputs,
    - ``inputs``: the squared norm of what the factor makes of the group's inputs alone.

    Attributes:
        gram: ``Σ_t ⟨y_f, y_g⟩``, ``(k, k)``, float64.
        energy: of each group, ``(k, groups)``, float64.
        best: the largest energies of each group, descending, ``(k, groups, CONTEXTS)``, at most one in a sequence.
        sequence: the sequences where they are, as ``best``, int64; -1 where there is none.
        position: the places in them.
        tokens: tokens that were added up.
    """

    def __init__(self, name: str, layer: KroneckerLinear, side: Side) -> None:
        self.name, self.layer, self.side = name, layer, side
        k, device = layer.shape.factors, layer.weight.device
        groups = layer.shape.m1 if side == "outputs" else layer.shape.n1
        self.gram = torch.zeros(k, k, dtype=torch.float64, device=device)
        self.energy = torch.zeros(k, groups, dtype=torch.float64, device=device)
        self.best = torch.zeros(k, groups, 0, device=device)
        self.sequence = torch.zeros(k, groups, 0, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.sequence)
        self.tokens = self.sequences = 0
        self.length = 0  # of a sequence; set before the model runs
        self.handle = layer.register_forward_pre_hook(self._read)

    def remove(self) -> None:
        """Removes the hook from the layer."""
        self.handle.remove()

    def _read(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, self.layer.in_features)  # (length, in)
        if len(x) != self.length:
            raise KronyError(
                f"{self.name} reads {len(x)} of {self.length} tokens, as an expert does: which ones isn't known, so "
                "its factors can't be interpreted"
            )
        outputs, energies = contributions(self.layer, x[1:], self.side)  # (k, t, out), (k, t, groups)
        stacked = outputs.transpose(0, 1)  # (t, k, out)
        self.gram += torch.bmm(stacked, stacked.mT).sum(0, dtype=torch.float64)
        self.energy += energies.sum(1, dtype=torch.float64)
        self._keep_best(energies)
        self.tokens += len(x) - 1
        self.sequences += 1

    def _keep_best(self, energies: Tensor) -> None:
        """Merges the strongest place of a sequence, from ``(k, t, groups)``, with those of earlier ones."""
        value, place = energies.max(1)  # (k, groups)
        best = torch.cat([self.best, value[..., None]], dim=-1)  # (k, groups, up to CONTEXTS + 1)
        sequence = torch.cat([self.sequence, torch.full_like(place, self.sequences)[..., None]], dim=-1)
        position = torch.cat([self.position, place[..., None] + 1], dim=-1)  # the first token was left out
        self.best, order = best.topk(min(CONTEXTS, best.shape[-1]), dim=-1)
        self.sequence, self.position = sequence.gather(-1, order), position.gather(-1, order)


def contributions(layer: KroneckerLinear, x: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """What each factor makes of inputs ``(t, in)``, in float32 or better.

    Returns:
        The outputs of every factor without the bias, ``(k, t, out)``, which add up to the layer's; and the energy of
        every group, ``(k, t, m1)`` for ``outputs`` and ``(k, t, n1)`` for ``inputs``.
    """
    s = layer.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    left, right = layer.weight.to(dtype), layer.coefficients().to(dtype)  # (k, m1, n1), (k, m2, n2)
    mixed = torch.einsum("tjq,kpq->ktjp", x.to(dtype).view(-1, s.n1, s.n2), right)  # (k, t, n1, m2)
    outputs = torch.einsum("kij,ktjp->ktip", left, mixed)  # (k, t, m1, m2)
    if side == "outputs":
        return outputs.flatten(2), outputs.square().sum(-1)  # (k, t, m1)
    return outputs.flatten(2), mixed.square().sum(-1) * left.square().sum(1)[:, None]  # (k, t, n1)
