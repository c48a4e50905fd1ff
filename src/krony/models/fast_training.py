"""What makes a training on CPUs fast: the implementation of attention, and a teacher that is converted once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from krony.models.precision import full_precision, product_dtype
from krony.models.surgery import is_linear
from krony.runtime.hardware import has_tiles

LONGEST = 1024  # tokens per row: the eager implementation takes memory that grows with their square


@contextmanager
def fast_training(
    student: PreTrainedModel | None, teacher: PreTrainedModel | None, *, device: torch.device | str, length: int
) -> Iterator[None]:
    """Within it a student and its teacher compute the same, but for rounding, faster on rows of ``length`` tokens.

    Only CPUs with fast bfloat16 products are concerned. There transformers' plain attention (``eager``) has the faster
    backward pass, and the faster forward pass too unless the processor has matrix tiles; otherwise torch's own
    (``sdpa``) stays. The teacher's matrices are kept in bfloat16, which autocast would make of them in every pass. A
    teacher in float16 is in float32 first: torch's norms on CPUs take no mix of the two.
    """
    with ExitStack() as stack:
        mixes = teacher is not None and teacher.dtype == torch.float16
        if teacher is not None and mixes and student is not None and _in_bfloat16(student, device):
            stack.enter_context(full_precision(teacher))
        if all(_in_bfloat16(model, device) for model in (student, teacher) if model is not None):
            if student is not None and length <= LONGEST:
                stack.enter_context(eager_attention(student))
            if teacher is not None and teacher is not student:
                if length <= LONGEST and not has_tiles():
                    stack.enter_context(eager_attention(teacher))
                stack.enter_context(_converted(teacher))
        yield


def _in_bfloat16(model: PreTrainedModel, device: torch.device | str) -> bool:
    """Whether the products of this model are in bfloat16, and on a CPU."""
    return torch.device(device).type == "cpu" and product_dtype(model, device) == torch.bfloat16


def product_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The float32 weights that matrix products alone read: not the head, where it is tied to the embeddings."""
    products: list[nn.Parameter] = []
    others = set()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if is_linear(module):
            products += [p for p in own if p.ndim == 2 and p.dtype == torch.float32]
        else:
            others |= {id(p) for p in own}
    return [p for p in products if id(p) not in others]


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model with torch's own attention has transformers' plain one."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _converted(model: PreTrainedModel) -> Iterator[None]:
    """Within it ``product_weights`` are in bfloat16; at the end they have their own values again."""
    weights = product_weights(model)
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.to(torch.bfloat16)
        yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data = value
