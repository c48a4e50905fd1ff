"""Second moments of activations on calibration text, which the calibrated initialisations read.

For every group of layers, over the calibration tokens t with weights w_t that sum to one:

- ``inputs``: ``Σ w_t x_t x_tᵀ`` and ``Σ w_t x_t`` of what enters the group (an MLP's up matrices, or a single layer),
- ``hidden``: the same for the inputs of an MLP's down matrix.
- ``sensitivity``, if asked for: the mean of ``g_t g_tᵀ``, where g is the gradient of the loss with respect to the
  group's outputs, for next tokens drawn from the model itself. In every layer a change E of the group's matrix then
  costs about ``½ tr(sensitivity · E C Eᵀ)`` nats per token (the Fisher information, factored as in K-FAC, Martens &
  Grosse 2015).

With token weighting, ``w_t ∝ 1/‖h_t‖²``, where h is the residual stream after the layer: errors count relative to the
residual stream. Otherwise a few tokens with huge hidden states would dominate.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from krony._version import __version__
from krony.errors import KronyError
from krony.init.base import Moments, SecondMoment
from krony.models.digests import model_digest
from krony.models.loading import context_length
from krony.models.modes import evaluating
from krony.models.surgery import Group, check_measurable, enclosing_layer
from krony.runtime import distributed
from krony.runtime.progress import Progress, silent
from krony.storage.files import check_cache
from krony.storage.tensor_files import read_header, save_beside

BATCH_TOKENS = 4096  # tokens per forward pass
SENSITIVITY_TOKENS = 16_384  # enough for a matrix of the model's width; a backward pass is expensive
ROUNDING = 1e-3  # relative asymmetry that float32 sums may leave in a symmetric matrix
ABANDONED = 24 * 3600  # age in seconds of a half-written file that no process finishes any more
BLOCKS = 4  # of columns, at least, in sums of symmetric products: those below the diagonal are not computed
BLOCK_COLUMNS = 512  # at most: the memory of a larger product is given back and asked for again in every sum
MEMORY = 4 * 1024**3  # bytes of sums in memory at once; a model that needs more takes several passes over the text


class Calibration:
    """The moments of every group of a model, computed on demand, group after group.

    Iterating yields one ``Moments`` per group, in order. The model runs once for as many groups as fit into ``MEMORY``,
    and again for the next ones. With ``cache`` a folder there stores them, one file per group, for this model (its
    config too), tokens and settings, and later calls read them. Under torch.distributed each rank runs its share of
    the sequences, and the sums are added up.

    Iterating raises KronyError for activations that are not finite, and for a cache that is damaged or can't be
    written.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: list[Group],
        ids: Tensor,
        *,
        token_weighting: bool = True,
        sensitivity: bool = False,
        cache: Path | str | None = None,
        progress: Progress = silent,
    ) -> None:
        """Checks the text; the model runs only when the moments are read.

        Args:
            ids: token ids ``(sequences, length)``.
            token_weighting: weighs tokens by ``1/‖h_t‖²``.
            sensitivity: computes ``Moments.sensitivity`` too, which takes backward passes.
            cache: the folder of the cache.
            progress: called with the number of sequences read, the number of all, and what is being done.

        Raises:
            KronyError: the model can't take these token ids, or a group is outside the transformer layers.
        """
        for group in groups:
            check_measurable(group)
        self.model, self.groups, self.ids = model, groups, check_ids(ids, model)
        self.token_weighting, self.sensitivity = token_weighting, sensitivity
        self.progress = progress
        self.computed: list[Moments] | None = None  # where the sums of all groups fit into MEMORY
        self.folder = None if cache is None else Path(cache) / f"moments-{self._key()}"
        if cache is not None and distributed.is_first():
            _clear_away(Path(cache))
        self.is_stored = all(self._is_stored(index) for index in range(len(groups)))
        self.source = "calibration is read" if self.folder is None else f"calibration is read and kept in {self.folder}"
        if self.is_stored:
            self.source = f"calibration is taken from {self.folder}, where it was kept"

    def __iter__(self) -> Iterator[Moments]:
        if self.computed is not None:
            yield from self.computed
            return
        chunks = list(self._chunks())
        for chunk in chunks:
            if all(map(self._is_stored, chunk)):
                yield from map(self._load, chunk)
                continue
            if self.folder is not None and distributed.is_first():
                check_cache(self.folder, "the calibration")  # before the text is read, which takes minutes
            computed = self._run([self.groups[index] for index in chunk])
            if self.folder is not None and distributed.is_first():
                for index, moments in zip(chunk, computed, strict=True):
                    self._store(index, moments)
            if len(chunks) == 1:
                self.computed = computed
            yield from computed

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:05}.safetensors"

    def _is_stored(self, index: int) -> bool:
        return self.folder is not None and distributed.all_agree(self._file(index).is_file())

    def _load(self, index: int) -> Moments:
        try:
            stored = {entry.name: entry.read() for entry in read_header(self._file(index))}
            return unpacked(stored, self.groups[index])
        except (KeyError, ValueError) as error:  # KronyError is a ValueError
            raise KronyError(
                f"{self._file(index)} is a damaged calibration: delete it, and krony reads the text again ({error})"
            ) from None

    def _store(self, index: int, moments: Moments) -> None:
        save_beside(packed(moments), self._file(index), "the calibration")

    def _chunks(self) -> Iterator[list[int]]:
        """The indices of the groups, in portions whose sums fit into ``MEMORY``."""
        chunk: list[int] = []
        size = 0
        for index, group in enumerate(self.groups):
            need = 8 * sum(n * n for n in {s.in_features for s in group.sites})
            if chunk and size + need > MEMORY:
                yield chunk
                chunk, size = [], 0
            chunk.append(index)
            size += need
        yield chunk

    def _run(self, groups: list[Group]) -> list[Moments]:
        """One pass over the text for these groups."""
        sums = [MomentAccumulator(self.model, group, self.token_weighting) for group in groups]
        gradients = [SensitivityAccumulator(self.model, group) for group in groups if self.sensitivity]
        ids = distributed.shard(self.ids)
        backward, forward = text_batches(ids, sensitivity=self.sensitivity, processes=distributed.count())
        done = 0
        try:
            with evaluating(self.model):
                for rows in backward:
                    self.progress(done, len(ids), "calibration, sensitivity")
                    _backward(self.model, rows.to(self.model.device))
                    done += len(rows)
                for rows in forward:
                    self.progress(done, len(ids), "calibration")
                    with torch.no_grad():  # the base model alone: no logits are needed
                        self.model.base_model(input_ids=rows.to(self.model.device), use_cache=False)
                    done += len(rows)
        finally:
            for accumulator in sums:
                accumulator.remove()
            for watcher in gradients:
                watcher.remove()
        moments = [accumulator.moments(self.ids.numel()) for accumulator in sums]
        if not self.sensitivity:
            return moments
        return [replace(m, sensitivity=one.sensitivity()) for m, one in zip(moments, gradients, strict=True)]

    def _key(self) -> str:
        """A hash of everything that the moments depend on."""
        digest = hashlib.blake2b(model_digest(self.model).encode(), digest_size=16)
        digest.update(self.ids.contiguous().numpy().data)
        settings = __version__, tuple(self.ids.shape), self.token_weighting, self.sensitivity and SENSITIVITY_TOKENS
        digest.update(repr((settings, [s.name for g in self.groups for s in g.sites])).encode())
        return digest.hexdigest()


