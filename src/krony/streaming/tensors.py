"""The file that holds each tensor of a model, and the tensor's name in a saved model."""

from __future__ import annotations

from collections.abc import Callable

import torch
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
    find = _finder(model, checkpoint)
    same = {name: names for names in _names_of_parameters(model) for name in names}
    found = {}
    for name, value in model.state_dict().items():
        stored = next(filter(None, map(find, [name, *same.get(name, [])])), None)
        if stored is None:
            raise KronyError(f"{checkpoint.folder}: the weights are incomplete: there is no {name}")
        check_entry(stored, value)
        found[name] = stored
    return found


def stored_apart(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Two tensors that are one by the config and differ in the files: transformers loads both. None without any."""
    find = _finder(model, checkpoint)
    for names in _names_of_parameters(model):
        stored = list({entry.name: entry for entry in map(find, names) if entry is not None}.values())
        for other in stored[1:]:
            if not _are_equal(stored[0], other):
                return stored[0].name, other.name
    return None


def _finder(model: PreTrainedModel, checkpoint: Checkpoint) -> Callable[[str], Entry | None]:
    """The file entry of a tensor by its name in the model, whatever the file calls it; None if no file has it."""
    prefix, renamed = f"{model.base_model_prefix}.", file_names(model) or {}

    def find(name: str) -> Entry | None:
        candidates = [n for other in (name, renamed.get(name, name)) for n in (other, other.removeprefix(prefix))]
        return next((checkpoint.entries[n] for n in candidates if n in checkpoint.entries), None)

    return find


def _are_equal(one: Entry, other: Entry) -> bool:
    """Whether two tensors have the same dtype, shape and values, a piece of each in memory at a time."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(torch.equal(*pieces) for pieces in zip(one.pieces(), other.pieces(), strict=True))


def _names_of_parameters(model: PreTrainedModel) -> list[list[str]]:
    """All names of each parameter; a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())
