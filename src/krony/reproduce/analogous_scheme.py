"""GPT-2 124M's schemes on other models: the same right factor, or the nearest that divides."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.kronecker.algebra import KronShape
from krony.kronecker.schemes import resolve
from krony.models.loading import load_model
from krony.models.surgery import find_groups
from krony.reproduce.lines import Options


def tall_size(model: PreTrainedModel) -> tuple[int, int]:
    """Hidden width and width of the model's MLPs, which are alike in every layer. Raises KronyError."""
    sizes = {site.tall for group in find_groups(model) for site in group.sites}
    if len(sizes) > 1:
        raise KronyError(f"the tables take one scheme for all layers, and this model's MLPs are {sorted(sizes)}")
    return next(iter(sizes))


def analogous_scheme(scheme: str, rows: int, columns: int) -> str:
    """The scheme of a tall ``rows`` by ``columns`` matrix that is to it what ``scheme`` is to 3072x768.

    As many factors, and the right factor that is nearest in size, then in shape, then of the highest rank of one
    product.
    """
    wanted = resolve(scheme, 3072, 768)

    def far(shape: KronShape) -> tuple[float, float, int]:
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
        raise KronyError(f"no scheme of a {rows}x{columns} matrix is to it what {scheme} is to GPT-2's")
    return str(min(shapes, key=far))


def load_base(options: Options, target: str) -> PreTrainedModel:
    """The model of a table. Raises KronyError that says what the table needs where it can't be had."""
    try:
        return load_model(options.model, device=options.device)
    except KronyError as error:
        if not options.is_gpt2:
            raise
        raise KronyError(
            f"{target} needs GPT-2's weights, from the hub or a folder called {options.model}, or another model by "
            f"--model, such as demo: {error}"
        ) from None


def model_sentences(options: Options, schemes: dict[str, str]) -> list[str]:
    """Which model it was, and what stands for the paper's schemes where it is another."""
    if options.is_gpt2:
        return ["GPT-2 124M."]
    stand_in = ", ".join(f"{ours} for {paper}" for paper, ours in schemes.items())
    return [f"Run with {options.model} in GPT-2's place: {stand_in}."]
