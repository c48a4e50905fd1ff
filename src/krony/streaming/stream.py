"""Compression of a model that is never in memory as a whole: from safetensors to safetensors, layer by layer.

Initialisations that look at one matrix at a time (``van-loan``, ``prune``, ``random``) hold one matrix. Where
calibration text is read (always by ``neurons``, ``als``, ``svd``; by the others to tell the errors of outputs) that is
one transformer layer and its second moments; what enters the layer is kept on disk. All else is copied piece by piece.
The tensors are those of ``krony.compress``, bit for bit.

What OUT will hold is known beforehand, so its files are laid out in ``OUT.work`` and filled layer by layer.
Interrupted, the same call goes on after the last layer that was finished; in the end the folder takes OUT's place.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from krony._version import __version__
from krony.compression.compress import CompressionReport, LayerReport, plan, replacements
from krony.compression.moments import check_ids
from krony.compression.plan import uniform_shapes
from krony.config import KronyConfig
from krony.errors import KronyError
from krony.init.base import Moments
from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear
from krony.models import loading, quantizer
from krony.models.folder_checks import check_entry
from krony.models.surgery import Group, count_parameters, put_in
from krony.runtime import distributed
from krony.runtime.hardware import memory
from krony.runtime.progress import Progress, silent
from krony.storage.journal import Journal
from krony.storage.shards import SHARD_SIZE, Shards, TensorLayout, total
from krony.storage.tensor_files import Checkpoint, Entry
from krony.streaming.blockwise import Blocks, fill, release, stack_name

AROUND = "embeddings, head and norms"


def choose(
    name: str, config: KronyConfig, *, wanted: bool | None, dtype: str, device: str, reads: bool = False
) -> Stream | None:
    """The plan for going layer by layer, or None for the way through memory.

    Args:
        reads: whether calibration text is given, whatever the initialisation needs.
        wanted: what the user says; None leaves it to the rule: a folder goes layer by layer if the initialisation takes
            each matrix for itself and no text is read, and else if its weights are more than half of the machine's
            memory.

    Raises:
        KronyError: it is wanted and can't be done, the folder is damaged, or there is no such device.
    """
    loading.check_device(device)
    folder = loading.folder_of(name)
    why = _obstacle(folder, config, device)
    if wanted and why:
        raise KronyError(f"--stream: {name} can't be compressed layer by layer: {why}")
    if wanted is False or folder is None or why:
        return None
    if wanted is None and (reads or not config.initialisation.per_matrix) and 2 * Checkpoint(folder).bytes <= memory():
        return None
    return prepare(folder, config, dtype=loading.wanted_dtype(name, dtype), reads=reads)


def _obstacle(folder: Path | None, config: KronyConfig, device: str = "cpu") -> str | None:
    """Why a compression can't go layer by layer, in words; None if it can."""
    if folder is None:
        return "it takes a folder, so fetch the model first (hf download NAME --local-dir FOLDER)"
    if config.allocation == "global":
        return "--allocation global needs the gradient through the whole model"
    for option in ("reconstruct", "tune"):
        if getattr(config, option):
            return f"--{option} needs the gradient through the whole model"
    if config.embedding is not None:
        return "--embedding unties the head, which is beyond the layers"
    if config.reinit:
        return "--reinit draws the whole model anew"
    if device == "auto":
        return "--device auto spreads the whole model"
    if distributed.count() > 1:
        return "one process does it, and these are many"
    model_config = loading.load_config(str(folder))
    if getattr(model_config, "quantization_config", None) is not None:
        return "it is compressed already"
    if _file_names(loading.empty_model(model_config)) is None:
        return f"transformers rearranges the tensors of a {model_config.model_type} while it loads them"
    return None


