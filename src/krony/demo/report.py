"""What the demo shows: its table, its pictures, and its page."""

from __future__ import annotations

import html
from collections.abc import Sequence

from krony.demo.run import HEALED, ORIGINAL, Demo, DemoRow
from krony.evaluation.inspection_tables import by_layer
from krony.pages import Table, page, paragraphs
from krony.pictures import bars, lines

AXIS = "times the original's perplexity"


def table(rows: Sequence[DemoRow]) -> Table:
    """One row per model."""
    columns = ["", "parameters", "MB", "perplexity", "of original", "healed", "of original", "prefill", "decode"]
    shown = []
    for row in rows:
        healed = [row.perplexity_healed, row.ratio_healed]
        shown.append(
            [row.init, f"{row.params:,}", f"{row.bytes / 1e6:.1f}", f"{row.perplexity:,.2f}", f"{row.ratio:,.2f}"]
            + ["" if figure is None else f"{figure:.2f}" for figure in healed]
            + [f"{row.prefill_ratio:.2f}x", f"{row.decode_ratio:.2f}x"]
        )
    return Table(columns, shown)


def quality_picture(rows: Sequence[DemoRow]) -> str:
    """Perplexity relative to the original's, before and after healing, as SVG."""
    before = {row.init: row.ratio for row in rows}
    after = {row.init: row.ratio_healed for row in rows if row.ratio_healed is not None}
    chosen = next(row for row in rows if row.init == HEALED)
    worst = max(rows, key=lambda row: row.ratio)
    title = (
        f"Without half of its MLPs' parameters the model has {chosen.ratio:.2f} times its perplexity with "
        f"{chosen.init}, {chosen.ratio_healed:.2f} after healing, and {worst.ratio:.1f} with {worst.init} "
        "(less is better)"
    )
    return bars({"before healing": before, "healed": after}, title=title, axis=AXIS, level=1.0, log=True)


def demo_page(demo: Demo) -> str:
    """The report: the table, five pictures, and what each model writes."""
    explained = paragraphs(
        "Half of the MLPs' parameters are removed. Perplexity is measured on a part of Python's documentation that no "
        f"model was trained on; every token has the same weight. {HEALED} was then trained on {demo.tokens:,} tokens "
        "with the original as teacher, and the original was trained on the same tokens for comparison. Speed is "
        f"relative to the original's, the median of alternating runs on this machine; {HEALED} is timed in the form "
        "that krony export --to slim writes."
    )
    sentences = "\n".join(
        f"<p>{html.escape(row.init)}</p><blockquote>{html.escape(row.sentence)}</blockquote>" for row in demo.rows
    )
    parts = [
        ("What was lost and gained", table(demo.rows).html() + explained),
        ("Perplexity", quality_picture(demo.rows)),
        ("Perplexity and size, before healing", _size_picture(demo.rows)),
        ("The error of each matrix", _error_picture(demo)),
        ("Healing", _healing_picture(demo)),
        ("Speed", _speed_picture(demo.rows)),
        ("What each model writes", sentences),
    ]
    return page("krony demo", parts)


def _size_picture(rows: Sequence[DemoRow]) -> str:
    original, *others = rows
    least = min(others, key=lambda row: row.perplexity)
    return lines(
        {row.init: [(row.params / 1e6, row.perplexity)] for row in rows},
        title=f"{least.init} with {least.params / original.params:.0%} of the parameters: perplexity "
        f"{least.perplexity:.1f} instead of {original.perplexity:.1f}",
        x="parameters, millions",
        y="perplexity",
        log=True,
    )


def _error_picture(demo: Demo) -> str:
    curves: dict[str, list[tuple[float, float]]] = {}
    for init, report in demo.reports.items():
        errors = [(layer.name, layer.calibrated_error or 0.0) for layer in report.layers]
        curves |= {f"{init}, {kind}": points for kind, points in by_layer(errors).items()}
    means = {
        init: sum(layer.calibrated_error or 0.0 for layer in report.layers) / len(report.layers)
        for init, report in demo.reports.items()
    }
    title = "Mean relative error of the outputs: " + ", ".join(f"{init} {mean:.2f}" for init, mean in means.items())
    return lines(curves, title=f"{title} (less is better)", x="layer", y="relative error of the outputs")


def _healing_picture(demo: Demo) -> str:
    curves = {
        f"{HEALED}, divergence from the original": demo.healing[HEALED].curve,
        "the original, loss on the text": demo.healing[ORIGINAL].curve,
    }
    chosen = next(row for row in demo.rows if row.init == HEALED)
    title = (
        f"{demo.tokens:,} tokens of healing: perplexity {chosen.perplexity:.2f} becomes {chosen.perplexity_healed:.2f}"
    )
    return lines(curves, title=title, x="tokens", y="nats per token", log=True)


def _speed_picture(rows: Sequence[DemoRow]) -> str:
    compressed = [row for row in rows if row.init != ORIGINAL]
    chosen = next(row for row in rows if row.init == HEALED)
    lengths = {
        "prefill, 512 tokens": {row.init: row.prefill_ratio for row in compressed},
        "decode": {row.init: row.decode_ratio for row in compressed},
    }
    title = (
        f"{HEALED} runs at {chosen.prefill_ratio:.2f} in prefill and {chosen.decode_ratio:.2f} in decode, relative to "
        "the original at 1 (more is better)"
    )
    return bars(lengths, title=title, axis="times the original's speed", level=1.0)
