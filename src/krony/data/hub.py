"""Text of data sets on the Hugging Face hub: the column ``text`` of their ``train`` split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from krony.errors import KronyError
from krony.storage.hub import ask

HUB_NAMES = {"openwebtext": "Skylion007/openwebtext"}  # the name in nanoGPT and the paper, and the repository


def hub_set(data: str, *, streaming: bool = False) -> Any:
    """The ``train`` split of a data set on the hub, streamed or fetched to the cache of datasets.

    Raises KronyError if there is no such set, or if it has no column ``text``.
    """
    with _in_a_sentence(data):
        found = load_split(HUB_NAMES.get(data, data), split="train", streaming=streaming)
    columns = getattr(found, "column_names", None)
    if columns and "text" not in columns:
        raise KronyError(f"{data} has no column text: it has {', '.join(columns)}")
    return found


def load_split(repository: str, *configuration: str, split: str, streaming: bool = False) -> Any:
    """``datasets.load_dataset``, but without a network it looks in the cache at once.

    Raises KronyError for a name that the hub doesn't know, and what datasets raises.
    """
    answer = ask(repository, "dataset")
    if answer in ("unknown", "no name"):
        raise KronyError(
            f"{repository}: there is no such file, and no data set of that name on the hub that you may read"
        )
    from datasets import load_dataset  # heavy

    with _offline() if answer == "no answer" else nullcontext():
        return load_dataset(repository, *configuration, split=split, streaming=streaming)


def stream_texts(data: str) -> Iterator[str]:
    """The documents of a data set on the hub, in its order, as they are needed. Raises KronyError."""
    with _in_a_sentence(data):
        for row in hub_set(data, streaming=True):
            yield row["text"]


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
            f"{data}: there is no such file, and no data set of that name can be read from the hub "
            f"({type(error).__name__})"
        ) from None