@dataclass
class Stream:
    """A compression that is planned and not yet run. ``prepare`` makes it."""

    folder: Path
    config: KronyConfig
    source: PreTrainedModel  # on the meta device, and so is the next one
    target: PreTrainedModel
    entries: dict[str, Entry]  # of the source model's tensors
    shapes: dict[str, KronShape]
    groups: list[Group]
    layout: TensorLayout  # of what is written, by the target model's names
    names: dict[str, str]  # and what the files call it
    params: tuple[int, int]  # before and after
    reads: bool  # whether it goes through calibration text

    @property
    def read_bytes(self) -> int:
        return sum(entry.bytes for entry in set(self.entries.values()))  # tied names lead to one

    @property
    def write_bytes(self) -> int:
        return total(self.layout)

    def kept_bytes(self, tokens: int) -> int:
        """What ``OUT.work`` holds besides: the hidden states that enter a layer and those that leave it."""
        if not self.reads:
            return 0
        return 2 * tokens * self.source.get_input_embeddings().weight.shape[1] * self.source.dtype.itemsize

    @property
    def memory_bytes(self) -> int:
        """About how much memory the run needs at its height, the libraries included."""
        working = working_memory(self.groups, self.source.dtype.itemsize, self.reads)
        if not self.reads:
            return working
        layers = [_bytes_of(self.source.get_submodule(name)) for name in self._layers()]
        table = _bytes_of(self.source.get_input_embeddings())
        return max(layers) + max(working, table + LIBRARIES)  # the embeddings are needed before any moments are used

    def units(self) -> list[str]:
        """What is done one after the other: every layer by name, then all the rest."""
        return [*self._layers(), AROUND]

    def _layers(self) -> list[str]:
        inside = [group for group in self.groups if group.layer is not None or self.reads]
        if not inside:
            return []
        stack = stack_name(inside, self.source)
        return [f"{stack}.{n}" for n in range(len(self.source.get_submodule(stack)))]  # type: ignore[arg-type]


LIBRARIES = 600 * 1000**2  # bytes of a Python that has imported torch and transformers


def working_memory(groups: list[Group], itemsize: int, calibrated: bool) -> int:
    """About what computing the factors takes besides the weights, in bytes, the libraries included."""
    sites = [site for group in groups for site in group.sites]
    matrix = max(site.out_features * site.in_features for site in sites)
    if not calibrated:
        return LIBRARIES + (4 * 8 + 2 * itemsize) * matrix  # W, what it is rearranged into, its approximation; float64
    wide = max(site.in_features for site in sites)
    return LIBRARIES + 4 * 8 * wide**2 + 3 * 8 * matrix  # second moments, their inverse, and updates; float64


def _bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def prepare(folder: Path, config: KronyConfig, *, dtype: str | torch.dtype = "auto", reads: bool = False) -> Stream:
    """Reads the headers of the model in ``folder`` and settles what will be written. Raises KronyError.

    ``reads`` says that calibration text will be given although the initialisation doesn't need it.
    """
    if why := _obstacle(folder, config):
        raise KronyError(f"{folder} can't be compressed layer by layer: {why}")
    checkpoint = Checkpoint(folder)
    model_config = loading.load_config(str(folder))
    model_config.dtype = _dtype(dtype, model_config.dtype, checkpoint)
    source, target = loading.empty_model(model_config).eval(), loading.empty_model(model_config)
    groups = plan(source, config)
    entries = _entries(source, checkpoint)
    shapes = uniform_shapes(groups, config)
    for name, shape in shapes.items():
        old: Any = source.get_submodule(name)
        new = KroneckerLinear(
            shape,
            bias=old.bias is not None,
            scalars=config.has_scalars(shape.factors),
            device="meta",
            dtype=old.weight.dtype,
        )
        put_in(target, name, new)
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in _saved(target).items()}
    params = count_parameters(source), count_parameters(target)
    names, reads = _file_names(target) or {}, reads or config.initialisation.needs_text
    stream = Stream(folder, config, source, target, entries, shapes, groups, layout, names, params, reads)
    stream.units()  # there is one stack of layers
    return stream


