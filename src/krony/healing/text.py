"""Text to train on and text to validate on: no document is in both, and none that a model was calibrated on validates.

Where validation text is not named, complete documents are held out of the training text. A file's documents are chosen
by their digests, so that the choice depends on their texts alone: not on their order, on a seed, or on how often a
document is repeated. Tokens without text (a ``.bin``, a set on the hub) are split at the end-of-text token, and the
last documents are held out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.data import python_docs
from krony.data.calibration_set import digest
from krony.data.python_docs import PYTHON_DOCS
from krony.data.rows import BIN, Rows, is_bin, load_rows, rows_of
from krony.data.sets import join_documents, read_file, refuse_test_set
from krony.data.text_files import names_file
from krony.errors import KronyError, KronyWarning
from krony.models.quantizer import compressions
from krony.models.source import ModelSource
from krony.runtime import distributed

VALIDATION_ROWS = 16  # what is held out, and fewer are too few for a steady loss
SHARE = 10  # validation takes at most a tenth of the text
WINDOW = 1 << 24  # tokens at the end of a .bin in which documents are looked for


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How a model reads text.

    Attributes:
        tokenizer: None where only tokens are read.
        length: tokens per row.
        vocabulary: number of entries of the model's embedding.
        end: the end-of-text token; None if there is none.
        calibrated: digests of the documents that the model was calibrated on.
    """

    tokenizer: PreTrainedTokenizerBase | None
    length: int
    vocabulary: int
    end: int | None
    calibrated: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, length: int) -> Reader:
        """The reader of ``model``."""
        ends = (tokenizer or model.config.get_text_config()).eos_token_id
        return cls(
            tokenizer=tokenizer,
            length=length,
            vocabulary=model.get_input_embeddings().weight.shape[0],
            end=ends[0] if isinstance(ends, list) else ends,
            calibrated=calibration_documents(model),
        )

    def tokens(self, documents: Sequence[str], at_most: int | None = None) -> list[np.ndarray]:
        """The tokens of each document, int64, with the end-of-text token after all but the last.

        Reads no further than ``at_most`` tokens; the last document may be cut there.
        """
        pieces: list[np.ndarray] = []
        left = at_most
        for number, text in enumerate(documents, start=1):
            if left == 0:
                break
            last = [] if number == len(documents) else [""]
            pieces.append(join_documents([text, *last], self.need_tokenizer()).numpy()[:left])
            left = None if left is None else left - len(pieces[-1])
        return pieces

    def rows(self, name: str, pieces: Sequence[np.ndarray]) -> Rows:
        """Rows of the tokens of documents, which come from ``name``. Raises KronyError for less than one row."""
        if len(pieces) == 1:  # a memory map stays one
            return rows_of(name, pieces[0], length=self.length, vocabulary=self.vocabulary)
        joined = np.concatenate([np.empty(0, dtype=BIN), *pieces])
        return rows_of(name, joined, length=self.length, vocabulary=self.vocabulary)

    def was_calibrated_on(self, piece: np.ndarray) -> bool:
        """Whether the tokens are a document that the model was calibrated on."""
        if not self.calibrated:
            return False
        ids = piece[:-1] if len(piece) and piece[-1] == self.end else piece
        return digest(str(self.need_tokenizer().decode(ids.tolist()))) in self.calibrated

    def need_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises KronyError if there is none."""
        if self.tokenizer is None:
            why = ", also to leave out of tokens the documents that it was calibrated on" if self.calibrated else ""
            raise KronyError(
                f"text is read with a tokenizer{why}: put the model's into its folder (in Python: give it as tokenizer)"
            )
        return self.tokenizer


def load_text(
    data: str | Path | Rows, val: str | Path | Rows | None, reader: Reader, *, max_tokens: int | None = None
) -> tuple[Rows, Rows]:
    """Rows to train on and rows to validate on.

    Args:
        data: a text or jsonl file, ``python-docs`` (its calibration part), a ``.bin``, a set on the hub, or rows.
        val: the same kinds; ``python-docs`` is its held-out part. None holds documents out of ``data``, and takes
            this part for ``python-docs``.
        reader: how the model reads text.
        max_tokens: take the first so many tokens of ``data``. Validation takes at most a tenth as many, or 16 rows if
            they are more.

    Raises:
        KronyError: text that can't be read, or none that validation can take.
    """
    if max_tokens is not None and max_tokens < 1:
        raise KronyError(f"max_tokens is {max_tokens}: it takes a number from 1")
    if val is None and str(data) == PYTHON_DOCS:
        val = PYTHON_DOCS  # its topics quote each other, so that only its held-out part is new text
    if val is None:
        train, validation = _hold_out(data, reader, max_tokens)
    else:
        train, validation = _load_both(data, val, reader, max_tokens)
    if len(validation) < VALIDATION_ROWS:
        _warn(
            f"only {len(validation)} rows validate, and fewer than {VALIDATION_ROWS} make an unsteady loss: give more "
            "text, or name more validation text with --val"
        )
    return train, validation


def tokenizer_for(source: ModelSource, *texts: str | None) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where it has none and all ``texts`` are tokens. Raises KronyError."""
    tokens_alone = all(text is None or is_bin(text) for text in texts)
    return None if tokens_alone and not source.has_tokenizer else source.tokenizer


