"""Text that is on every machine: the topics of Python's own ``help()``, split into calibration and held-out parts.

Which part a topic belongs to follows from a hash of its name, so the rule is the same on every Python version, though
the topics and their texts vary. Several topics quote others: a paragraph of a held-out topic is left out of the
calibration part wherever it stands.
"""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics as _topics

PARTS = ("calibration", "held-out")


def is_held_out(name: str) -> bool:
    """Whether the topic of this name is only ever evaluated on: one in five, by the first byte of its SHA-256."""
    return hashlib.sha256(name.encode()).digest()[0] % 5 == 0


def topics(part: str) -> list[str]:
    """The texts of a part, in the order of the topics' names. Raises ValueError for another part than ``PARTS``."""
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
    """The paragraphs of a text, each without the line breaks around it."""
    return [paragraph.strip("\n") for paragraph in text.split("\n\n")]