def run(
    stream: Stream,
    out: Path,
    *,
    calibration: Tensor | None = None,
    device: str = "cpu",
    shard_size: int = SHARD_SIZE,
    finish: Callable[[Path, CompressionReport], None] = lambda folder, report: None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda sentence: None,
) -> CompressionReport:
    """Compresses the model and writes it to ``out``.

    Args:
        calibration: token ids ``(sequences, length)``, where the plan says that text is read.
        device: where layers are run and factors computed.
        shard_size: bytes of tensors a file, about.
        finish: puts tokenizer, card and the like into the folder before it takes its place.
        say: told where an interrupted run is taken up.

    Raises:
        KronyError: bad input, and then nothing is left. KeyboardInterrupt and a killed process leave ``OUT.work``, from
        which the same call goes on.
    """
    start = time.perf_counter()
    config = stream.config
    if stream.reads != (calibration is not None):
        raise KronyError(
            f"init {config.init} needs calibration text: give calibration="
            if stream.reads
            else "calibration text is given, and the plan was made without: prepare(…, reads=True)"
        )
    if calibration is not None:
        check_ids(calibration, stream.source)
    journal = Journal(out, _key(stream, calibration, shard_size))
    journal.open()
    try:
        folder = journal.folder / "model"
        shards = Shards(folder, {stream.names[name]: one for name, one in stream.layout.items()}, shard_size)
        if not (journal.done and shards.exist()):
            journal.restart()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            shards.create()
        if journal.done:
            say(f"going on after {journal.done[-1]['unit']}, unit {len(journal.done)} of {len(stream.units())}")
        for unit, made in _work(stream, journal, shards, calibration, device, progress):
            shards.sync()
            journal.note({"unit": unit, "layers": [report.to_json() for report in made]})
        reports = [LayerReport.from_json(one) for line in journal.done for one in line["layers"]]
        order = {site.name: n for n, site in enumerate(s for g in stream.groups for s in g.sites)}
        reports.sort(key=lambda report: order[report.name])
        before, after = stream.params
        vars(stream.target.config).pop("quantization_config", None)  # of an earlier run of this plan
        quantizer.attach_quantizer(
            stream.target, config, calibration.numel() if calibration is not None and config.needs_text_for else None
        )
        made_with = stream.target.config.quantization_config.made_with
        seconds = time.perf_counter() - start
        report = CompressionReport(config.scheme, config.init, before, after, seconds, reports, made_with=made_with)
        _describe(stream, folder)
        finish(folder, report)
        journal.publish(folder)
        return report
    except KeyboardInterrupt:
        journal.close() if journal.done else journal.remove()
        raise
    except BaseException:
        journal.remove()
        raise


def _work(
    stream: Stream, journal: Journal, shards: Shards, ids: Tensor | None, device: str, progress: Progress
) -> Iterator[tuple[str, list[LayerReport]]]:
    """Fills the shards unit by unit, from the first that is not done, and yields each when it is written."""
    units = stream.units()
    first = len(journal.done)
    last = max((n for n, unit in enumerate(units[:-1]) if _groups_of(stream, unit, units)), default=-1)
    blocks: Blocks | None = None
    read = _reader(stream)
    for number, unit in enumerate(units[first:], start=first):
        progress(number, len(units), unit)
        groups = _groups_of(stream, unit, units)
        made: list[LayerReport] = []
        if stream.reads and number <= last:
            if blocks is None:
                assert ids is not None
                blocks = Blocks(
                    stream.source,
                    unit.rpartition(".")[0],
                    ids,
                    read,
                    weighted=stream.config.token_weighting,
                    device=device,
                )
            before = _states(journal, number) if number else None
            after = None if number == last else _states(journal, number + 1)
            made += _replace_all(stream, groups, blocks.step(number, groups, before, after), shards)
            blocks.release(number)
        else:
            for group in groups:
                for part in _parts(group, stream.config):
                    for site in part.sites:
                        fill(stream.source, site.name, read, device)
                    made += _replace(stream, part, None, shards)
                    for site in part.sites:
                        release(stream.source, site.name)
        for name in stream.layout:
            if _owner(name, units) == unit and name in stream.entries and not _is_replaced(name, stream):
                _copy(stream, name, shards)
        yield unit, made
        if stream.reads and number:
            _states(journal, number).unlink(missing_ok=True)


def _parts(group: Group, config: KronyConfig) -> list[Group]:
    """A group, matrix by matrix where the initialisation takes each for itself."""
    return [Group((site,)) for site in group.sites] if config.initialisation.per_matrix else [group]


def _replace_all(stream: Stream, groups: list[Group], moments: Iterable[Moments], shards: Shards) -> list[LayerReport]:
    """Writes the new layers of all groups; nothing holds their moments afterwards, which are as large as the next."""
    return [
        report
        for group, known in zip(groups, moments, strict=True)
        for report in _replace(stream, group, known, shards)
    ]


def _replace(stream: Stream, group: Group, moments: Any, shards: Shards) -> list[LayerReport]:
    """Writes the new layers of a group, whose old ones are filled."""
    reports = []
    with torch.no_grad():
        for name, new in replacements(stream.source, group, stream.shapes, stream.config, moments).items():
            for key, value in new.layer.state_dict().items():
                shards.put(stream.names[f"{name}.{key}"], value)
            reports.append(new.report)
    return reports


def _copy(stream: Stream, name: str, shards: Shards) -> None:
    """Writes a tensor that stays, piece by piece."""
    entry, dtype = stream.entries[name], stream.layout[name][0]
    at = 0
    for piece in entry.pieces():
        piece = piece.to(dtype)
        _check_finite(entry, piece)
        shards.put(stream.names[name], piece, at=at)
        at += len(piece)


