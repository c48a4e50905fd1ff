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
    where = machine["processor" if figures.get("device", "cpu") == "cpu" else "accelerator"]
    mode = "torch.compile" if settings["compiled"] else "eager"
    threads, turns = _count(machine["threads"], "thread"), _count(settings["rounds"], "turn")
    spread = ""
    if "spread" in figures:  # results of earlier versions have none
        known = figures["spread"]
        spread = ", too few for a spread" if known is None else f" (spread up to {known:.1%})"
    return (
        f"{where}, {threads}, {figures['dtype']}, {mode}; prefill of {settings['batch']} x {settings['length']} "
        f"tokens, decode of {settings['new_tokens']} after {settings['context']}, medians of {turns}{spread}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def verdicts(rows: Sequence[ModelSpeed]) -> list[str]:
    """A sentence per workload and model: how fast it is against the first one, or that the spread hides it."""
    first, *others = rows
    return [
        f"{NAMES[work]}: {row.against_first[work].sentence(row.name, first.name)}"
        for work in _measured(rows)
        for row in others
    ]


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


def sweep_table(rows: Sequence[ModelSpeed]) -> Table:
    """One row per batch size and length: the speed of prefill of every model, its ratio to the first and its spread."""
    first, *others = rows
    columns = ["prefill, batch x tokens", f"{first.name}, tok/s"]
    for row in others:
        columns += [f"{row.name}, tok/s", "of first", "spread"]
    shown = []
    for index, point in enumerate(first.sweep):
        cells = [f"{point['batch']} x {point['length']}", f"{point['tokens_per_s']:,.1f}"]
        for row in others:
            speed, ratio, spread = (row.sweep[index][key] for key in ("tokens_per_s", "ratio", "ratio_spread"))
            cells += [f"{speed:,.1f}", f"{ratio:.2f}x", "" if spread is None else f"{spread:.1%}"]
        shown.append(cells)
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
    parts = [
        ("Figures", table(rows).html() + paragraphs(caption(figures), *verdicts(rows))),
        ("Speed", ratio_picture(rows)),
        ("Size", bars(sizes, title=_size_headline(rows), axis="MB")),
    ]
    if rows[0].sweep:
        parts.append(("Prefill at other sizes", sweep_table(rows).html()))
        parts += [(heading, _sweep_picture(rows, x, fixed)) for heading, x, fixed in _sweep_axes(rows[0].sweep)]
    return page("krony bench", parts)


def _sweep_axes(sweep: Sequence[dict[str, Any]]) -> list[tuple[str, str, tuple[str, int]]]:
    """The pictures of a sweep: the heading, what grows to the right, and what has which value in all of the picture."""
    batches, lengths = (sorted({point[key] for point in sweep}) for key in ("batch", "length"))
    if len(lengths) == 1 < len(batches):
        return [(f"Prefill of {lengths[0]:,} tokens per sequence", "batch", ("length", lengths[0]))]
    return [(f"Prefill with a batch of {batch:,}", "length", ("batch", batch)) for batch in batches]


def _sweep_picture(rows: Sequence[ModelSpeed], x: str, fixed: tuple[str, int]) -> str:
    key, value = fixed
    chosen = {
        row.name: sorted((point for point in row.sweep if point[key] == value), key=lambda point: int(point[x]))
        for row in rows
    }
    last = {name: points[-1] for name, points in chosen.items()}
    best = max(last, key=lambda name: last[name]["ratio"])
    first, most = rows[0].name, f"{last[best][x]:,} {'tokens' if x == 'length' else 'sequences'}"
    if len(rows) == 1:
        title = f"{first} reads {last[first]['tokens_per_s']:,.0f} tokens per second at {most}"
    elif best == first:
        title = f"No model is faster than {first} at {most}"
    else:
        doubt = "" if last[best]["verdict"] else " (no verdict)"
        title = f"{best} is fastest at {most}: {last[best]['ratio']:.2f} times {first}'s speed{doubt}"
    return lines(
        {name: [(point[x], point["tokens_per_s"]) for point in points] for name, points in chosen.items()},
        title=title,
        x="tokens per sequence" if x == "length" else "sequences per batch",
        y="tokens per second",
        log=True,
    )


def _size_headline(rows: Sequence[ModelSpeed]) -> str:
    """Which model needs the least memory."""
    first, least = rows[0], min(rows, key=lambda row: row.peak_bytes)
    if least is first:
        few = "" if len(rows) == 1 else ", the least of all"
        return f"{first.name} needs {first.peak_bytes / 1e6:,.1f} MB for a prefill{few}"
    return f"{least.name} needs the least memory: {least.ratio['peak']:.2f} of {first.name}'s"


def _headline(rows: Sequence[ModelSpeed], subject: str | None) -> str:
    """How fast a model is relative to the first, and where the spread leaves that open."""
    first, *others = rows
    if not others:
        return f"The speed of {first.name}, which the others would be compared with"
    chosen = next((row for row in others if row.name == subject), None)
    chosen = chosen or max(others, key=lambda row: row.ratio["prefill"])
    doubt = {work: " (no verdict)" for work, found in chosen.against_first.items() if found.verdict is None}
    figures = ", ".join(f"{chosen.ratio[work]:.2f} in {NAMES[work]}{doubt.get(work, '')}" for work in _measured(rows))
    return f"{chosen.name} runs at {figures}, relative to {first.name} at 1 (more is better)"


def _measured(rows: Sequence[ModelSpeed]) -> list[str]:
    return [workload for workload in WORKLOADS if workload in rows[0].tokens_per_s]
