"""Table 4: how much of the matrices' norms Van Loan keeps, beside how much it keeps of Gaussian ones."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from krony.kronecker.algebra import dense, nearest
from krony.kronecker.schemes import resolve
from krony.models.surgery import find_groups, take_out
from krony.reproduce.analogous_scheme import analogous_scheme, load_base, load_skeleton, model_sentences, tall_size
from krony.reproduce.figures import TABLE4, Norms
from krony.reproduce.lines import Line, Outcome
from krony.reproduce.options import TableOptions
from krony.reproduce.recognition import Likeness, has_gpt2s_config, likeness
from krony.runtime.timing import duration

SCHEMES = {"96M": "1536x768", "92M": "1024x256:4"}
# Per cent of a Gaussian 3072x768 matrix's norm that each scheme keeps, ± 0.05: a little over √(1/2) and √(4/9).
GAUSSIAN = {"96M": 70.75, "92M": 66.9}

LayerNorms = tuple[list[Tensor], list[Tensor]]  # Frobenius and l1 norms of c_fc and c_proj, (1 + schemes,) each


def table4(options: TableOptions) -> Outcome:
    """Table 4: Frobenius and l1 norms of the original, 96M and 92M in the paper's layers, and the Gaussian control."""
    title = "Norms of the original and of two Van Loan models"
    if options.dry_run:
        return Outcome(target="table4", title=title, model=options.model, header=_plan(options))
    model = load_base(options, "table4")
    like = likeness(model)
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
    places, numbering = _places(like, len(found))
    lines = []
    for paper, place in zip(TABLE4, places, strict=True):
        frobenius, l1 = (kind[paper.matrix - 1].tolist() for kind in found[place])
        name = f"Lay {paper.layer}, p{paper.matrix} (here {place})"
        lines += _lines(name, paper, frobenius, l1, comparable=like.is_gpt2)
    lines += _range_lines(found) + _gaussian_lines(rows, columns, schemes, options.seed)
    return Outcome(
        target="table4",
        title=title,
        model=options.model,
        header=[
            *model_sentences(options, like, {SCHEMES[name]: ours for name, ours in schemes.items()}),
            numbering,
            "Van Loan without rescaling; l1 norms in thousands.",
        ],
        lines=lines,
        footer=["A share close to a Gaussian matrix's says nothing about the weights: chance keeps as much."],
        is_gpt2=like.is_gpt2,
    )


def _plan(options: TableOptions) -> list[str]:
    """What would be run, from the config alone, and about how long it takes: measured on one Gaussian matrix."""
    model = load_skeleton(options, "table4")
    rows, columns = tall_size(model)
    schemes = {scheme: analogous_scheme(scheme, rows, columns) for scheme in SCHEMES.values()}
    matrices = 2 * len(find_groups(model))
    start = time.perf_counter()
    gaussian_control(rows, columns, list(schemes.values()))
    seconds = (time.perf_counter() - start) * (matrices + 1)
    known = "its config is GPT-2's, and its norms are compared with Table 4's when it runs"
    return [
        f"{options.model}: {known if has_gpt2s_config(model) else 'in place of GPT-2, because its config is another'}.",
        f"Norms of {matrices} matrices of {rows}x{columns} and of a Gaussian one, and of the nearest products of each, "
        f"{' and '.join(schemes.values())}. About {duration(seconds)} on this machine; nothing is trained.",
    ]


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


def _places(like: Likeness, layers: int) -> tuple[list[int], str]:
    """Zero-based layers of the table's rows. The paper doesn't say how it counts; on GPT-2 its norms decide."""
    numbers = [paper.layer for paper in TABLE4]
    if not like.is_gpt2:
        last = max(0, layers - 2)  # the paper's 11 is the last but one of 12, counted from 1
        places = [min({1: 0, 2: 1}.get(number, last), layers - 1) for number in numbers]
        return places, "The first two layers and the last but one; layers are counted from 0."
    numbering = (
        f"The paper's layers are taken to count from {like.counts_from}, which is nearer to its norms; here they count "
        "from 0."
    )
    return [number - like.counts_from for number in numbers], numbering


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
