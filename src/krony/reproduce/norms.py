"""Table 4: what Van Loan keeps of the matrices' norms, beside what it keeps of Gaussian ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from krony.kronecker.algebra import dense, nearest
from krony.kronecker.schemes import resolve
from krony.models.surgery import find_groups, take_out
from krony.reproduce.analogous_scheme import analogous_scheme, load_base, model_sentences, tall_size
from krony.reproduce.figures import TABLE4, Norms
from krony.reproduce.lines import Line, Options, Outcome

SCHEMES = {"96M": "1536x768", "92M": "1024x256:4"}
CONTROL = {"96M": 70.75, "92M": 66.9}  # of a Gaussian 3072x768 matrix, ± 0.05; sqrt(1/2), sqrt(4/9) and a little


def table4(options: Options) -> Outcome:
    """Frobenius and l1 norms of the original, 96M and 92M, in the paper's layers, and the Gaussian control."""
    model = load_base(options, "table4")
    rows, columns = tall_size(model)
    schemes = {name: analogous_scheme(scheme, rows, columns) for name, scheme in SCHEMES.items()}
    groups = find_groups(model)
    found: list[tuple[list[Tensor], list[Tensor]]] = []  # a layer: norms of p1 and of p2
    for done, group in enumerate(groups):
        options.progress(done, len(groups), "norms")
        matrices = [take_out(model, site.name)[0] for site in (group.sites[0], group.sites[-1])]
        turned = [site.is_turned for site in (group.sites[0], group.sites[-1])]
        pairs = [norms(w.T if t else w, list(schemes.values())) for w, t in zip(matrices, turned, strict=True)]
        found.append(([p[0] for p in pairs], [p[1] for p in pairs]))
    numbers = [paper.layer for paper in TABLE4]
    places, how = _places(options, numbers, found)
    lines = []
    for paper, place in zip(TABLE4, places, strict=True):
        frobenius, l1 = (kind[paper.matrix - 1].tolist() for kind in found[place])
        name = f"Lay {paper.layer}, p{paper.matrix} (here {place})"
        lines += _lines(name, paper, frobenius, l1, comparable=options.is_gpt2)
    every = torch.stack([torch.stack(frobenius) for frobenius, _ in found]).double()  # (layers, 2, 3)
    kept = 100 * every[:, :, 1:] / every[:, :, :1]
    for index, name in enumerate(schemes):
        least, most = kept[..., index].min().item(), kept[..., index].max().item()
        lines.append(Line("all layers", f"{name} keeps at least, %", None, least))
        lines.append(Line("all layers", f"{name} keeps at most, %", None, most))
    control = gaussian_control(rows, columns, list(schemes.values()), options.seed)
    for name, share in zip(schemes, control, strict=True):
        theirs_kept = CONTROL[name] if (rows, columns) == (3072, 768) else None
        note = "expected of GPT-2's shape, not the paper's" if theirs_kept else ""
        lines.append(Line(f"Gaussian {rows}x{columns}", f"{name} keeps, %", theirs_kept, share, note=note))
    header = [*model_sentences(options, schemes), how, "Van Loan without rescaling; l1 norms in thousands."]
    footer = ["What Van Loan keeps of a Gaussian matrix is what chance gives: a share near it says nothing of weights."]
    return Outcome("table4", "Norms of the original and of two Van Loan models", options.model, header, lines, footer)


@torch.no_grad()
def norms(weight: Tensor, schemes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Frobenius and l1 norms (thousands) of a tall matrix and of its nearest products: ``(1 + schemes,)`` each."""
    matrices = [weight.double()]
    matrices += [dense(*nearest(matrices[0], resolve(scheme, *weight.shape))) for scheme in schemes]
    return torch.stack([m.norm() for m in matrices]), torch.stack([m.abs().sum() / 1e3 for m in matrices])


def gaussian_control(rows: int, columns: int, schemes: Sequence[str], seed: int = 0) -> list[float]:
    """The share of its Frobenius norm, per cent, that each scheme's nearest product keeps of a Gaussian matrix."""
    generator = torch.Generator().manual_seed(seed)
    frobenius, _ = norms(torch.randn(rows, columns, generator=generator, dtype=torch.float64), schemes)
    return (100 * frobenius[1:] / frobenius[0]).tolist()


def _places(options: Options, numbers: list[int], found: list[tuple[list[Tensor], list[Tensor]]]) -> tuple:
    """Zero-based layers of the table's rows. The paper doesn't say how it counts: its norms decide on GPT-2."""
    if not options.is_gpt2:
        last = max(0, len(found) - 2)  # the paper's 11 is the last but one of 12, counted from one
        places = [min({1: 0, 2: 1}.get(number, last), len(found) - 1) for number in numbers]
        return places, "The first two layers and the last but one; layers are counted from 0."

    def far(shift: int) -> float:
        return sum(
            abs(float(found[p.layer - shift][0][p.matrix - 1][0]) - p.frobenius[0]) / p.frobenius[0] for p in TABLE4
        )

    shift = min((0, 1), key=far)
    how = f"The paper's layers are taken to count from {shift}, which is nearer to its norms; here they count from 0."
    return [number - shift for number in numbers], how


def _lines(name: str, paper: Norms, frobenius: list[float], l1: list[float], *, comparable: bool) -> list[Line]:
    lines = []
    for kind, ours, theirs in (("Frobenius", frobenius, paper.frobenius), ("l1, thousands", l1, paper.l1)):
        for index, who in enumerate(("original", *SCHEMES)):
            lines.append(Line(name, f"{who}, {kind}", theirs[index], ours[index], comparable=comparable))
    kept = 100 * paper.frobenius[1] / paper.frobenius[0]
    lines.append(Line(name, "96M keeps, %", kept, 100 * frobenius[1] / frobenius[0]))
    lines.append(Line(name, "92M keeps, %", paper.kept, 100 * frobenius[2] / frobenius[0]))
    return lines
