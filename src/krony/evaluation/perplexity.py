"""Perplexity by two protocols, and the accuracy of the last word.

``paper`` is the published script's: rows joined by blank lines, windows of the context length, the mean of the
windows' mean negative log-likelihoods. ``token`` weighs every token alike, and joins documents by the end-of-text
token. On a file of one document they differ where windows differ in length, in the short last one; WikiText's rows are
lines, so that there it is another text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.data.sets import TEST_SETS, join_documents, join_rows, load_texts
from krony.errors import KronyError
from krony.models.loading import context_length
from krony.runtime.progress import Progress, silent

PROTOCOLS = ("paper", "token")
WINDOW = 1024  # GPT-2's context and the published script's
BATCH_TOKENS = 4096  # tokens of LAMBADA passages a forward pass


@dataclass(frozen=True)
class Result:
    """A figure and all that is needed to get it again."""

    data: str
    protocol: str  # paper or token
    tokens: int  # predicted ones
    perplexity: float
    accuracy: float | None  # of the last word, where the set is made for it
    window: int
    stride: int

    def to_json(self) -> dict:
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str,
    *,
    data_dir: Path | str | None = None,
    protocol: str = "paper",
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> Result:
    """Perplexity of ``model`` on a named test set or a file, and the last-word accuracy on LAMBADA.

    Args:
        data: ``wikitext-2``, ``wikitext-103``, ``lambada``, ``python-docs``, or a text or jsonl file.
        data_dir: folder that holds the named sets, instead of the hub.
        window: tokens a window, at most the model's context; the smaller of the context and 1024 by default.
        stride: tokens between the starts of windows; the window by default, so that none overlap.
        max_tokens: use the first so many tokens only.

    Raises:
        KronyError: unknown data or protocol, a window that the model can't take, too little text.
    """
    window = window or min(context_length(model), WINDOW)
    stride = stride or window
    _check(model, protocol, window, stride, max_tokens)
    rows = load_texts(data, None if data_dir is None else Path(data_dir))
    ids = (join_rows if protocol == "paper" else join_documents)(rows, tokenizer)[:max_tokens]
    _check_ids(data, ids, model)
    training = model.training
    model.eval()
    try:
        perplexity, tokens = measure_perplexity(
            model, ids, protocol=protocol, window=window, stride=stride, progress=progress
        )
        accuracy = None
        if data in TEST_SETS and TEST_SETS[data].last_word:
            accuracy = last_word_accuracy(model, tokenizer, rows, max_tokens=max_tokens, progress=progress)
    finally:
        model.train(training)
    return Result(data, protocol, tokens, perplexity, accuracy, window, stride)


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """``(start, end, fresh)`` of each window over ``length`` tokens: its last ``fresh`` tokens were in none before."""
    before = 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        yield start, end, end - before
        before = end
        if end == length:
            return


@torch.inference_mode()
def measure_perplexity(
    model: PreTrainedModel, ids: Tensor, *, protocol: str, window: int, stride: int, progress: Progress = silent
) -> tuple[float, int]:
    """Perplexity of token ids ``(n,)``, and how many of them were predicted.

    The first token of a window that overlaps none has no context and isn't predicted; a window of one token counts
    for nothing.
    """
    sums: list[float] = []
    counts: list[int] = []
    for start, end, fresh in windows(len(ids), window, stride):
        progress(end, len(ids), "perplexity")
        piece = ids[None, start:end].to(model.device)  # (1, length)
        predicted = min(fresh, end - start - 1)
        if predicted == 0:
            continue
        logits = model(piece, use_cache=False).logits[0, -predicted - 1 : -1]  # (predicted, vocabulary)
        sums.append(F.cross_entropy(logits.float(), piece[0, -predicted:], reduction="sum").item())
        counts.append(predicted)
    nll = sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums) if protocol == "paper" else 0.0
    if protocol == "token":
        nll = sum(sums) / sum(counts)
    return (math.exp(nll) if nll < 700 else math.inf), sum(counts)


@torch.inference_mode()
def last_word_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: list[str],
    *,
    max_tokens: int | None = None,
    progress: Progress = silent,
) -> float:
    """Share of passages whose last word is, token by token, what the model holds most likely (LAMBADA's measure)."""
    cases: list[tuple[list[int], int]] = []  # token ids, and how many of them are the last word
    used = 0
    for passage in passages:
        context, _, word = passage.rpartition(" ")
        whole = tokenizer(f"{context} {word}")["input_ids"]
        used += len(whole)
        if max_tokens is not None and used > max_tokens and cases:
            break
        answer = len(whole) - len(tokenizer(context)["input_ids"])
        cases.append((whole[-context_length(model) :], answer))
    right = 0
    for done, batch in _batches(cases):
        progress(done, len(cases), "last words")
        length = max(len(whole) for whole, _ in batch)
        padded = [whole + [0] * (length - len(whole)) for whole, _ in batch]  # on the right: nothing looks ahead
        best = model(torch.tensor(padded, device=model.device), use_cache=False).logits.argmax(-1)  # (batch, length)
        for row, (whole, answer) in zip(best.tolist(), batch, strict=True):
            end = len(whole)
            right += row[end - answer - 1 : end - 1] == whole[end - answer :]
    return right / len(cases)


def _batches(cases: list[tuple[list[int], int]]) -> Iterator[tuple[int, list[tuple[list[int], int]]]]:
    """Cases of like length together, with the number of cases done after each batch."""
    batch: list[tuple[list[int], int]] = []
    for done, case in enumerate(sorted(cases, key=lambda c: len(c[0])), start=1):
        batch.append(case)
        if done == len(cases) or (len(batch) + 1) * len(case[0]) > BATCH_TOKENS:
            yield done, batch
            batch = []


def _check(model: PreTrainedModel, protocol: str, window: int, stride: int, max_tokens: int | None) -> None:
    if protocol not in PROTOCOLS:
        raise KronyError(f"protocol {protocol!r} is unknown: it is {' or '.join(PROTOCOLS)}")
    if not 2 <= window <= context_length(model):
        raise KronyError(f"a window of {window} tokens: this model takes from 2 to {context_length(model)}")
    if not 1 <= stride <= window:
        raise KronyError(f"a stride of {stride} tokens: from 1 to the window, {window}")
    if max_tokens is not None and max_tokens < 2:
        raise KronyError(f"max_tokens is {max_tokens}: nothing can be predicted with fewer than 2")


def _check_ids(data: str, ids: Tensor, model: PreTrainedModel) -> None:
    if len(ids) < 2:
        raise KronyError(f"{data} has {len(ids)} tokens: there is nothing to predict")
    known, highest = model.get_input_embeddings().weight.shape[0], int(ids.max())
    if highest >= known:
        raise KronyError(f"{data} has token {highest}, the model knows {known}: this tokenizer is another model's")
