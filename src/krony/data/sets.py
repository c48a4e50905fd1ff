"""Text to evaluate on: named test sets from a folder or the hub, and files; and how documents become tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from krony.data import python_docs
from krony.data.hub import HubSet, first_texts, load_split, refuse_test_split
from krony.data.python_docs import PYTHON_DOCS
from krony.data.text_files import names_file, read_documents, read_text
from krony.errors import KronyError
from krony.storage.paths import check_regular


@dataclass(frozen=True)
class TestSet:
    """A test set: its file under ``--data-dir``, and its name on the hub."""

    file: str
    hub: tuple[str, str | None]  # repository and configuration, of which the test split is read
    last_word: bool = False  # a row is a passage, and the model is to predict its last word


TEST_SETS = {
    "wikitext-2": TestSet("wikitext-2/wiki.test.tokens", ("Salesforce/wikitext", "wikitext-2-v1")),
    "wikitext-103": TestSet("wikitext-103/wiki.test.tokens", ("Salesforce/wikitext", "wikitext-103-v1")),
    "lambada": TestSet("lambada/lambada_test_plain_text.txt", ("cimec/lambada", None), last_word=True),
}
STANDARD = "wikitext-2"  # what is measured where nothing is named
ON_HUB = frozenset("/:@")  # one of them is in every name on the hub, so that "wikitext-3" is a misspelt name
LONGEST_TOKEN = 64  # characters; an average token of text has four
PIECE = 8_000_000  # characters tokenised at once, because a tokenizer needs some hundred bytes for each


def names() -> list[str]:
    """The names of all data sets.

    Examples:
        >>> names()
        ['wikitext-2', 'wikitext-103', 'lambada', 'python-docs']
    """
    return [*TEST_SETS, PYTHON_DOCS]


def refuse_test_set(data: str, use: str = "train on") -> None:
    """Raises KronyError if ``data`` names a set that is for evaluation only; ``use`` says what is done with others.

    Examples:
        >>> refuse_test_set("lambada")
        Traceback (most recent call last):
        krony.errors.KronyError: lambada is a test set: train on other text, such as a train file or python-docs
    """
    if data in TEST_SETS:
        raise KronyError(f"{data} is a test set: {use} other text, such as a train file or python-docs")
    if not names_file(data):
        refuse_test_split(data)


def check_named(data: str) -> None:
    """Raises KronyError for a name that no text can have: a file that isn't there, or a wrong form of a hub name.

    Examples:
        >>> check_named("missing.txt")
        Traceback (most recent call last):
        krony.errors.KronyError: missing.txt can't be read: No such file or directory
    """
    if data in names():
        return
    if names_file(data):
        check_regular(Path(data))
    else:
        HubSet.parse(data)


def load_texts(data: str, data_dir: Path | None = None, *, tokens: int | None = None) -> list[str]:
    """The rows of a test set: those of the data set on the hub for a named one, the documents for a file.

    Any other data set on the hub is ``name[:configuration][@split]``, by default its ``test`` split; of it as many
    documents are read as ``tokens`` take, or all.

    WikiText has the layout of ``wikitext-*-v1``: a line with its line break is a row, and a blank line is an empty row.
    ``python-docs`` is the held-out part of Python's own documentation.

    Raises KronyError if the set is neither in ``data_dir`` nor on the hub, or the file can't be read.
    """
    if data == PYTHON_DOCS:
        return python_docs.topics("held-out")
    if data not in TEST_SETS:
        if names_file(data) or not ON_HUB & set(data):
            return read_file(Path(data))
        return first_texts(data, None if tokens is None else LONGEST_TOKEN * tokens, split="test")
    known = TEST_SETS[data]
    if data_dir is None:
        return _from_hub(data, *known.hub)
    text = read_text(data_dir / known.file)
    lines = text.splitlines(keepends=True)
    if known.last_word:
        return [line.strip() for line in lines if line.strip()]
    return [line if line.strip() else "" for line in lines]


def read_file(path: Path) -> list[str]:
    """The documents of a file, see ``read_documents``. Raises KronyError; for what may be a misspelt name it says which
    there are.
    """
    if not path.suffix and not path.exists():
        raise KronyError(f"{path}: there is no such file, nor a data set of this name ({', '.join(names())})")
    return read_documents(path)


def join_rows(rows: list[str], tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> Tensor:
    """``"\\n\\n".join(rows)`` as token ids ``(n,)``, int64, as in the paper's protocol; the first ``most`` of them."""
    return _ids(tokenizer, "\n\n".join(rows), special=True, most=most)


def join_documents(documents: list[str], tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> Tensor:
    """Token ids ``(n,)`` of the documents, int64, with the tokenizer's end-of-text token, if any, between them.

    ``most``: the first so many ids, without reading the documents that follow them.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    made: list[Tensor] = []
    have = 0
    for number, document in enumerate(documents):
        if most is not None and have >= most:
            break
        made += [torch.tensor(end if number else [], dtype=torch.long), _ids(tokenizer, document, most=most)]
        have += sum(map(len, made[-2:]))
    return torch.cat(made)[:most] if made else torch.empty(0, dtype=torch.long)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False, most: int | None = None) -> Tensor:
    made: list[int] = []
    for number, piece in enumerate(_pieces(text)):
        if most is not None and len(made) >= most:
            break
        if special and number == 0:
            made += begin(tokenizer, piece)
        else:
            made += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]  # without warnings
    return torch.tensor(made[:most], dtype=torch.long)


def begin(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text that continues: with what the tokenizer puts before it, without what it puts after it."""
    whole, plain = (tokenizer(text, add_special_tokens=adds, verbose=False)["input_ids"] for adds in (True, False))
    starts = (start for start in range(len(whole) - len(plain) + 1) if whole[start : start + len(plain)] == plain)
    return list(whole[: next(starts, len(whole)) + len(plain)])


def _pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """The text in pieces of at most ``size`` characters, cut before a line break or a space if possible."""
    start = 0
    while len(text) - start > size:
        window = start + size // 2, start + size
        end = text.rfind("\n", *window)
        end = text.rfind(" ", *window) if end < 0 else end
        end = window[1] if end < 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def _from_hub(data: str, repository: str, configuration: str | None) -> list[str]:
    try:
        names = [] if configuration is None else [configuration]
        return list(load_split(repository, *names, split="test")["text"])
    except Exception as error:  # datasets raises many kinds for "no network"
        raise KronyError(
            f"{data} can't be fetched from the hub ({type(error).__name__}): "
            f"with --data-dir DIR it is read from DIR/{TEST_SETS[data].file}"
        ) from None
