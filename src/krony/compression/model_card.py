"""The model card of a compressed or healed model: what was done, its figures, and metadata that the hub accepts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, hf_hub_download
from huggingface_hub.repocard import metadata_load

from krony._version import __version__
from krony.compression.report import CompressionReport
from krony.models.source import DEMO
from krony.pages import Table, shown

# Options that the card words otherwise, or that only krony reads.
SAID_ELSEWHERE = ("krony", "scheme", "init", "calibration_tokens", "calibration_documents", "earlier")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")

LOADING = """```python
import krony  # registers the layers with transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
```

Without `import krony`, loading stops with an error about mismatched sizes. Install and import krony then; don't set
`ignore_mismatched_sizes`, which gives the compressed layers random weights.
"""


def model_card(source: str, report: CompressionReport, text: str = "") -> str:
    """Markdown for the folder's README: what was done, its figures, and how to load the model.

    ``source`` is the name of the original model. ``text`` says which text was read and why, such as ``calibrated on
    49,152 tokens of …``.
    """
    options = {name: value for name, value in report.made_with.items() if name not in SAID_ELSEWHERE}
    how = "".join(f", {name.replace('_', ' ')} `{value}`" for name, value in options.items())
    how += f", {text}" if text else ""
    layers = Table(
        ["layer", "left", "right", "factors", "error"],
        [
            [r.name, f"{r.shape.m1}x{r.shape.n1}", f"{r.shape.m2}x{r.shape.n2}", f"{r.shape.factors}", f"{r.error:.4f}"]
            for r in report.layers
        ],
    )
    return f"""{_front_matter(source)}
# {_title(source)}, compressed with krony

The weights of {len(report.layers)} linear layers of `{_title(source)}` are sums of Kronecker products
(scheme `{report.scheme}`, initialisation `{report.init}`{how}, krony {__version__}).

| | parameters |
| --- | ---: |
| before | {report.params_before:,} |
| after | {report.params_after:,} ({report.params_after / report.params_before:.1%}) |

Weights that layers share are counted once.

{LOADING}
The error of a layer is the Frobenius norm of the difference, relative to the original matrix.

<details>
<summary>All {len(report.layers)} layers</summary>

{layers.markdown()}

</details>
"""


def healed_card(source: str, figures: dict[str, Any]) -> str:
    """Markdown for a healed model's README: how it was trained, and its validation perplexity before and after."""
    teacher = f", taught by `{_title(figures['teacher'])}`" if figures["teacher"] else ""
    result = EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name="validation text of the training",
        metric_type="perplexity",
        metric_value=round(figures["perplexity_after"], 4),
    )
    return f"""{_front_matter(source, result)}
# {_title(source)}, healed with krony

`{_title(source)}` was trained for {figures["tokens"]:,} tokens (recipe `{figures["recipe"]}`{teacher},
krony {__version__}).

{healed_table(figures).markdown()}

{LOADING}"""


def healed_table(figures: dict[str, Any]) -> Table:
    """Validation perplexity before and after; also of the original and the control, with ratios, where known."""
    rows = [("before", figures["perplexity_before"]), ("after", figures["perplexity_after"])]
    base = figures.get("perplexity_original")
    if base is not None:
        rows.append(("the original", base))
    if "perplexity_after" in figures.get("control", {}):
        rows.append(("the original, trained too", figures["control"]["perplexity_after"]))
    columns = ["", "validation perplexity"]
    if base is None:
        return Table(columns, [[name, shown(value)] for name, value in rows])
    ratios = [f"{value / base:,.3f}" if value / base < 1e6 else f"{value / base:.3g}" for _, value in rows]
    return Table(
        [*columns, "of the original"],
        [[name, shown(value), ratio] for (name, value), ratio in zip(rows, ratios, strict=True)],
    )


def _front_matter(source: str, *results: EvalResult) -> str:
    """The metadata block. Licence, language and base come from the source's own card where it has one."""
    known = _metadata(source)
    data = ModelCardData(
        model_name=f"{_title(source)}, by krony",
        base_model=source if _is_hub_name(source) else known.get("base_model"),
        license=known.get("license"),
        language=known.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["krony", "kronecker", "compression"],
        eval_results=list(results) or None,
        ignore_metadata_errors=True,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _metadata(source: str) -> dict[str, Any]:
    """The metadata of the source's card, without network access; empty if it has none that can be read."""
    try:
        if _is_hub_name(source):
            card = Path(hf_hub_download(source, "README.md", local_files_only=True))
        else:
            card = (DEMO if source == "demo" else Path(source)) / "README.md"
        return metadata_load(card) or {}
    except Exception:  # no card, or front matter that yaml can't read: the metadata is optional
        return {}


def _is_hub_name(source: str) -> bool:
    """Whether this can be a name on the hub; a local path must not become a card's ``base_model``."""
    return source != "demo" and not Path(source).exists() and HUB_NAME.fullmatch(source) is not None


def _title(source: str) -> str:
    """The name of a model in a card: for a folder, the last part of its path."""
    return source if _is_hub_name(source) or source == "demo" else Path(source).resolve().name
