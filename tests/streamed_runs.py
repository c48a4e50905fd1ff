"""What tests of streaming share: a text, a run beside one in memory, and one that is interrupted at a chosen unit."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from krony import KronyConfig, compress
from krony.models.loading import load_model
from krony.models.source import ModelSource
from krony.streaming.plan import prepare
from krony.streaming.stream import run

CALIBRATED = ("neurons", "als", "svd", "flap", "wanda")


def digest(folder: Path) -> str:
    """Over names, dtypes, shapes and bytes of the tensors, sorted by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    made = hashlib.sha256()
    for name in sorted(found):
        value = found[name]
        made.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        made.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def text(rows: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 64), generator=torch.Generator().manual_seed(2))


def both_ways(source: Path, config: KronyConfig, tmp_path: Path, reads: bool = False, **options) -> tuple[Path, Path]:
    ids = text() if reads or config.init in CALIBRATED else None
    model = load_model(str(source))
    report = compress(model, config, calibration=ids)
    model.save_pretrained(tmp_path / "memory")
    plan = prepare(ModelSource.find(str(source)), config, reads=reads)
    streamed = run(plan, tmp_path / "stream", calibration=ids, **options)
    assert streamed.layers == report.layers and streamed.made_with == report.made_with
    assert (streamed.params_before, streamed.params_after) == (report.params_before, report.params_after)
    return tmp_path / "memory", tmp_path / "stream"


class Stop:
    """Progress that notes the units of the work, and stops it at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seen = at, []

    def __call__(self, done, total, what):
        self.seen.append(done)
        if done == self.at:
            raise KeyboardInterrupt
