"""What ``krony bench`` and the benchmarks show: a table, a caption, pictures, and an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from krony.evaluation.speed import WORKLOADS, ModelSpeed
from krony.pages import Table, page, paragraphs
from krony.pictures import bars, lines

NAMES = {"prefill": "prefill", "decode": "decode", "train": "training"}


def caption(figures: dict[str, Any]) -> str:
    """The machine, and what was measured; ``figures`` are those of ``krony.evaluation.speed.to_json``."""
    machine, settings = figures["machine"], figures["settings"]
    where = machine["accelerator"] if machine["accelerator"] != "none" else machine["processor"]
    mode = "torch.compile" if settings["compiled"] else "eager"
    return (
        f"{where}, {machine['threads']} threads, {figures['dtype']}, {mode}; prefill of {settings['batch']} x "
        f"{settings['length']} tokens, decode of {settings['new_tokens']} after {settings['context']}, "
        f"medians of {settings['rounds']} turns"
    )


def table(rows: Sequence[ModelSpeed]) -> Table:
    """One row per model: speeds in tokens per second, and relative to the first model."""
    columns = ["model", "parameters", "MB"]
    for workload in _measured(rows):
        columns += [f"{workload}, tok/s", "of first"]
    columns += ["peak, MB", "of first", "load, s"]
    shown = []
    for row in rows:
        cells = [row.name, f"{row.params:,}", f"{row.bytes / 1e6:,.1f}"]
        for workload in _measured(rows):
            cells += [f"{row.tokens_per_s[workload]:,.1f}", f"{row.ratio[workload]:.2f}x"]
        load = "" if row.load_seconds is None else f"{row.load_seconds:.2f}"
        shown.append([*cells, f"{row.peak_bytes / 1e6:,.1f}", f"{row.ratio['peak']:.2f}", load])
    return Table(columns, shown)


def ratio_picture(rows: Sequence[ModelSpeed], *, subject: str | None = None) -> str:
    """The speed of each model relative to the first, as SVG. The title speaks of ``subject``, or of the fastest."""
    lengths = {NAMES[work]: {row.name: row.ratio[work] for row in rows} for work in _measured(rows)}
    return bars(lengths, title=_headline(rows, subject), axis="times the first model's speed", level=1.0)


def bench_page(rows: Sequence[ModelSpeed], figures: dict[str, Any]) -> str:
    """The page of ``krony bench --report``: the table and the pictures."""
    sizes = {
        "bytes on disk": {row.name: row.bytes / 1e6 for row in rows},
        "peak memory of a prefill": {row.name: row.peak_bytes / 1e6 for row in rows},
    }
    least = min(rows, key=lambda row: row.peak_bytes)
    title = f"{least.name} needs the least memory: {least.ratio['peak']:.2f} of {rows[0].name}'s"
    parts = [
        ("Figures", table(rows).html() + paragraphs(caption(figures))),
        ("Speed", ratio_picture(rows)),
        ("Size", bars(sizes, title=title, axis="MB")),
    ]
    for batch in sorted({point["batch"] for point in rows[0].sweep}):
        parts.append((f"Prefill with a batch of {batch:g}", _sweep_picture(rows, batch)))
    return page("krony bench", parts)


def _sweep_picture(rows: Sequence[ModelSpeed], batch: float) -> str:
    series = {
        row.name: [(point["length"], point["tokens_per_s"]) for point in row.sweep if point["batch"] == batch]
        for row in rows
    }
    longest = {name: points[-1][1] for name, points in series.items()}
    best = max(longest, key=lambda name: longest[name])
    ratio = longest[best] / longest[rows[0].name]
    return lines(
        series,
        title=f"{best} is fastest at {series[best][-1][0]:,.0f} tokens: {ratio:.2f} times {rows[0].name}'s speed",
        x="tokens per sequence",
        y="tokens per second",
        log=True,
    )


def _headline(rows: Sequence[ModelSpeed], subject: str | None) -> str:
    """Which model is faster than the first, and by how much."""
    first, *others = rows
    if not others:
        return f"The speed of {first.name}, which the others would be compared with"
    chosen = next((row for row in others if row.name == subject), None)
    chosen = chosen or max(others, key=lambda row: row.ratio["prefill"])
    figures = ", ".join(f"{chosen.ratio[work]:.2f} in {NAMES[work]}" for work in _measured(rows))
    return f"{chosen.name} runs at {figures}, relative to {first.name} at 1 (more is better)"


def _measured(rows: Sequence[ModelSpeed]) -> list[str]:
    return [workload for workload in WORKLOADS if workload in rows[0].tokens_per_s]