def _clear_away(cache: Path) -> None:
    """Deletes files in the cache that killed processes left half-written; files being written are younger."""
    with suppress(OSError):  # not ours to delete, or deleted already
        for left in cache.glob("moments-*/**/*.partial"):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


class MomentAccumulator:
    """Adds up the moments of one group while the model runs."""

    def __init__(self, model: PreTrainedModel, group: Group, token_weighting: bool) -> None:
        """Registers the hooks; call ``remove`` after the last forward pass."""
        self.total = 0.0
        self.seen: dict[str, Tensor] = {}  # activations of the present batch, until its layer has run
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.weighted = token_weighting
        sites = {"inputs": group.sites[0].name} | ({"hidden": group.sites[-1].name} if group.is_mlp else {})
        self.handles: list[Any] = []
        for key, name in sites.items():
            self.handles.append(model.get_submodule(name).register_forward_pre_hook(self._take(key)))
        layer = enclosing_layer(model, group)
        self.handles.append(layer.register_forward_hook(self._add))

    def _take(self, key: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.seen[key] = args[0].detach().flatten(0, -2).float()  # (tokens, n)

        return hook

    def _add(self, _: nn.Module, __: Any, output: Any) -> None:
        weights = token_weights(output, self.weighted)
        self.total += weights.sum().item()
        for key, x in self.seen.items():
            if key not in self.sums:
                self.sums[key] = _zeros(x), x.new_zeros(x.shape[1], dtype=torch.float64)
            second, mean = self.sums[key]
            weighted = x * weights[:, None]
            _add_upper(second, weighted, x)
            mean.add_(weighted.sum(0))
        self.seen.clear()

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self.handles:
            handle.remove()

    def moments(self, tokens: int) -> Moments:
        """The moments of all ranks together, without sensitivity; ``tokens`` is the number of tokens read.

        Raises KronyError if an activation was not finite.
        """
        total = distributed.all_reduce_sum(torch.tensor([self.total], dtype=torch.float64)).item()
        seconds = {}
        for key, (second, mean) in self.sums.items():
            matrix, vector = _whole(second) / total, distributed.all_reduce_sum(mean) / total
            seconds[key] = SecondMoment(_rounded(matrix), _rounded(vector))
            if not torch.isfinite(seconds[key].matrix).all():
                raise KronyError("calibration: the model's activations are not finite on this text")
        return Moments(seconds["inputs"], seconds.get("hidden"), tokens)


class SensitivityAccumulator:
    """Adds up the gradients of one group's outputs, during forward and backward passes."""

    def __init__(self, model: PreTrainedModel, group: Group) -> None:
        """Registers the hook; call ``remove`` after the last forward pass."""
        self.tokens = 0
        self.sums: Tensor | None = None
        self.handle = model.get_submodule(group.sites[-1].name).register_forward_hook(self._watch)

    def _watch(self, _: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).float()  # (tokens, out)
        self.tokens += len(g)
        if self.sums is None:
            self.sums = _zeros(g)
        _add_upper(self.sums, g, g)

    def remove(self) -> None:
        """Removes the hook from the model."""
        self.handle.remove()

    def sensitivity(self) -> Tensor | None:
        """The mean of ``g gᵀ`` over the tokens of all ranks, ``(out, out)``; None if no backward pass ran.

        Raises KronyError if a gradient was not finite.
        """
        if self.sums is None:
            return None
        count = distributed.all_reduce_sum(torch.tensor(self.tokens)).item()
        sensitivity = _rounded(_whole(self.sums) / count)
        if not torch.isfinite(sensitivity).all():
            raise KronyError("calibration: the gradients of the model's loss are not finite on this text")
        return sensitivity


def _rounded(sums: Tensor) -> Tensor:
    """As the cache keeps it, so that a run from the cache gives the same factors."""
    return sums.float().double()


def _zeros(x: Tensor) -> Tensor:
    """``(n, n)`` in float64 for ``x: (tokens, n)``."""
    return x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)


