"""``krony generate``: text from a model."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from krony.cli.options import Device, Dtype, Json, Model, Seed
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError


def run(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_to: Json = None,
) -> None:
    """Continue a prompt with MODEL."""
    to = Output(json_to)
    import torch

    from krony.data.text_files import is_text
    from krony.models.loading import context_length, load_model, load_tokenizer

    quiet_libraries()
    if not is_text(prompt):
        raise KronyError("--prompt is not UTF-8 text")
    loaded, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    given = inputs["input_ids"].shape[1]
    room = context_length(loaded) - given
    if given == 0 or room < 1:
        most = context_length(loaded) - 1
        raise KronyError(f"--prompt has {given} tokens: from 1 to {most} leave room for an answer")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    start = time.perf_counter()
    output = loaded.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=min(max_new_tokens, room), pad_token_id=tokenizer.eos_token_id, **sampling
    )[0]
    seconds = time.perf_counter() - start
    text = str(tokenizer.decode(output, skip_special_tokens=True))
    to.say(text)
    to.json({"model": model, "text": text, "new_tokens": len(output) - given, "seconds": seconds})
