"""``krony demo``: the complete job on the model that comes with krony."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import Json, Seed
from krony.cli.output import Output, quiet_libraries


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
    from krony.demo.report import demo_page, table
    from krony.demo.run import HEALED, run_demo
    from krony.models.quantizer import recorded_options
    from krony.models.source import ModelSource
    from krony.storage.files import check_writable, fresh_folder

    quiet_libraries()
    check_writable(out)
    to.say("A GPT-2 of 6 layers loses half of its MLPs' weights, in three ways; then one is healed. No network needed.")
    with to.progress() as progress:
        demo = run_demo(heal_tokens=heal_tokens, max_tokens=max_tokens, seed=seed, progress=progress)
    figures = {"teacher": "demo", "recipe": "quick"} | demo.healing[HEALED].to_json()
    card = healed_card("demo", figures, recorded_options(demo.model.config))
    with fresh_folder(out) as folder:
        ModelSource.find("demo").save(demo.model, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "report.html").write_text(demo_page(demo), encoding="utf-8")
    shown = table(demo.rows)
    to.table(shown.columns, shown.rows)
    for row in demo.rows:
        to.say(f"{row.init}{', healed' if row.perplexity_healed else ''}: {row.sentence}")
    to.say("")
    to.say(f"{demo.seconds:.0f} s. The healed model and report.html are in {out}")
    to.json(demo.to_json())
