"""Training text as rows of equal length, packed without padding: from files, the hub, or token ids on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from krony.data import python_docs
from krony.data.hub import HubSet, stream_texts
from krony.data.python_docs import PYTHON_DOCS
from krony.data.sets import join_documents, read_file, refuse_test_set
from krony.data.text_files import names_file
from krony.errors import KronyError
from krony.storage.paths import check_regular

BIN = np.dtype("<u2")  # nanoGPT's train.bin and val.bin: token ids, two bytes each


class Rows(Dataset[dict[str, Tensor]]):
    """Token ids cut into rows of ``length``, each ``{"input_ids": (length,), "labels": (length,)}``, int64.

    Examples:
        >>> rows = Rows(np.arange(7), length=3)
        >>> len(rows), rows[1]["input_ids"].tolist()
        (2, [3, 4, 5])
    """

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.from_numpy(self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64))
        return {"input_ids": row, "labels": row}

    def split(self, last: int) -> tuple[Rows, Rows]:
        """All but the last rows, and the last ones."""
        cut = (len(self) - last) * self.length
        return Rows(self.tokens[:cut], self.length), Rows(self.tokens[cut:], self.length)


def load_rows(
    data: str, tokenizer: PreTrainedTokenizerBase, *, length: int, vocabulary: int, max_tokens: int | None = None
) -> Rows:
    """Rows of training text.

    Args:
        data: a text file, a file of JSON lines, ``python-docs`` (its calibration part), a ``.bin`` file of nanoGPT's,
            or a data set on the hub (``name[:configuration][@split]``), of which the column ``text`` is streamed; this
            needs ``max_tokens``.
        tokenizer: the model's.
        length: tokens per row.
        vocabulary: entries of the model's embedding.
        max_tokens: at most this many tokens, from the beginning.

    Raises:
        KronyError: ``data`` is a test set, the file can't be read, it has tokens that the model does not know, or it is
            shorter than one row.
    """
    return rows_of(data, _tokens(data, tokenizer, max_tokens)[:max_tokens], length=length, vocabulary=vocabulary)


def rows_of(data: str, tokens: np.ndarray, *, length: int, vocabulary: int) -> Rows:
    """Rows of token ids ``(n,)`` that come from ``data``.

    Raises KronyError for fewer tokens than one row, or for tokens that the model does not know.
    """
    if len(tokens) < length:
        raise KronyError(f"{data} has {len(tokens)} tokens: at least {length} make one row")
    highest = int(tokens.max())
    if highest >= vocabulary:
        raise KronyError(f"{data} has token {highest}, the model knows {vocabulary}: it is made for another model")
    return Rows(tokens, length)


def _tokens(data: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> np.ndarray:
    refuse_test_set(data)
    if data == PYTHON_DOCS:
        return join_documents(python_docs.topics("calibration"), tokenizer).numpy()
    path = Path(data)
    if is_bin(path):
        return read_bin(path)
    if names_file(data):
        return join_documents(read_file(path), tokenizer).numpy()
    return _stream(data, tokenizer, max_tokens)


def is_bin(name: str | Path) -> bool:
    """Whether a text of this name is tokens already."""
    return Path(name).suffix.lower() == ".bin"


def read_bin(path: Path) -> np.ndarray:
    """Token ids ``(n,)`` of a ``.bin`` file as a memory map, uint16. Raises KronyError."""
    check_regular(path)
    size = path.stat().st_size
    if size == 0 or size % BIN.itemsize:
        raise KronyError(f"{path} has {size} bytes: a .bin file holds token ids of two bytes each")
    try:
        tokens = np.memmap(path, dtype=BIN, mode="r")
    except OSError as error:
        raise KronyError(f"{path} can't be read: {error.strerror}") from None
    if looks_wider(tokens):
        raise KronyError(f"{path} holds token ids of four bytes or more: a .bin file holds two bytes each (uint16)")
    return tokens


def looks_wider(tokens: np.ndarray) -> bool:
    """Whether token ids ``(n,)`` that were read as two bytes each have four or eight: every second is then near zero.

    Examples:
        >>> looks_wider(np.arange(100, dtype="<u4").view("<u2")), looks_wider(np.arange(100, dtype="<u2"))
        (True, False)
    """
    seconds = tokens[1:4096:2]
    return len(tokens) >= 64 and len(tokens) % 2 == 0 and bool((seconds <= 3).all())


def _stream(data: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> np.ndarray:
    HubSet.parse(data)  # what is no name at all needs no other advice
    if max_tokens is None:
        raise KronyError(f"{data} is no file, and a data set on the hub is streamed: max_tokens says how much is read")
    pieces: list[Tensor] = []
    have = 0
    for text in stream_texts(data):
        pieces.append(join_documents([text, ""], tokenizer))
        have += len(pieces[-1])
        if have >= max_tokens:
            break
    return torch.cat(pieces).numpy() if pieces else np.empty(0, dtype=np.int64)
