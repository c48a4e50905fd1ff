"""``krony eval``: perplexity and last-word accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from krony.cli.options import DataDir, Device, Dtype, Json, Model
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError


def run(
    model: Model,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="wikitext-2, wikitext-103, lambada, python-docs, or a text/jsonl file."),
    ] = None,
    data_dir: DataDir = None,
    protocol: Annotated[str, typer.Option(help="paper: mean over windows; token: every token weighs alike.")] = "paper",
    window: Annotated[
        int | None, typer.Option(help="Tokens a window.", show_default="the context, at most 1024")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows.", show_default="the window")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use the first so many tokens of each set.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…", help="Tasks of the lm-evaluation-harness (the lm-eval extra), by name or as .yaml files."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use the first N examples of each task.")
    ] = None,
    count: Annotated[
        str, typer.Option(help="tied: a tied head once; untied: also apart from the embedding (Appendix B).")
    ] = "tied",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write the table as a page of its own.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json_to: Json = None,
) -> None:
    """Measure MODEL on standard data: perplexity, and the accuracy of the last word on LAMBADA."""
    to = Output(json_to)
    from krony.storage.files import check_file, write_text

    if report is not None:
        check_file(report, ".html")
    if count not in ("tied", "untied"):
        raise KronyError(f"--count {count}: it is tied or untied")
    if limit is not None and tasks is None:
        raise KronyError("--limit is of --tasks, and there are none: for text take --max-tokens")
    from krony.evaluation.harness import run_tasks
    from krony.evaluation.perplexity import evaluate
    from krony.models.loading import load_model, load_tokenizer
    from krony.models.surgery import count_parameters, count_untied
    from krony.pages import Table, page, paragraphs

    quiet_libraries()
    loaded, tokenizer = load_model(model, dtype=dtype, device=device), load_tokenizer(model)
    results = []
    for name in data or ([] if tasks else ["wikitext-2"]):
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
    asked = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not asked:
        raise KronyError("--tasks names no task: it takes names such as lambada_openai,piqa")
    done = run_tasks(loaded, tokenizer, asked, limit=limit) if asked else []
    params, untied = count_parameters(loaded), count_untied(loaded)
    rows = [
        [r.data, r.protocol, f"{r.window}", f"{r.stride}", f"{r.tokens:,}", f"{r.perplexity:,.2f}"]
        + ["" if r.accuracy is None else f"{r.accuracy:.2%}"]
        for r in results
    ]
    apart = f"; {untied:,} with the head apart from the embedding" if count == "untied" else ""
    to.say(f"{model}: {params:,} parameters{apart}")
    table = Table(["data", "protocol", "window", "stride", "tokens", "perplexity", "last word"], rows)
    harness = Table(
        ["task", "metric", "value", "±"],
        [[t.task, t.metric, f"{t.value:,.4f}", "" if t.error is None else f"{t.error:.4f}"] for t in done],
    )
    shown = [("Perplexity", table)] * bool(results) + [("Tasks", harness)] * bool(done)
    if report is not None:
        sentence = paragraphs(f"{params:,} parameters; a head tied to the embedding is counted once{apart}.")
        parts = [(heading, sentence + t.html()) for heading, t in shown]
        write_text(report, page(f"{model}, evaluated by krony", parts))
    for _, shown_table in shown:
        to.table(shown_table.columns, shown_table.rows)
    figures: dict = {"model": model, "params": params, "results": [r.to_json() for r in results]}
    if count == "untied":
        figures["params_untied"] = untied
    if asked:
        figures["tasks"] = [t.to_json() for t in done]
    to.json(figures)
