"""``krony compress``: a model goes in, a smaller one comes out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from krony.cli.options import Device, Dtype, Json, Model, Out, Seed
from krony.cli.output import Output, quiet_libraries
from krony.errors import KronyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from krony.compression import Report
    from krony.config import KronyConfig
    from krony.surgery import Group


def run(
    model: Model,
    out: Out,
    scheme: Annotated[
        str | None, typer.Option(help="81M, 96M (GPT-2 124M), 1536x768, 1024x256:4, keep=0.5: see krony schemes.")
    ] = None,
    params: Annotated[
        str | None, typer.Option(metavar="N", help="Instead of a scheme: the largest model within N, say 82M.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="How factors start: neurons, als, van-loan, permuted, prune, svd, random.")
    ] = "neurons",
    calibration: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What neurons, als and svd read: a text or jsonl file, or python-docs."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(metavar="N", help="How much of it is read, at most.")] = 49_152,
    allocation: Annotated[
        str, typer.Option(help="uniform: every layer alike; global: one budget, spent where it tells.")
    ] = "uniform",
    max_width: Annotated[
        int | None, typer.Option(metavar="N", help="global: the most neurons that a layer keeps.")
    ] = None,
    multiple_of: Annotated[
        int | None, typer.Option(metavar="N", help="global: layers keep multiples of N neurons, such as 64.")
    ] = None,
    token_weighting: Annotated[
        bool, typer.Option(help="Weigh tokens by 1/|hidden state|², so that a few huge ones don't decide.")
    ] = True,
    reconstruct: Annotated[
        int, typer.Option(metavar="STEPS", help="Then train each MLP by itself on that text, for so many steps.")
    ] = 0,
    layers: Annotated[str, typer.Option(help="all, odd, even, or a zero-based inclusive range such as 2-28.")] = "all",
    modules: Annotated[str, typer.Option(help="mlp, or a regular expression over names of linear layers.")] = "mlp",
    rescale: Annotated[
        bool | None,
        typer.Option("--rescale/--no-rescale", help="Adaptive normalisation of van-loan, permuted.  [default: on]"),
    ] = None,
    scalars: Annotated[
        bool | None,
        typer.Option("--scalars/--no-scalars", help="A scalar a factor.  [default: if more than one]"),
    ] = None,
    scalar_init: Annotated[float | None, typer.Option(help="Value the scalars start at; the matrix stays.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="What stands in for dropped neurons in the right factor (prune: 0.1).")
    ] = None,
    embedding: Annotated[
        int | None,
        typer.Option(metavar="N", help="Factorise the input embedding too, right factor 1xN (KnGPT2: 2)."),
    ] = None,
    reinit: Annotated[str | None, typer.Option(help="all: draw every other weight anew too.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    cache: Annotated[bool, typer.Option(help="Keep what was read of the text, and use what was kept.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    json_to: Json = None,
) -> None:
    """Replace the MLP matrices of MODEL by sums of Kronecker products and write the model to OUT."""
    to = Output(json_to)
    if (scheme is None) == (params is None):
        raise KronyError("compress needs a size: either --scheme (krony schemes MODEL lists them) or --params")
    from krony import ranks
    from krony.calibration import LENGTH, calibration_set
    from krony.compression import compress, plan
    from krony.config import CALIBRATED, RESCALED, KronyConfig
    from krony.files import cache_folder, check_writable, fresh_folder
    from krony.models import context_length, empty_model, load_config, load_model, load_tokenizer

    if rescale is not None and init not in RESCALED:
        raise KronyError(f"--rescale is of init van-loan and permuted, and the init is {init}: leave it out")
    quiet_libraries()
    skeleton = empty_model(load_config(model))
    config = KronyConfig(
        scheme=scheme or _scheme_for(params or "", skeleton, modules, layers, init),
        init=init,
        allocation=allocation,
        layers=layers,
        modules=modules,
        rescale=rescale is not False,
        scalars=scalars,
        scalar_init=scalar_init,
        epsilon=epsilon,
        token_weighting=token_weighting,
        max_width=max_width,
        multiple_of=multiple_of,
        reconstruct=reconstruct,
        embedding=embedding,
        reinit=reinit,
        seed=seed,
    )
    groups = plan(skeleton, config)
    if dry_run:
        _preview(to, skeleton, groups, config)
        return
    if calibration is None and (init in CALIBRATED or reconstruct):
        reader = f"init {init}" if init in CALIBRATED else "--reconstruct"
        raise KronyError(
            f"{reader} needs text like that the model is for: --calibration FILE (.txt or .jsonl), or python-docs"
        )
    check_writable(out)
    device = ranks.join(device)
    ids = None
    if calibration is not None:
        length = min(LENGTH, context_length(skeleton))
        ids = calibration_set(calibration, load_tokenizer(model), tokens=calibration_tokens, length=length, seed=seed)
        to.say(f"calibration: {ids.numel():,} tokens of {calibration}")
    original = load_model(model, dtype=dtype, device=device)
    with to.progress() as progress:
        kept = cache_folder() if cache else None
        report = compress(original, config, calibration=ids, cache=kept, progress=progress)
    if not ranks.is_first():
        return
    if report.calibration is not None:
        to.say(report.calibration)
    with fresh_folder(out) as folder:
        _save(original, model, folder, report)
    _print(to, report, out)
    to.json(report.to_json())


def _scheme_for(params: str, skeleton: PreTrainedModel, modules: str, layers: str, init: str) -> str:
    from krony.schemes import for_budget, parse_parameters
    from krony.surgery import find_groups, layout

    groups = find_groups(skeleton, modules, layers)
    return for_budget(layout(skeleton, groups), parse_parameters(params), neurons=init == "neurons")


def _preview(to: Output, skeleton: PreTrainedModel, groups: list[Group], config: KronyConfig) -> None:
    from krony.embedding import embedding_shape, is_tied
    from krony.surgery import count_parameters

    before = after = count_parameters(skeleton)
    layers, rows = [], []
    for site in (site for group in groups for site in group.sites):
        shape = site.shape(config.scheme)
        after += shape.parameters + shape.factors * config.has_scalars(shape.factors) - shape.rows * shape.columns
        layers.append(
            {"name": site.name, "left": list(shape.left), "right": list(shape.right), "factors": shape.factors}
        )
        rows.append([site.name, f"{shape.m1}x{shape.n1}", f"{shape.m2}x{shape.n2}", str(shape.factors)])
    if config.embedding is not None:
        name, shape = embedding_shape(skeleton, config.embedding)
        after += shape.parameters - (0 if is_tied(skeleton) else shape.rows * shape.columns)  # a tied head stays
        layers.append({"name": name, "left": list(shape.left), "right": list(shape.right), "factors": 1})
        rows.append([name, f"{shape.m1}x{shape.n1}", f"{shape.m2}x{shape.n2}", "1"])
    to.table(["layer", "left", "right", "factors"], rows)
    if config.allocation == "global":
        to.say("this is the budget, evenly: allocation global shares it out among the layers once it has read the text")
    to.say(f"would replace {len(layers)} matrices: {before:,} -> {after:,} parameters ({after / before:.1%})")
    to.json(
        {"scheme": config.scheme, "init": config.init, "params_before": before, "params_after": after, "layers": layers}
    )


def _save(model: PreTrainedModel, source: str, folder: Path, report: Report) -> None:
    from krony.card import model_card
    from krony.models import save

    save(model, folder, source=source)
    (folder / "README.md").write_text(model_card(source, report), encoding="utf-8")


def _print(to: Output, report: Report, out: Path) -> None:
    columns = ["layer", "left", "right", "factors", "error"]
    rows = [
        [layer.name, f"{layer.shape.m1}x{layer.shape.n1}", f"{layer.shape.m2}x{layer.shape.n2}"]
        + [str(layer.shape.factors), f"{layer.error:.3f}"]
        for layer in report.layers
    ]
    if report.calibration is not None:
        columns.append("of outputs")
        outputs = ["" if e is None else f"{e:.3f}" for e in (layer.calibrated_error for layer in report.layers)]
        rows = [[*row, error] for row, error in zip(rows, outputs, strict=True)]
    to.table(columns, rows)
    share = report.params_after / report.params_before
    to.say(f"{report.params_before:,} -> {report.params_after:,} parameters ({share:.1%}) in {report.seconds:.1f} s")
    to.say(f"{out} loads with AutoModelForCausalLM.from_pretrained once krony is imported")
