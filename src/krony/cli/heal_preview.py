"""What ``krony heal --dry-run`` says: tokens, steps, and the memory that each device needs."""

from __future__ import annotations

import math
from typing import Any

import torch

from krony.cli.output import Output
from krony.cli.preview import in_bytes
from krony.healing.footprint import footprint
from krony.healing.options import HealOptions
from krony.healing.recipes import Recipe
from krony.healing.text import Reader, load_text, tokenizer_for
from krony.healing.training import check_run, check_settings
from krony.models.source import ModelSource
from krony.runtime.hardware import fast_dtype


def preview(
    to: Output,
    source: ModelSource,
    teacher: str | None,
    recipes: list[Recipe],
    options: HealOptions,
    *,
    text: tuple[str, str | None, int | None],
    processes: int,
    dtype: str,
) -> None:
    """Prints the run; no weight is read.

    Args:
        recipes: the recipes that the model is trained by in turn.
        text: the names of the text to train and to validate on, and the most tokens.
        processes: the number of devices, one process on each.
        dtype: what ``--dtype`` says.

    Raises:
        KronyError: a recipe, text or options that don't fit the model or the number of devices.
    """
    model, original = source.shapes(dtype), None
    if teacher is not None:
        original = ModelSource.find(teacher).shapes(dtype)
    own: dict[str, Any] = {"teacher": original, "options": options, "processes": processes}
    for recipe in recipes:
        check_settings(model, recipe.length, recipe=recipe, **own)
    data, val, most = text
    reader = Reader.of(model, tokenizer_for(source, data, val), recipes[0].length)
    train, validation = load_text(data, val, reader, max_tokens=most)
    on_cpu = options.device == "cpu"
    half = model.dtype != torch.float64 and not (on_cpu and fast_dtype("cpu") == torch.float32)
    for recipe in recipes:
        check_run(model, train, validation, recipe=recipe, **own)
    rows = [f"{len(part) * part.length:,}" for part in (train, validation)]
    to.say(f"{rows[0]} tokens to train on, {rows[1]} to validate on")
    found: list[dict[str, Any]] = []
    for recipe in recipes:
        steps = math.ceil(len(train) // recipe.sequences * recipe.epochs)
        memory = footprint(model, original, recipe, options, processes=processes, half=half)
        tokens = steps * recipe.sequences * recipe.length
        found.append({"tokens": tokens, "steps": steps, "memory": memory.to_json()})
        to.say(
            f"would train on {tokens:,} tokens in {steps:,} steps of {recipe.sequences} sequences of {recipe.length} "
            f"tokens, {recipe.sequences // processes} of them on each device"
        )
    most_memory: dict[str, int] = max((each["memory"] for each in found), key=lambda memory: memory["peak"])
    _show(to, most_memory, options, processes, on_cpu)
    first, *later = found
    to.json(first | {"then": later, "processes": processes, "shard": options.shard, "memory": most_memory})


def _show(to: Output, memory: dict[str, int], options: HealOptions, processes: int, on_cpu: bool) -> None:
    """Prints the memory."""
    kind = "CPU" if on_cpu else "GPU"
    how = "the weights sharded" if options.shard else "a copy of the model on each"
    to.say(f"on {processes} {kind}{'' if processes == 1 else 's'}, {how}")
    rows = [[name, in_bytes(size)] for name, size in memory.items() if name not in ("peak", "main")]
    to.table([f"on each {kind}", "memory"], rows)
    where = " in the first process, which keeps the whole models" if options.shard else ""
    main = where if on_cpu else f", and {in_bytes(memory['main'])} of main memory{where or ' for each'}"
    to.say(f"about {in_bytes(memory['peak'])} at the highest moment{main}; libraries and what an allocator loses add")
