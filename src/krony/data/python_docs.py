"""Text that every machine has: the topics of Python's own ``help()``, split into calibration and held-out parts.

A hash of its name decides which part a topic belongs to, so the rule is the same on every Python version, though the
topics and their texts vary. Some topics quote others: every paragraph of a held-out topic is removed from the
calibration part.
"""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics as _topics

PYTHON_DOCS = "python-docs"  # what this text is called
PARTS = ("calibration", "held-out")


def is_held_out(name: str) -> bool:
    """Whether the topic of this name is for evaluation only: one in five, by the first byte of the name's SHA-256.

    Examples:
        >>> is_held_out("lambda"), is_held_out("class")
        (True, False)
    """
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def topics(part: str) -> list[str]:
    """The texts of a part, in the order of the topics' names. Raises ValueError for a part that isn't in ``PARTS``."""
    if part not in PARTS:
        raise ValueError(f"part {part!r} is unknown: it is one of {', '.join(PARTS)}")
    held_out = [_topics[name] for name in sorted(_topics) if is_held_out(name)]
    if part == "held-out":
        return held_out
    seen = {paragraph for text in held_out for paragraph in _paragraphs(text)}
    texts = [_paragraphs(_topics[name]) for name in sorted(_topics) if not is_held_out(name)]
    kept = ["\n\n".join(p for p in paragraphs if p not in seen) for paragraphs in texts]
    return [text for text in kept if text.strip()]


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, without the line breaks around each."""
    return [paragraph.strip("\n") for paragraph in text.split("\n\n")]
