"""Digests of the contents of texts, which a name or a number of tokens doesn't tell apart, and of a run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np


def token_digest(tokens: np.ndarray) -> str:
    """The digest of token ids ``(n,)``; a memory map is read to its end.

    Examples:
        >>> token_digest(np.array([0, 1, 2])) == token_digest(np.arange(3)) != token_digest(np.array([0, 2, 1]))
        True
    """
    return hashlib.blake2b(np.ascontiguousarray(tokens).view(np.uint8).data, digest_size=16).hexdigest()


def key(made_with: dict[str, Any]) -> str:
    """Ten hexadecimal digits that stand for everything a run depends on."""
    return hashlib.blake2b(json.dumps(made_with, sort_keys=True).encode(), digest_size=5).hexdigest()
