"""Hand a compressed model back as something that loads without krony."""

from __future__ import annotations

from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.surgery import kronecker_layers

FORMS = ("dense",)


def export_model(model: PreTrainedModel, to: str = "dense") -> PreTrainedModel:
    """The model without Kronecker layers, changed in place.

    ``dense`` multiplies the factors out, scalars included: a plain model of the original's size.

    Raises KronyError for an unknown form, or a model that isn't compressed.
    """
    if to not in FORMS:
        raise KronyError(f"export to {to!r} is unknown: it is one of {', '.join(FORMS)}")
    if not kronecker_layers(model):
        raise KronyError("this model has no Kronecker layers: there is nothing to export")
    return model.dequantize()
