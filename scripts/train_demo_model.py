"""Train the model that the package ships: a small GPT-2, from text that anyone can get, on two cores.

    python scripts/train_demo_model.py --data-dir DIR OUT

DIR holds ``openwebtext/train.jsonl``, ``webtext/train.jsonl``, ``c4/train.jsonl`` and ``wikipedia/train.jsonl`` (one
``{"text": …}`` a line) and, to report on, ``openwebtext/val.jsonl``. The documentation that Python carries joins in,
without its held-out part. An interrupted run goes on from its last checkpoint in OUT.work; the same seed gives the same
model. OUT gets the model in half precision, its tokenizer and its card.
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
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from krony import python_docs
from krony.data import join_documents, read_file
from krony.evaluation import measure_perplexity
from krony.files import fresh_folder

TEXTS = ("openwebtext", "webtext", "c4", "wikipedia")
DOCS_REPEATS = 3  # the only text about programming, and little of it
END = "<|endoftext|>"
VOCABULARY, CONTEXT = 4096, 512
LIMIT = 12 * 1024**2  # bytes of the shipped folder
PROMPTS = ("The function returns", "The president said that", "In the summer of 1944, the")


def documents(data_dir: Path) -> list[str]:
    """All training documents: the sets under ``data_dir``, and Python's documentation several times."""
    texts = [text for name in TEXTS for text in read_file(data_dir / name / "train.jsonl")]
    return texts + python_docs.topics("calibration") * DOCS_REPEATS


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in GPT-2's way, with 4096 entries."""
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


def sequences(ids: Tensor) -> list[dict[str, Tensor]]:
    """Token ids ``(n,)`` cut into rows of the context length, each its own label."""
    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in rows]


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """GPT-2 with 6 layers of width 256."""
    end = tokenizer.eos_token_id
    config = GPT2Config(
        n_layer=6, n_embd=256, n_head=4, n_positions=CONTEXT, vocab_size=VOCABULARY,
        bos_token_id=end, eos_token_id=end, pad_token_id=end,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def train(model: GPT2LMHeadModel, rows: list[dict[str, Tensor]], work: Path, options: argparse.Namespace) -> Trainer:
    """Trains with AdamW and a cosine, in bfloat16 where the processor has it, and resumes what was interrupted."""
    arguments = TrainingArguments(
        str(work),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.1,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_steps=200,
        save_total_limit=1,
        report_to=[],
        seed=options.seed,
        data_seed=options.seed,
        dataloader_drop_last=True,
        torch_compile=options.compile,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    work.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    return trainer


def card(trainer: Trainer, tokens: int, figures: dict[str, tuple[float, int]], samples: list[str], seed: int) -> str:
    """The model card, in Markdown."""
    args = trainer.args
    seen = trainer.state.global_step * args.per_device_train_batch_size * CONTEXT
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    shown = [history[round(i * (len(history) - 1) / 11)] for i in range(12)] if len(history) > 12 else history
    curve = "\n".join(
        f"| {e['step'] * args.per_device_train_batch_size * CONTEXT / 1e6:.1f}M | {float(e['loss']):.3f} |"
        for e in shown
    )
    quality = "\n".join(f"| {name} | {count:,} | {ppl:.2f} |" for name, (ppl, count) in figures.items())
    quotes = "\n".join(f"> {text.strip()}\n".replace("\n", "\n> ").removesuffix("> ") for text in samples)
    return f"""---
library_name: transformers
license: apache-2.0
language: en
---

# krony demo

A GPT-2 of {trainer.model.num_parameters():,} parameters (6 layers, width 256, 4 heads, context {CONTEXT}, byte-level
BPE of {VOCABULARY} entries, tied head), small enough to ship with krony and trained well enough to be worth
compressing. It is an example for tools, not a model to rely on: what it writes is English, and made up.

## Training

`python scripts/train_demo_model.py --data-dir DIR OUT`, seed {seed}: {trainer.state.global_step:,} steps of
{args.per_device_train_batch_size} sequences of {CONTEXT} tokens, {seen:,} tokens in all, {seen / tokens:.1f} passes
over {tokens:,} tokens. AdamW, learning rate {args.learning_rate:g} (200 steps of warm-up, cosine to zero), weight
decay 0.1, betas 0.9 and 0.98, gradient norm at most 1, bfloat16 autocast, no dropout. The weights are stored in half
precision.

| tokens seen | training loss (mean of 50 steps) |
| ---: | ---: |
{curve}

## Data

Samples of OpenWebText (CC0 packaging), OpenAI's WebText release (MIT), C4 (ODC-BY) and Wikipedia (CC BY-SA 3.0), and
the topics of Python's `help()` (PSF licence), {DOCS_REPEATS} times, without the held-out part of `krony.python_docs`.

## Held-out perplexity

Documents joined by the end-of-text token, windows of {CONTEXT} tokens that don't overlap, every token weighing alike;
half-precision weights computed with in float32.

| data | tokens predicted | perplexity |
| --- | ---: | ---: |
{quality}

## Samples

Greedy, unedited.

{quotes}
"""


def main() -> None:
    """Reads the options and runs the whole of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early, for a trial")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
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
    trainer = train(new_model(tokenizer), rows, options.out.with_name(f"{options.out.name}.work"), options)

    with fresh_folder(options.out) as folder:
        trainer.model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        held_out = {
            "python-docs, held-out part": python_docs.topics("held-out"),
            "OpenWebText, validation sample": read_file(options.data_dir / "openwebtext" / "val.jsonl"),
        }
        figures = {}
        for name, held in held_out.items():
            ids = join_documents(held, tokenizer)
            figures[name] = measure_perplexity(model, ids, protocol="token", window=CONTEXT, stride=CONTEXT)
        samples = []
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=48, do_sample=False, repetition_penalty=1.2)
            samples.append(tokenizer.decode(output[0], skip_special_tokens=True))
        text = card(trainer, tokens, figures, samples, options.seed)
        (folder / "README.md").write_text(text, encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
        if size > LIMIT:
            raise SystemExit(f"the model takes {size:,} bytes, more than {LIMIT:,}")
    print(json.dumps({"bytes": size, "perplexity": {name: value for name, (value, _) in figures.items()}}))


if __name__ == "__main__":
    main()
