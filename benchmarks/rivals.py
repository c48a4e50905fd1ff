"""Other packages' pruning of MLPs, run as their own documentation says: ``torch-pruning`` and ``optipfair``.

Each removes the same share of the hidden neurons from every MLP, and leaves attention, embedding and head alone, so
that the parameters are those of ``krony export --to slim``.

- torch-pruning (Fang et al. 2023) as in its ``examples/LLMs/prune_llm.py``: ``BasePruner`` with
  ``GroupMagnitudeImportance(p=2, group_reduction="mean")``, or with ``GroupTaylorImportance()`` after
  ``loss.backward()``. All layers but the MLPs' are ignored. The gradient is that of the loss on all calibration tokens.
- optipfair (Martra 2025) as in its README: ``prune_model(pruning_type="MLP_GLU", neuron_selection_method="MAW")``; with
  ``dataloader`` it weighs by the norms of activations on the calibration text. It knows Llama's MLPs only.
"""

from __future__ import annotations

import copy
import warnings
from functools import cached_property

import torch
from quality_bytes import as_linear
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from krony.models.export import WIDTHS
from krony.models.surgery import find_groups

GRADIENT_SEQUENCES = 4  # per backward pass
WAYS = ("torch-pruning, magnitude", "torch-pruning, Taylor", "optipfair", "optipfair, calibrated")


class Rivals:
    """Prunes copies of one model.

    Args:
        model: in float32; it does not change.
        ids: the calibration text, ``(sequences, length)``.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def pruned(self, way: str, keep: float) -> PreTrainedModel:
        """A copy with this share of the hidden neurons, by one of ``WAYS``."""
        if way.startswith("optipfair"):
            return self._optipfair(keep, calibrated=way.endswith("calibrated"))
        return self._torch_pruning(keep, taylor=way.endswith("Taylor"))

    def knows(self, way: str) -> bool:
        """Whether the package can prune this model."""
        return not way.startswith("optipfair") or len(find_groups(self.model)[0].sites) == 3

    def _torch_pruning(self, keep: float, *, taylor: bool) -> PreTrainedModel:
        import torch_pruning

        model = as_linear(copy.deepcopy(self.model)).eval()
        if taylor:
            importance = torch_pruning.importance.GroupTaylorImportance()
            for name, parameter in model.named_parameters():
                parameter.grad = self._gradients[name]
        else:
            importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
        groups = find_groups(model)
        own = {site.name for group in groups for site in group.sites}
        layers = (torch.nn.Linear, torch.nn.Embedding)
        others = [m for name, m in model.named_modules() if isinstance(m, layers) and name not in own]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unwrapped parameters detected")  # the norms, which stay
            pruner = torch_pruning.pruner.BasePruner(
                model,
                {"input_ids": self.ids[:1, :16], "use_cache": False},
                importance=importance,
                global_pruning=False,
                pruning_ratio=0.0,
                pruning_ratio_dict={model.get_submodule(group.sites[0].name): 1 - keep for group in groups},
                ignored_layers=others,
                output_transform=lambda outputs: outputs.logits,
            )
            for group in pruner.step(interactive=True):
                group.prune()
        model.zero_grad()
        return _with_width(model)

    @cached_property
    def _gradients(self) -> dict[str, Tensor]:
        """The gradient of the mean loss on the calibration text, by the names of the parameters."""
        model = as_linear(copy.deepcopy(self.model)).eval()
        for batch in self.ids.split(GRADIENT_SEQUENCES):
            (model(input_ids=batch, labels=batch).loss * (len(batch) / len(self.ids))).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    def _optipfair(self, keep: float, *, calibrated: bool) -> PreTrainedModel:
        import optipfair

        text = DataLoader(TensorDataset(self.ids, torch.ones_like(self.ids)), batch_size=GRADIENT_SEQUENCES)
        model = optipfair.prune_model(
            model=copy.deepcopy(self.model),
            pruning_type="MLP_GLU",
            neuron_selection_method="MAW",
            pruning_percentage=100 * (1 - keep),
            dataloader=text if calibrated else None,
            show_progress=False,
        )
        return _with_width(model)


def _with_width(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the hidden width of its MLPs in its config, as the examples of both packages set it."""
    name = next(name for name in WIDTHS if hasattr(model.config, name))
    setattr(model.config, name, find_groups(model)[0].sites[0].out_features)
    return model.eval()
