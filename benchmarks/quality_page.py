"""The tables and pictures of ``quality.py``, from its results."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

import torch
from quality_measures import SETS
from quality_methods import METHODS, ORIGINALS, RIVALS, STEPS, TUNING, WAYS

from krony.evaluation.interval import Interval, ratio_interval
from krony.pages import Table
from krony.pictures import lines

Row = dict[str, Any]
MEASURED = ("OpenWebText", "of original")
OTHERS = ("WikiText-2", "LAMBADA", "last word")
INTERVAL, KL = "95% interval", "KL"
COMPARED = ("neurons", "neurons, global", *RIVALS)  # in the pictures of rivals


def untrained(results: Row, *, every_seed: bool = False) -> list[Row]:
    """The compressed models as their methods leave them: one row per method and size, of one seed or over all."""
    rows = [row for row in results["rows"] if not row.get("distilled")]
    first = results["seed"]
    return over_seeds([row for row in rows if every_seed or row.get("seed", first) == first])


def distilled(results: Row) -> list[Row]:
    """The compressed models after the same training: one row per method, size and tokens, over all seeds."""
    return over_seeds([row for row in results["rows"] if row.get("distilled")])


def over_seeds(rows: list[Row]) -> list[Row]:
    """One row for those that differ in the seed only, in the order of the tables.

    Perplexities are geometric means, because losses are averaged; all other figures are means.
    """
    together: dict[tuple, list[Row]] = {}
    for row in rows:
        together.setdefault((row["removed"], row.get("distilled", 0), WAYS.index(row["way"])), []).append(row)
    return [merged(together[key]) for key in sorted(together)]


def merged(rows: list[Row]) -> Row:
    """The mean of rows that differ in the seed only; ``runs`` are the rows themselves."""
    if len(rows) == 1:
        return rows[0] | {"runs": rows}
    sets = {}
    for name in SETS:
        each = [row["sets"][name] for row in rows]
        figures = {"perplexity": math.exp(mean(math.log(one["perplexity"]) for one in each))}
        figures["accuracy"] = None if each[0]["accuracy"] is None else mean(one["accuracy"] for one in each)
        if all("losses" in one for one in each):
            figures["losses"] = [mean(losses) for losses in zip(*(one["losses"] for one in each), strict=True)]
        sets[name] = figures
    first = rows[0] | {"sets": sets, "seconds": mean(row["seconds"] for row in rows), "runs": rows}
    return first | ({"kl": mean(row["kl"] for row in rows)} if all("kl" in row for row in rows) else {})


def interval(row: Row, base: Row) -> Interval | None:
    """The bootstrap's interval of a row's ratio on OpenWebText, paired with the original; None without losses.

    ``base`` is the original's row. The sequences are the windows that both were measured on.
    """
    ours, theirs = (one["sets"]["OpenWebText"].get("losses") for one in (row, base))
    if ours is None or theirs is None:
        return None
    return ratio_interval(torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64))


def ratio(row: Row, results: Row) -> float:
    """A row's perplexity on OpenWebText, divided by the original's."""
    return row["sets"]["OpenWebText"]["perplexity"] / results["base"]["sets"]["OpenWebText"]["perplexity"]


def table(results: Row) -> Table:
    """All figures without training: the original, also in fewer bits, and the compressed models."""
    rows = [{"way": way, "removed": 0.0} | results[key] for key, way in ORIGINALS.items() if key in results]
    rows += untrained(results)
    extra, threads = extra_columns(rows, results), results["machine"]["threads"]
    made = []
    for row in rows:
        removed, seconds = (f"{row['removed']:.0%}", f"{row['seconds']:.0f}") if row["removed"] else ("none", "")
        seconds += "*" if row.get("calibrated") else ""
        if row.get("threads", threads) != threads:
            seconds = ""
        megabytes = f"{row['bytes'] / 1e6:.1f}"
        made.append([removed, row["way"], f"{row['params']:,}", megabytes, *cells(row, results, extra), seconds])
    return Table(["removed", "init", "parameters", "MB", *MEASURED, *extra, *OTHERS, "seconds"], made)


def distilled_table(results: Row) -> Table:
    """The same starts before and after the same training."""
    before = {(row["way"], row["removed"]): ratio(row, results) for row in untrained(results, every_seed=True)}
    rows = distilled(results)
    extra = extra_columns(rows, results)
    made = []
    for row in rows:
        start = before.get((row["way"], row["removed"]))
        ratios = sorted(ratio(run, results) for run in row["runs"])
        spread = f"{len(ratios)}: {short(ratios[0])} to {short(ratios[-1])}" if len(ratios) > 1 else "1"
        made.append([
            f"{row['removed']:.0%}", f"{row['distilled']:,}", row["way"], f"{row['params']:,}",
            "" if start is None else short(start), *cells(row, results, extra), spread,
        ])  # fmt: skip
    return Table(["removed", "tokens", "start", "parameters", "untrained", *MEASURED, *extra, *OTHERS, "seeds"], made)


def extra_columns(rows: list[Row], results: Row) -> list[str]:
    """The columns that some row has a figure for; earlier results have none."""
    columns = [INTERVAL] if any(interval(row, results["base"]) for row in rows if row["removed"]) else []
    return columns + ([KL] if any("kl" in row for row in rows) else [])


def cells(row: Row, results: Row, extra: list[str]) -> list[str]:
    """The columns of a row's quality."""
    first, second, third = (row["sets"][name]["perplexity"] for name in SETS)
    found = interval(row, results["base"]) if row is not results["base"] else None
    between = "" if found is None or found.low == found.high else f"{short(found.low)} to {short(found.high)}"
    more = {INTERVAL: between, KL: f"{row['kl']:.3f}" if "kl" in row else ""}
    return [
        short(first), short(ratio(row, results)), *(more[name] for name in extra), short(second), short(third),
        f"{row['sets']['LAMBADA']['accuracy']:.1%}",
    ]  # fmt: skip


