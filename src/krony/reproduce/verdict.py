"""Whether a table here agrees with the paper's, by how much it differs, and what could explain it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from krony.reproduce.budgets import BUDGETS
from krony.reproduce.figures import SETS
from krony.reproduce.lines import Line, Outcome, Verdict
from krony.reproduce.options import TableOptions

NORMS_TOLERANCE = 0.01  # relative; Table 4 prints two to four digits


def judged(outcome: Outcome, options: TableOptions) -> Verdict:
    """The verdict on a table that was run with ``options``: of counts and norms by value, of perplexities by order."""
    if outcome.curves:
        found = _of_curves(outcome)
    elif any(line.quantity in SETS for line in outcome.lines):
        found = _of_orders(outcome.lines)
    else:
        return _of_values(outcome, options)
    return found if found.agrees else replace(found, sentences=[*found.sentences, _explained(outcome, options)])


def _of_values(outcome: Outcome, options: TableOptions) -> Verdict:
    """Of figures that can be subtracted: each is the paper's, up to the digits that it prints."""
    norms = outcome.target == "table4"
    lines = [x for x in outcome.lines if x.difference is not None and not x.row.startswith("Gaussian")]
    off = {line: _relative(line) for line in lines if not _is_the_papers(line, norms=norms)}
    if not off:
        margin = f"within {NORMS_TOLERANCE:.0%}" if norms else "as printed"
        return Verdict(True, [f"All {len(lines)} figures that can be compared are the paper's, {margin}."])
    worst = max(off, key=lambda line: abs(off[line]))
    sentences = [
        f"{len(off)} of {len(lines)} figures are not the paper's, the farthest {worst.row}, {worst.quantity}: "
        f"{worst.ours:,.2f} for {worst.paper:,.2f} ({off[worst]:+.1%})."
    ]
    if not norms:
        sentences.append("Neither tokens nor model nor seed enter the count: the paper's figure is another.")
    elif any(not line.comparable for line in outcome.lines):
        sentences.append(f"What could explain it: {options.model} in place of GPT-2.")
    else:
        sentences.append("What could explain it: the paper's randomised SVD, where krony's is exact.")
    return Verdict(False, sentences)


def _is_the_papers(line: Line, *, norms: bool) -> bool:
    assert line.paper is not None and line.difference is not None
    if norms:
        return abs(_relative(line)) <= NORMS_TOLERANCE
    if line.digits == 0:
        return line.difference == 0
    unit = 1 if line.paper == int(line.paper) else 0.1  # the last digit it prints, rounded or cut off
    return abs(line.difference) < unit


def _relative(line: Line) -> float:
    assert line.paper is not None and line.difference is not None
    return line.difference / line.paper


def _of_orders(lines: list[Line]) -> Verdict:
    """Of perplexities: which of two models is ahead on each set, here and in the paper."""
    agrees, sentences = True, []
    for first, second in _pairs(lines):
        parts, same = [], True
        for data in SETS:
            a, b = (
                next(x for x in lines if _was_run(x) and (x.row, x.quantity) == (row, data)) for row in (first, second)
            )
            assert a.paper and b.paper and a.ours and b.ours
            theirs, ours = a.paper / b.paper - 1, a.ours / b.ours - 1
            same = same and theirs * ours >= 0
            parts.append(f"{data} {theirs:+.1%} in the paper and {ours:+.1%} here{_overlap(a, b)}")
        agrees = agrees and same
        words = "the same order" if same else "another order"
        sentences.append(f"{first} against {second}, {words}: {', '.join(parts)}.")
    return Verdict(agrees, sentences or ["Nothing was run here that the paper compares."])


def _pairs(lines: list[Line]) -> Iterator[tuple[str, str]]:
    """The models that were trained here and that the paper has figures of; the original is ahead of all."""
    return combinations(dict.fromkeys(line.row for line in lines if _was_run(line) and line.row != "GPT2"), 2)


def _was_run(line: Line) -> bool:
    return line.ours is not None and line.paper is not None


def _overlap(a: Line, b: Line) -> str:
    """Whether the seeds' ranges of two figures overlap, in words; nothing for one seed."""
    if a.spread is None or b.spread is None:
        return ""
    apart = a.spread[1] < b.spread[0] or b.spread[1] < a.spread[0]
    return " (the seeds' ranges don't overlap)" if apart else " (the seeds' ranges overlap)"


def _of_curves(outcome: Outcome) -> Verdict:
    """Of Figure 1, of which the paper prints no figures: the curve of 92M lies below that of 96M."""
    slow, fast = outcome.curves.values()
    differences = [f - s for (_, s), (_, f) in zip(slow, fast, strict=True)]
    agrees = all(difference < 0 for difference in differences)
    return Verdict(
        agrees,
        [
            "In the paper the curve of 92M lies below that of 96M everywhere; "
            f"{'here too' if agrees else 'here it does not'}: 92M less 96M is from {min(differences):+.3f} to "
            f"{max(differences):+.3f} nats per token."
        ],
    )


def _explained(outcome: Outcome, options: TableOptions) -> str:
    """What is other than in the paper and could make the difference."""
    budget, causes = BUDGETS[options.budget], []
    if budget.epoch_tokens is not None:
        epochs = budget.train.epochs + budget.final.epochs
        causes.append(
            f"the tokens: budget {options.budget} trains a model on {epochs * budget.epoch_tokens:,.0f} at most, the "
            "paper for 3 to 5 epochs of OpenWebText"
        )
    if any(line.ratio is not None for line in outcome.lines) or not outcome.is_gpt2:
        causes.append(f"the model: {options.model} in place of GPT-2")
    if options.seeds == 1:
        causes.append("the seed: there is one, and --seeds 3 would show a spread")
    return f"What could explain it: {'; '.join(causes) or 'the training text or its order'}."
