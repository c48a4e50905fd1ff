"""Which file holds each tensor of a model, and what a saved model calls it."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from krony.errors import KronyError
from krony.models.folder_checks import check_entry
from krony.storage.tensor_files import Checkpoint, Entry


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What ``save_pretrained`` would write of a model: of tied weights the one that the others are tied to."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or [])
    spare = {name for names in _names_of_parameters(model) if len(names) > 1 for name in names if name in tied}
    return {name: value for name, value in model.state_dict().items() if name not in spare | ignored}


def file_names(model: PreTrainedModel) -> dict[str, str] | None:
    """What ``save_pretrained`` calls each tensor of a model; None where it does more than to rename them."""
    changes = get_model_conversion_mapping(model, add_legacy=False)
    if not all(isinstance(change, WeightRenaming) for change in changes):
        return None
    tensors = model.state_dict()
    if not changes:
        return {name: name for name in tensors}
    return {name: next(iter(revert_weight_conversion(model, {name: value}))) for name, value in tensors.items()}


def find_entries(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Entry]:
    """Where each tensor of the model lies, by the model's names. Raises KronyError for one that lies nowhere."""
    prefix, renamed = f"{model.base_model_prefix}.", file_names(model) or {}
    same = {name: names for names in _names_of_parameters(model) for name in names}
    found = {}
    for name, value in model.state_dict().items():
        own = [name, *(other for other in same.get(name, []) if other != name)]
        called = [n for other in own for n in (other, renamed.get(other, other))]
        there = [n for other in called for n in (other, other.removeprefix(prefix)) if n in checkpoint.entries]
        if not there:
            raise KronyError(f"{checkpoint.folder}: the weights are incomplete: there is no {name}")
        entry = checkpoint.entries[there[0]]
        check_entry(entry, value)
        found[name] = entry
    return found


def _names_of_parameters(model: PreTrainedModel) -> list[list[str]]:
    """All names of each parameter; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())