def short(figure: float) -> str:
    """A perplexity or a ratio with as many digits as matter."""
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.2f}"


def picture(results: Row) -> str:
    """Perplexity relative to the original's against bytes: one curve per method, and fewer bits beside them."""
    rows = [{"way": way} | results[key] for key, way in ORIGINALS.items() if key in results]
    rows += [row for row in untrained(results) if row["way"] in METHODS]
    half = {row["way"]: ratio(row, results) for row in untrained(results) if row["removed"] == 0.5}
    best = min((way for way in half if way in METHODS), key=lambda way: half[way], default=None)
    shown = [way for way in dict.fromkeys((best, "neurons", "van-loan")) if way in half]
    figures = ", ".join(f"{short(half[way])} times ({way})" for way in shown)
    return lines(
        curves(rows, results, "MB"),
        title=f"Half of the MLPs removed, no training: the original's perplexity rises {figures}; less is better",
        x="MB",
        y="times the original's perplexity",
        log=True,
        top=10.0,
    )


def rivals_picture(results: Row, tokens: int) -> str:
    """The same for what others do, without training (``tokens`` is 0) or after training on so many tokens."""
    rows = [row for row in untrained(results) if row["way"] in COMPARED]
    if tokens:
        rows = [row for row in distilled(results) if row["way"] in COMPARED and row["distilled"] == tokens]
    half = {row["way"]: ratio(row, results) for row in rows if row["removed"] == 0.5}
    ordered = sorted(half, key=lambda way: half[way])
    ours, others = ([way for way in ordered if (way in METHODS) == own][:1] for own in (True, False))
    figures = ", ".join(f"{short(half[way])} times ({way})" for way in (*ours, *others))
    figures += ", the best of others" if others else ""
    when = f"the same training on {tokens:,} tokens" if tokens else "no training"
    return lines(
        curves(rows, results, "million parameters"),
        title=f"Half of the MLPs removed, {when}: the original's perplexity rises {figures}; less is better",
        x="million parameters",
        y="times the original's perplexity",
        log=True,
        top=None if tokens else 10.0,
    )


def curves(rows: list[Row], results: Row, x: str) -> dict[str, list[tuple[float, float]]]:
    """The points ``(size, ratio)`` of each method, in the order of the tables; the size in MB or in parameters."""
    size = "bytes" if x == "MB" else "params"
    series: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row[size]):
        series.setdefault(row["way"], []).append((row[size] / 1e6, ratio(row, results)))
    return {way: series[way] for way in (*ORIGINALS.values(), *WAYS) if way in series}


