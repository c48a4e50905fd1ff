"""Train the model that comes with krony: a small GPT-2, on two cores, from text that anyone can get.

    python scripts/train_demo_model.py --data-dir DIR OUT

DIR holds ``openwebtext/train.jsonl``, ``webtext/train.jsonl``, ``c4/train.jsonl`` and ``wikipedia/train.jsonl`` (one
``{"text": …}`` per line) and, to report on, ``openwebtext/val.jsonl``. The documentation that comes with Python is
added, without its held-out part. An interrupted run resumes from its last checkpoint in OUT.work; the same seed gives
the same model. The model in half precision, its tokenizer and its card are written to OUT. Needs torch 2.9 for Muon.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from krony.data import python_docs
from krony.data.sets import join_documents, read_file
from krony.evaluation.perplexity import measure_perplexity
from krony.storage.files import fresh_folder

TEXTS = ("openwebtext", "webtext", "c4", "wikipedia")
EVERY = 25  # steps between progress lines; a checkpoint every tenth
WARM_UP = 100  # steps
DOCS_REPEATS = 3  # the only text about programming, and little of it
END = "<|endoftext|>"
VOCABULARY, CONTEXT = 4096, 512
LIMIT = 12 * 1024**2  # bytes of the shipped folder
PROMPTS = ("The function returns", "The president said that", "In the summer of 1944, the")


def documents(data_dir: Path) -> list[str]:
    """All training documents: the sets in ``data_dir``, and Python's documentation several times."""
    texts = [text for name in TEXTS for text in read_file(data_dir / name / "train.jsonl")]
    return texts + python_docs.topics("calibration") * DOCS_REPEATS


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, with 4096 entries."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, bos_token=END, unk_token=END, model_max_length=CONTEXT
    )


