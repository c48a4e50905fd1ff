"""Options of measurements, shared by Python and the command line. Needs no torch, so that ``--help`` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krony.errors import KronyError
from krony.options import option
from krony.runtime.seeds import check_seed

PROTOCOLS = ("paper", "token")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How perplexity is measured; the keywords of ``krony.evaluate``.

    Attributes:
        data_dir: folder that holds the named sets; None reads them from the hub.
        protocol: ``paper`` is the mean over windows, ``token`` the mean over tokens.
        window: tokens per window; None for the model's context, at most 1024.
        stride: tokens between the starts of two windows; None for the window, so that windows don't overlap.
        max_tokens: use the first N tokens of each set; None uses all.

    Raises:
        KronyError: an unknown protocol, or a number that is too small.

    Examples:
        >>> EvaluationOptions(protocol="token").window is None
        True
    """

    data_dir: Path | None = option(
        None, "Read named data sets from DIR (DIR/wikitext-2/…) instead of the hub.", metavar="DIR"
    )
    protocol: str = option("paper", "paper: mean over windows. token: mean over tokens.")
    window: int | None = option(None, "Tokens per window.", metavar="N", show_default="the context, at most 1024")
    stride: int | None = option(None, "Tokens between windows.", metavar="N", show_default="the window")
    max_tokens: int | None = option(None, "Use the first N tokens of each set.", metavar="N", show_default="all")

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise KronyError(f"protocol {self.protocol!r} is unknown: it is {' or '.join(PROTOCOLS)}")
        if self.window is not None and self.window < 2:
            raise KronyError(f"a window of {self.window} tokens: at least 2 are needed to predict one")
        if self.stride is not None and self.stride < 1:
            raise KronyError(f"a stride of {self.stride} tokens: it takes a number from 1 to the window")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise KronyError(f"max_tokens is {self.max_tokens}: at least 2 are needed to predict one")


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """What ``krony bench`` measures.

    Attributes:
        batch: sequences per prefill and per training step.
        length: tokens per sequence in prefill and training. Prefill fills the cache and computes the logits of the last
            token.
        context: tokens before the decoded ones.
        new_tokens: tokens decoded one at a time, in one sequence.
        rounds: turns of each model; one more comes first as a warm-up.
        train: also measure a training step: forward, backward, AdamW.
        compiled: run the models through ``torch.compile``.
        seed: seed of the token ids.
        batches: prefill is also measured at each of these batch sizes.
        lengths: prefill is also measured at each of these lengths.

    Raises:
        KronyError: a number below 1.

    Examples:
        >>> SpeedSettings(rounds=3).length
        512
    """

    batch: int = option(1, "Sequences per prefill and per training step.", metavar="N")
    length: int = option(512, "Tokens per sequence in prefill and training.", metavar="N")
    context: int = option(64, "Tokens before those that are decoded.", metavar="N")
    new_tokens: int = option(64, "Tokens that are decoded one at a time.", metavar="N")
    rounds: int = option(
        9, "Turns of each model; the figures are medians, and more turns narrow the spread.", metavar="N"
    )
    train: bool = option(True, "Measure a training step too.")
    compiled: bool = option(False, "Run the models through torch.compile.", flag="compile")
    seed: int = option(0, "Seed of everything random.", metavar="N")
    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "length", "context", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise KronyError(f"{name} is {getattr(self, name)}: it takes a number from 1")
        check_seed(self.seed)
        if min((1, *self.batches, *self.lengths)) < 1:
            raise KronyError("batches and lengths of the sweep take numbers from 1")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is measured."""
        return max(self.length, self.context + self.new_tokens, *self.lengths, 0)

    @property
    def sweep(self) -> list[tuple[int, int]]:
        """The batch sizes and lengths at which prefill is also measured."""
        if not (self.batches or self.lengths):
            return []
        batches, lengths = self.batches or (self.batch,), self.lengths or (self.length,)
        return [(batch, length) for batch in batches for length in lengths]


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """Speculative decoding, as ``krony bench`` measures it.

    Attributes:
        draft: the model that drafts tokens; None measures nothing.
        draft_tokens: how many are drafted at a time, as numbers with commas between them.
        draft_text: text whose beginnings are continued; of ``python-docs`` the held-out part.

    Raises:
        KronyError: ``draft_tokens`` are no numbers from 1, or there is no draft to which an option belongs.
    """

    draft: str | None = option(
        None, "Also measure how the first model decodes with tokens that this one drafts.", metavar="MODEL"
    )
    draft_tokens: str = option("1,2,4", "With --draft: tokens drafted at a time.", metavar="N,N,…")
    draft_text: str = option("python-docs", "With --draft: text whose beginnings are continued.", metavar="TEXT")

    def __post_init__(self) -> None:
        numbers("--draft-tokens", self.draft_tokens)
        if self.draft is None:
            for name in ("draft_tokens", "draft_text"):
                if getattr(self, name) != getattr(type(self), name):
                    raise KronyError(
                        f"--{name.replace('_', '-')} works with --draft, which names the model that drafts"
                    )

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of ``draft_tokens``."""
        return numbers("--draft-tokens", self.draft_tokens)


def numbers(option: str, text: str | None) -> tuple[int, ...]:
    """The numbers in the text of an option, each once. Raises KronyError for what is no number from 1.

    Examples:
        >>> numbers("--sweep-batches", "1,4,4")
        (1, 4)
    """
    if text is None:
        return ()
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise KronyError(f"{option} {text!r}: it takes numbers from 1, such as 1,4,16")
    return found
