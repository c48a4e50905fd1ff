"""What a compression layer by layer measures on the calibration text, with one layer in memory.

The sensitivity of the loss to each group's outputs takes a gradient through the full model, layer by layer too.
Forward, each layer reads its inputs from a file and writes those of the next layer. Backward, from the last layer to
the first, each one runs on its inputs again, reads the gradient of its outputs from a file, and writes that of its
inputs.

``allocation="global"`` compares the layers' costs before any factor is computed, so the moments of all layers are kept
in files meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from krony.compression.allocation import Allocation, allocate, least_width, ranking_of
from krony.compression.moments import packed, unpacked
from krony.compression.reconstruction import Examples
from krony.errors import KronyError
from krony.init.base import Moments, Ranking
from krony.kronecker.algebra import KronShape
from krony.models.surgery import Group
from krony.runtime.progress import silent
from krony.storage.tensor_files import read_header, save_beside
from krony.streaming.blockwise import Blocks, stack_name
from krony.streaming.plan import BACKWARD, FORWARD, MOMENTS, Stream, Unit

# Files of hidden states; the sample are the sequences that measure the sensitivity.
STATES, SAMPLE, GRADIENTS = "states", "sample", "gradients"
SENSITIVITY, RANKING = "sensitivity", "ranking"


class Measurements:
    """Measures layer by layer, and keeps in ``folder`` what later units need."""

    def __init__(
        self, stream: Stream, folder: Path, ids: Tensor, read: Callable[[str], Tensor], *, device: str = "cpu"
    ) -> None:
        """Fills the embeddings of ``stream.source``.

        Args:
            ids: token ids ``(sequences, length)``.
            read: reads a tensor of the source by name.
            device: where the layers run.
        """
        self.stream, self.folder = stream, folder
        self.blocks = Blocks(
            stream.source,
            stack_name(stream.settled.groups, stream.source),
            ids,
            read,
            weighted=stream.config.token_weighting,
            gradients=stream.measures_gradients,
            device=device,
        )
        self.last = max(n for n in range(len(stream.layers)) if stream.groups_of(n))  # layer with groups

    def measure(self, unit: Unit) -> None:
        """Does a unit that precedes the factors."""
        number = unit.layer
        assert number is not None
        groups = self.stream.groups_of(number)
        if unit.task == FORWARD:
            self.blocks.forward(number, self._entering(SAMPLE, number), self._file(SAMPLE, number + 1))
        elif unit.task == BACKWARD:
            found = self.blocks.sensitivities(
                number,
                groups,
                self._entering(SAMPLE, number),
                self._file(GRADIENTS, number) if number + 1 < len(self.stream.layers) else None,
                self._file(GRADIENTS, number - 1) if any(map(self.stream.groups_of, range(number))) else None,
            )
            for index, sensitivity in enumerate(found):
                if sensitivity is None:
                    raise KronyError(f"{groups[index].sites[-1].name}: the loss of this text has no gradient there")
                self._save(SENSITIVITY, number, index, {"sensitivity": sensitivity.float().cpu()})
        else:
            least = least_width(self.stream.settled)
            for index, (group, known) in enumerate(zip(groups, self._step(number), strict=True)):
                ranking = ranking_of(self.stream.source, group, known, self.stream.config, least=least)
                self._save(MOMENTS, number, index, packed(known))
                self._save(RANKING, number, index, {"order": ranking.order, "costs": ranking.costs})
        self.blocks.release(number)

    def allocation(self) -> Allocation:
        """What every layer becomes, by a plan that allocates."""
        rankings = [
            Ranking(**self._load(RANKING, number, index))
            for number in range(self.last + 1)
            for index in range(len(self.stream.groups_of(number)))
        ]
        return allocate(self.stream.source, self.stream.settled, [], silent, rankings)

    def visits(self, number: int) -> bool:
        """Whether ``layer`` has to be called for the layer of this index."""
        return bool(self.stream.groups_of(number)) or (not self.stream.allocates and number < self.last)

    def layer(
        self, number: int, shapes: Mapping[str, KronShape]
    ) -> tuple[list[tuple[Group, Moments]], Iterator[Examples]]:
        """Reads a layer's weights; gives its groups with their moments, and their inputs, computed when asked for.

        Groups without a split in ``shapes`` are left out. The caller releases the layer.
        """
        groups = self.stream.groups_of(number)
        replaced = [group for group in groups if group.sites[0].name in shapes]
        inputs = self.blocks.examples(number, replaced, self._entering(STATES, number))
        if not self.stream.allocates:
            return list(zip(groups, self._step(number), strict=True)), inputs
        self.blocks.fill(number)
        return [(group, self._moments(number, groups.index(group), group)) for group in replaced], inputs

    def spent(self, unit: Unit) -> list[Path]:
        """The files that are needed no more once a unit is complete."""
        number = unit.layer
        if number is None:
            return []
        if unit.task == FORWARD:  # the layers below the first one with groups are not visited backward
            return [] if any(map(self.stream.groups_of, range(number + 1))) else [self._file(SAMPLE, number)]
        if unit.task == BACKWARD:
            return [self._file(SAMPLE, number), self._file(GRADIENTS, number)]
        kinds = (SENSITIVITY,) if unit.task == MOMENTS else (SENSITIVITY, MOMENTS)
        groups = range(len(self.stream.groups_of(number)))
        files = [self._of_group(kind, number, index) for kind in kinds for index in groups]
        states_stay = self.stream.allocates and self.stream.config.reconstruct and unit.task == MOMENTS
        return files if states_stay else [*files, self._file(STATES, number)]

    def _step(self, number: int) -> list[Moments]:
        """Runs a layer on the complete text; the moments of its groups. Writes the next layer's inputs if it has any
        use for them."""
        groups = self.stream.groups_of(number)
        after = self._file(STATES, number + 1) if number < self.last else None
        moments = self.blocks.step(number, groups, self._entering(STATES, number), after)
        if not self.stream.measures_gradients:
            return moments
        return [
            replace(known, sensitivity=self._load(SENSITIVITY, number, index)["sensitivity"].double())
            for index, known in enumerate(moments)
        ]

    def _moments(self, number: int, index: int, group: Group) -> Moments:
        """What ``MOMENTS`` measured of a group."""
        try:
            return unpacked(self._load(MOMENTS, number, index), group)
        except (KeyError, ValueError) as error:  # KronyError is a ValueError
            raise KronyError(f"{self._of_group(MOMENTS, number, index)} is damaged: start again ({error})") from None

    def _entering(self, kind: str, number: int) -> Path | None:
        """The file with the inputs of a layer; None for the first layer, which reads the embeddings."""
        return self._file(kind, number) if number else None

    def _file(self, kind: str, number: int) -> Path:
        """The hidden states that enter a layer, or the gradient of its outputs."""
        return self.folder / f"{kind}-{number:05}.safetensors"

    def _of_group(self, kind: str, number: int, index: int) -> Path:
        """What is kept of the group of this index in a layer."""
        return self.folder / f"{kind}-{number:05}-{index}.safetensors"

    def _save(self, kind: str, number: int, index: int, tensors: dict[str, Tensor]) -> None:
        save_beside(tensors, self._of_group(kind, number, index), "what was measured")

    def _load(self, kind: str, number: int, index: int) -> dict[str, Tensor]:
        file = self._of_group(kind, number, index)
        if not file.is_file():
            raise KronyError(f"{file} is missing, which the interrupted run left: start again, the rest is removed")
        return {entry.name: entry.read() for entry in read_header(file)}
