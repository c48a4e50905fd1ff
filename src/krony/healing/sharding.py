"""Shards a model over the processes of a run (FSDP2): each has a part of every weight, gradient and optimiser state.

One policy for all models. A group of parameters is a whole decoder layer, and one more holds what is around the layers.
Nothing smaller may be a group: a fused MLP reads the parameters of its layers, and the loss with a teacher those of the
head, outside these modules' own forward. The head is in the last group, beside the embeddings that it may be tied to;
that group stays gathered until its gradients are made.

The copy of a model is sharded and not the model itself, because ``fully_shard`` has no way back. Values come from the
first process. In the others the model itself can be on the meta device, so that a machine holds it once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.healing.options import HealOptions
from krony.models.copies import copy_without_values
from krony.models.source import ModelSource
from krony.runtime import distributed

ON = ("true", "1", "yes", "on", "y", "t")


def is_sharding(options: HealOptions) -> bool:
    """Whether a run shards its models: an option, or ``accelerate launch --use_fsdp``, asks for it."""
    return options.shard or distributed.asks_for_shards()


def check_sharding(
    model: PreTrainedModel, teacher: PreTrainedModel | None, options: HealOptions, processes: int
) -> None:
    """Raises KronyError where a run in so many processes is to be sharded and can't be, or not as its launcher asks."""
    if not is_sharding(options):
        return
    if processes == 1:
        raise KronyError(
            "shards are for several processes, and this is one: launch with torchrun (for --dry-run say how many with "
            "--world-size), or without sharding"
        )
    if options.compile:
        raise KronyError("compile and shards don't go together: leave one of them out")
    if distributed.asks_for_shards():
        _check_launch()
    for one in (model, teacher):
        if one is not None:
            decoder_layers(one)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.bfloat16, torch.float16}
    if len(dtypes) > 1:  # halves are float32 while they train
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise KronyError(f"a model of {names} can't be sharded: load it with one dtype")


def _check_launch() -> None:
    """Raises KronyError for options of ``accelerate launch`` that would otherwise be dropped without a word."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise KronyError("healing shards with FSDP's version 2: launch with --use_fsdp --fsdp_version 2")
    for name, instead in (
        ("FSDP_OFFLOAD_PARAMS", "leave --fsdp_offload_params out, or take more processes"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "krony heal --gradient-checkpointing does the same"),
    ):
        if os.environ.get(name, "").lower() in ON:
            raise KronyError(f"{name} is set, which healing does not do: {instead}")


def load_once(source: ModelSource, dtype: str) -> PreTrainedModel:
    """Loads a model that is to be sharded: whole in the first process, without values (``meta``) in the others.

    Every process has to call this. Raises KronyError in all of them where ``ModelSource.load`` raises it in the first.
    """
    whole = distributed.in_first(lambda: source.load(dtype=dtype))
    empty = distributed.from_first(None if whole is None else copy_without_values(whole))
    return empty if whole is None else whole


def sharded_copy(model: PreTrainedModel, device: str, *, trains: bool = True) -> PreTrainedModel:
    """A copy of ``model`` on ``device`` of which each process holds its part; every process has to call this.

    Args:
        model: stays as it is, whole and where it is. Only the first process has to have its values.
        device: ``cpu`` or ``cuda``; each process has its own GPU.
        trains: False for a teacher, whose parameters need no gradients.

    Returns:
        The copy. Its forward takes all processes at once; ``load_state_dict`` takes whole tensors.

    Raises:
        KronyError: a model whose decoder layers can't be told, or share parameters with each other, or that is not the
            same in all processes.
    """
    described = _described(model)
    theirs = distributed.from_first(described)
    if not distributed.all_agree(described == theirs):
        names = sorted({name for name, *_ in set(described) ^ set(theirs)})
        where = f" ({names[0]})" if names else ""
        raise KronyError(f"the processes have different models{where}, so they can't each hold a part of one")
    mine = copy_without_values(model)
    if not trains:
        mine.eval().requires_grad_(False)
    mesh = init_device_mesh(device, (distributed.count(),))
    options: dict[str, Any] = {"mesh": mesh, "shard_placement_fn": lambda p: placement(p, mesh.size())}
    for layer in reversed(decoder_layers(mine)):
        fully_shard(layer, **options)
    fully_shard(mine, **options)
    mine.to_empty(device=device)
    _take_values(mine, model)
    mine.register_load_state_dict_pre_hook(_take_own_parts)
    return mine


@torch.no_grad()
def _take_values(sharded: PreTrainedModel, model: PreTrainedModel) -> None:
    """Gives the parameters and buffers of ``sharded`` the values that ``model`` has in the first process.

    One at a time is whole on the device.
    """
    first = distributed.is_first()
    values = dict(_tensors(model, every_name=True))
    for name, tensor in _tensors(sharded):
        value = values[name].detach()
        device = tensor.device
        there = value.to(device) if first else torch.empty(value.shape, dtype=value.dtype, device=device)
        if isinstance(tensor, DTensor):
            tensor.copy_(distribute_tensor(there, tensor.device_mesh, tensor.placements))
        else:
            dist.broadcast(there, src=0)
            tensor.copy_(there)


def _described(model: PreTrainedModel) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of each parameter and buffer."""
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(model)]