def calibration_documents(model: PreTrainedModel) -> frozenset[str]:
    """The digests of the documents that a model was calibrated on, as its config says; empty if it does not."""
    found: set[str] = set()
    for record in compressions(model.config):
        listed = record.get("calibration_documents")
        found |= {entry for entry in listed if isinstance(entry, str)} if isinstance(listed, list) else set()
    return frozenset(found)


def _hold_out(data: str | Path | Rows, reader: Reader, max_tokens: int | None) -> tuple[Rows, Rows]:
    """Training and validation rows of one text."""
    documents = _documents(data, "calibration")
    name, most = _name(data), VALIDATION_ROWS * reader.length
    if documents is None:
        before, held = _last_documents(name, _token_rows(data, reader, max_tokens).tokens, reader)
        train = Rows(before, reader.length)  # its tokens are known to be in the vocabulary
    else:
        pieces = reader.tokens([*documents, ""], max_tokens)[: len(documents)]  # each ends with the end-of-text token
        digests = [digest(text) for text in documents[: len(pieces)]]
        chosen = choose(digests, [len(piece) for piece in pieces], reader)
        if not chosen:
            reader.rows(name, reader.tokens(documents, max_tokens))  # raises if the text is too short
            raise _nothing_to_hold_out(name, reader, one=len(set(digests)) < 2)
        held = [pieces[digests.index(key)] for key in chosen]
        train = reader.rows(name, [p for key, p in zip(digests, pieces, strict=True) if key not in chosen])
    validation = reader.rows(f"the validation text in {name}", held)
    return train, Rows(validation.tokens[:most], reader.length)


