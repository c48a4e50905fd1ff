"""Layers that reconstruction has trained, kept until the compression they belong to is complete.

Reconstruction takes most of a compression's time, so an interrupted one goes on with the next MLP. Not kept are:

- the sums of a pass over the calibration text that was stopped: gigabytes, for minutes of work. A complete pass
  is kept (``krony.compression.moments``).
- factors before their training, which take seconds.
- tuning: its state is an optimiser's over all layers at once. ``krony heal`` is the training that saves such states.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from krony.config import KronyConfig
from krony.errors import KronyError
from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear
from krony.storage.files import check_cache
from krony.storage.tensor_files import save_beside


class KeptLayers:
    """The trained layers of every group, one file each, in the folder of the moments of the same weights and text."""

    def __init__(self, moments: Path | None, config: KronyConfig, shapes: dict[str, KronShape]) -> None:
        """``moments``: the folder that keeps the second moments; None keeps nothing.

        Raises KronyError if layers will be trained, and nothing can be written there.
        """
        settings = repr((sorted(config.non_default_options().items()), sorted(shapes.items())))
        name = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()
        self.folder = None if moments is None or not config.reconstruct else moments / f"reconstructed-{name}"
        if self.folder is not None:
            check_cache(self.folder, "the layers")

    def read(self, index: int) -> dict[str, torch.Tensor] | None:
        """The trained tensors of this group; None where none are kept. Raises KronyError for a damaged file."""
        if self.folder is None:
            return None
        try:
            return load_file(self._file(index))
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            raise self._damaged(index, error) from None

    def fill(self, index: int, state: dict[str, torch.Tensor], layers: dict[str, KroneckerLinear]) -> None:
        """Gives new layers the values that ``read`` returned. Raises KronyError if they don't fit."""
        try:
            for name, layer in layers.items():
                own = {
                    key.removeprefix(f"{name}|"): value for key, value in state.items() if key.startswith(f"{name}|")
                }
                layer.load_state_dict(own)
        except RuntimeError as error:
            raise self._damaged(index, error) from None

    def _damaged(self, index: int, error: Exception) -> KronyError:
        return KronyError(f"{self._file(index)} is damaged: delete it, and krony trains these layers again ({error})")

    def save(self, index: int, layers: dict[str, KroneckerLinear]) -> None:
        """Keeps trained layers. Raises KronyError where they can't be written."""
        if self.folder is None:
            return
        state: dict[str, torch.Tensor] = {
            f"{name}|{key}": value.contiguous()
            for name, layer in layers.items()
            for key, value in layer.state_dict().items()
        }
        save_beside(state, self._file(index), "the layers")

    def clear(self) -> None:
        """Removes what was kept; the compression is complete."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index:05}.safetensors"
