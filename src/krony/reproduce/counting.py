"""Tables 1 to 3: parameters of GPT-2 124M in each scheme, by arithmetic alone."""

from __future__ import annotations

from krony.kronecker.schemes import GPT2_PARAMETERS, ModelShape, resolve
from krony.reproduce.figures import TABLE1, TABLE2, TABLE3
from krony.reproduce.lines import Line, Options, Outcome

GPT2 = ModelShape(GPT2_PARAMETERS, ((3072, 768),) * 24)


def table1(options: Options) -> Outcome:
    """Shapes of full rank: parameters of a matrix and of the model."""
    lines = []
    for scheme, (matrix, model) in TABLE1.items():
        shape = resolve(scheme, 3072, 768)
        lines.append(Line(scheme, "a matrix", matrix, shape.parameters, digits=0))
        note = "a 1x1 right factor is counted in each matrix" if scheme == "3072x768" else ""
        lines.append(Line(scheme, "the model", model, GPT2.parameters_with(scheme), digits=0, note=note))
    footer = ["krony schemes gpt2 --all lists two smaller shapes of full rank too: 48x32 and 64x24."]
    return Outcome("table1", "Different compression schemes", "gpt2", _header(options), lines, footer)


def table2(options: Options) -> Outcome:
    """More factors, in millions of parameters as the paper rounds them."""
    lines = [
        Line(left, f"{k} factor{'s' if k > 1 else ''}, millions", paper, GPT2.parameters_with(f"{left}:{k}") / 1e6)
        for left, row in TABLE2.items()
        for k, paper in enumerate(row, start=1)
    ]
    return Outcome("table2", "Adding multiple Kronecker factors", "gpt2", _header(options), lines)


def table3(options: Options) -> Outcome:
    """The two models of several factors; scalars counted, as they have them."""
    lines = []
    for name, (scheme, paper) in TABLE3.items():
        shape = resolve(scheme, 3072, 768)
        ours = GPT2.parameters_with(scheme) + 24 * shape.factors
        note = f"{shape.factors} factors of {shape.m1}x{shape.n1} and {shape.m2}x{shape.n2}: {ours:,} with the scalars"
        lines.append(Line(name, "millions", paper, ours / 1e6, note=note))
    return Outcome("table3", "Dimensions, factors and parameters", "gpt2", _header(options), lines)


def _header(options: Options) -> list[str]:
    said = ["GPT-2 124M, by arithmetic: no weights are read."]
    return said if options.is_gpt2 else [f"{said[0]} --model {options.model} plays no part here."]
