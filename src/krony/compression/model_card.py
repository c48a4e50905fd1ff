"""The card of a compressed, healed or exported model: what was done, its figures, and metadata that the hub accepts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, hf_hub_download
from huggingface_hub.repocard import metadata_load

from krony._version import __version__
from krony.compression.report import CompressionReport, LayerReport
from krony.models.source import DEMO
from krony.pages import Table, shown

# Options that the card words otherwise, or that only krony reads.
SAID_ELSEWHERE = ("krony", "scheme", "init", "calibration_tokens", "calibration_documents", "earlier")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")

USES = {  # form of an export -> what reads it
    "slim": "a plain model of a smaller hidden width, which `AutoModelForCausalLM.from_pretrained` loads",
    "dense": "a plain model of the original's shapes, which `AutoModelForCausalLM.from_pretrained` loads",
    "gguf": "GGUF, for llama.cpp",
    "onnx": "ONNX, for ONNX Runtime",
    "openvino": "OpenVINO's format",
}
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
    how = _options({"scheme": report.scheme, "init": report.init} | report.made_with) + (f", {text}" if text else "")
    return f"""{_front_matter(source)}
# {_title(source)}, compressed with krony

The weights of {len(report.layers)} linear layers of `{_title(source)}` are sums of Kronecker products
({how}, krony {__version__}).

| | parameters |
| --- | ---: |
| before | {report.params_before:,} |
| after | {report.params_after:,} ({report.params_after / report.params_before:.1%}) |

Weights that layers share are counted once.

{LOADING}
{layers_table(report.layers).markdown()}

The error is the Frobenius norm of the difference, relative to the original matrix; `krony inspect` shows every layer.
"""


def layers_table(layers: list[LayerReport]) -> Table:
    """A row per kind of matrix: the layers whose names differ in numbers only."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name), []).append(layer)
    rows = []
    for name, same in kinds.items():
        shapes = [layer.shape for layer in same]
        left, right = [f"{s.m1}x{s.n1}" for s in shapes], [f"{s.m2}x{s.n2}" for s in shapes]
        columns = [left, right, [f"{s.factors}" for s in shapes], [f"{layer.error:.4f}" for layer in same]]
        rows.append([name, f"{len(same)}", *map(_range, columns)])
    return Table(["matrices", "count", "left", "right", "factors", "error"], rows)


def _range(numbers: list[str]) -> str:
    """The only number, or the smallest and the largest."""
    low, *_, high = sorted([*numbers, *numbers], key=lambda number: (len(number), number))
    return low if low == high else f"{low} to {high}"


def _options(made_with: dict[str, Any]) -> str:
    """The options of a compression in words."""
    scheme = made_with.get("scheme")
    if isinstance(scheme, list):  # per layer
        said = "schemes " + ", ".join(f"`{pattern}: {one}`" for pattern, one in scheme)
        said += " (the last that matches a layer decides)"
    else:
        said = f"scheme `{scheme}`"
    first = f"{said}, initialisation `{made_with.get('init')}`"
    others = {name: value for name, value in made_with.items() if name not in SAID_ELSEWHERE}
    return first + "".join(f", {name.replace('_', ' ')} `{value}`" for name, value in others.items())


def exported_card(source: str, to: str, made_with: dict[str, Any], params: tuple[int, int], how: str = "") -> str:
    """Markdown for the README of a model that was exported to run without krony.

    Args:
        source: the name of the model that was exported.
        to: the form, such as ``slim`` or ``gguf``.
        made_with: the options of its compression; empty for a plain model.
        params: unique parameters before the export and afterwards.
        how: what the export did, in words.
    """
    compressed = f"It was compressed by krony ({_options(made_with)}). " if made_with else ""
    changes = f" {how[0].upper()}{how[1:]}." if how else ""
    return f"""{_front_matter(source, form=to)}
# {_title(source)}, as {to}

`{_title(source)}`, exported by krony {__version__} to {USES[to]}.

{compressed}It has {params[1]:,} parameters; before the export there were {params[0]:,}. It runs without krony.{changes}
"""


def imported_card(source: str, file: str, scheme: str, params: int) -> str:
    """Markdown for the README of a checkpoint of the published code that was read; ``source`` is the original."""
    return f"""{_front_matter(source)}
# {_title(source)}, compressed with Kronecker products

`{file}`, a checkpoint of the published code (padas-lab-de/krony-PT), read by krony {__version__}: every MLP has scheme
`{scheme}`, and the model {params:,} parameters.

{LOADING}"""


def healed_card(source: str, figures: dict[str, Any], made_with: dict[str, Any] | None = None) -> str:
    """Markdown for a healed model's README: how it was trained, and its validation perplexity before and after.

    ``made_with``: the options of the compression that was healed.
    """
    compressed = f"\n\nBefore, it was compressed ({_options(made_with)})." if made_with else ""
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
krony {__version__}).{compressed}

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


def _front_matter(source: str, *results: EvalResult, form: str = "") -> str:
    """The metadata block. Licence, language and base come from the source's own card where it has one.

    ``form``: that of an export. transformers doesn't load an engine's, so that the hub must not offer it.
    """
    known, engine = _metadata(source), form in ("gguf", "onnx", "openvino")
    bases = known.get("base_model") or []
    bases = [base for base in ([bases] if isinstance(bases, str) else bases) if _is_hub_name(str(base))]
    data = ModelCardData(
        model_name=f"{_title(source)}, by krony",
        base_model=source if _is_hub_name(source) else bases[0] if len(bases) == 1 else bases or None,
        **{name: known.get(name) for name in ("license", "license_name", "license_link", "language")},
        library_name=None if engine else "transformers",
        pipeline_tag="text-generation",
        tags=["krony", "kronecker", "compression", *([form] if engine else [])],
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
