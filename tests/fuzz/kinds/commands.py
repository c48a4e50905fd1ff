"""Commands that read a model, a text or a tokenizer, short enough to run thousands of times."""

from __future__ import annotations

from random import Random

SCHEME = ["--scheme", "keep=0.5", "--init", "van-loan"]
SHORT = ["--length", "16", "--epochs", "1", "--batch", "4", "--sequences", "4"]


def reading(random: Random, model: str, *, compressed: bool = False) -> list[str]:
    """A command that reads a model."""
    both = [
        *(["inspect", model], ["inspect", model, "--base", model], ["generate", model, "--prompt", "a", *few]),
        ["eval", model, "--data", "text.txt", "--max-tokens", "200"],
        ["bench", model, "--length", "8", "--context", "4", "--new-tokens", "2", "--rounds", "1"],
    ]
    heal = ["heal", model, "out", "--data", "lines.jsonl", "--max-tokens", "640", *SHORT]
    dense = [
        ["schemes", model],
        ["compress", model, "out", *SCHEME, "--dry-run"],
        *([["compress", model, "out", *SCHEME, stream] for stream in ("--stream", "--no-stream")] * 2),
        ["compress", model, "out", "--scheme", "keep=0.5", "--calibration", "text.txt", "--calibration-tokens", "256"],
        ["compress", model, "out", "--params", "8k", "--init", "prune"],
        ["frontier", model, "--calibration", "lines.jsonl", "--keep", "0.5", "--calibration-tokens", "256"],
        ["bench", model, "--random", "--length", "8", "--context", "4", "--new-tokens", "2", "--rounds", "1"],
    ]
    packed = [["export", model, "out", "--to", to] for to in ("dense", "slim", "reference")] + [heal]
    return list(random.choice(both + (packed if compressed else dense)))


few = ["--max-new-tokens", "4"]


def reading_text(random: Random, text: str) -> list[str]:
    """A command that reads a text."""
    return list(
        random.choice(
            [
                ["eval", "compressed", "--data", text, "--max-tokens", "300"],
                ["data", "prepare", text, "out", "--tokenizer", "dense", "--val-share", "0.2"],
                ["compress", "dense", "out", "--scheme", "keep=0.5", "--calibration", text],
                ["frontier", "dense", "--calibration", text, "--keep", "0.5", "--calibration-tokens", "256"],
                ["heal", "compressed", "out", "--data", text, "--max-tokens", "640", *SHORT],
                ["heal", "compressed", "out", "--data", "lines.jsonl", "--val", text, "--max-tokens", "640", *SHORT],
            ]
        )
    )


def tokenizing(random: Random, model: str) -> list[str]:
    """A command that uses the tokenizer of a dense model."""
    return list(
        random.choice(
            [
                ["generate", model, "--prompt", random.choice(["a", "all is well", "é𝔘 \t\n", "0" * 50]), *few],
                ["eval", model, "--data", "text.txt", "--max-tokens", "200"],
                ["data", "prepare", "lines.jsonl", "out", "--tokenizer", model, "--val-share", "0.2"],
                ["compress", model, "out", *SCHEME],
                ["compress", model, "out", "--scheme", "keep=0.5", "--calibration", "text.txt"],
            ]
        )
    )
