"""An order of hidden neurons in which sums of k Kronecker products come near, found by clustering of subspaces.

In an exact sum, neuron p of group i has the row ``Σ_f left[f, i] ⊗ right[f, p]``. As an ``(n1, n2)`` block its columns
lie in the span of the k vectors ``left[f, i]``: the neurons of a group share a subspace of k dimensions, each matrix of
the MLP its own. Groups are found one after another, from one neuron each. Neuron p has the same leverage in every group
(its share of the projection onto the row space of the group's blocks), and this tells which is which.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from krony.kronecker.algebra import KronShape

TRIED = 8  # neurons that are tried as the next of a group
ROUNDS = 2  # of finding a group's subspace from its neurons, and its neurons from its subspace
SMALL = 512  # neurons; up to here the group that fits best is taken first, which takes a search from each of them


def by_subspaces(matrices: Sequence[Tensor], shapes: Sequence[KronShape], *, best_first: bool = False) -> Tensor:
    """An order of the rows, ``(n,)``, of all ``matrices: (n, width)``, float64.

    ``best_first`` takes groups in the order of how well they fit. Otherwise groups start from the neurons of largest
    norm, which is faster, and better for matrices that are far from any sum of products.
    """
    first = shapes[0]
    blocks = [w.view(len(w), s.n1, s.n2) for w, s in zip(matrices, shapes, strict=True)]  # (n, n1, n2)
    turned = first.n2 > first.n1  # the rows of the blocks say more: then the neurons of a place p are the groups
    if turned:
        blocks = [b.mT for b in blocks]
    search = _Search(blocks, first.m1 if turned else first.m2, [s.factors for s in shapes])
    groups = search.groups_best_first() if best_first else search.groups_by_norm()
    groups = groups.gather(1, search.leverage(groups).argsort(dim=1, descending=True, stable=True))
    return (groups.T if turned else groups).flatten()


class _Search:
    """Groups of ``size`` neurons whose ``blocks[w][neuron]: (a, b)`` share a subspace of ``ranks[w]`` dimensions."""

    def __init__(self, blocks: list[Tensor], size: int, ranks: list[int]) -> None:
        squares = torch.stack([b.square().sum((1, 2)) for b in blocks]).sum(0)  # (n,)
        self.norms = squares.sqrt()
        self.blocks = blocks
        self.scaled = [b / self.norms.clamp_min(torch.finfo(b.dtype).tiny)[:, None, None] for b in blocks]
        self.columns = [b.permute(1, 0, 2).flatten(1) for b in self.scaled]  # (a, n*b)
        self.size, self.ranks = size, ranks
        self.free = torch.ones(len(self.norms), dtype=torch.bool, device=self.norms.device)

    def groups_by_norm(self) -> Tensor:
        """``(groups, size)``: each of the largest neuron left and of those that fit to it."""
        groups = []
        for lead in self.norms.argsort(descending=True, stable=True).tolist():
            if self.free[lead]:
                groups.append(self._group(lead))
                self.free[groups[-1]] = False
        return torch.stack(groups)

    def groups_best_first(self) -> Tensor:
        """``(groups, size)``: of all groups that can be found from one neuron the one that fits best, and so on."""
        queue: list[tuple[float, int, Tensor]] = []
        for lead in range(len(self.norms)):
            group = self._group(lead)
            queue.append((-self._quality(group), lead, group))
        heapq.heapify(queue)
        groups = []
        while queue:
            _, lead, group = heapq.heappop(queue)
            if not self.free[lead]:
                continue
            if self.free[group].all():
                groups.append(group)
                self.free[group] = False
            else:  # some are taken; with others it fits at most as well
                group = self._group(lead)
                heapq.heappush(queue, (-self._quality(group), lead, group))
        return torch.stack(groups)

    def leverage(self, groups: Tensor) -> Tensor:
        """``(groups, size)``: each neuron's share of the projection onto the row space of its group's blocks."""
        total = torch.zeros(groups.shape, dtype=self.norms.dtype, device=groups.device)
        for blocks, rank in zip(self.blocks, self.ranks, strict=True):
            _, _, rows = torch.linalg.svd(self._joined(blocks, groups), full_matrices=False)
            total += rows[:, :rank].square().sum(1).unflatten(1, (self.size, -1)).sum(2)
        return total

    def _group(self, lead: int) -> Tensor:
        """The free neurons that fit best to ``lead``, itself among them: ``(size,)``."""
        free = self.free.clone()
        free[lead] = False
        group = torch.tensor([lead], device=free.device)
        while len(group) < self.size and any(
            len(group) * b.shape[2] < r for b, r in zip(self.blocks, self.ranks, strict=True)
        ):
            group = self._with_another(group, free)
            free[group] = False
        for _ in range(ROUNDS):
            fit = self._fit(group[None])[0].where(self.free, -1.0)  # (n,)
            fit[lead] = torch.inf
            before, group = group, fit.topk(self.size).indices.sort().values
            if torch.equal(before, group):
                break
        return group

    def _quality(self, group: Tensor) -> float:
        """The share of the neurons' squared norms that lies in the subspaces of their group."""
        return self._fit(group[None])[0, group].mean().item()

    def _with_another(self, group: Tensor, free: Tensor) -> Tensor:
        """The group and, of the neurons that are nearest to its subspace, the one with which most others fit."""
        near = self._fit(group[None])[0].where(free, -1.0)
        tried = near.topk(min(TRIED, int(free.sum()))).indices  # (t,)
        groups = torch.cat([group.expand(len(tried), -1), tried[:, None]], dim=1)  # (t, members)
        fit = self._fit(groups).where(free, -1.0).scatter(1, tried[:, None], -1.0)  # (t, n)
        others = fit.topk(max(1, self.size - groups.shape[1]), dim=1).values.sum(1)
        return groups[others.argmax()]

    def _fit(self, groups: Tensor) -> Tensor:
        """How much of each neuron's squared norm lies in the subspaces of ``groups: (t, members)``: ``(t, n)``."""
        total = torch.zeros(len(groups), len(self.norms), dtype=self.norms.dtype, device=groups.device)
        for blocks, columns, rank in zip(self.scaled, self.columns, self.ranks, strict=True):
            basis, _, _ = torch.linalg.svd(self._joined(blocks, groups), full_matrices=False)
            basis = basis[..., :rank].mT  # (t, rank, a)
            inside = (basis.flatten(0, 1) @ columns).unflatten(0, basis.shape[:2])  # (t, rank, n*b)
            total += inside.square().sum(1).unflatten(1, (len(self.norms), -1)).sum(2)
        return total

    @staticmethod
    def _joined(blocks: Tensor, groups: Tensor) -> Tensor:
        """The blocks of each group side by side: ``(t, members) -> (t, a, members*b)``."""
        return blocks[groups].transpose(1, 2).flatten(2)
