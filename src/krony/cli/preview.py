"""What ``krony compress --dry-run`` says: the layers, the bytes, and the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from krony.cli.output import Output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from krony.config import KronyConfig
    from krony.models.surgery import Group
    from krony.streaming.stream import Stream


def preview(
    to: Output,
    model: str,
    skeleton: PreTrainedModel,
    groups: list[Group],
    config: KronyConfig,
    way: Stream | None,
    *,
    tokens: int,
    dtype: str,
) -> None:
    """Prints the layers, the bytes and the memory; ``tokens`` is how much text is read, 0 for none."""
    from krony.compression.plan import parameters_after, uniform_shapes
    from krony.models.surgery import count_parameters, embedding_shape

    before, after = count_parameters(skeleton), parameters_after(skeleton, groups, config)
    shapes = uniform_shapes(groups, config)
    if config.embedding is not None:
        shapes |= [embedding_shape(skeleton, config.embedding)]
    layers = [
        {"name": name, "left": list(shape.left), "right": list(shape.right), "factors": shape.factors}
        for name, shape in shapes.items()
    ]
    rows = [
        [name, f"{shape.m1}x{shape.n1}", f"{shape.m2}x{shape.n2}", str(shape.factors)] for name, shape in shapes.items()
    ]
    to.table(["layer", "left", "right", "factors"], rows)
    if config.allocation == "global":
        to.say("this is the budget, evenly: allocation global shares it out among the layers once it has read the text")
    to.say(f"would replace {len(layers)} matrices: {before:,} -> {after:,} parameters ({after / before:.1%})")
    costs = _costs(way, model, skeleton, groups, config, before, after, tokens, dtype)
    how = "layer by layer from the files (--stream)" if way is not None else "with the model in memory (--no-stream)"
    kept = f" and {in_bytes(costs['kept_bytes'])} meanwhile in OUT.work" if costs["kept_bytes"] else ""
    to.say(
        f"would read {in_bytes(costs['read_bytes'])} of {model} and write {in_bytes(costs['write_bytes'])}{kept}, "
        f"{how}, in about {in_bytes(costs['memory_bytes'])} of memory"
    )
    figures = {"scheme": config.scheme, "init": config.init, "params_before": before, "params_after": after}
    to.json(figures | costs | {"stream": way is not None, "layers": layers})


def _costs(
    way: Stream | None, model: str, skeleton: PreTrainedModel, groups: list[Group], config: KronyConfig, before: int,
    after: int, tokens: int, dtype: str,
) -> dict[str, int]:  # fmt: skip
    """Bytes that would be read, written, kept meanwhile, and held in memory."""
    from krony.models.loading import DTYPES, wanted_dtype
    from krony.streaming.stream import working_memory

    if way is not None:
        read, write = way.read_bytes, way.write_bytes
        return {
            "read_bytes": read,
            "write_bytes": write,
            "kept_bytes": way.kept_bytes(tokens),
            "memory_bytes": way.memory_bytes,
        }
    wanted = wanted_dtype(model, dtype)
    item = (DTYPES.get(wanted, skeleton.dtype) if isinstance(wanted, str) else wanted).itemsize
    held = item * (before + after) + working_memory(groups, item, bool(tokens))
    if config.tune:  # the original beside it, and the new layers five times over: first, gradient, AdamW's two, float32
        sites = [site for group in groups for site in group.sites]
        new = after - before + sum(site.out_features * site.in_features for site in sites)
        held += item * before + 5 * 4 * new
    return {
        "read_bytes": skeleton.dtype.itemsize * before,
        "write_bytes": item * after,
        "kept_bytes": 0,
        "memory_bytes": held,
    }


def in_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1000**3:.1f} GB" if count >= 1000**3 else f"{count / 1000**2:.1f} MB"
