"""Which forward path a Kronecker layer takes, and why: a cost model of a few lines.

``Σ_f A_f X B_fᵀ`` can be computed left factors first, right factors first, or by the dense matrix. With few tokens a
layer waits for its weights, with many for its arithmetic; so the choice depends on the number of tokens, and on whether
the dense matrix is cached (``krony.kronecker.derived``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from krony.errors import KronyError
from krony.kronecker.algebra import KronShape

ForwardPath = Literal["left", "right", "dense"]
PATHS: tuple[ForwardPath, ...] = ("left", "right", "dense")

# How many multiply-adds of a large matrix product take as long as reading one number from memory. Two cores of an EPYC
# (float32): 58 G multiply-adds per second and core, 3.5 G numbers. On GPUs the gap is wider.
BALANCE = {"cpu": 16, "other": 128}
FORMING = 3  # passes over the dense matrix that it takes to make it, in training with its backward pass


def multiply_adds(shape: KronShape) -> dict[ForwardPath, int]:
    """Multiply-adds per token of each forward path.

    Examples:
        >>> multiply_adds(KronShape.split(3072, 768, 768, 768))
        {'left': 592896, 'right': 2362368, 'dense': 2359296}
    """
    s, k = shape, shape.factors
    return {
        "left": k * s.m1 * s.n1 * s.n2 + k * s.m1 * s.m2 * s.n2,
        "right": k * s.n1 * s.m2 * s.n2 + k * s.m1 * s.n1 * s.m2,
        "dense": s.rows * s.columns,
    }


def structured_path(shape: KronShape) -> ForwardPath:
    """The cheaper of the two paths that never form the matrix; ``left`` if they cost the same."""
    costs = multiply_adds(shape)
    return "left" if costs["left"] <= costs["right"] else "right"


def cost(shape: KronShape, path: ForwardPath, *, cached: bool, device: str = "cpu") -> tuple[int, int]:
    """The fixed cost of a call and the cost per token, both in multiply-adds of a large matrix product.

    Args:
        cached: whether a dense matrix is reused from call to call; else every call makes it.
        device: a device type of torch, such as ``cuda``.
    """
    s, k = shape, shape.factors
    balance = BALANCE.get(device, BALANCE["other"])
    adds = multiply_adds(shape)[path]
    if path == "dense":
        return balance * s.rows * s.columns * (1 if cached else 1 + FORMING), adds
    # combining reads and writes everything between the factors, most of it in the processor's caches
    between = k * s.m1 * s.n2 + s.m1 * s.m2 if path == "left" else s.n1 * s.n2 + k * s.n1 * s.m2
    return balance * s.parameters, adds + balance // 2 * between


def dense_from(shape: KronShape, *, cached: bool, device: str = "cpu") -> int | None:
    """The number of tokens from which the dense matrix is faster; None where it never is.

    Examples:
        >>> shape = KronShape.split(3072, 768, 1024, 256, factors=4)
        >>> dense_from(shape, cached=True) < dense_from(shape, cached=False)
        True
    """
    if _saves_nothing(shape):
        return 1
    fixed, each = cost(shape, structured_path(shape), cached=cached, device=device)
    dense_fixed, dense_each = cost(shape, "dense", cached=cached, device=device)
    if dense_each >= each:
        return None
    return max(1, -(-(dense_fixed - fixed) // (each - dense_each)))


def _saves_nothing(shape: KronShape) -> bool:
    """Whether the factors have at least as many numbers as the matrix, so that the structured paths save nothing."""
    return shape.parameters >= shape.rows * shape.columns


@dataclass(frozen=True)
class PathChoice:
    """The path for a number of tokens, and the reason in a sentence."""

    path: ForwardPath
    why: str


def choose_path(
    shape: KronShape, tokens: int, *, cached: bool = True, device: str = "cpu", forced: ForwardPath | None = None
) -> PathChoice:
    """The path that a layer of this shape takes for ``tokens`` tokens.

    Args:
        cached: whether a dense matrix is reused from call to call, as in ``generate``; False in training.
        device: a device type of torch.
        forced: the layer's ``path``, if it is set.

    Examples:
        >>> choose_path(KronShape.split(3072, 768, 1536, 768), tokens=512).path
        'left'
    """
    adds, size = multiply_adds(shape), shape.rows * shape.columns
    start = dense_from(shape, cached=cached, device=device)
    structured = structured_path(shape)
    if forced is not None:
        return PathChoice(
            forced, f"set by the user; it takes {adds[forced] / size:.2f} of the dense matrix's multiply-adds"
        )
    if start is not None and tokens >= start:
        rest = "" if start <= 1 else f", which it makes up for from {start} tokens on"
        made = "made once and cached" if cached else "made again in each call"
        return PathChoice("dense", f"the factors take {adds[structured] / size:.2f} of its multiply-adds{rest}; {made}")
    left_first = structured == "left"
    order = "left factors first, then the right" if left_first else "right factors first, then the left"
    shares = adds[structured] / size, shape.parameters / size
    why = f"{order}: {shares[0]:.2f} of the dense matrix's multiply-adds, {shares[1]:.2f} of its numbers"
    return PathChoice(structured, why if start is None else f"{why}; dense from {start} tokens")


def check_path(path: str | None) -> None:
    """Raises KronyError for an unknown path; None leaves the choice to the planner."""
    if path is not None and path not in PATHS:
        raise KronyError(f"path {path!r} is unknown: it is one of {', '.join(PATHS)}, or auto")
