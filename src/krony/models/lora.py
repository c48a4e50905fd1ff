"""LoRA of PEFT on Kronecker layers: importing this module teaches PEFT's ``LoraModel`` about them.

``krony._register`` imports it right after PEFT's own LoRA, so ``import krony`` is all that a user writes. Two methods
of ``LoraModel`` are extended. One runs before an adapter is put in: it registers the layer with PEFT's interface for
custom modules. The other runs before an adapter is merged. Models without Kronecker layers, and PEFT's other methods,
see no difference.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from torch import nn

from krony.errors import KronyError
from krony.kronecker.linear import KroneckerLinear
from krony.models.surgery import WRAPPED

INITIALISATIONS = (True, False, "gaussian", "orthogonal")  # the others of PEFT decompose or change the dense matrix
VARIANTS = ("use_dora", "alora_invocation_tokens")  # of PEFT 0.18; later versions mark the fields themselves


class LoraKroneckerLinear(Linear):
    """``y = base(x) + scaling · B A x`` around a ``KroneckerLinear``, with ``A: (r, in)`` and ``B: (out, r)``.

    The adapter stays separate: the sum of a few Kronecker products and ``B A`` is no sum of as few.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # said of all that PEFT doesn't know
            super().__init__(*args, **kwargs)
        self.fan_in_fan_out = False  # the option speaks of GPT-2's transposed layers, which may be adapted as well

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """No variant: each reads or writes the dense matrix, or comes without a test here."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises KronyError if the layer has an adapter: there is nothing exact to merge it into."""
        if len(self.lora_A):
            raise KronyError(
                "an adapter can't be merged into a layer of Kronecker products: keep it separate, or make the model "
                'dense first (krony.export_model(model, to="dense") without the adapter), load the adapter on that '
                "(PeftModel.from_pretrained) and merge"
            )


def kronecker_names(model: nn.Module) -> list[str]:
    """The names of the Kronecker layers in ``model``, as they are without adapters."""
    return [n.removesuffix(WRAPPED) for n, m in model.named_modules() if isinstance(m, KroneckerLinear)]


def prepare(tuner: LoraModel, config: Any, model: nn.Module) -> None:
    """Lets ``config`` adapt the Kronecker layers of ``model``; the model is as it was.

    ``target_modules="all-linear"`` becomes PEFT's own choice of names and those of the Kronecker layers, without the
    head. Raises KronyError for an option that would need the dense matrix of a targeted layer.
    """
    names = kronecker_names(model)
    if not names or config.peft_type != "LORA":  # AdaLoRA, a subclass, makes layers of its own
        return
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        _name_all_linear(config, model)
    for name in names:
        if tuner._check_target_module_exists(config, name):
            _check_options(config, name)
        for target in getattr(config, "target_parameters", None) or ():
            if f".{name}.".endswith(f".{target.rpartition('.')[0]}."):
                raise KronyError(
                    f"target_parameters {target!r} names a parameter of the Kronecker layer {name}: adapt the layer by "
                    "target_modules instead"
                )
    config._register_custom_module({KroneckerLinear: LoraKroneckerLinear})


def _name_all_linear(config: Any, model: nn.Module) -> None:
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    head = getattr(model, "get_output_embeddings", lambda: None)()
    ours = {n for n, m in model.named_modules() if isinstance(m, KroneckerLinear) and m is not head}
    _maybe_include_all_linear_layers(config, model)
    config.target_modules |= {name for name in ours if not name.endswith(WRAPPED)}  # PEFT names adapted layers itself


def _check_options(config: Any, name: str) -> None:
    """Raises KronyError if ``config`` asks for an initialisation or a variant that a Kronecker layer can't have."""
    marked = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    wanted = [
        f"{option}={getattr(config, option)!r}" for option in (*VARIANTS, *marked) if getattr(config, option, None)
    ]
    if config.init_lora_weights not in INITIALISATIONS:
        wanted.append(f"init_lora_weights={config.init_lora_weights!r}")
    if wanted:
        raise KronyError(
            f"{wanted[0]} is not possible on the Kronecker layer {name}, which has no dense matrix: use plain LoRA, or "
            "leave the layer out of target_modules"
        )


def check_merge(tuner: LoraModel) -> None:
    """Raises KronyError if a Kronecker layer has an adapter, before other layers are merged."""
    for module in tuner.modules():
        if isinstance(module, LoraKroneckerLinear):
            module.merge()


def extend(tuner: type[LoraModel]) -> None:
    """Lets ``prepare`` and ``check_merge`` run with PEFT's own preparations and checks."""
    own_prepare, own_check = tuner._prepare_model, tuner._check_merge_allowed

    def prepare_model(self: LoraModel, peft_config: Any, model: nn.Module) -> None:
        own_prepare(self, peft_config, model)  # first: it may repeat layers
        prepare(self, peft_config, model)

    def check_merge_allowed(self: LoraModel) -> None:
        own_check(self)
        check_merge(self)

    tuner._prepare_model = prepare_model  # type: ignore[method-assign]
    tuner._check_merge_allowed = check_merge_allowed  # type: ignore[method-assign]


extend(LoraModel)
