"""``krony export``: writes a model as one that runs without krony."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from krony.cli.options import Json, Model, Out
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError

if TYPE_CHECKING:
    from krony.models.source import ModelSource

ENGINES = ("gguf", "onnx", "openvino")
FORMS = ("dense", "slim", *ENGINES, "reference")


def run(
    model: Model,
    out: Out,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="dense: factors multiplied out, the original's size; slim: a smaller hidden width; gguf: for "
            "llama.cpp; onnx; openvino; reference: the published code's layout in a .pt file.",
        ),
    ] = "dense",
    multiple_of: Annotated[
        int | None, typer.Option(metavar="N", help="slim: round the width up to a multiple of N, such as 64.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="gguf: f32, f16, bf16 or q8_0, which is 8 bits.", show_default="f16"),
    ] = None,
    json_to: Json = None,
) -> None:
    """Write MODEL to OUT as a plain model that needs no krony.

    For an engine (gguf, onnx, openvino) a compressed model is written slim where that is exact, and dense elsewhere.
    MODEL may also be a plain model.
    """
    words = Output(json_to, out)
    check(to, multiple_of, kind)
    if to == "reference":
        _reference(words, model, out)
        return
    from krony.models.source import ModelSource
    from krony.storage.files import check_writable

    quiet_libraries()
    check_writable(out)
    source = ModelSource.find(model)
    source.check_saves()
    if to in ENGINES:
        _engine(words, source, out, to, kind or "f16")
    else:
        _plain(words, source, out, to, multiple_of)


def check(to: str, multiple_of: int | None, kind: str | None) -> None:
    """Raises KronyError for options that don't fit together, or if an engine's package is missing."""
    if to not in FORMS:
        raise KronyError(f"export to {to!r} is unknown: it is one of {', '.join(FORMS)}")
    for name, value, owner in (("--multiple-of", multiple_of, "slim"), ("--type", kind, "gguf")):
        if value is not None and to != owner:
            raise KronyError(f"{name} works with --to {owner}, and this is --to {to}: leave out {name}")
    if to == "gguf":
        from krony.engines.gguf import check_kind

        check_kind(kind or "f16")
    elif to in ENGINES:
        from krony.engines.graphs import check_packages

        check_packages(to)


def _plain(words: Output, source: ModelSource, out: Path, to: str, multiple_of: int | None) -> None:
    """Writes a folder that transformers loads."""
    from krony.models.export import export_model, slim
    from krony.models.surgery import count_parameters
    from krony.storage.files import fresh_folder

    loaded = source.load()
    figures: dict[str, Any] = {"model": source.name, "out": str(out), "to": to}
    figures["params_before"], how = count_parameters(loaded), ""
    if to == "slim":
        exported = slim(loaded, multiple_of or 1)
        plain, how = exported.model, str(exported)
        figures |= {"width": exported.width, "padding": exported.padding}
    else:
        plain = export_model(loaded, to)
    figures["params_after"] = count_parameters(plain)
    with fresh_folder(out) as folder:
        source.save(plain, folder)
        _write_card(folder, source, figures, how)
    change = f"{figures['params_before']:,} -> {figures['params_after']:,} parameters"
    words.say(f"{source.name} -> {out}: {change}, loads without krony")
    if how:
        words.say(how)
    words.json(figures)


def _engine(words: Output, source: ModelSource, out: Path, to: str, kind: str) -> None:
    """Writes a folder that an engine reads."""
    import torch

    from krony.engines.gguf import takes_widths, write_gguf
    from krony.engines.graphs import write_graph
    from krony.engines.plain import plain
    from krony.models.surgery import count_parameters
    from krony.storage.files import fresh_folder

    # takes_widths refuses a type that llama.cpp doesn't have, before the work
    padded = to != "gguf" or not takes_widths(source.skeleton)
    tokenizer, loaded = source.tokenizer, source.load()
    figures: dict[str, Any] = {"model": source.name, "out": str(out), "to": to}
    figures["params_before"] = count_parameters(loaded)
    made, how = plain(loaded, padded=padded)
    if to == "onnx" and made.dtype == torch.bfloat16:
        made, how = made.float(), f"{how}, in float32: ONNX Runtime has few operations in bfloat16"
    with fresh_folder(out) as folder:
        if to == "gguf":
            figures["type"] = kind
            write_gguf(made, tokenizer, folder / f"model-{kind}.gguf", kind, name=Path(source.name).name)
        else:
            write_graph(made, folder, to)
            source.save_tokenizer(folder)
            if loaded.generation_config is not None:
                loaded.generation_config.save_pretrained(folder)
        figures["params_after"] = count_parameters(made)
        _write_card(folder, source, figures, how)
    figures["files"] = {path.name: path.stat().st_size for path in sorted(out.iterdir()) if path.is_file()}
    size = sum(figures["files"].values()) / 1e6
    words.say(f"{source.name} -> {out}: {figures['params_after']:,} parameters, {size:.1f} MB; {how}")
    words.json(figures)


def _write_card(folder: Path, source: ModelSource, figures: dict[str, Any], how: str) -> None:
    from krony.compression.model_card import exported_card
    from krony.models.quantizer import recorded_options

    params = figures["params_before"], figures["params_after"]
    card = exported_card(source.name, figures["to"], recorded_options(source.config), params, how)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _reference(words: Output, model: str, out: Path) -> None:
    """Writes the model as a checkpoint of the published code. Raises KronyError unless OUT is a new .pt file."""
    if out.suffix != ".pt":
        raise KronyError(f"{out}: --to reference writes one file, so OUT ends in .pt")
    if out.exists():
        raise KronyError(f"{out} exists already: name a new file")
    from krony.models.loading import load_model
    from krony.models.published_code import to_reference, write_reference
    from krony.models.surgery import count_parameters
    from krony.storage.files import check_file

    quiet_libraries()
    check_file(out)
    loaded = load_model(model)
    write_reference(out, to_reference(loaded))
    params = count_parameters(loaded)
    words.say(f"{model} -> {out}: {params:,} parameters in the published code's layout; krony import reads it back")
    words.json({"model": model, "out": str(out), "to": "reference", "params_before": params, "params_after": params})
