"""Table 4: how much of the matrices' norms Van Loan keeps, beside how much it keeps of Gaussian ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from krony.kronecker.algebra import dense, nearest
from krony.kronecker.schemes import resolve
from krony.models.surgery import find_groups, take_out
from krony.reproduce.analogous_scheme import analogous_scheme, load_base, model_sentences, tall_size
from krony.reproduce.figures import TABLE4, Norms
from krony.reproduce.lines import Line, Outcome
from krony.reproduce.options import TableOptions

SCHEMES = {"96M": "1536x768", "92M": "1024x256:4"}
# Per cent of a Gaussian 3072x768 matrix's norm that each scheme keeps, ± 0.05: a little over √(1/2) and √(4/9).
GAUSSIAN = {"96M": 70.75, "92M": 66.9}

LayerNorms = tuple[list[Tensor], list[Tensor]]  # Frobenius and l1 norms of c_fc and c_proj, (1 + schemes,) each


def table4(options: TableOptions) -> Outcome:
    """Table 4: Frobenius and l1 norms of the original, 96M and 92M in the paper's layers, and the Gaussian control."""
    model = load_base(options, "table4")
    rows, columns = tall_size(model)
    schemes = {name: analogous_scheme(scheme, rows, columns) for name, scheme in SCHEMES.items()}
    groups = find_groups(model)
    found: list[LayerNorms] = []
    for done, group in enumerate(groups):
        options.progress(done, len(groups), "norms")
        pairs = []
        for site in (group.sites[0], group.sites[-1]):
            weight, _ = take_out(model, site.name)
            pairs.append(norms(weight.T if site.is_turned else weight, list(schemes.values())))
        found.append(([frobenius for frobenius, _ in pairs], [l1 for _, l1 in pairs]))
    places, numbering = _places(options, [paper.layer for paper in TABLE4], found)
    lines = []
    for paper, place in zip(TABLE4, places, strict=True):
        frobenius, l1 = (kind[paper.matrix - 1].tolist() for kind in found[place])
        name = f"Lay {paper.layer}, p{paper.matrix} (here {place})"
        lines += _lines(name, paper, frobenius, l1, comparable=options.is_gpt2)
    lines += _range_lines(found) + _gaussian_lines(rows, columns, schemes, options.seed)
    return Outcome(
        target="table4",
        title="Norms of the original and of two Van Loan models",
        model=options.model,
        header=[
            *model_sentences(options, schemes),
            numbering,
            "Van Loan without rescaling; l1 norms in thousands.",
        ],
        lines=lines,
        footer=["A share close to a Gaussian matrix's says nothing about the weights: chance keeps as much."],
    )


@torch.no_grad()
def norms(weight: Tensor, schemes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Frobenius and l1 norms (thousands) of a tall matrix and of its nearest products: ``(1 + schemes,)`` each."""
    matrices = [weight.double()]
    matrices += [dense(*nearest(matrices[0], resolve(scheme, *weight.shape))) for scheme in schemes]
    return torch.stack([m.norm() for m in matrices]), torch.stack([m.abs().sum() / 1e3 for m in matrices])


def gaussian_control(rows: int, columns: int, schemes: Sequence[str], seed: int = 0) -> list[float]:
    """Per cent of a Gaussian matrix's Frobenius norm that the nearest product of each scheme keeps."""
    generator = torch.Generator().manual_seed(seed)
    frobenius, _ = norms(torch.randn(rows, columns, generator=generator, dtype=torch.float64), schemes)
    return (100 * frobenius[1:] / frobenius[0]).tolist()


def _places(options: TableOptions, numbers: list[int], found: list[LayerNorms]) -> tuple[list[int], str]:
    """Zero-based layers of the table's rows. The paper doesn't say how it counts; on GPT-2 its norms decide."""
    if not options.is_gpt2:
        last = max(0, len(found) - 2)  # the paper's 11 is the last but one of 12, counted from 1
        places = [min({1: 0, 2: 1}.get(number, last), len(found) - 1) for number in numbers]
        return places, "The first two layers and the last but one; layers are counted from 0."

    def distance(shift: int) -> float:
        return sum(
            abs(float(found[p.layer - shift][0][p.matrix - 1][0]) - p.frobenius[0]) / p.frobenius[0] for p in TABLE4
        )

    shift = min((0, 1), key=distance)
    numbering = (
        f"The paper's layers are taken to count from {shift}, which is nearer to its norms; here they count from 0."
    )
    return [number - shift for number in numbers], numbering


def _lines(name: str, paper: Norms, frobenius: list[float], l1: list[float], *, comparable: bool) -> list[Line]:
    lines = []
    for kind, ours, theirs in (("Frobenius", frobenius, paper.frobenius), ("l1, thousands", l1, paper.l1)):
        for index, who in enumerate(("original", *SCHEMES)):
            quantity = f"{who}, {kind}"
            lines.append(
                Line(row=name, quantity=quantity, paper=theirs[index], ours=ours[index], comparable=comparable)
            )
    printed = {"96M": 100 * paper.frobenius[1] / paper.frobenius[0], "92M": paper.share}
    for index, (who, share) in enumerate(printed.items(), start=1):
        ours_share = 100 * frobenius[index] / frobenius[0]
        lines.append(Line(row=name, quantity=f"{who} keeps, %", paper=share, ours=ours_share))
    return lines


def _range_lines(found: list[LayerNorms]) -> list[Line]:
    """The smallest and the largest share of the Frobenius norm that each scheme keeps, over all layers."""
    every = torch.stack([torch.stack(frobenius) for frobenius, _ in found]).double()  # (layers, 2, 3)
    share = 100 * every[:, :, 1:] / every[:, :, :1]
    lines = []
    for index, name in enumerate(SCHEMES):
        for words, value in (("at least", share[..., index].min()), ("at most", share[..., index].max())):
            lines.append(Line(row="all layers", quantity=f"{name} keeps {words}, %", paper=None, ours=float(value)))
    return lines


def _gaussian_lines(rows: int, columns: int, schemes: dict[str, str], seed: int) -> list[Line]:
    lines = []
    shares = gaussian_control(rows, columns, list(schemes.values()), seed)
    for name, share in zip(schemes, shares, strict=True):
        expected = GAUSSIAN[name] if (rows, columns) == (3072, 768) else None
        note = "expected for GPT-2's shape, not the paper's" if expected else ""
        row, quantity = f"Gaussian {rows}x{columns}", f"{name} keeps, %"
        lines.append(Line(row=row, quantity=quantity, paper=expected, ours=share, note=note))
    return lines
