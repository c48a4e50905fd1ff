"""Perplexity by two protocols, and the accuracy of the last word.

``paper`` is the published script's: rows joined by blank lines, windows of the context length, the mean of the
windows' mean negative log-likelihoods. ``token`` weights every token equally, and joins documents by the end-of-text
token. On a file with one document the two differ only where windows differ in length, which is the last one. WikiText's
rows are lines, so there the text differs too.

Several processes share the windows. Each window is computed as in one process, and every process adds up the same
figures in the same order, so that the results are identical.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.data.sets import TEST_SETS, begin, join_documents, join_rows, load_texts
from krony.errors import KronyError
from krony.evaluation.settings import EvaluationOptions
from krony.models.loading import context_length
from krony.models.modes import evaluating
from krony.runtime import distributed
from krony.runtime.progress import Progress, silent

WINDOW = 1024  # GPT-2's context and the published script's
BATCH_TOKENS = 4096  # tokens of LAMBADA passages per forward pass

Case = tuple[list[int], int]  # the token ids of a passage, and how many of them are its last word


@dataclass(frozen=True, kw_only=True)
class Result:
    """A figure, and all that is needed to measure it again.

    Attributes:
        data: the name of the set, or the file.
        protocol: ``paper`` or ``token``.
        tokens: tokens predicted.
        perplexity: infinite where it exceeds the largest float.
        accuracy: share of right last words, for a set that is made for it; otherwise None.
        window: tokens per window.
        stride: tokens between the starts of two windows.
    """

    data: str
    protocol: str
    tokens: int
    perplexity: float
    accuracy: float | None
    window: int
    stride: int

    def to_json(self) -> dict[str, Any]:
        """The result for ``--json``."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path,
    *,
    data_dir: Path | str | None = None,
    protocol: str = "paper",
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> Result:
    """Perplexity of ``model`` on a named test set or a file, and the accuracy of the last word on LAMBADA.

    In a run of several processes (``torchrun``) every process calls it with the same model and text: they share the
    work, and each gets the result that one process would get.

    Args:
        model: a causal LM, dense or compressed; its modes are the same afterwards.
        tokenizer: the model's.
        data: ``wikitext-2``, ``wikitext-103``, ``lambada``, ``python-docs``, a text or jsonl file, or another set on
            the hub, ``name[:configuration][@split]``, of which the ``test`` split is read if none is named.
        data_dir: folder that holds the named sets; None reads them from the hub.
        protocol: ``paper`` is the mean over windows, ``token`` the mean over tokens.
        window: tokens per window, from 2 to the model's context; None for the context, at most 1024.
        stride: tokens between the starts of two windows; None for the window, so that windows don't overlap.
        max_tokens: use the first N tokens only.
        progress: called with the tokens done, all tokens, and what is measured.

    Raises:
        KronyError: unknown data or protocol, a window that the model can't take, too little text.

    Examples:
        >>> import krony
        >>> model, tokenizer = krony.demo_model(), krony.load_tokenizer("demo")
        >>> krony.evaluate(model, tokenizer, "python-docs", max_tokens=256).tokens
        255
    """
    data, folder = str(data), None if data_dir is None else Path(data_dir)
    options = EvaluationOptions(data_dir=folder, protocol=protocol, window=window, stride=stride, max_tokens=max_tokens)
    window, stride = _window_and_stride(model, options)
    rows = load_texts(data, folder, tokens=max_tokens)
    ids = (join_rows if protocol == "paper" else join_documents)(rows, tokenizer, max_tokens)
    check_ids(data, ids, model)
    accuracy = None
    with evaluating(model):
        perplexity, tokens = measure_perplexity(
            model, ids, protocol=protocol, window=window, stride=stride, progress=progress
        )
        if data in TEST_SETS and TEST_SETS[data].last_word:
            accuracy = last_word_accuracy(model, tokenizer, rows, max_tokens=max_tokens, progress=progress)
    return Result(
        data=data,
        protocol=protocol,
        tokens=tokens,
        perplexity=perplexity,
        accuracy=accuracy,
        window=window,
        stride=stride,
    )


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """``(start, end, fresh)`` of each window over ``length`` tokens; no earlier window has its last ``fresh`` tokens.

    Examples:
        >>> list(windows(10, window=4, stride=3))
        [(0, 4, 4), (3, 7, 3), (6, 10, 3)]
    """
    before = 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        yield start, end, end - before
        before = end
        if end == length:
            return


