"""The settings of a training run that are not the recipe's: shared by ``krony.heal`` and the command line."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from krony.errors import KronyError
from krony.healing.recipes import MACHINE
from krony.options import option
from krony.runtime.seeds import check_seed

FROZEN = ("right", "inherited", "scalars", "embeddings")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class HealOptions:
    """What a run freezes, where it runs, and what happens to its result.

    Attributes:
        freeze: what stays as it is, a collection of words or one string with commas: ``right`` for the right factors
            (``slim`` stays exact), ``inherited`` for everything but the factors and scalars, ``scalars``,
            ``embeddings`` (and a head that is tied to them); ``none`` or an empty collection for nothing. None is the
            recipe's default: ``right``, and nothing for the paper's recipes.
        resume: continue from the last checkpoint in the work folder.
        keep_anyway: keep the trained weights even if the validation loss did not fall. Otherwise the model gets the
            weights back that it had before.
        gradient_checkpointing: compute activations again in the backward pass; needs less memory and more time.
        compile: use ``torch.compile``.
        shard: split the weights, gradients and optimiser states of the model, and the weights of the teacher, among the
            processes (FSDP2), instead of keeping them whole in each.
        device: ``cpu``, or ``cuda`` for the GPU of this process; None takes a GPU where there is one.
        seed: seed of everything random.

    Raises:
        KronyError: an unknown word in ``freeze``, an unknown device, or a seed out of range.

    Examples:
        >>> sorted(HealOptions(freeze={"right", "embeddings"}).frozen)
        ['embeddings', 'right']
    """

    freeze: Collection[str] | None = option(
        None,
        "What is frozen: right, inherited, scalars, embeddings, several with commas, or none.",
        type=str,
        show_default="right; none for the paper's recipes",
    )
    resume: bool = option(False, "Continue from the last checkpoint.")
    keep_anyway: bool = option(False, "Write OUT even if the validation loss did not fall.")
    gradient_checkpointing: bool = option(False, "Less memory, more time.", panel=MACHINE)
    compile: bool = option(False, "torch.compile the model.", panel=MACHINE)
    shard: bool = option(False, "Split weights and optimiser states among the processes.", panel=MACHINE)
    device: str | None = option(None, "cpu or cuda.", show_default="cuda where there is one", panel=MACHINE)
    seed: int = option(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        parse_freeze(self.freeze)
        check_seed(self.seed)
        if self.device is not None and self.device not in DEVICES:
            raise KronyError(
                f"device is {self.device!r}: healing takes {' or '.join(DEVICES)}, and torchrun gives each process its "
                "own GPU"
            )

    @property
    def frozen(self) -> frozenset[str]:
        """The words of ``freeze``; of None, ``right``."""
        return parse_freeze(self.freeze)


def parse_freeze(freeze: Collection[str] | None) -> frozenset[str]:
    """The words of ``freeze``, each one of ``FROZEN``; None means ``right``.

    Raises KronyError for an unknown word, or for ``none`` beside others.

    Examples:
        >>> sorted(parse_freeze("right, scalars"))
        ['right', 'scalars']
        >>> parse_freeze("none") == parse_freeze(set()) == frozenset()
        True
    """
    if freeze is None:
        return frozenset({"right"})
    words = {word.strip() for word in (freeze.split(",") if isinstance(freeze, str) else freeze)}
    for word in sorted(words):
        if word not in ("none", *FROZEN):
            raise KronyError(
                f"freeze {word!r} is unknown: it is one of none, {', '.join(FROZEN)}, or several with commas"
            )
    if "none" in words and len(words) > 1:
        raise KronyError(f"freeze is {', '.join(sorted(words))}: none stands alone, so drop it or the others")
    return frozenset(words - {"none"})


DEFAULTS = HealOptions()
