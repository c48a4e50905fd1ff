"""The trainer of a run whose models are sharded (``krony.healing.sharding``); what it writes to disk is whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from krony.errors import KronyError
from krony.healing.flops import forward_flops
from krony.healing.recipes import Recipe
from krony.healing.sharding import gather, keep_whole_states, reshard, sharded_copy
from krony.healing.trainer import HealingTrainer
from krony.models.comparison import Comparison, plain_heads
from krony.runtime import distributed


class ShardedTrainer(HealingTrainer):
    """``HealingTrainer`` on sharded copies of the model and its teacher.

    Checkpoints are those of a run without shards: a model that ``from_pretrained`` loads, and whole optimiser states.

    Args:
        whole: the model to train. It stays whole, where it is; checkpoints are written from that of the first process,
            and ``finish`` leaves the trained state in it. In the other processes it may be on the meta device.
        teacher: the same holds for it.
    """

    model: PreTrainedModel

    def __init__(
        self,
        recipe: Recipe,
        teacher: PreTrainedModel | None,
        *,
        whole: PreTrainedModel,
        args: TrainingArguments,
        **options: Any,
    ) -> None:
        device = args.device.type
        super().__init__(recipe, None, model=sharded_copy(whole, device), args=args, **options)
        if self.is_fsdp_enabled:  # an Accelerator of the caller's, made before krony was asked
            raise KronyError("accelerate is set up with FSDP of its own: call krony.heal before making an Accelerator")
        self.whole = whole
        if teacher is not None:
            self.teacher = sharded_copy(teacher, device, trains=False)
            # found out on whole models: it switches gradients off for a while, and shards remember that
            plain = distributed.is_first() and plain_heads(whole, teacher) is not None
            heads = (_head(self.model), _head(self.teacher)) if distributed.from_first(plain) else None
            self.comparison = Comparison(heads, self.half)
            length = self.train_dataset.length
            self.flops_per_token += forward_flops(self.teacher, length) / length
        # autocast would keep a copy of every gathered weight until the end of a forward pass
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)  # not data parallel

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over this process's parts."""
        if self.optimizer is None:
            reshard(self.model)
            keep_whole_states(super().create_optimizer(model))
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
        """As without shards. FSDP warns that an output is a view, which nothing here changes in place."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            return super().compute_loss(model, inputs, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gathers the weights, and writes the whole model in the first process."""
        gather(self.model, self.whole)
        sharded, self.model = self.model, self.whole
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = sharded

    def finish(self) -> None:
        """Leaves the trained state in the model that the caller gave."""
        gather(self.model, self.whole)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Reads this process's parts from the file. Trainer loads whole states, onto every GPU."""
        if checkpoint is None:
            return
        for state_of, name in ((self.optimizer, OPTIMIZER_NAME), (self.lr_scheduler, SCHEDULER_NAME)):
            file = Path(checkpoint) / name
            if not file.is_file():
                raise KronyError(f"{file} is missing: resume in a folder that all processes share")
            state_of.load_state_dict(torch.load(file, map_location="cpu", mmap=True, weights_only=True))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            self.optimizer.state_dict()  # the first process asks for it to write it, and gathering takes all
        super()._save_optimizer_and_scheduler(output_dir)


def _head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head
