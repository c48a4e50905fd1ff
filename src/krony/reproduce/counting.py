"""Tables 1 to 3: the parameters of GPT-2 124M in each scheme, by arithmetic."""

from __future__ import annotations

from krony.kronecker.schemes import GPT2_PARAMETERS, ModelShape, resolve
from krony.reproduce.figures import TABLE1, TABLE2, TABLE3
from krony.reproduce.lines import Line, Outcome
from krony.reproduce.options import TableOptions

GPT2 = ModelShape(GPT2_PARAMETERS, ((3072, 768),) * 24)


def table1(options: TableOptions) -> Outcome:
    """Table 1: shapes of full rank, with the parameters of one matrix and of the model."""
    lines = []
    for scheme, (matrix, model) in TABLE1.items():
        shape = resolve(scheme, 3072, 768)
        lines.append(Line(row=scheme, quantity="per matrix", paper=matrix, ours=shape.parameters, digits=0))
        note = "a 1x1 right factor is counted in each matrix" if scheme == "3072x768" else ""
        total = GPT2.parameters_with(scheme)
        lines.append(Line(row=scheme, quantity="in the model", paper=model, ours=total, digits=0, note=note))
    return Outcome(
        target="table1",
        title="Different compression schemes",
        model="gpt2",
        header=_header(options),
        lines=lines,
        footer=["krony schemes gpt2 --all also lists two smaller shapes of full rank: 48x32 and 64x24."],
    )


def table2(options: TableOptions) -> Outcome:
    """Table 2: one to three factors, in millions of parameters as the paper rounds them."""
    lines = [
        Line(
            row=left,
            quantity=f"{k} factor{'s' if k > 1 else ''}, millions",
            paper=paper,
            ours=GPT2.parameters_with(f"{left}:{k}") / 1e6,
        )
        for left, row in TABLE2.items()
        for k, paper in enumerate(row, start=1)
    ]
    title = "Adding multiple Kronecker factors"
    return Outcome(target="table2", title=title, model="gpt2", header=_header(options), lines=lines)


def table3(options: TableOptions) -> Outcome:
    """Table 3: the two models with several factors. They have scalars, which are counted."""
    lines = []
    for name, (scheme, paper) in TABLE3.items():
        shape = resolve(scheme, 3072, 768)
        ours = GPT2.parameters_with(scheme) + 24 * shape.factors
        note = f"{shape.factors} factors of {shape.m1}x{shape.n1} and {shape.m2}x{shape.n2}: {ours:,} with the scalars"
        lines.append(Line(row=name, quantity="millions", paper=paper, ours=ours / 1e6, note=note))
    title = "Dimensions, factors and parameters"
    return Outcome(target="table3", title=title, model="gpt2", header=_header(options), lines=lines)


def _header(options: TableOptions) -> list[str]:
    sentence = "GPT-2 124M, by arithmetic: no weights are read."
    return [
        sentence if options.model == TableOptions.model else f"{sentence} --model {options.model} changes nothing here."
    ]