def measure_perplexity(
    model: PreTrainedModel, ids: Tensor, *, protocol: str, window: int, stride: int, progress: Progress = silent
) -> tuple[float, int]:
    """Perplexity of token ids ``(n,)`` for a model in eval mode, and how many tokens were predicted.

    The first token of a window that overlaps none has no context and isn't predicted; a window of one token counts
    for nothing. Several processes share the windows.
    """
    losses, counts = measure_losses(model, ids, window=window, stride=stride, progress=progress)
    predicted = [(loss, count) for loss, count in zip(losses.tolist(), counts.tolist(), strict=True) if count]
    if protocol == "paper":
        nll = sum(loss / count for loss, count in predicted) / len(predicted)
    else:
        nll = sum(loss for loss, _ in predicted) / sum(count for _, count in predicted)
    return (math.exp(nll) if nll < 700 else math.inf), int(counts.sum())


@torch.inference_mode()
def measure_losses(
    model: PreTrainedModel, ids: Tensor, *, window: int, stride: int, progress: Progress = silent
) -> tuple[Tensor, Tensor]:
    """Per window over token ids ``(n,)``: the loss in nats, float64, and how many tokens were predicted, int64."""
    pieces = list(windows(len(ids), window, stride))
    losses = torch.zeros(len(pieces), dtype=torch.float64)
    counts = torch.tensor([min(fresh, end - start - 1) for start, end, fresh in pieces])
    for index in range(distributed.rank(), len(pieces), distributed.count()):
        start, end, _ = pieces[index]
        progress(end, len(ids), "perplexity")
        if counts[index]:
            losses[index] = _loss(model, ids[start:end], int(counts[index]))
    return distributed.all_reduce_sum(losses), counts  # every process has the figures of all windows


def _loss(model: PreTrainedModel, piece: Tensor, predicted: int) -> float:
    """The negative log-likelihood, in nats, of the last ``predicted`` tokens of ``piece``, ``(length,)``."""
    piece = piece.to(model.device)
    logits = model(piece[None], use_cache=False).logits[0, -predicted - 1 : -1]  # (predicted, vocabulary)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(exact, piece[-predicted:], reduction="sum").item()


@torch.inference_mode()
def last_word_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[str],
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> float:
    """Share of passages whose last word is, token by token, the most likely continuation (LAMBADA's measure).

    Several processes share the passages.
    """
    cases = _cases(tokenizer, passages, context_length(model), max_tokens)
    batches = list(_batches(cases))
    right = torch.zeros((), dtype=torch.int64)
    for done, batch in batches[distributed.rank() :: distributed.count()]:
        progress(done, len(cases), "last words")
        length = max(len(tokens) for tokens, _ in batch)
        padded = [tokens + [0] * (length - len(tokens)) for tokens, _ in batch]  # on the right: nothing looks ahead
        best = model(torch.tensor(padded, device=model.device), use_cache=False).logits.argmax(-1)  # (batch, length)
        for row, (tokens, answer) in zip(best.tolist(), batch, strict=True):
            end = len(tokens)
            right += row[end - answer - 1 : end - 1] == tokens[end - answer :]
    return int(distributed.all_reduce_sum(right)) / len(cases)


def _cases(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[str], longest: int, max_tokens: int | None
) -> list[Case]:
    """The passages as token ids, cut on the left to ``longest``; those within the first ``max_tokens`` tokens."""
    cases: list[Case] = []
    used = 0
    for passage in passages:
        context, _, word = passage.rpartition(" ")
        tokens = begin(tokenizer, f"{context} {word}")
        used += len(tokens)
        if max_tokens is not None and used > max_tokens and cases:
            break
        answer = len(tokens) - len(begin(tokenizer, context))
        cases.append((tokens[-longest:], answer))
    return cases


def _batches(cases: list[Case]) -> Iterator[tuple[int, list[Case]]]:
    """Cases of similar length together, with the number of cases done after each batch."""
    batch: list[Case] = []
    for done, case in enumerate(sorted(cases, key=lambda c: len(c[0])), start=1):
        batch.append(case)
        if done == len(cases) or (len(batch) + 1) * len(case[0]) > BATCH_TOKENS:
            yield done, batch
            batch = []


def _window_and_stride(model: PreTrainedModel, options: EvaluationOptions) -> tuple[int, int]:
    """Tokens per window and between windows. Raises KronyError if the model can't take them."""
    most = context_length(model)
    window = min(most, WINDOW) if options.window is None else options.window
    if window > most:
        raise KronyError(f"a window of {window} tokens: this model takes from 2 to {most}")
    stride = window if options.stride is None else options.stride
    if stride > window:
        raise KronyError(f"a stride of {stride} tokens: it takes a number from 1 to the window, {window}")
    return window, stride


def check_ids(data: str, ids: Tensor, model: PreTrainedModel) -> None:
    """Raises KronyError unless token ids ``(n,)`` of the text ``data`` are the model's, and at least two."""
    if len(ids) < 2:
        raise KronyError(f"{data} has {len(ids)} tokens: there is nothing to predict")
    known, highest = model.get_input_embeddings().weight.shape[0], int(ids.max())
    if highest >= known:
        raise KronyError(
            f"{data} has token {highest}, and the model knows {known} tokens: the tokenizer belongs to another model"
        )
