"""``krony demo``: the main job, end to end, on the model that comes with krony."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krony.cli.options import Json, Seed
from krony.cli.output import Output, quiet_libraries

if TYPE_CHECKING:
    from krony.demo import Demo
    from krony.pages import Table

ORIGINAL = "original"


def run(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the model and the report; new or empty.")
    ] = Path("krony-demo"),
    heal_tokens: Annotated[int, typer.Option(min=2048, metavar="N", help="Tokens of healing.")] = 65_536,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Measure perplexity on N tokens.", show_default="all")
    ] = None,
    seed: Seed = 0,
    json_to: Json = None,
) -> None:
    """Compress, heal, measure and save the small GPT-2 that comes with krony: offline, in under two minutes."""
    to = Output(json_to, out)
    from krony.compression.model_card import healed_card
    from krony.demo import run_demo
    from krony.models.loading import save
    from krony.storage.files import check_writable, fresh_folder

    quiet_libraries()
    check_writable(out)
    to.say("A GPT-2 of 6 layers loses half of its MLPs' weights, in three ways; then one is healed. No network needed.")
    with to.progress() as progress:
        demo = run_demo(heal_tokens=heal_tokens, max_tokens=max_tokens, seed=seed, progress=progress)
    figures = {"teacher": "demo", "recipe": "quick"} | demo.healing["neurons"].to_json()
    with fresh_folder(out) as folder:
        save(demo.model, folder, source="demo")
        (folder / "README.md").write_text(healed_card("demo", figures), encoding="utf-8")
        (folder / "report.html").write_text(_page(demo), encoding="utf-8")
    shown = table(demo)
    to.table(shown.columns, shown.rows)
    for row in demo.rows:
        to.say(f"{row.init}{', healed' if row.perplexity_healed else ''}: {row.sentence}")
    to.say("")
    to.say(f"{demo.seconds:.0f} s. The healed model and report.html are in {out}")
    to.json(demo.to_json())


def table(demo: Demo) -> Table:
    """The demo's table: a row a model."""
    from krony.pages import Table

    columns = ["", "parameters", "MB", "perplexity", "of original", "healed", "of original", "prefill", "decode"]
    rows = []
    for row in demo.rows:
        healed = [row.perplexity_healed, row.ratio_healed]
        rows.append(
            [row.init, f"{row.params:,}", f"{row.bytes / 1e6:.1f}", f"{row.perplexity:,.2f}", f"{row.ratio:,.2f}"]
            + ["" if figure is None else f"{figure:.2f}" for figure in healed]
            + [f"{row.prefill_ratio:.2f}x", f"{row.decode_ratio:.2f}x"]
        )
    return Table(columns, rows)


def _page(demo: Demo) -> str:
    """The report: the table, five pictures, and what each model writes."""
    import html

    from krony.pages import bars, lines, page, paragraphs

    compressed = [row for row in demo.rows if row.init != ORIGINAL]
    tokens = demo.healing["neurons"].tokens
    quality = {"before healing": {row.init: row.ratio for row in compressed}}
    layers = {init: {_short(x.name): x.calibrated_error or 0.0 for x in r.layers} for init, r in demo.reports.items()}
    curves = {
        "neurons, divergence from the original": demo.healing["neurons"].curve,
        "the original, loss on the text": demo.healing[ORIGINAL].curve,
    }
    speed = {
        "prefill, 512 tokens": {row.init: row.prefill_ratio for row in compressed},
        "decode": {row.init: row.decode_ratio for row in compressed},
    }
    sentences = "\n".join(
        f"<p>{html.escape(row.init)}</p><blockquote>{html.escape(row.sentence)}</blockquote>" for row in demo.rows
    )
    explained = paragraphs(
        "Half of the MLPs' parameters are gone. Perplexity is that on the part of Python's documentation that no model "
        "has seen, every token weighing alike; neurons was then taught by the original for "
        f"{tokens:,} tokens, and the original trained on the same text as long, for comparison. Speed is relative to "
        "the original's, medians of alternating runs on this machine; neurons is timed as krony export --to slim "
        "writes it."
    )
    sizes = {row.init: [(row.params / 1e6, row.perplexity)] for row in demo.rows}
    parts = [
        ("What was lost and gained", table(demo).html() + explained),
        ("Perplexity against the original's", bars(quality, "times the original's perplexity", level=1.0, log=True)),
        ("Perplexity against size, before healing", lines(sizes, "parameters, millions", "perplexity")),
        ("What each matrix lost", bars(layers, "relative error of its outputs")),
        ("Healing", lines(curves, "tokens", "nats a token")),
        ("Speed", bars(speed, "times the original's speed", level=1.0)),
        ("What each writes", sentences),
    ]
    return page("krony demo", parts)


def _short(name: str) -> str:
    """``transformer.h.0.mlp.c_fc`` as ``0 c_fc``."""
    parts = name.split(".")
    return f"{parts[2]} {parts[-1]}"
