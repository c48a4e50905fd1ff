"""``krony eval``: perplexity and last-word accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import DataDir, Device, Dtype, Json, Model
from krony.cli.output import Output, quiet_libraries


def run(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="wikitext-2, wikitext-103, lambada, python-docs, or a text/jsonl file."),
    ] = None,
    data_dir: DataDir = None,
    protocol: Annotated[str, typer.Option(help="paper: mean over windows; token: every token weighs alike.")] = "paper",
    window: Annotated[int | None, typer.Option(help="Tokens a window (default: the context, at most 1024).")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows (default: the window).")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use the first so many tokens of each set.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write the table as a page of its own.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_to: Json = None,
) -> None:
    """Measure MODEL on standard data: perplexity, and the accuracy of the last word on LAMBADA."""
    to = Output(json_to)
    from krony.evaluation import evaluate
    from krony.files import write_text
    from krony.models import load_model, load_tokenizer
    from krony.report import Table, page, paragraphs
    from krony.surgery import count_parameters

    quiet_libraries()
    loaded, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    results = []
    for name in data or ["wikitext-2"]:
        with to.progress() as progress:
            result = evaluate(
                loaded,
                tokenizer,
                name,
                data_dir=data_dir,
                protocol=protocol,
                window=window,
                stride=stride,
                max_tokens=max_tokens,
                progress=progress,
            )
        results.append(result)
    params = count_parameters(loaded)
    rows = [
        [r.data, r.protocol, f"{r.window}", f"{r.stride}", f"{r.tokens:,}", f"{r.perplexity:,.2f}"]
        + ["" if r.accuracy is None else f"{r.accuracy:.2%}"]
        for r in results
    ]
    to.say(f"{model}: {params:,} parameters")
    table = Table(["data", "protocol", "window", "stride", "tokens", "perplexity", "last word"], rows)
    if report is not None:
        sentence = f"{params:,} parameters; a head tied to the embedding is counted once."
        write_text(report, page(f"{model}, evaluated by krony", [("Perplexity", paragraphs(sentence) + table.html())]))
    to.table(table.columns, table.rows)
    to.json({"model": model, "params": params, "results": [r.to_json() for r in results]})
