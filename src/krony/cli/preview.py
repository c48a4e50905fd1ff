"""What ``krony compress --dry-run`` says: the layers, the bytes, and the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krony.cli.output import Output

if TYPE_CHECKING:
    from krony.compression.plan import CompressionPlan
    from krony.models.source import ModelSource
    from krony.streaming.plan import Stream


def preview(
    to: Output, source: ModelSource, plan: CompressionPlan, stream: Stream | None, *, tokens: int, dtype: str
) -> None:
    """Prints the layers, the bytes and the memory; ``tokens`` is how much text is read, 0 for none."""
    shapes = plan.shapes | dict([] if plan.embedding is None else [plan.embedding])
    rows = [
        [name, f"{shape.m1}x{shape.n1}", f"{shape.m2}x{shape.n2}", str(shape.factors)] for name, shape in shapes.items()
    ]
    to.table(["layer", "left", "right", "factors"], rows)
    if plan.config.allocation == "global":
        to.say(
            "This is the budget, spread evenly: allocation global shares it among the layers after reading the text."
        )
    before, after = plan.params_before, plan.params_after
    to.say(f"would replace {len(shapes)} matrices: {before:,} -> {after:,} parameters ({after / before:.1%})")
    costs = _costs(source, plan, stream, tokens, dtype)
    how = "with the model in memory (--no-stream)" if stream is None else "layer by layer from the files (--stream)"
    kept = f", keep up to {in_bytes(costs['kept_bytes'])} in OUT.work meanwhile" if costs["kept_bytes"] else ""
    to.say(
        f"would read {in_bytes(costs['read_bytes'])} of {source.name}, write {in_bytes(costs['write_bytes'])}{kept}, "
        f"{how}, in about {in_bytes(costs['memory_bytes'])} of memory"
    )
    layers = [
        {"name": name, "left": list(shape.left), "right": list(shape.right), "factors": shape.factors}
        for name, shape in shapes.items()
    ]
    config = plan.config
    figures = {"scheme": str(config.scheme), "init": config.init, "params_before": before, "params_after": after}
    to.json(figures | costs | {"stream": stream is not None, "layers": layers})


def _costs(
    source: ModelSource, plan: CompressionPlan, stream: Stream | None, tokens: int, dtype: str
) -> dict[str, int]:
    """Bytes that would be read, written, kept meanwhile, and held in memory."""
    import torch

    if stream is not None:
        return {
            "read_bytes": stream.read_bytes,
            "write_bytes": stream.write_bytes,
            "kept_bytes": stream.kept_bytes(tokens),
            "memory_bytes": stream.memory_bytes(tokens),
        }
    stored = getattr(source.config, "dtype", None) or torch.float32
    loaded = source.dtype(dtype)
    itemsize = loaded.itemsize if isinstance(loaded, torch.dtype) else stored.itemsize
    return {
        "read_bytes": stored.itemsize * plan.params_before,
        "write_bytes": itemsize * plan.params_after,
        "kept_bytes": 0,
        "memory_bytes": plan.memory_bytes(itemsize, tokens),
    }


def in_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1000**3:.1f} GB" if count >= 1000**3 else f"{count / 1000**2:.1f} MB"