def choose(digests: Sequence[str], sizes: Sequence[int], reader: Reader) -> list[str]:
    """The documents to hold out, by digest: 16 rows of them, but at most about a tenth of the text.

    Takes documents in the order of their digests, small ones first if all are large; leaves at least one to train on.
    Returns an empty list if there is none that can be held out.
    """
    size = dict(zip(reversed(digests), reversed(sizes), strict=True))  # of a repeated document the first
    total = sum(sizes)
    wanted = min(VALIDATION_ROWS * reader.length, max(total // SHARE, reader.length))
    free = sorted(key for key in size if key not in reader.calibrated)
    small = [key for key in free if size[key] <= total // SHARE]
    large = sorted((key for key in free if size[key] > total // SHARE), key=lambda key: size[key])
    chosen: list[str] = []
    have = 0
    for key in small + large:
        enough = wanted if key in small else reader.length
        if have >= enough or len(chosen) + 1 == len(size):
            break
        chosen.append(key)
        have += size[key]
    return chosen


def _last_documents(name: str, tokens: np.ndarray, reader: Reader) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tokens ``(n,)`` before the last documents, and these: 16 rows of them, but at most about a tenth.

    Documents that the model was calibrated on are left out of both.
    """
    wanted = min(VALIDATION_ROWS * reader.length, max(len(tokens) // SHARE, reader.length))
    start = max(0, len(tokens) - WINDOW)
    ends = np.flatnonzero(tokens[start:-1] == reader.end) + start + 1  # where documents begin, but for the first
    held: list[np.ndarray] = []
    have, until = 0, len(tokens)
    for begin in ends[::-1].tolist():
        if have >= wanted:
            break
        piece, until = tokens[begin:until], begin
        if not _may_validate(piece, reader):
            continue
        held.insert(0, piece)
        have += len(piece)
    if not held:
        raise _nothing_to_hold_out(name, reader, one=not len(ends))
    return tokens[:until], held


def _may_validate(piece: np.ndarray, reader: Reader) -> bool:
    """Whether a document may validate. One without its end can't be told from one that was calibrated on."""
    if not reader.calibrated:
        return True
    return bool(piece[-1] == reader.end) and not reader.was_calibrated_on(piece)


def _load_both(
    data: str | Path | Rows, val: str | Path | Rows, reader: Reader, max_tokens: int | None
) -> tuple[Rows, Rows]:
    """Training rows, and validation rows of another text."""
    if not isinstance(data, Rows) and str(data) == str(val) != PYTHON_DOCS:
        raise KronyError(f"{val} is the training text: name other text to validate on, or none to hold some out")
    most = None if max_tokens is None else max(VALIDATION_ROWS * reader.length, max_tokens // SHARE)
    held = _documents(val, "held-out")
    documents = _documents(data, "calibration")
    validation = _validation_rows(val, held, reader, most)
    if documents is None:
        return _token_rows(data, reader, max_tokens), validation
    validating = {digest(text) for text in held or ()}
    trained = [text for text in documents if digest(text) not in validating]
    _warn_of_omitted(len(documents) - len(trained), _name(data), "for validation alone")
    return reader.rows(_name(data), reader.tokens(trained, max_tokens)), validation


def _validation_rows(val: str | Path | Rows, documents: list[str] | None, reader: Reader, most: int | None) -> Rows:
    """Rows of at most so many tokens, without the documents that the model was calibrated on."""
    if documents is not None:
        allowed = [text for text in documents if digest(text) not in reader.calibrated]
        omitted, pieces = len(documents) - len(allowed), reader.tokens(allowed, most)
    else:
        rows = _token_rows(val, reader, most)
        if isinstance(val, Rows) or not reader.calibrated:
            return rows
        split = np.split(rows.tokens, np.flatnonzero(rows.tokens == reader.end) + 1)
        found = [piece for piece in split if len(piece)]
        pieces = [piece for piece in found if not reader.was_calibrated_on(piece)]
        omitted = len(found) - len(pieces)
    if not pieces:
        raise _nothing_to_hold_out(_name(val), reader, one=False)
    _warn_of_omitted(omitted, _name(val), "because the model was calibrated on the same text")
    return reader.rows(_name(val), pieces)


def _documents(data: str | Path | Rows, part: str) -> list[str] | None:
    """The documents of a text whose documents are known, else None. Raises KronyError."""
    if isinstance(data, Rows):
        return None
    refuse_test_set(str(data))
    if str(data) == PYTHON_DOCS:
        return python_docs.topics(part)
    path = Path(data)
    if is_bin(path) or not names_file(str(data)):
        return None
    return read_file(path)


def _token_rows(data: str | Path | Rows, reader: Reader, max_tokens: int | None) -> Rows:
    """Rows of text that is tokens already: rows, a ``.bin``, or a set on the hub."""
    if isinstance(data, Rows):
        return reader.rows(_name(data), [data.tokens[:max_tokens]])
    tokenizer = reader.tokenizer if is_bin(data) else reader.need_tokenizer()
    return load_rows(str(data), tokenizer, length=reader.length, vocabulary=reader.vocabulary, max_tokens=max_tokens)


def _name(data: str | Path | Rows) -> str:
    return "the text" if isinstance(data, Rows) else str(data)


def _nothing_to_hold_out(name: str, reader: Reader, *, one: bool) -> KronyError:
    if one:
        why = f"{name} is one document, and validation takes complete documents that are not trained on"
    elif reader.calibrated:
        why = f"{name} has no document to validate on that the model was not calibrated on"
    else:
        why = f"{name} has no document to hold out for validation"
    return KronyError(f"{why}: name other text with --val (in Python: val), such as a file or python-docs")


def _warn_of_omitted(count: int, name: str, why: str) -> None:
    if count:
        _warn(f"{name}: {count} document{'s' * (count > 1)} left out, {why}")


def _warn(sentence: str) -> None:
    if distributed.is_first():
        warnings.warn(sentence, KronyWarning, stacklevel=2)
