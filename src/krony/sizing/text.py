"""Text to calibrate on, and complete documents of the same kind to measure on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from krony.data.calibration_set import LENGTH, TOKENS, digest, documents_in, pack
from krony.data.python_docs import PYTHON_DOCS
from krony.data.sets import refuse_test_set
from krony.errors import KronyError

SHARE = 10  # a tenth of the text is held back
HELD_TOKENS = 32_768  # to measure on, at most
SEQUENCES = 8  # to measure on, at least: of fewer a bootstrap says nothing


def split(
    calibration: str, val: str | None, tokenizer: PreTrainedTokenizerBase, *,
    tokens: int = TOKENS, length: int = LENGTH, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token ids ``(sequences, length)`` to calibrate on, and others to measure on; no document is in both.

    Args:
        calibration: a text or jsonl file, ``python-docs`` (its calibration part), or a data set on the hub.
        val: text to measure on; ``python-docs`` is its held-out part. None takes that for ``python-docs``, and for a
            file a tenth of its documents.
        tokenizer: the model's.
        tokens: calibrate on at most so many.
        length: tokens per sequence.
        seed: of the documents' order.

    Raises:
        KronyError: text that can't be read, a test set, a single document, or too little to measure on.
    """
    documents = _documents(calibration, tokens, "calibration")
    if val is None and calibration == PYTHON_DOCS:
        val = PYTHON_DOCS
    if val is None:
        calibrated, held = hold_back(documents, calibration)
    else:
        held = _documents(val, HELD_TOKENS, "held-out")
        measured = {digest(text) for text in held}
        calibrated = [text for text in documents if digest(text) not in measured]
        if not calibrated:
            raise KronyError(f"{val} holds every document of {calibration}: name other text to measure on")
    ids = pack(calibrated, tokenizer, tokens=tokens, length=length, seed=seed)
    what = f"text that is held back from {calibration}" if val is None else f"held-out text {val}"
    return ids, pack(held, tokenizer, tokens=HELD_TOKENS, length=length, seed=seed, least=SEQUENCES, what=what)


def hold_back(documents: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """The documents to calibrate on, and about a tenth of the text; which, depends on the texts alone.

    Raises KronyError if there is only one document.

    Examples:
        >>> kept, held = hold_back([f"text {n:02}" for n in range(20)], "texts.jsonl")
        >>> len(kept), len(held)
        (18, 2)
    """
    texts = {digest(text): text for text in documents}
    if len(texts) < 2:
        raise KronyError(
            f"{name} is one document, and what a size loses is measured on documents that it was not calibrated on: "
            "name other text with --val (in Python: val)"
        )
    wanted = sum(map(len, texts.values())) / SHARE
    held: dict[str, str] = {}
    for key in sorted(texts):
        if sum(map(len, held.values())) >= wanted or len(held) + 1 == len(texts):
            break
        held[key] = texts[key]
    return [text for key, text in texts.items() if key not in held], list(held.values())


def _documents(name: str, tokens: int, part: str) -> list[str]:
    refuse_test_set(name, "a size is chosen on")
    return documents_in(name, tokens, part)
