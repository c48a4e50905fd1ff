"""``krony generate``: text from a model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from krony.cli.options import Device, Dtype, Json, Model, Seed
from krony.cli.output import Output, complain, quiet_libraries
from krony.errors import KronyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Write at most N tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_to: Json = None,
) -> None:
    """Continue a prompt with MODEL.

    The text ends after --max-new-tokens, at the model's end-of-text token, or where its context is full.
    """
    to = Output(json_to)
    import torch

    from krony.data.text_files import is_text
    from krony.models.loading import context_length
    from krony.models.source import LoadingErrors, ModelSource

    quiet_libraries()
    if not is_text(prompt):
        raise KronyError("--prompt is not UTF-8 text")
    source = ModelSource.find(model)
    loaded, tokenizer = source.load(dtype=dtype, device=device), source.tokenizer
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    given = inputs["input_ids"].shape[1]
    context = context_length(loaded)
    room = context - given
    if given == 0 or room < 1:
        raise KronyError(f"--prompt has {given} tokens: from 1 to {context - 1} leave room for an answer")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    start = time.perf_counter()
    with LoadingErrors(model, "by its generation_config.json it can't generate"):
        output = loaded.generate(
            **inputs, max_new_tokens=min(max_new_tokens, room), pad_token_id=tokenizer.eos_token_id, **sampling
        )[0]
    seconds = time.perf_counter() - start
    new = len(output) - given
    stopped = "max_new_tokens" if max_new_tokens <= room else "context"
    if new < min(max_new_tokens, room) or int(output[-1]) in _end_tokens(loaded):
        stopped = "end of text"
    text = str(tokenizer.decode(output, skip_special_tokens=True))
    to.say(text)
    if stopped == "context":
        complain(
            f"the text stops after {new} of {max_new_tokens} new tokens: the model's context of {context} is full",
            kind="note",
            style="yellow",
        )
    to.json({"model": model, "text": text, "new_tokens": new, "stopped": stopped, "seconds": seconds})


def _end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that end a text; models have none, one or several."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}