def sequences(ids: Tensor) -> Tensor:
    """Token ids ``(n,)`` cut into rows of the context length: ``(n // 512, 512)``."""
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """GPT-2 with 6 layers of width 256."""
    end = tokenizer.eos_token_id
    config = GPT2Config(
        n_layer=6, n_embd=256, n_head=4, n_positions=CONTEXT, vocab_size=VOCABULARY,
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="eager",  # compiled, it takes a sixth less time on CPU than torch's fused attention
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def optimizers(model: GPT2LMHeadModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, biases and norms; steps of both have AdamW's size."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and name.startswith("transformer.h.")]
    others = [p for p in named.values() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def order(rows: int, batch: int, steps: int, seed: int) -> Tensor:
    """Which rows each step sees, ``(steps, batch)``: pass after pass over all of them, each in a new order."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(rows, generator=generator) for _ in range(-(-steps * batch // rows))]
    return torch.cat(passes)[: steps * batch].view(steps, batch)


def train(model: GPT2LMHeadModel, rows: Tensor, work: Path, options: argparse.Namespace) -> list[float]:
    """Trains in bfloat16 with a warm-up and a cosine to zero, from the last checkpoint in ``work`` if there is one.

    Returns the mean loss of every ``EVERY`` steps.
    """
    steps = options.steps
    tuned = optimizers(model, options.learning_rate)
    schedules = [get_cosine_schedule_with_warmup(o, WARM_UP, steps) for o in tuned]
    parts = {"model": model} | {f"{i}": part for i, part in enumerate([*tuned, *schedules])}
    checkpoint, first, losses, total = work / "checkpoint.pt", 0, [], torch.zeros(())
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        first, losses = saved.pop("step"), saved.pop("losses")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    forward = torch.compile(model) if options.compile else model
    model.train()
    start = time.perf_counter()
    for step, chosen in enumerate(order(len(rows), options.batch, steps, options.seed)[first:], start=first + 1):
        batch = rows[chosen]  # (batch, 512)
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*tuned, *schedules):
            part.step()
        model.zero_grad()
        total += loss.detach()
        if step % EVERY == 0:
            losses.append(total.item() / EVERY)
            total.zero_()
            pace = (time.perf_counter() - start) / (step - first)  # seconds per step
            print(
                f"step {step:,} of {steps:,}  loss {losses[-1]:.3f}  {batch.numel() / pace:,.0f} tokens/s  "
                f"{pace * (steps - step) / 60:.0f} min left",
                flush=True,
            )
        if step % (10 * EVERY) == 0 or step == steps:
            work.mkdir(parents=True, exist_ok=True)
            beside = checkpoint.with_suffix(".partial")
            torch.save(
                {name: part.state_dict() for name, part in parts.items()} | {"step": step, "losses": losses}, beside
            )
            beside.replace(checkpoint)
    return losses


def report(folder: Path, tokenizer: PreTrainedTokenizerFast, data_dir: Path) -> tuple[dict[str, tuple], list[str]]:
    """The written model's perplexities on held-out text with the number of tokens, and some samples."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = {
        "`python-docs` (its held-out part)": python_docs.topics("held-out"),
        "OpenWebText, validation sample": read_file(data_dir / "openwebtext" / "val.jsonl"),
    }
    figures = {}
    for name, texts in held_out.items():
        ids = join_documents(texts, tokenizer)
        figures[name] = measure_perplexity(model, ids, protocol="token", window=CONTEXT, stride=CONTEXT)
    samples = []
    for prompt in PROMPTS:
        torch.manual_seed(0)
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.9)
        samples.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return figures, samples


def loss_rows(losses: list[float], step: int) -> str:
    """Twelve rows of the card's table of training losses; ``step`` is in tokens."""
    shown = sorted({round(i * (len(losses) - 1) / 11) for i in range(12)})
    return "\n".join(f"| {(i + 1) * EVERY * step / 1e6:.1f}M | {losses[i]:.3f} |" for i in shown)


def card(
    model: GPT2LMHeadModel,
    losses: list[float],
    tokens: int,
    figures: dict[str, tuple[float, int]],
    samples: list[str],
    options: argparse.Namespace,
) -> str:
    """The model card, in Markdown."""
    step = options.batch * CONTEXT  # tokens
    seen = options.steps * step
    quality = "\n".join(f"| {name} | {count:,} | {ppl:.2f} |" for name, (ppl, count) in figures.items())
    quotes = "\n>\n> ---\n>\n".join("\n".join(f"> {line}".rstrip() for line in t.splitlines()) for t in samples)
    return f"""---
library_name: transformers
license: apache-2.0
language: en
---

# krony demo

A GPT-2 of {model.num_parameters():,} parameters (6 layers, width 256, 4 heads, context {CONTEXT}, byte-level BPE of
{VOCABULARY} entries, tied head), small enough to ship with krony and trained well enough to be worth compressing. It is
an example for tools, not a model to rely on: what it writes is English, and made up.

## Training

`python scripts/train_demo_model.py --data-dir DIR --compile OUT`, seed {options.seed}: {options.steps:,} steps of
{options.batch} sequences of {CONTEXT} tokens, {seen:,} tokens in total, {seen / tokens:.1f} passes over {tokens:,}
tokens. Muon for the matrices of the layers (momentum 0.95, weight decay 0.1) and AdamW for the rest (betas 0.9 and
0.95, no weight decay), both at a learning rate of {options.learning_rate:g} after {WARM_UP} steps of warm-up and on a
cosine to zero from there; gradient norm at most 1, bfloat16 autocast, no dropout. The weights are stored in half
precision.

| tokens seen | training loss (mean of {EVERY} steps) |
| ---: | ---: |
{loss_rows(losses, step)}

## Data

Samples of OpenWebText (CC0 packaging), OpenAI's WebText release (MIT), C4 (ODC-BY) and Wikipedia (CC BY-SA 3.0), and
the topics of Python's `help()` (PSF licence), {DOCS_REPEATS} times, without the held-out
part of `krony.data.python_docs`.

## Held-out perplexity

Documents joined by the end-of-text token, windows of {CONTEXT} tokens that don't overlap, by the `token` protocol; the
half-precision weights, computed in float32.

| data | tokens predicted | perplexity |
| --- | ---: | ---: |
{quality}

## Samples

Sampled at temperature 0.7 from the most likely 90 %, unedited; each begins with its prompt.

{quotes}
"""


def main() -> None:
    """Trains the model, measures it, and writes it with its card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="for the checkpoint, from which a run with the same options resumes; OUT.work by default",
    )
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile: same mathematics, other rounding")
    options = parser.parse_args()

    set_seed(options.seed)
    start = time.perf_counter()
    texts = documents(options.data_dir)
    tokenizer = train_tokenizer(texts)
    rows = sequences(join_documents(texts, tokenizer))
    tokens = len(rows) * CONTEXT
    print(f"{len(texts):,} documents, {tokens:,} tokens, {time.perf_counter() - start:.0f} s to prepare", flush=True)
    set_seed(options.seed)
    model = new_model(tokenizer)
    losses = train(model, rows, options.work or options.out.with_name(f"{options.out.name}.work"), options)

    with fresh_folder(options.out) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        figures, samples = report(folder, tokenizer, options.data_dir)
        text = card(model, losses, tokens, figures, samples, options)
        (folder / "README.md").write_text(text, encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
        if size > LIMIT:
            raise SystemExit(f"the model takes {size:,} bytes, more than {LIMIT:,}")
    print(json.dumps({"bytes": size, "perplexity": {name: value for name, (value, _) in figures.items()}}))


if __name__ == "__main__":
    main()
