"""Calibration text: token ids of documents in random order, cut into sequences of one length."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from krony.data import python_docs
from krony.data.sets import PYTHON_DOCS, TEST_SETS, join_documents, read_file
from krony.errors import KronyError

TOKENS, LENGTH = 49_152, 512
LONGEST_TOKEN = 64  # characters; tokens of text have four


def calibration_set(
    data: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int = TOKENS, length: int = LENGTH, seed: int = 0
) -> Tensor:
    """Token ids ``(sequences, length)`` of documents in random order, joined by the end-of-text token.

    Args:
        data: a text or jsonl file, or ``python-docs``, whose calibration part is taken.
        tokens: how many at most; a shorter text gives fewer.

    Raises:
        KronyError: a file that can't be read, a test set, or less text than one sequence.
    """
    if data in TEST_SETS:
        raise KronyError(f"{data} is a test set: calibrate on other text, such as a train file or python-docs")
    documents = python_docs.topics("calibration") if data == PYTHON_DOCS else read_file(Path(data))
    return pack(documents, tokenizer, tokens=tokens, length=length, seed=seed)


def pack(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    seed: int = 0,
) -> Tensor:
    """The documents in random order as token ids ``(sequences, length)``. Raises KronyError if they are too short."""
    if tokens < length:
        raise KronyError(f"calibration of {tokens} tokens: it takes at least {length}, which are one sequence")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = tokens // length
    pieces: list[Tensor] = []
    have = 0
    for index in order:
        text = documents[index][: LONGEST_TOKEN * rows * length]  # of a document without end only that can be needed
        pieces.append(join_documents([text, ""], tokenizer))
        have += len(pieces[-1])
        if have >= rows * length:
            break
    rows = min(rows, have // length)
    if rows == 0:
        raise KronyError(f"the calibration text has {have} tokens: at least {length} make one sequence")
    return torch.cat(pieces)[: rows * length].view(rows, length)