def _add_upper(sums: Tensor, first: Tensor, second: Tensor) -> None:
    """Adds ``firstᵀ second`` to ``sums: (n, n)``, of which only the upper triangle is right: it is symmetric.

    ``first`` and ``second``: ``(tokens, n)``, float32; ``sums``: float64. Blocks below the diagonal are not computed.
    """
    n = first.shape[1]
    size = min(-(-n // BLOCKS), BLOCK_COLUMNS)
    for start in range(0, n, size):
        block = slice(start, start + size)
        sums[block, start:].add_(first[:, block].T @ second[:, start:])


def _whole(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle, summed over all processes."""
    upper = distributed.all_reduce_sum(upper).triu()
    return upper.add_(upper.triu(1).T)


def batches(ids: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """Splits ``ids: (sequences, length)`` into batches of about ``tokens`` tokens, at least one sequence each.

    Examples:
        >>> [len(batch) for batch in batches(torch.zeros(5, 8, dtype=torch.long), tokens=16)]
        [2, 2, 1]
    """
    return ids.split(max(1, tokens // ids.shape[1])) if len(ids) else ()


def text_batches(
    ids: Tensor, *, sensitivity: bool, processes: int = 1
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The batches of ``ids: (sequences, length)`` on which the sensitivity is measured too, and the other ones.

    The first are smaller, because a backward pass keeps activations. ``processes`` share the text.
    """
    first = sensitivity_rows(ids, processes) if sensitivity else 0
    return batches(ids[:first], BATCH_TOKENS // 4), batches(ids[first:], BATCH_TOKENS)


def sensitivity_rows(ids: Tensor, processes: int = 1) -> int:
    """On how many of ``ids: (sequences, length)`` each of the ``processes`` measures the sensitivity."""
    return min(len(ids), -(-SENSITIVITY_TOKENS // (ids.shape[1] * processes)))


def _backward(model: PreTrainedModel, ids: Tensor) -> None:
    """Runs forward and backward on ``ids: (sequences, length)`` for the hooks; weights must not require gradients."""
    first = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            drawn_likelihood(model(input_ids=ids, use_cache=False).logits, ids).backward()
    finally:
        first.remove()


def drawn_likelihood(logits: Tensor, ids: Tensor) -> Tensor:
    """The sum of the log-likelihoods of next tokens drawn from the model itself; the draw depends on the text alone.

    Args:
        logits: ``(sequences, length, vocabulary)``.
        ids: the sequences, ``(sequences, length)``.
    """
    likelihoods = logits.float().log_softmax(-1)
    return likelihoods.gather(-1, _draw(likelihoods, ids)).sum()


@torch.no_grad()
def _draw(likelihoods: Tensor, ids: Tensor) -> Tensor:
    """Next tokens drawn from the model's distributions, ``(b, length, 1)``; they don't depend on the batch."""
    drawn = []
    for row, one in zip(ids.tolist(), likelihoods, strict=True):
        generator = torch.Generator().manual_seed(hash(tuple(row)) % 2**63)
        noise = torch.rand(one.shape[0], 1, generator=generator).to(one.device)
        drawn.append((one.exp().cumsum(-1) < noise).sum(-1, keepdim=True).clamp_max(one.shape[-1] - 1))
    return torch.stack(drawn)


def check_ids(ids: Tensor, model: PreTrainedModel) -> Tensor:
    """``ids``, if they are token ids ``(sequences, length)`` of the model's vocabulary and context.

    Raises KronyError otherwise.
    """
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise KronyError(
            f"calibration takes token ids of shape (sequences, length), not {tuple(ids.shape)} {ids.dtype}"
        )
    if ids.shape[1] > context_length(model):
        raise KronyError(f"calibration has sequences of {ids.shape[1]} tokens, the model takes {context_length(model)}")
    known = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= known or int(ids.min()) < 0:
        raise KronyError(f"calibration has token {int(ids.max())}, the model knows {known}: another model's tokenizer")
    return ids


def token_weights(output: Any, weighted: bool) -> Tensor:
    """``1/‖h_t‖²`` of a transformer layer's output ``(..., width)``, or ones: ``(tokens,)``, float32."""
    after = (output[0] if isinstance(output, tuple) else output).detach().flatten(0, -2).float()  # (tokens, d)
    sizes = after.square().sum(-1).clamp_min(1e-12)
    return sizes.reciprocal() if weighted else torch.ones_like(sizes)


def packed(moments: Moments) -> dict[str, Tensor]:
    """The tensors of a file that keeps these moments, float32."""
    named = {"inputs": moments.inputs, "hidden": moments.hidden}
    tensors = {"tokens": torch.tensor(moments.tokens)}
    if moments.sensitivity is not None:
        tensors["sensitivity"] = moments.sensitivity.float().cpu()
    for key, second in named.items():
        if second is not None:
            tensors[f"{key}.matrix"] = second.matrix.float().cpu()
            tensors[f"{key}.mean"] = second.mean.float().cpu()
    return tensors


def unpacked(stored: dict[str, Tensor], group: Group) -> Moments:
    """The moments of ``group`` that a file keeps. Raises KeyError or ValueError if it does not hold valid ones."""
    _check_stored(stored, group)
    seconds = {
        key: SecondMoment(stored[f"{key}.matrix"].double(), stored[f"{key}.mean"].double())
        for key in ("inputs", "hidden")
        if f"{key}.matrix" in stored
    }
    sensitivity = stored["sensitivity"].double() if "sensitivity" in stored else None
    return Moments(seconds["inputs"], seconds.get("hidden"), int(stored["tokens"]), sensitivity)


def _check_stored(stored: dict[str, Tensor], group: Group) -> None:
    """Raises ValueError unless the shapes fit the group, values are finite, and second moments are symmetric."""
    into, out = group.sites[0].in_features, group.sites[-1].out_features
    sizes = {"inputs": into} | ({"hidden": group.sites[-1].in_features} if group.is_mlp else {})
    shapes: dict[str, tuple[int, ...]] = {f"{key}.matrix": (n, n) for key, n in sizes.items()} | {
        f"{key}.mean": (n,) for key, n in sizes.items()
    }
    shapes |= {"tokens": (), "sensitivity": (out, out)}
    for name in shapes.keys() - {"sensitivity"} - stored.keys():
        raise ValueError(f"{name} is missing")
    for name, value in stored.items():
        if tuple(value.shape) != shapes.get(name):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, not {shapes.get(name)}")
        if name != "tokens" and not value.is_floating_point():
            raise ValueError(f"{name} is of type {str(value.dtype).removeprefix('torch.')}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} has values that are not finite")
        if value.ndim == 2 and (value.diagonal() < 0).any():
            raise ValueError(f"{name} has a negative diagonal, which is a sum of squares")
        if value.ndim == 2 and (value - value.T).abs().max() > ROUNDING * value.abs().max():
            raise ValueError(f"{name} is not symmetric")
