"""Speculative decoding: a small model drafts tokens, and its original keeps those that it would have chosen itself."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from krony.errors import KronyError
from krony.evaluation.spread import Comparison, compare
from krony.evaluation.workloads import alternate
from krony.models.loading import context_length
from krony.models.modes import quiet
from krony.pages import Table
from krony.runtime.progress import Progress, silent
from krony.runtime.timing import timed

PROMPTS = 4  # that are continued in each turn


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """Decoding with drafts of one length, against decoding without.

    Attributes:
        drafted: tokens that the small model proposes at a time.
        accepted: the share of them that the original keeps.
        per_pass: tokens written per pass of the original; without drafts it is 1.
        tokens_per_s: median speed.
        plain_tokens_per_s: median speed without drafts.
        ratio: speed relative to decoding without drafts, the median of the turns' ratios.
        spread: of this ratio; None with fewer than five turns.
        same: the share of tokens that are those written without drafts, up to the first that isn't. Less than 1 is
            rounding: a pass over several tokens adds in another order.
    """

    drafted: int
    accepted: float
    per_pass: float
    tokens_per_s: float
    plain_tokens_per_s: float
    ratio: float
    spread: float | None
    same: float

    def sentence(self, draft: str) -> str:
        """The verdict, or why there is none."""
        found = Comparison(self.ratio, self.spread)
        return found.sentence(f"decoding with {self.drafted} tokens drafted by {draft}", "decoding without")

    def to_json(self) -> dict[str, Any]:
        """The figures for ``--json``."""
        return asdict(self)


def check_draft(model: PreTrainedModel, draft: PreTrainedModel, tokens: int) -> None:
    """Raises KronyError unless the draft has the model's vocabulary, and takes so many tokens. Both may be on meta."""
    sizes = [one.get_input_embeddings().weight.shape[0] for one in (model, draft)]
    if sizes[0] != sizes[1]:
        raise KronyError(f"the draft knows {sizes[1]:,} tokens and the model {sizes[0]:,}: they need one vocabulary")
    if (longest := context_length(draft)) < tokens:
        raise KronyError(f"the draft takes {longest:,} tokens, and {tokens:,} are written: it needs a longer context")


def measure_drafts(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Tensor,
    *,
    lengths: Sequence[int],
    new_tokens: int,
    rounds: int,
    progress: Progress = silent,
) -> list[Drafting]:
    """Measures transformers' assisted generation, ``model.generate(assistant_model=draft)``, greedy and one prompt at a
    time (Leviathan et al. 2023; transformers accepts what equals the model's own choice).

    Args:
        model: whose tokens are written.
        draft: what proposes them; it has the same vocabulary.
        prompts: token ids ``(prompts, length)``, of text: on random tokens the two models agree less.
        lengths: how many tokens are drafted at a time, from 1; each is measured.
        new_tokens: written after each prompt.
        rounds: turns; one more comes first as a warm-up.

    Raises:
        KronyError: vocabularies that differ, or a draft that takes fewer tokens.
    """
    check_draft(model, draft, prompts.shape[1] + new_tokens)

    @torch.inference_mode()
    def write(length: int) -> Tensor:
        """The new tokens ``(prompts, new_tokens)`` with drafts of this length; 0 is without."""
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        if length:
            draft.generation_config.num_assistant_tokens = length
            options["assistant_model"] = draft
        rows = [
            model.generate(row[None], attention_mask=torch.ones_like(row[None]), pad_token_id=0, **options)
            for row in prompts.to(model.device)
        ]
        return torch.cat(rows)[:, prompts.shape[1] :]

    choices, written = [0, *lengths], prompts.shape[0] * new_tokens
    with quiet(), _constant_drafts(draft):
        plain, figures = write(0), []
        for done, length in enumerate(lengths):
            progress(done, len(lengths) + 1, f"drafts of {length}")
            with _counting(model) as passes, _counting(draft) as proposed:
                tokens = write(length)
            differ = (tokens != plain).int()
            same = float((differ.cumsum(1) == 0).float().mean())
            figures.append(((written - passes[0]) / proposed[0], written / passes[0], same))
        progress(len(lengths), len(lengths) + 1, "speed")
        seconds = alternate(choices, lambda length: timed(model.device, lambda: write(length)), rounds)
    first = written / statistics.median(seconds[0])
    return [
        Drafting(
            drafted=length, accepted=accepted, per_pass=per_pass, same=same, plain_tokens_per_s=first,
            tokens_per_s=written / statistics.median(took), **compare(seconds[0], took)._asdict(),
        )
        for length, took, (accepted, per_pass, same) in zip(lengths, seconds[1:], figures, strict=True)
    ]  # fmt: skip


def drafting_table(found: Sequence[Drafting]) -> Table:
    """A row per length of drafts, after one for decoding without."""
    columns = ["drafted at a time", "kept", "tokens per pass", "tok/s", "of plain", "same tokens"]
    if not found:
        return Table(columns, [])
    rows = [["none", "", "1.00", f"{found[0].plain_tokens_per_s:,.1f}", "1.00x", ""]]
    rows += [
        [f"{f.drafted}", f"{f.accepted:.1%}", f"{f.per_pass:.2f}", f"{f.tokens_per_s:,.1f}", f"{f.ratio:.2f}x"]
        + [f"{f.same:.1%}"]
        for f in found
    ]
    return Table(columns, rows)


@contextmanager
def _constant_drafts(draft: PreTrainedModel) -> Iterator[None]:
    """Inside the block drafts have the length that is asked for, whatever the draft's own confidence."""
    own = draft.generation_config
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
    before = {name: getattr(own, name, None) for name in names}
    own.num_assistant_tokens_schedule, own.assistant_confidence_threshold = "constant", 0.0
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(own, name, value)


@contextmanager
def _counting(model: PreTrainedModel) -> Iterator[list[int]]:
    """Counts the model's passes in the block, in the first element of the list."""
    count = [0]

    def seen(*_: Any) -> None:
        count[0] += 1

    handle = model.register_forward_pre_hook(seen)
    try:
        yield count
    finally:
        handle.remove()
