"""``krony compress --within 5%``: the smallest model that keeps a promise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from krony.cli.output import Output
from krony.config import KronyConfig
from krony.options import option

if TYPE_CHECKING:
    from krony.models.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text is read, how much of it, and whether its second moments are kept."""

    calibration: str | None = option(
        None,
        "Text that calibrated inits, --reconstruct and --tune read: a text or jsonl file, python-docs, or a set on the "
        "hub. Use text similar to what the model will see in use.",
        metavar="TEXT",
    )
    calibration_tokens: int = option(49_152, "Read at most N tokens of it.", metavar="N")
    cache: bool = option(True, "Keep the second moments of the text, and use those that were kept.")


@dataclass(frozen=True, kw_only=True)
class PromiseOptions:
    """By how much the perplexity may rise, and on which text that is measured."""

    within: str | None = option(
        None,
        "Instead of a scheme: the smallest model whose perplexity rises by at most this share, measured on text held "
        "back from --calibration.",
        metavar="5%",
    )
    val: str | None = option(
        None, "With --within: measure on this text.", metavar="TEXT", show_default="what was held back"
    )


def keep_promise(
    to: Output,
    source: ModelSource,
    out: Path,
    config: KronyConfig,
    text: TextOptions,
    promise: PromiseOptions,
    *,
    device: str,
    dtype: str,
) -> None:
    """Finds the smallest size, writes it to OUT, and says what was promised and measured.

    Raises PromiseError if no size keeps the promise; OUT is then not written.
    """
    from krony.compression.model_card import model_card
    from krony.runtime.signals import interruptible
    from krony.sizing.within import compress_within, parse_within
    from krony.storage.files import cache_folder, check_writable, fresh_folder

    share = parse_within(str(promise.within))
    check_writable(out)
    source.check_saves()
    model, name = source.load(dtype=dtype, device=device), str(text.calibration)
    with interruptible(lambda: f"{out} is not written; the same command finds the second moments that were complete"):
        with to.progress() as progress:
            kept = compress_within(
                model, share, name, tokenizer=source.tokenizer, val=promise.val, config=config,
                tokens=text.calibration_tokens, cache=cache_folder() if text.cache else None, progress=progress,
            )  # fmt: skip
        assert kept.report is not None
        with fresh_folder(out) as folder:
            source.save(model, folder)
            read = f"calibrated on text of {name}; {kept.sentence()}"
            (folder / "README.md").write_text(model_card(source.name, kept.report, read), encoding="utf-8")
    table = kept.table()
    to.table(table.columns, table.rows)
    to.say(kept.report.summary())
    to.say(kept.sentence())
    to.say(f"{out} loads with AutoModelForCausalLM.from_pretrained once krony is imported")
    to.json(kept.report.to_json() | {"within": kept.to_json()})
