"""The file that holds each tensor of a model, and the tensor's name in a saved model."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from krony.errors import KronyError
from krony.models.folder_checks import check_entry
from krony.storage.tensor_files import Checkpoint, Entry


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that ``save_pretrained`` writes, by name; of tied weights only the one that others are tied to."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or [])
    spare = {name for names in _names_of_parameters(model) if len(names) > 1 for name in names if name in tied}
    return {name: value for name, value in model.state_dict().items() if name not in spare | ignored}


def file_names(model: PreTrainedModel) -> dict[str, str] | None:
    """Name in the model -> name that ``save_pretrained`` writes; None if it does more than rename tensors."""
    changes = get_model_conversion_mapping(model, add_legacy=False)
    if not all(isinstance(change, WeightRenaming) for change in changes):
        return None
    tensors = model.state_dict()
    if not changes:
        return {name: name for name in tensors}
    return {name: next(iter(revert_weight_conversion(model, {name: value}))) for name, value in tensors.items()}


def find_entries(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Entry]:
    """The file entry of each tensor of the model, by its name in the model.

    Raises KronyError for a tensor that no file holds, or whose shape differs.
    """
    prefix, renamed = f"{model.base_model_prefix}.", file_names(model) or {}
    same = {name: names for names in _names_of_parameters(model) for name in names}
    found = {}
    for name, value in model.state_dict().items():
        tied = [name, *(other for other in same.get(name, []) if other != name)]
        candidates = [n for other in tied for n in (other, renamed.get(other, other))]
        stored = [n for other in candidates for n in (other, other.removeprefix(prefix)) if n in checkpoint.entries]
        if not stored:
            raise KronyError(f"{checkpoint.folder}: the weights are incomplete: there is no {name}")
        entry = checkpoint.entries[stored[0]]
        check_entry(entry, value)
        found[name] = entry
    return found


def _names_of_parameters(model: PreTrainedModel) -> list[list[str]]:
    """All names of each parameter; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())
