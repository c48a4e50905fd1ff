"""Calibration text: token ids of documents in random order, cut into sequences of one length."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from krony.data import python_docs
from krony.data.hub import first_texts
from krony.data.python_docs import PYTHON_DOCS
from krony.data.sets import LONGEST_TOKEN, join_documents, read_file, refuse_test_set
from krony.data.text_files import names_file
from krony.errors import KronyError
from krony.runtime.seeds import check_seed

TOKENS, LENGTH = 49_152, 512
OWN_TEXT = "self"  # names the text that the model writes itself (``krony.own_text``)
DOCUMENTS = "krony_documents"  # the attribute of a tensor of ids that says what was read
HUB_CHARACTERS = 8  # per token, of a set on the hub: enough for a tenth that is held back, and for long tokens


def calibration_set(
    data: str | Path, tokenizer: PreTrainedTokenizerBase, *, tokens: int = TOKENS, length: int = LENGTH, seed: int = 0
) -> Tensor:
    """Token ids ``(sequences, length)`` of documents in random order, joined by the end-of-text token.

    Args:
        data: a text file, a file of JSON lines, ``python-docs``, of which the calibration part is read, or a data set
            on the hub (``name[:configuration][@split]``), whose first documents are read.
        tokenizer: the model's.
        tokens: at most this many; a shorter text gives fewer.
        length: tokens per sequence.
        seed: of the order.

    Raises:
        KronyError: the file can't be read, ``data`` is a test set, or the text is shorter than one sequence.
    """
    data = str(data)
    refuse_test_set(data, "calibrate on")
    return pack(documents_in(data, tokens), tokenizer, tokens=tokens, length=length, seed=seed)


def documents_in(data: str, tokens: int, part: str = "calibration") -> list[str]:
    """The documents of a file, of a part of ``python-docs``, or the first of a data set on the hub.

    Of the hub as much is read as ``tokens`` tokens take, and more. Raises KronyError for text that can't be read.
    """
    if data == OWN_TEXT:
        raise KronyError(
            f"{OWN_TEXT} is text that the model writes, which krony compress calibrates on: name a text or jsonl file, "
            "python-docs, or a set on the hub"
        )
    if data == PYTHON_DOCS:
        return python_docs.topics(part)
    if names_file(data):
        return read_file(Path(data))
    return first_texts(data, HUB_CHARACTERS * tokens, longest=LONGEST_TOKEN * tokens)


def pack(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    seed: int = 0,
    least: int = 1,
    what: str = "calibration text",
) -> Tensor:
    """The documents in random order as token ids ``(sequences, length)``, int64.

    Raises KronyError if they, which are the ``what``, are shorter than ``least`` sequences, or if fewer tokens than one
    sequence are asked for.
    """
    if tokens < length:
        raise KronyError(f"calibration on {tokens} tokens: at least {length} are needed, which make one sequence")
    check_seed(seed)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = tokens // length
    pieces: list[Tensor] = []
    read: list[str] = []
    have = 0
    for index in order:
        read.append(digest(documents[index]))
        text = documents[index][: LONGEST_TOKEN * rows * length]  # no more of an endless document can be needed
        pieces.append(join_documents([text, ""], tokenizer))
        have += len(pieces[-1])
        if have >= rows * length:
            break
    rows = min(rows, have // length)
    if rows < least:
        wanted = "one sequence" if least == 1 else f"{least} sequences"
        raise KronyError(f"the {what} has {have:,} tokens: at least {least * length:,} are needed, for {wanted}")
    ids = torch.cat(pieces)[: rows * length].view(rows, length)
    setattr(ids, DOCUMENTS, read)
    return ids


def documents_of(ids: Tensor) -> list[str]:
    """The digests of the documents in calibration text made by ``calibration_set``; empty for other token ids."""
    return list(getattr(ids, DOCUMENTS, []))


def digest(document: str) -> str:
    """What tells a document from others: the BLAKE2b hash of its UTF-8 text, 16 hexadecimal digits.

    Examples:
        >>> digest("some text")
        'f2d42d5e4e509e1b'
    """
    return hashlib.blake2b(document.encode(), digest_size=8).hexdigest()
