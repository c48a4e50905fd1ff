"""nanoGPT's ``train.bin`` and ``val.bin``: a text set as token ids on disk, once and for every run.

As nanoGPT's ``data/openwebtext/prepare.py`` has it: documents are shuffled and split by ``train_test_split`` of
datasets with seed 2357 and a validation share of 0.0005, each is tokenised by itself and followed by the end-of-text
token, and the ids lie one after the other, two bytes each.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from krony.data import python_docs
from krony.data.rows import BIN, hub_set, refuse_test_set
from krony.data.sets import PYTHON_DOCS, read_file
from krony.errors import KronyError
from krony.runtime.progress import Progress, silent
from krony.storage.files import write_json

if TYPE_CHECKING:
    from datasets import Dataset

VAL_SHARE, SEED = 0.0005, 2357  # nanoGPT's
BATCH = 256  # documents tokenised at once
KEPT_EVERY = 1 << 20  # tokens after which it is noted how far the work is


@dataclass
class Part:
    """How far a split is: documents and tokens that are on disk."""

    documents: int = 0
    tokens: int = 0


def prepare(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    val_share: float = VAL_SHARE,
    seed: int = SEED,
    progress: Progress = silent,
) -> dict[str, Part]:
    """Writes ``out/train.bin`` and ``out/val.bin``; the names appear when all is written.

    Work that was stopped, however hard, goes on where it was when the same call is made again, and ends with the same
    bytes. Files are read whole; a set on the hub is fetched to the cache of datasets and read from there.

    Args:
        data: a text file (one document), a jsonl file, ``python-docs`` (its calibration part), or a set on the hub.
        tokenizer: at most 65,536 entries, which is what two bytes hold.
        val_share: of the documents, rounded up; 0 writes no ``val.bin``.
        seed: of the split.

    Raises:
        KronyError: no such data, too large a vocabulary, a single document to split, ``out`` holds other work or
            finished files, a full disk.
    """
    _check(out, tokenizer, val_share)
    documents = _documents(data)
    splits = _split(data, documents, val_share, seed)
    plan = {
        "data": data,
        "documents": len(documents),
        "tokenizer": _fingerprint(tokenizer),
        "val_share": val_share,
        "seed": seed,
    }
    state = out / "prepare.json"
    parts = _parts(state, plan, list(splits))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, split in splits.items():
            _write(name, split, tokenizer, state, plan, parts, progress)
        for name in splits:  # not before both are whole
            if (partial := _partial(out, name)).exists():
                partial.replace(out / f"{name}.bin")
        state.unlink()
    except OSError as error:
        raise KronyError(
            f"{out} can't be written, {error.strerror or error}: the same command goes on where it stopped"
        ) from None
    return parts


def _write(
    name: str,
    split: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    state: Path,
    plan: dict[str, Any],
    parts: dict[str, Part],
    progress: Progress,
) -> None:
    """Adds the documents of a split that aren't on disk yet."""
    part = parts[name]
    if part.documents == len(split):
        return
    with _partial(state.parent, name).open("ab") as file:
        file.truncate(part.tokens * BIN.itemsize)  # what came after the last note is made again
        noted = part.tokens
        for start in range(part.documents, len(split), BATCH):
            texts = split[start : start + BATCH]["text"]
            ids = _ids(texts, tokenizer)
            file.write(ids.tobytes())
            part.documents, part.tokens = start + len(texts), part.tokens + len(ids)
            if part.tokens - noted >= KEPT_EVERY or part.documents == len(split):
                file.flush()
                os.fsync(file.fileno())
                write_json(state, plan | {"parts": {key: asdict(value) for key, value in parts.items()}})
                noted = part.tokens
            progress(part.documents, len(split), f"{name}, {part.tokens:,} tokens")


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids ``(n,)`` of documents, each followed by the end-of-text token; one that a text spells is text."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.concatenate([np.array(ids + end, dtype=BIN) for ids in encoded])


def look_at(data: str) -> None:
    """Raises KronyError where ``data`` can't be what ``prepare`` takes, without reading it."""
    refuse_test_set(data)
    path = Path(data)
    if path.suffix == ".bin":
        raise KronyError(f"{data} is prepared already: prepare takes text")
    if path.suffix and not path.exists():
        raise KronyError(f"{data}: there is no such file")


def _documents(data: str) -> Dataset:
    from datasets import Dataset  # heavy

    look_at(data)
    path = Path(data)
    if data == PYTHON_DOCS:
        return Dataset.from_dict({"text": python_docs.topics("calibration")})
    if path.exists():
        return Dataset.from_dict({"text": read_file(path)})
    return hub_set(data)


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


def _parts(state: Path, plan: dict[str, Any], names: list[str]) -> dict[str, Part]:
    """How far earlier work came. Raises KronyError if it was other work."""
    if not state.is_file():
        return {name: Part() for name in names}
    before = json.loads(state.read_text(encoding="utf-8"))
    for key, value in plan.items():
        if before[key] != value:
            raise KronyError(
                f"{state.parent} holds the beginning of other work ({key} {before[key]}, and now it is {value}): "
                "remove it, or name another folder"
            )
    parts = {name: Part(**part) for name, part in before["parts"].items()}
    for name, part in parts.items():
        file = next((f for f in (_partial(state.parent, name), state.parent / f"{name}.bin") if f.exists()), None)
        if part.tokens * BIN.itemsize > (0 if file is None else file.stat().st_size):
            parts[name] = Part()  # somebody removed what was written: anew
    return parts


def _partial(out: Path, name: str) -> Path:
    return out / f"{name}.bin.partial"


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
    for name in ("train", "val"):
        if (out / f"{name}.bin").exists() and not (out / "prepare.json").exists():
            raise KronyError(f"{out / name}.bin exists: name another folder, or remove it first")