def _reader(stream: Stream) -> Callable[[str], Tensor]:
    """Reads tensors of the source model by name, in the model's dtype. Raises KronyError for one that isn't finite."""
    wanted = stream.source.state_dict()

    def read(name: str) -> Tensor:
        entry = stream.entries[name]
        value = entry.read().to(wanted[name].dtype)
        _check_finite(entry, value)
        return value

    return read


def _check_finite(entry: Entry, values: Tensor) -> None:
    if values.is_floating_point() and not torch.isfinite(values).all():
        why = "" if values.dtype == entry.dtype else f" in {str(values.dtype).removeprefix('torch.')}"
        raise KronyError(f"{entry.file}: {entry.name} has values that are not finite{why}")


def _is_replaced(name: str, stream: Stream) -> bool:
    return name.rpartition(".")[0] in stream.shapes


def _owner(name: str, units: list[str]) -> str:
    return next((unit for unit in units if name.startswith(f"{unit}.")), AROUND)


def _groups_of(stream: Stream, unit: str, units: list[str]) -> list[Group]:
    return [group for group in stream.groups if _owner(f"{group.sites[0].name}.", units) == unit]


def _states(journal: Journal, number: int) -> Path:
    """The file with the hidden states that enter the layer of this number."""
    return journal.folder / f"enters-{number:05}.safetensors"


def _saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """What ``save_pretrained`` would write of a model: of tied weights the one that the others are tied to."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or [])
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    spare = {name for names in owners.values() if len(names) > 1 for name in names if name in tied}
    return {name: value for name, value in model.state_dict().items() if name not in spare | ignored}


def _file_names(model: PreTrainedModel) -> dict[str, str] | None:
    """What ``save_pretrained`` calls each tensor of a model; None where it does more than to rename them."""
    changes = get_model_conversion_mapping(model, add_legacy=False)
    if not all(isinstance(change, WeightRenaming) for change in changes):
        return None
    tensors = model.state_dict()
    if not changes:
        return {name: name for name in tensors}
    return {name: next(iter(revert_weight_conversion(model, {name: value}))) for name, value in tensors.items()}


def _entries(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Entry]:
    """Where each tensor of the model lies, by the model's names. Raises KronyError for one that lies nowhere."""
    prefix, renamed = f"{model.base_model_prefix}.", _file_names(model) or {}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    same = {name: names for names in owners.values() for name in names}
    found = {}
    for name, value in model.state_dict().items():
        own = [name, *(other for other in same.get(name, []) if other != name)]
        called = [n for other in own for n in (other, renamed.get(other, other))]
        there = [n for other in called for n in (other, other.removeprefix(prefix)) if n in checkpoint.entries]
        if not there:
            raise KronyError(f"{checkpoint.folder}: the weights are incomplete: there is no {name}")
        entry = checkpoint.entries[there[0]]
        check_entry(entry, value)
        found[name] = entry
    return found


def _dtype(wanted: str | torch.dtype, configured: Any, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that loading would give: the wanted one, the config's, or that of the first tensor with a fraction."""
    dtype = loading.parse_dtype(wanted)
    if isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(configured, torch.dtype):
        return configured
    return next((e.dtype for e in checkpoint.entries.values() if e.dtype.is_floating_point), torch.float32)


def _describe(stream: Stream, folder: Path) -> None:
    """Writes config.json and generation_config.json as ``save_pretrained`` does."""
    config = stream.target.config
    config.dtype = str(stream.target.dtype).removeprefix("torch.")
    config.architectures = [type(stream.target).__name__]
    config.save_pretrained(folder)
    generation = stream.target.generation_config
    if (stream.folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(stream.folder)
    generation.save_pretrained(folder)


def _key(stream: Stream, ids: Tensor | None, shard_size: int) -> dict[str, Any]:
    """What makes two runs the same job: files (by size and time), settings, text, and what computes."""
    files = sorted({entry.file for entry in stream.entries.values()})
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = None if ids is None else hashlib.blake2b(ids.numpy().tobytes(), digest_size=16).hexdigest()
    return {
        "source": str(stream.folder.resolve()),
        "files": hashlib.blake2b(repr(seen).encode(), digest_size=16).hexdigest(),
        **asdict(stream.config),
        "dtype": str(stream.source.dtype),
        "calibration": text,
        "shard_size": shard_size,
        "krony": __version__,
    }
