"""What is checked of a tokenizer before it is used: numbers and steps that take memory, and whether it works at all.

The library ``tokenizers`` makes a table as long as the largest id, and panics at some files: an exception that is no
``Exception``, after lines of its own on stderr.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from krony.errors import KronyError
from krony.models.folder_checks import numbers
from krony.storage.tensor_files import read_json

MOST_TOKENS = 2**24  # no vocabulary has so many
MOST_GROWTH = 64  # a tokenizer's normaliser makes text at most so many times longer
FILES = ("tokenizer.json", "vocab.json", "added_tokens.json")  # in which every number is an id, a count or a score
SAMPLE = "All is well,\tthat ends\nwell. 0123 é𝔘"


def check_tokenizer(folder: Path) -> None:
    """Raises KronyError for a tokenizer that needs memory without bound, for its tables or for its text."""
    for file in (folder / name for name in FILES if (folder / name).is_file()):
        said = read_json(file)
        for name, value in numbers(said):
            if value > MOST_TOKENS and not name.startswith("truncation."):  # which only shortens
                raise KronyError(f"{file}: {name} is {value}: no tokenizer has so many tokens")
        growth = _growth(said.get("normalizer"))
        if growth > MOST_GROWTH:
            raise KronyError(f"{file}: its normalizer can make a text {growth:,} times longer: no tokenizer needs that")


def _growth(normalizer: Any) -> int:
    """How many times longer the replacements of a normaliser can make a text, at most."""
    if not isinstance(normalizer, dict):
        return 1
    steps = normalizer.get("normalizers")
    if isinstance(steps, list):
        return math.prod(_growth(step) for step in steps)
    texts = [normalizer.get(key) for key in ("content", "prepend")]
    return max([1, *(len(text) for text in texts if isinstance(text, str))])


def try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises an exception unless the tokenizer takes a sample of text apart and puts it together again."""
    tokenizer.decode(tokenizer(SAMPLE)["input_ids"], skip_special_tokens=True)


@contextmanager
def no_panic() -> Iterator[None]:
    """Turns a panic of ``tokenizers`` into a RuntimeError, and keeps what it prints from the terminal."""
    try:
        with _silent():
            yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise RuntimeError(str(error)) from None
        raise


@contextmanager
def _silent() -> Iterator[None]:
    """Sends the file descriptor of stderr, which libraries that aren't Python write to, nowhere for a while."""
    with ExitStack() as after:
        with suppress(OSError):  # it may be closed
            kept = os.dup(2)
            after.callback(os.close, kept)
            after.callback(os.dup2, kept, 2)
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
        yield
