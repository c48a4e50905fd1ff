"""nanoGPT's ``train.bin`` and ``val.bin``: text tokenised once, and kept on disk as token ids.

As in nanoGPT's ``data/openwebtext/prepare.py``, ``train_test_split`` of datasets shuffles the documents and splits them
with seed 2357 and a validation share of 0.0005. Each document is tokenised by itself and followed by the end-of-text
token. The ids lie one after the other, two bytes each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from krony.data import python_docs
from krony.data.hub import as_document, hub_set, read_as
from krony.data.python_docs import PYTHON_DOCS
from krony.data.rows import BIN, is_bin
from krony.data.sets import check_named, read_file, refuse_test_set
from krony.errors import KronyError
from krony.runtime.progress import Progress, silent
from krony.runtime.seeds import check_seed
from krony.runtime.signals import Pending, deferred
from krony.storage.files import write_json
from krony.storage.locks import locked, working_in
from krony.storage.paths import check_regular
from krony.storage.tensor_files import read_json

if TYPE_CHECKING:
    from datasets import Dataset

VAL_SHARE, SEED = 0.0005, 2357  # nanoGPT's
BATCH = 256  # documents tokenised at once
KEPT_EVERY = 1 << 20  # tokens after which progress is recorded
PLAN = ("data", "contents", "documents", "tokenizer", "val_share", "seed")
STATE = "prepare.json"  # in OUT while the work is unfinished: the plan, and what is on disk


@dataclass
class Part:
    """How much of a split is on disk."""

    documents: int = 0
    tokens: int = 0


@dataclass(kw_only=True)
class _Work:
    """Unfinished work in OUT: what it makes, and how far it is."""

    out: Path
    plan: dict[str, Any]
    parts: dict[str, Part]

    def partial(self, name: str) -> Path:
        """The file of a split until all splits are complete."""
        return self.out / f"{name}.bin.partial"

    def note(self) -> None:
        """Records how far the work is. Raises KronyError."""
        write_json(self.out / STATE, self.plan | {"parts": {key: asdict(part) for key, part in self.parts.items()}})


def prepare(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    val_share: float = VAL_SHARE,
    seed: int = SEED,
    progress: Progress = silent,
) -> dict[str, Part]:
    """Writes ``out/train.bin`` and ``out/val.bin``; the names appear when both are complete.

    After an interruption, even by SIGKILL or a power cut, the same call resumes the work, and the bytes are those of an
    uninterrupted run. Files are read into memory; a set on the hub is fetched to the cache of datasets first.

    Args:
        data: a text file (one document), a file of JSON lines, ``python-docs`` (its calibration part), or a data set on
            the hub.
        tokenizer: at most 65,536 entries, which is what two bytes hold.
        val_share: share of the documents, rounded up; 0 writes no ``val.bin``.
        seed: of the split.

    Returns:
        Documents and tokens of each split.

    Raises:
        KronyError: there is no such data, the vocabulary is too large, a single document can't be split, ``out`` holds
            other work (also of a text that has changed since) or finished files, another process works there, the disk
            is full.
    """
    _check(out, tokenizer, val_share)
    check_seed(seed)
    with _alone_in(out):
        _refuse_finished(out)
        documents, contents = _documents(data)
        splits = _split(data, documents, val_share, seed)
        plan = {
            "data": data,
            "contents": contents,
            "documents": len(documents),
            "tokenizer": _fingerprint(tokenizer),
            "val_share": val_share,
            "seed": seed,
        }
        work = _Work(out=out, plan=plan, parts=_parts(out, plan, list(splits)))
        try:
            with deferred() as stop:
                for name, split in splits.items():
                    _write(work, name, split, tokenizer, stop, progress)
            for name in splits:  # not before both are complete
                if work.partial(name).exists():
                    work.partial(name).replace(out / f"{name}.bin")
            (out / STATE).unlink()
        except OSError as error:
            raise KronyError(
                f"{out} can't be written, {error.strerror or error}: the same command resumes where it stopped"
            ) from None
        return work.parts


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keeps other processes out of OUT. Raises KronyError if one is there.

    One lock lies in OUT. The one beside OUT, which other verbs take, is left out where only OUT can be written, such as
    a volume.
    """
    with ExitStack() as stack:
        if not out.exists() or os.access(Path(os.path.realpath(out)).parent, os.W_OK):
            stack.enter_context(working_in(out))
        stack.enter_context(locked(out / STATE))
        yield


