"""GPT-2 124M's schemes for other models: the same right factor, or the nearest one that divides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.kronecker.algebra import KronShape
from krony.kronecker.schemes import resolve
from krony.models.loading import load_model
from krony.models.source import GPT2_NAMES, ModelSource
from krony.models.surgery import find_groups
from krony.reproduce.options import TableOptions
from krony.reproduce.recognition import Likeness


def tall_size(model: PreTrainedModel) -> tuple[int, int]:
    """Hidden width and width of the model's MLPs. Raises KronyError if the layers differ."""
    sizes = {site.tall for group in find_groups(model) for site in group.sites}
    if len(sizes) > 1:
        raise KronyError(f"the tables use one scheme for all layers, but this model's MLPs are {sorted(sizes)}")
    return next(iter(sizes))


def analogous_scheme(scheme: str, rows: int, columns: int) -> str:
    """The scheme for ``rows`` by ``columns`` matrices that corresponds to ``scheme`` for GPT-2's 3072x768.

    It has the same number of factors, and the right factor that is nearest in size, then in shape; of equals, the one
    whose single product has the highest rank.

    Raises:
        KronyError: no such scheme, as for a matrix of 3x2.

    Examples:
        >>> analogous_scheme("768x768", 1024, 256)
        '256x256'
    """
    wanted = resolve(scheme, 3072, 768)

    def distance(shape: KronShape) -> tuple[float, float, int]:
        size = abs(math.log(shape.m2 * shape.n2 / (wanted.m2 * wanted.n2)))
        form = abs(math.log(shape.m2 / wanted.m2)) + abs(math.log(shape.n2 / wanted.n2))
        return round(size, 9), round(form, 9), -min(shape.left) * min(shape.right)

    shapes = [
        KronShape(rows // m2, columns // n2, m2, n2, wanted.factors)
        for m2 in range(1, rows + 1)
        for n2 in range(1, columns + 1)
        if rows % m2 == 0 and columns % n2 == 0 and wanted.factors < min(m2 * n2, rows * columns // (m2 * n2))
    ]
    if not shapes:
        raise KronyError(f"no scheme of a {rows}x{columns} matrix corresponds to GPT-2's {scheme}")
    return str(min(shapes, key=distance))


def load_base(options: TableOptions, target: str) -> PreTrainedModel:
    """The model that a table is run with. Raises KronyError, which says what is missing."""
    with _what_is_needed(options, target):
        return load_model(options.model, device=options.device)


def load_skeleton(options: TableOptions, target: str) -> PreTrainedModel:
    """The same model without its weights. Raises KronyError, which says what is missing."""
    with _what_is_needed(options, target):
        return ModelSource.find(options.model).skeleton


@contextmanager
def _what_is_needed(options: TableOptions, target: str) -> Iterator[None]:
    try:
        yield
    except KronyError as error:
        if options.model not in GPT2_NAMES:
            raise
        raise KronyError(
            f"{target} needs GPT-2's weights, from the hub or a folder called {options.model}, or another model with "
            f"--model, such as demo: {error}"
        ) from None


def model_sentences(options: TableOptions, like: Likeness, schemes: dict[str, str]) -> list[str]:
    """Which model the table was run with, and which schemes replace the paper's if it is another model."""
    if like.is_gpt2:
        return [f"{options.model} is GPT-2 124M by {like.reason}."]
    said = [f"Run with {options.model} in place of GPT-2: {_stand_ins(schemes)}."]
    if options.model in GPT2_NAMES:
        said.append(f"{options.model} is not GPT-2 124M, because {like.reason}.")
    return said


def _stand_ins(schemes: dict[str, str]) -> str:
    return ", ".join(f"{ours} for {paper}" for paper, ours in schemes.items())
