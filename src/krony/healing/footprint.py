"""The memory that a training run takes on each device, by arithmetic: nothing is loaded, and no device is needed.

Parameters, gradients and AdamW's two averages are counted from the shapes. Activations are what autograd saves in one
forward pass, which runs on tensors without values (torch's ``FakeTensorMode``), so that every architecture and every
forward path counts as it is.

With a copy of the model on each device (DDP), gradients have a second copy in the buckets that are sent. With shards
(FSDP2, ``krony.healing.sharding``), a device holds its part of everything, and whole for a moment: the embeddings, last
norm and head, and two decoder layers (one that computes, and the buffer that the next is gathered in); going backward
their gradients too, and once more where they are summed.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from krony.healing.options import HealOptions
from krony.healing.recipes import Recipe
from krony.healing.sharding import decoder_layers, placement
from krony.healing.trainable import gradient_checkpointing, trainable
from krony.models.copies import copy_with
from krony.models.fast_training import LONGEST, eager_attention, product_weights
from krony.models.precision import HALF


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one process. The parts reach their most at different moments, so their sum is more than the peak.

    Attributes:
        parameters: weights on the device, and whole copies of sharded ones while they compute.
        gradients: gradients, and the buffers in which they are summed over the devices.
        optimizer: AdamW's two averages.
        activations: what the forward pass leaves for the backward pass, and the logits' gradient; or the logits of a
            validation, where they are more.
        teacher: the teacher's weights on the device.
        peak: the most at one moment on the device.
        main: the most at one moment in the machine's main memory. With shards this is the first process: the whole
            model and teacher stay there, and a checkpoint gathers the whole optimiser state there; the others need none
            beside their device. On a CPU, that and the peak are one figure.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    teacher: int
    peak: int
    main: int

    def to_json(self) -> dict[str, int]:
        """The figures by name, in bytes."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Bytes of weights.

    Attributes:
        whole: all of them.
        part: a device's part, with shards.
        rest: what is outside the decoder layers.
        layer: the largest decoder layer.
    """

    whole: int = 0
    part: int = 0
    rest: int = 0
    layer: int = 0


def footprint(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    recipe: Recipe,
    options: HealOptions,
    *,
    processes: int,
    half: bool,
) -> Footprint:
    """The memory of a run of ``recipe`` in ``processes`` processes, each with its device.

    Args:
        model: the model that trains, on the meta device or any other; it does not change.
        teacher: the original, or None.
        options: ``shard``, ``gradient_checkpointing``, ``freeze`` and ``device`` count; a device is a GPU unless
            ``device`` is ``cpu``.
        half: whether matrix products are in bfloat16.

    Raises:
        KronyError: options that don't fit the model, or shards of a model whose layers can't be told.
    """
    sharded, on_cpu = options.shard, options.device == "cpu"
    rows = recipe.sequences // processes
    batch = max(size for size in range(1, min(recipe.batch, rows) + 1) if rows % size == 0)
    parts = processes if sharded else 1
    with trainable(model, options.frozen):
        every = _weights(model, parts, trains=True)
        training = _weights(model, parts, trains=True, only_trained=True)
        eager = on_cpu and half and recipe.length <= LONGEST
        with eager_attention(model) if eager else nullcontext():
            saved, loss = _activations(model, batch, recipe.length, half, options, taught=teacher is not None)
    aside = product_weights(teacher) if teacher is not None and half and on_cpu else []  # ``fast_training`` does so
    copies = 0
    if half:  # autocast's, which the backward pass needs too unless it computes activations again
        held = sharded and options.gradient_checkpointing  # layer by layer, as their weights are
        copies = (every.rest + every.layer if held else every.whole) // 2
    run = _Run(
        every=every,
        training=training,
        taught=_Weights() if teacher is None else _weights(teacher, parts, converted=aside),
        aside=sum(weight.numel() * weight.dtype.itemsize for weight in aside),
        saved=saved,
        loss=loss,
        validation=_validation(model, batch, recipe.length, half),
        copies=copies,
        accumulated=training.part if rows > batch else 0,
        buckets=training.part if processes > 1 and not sharded else 0,
    )
    return run.sharded(on_cpu) if sharded else run.copied(on_cpu)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Bytes of what a run holds at one time or another.

    Attributes:
        every: the weights, as they train.
        training: those of them that get gradients.
        taught: the teacher's.
        aside: those of the teacher's that are converted, as they were before.
        saved: what the forward pass leaves for the backward pass.
        loss: what the loss takes for a moment, when all of ``saved`` is there.
        validation: the logits of a validation.
        copies: weights in the dtype of the products, which autocast makes.
        accumulated: gradients of earlier batches of a step.
        buckets: gradients as they are sent to the other devices.
    """

    every: _Weights
    training: _Weights
    taught: _Weights
    aside: int
    saved: int
    loss: int
    validation: int
    copies: int
    accumulated: int
    buckets: int

    def copied(self, on_cpu: bool) -> Footprint:
        """A complete model on each device."""
        every, training, taught = self.every, self.training, self.taught
        validating = self.validation + self.copies
        activations = self.saved + self.loss + self.copies
        fixed = every.whole + 2 * training.whole + self.buckets + taught.whole + self.aside
        # without accumulation, gradients take the place of activations
        peak = fixed + max(self.accumulated + activations, training.whole, validating)
        return Footprint(
            parameters=every.whole,
            gradients=training.whole + self.buckets,
            optimizer=2 * training.whole,
            activations=max(activations, validating),
            teacher=taught.whole,
            peak=peak,
            main=peak if on_cpu else every.whole + taught.whole,
        )

    def sharded(self, on_cpu: bool) -> Footprint:
        """A part of the model on each device, and the whole one in the main memory of the first process."""
        every, training, taught = self.every, self.training, self.taught
        computing = every.rest + 2 * every.layer
        lasting = every.part + 2 * training.part + taught.part + taught.rest
        moments = (
            self.accumulated + computing + self.saved + self.copies,  # the last layer of the forward pass
            self.accumulated + every.rest + self.saved + self.loss + self.copies,
            # the same layer going backward
            self.accumulated + computing + training.rest + 2 * training.layer + self.saved + self.copies,
            training.part + computing + training.rest + 2 * training.layer,  # and the first
            training.part + every.rest + 2 * training.rest,  # what is around the layers is summed
            every.rest + self.validation + self.copies,
        )
        peak = lasting + max(moments)
        kept = every.whole + taught.whole + self.aside
        saving = 2 * training.whole  # the whole state of the optimiser
        if on_cpu:
            peak = kept + max(lasting + saving, peak)
        return Footprint(
            parameters=every.part + computing,
            gradients=training.part + training.rest + 2 * training.layer,
            optimizer=2 * training.part,
            activations=max(self.saved + self.loss, self.validation) + self.copies,
            teacher=taught.part + (taught.rest + 2 * taught.layer),
            peak=peak,
            main=peak if on_cpu else kept + saving,
        )


