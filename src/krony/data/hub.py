"""Text of data sets on the Hugging Face hub: the column ``text`` of one split."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from krony.data.python_docs import PYTHON_DOCS
from krony.data.text_files import names_file
from krony.errors import KronyError
from krony.storage.hub import ask, revision

NAME = re.compile(r"([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?")
HUB_NAMES = {"openwebtext": "Skylion007/openwebtext"}  # the name in nanoGPT and the paper, and the repository


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub as the user names it: ``name[:configuration][@split]``.

    Examples:
        >>> HubSet.parse("Salesforce/wikitext:wikitext-2-v1@validation")
        HubSet(repository='Salesforce/wikitext', configuration=('wikitext-2-v1',), split='validation')
        >>> HubSet.parse("openwebtext")
        HubSet(repository='Skylion007/openwebtext', configuration=(), split='train')
    """

    repository: str
    configuration: tuple[str, ...]
    split: str

    @classmethod
    def parse(cls, data: str, split: str = "train") -> HubSet:
        """Raises KronyError for a name that has another form. ``split`` is read where the name has none."""
        found = NAME.fullmatch(data)
        if found is None:
            raise KronyError(f"{data!r} names no data set: on the hub it is name[:configuration][@split]")
        name, configuration, own = found.groups()
        if name == PYTHON_DOCS:
            raise KronyError(f"{data!r}: {PYTHON_DOCS} has no configurations and no splits: leave out what follows it")
        return cls(HUB_NAMES.get(name, name), (configuration,) if configuration else (), own or split)


def refuse_test_split(data: str) -> None:
    """Raises KronyError if a name asks for the split that models are measured on.

    Examples:
        >>> refuse_test_split("some/set@test")
        Traceback (most recent call last):
        krony.errors.KronyError: some/set@test is a test set, to measure on: name another split, such as @train
    """
    if re.search(r"@test\b", data):
        raise KronyError(f"{data} is a test set, to measure on: name another split, such as @train")


def hub_set(data: str, *, split: str = "train", streaming: bool = False) -> Any:
    """A split of a data set on the hub, streamed or fetched to the cache of datasets.

    Args:
        data: ``name[:configuration][@split]``.
        split: what is read where ``data`` names none.

    Raises KronyError if there is no such set, or if it has no column ``text``.
    """
    named = HubSet.parse(data, split)
    with _in_a_sentence(data):
        found = load_split(named.repository, *named.configuration, split=named.split, streaming=streaming)
    columns = getattr(found, "column_names", None)
    if columns and "text" not in columns:
        raise KronyError(f"{data} has no column text: it has {', '.join(columns)}")
    return found


def read_as(data: str) -> str:
    """What is read under this name, in words: of a set on the hub the repository, the split and the revision."""
    if data == PYTHON_DOCS or names_file(data):
        return data
    named = HubSet.parse(data)
    name, commit = ":".join((named.repository, *named.configuration)), revision(named.repository)
    return f"{name} (split {named.split}, {'as it is in the cache' if commit is None else f'revision {commit[:7]}'})"


def load_split(repository: str, *configuration: str, split: str, streaming: bool = False) -> Any:
    """``datasets.load_dataset``, of the revision that ``read_as`` names; without a network it looks in the cache
    at once.

    Raises KronyError for a name that the hub doesn't know, and what datasets raises.
    """
    answer = ask(repository, "dataset")
    if answer in ("unknown", "no name"):
        raise KronyError(
            f"{repository}: there is no such file, and no data set of that name on the hub that you may read"
        )
    from datasets import load_dataset  # heavy

    with _offline() if answer == "no answer" else nullcontext():
        pinned = {} if (commit := revision(repository)) is None else {"revision": commit}
        return load_dataset(repository, *configuration, split=split, streaming=streaming, **pinned)


def stream_texts(data: str, split: str = "train") -> Iterator[str]:
    """The documents of a data set on the hub, in its order, as they are needed. Raises KronyError."""
    with _in_a_sentence(data):
        for row in hub_set(data, split=split, streaming=True):
            yield as_document(row["text"], data)


def as_document(text: Any, data: str) -> str:
    """An entry of the column ``text`` of ``data``. Raises KronyError for one that is no string: null, or a list."""
    if not isinstance(text, str):
        raise KronyError(
            f"{data}: an entry of its column text is {type(text).__name__}, not a string: name another set"
        )
    return text


def first_texts(data: str, characters: int | None, *, split: str = "train", longest: int | None = None) -> list[str]:
    """The first documents of a data set on the hub: so many that they have more than ``characters``, or all.

    ``longest``: what counts of one document at most. Raises KronyError.
    """
    found: list[str] = []
    have = 0
    for text in stream_texts(data, split):
        found.append(text)
        have += len(text) if longest is None else min(len(text), longest)
        if characters is not None and have > characters:
            break
    return found


@contextmanager
def _offline() -> Iterator[None]:
    """Lets datasets look in its cache alone: it would try to reach the hub for half a minute."""
    import datasets.config
    from huggingface_hub import constants

    places: tuple[Any, ...] = (datasets.config, constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextmanager
def _in_a_sentence(data: str) -> Iterator[None]:
    try:
        yield
    except (KronyError, GeneratorExit):
        raise
    except Exception as error:  # datasets raises many kinds for "no network" and "no such set"
        raise KronyError(
            f"{data}: there is no such file, and no data set of that name can be read from the hub ({cause(error)})"
        ) from None


def cause(error: Exception) -> str:
    """The kind of an error and the first line of what it says, which names the cause.

    Examples:
        >>> cause(RuntimeError("Dataset scripts are no longer supported, but found lambada.py"))
        'RuntimeError: Dataset scripts are no longer supported, but found lambada.py'
        >>> cause(ConnectionError())
        'ConnectionError'
    """
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
