"""The plain model that an engine gets: slim where that is exact, dense elsewhere, and a plain model as it is."""

from __future__ import annotations

from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.models.export import export_model, slim
from krony.models.surgery import kronecker_layers


def plain(model: PreTrainedModel, *, padded: bool = True) -> tuple[PreTrainedModel, str]:
    """Turns a model into a plain one, in place, and says in words what it did.

    ``padded``: whether all layers get one hidden width, see ``krony.models.export.slim``.
    """
    if not kronecker_layers(model):
        return model, "it is a plain model already"
    try:
        made = slim(model, padded=padded)
    except KronyError as error:
        return export_model(model), f"with the factors multiplied out, because {error}"
    if padded:
        return made.model, str(made)
    return made.model, f"every layer has its own hidden width, {min(made.kept)} to {max(made.kept)}"
