"""The model card that a compressed model is saved with."""

from __future__ import annotations

from krony._version import __version__
from krony.compression.compress import CompressionReport
from krony.pages import Table

SAID_ELSEWHERE = ("krony", "scheme", "init", "calibration_tokens", "earlier")  # what the card says in its own words


def model_card(source: str, report: CompressionReport, text: str = "") -> str:
    """Markdown for the folder's README: what was done, its figures, and how to load it.

    ``text`` says what text was read and why, ``calibrated on 49,152 tokens of …``.
    """
    options = {name: value for name, value in report.made_with.items() if name not in SAID_ELSEWHERE}
    how = "".join(f", {name.replace('_', ' ')} `{value}`" for name, value in options.items())
    how += f", {text}" if text else ""
    layers = "\n".join(
        f"| {layer.name} | {layer.shape.m1}x{layer.shape.n1} | {layer.shape.m2}x{layer.shape.n2} "
        f"| {layer.shape.factors} | {layer.error:.4f} |"
        for layer in report.layers
    )
    return f"""---
library_name: transformers
base_model: {source}
tags: [krony, kronecker, compression]
---

# {source}, compressed with krony

The weights of {len(report.layers)} linear layers of `{source}` are sums of Kronecker products
(scheme `{report.scheme}`, initialisation `{report.init}`{how}, krony {__version__}).

| | parameters |
| --- | ---: |
| before | {report.params_before:,} |
| after | {report.params_after:,} ({report.params_after / report.params_before:.1%}) |

Parameters are unique ones: weights that layers share are counted once.

```python
import krony  # registers the layers with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

The error of a layer is the Frobenius norm of what was lost, relative to the original matrix.

| layer | left | right | factors | error |
| --- | --- | --- | ---: | ---: |
{layers}
"""


def healed_card(source: str, figures: dict) -> str:
    """Markdown for the folder of a model that was trained on: how, and its validation perplexity before and after."""
    teacher = f", taught by `{figures['teacher']}`" if figures["teacher"] else ""
    return f"""---
library_name: transformers
base_model: {source}
tags: [krony, kronecker, compression]
---

# {source}, healed with krony

`{source}` trained on for {figures["tokens"]:,} tokens (recipe `{figures["recipe"]}`{teacher}, krony {__version__}).

{healed_table(figures).markdown()}

```python
import krony  # registers the layers with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```
"""


def healed_table(figures: dict) -> Table:
    """Before and after, and beside them the original and its control where they are known; with ratios if so."""
    rows = [("before", figures["perplexity_before"]), ("after", figures["perplexity_after"])]
    base = figures.get("perplexity_original")
    if base is not None:
        rows.append(("the original", base))
    if "control" in figures:
        rows.append(("the original, trained alike", figures["control"]["perplexity_after"]))
    columns = ["", "validation perplexity"]
    if base is None:
        return Table(columns, [[name, f"{value:,.2f}"] for name, value in rows])
    return Table(
        [*columns, "of the original"], [[name, f"{value:,.2f}", f"{value / base:,.3f}"] for name, value in rows]
    )