def _tensors(model: PreTrainedModel, *, every_name: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a model by name; tied ones once, or with ``every_name`` by each of their names."""
    once = {"remove_duplicate": not every_name}
    return itertools.chain(model.named_parameters(**once), model.named_buffers(**once))


def as_it_runs(model: PreTrainedModel, options: HealOptions) -> PreTrainedModel:
    """A model to measure beside a run: itself, or if the run is sharded a sharded copy, as it may not fit whole."""
    return sharded_copy(model, distributed.device(), trains=False) if is_sharding(options) else model


def placement(parameter: Tensor, processes: int) -> Shard:
    """The dimension along which a parameter is split: the first that has an element for each process.

    A left factor ``(1, m1, n1)`` is split along ``m1``. FSDP splits other dimensions than 0 only into equal parts;
    where none can be, some processes have nothing of the parameter.

    Examples:
        >>> placement(torch.empty(1, 6, 4), 2).dim, placement(torch.empty(4, 6, 4), 2).dim
        (1, 0)
        >>> placement(torch.empty(1, 5, 4), 2).dim, placement(torch.empty(1), 2).dim
        (2, 0)
    """
    if parameter.shape[0] >= processes:
        return Shard(0)
    equal = (dim for dim in range(1, parameter.ndim) if parameter.shape[dim] % processes == 0)
    return Shard(next(equal, 0))


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a model, outer ones first. Raises KronyError where they can't be groups by themselves."""
    names = set(model._no_split_modules or ())
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = [layer for stack in stacks for layer in stack if type(layer).__name__ in names]
    if not layers:
        raise KronyError(f"{type(model).__name__} doesn't say which modules are its layers, so it can't be sharded")
    inside = {id(module) for layer in layers for module in layer.modules()}
    around = [module for module in model.modules() if id(module) not in inside]
    seen = {id(parameter) for module in around for parameter in module.parameters(recurse=False)}
    for layer in layers:
        own = {id(parameter) for parameter in layer.parameters()}
        if own & seen:
            raise KronyError(f"layers of this {type(model).__name__} share parameters, so it can't be sharded")
        seen |= own
    return layers


@torch.no_grad()
def gather(sharded: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Copies the values of all parameters and buffers of ``sharded`` to ``whole``, in every process.

    One parameter at a time is gathered; every process has to call this. Where ``whole`` is on the meta device, it stays
    without values.
    """
    reshard(sharded)
    values = dict(sharded.named_parameters())
    for name, parameter in whole.named_parameters():
        parameter.copy_(_whole(values[name]))
    buffers = dict(sharded.named_buffers())
    for name, buffer in whole.named_buffers():
        buffer.copy_(buffers[name])


def reshard(sharded: nn.Module) -> None:
    """Frees what a forward pass has left gathered; after it the parameters of the modules are the parts again."""
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def keep_whole_states(optimizer: torch.optim.Optimizer) -> None:
    """Lets the state of an optimiser of sharded parameters go to disk, and come back, as that of whole ones.

    A run can then resume with any number of processes, with or without shards. From now on ``state_dict`` takes all
    processes at once, and has the state in the first one.
    """
    optimizer.register_state_dict_post_hook(_gather_states)
    optimizer.register_load_state_dict_pre_hook(_shard_states)


def _take_own_parts(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: of each whole tensor, this process's part."""
    reshard(module)
    for name, parameter in module.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        if name in state:
            state[name] = _part(state[name], parameter)


def _gather_states(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` with whole tensors on the CPU in the first process, which writes it; without state elsewhere."""
    whole: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        gathered = {name: _whole(value) for name, value in values.items()}  # takes all processes
        if distributed.is_first():
            whole[index] = {
                name: value.cpu() if isinstance(values[name], DTensor) else value for name, value in gathered.items()
            }
    return state | {"state": whole}


def _shard_states(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` with this process's part of each whole tensor that has its parameter's shape."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = dict(zip(numbers, parameters, strict=True))
    parts = {
        number: {name: _part(value, own[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": parts}


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(value: Any, parameter: Tensor) -> Any:
    """This process's part of ``value``, split as ``parameter`` is, where it has the shape of ``parameter``."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != parameter.shape:  # an optimiser counts its steps in a scalar
        return value
    there = value.to(parameter.device)
    return distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)