def pictures(results: Row) -> dict[str, str]:
    """Every picture that the results have figures for, as SVG, by what is appended to ``quality-NAME``."""
    made = {"": picture(results)}
    if any(row["way"] in RIVALS for row in untrained(results)):
        made["-rivals"] = rivals_picture(results, 0)
    return made | {f"-distilled-{tokens}": rivals_picture(results, tokens) for tokens in drawn_tokens(results)}


def drawn_tokens(results: Row) -> list[int]:
    """The lengths of training that were measured at several sizes, so that there is a curve to draw."""
    rows = distilled(results)
    lengths = sorted({row["distilled"] for row in rows})
    return [tokens for tokens in lengths if len({row["removed"] for row in rows if row["distilled"] == tokens}) > 1]


def document(results: Row, name: str) -> str:
    """``docs/quality-NAME.md``."""
    where = results["machine"]
    return f"""# Quality without healing

Written by `python benchmarks/quality.py`.
{results["model"]}, seed {results["seed"]}, calibrated on {results["calibration_tokens"]:,} tokens. `reconstructed` is
`--reconstruct {STEPS}`, `tuned` is `--tune {TUNING} --tune-text 0`, and `all weights tuned` is
`--tune {TUNING} --tune-all`, on the same tokens. `int8` is torchao's quantisation of the weights of the linear layers;
`slim` is `krony export --to slim`.

Measured on the first {results["tokens"]:,} tokens of each set in {results["dtype"]}: perplexity on OpenWebText by the
`token` protocol, on WikiText-2 and LAMBADA by the `paper` protocol, and LAMBADA's last-word accuracy. "Removed" is a
share of the MLPs' parameters. "Seconds" is the time to compress on {where["threads"]} threads of {where["processor"]};
with * it includes the calibration's passes through the model, and without it their results were cached. It is
blank where another number of threads was used.
{notes(results)}
{table(results).markdown()}

![perplexity relative to the original's against size](quality-{name}.svg)
{rivals_part(results, name)}{distilled_part(results, name)}"""


def notes(results: Row) -> str:
    """What the columns and rows mean that earlier results don't have."""
    found = []
    if extra_columns(untrained(results), results):
        found.append(
            "The interval is a bootstrap over the windows of OpenWebText, paired with the original. KL is the\n"
            "divergence from the original on at most the first 16,384 of these tokens, in nats per token."
        )
    if any("all weights tuned" in row["way"] for row in untrained(results)):
        found.append(
            "Half of the loss of `all weights tuned` is the likelihood of the calibration text, from which the\n"
            "original would gain too ([a control](healing.md#an-example-with-figures))."
        )
    if any(way.endswith("int4") for way in (*results, *(row["way"] for row in results["rows"]))):
        found.append("`int4` is torchao's too, in groups of 32 inputs.")
        if "Q4" in results["model"]:
            found.append("The original was in 4-bit groups of 32 once, so that it loses nothing by `int4`.")
    if results.get("lambada_tokens", results["tokens"]) != results["tokens"]:
        tokens = results["lambada_tokens"]
        found.append("LAMBADA is measured on " + (f"{tokens:,} tokens." if tokens else "all of its passages."))
    return "\n" + "\n".join(found) + "\n" if found else ""


def rivals_part(results: Row, name: str) -> str:
    """What the rivals' rows are, and their picture."""
    if not any(row["way"] in RIVALS for row in untrained(results)):
        return ""
    return f"""
## What others do

`flap`, `wanda`, `magnitude` and `random-neurons` are krony's own implementations of other papers' choices of neurons
([options](options.md#how-the-factors-start)), with all tokens weighed the same; `flap` has biases in every down layer,
as in its paper. `torch-pruning` and `optipfair` are the packages, run as their documentation says.

![perplexity of other methods relative to the original's against size](quality-{name}-rivals.svg)
"""


def distilled_part(results: Row, name: str) -> str:
    """The table of the starts after training, and its pictures."""
    rows = distilled(results)
    if not rows:
        return ""
    shown = "\n".join(
        f"\n![after training on {tokens:,} tokens](quality-{name}-distilled-{tokens}.svg)"
        for tokens in drawn_tokens(results)
    )
    return f"""
## After the same training

All starts are trained on the same rows of the calibration's text with the same recipe and the original as the teacher
(`quick`, without decay, towards the original's predictions only). "Untrained" and "of original" are perplexities on
OpenWebText relative to the original's, before and after. With several seeds the figures are means, and the last column
is the smallest and the largest ratio.

{distilled_table(results).markdown()}
{shown}
"""
