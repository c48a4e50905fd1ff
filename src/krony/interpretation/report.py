"""The page of ``krony inspect --report``."""

from __future__ import annotations

import html

from krony.interpretation.figures import (
    ablations,
    by_kind,
    effective_ranks,
    right_factors,
    shares,
    similarity,
    spectra,
)
from krony.interpretation.views import GroupView, Interpretation, LayerFactors
from krony.pages import Table, figure, page, paragraphs, shown


def table(seen: Interpretation) -> Table:
    """One row per factor."""
    columns = ["layer", "factor", "A", "B", "scalar", "effective rank of A", "share of energy", "alone", "without it"]
    rows = []
    for layer in seen.layers:
        left, right = ("x".join(map(str, size)) for size in (layer.left, layer.right))
        for f in layer.factors:
            without = "" if f.ratio is None else f"{f.ratio:.3f} ({f.low:.3f} to {f.high:.3f})"
            figures = [f"{f.scalar:.3g}", f"{f.effective_rank:.1f}", f"{f.share:.1%}", f"{f.alone:.1%}", without]
            rows.append([layer.name, str(f.index), left, right, *figures])
    return Table(columns, rows)


def interpretation_page(model: str, seen: Interpretation) -> str:
    """A complete page without anything from elsewhere; all text of the model and the corpus is escaped."""
    parts = [("What was looked at", paragraphs(*explanations(seen))), ("Every factor", table(seen).html())]
    captions = _captions(seen)
    for kind, layers in by_kind(seen).items():
        pictures = [figure(right_factors(kind, layers), captions["right"])]
        pictures.append(figure(effective_ranks(kind, layers), captions["rank"]))
        if any(len(layer.factors) > 1 for layer in layers):
            pictures.append(figure(shares(kind, layers), captions["share"]))
        if seen.ablation_tokens:
            pictures.append(figure(ablations(kind, layers), captions["ablation"]))
        pictures += [
            figure(similarity(found), captions["left" if found.of == "left" else "spans"])
            for found in seen.similarities
            if found.kind == kind
        ]
        parts.append((kind, "\n".join(pictures)))
    parts.append(("Groups and contexts", paragraphs(captions["groups"]) + "\n".join(map(_details, seen.layers))))
    return page(f"What the factors of {model} mean", parts)


def explanations(seen: Interpretation) -> list[str]:
    """What was read and measured, and what the figures can't say."""
    said = [
        f"Energies and contexts are of {seen.tokens:,} tokens of {seen.text}, in sequences of {seen.length}; the first "
        f"token of each sequence is left out. It took {seen.seconds:.0f} s."
    ]
    if seen.perplexity is not None:
        said.append(
            f"Each factor was left out, one at a time, on {seen.ablation_tokens:,} of these tokens, where the model's "
            f"perplexity is {shown(seen.perplexity)}; the table has the ratio of perplexities, with its 95 % interval "
            "over sequences (paired bootstrap)."
        )
    else:
        said.append("No factor was left out, so there are no perplexities.")
    said.append(
        "A layer's matrix is a sum of factors s A ⊗ B. The sum fixes the spans of the factors, not each factor: others "
        "with the same spans make the same matrix. What is said of a single factor is of the one the model stores. "
        "Layers and factors are counted from 0."
    )
    if seen.dense:
        said.append(f"{len(seen.dense)} matrices of MLPs are dense and aren't shown, such as {seen.dense[0]}.")
    return said


def _captions(seen: Interpretation) -> dict[str, str]:
    return {
        "right": "Right factors. Blue entries are positive, vermilion ones negative; the sign and the norm of a factor "
        "can move between A and B, and only the pattern counts.",
        "rank": "Effective rank of each left factor: exp(−Σ p log p) with p = σ/Σσ over its singular values σ (Roy & "
        "Vetterli 2007).",
        "share": "Share of the output energy: Σ⟨y_f, y⟩ / Σ‖y‖² over the tokens, with y_f = (s A ⊗ B) x and y their "
        "sum without the bias. Shares add up to 1; a factor that works against the others has a negative one.",
        "ablation": f"Perplexity without the factor, relative to the model's, on {seen.ablation_tokens:,} tokens.",
        "left": "Similarity of left factors across layers: the mean of cos² of the principal angles (Björck & Golub "
        "1973; Hu et al. 2021, section 7.2) between their leading singular directions, on the side of the residual "
        "stream. 1: the same subspace.",
        "spans": "Similarity of what the right factors of a layer span, whichever factors stand for the matrix: the "
        "mean of cos² of the principal angles between layers. 1: the same span.",
        "groups": "Numbers that share a row or a column of A form a group; in an MLP these are hidden neurons, and the "
        "percentages say how much of ‖B‖² each has. Shown are the groups with most of a factor's energy, and the "
        "tokens where the factor acts most strongly on them, at most one in a sequence, with its energy relative to "
        "the group's mean.",
    }


def _details(layer: LayerFactors) -> str:
    """A layer's spectra, groups and contexts, to unfold."""
    body = [figure(spectra(layer), "Singular values of the left factors, each relative to its largest.")]
    for factor in layer.factors:
        if factor.groups:
            body.append(f"<h4>Factor {factor.index}</h4>")
            body += [_group(layer, group) for group in factor.groups]
    return f"<details><summary>{html.escape(layer.name)}</summary>\n" + "\n".join(body) + "\n</details>"


def _group(layer: LayerFactors, group: GroupView) -> str:
    named = ", ".join(f"{m} ({w:.0%})" for m, w in zip(group.members[:16], group.weights, strict=False))
    more = f" and {len(group.members) - 16} more" if len(group.members) > 16 else ""
    head = f"Group {group.index}: {layer.side} {named}{more}; {group.share:.1%} of the factor's energy"
    places = "".join(
        f"<li>{_marked(one.before, one.token, one.after)} <small>{one.energy:,.0f} times the mean</small></li>\n"
        for one in group.contexts
    )
    return f"<p>{html.escape(head)}</p>\n<ul>\n{places}</ul>"


def _marked(*parts: str) -> str:
    before, token, after = (html.escape(part.replace("\n", "⏎")) for part in parts)
    return f"{before}<mark>{token}</mark>{after}"
