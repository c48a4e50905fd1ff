"""Which forward path a Kronecker layer takes, and why: a cost model of a few lines.

``Σ_f A_f X B_fᵀ`` can be computed left factors first, right factors first, or by the dense matrix, made once and kept.
With few tokens a layer waits for its weights, with many for its arithmetic; so the choice depends on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from krony.errors import KronyError
from krony.kronecker.algebra import KronShape

ForwardPath = Literal["left", "right", "dense"]
PATHS: tuple[ForwardPath, ...] = ("left", "right", "dense")

# How many multiply-adds of a large matrix product take as long as one number's way from memory. Two cores of an EPYC
# (float32): 58 G multiply-adds a second a core, 3.5 G numbers. On GPUs the gap is wider.
BALANCE = {"cpu": 16, "other": 128}
FORMING = 3  # passes over the dense matrix that making it takes, with its way back in training


def multiply_adds(shape: KronShape) -> dict[ForwardPath, int]:
    """Multiply-adds a token of each forward path."""
    s, k = shape, shape.factors
    return {
        "left": k * s.m1 * s.n1 * s.n2 + k * s.m1 * s.m2 * s.n2,
        "right": k * s.n1 * s.m2 * s.n2 + k * s.m1 * s.n1 * s.m2,
        "dense": s.rows * s.columns,
    }


def structured_path(shape: KronShape) -> ForwardPath:
    """The cheaper of the two paths that never form the matrix; ``left`` of equals."""
    costs = multiply_adds(shape)
    return "left" if costs["left"] <= costs["right"] else "right"


def cost(shape: KronShape, path: ForwardPath, *, cached: bool, device: str = "cpu") -> tuple[int, int]:
    """What a call costs and what each token adds, both in multiply-adds of a large matrix product.

    Args:
        cached: whether a dense matrix stays from call to call (inference); else every call makes it.
        device: the type of torch device.
    """
    s, k = shape, shape.factors
    balance = BALANCE.get(device, BALANCE["other"])
    adds = multiply_adds(shape)[path]
    if path == "dense":
        return balance * s.rows * s.columns * (1 if cached else 1 + FORMING), adds
    # the mix reads and writes all that is between the factors, most of it in caches
    between = k * s.m1 * s.n2 + s.m1 * s.m2 if path == "left" else s.n1 * s.n2 + k * s.n1 * s.m2
    return balance * s.parameters, adds + balance // 2 * between


def dense_from(shape: KronShape, *, cached: bool, device: str = "cpu") -> int | None:
    """The number of tokens from which the dense matrix is the faster way; None where it never is."""
    if _saves_nothing(shape):
        return 1
    fixed, each = cost(shape, structured_path(shape), cached=cached, device=device)
    dense_fixed, dense_each = cost(shape, "dense", cached=cached, device=device)
    if dense_each >= each:
        return None
    return max(1, -(-(dense_fixed - fixed) // (each - dense_each)))


def _saves_nothing(shape: KronShape) -> bool:
    """Whether the factors have as many numbers as the matrix: nothing is saved by leaving them apart."""
    return shape.parameters >= shape.rows * shape.columns


@dataclass(frozen=True)
class PathChoice:
    """The path for a number of tokens, and the reason in words."""

    path: ForwardPath
    why: str


def choose_path(
    shape: KronShape, tokens: int, *, cached: bool = True, device: str = "cpu", forced: ForwardPath | None = None
) -> PathChoice:
    """What a layer of this shape does with so many tokens.

    Args:
        cached: inference, where a dense matrix is made once; False in training.
        forced: the path that was set by hand.
    """
    adds, whole = multiply_adds(shape), shape.rows * shape.columns
    start = dense_from(shape, cached=cached, device=device)
    own = structured_path(shape)
    if forced is not None:
        return PathChoice(
            forced, f"set by hand; it takes {adds[forced] / whole:.2f} of the dense matrix's multiply-adds"
        )
    if start is not None and tokens >= start:
        rest = "" if start <= 1 else f", and from {start} tokens arithmetic decides"
        made = "made once and kept" if cached else "made anew in each call"
        return PathChoice("dense", f"the factors take {adds[own] / whole:.2f} of its multiply-adds{rest}; {made}")
    first = "left factors first, then a small mix" if own == "left" else "a small mix first, then the left factors"
    why = f"{first}: {adds[own] / whole:.2f} of the dense matrix's multiply-adds, {shape.parameters / whole:.2f} of its"
    why += " numbers"
    return PathChoice(own, why if start is None else f"{why}; dense from {start} tokens")


def check_path(path: str | None) -> None:
    """Raises KronyError for a path that isn't known; None is the planner's choice."""
    if path is not None and path not in PATHS:
        raise KronyError(f"path {path!r} is unknown: it is one of {', '.join(PATHS)}, or auto")