def _weights(
    model: PreTrainedModel,
    parts: int,
    *,
    trains: bool = False,
    only_trained: bool = False,
    converted: Collection[nn.Parameter] = (),
) -> _Weights:
    """Bytes of the weights, tied ones once: in float32 if the model trains, the ``converted`` ones in bfloat16."""
    halved = {id(parameter) for parameter in converted}

    def size(parameter: nn.Parameter, parts: int = 1) -> int:
        if only_trained and not parameter.requires_grad:
            return 0
        item = 4 if trains and parameter.dtype in HALF else parameter.dtype.itemsize
        item = 2 if id(parameter) in halved else item
        if parts == 1 or not parameter.ndim:
            return parameter.numel() * item
        along = parameter.shape[placement(parameter, parts).dim]
        return parameter.numel() // along * -(-along // parts) * item

    whole = sum(size(p) for p in model.parameters())
    if parts == 1:
        return _Weights(whole=whole, part=whole)
    layers = [{id(p): size(p) for p in layer.parameters()} for layer in decoder_layers(model)]
    inside = {key for layer in layers for key in layer}
    return _Weights(
        whole=whole,
        part=sum(size(p, parts) for p in model.parameters()),
        rest=sum(size(p) for p in model.parameters() if id(p) not in inside),
        layer=max(sum(layer.values()) for layer in layers),
    )


def _activations(
    model: PreTrainedModel, batch: int, length: int, half: bool, options: HealOptions, *, taught: bool
) -> tuple[int, int]:
    """Bytes that the forward pass of ``batch`` rows leaves, beside the weights, and that the loss takes meanwhile.

    With gradient checkpointing the first are the inputs of all layers, and everything of one layer.
    """
    logits = _logits(model, batch, length)
    saved, plain = _forward(model, batch, length, half, labelled=not taught)
    if options.gradient_checkpointing:
        layers = len(decoder_layers(model))
        outside, _ = _forward(model, batch, length, half, labelled=not taught, checkpointing=True)
        hidden = batch * length * model.config.get_text_config().hidden_size * (2 if half else 4)
        saved = outside + layers * hidden + (saved - outside) // layers
    if not taught:
        return saved, 2 * logits  # the logits and their gradient
    if not plain:
        return saved, 3 * logits  # the teacher's too
    head = model.get_output_embeddings().weight
    # the loss goes through the logits in pieces, and makes the head's gradient
    return saved, 2 * head.numel() * (2 if half else 4) if head.requires_grad else 0


def _validation(model: PreTrainedModel, batch: int, length: int, half: bool) -> int:
    """Bytes of the logits of ``batch`` rows and of their logarithms, and in ``half`` precision of those before them."""
    logits = _logits(model, batch, length)
    return 2 * logits + (logits // 2 if half else 0)


def _logits(model: PreTrainedModel, batch: int, length: int) -> int:
    """Bytes of the logits of ``batch`` rows in float32."""
    return batch * length * int(model.get_output_embeddings().out_features) * 4


def _forward(
    model: PreTrainedModel, batch: int, length: int, half: bool, *, labelled: bool, checkpointing: bool = False
) -> tuple[int, bool]:
    """Bytes of the storages that autograd saves in one forward pass, without those of parameters and buffers.

    What checkpointed layers save by themselves is not seen. Also returned is whether the logits are what the head makes
    of the last states, and nothing else.
    """
    kept: dict[StorageWeakRef, int] = {}
    made: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = _without_values(model, torch.bfloat16 if half else None)
        if checkpointing:
            gradient_checkpointing(fake, on=True)
        fake.get_output_embeddings().register_forward_hook(lambda _, __, output: made.append(output))
        own = {StorageWeakRef(t.untyped_storage()) for t in (*fake.parameters(), *fake.buffers())}
        ids = torch.zeros(batch, length, dtype=torch.long)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = fake.train()(input_ids=ids, labels=ids if labelled else None, use_cache=False)
        saved = sum(size for storage, size in kept.items() if storage not in own)
    return saved, any(outputs.logits is one for one in made)


def _without_values(model: PreTrainedModel, half: torch.dtype | None) -> PreTrainedModel:
    """The model on a CPU of which only shapes exist; floats are ``half``, or float32 where they were half precision."""

    def empty(tensor: Tensor) -> Tensor:
        dtype = tensor.dtype
        if dtype.is_floating_point:
            dtype = half or (torch.float32 if dtype in HALF else dtype)
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")

    return copy_with(model, empty)
