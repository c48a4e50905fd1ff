"""Where results go: OUT, ``--json`` and ``--plot`` as names that are taken, too long, no text, links or pipes."""

from __future__ import annotations

from pathlib import Path
from random import Random

from fuzz.cases import Case
from fuzz.kinds import commands

NAMES = [
    *("out", "out/", "./out", "out/deep/er", ".", "..", "/", "", " ", "out\n", "out\x1b[31m", "out\udcff", "x" * 256),
    *("x" * 5000, "a/" * 3000, "~", "dense", "dense/out", "text.txt", "text.txt/out", "dense/config.json"),
    *("/dev/null", "/dev/null/out", "/proc/out", "/dev/stdout", "/sys/out", "out.work", ".out.lock", "-", "out.json"),
    *("link", "link/out", "pipe", "full", "empty", "locked", "locked/out", "out.svg", "é", "𝔘", "con", "out.pt"),
]
EDITS = [
    *(["link", "link", "nowhere"], ["link", "link", "empty"], ["link", "link", "link"], ["link", "out", "dense"]),
    *(["link", "out", "nowhere"], ["fifo", "pipe"], ["fifo", "out"], ["folder", "empty"], ["folder", "out"]),
    *(["write", "full/file", "x"], ["write", "out/file", "x"], ["write", "out", "x"], ["folder", "locked"]),
    *(
        ["write", ".out.lock", "x"],
        ["write", ".out.holder", "\xff"],
        ["folder", ".out.lock"],
        ["folder", ".out.holder"],
    ),
    *(
        ["write", "out.work/journal.json", "{"],
        ["write", "out.work", "x"],
        ["folder", "out.work"],
        ["fifo", "out.work"],
    ),
    *(["link", "out.work", "dense"], ["write", "out.work/plan.json", "[]"], ["link", ".out.lock", "text.txt"]),
    *(["write", "out/prepare.json", '{"parts": 3}'], ["write", "out/train.bin", "x"], ["folder", "out/prepare.json"]),
    *(["write", "out/prepare.json", "[" * 5000], ["mode", "locked", 0o500], ["fifo", ".out.holder"]),
    *(
        ["write", ".out.json.partial", "x"],
        ["folder", ".out.json.partial"],
        ["folder", "out.json"],
        ["link", "out.json", "/dev/full"],
    ),
]


def draw(random: Random, sound: Path) -> Case:
    out = random.choice(["out", random.choice(NAMES)])
    command = random.choice(
        [
            *([["compress", "dense", out, *commands.SCHEME, stream] for stream in ("--stream", "--no-stream")]),
            ["compress", "dense", out, "--scheme", "keep=0.5", "--calibration", "text.txt"],
            *([["export", "compressed", out, "--to", to] for to in ("dense", "slim", "reference")]),
            ["import", "checkpoint.pt", out, "--like", "dense"],
            ["data", "prepare", "lines.jsonl", out, "--tokenizer", "dense", "--val-share", "0.2"],
            ["heal", "compressed", out, "--data", "lines.jsonl", "--max-tokens", "640", *commands.SHORT],
            ["heal", "compressed", out, "--data", "lines.jsonl", "--max-tokens", "640", *commands.SHORT, "--resume"],
            ["inspect", "compressed", "--plot", out if out.endswith(".svg") else f"{out}.svg"],
        ]
    )
    command = list(command)
    if random.random() < 0.4:
        command += [f"--json={random.choice([*NAMES, 'out/figures.json'])}"]
    return Case(kind="outs", command=command, edits=random.sample(EDITS, random.choice([0, 1, 1, 2])))