def _write(
    work: _Work, name: str, split: Dataset, tokenizer: PreTrainedTokenizerBase, stop: Pending, progress: Progress
) -> None:
    """Adds the documents of a split that aren't on disk yet. Asked to stop, it records them and raises Interrupt."""
    part = work.parts[name]
    if part.documents == len(split):
        return
    with work.partial(name).open("ab") as file:
        file.truncate(part.tokens * BIN.itemsize)  # what came after the last record is made again
        noted = part.tokens
        for start in range(part.documents, len(split), BATCH):
            texts = [as_document(text, work.plan["data"]) for text in split[start : start + BATCH]["text"]]
            ids = _ids(texts, tokenizer)  # (n,)
            file.write(ids.tobytes())
            part.documents, part.tokens = start + len(texts), part.tokens + len(ids)
            stopping = bool(stop)
            if stopping or part.tokens - noted >= KEPT_EVERY or part.documents == len(split):
                file.flush()
                os.fsync(file.fileno())
                work.note()
                noted = part.tokens
            if stopping:
                stop.check()
            progress(part.documents, len(split), f"{name}, {part.tokens:,} tokens")


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids ``(n,)``, uint16: each document and the end-of-text token. Where a text spells that one, it is text."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.concatenate([np.array(ids + end, dtype=BIN) for ids in encoded])


def how_to_resume(out: Path) -> str:
    """One sentence after an interruption: what is in OUT, and what to do.

    Examples:
        >>> how_to_resume(Path("nowhere"))
        'nothing was written to nowhere'
    """
    if (out / STATE).is_file():
        tokens = sum(part.tokens for part in _read_state(out)[1].values())
        return f"{out} holds the first {tokens:,} tokens: the same command resumes there"
    return f"{out} is complete" if (out / "train.bin").exists() else f"nothing was written to {out}"


def check_data(data: str) -> None:
    """Raises KronyError where ``data`` can't be what ``prepare`` takes, without reading it."""
    refuse_test_set(data)
    if is_bin(data):
        raise KronyError(f"{data} is prepared already: prepare takes text")
    check_named(data)


def _documents(data: str) -> tuple[Dataset, str]:
    """The documents, and what tells them from others of the same name: a digest, or the revision on the hub."""
    from datasets import Dataset  # heavy

    check_data(data)
    path = Path(data)
    if data != PYTHON_DOCS and not path.exists():
        return hub_set(data), read_as(data)
    texts = python_docs.topics("calibration") if data == PYTHON_DOCS else read_file(path)
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return Dataset.from_dict({"text": texts}), digest.hexdigest()


def _split(data: str, documents: Dataset, val_share: float, seed: int) -> dict[str, Dataset]:
    """The splits as nanoGPT makes them."""
    if val_share == 0:
        return {"train": documents}
    if len(documents) < 2:
        raise KronyError(
            f"{data} is one document, which can't be split: give a jsonl file of several, or a val share of 0"
        )
    if math.ceil(val_share * len(documents)) >= len(documents):
        raise KronyError(f"a val share of {val_share} of {len(documents)} documents leaves none to train on")
    split = documents.train_test_split(test_size=val_share, seed=seed, shuffle=True)
    return {"val": split["test"], "train": split["train"]}


def _parts(out: Path, plan: dict[str, Any], names: list[str]) -> dict[str, Part]:
    """How far an interrupted run came. Raises KronyError if it had another plan."""
    if not (out / STATE).exists():
        return {name: Part() for name in names}
    check_regular(out / STATE)
    before, parts = _read_state(out)
    for key, value in plan.items():
        if before[key] != value:
            change = "which has changed since" if key == "contents" else f"{key} {before[key]}, and now it is {value}"
            raise KronyError(
                f"{out} holds the beginning of other work ({before['data']}, {change}): remove it, or name another "
                "folder"
            )
    for name, part in parts.items():
        file = next((f for f in (out / f"{name}.bin.partial", out / f"{name}.bin") if f.exists()), None)
        if part.tokens * BIN.itemsize > (0 if file is None else file.stat().st_size):
            parts[name] = Part()  # somebody removed what was written: write it again
    return parts


def _read_state(out: Path) -> tuple[dict[str, Any], dict[str, Part]]:
    """The plan of unfinished work, and how far it is. Raises KronyError."""
    read = read_json(out / STATE)
    try:
        parts = {name: Part(int(part["documents"]), int(part["tokens"])) for name, part in read["parts"].items()}
        return {key: read[key] for key in PLAN}, parts
    except (KeyError, TypeError, ValueError, AttributeError):
        raise KronyError(f"{out / STATE} is damaged: remove {out}, and start again") from None


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _check(out: Path, tokenizer: PreTrainedTokenizerBase, val_share: float) -> None:
    if not 0 <= val_share < 1:
        raise KronyError(f"the val share is {val_share}: it is a share of the documents, from 0 to below 1")
    if len(tokenizer) > 1 << 16:
        raise KronyError(
            f"this tokenizer has {len(tokenizer):,} entries, and a .bin file holds ids below 65,536: "
            "train from the text itself"
        )
    if out.is_file():
        raise KronyError(f"{out} is a file: name a folder for train.bin and val.bin")


def _refuse_finished(out: Path) -> None:
    """Raises KronyError where finished files would be overwritten."""
    for name in ("train", "val"):
        if (out / f"{name}.bin").exists() and not (out / STATE).exists():
            raise KronyError(f"{out / name}.bin exists: name another folder, or remove it first")
