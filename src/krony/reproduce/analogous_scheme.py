"""GPT-2 124M's schemes for other models: the same right factor, or the nearest one that divides."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.kronecker.algebra import KronShape
from krony.kronecker.schemes import resolve
from krony.models.loading import load_model
from krony.models.surgery import find_groups
from krony.reproduce.options import TableOptions


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
    try:
        return load_model(options.model, device=options.device)
    except KronyError as error:
        if not options.is_gpt2:
            raise
        raise KronyError(
            f"{target} needs GPT-2's weights, from the hub or a folder called {options.model}, or another model with "
            f"--model, such as demo: {error}"
        ) from None


def model_sentences(options: TableOptions, schemes: dict[str, str]) -> list[str]:
    """Which model the table was run with, and which schemes replace the paper's if it is another model."""
    if options.is_gpt2:
        return ["GPT-2 124M."]
    stand_in = ", ".join(f"{ours} for {paper}" for paper, ours in schemes.items())
    return [f"Run with {options.model} in place of GPT-2: {stand_in}."]
