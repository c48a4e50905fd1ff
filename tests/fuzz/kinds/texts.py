"""Texts: plain, JSON lines, JSON, compressed, with marks, binary, and files that aren't regular."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from fuzz.cases import Case
from fuzz.kinds import commands
from fuzz.values import hostile, word

ENDINGS = [
    ".txt",
    ".jsonl",
    ".JSONL",
    ".ndjson",
    ".json",
    ".jl",
    ".md",
    "",
    ".txt.gz",
    ".jsonl.gz",
    ".jsonl.zst",
    ".bin",
    ".gz",
]
STARTS = [
    "\xef\xbb\xbf",
    "\xff\xfe",
    "\xfe\xff",
    "PK\x03\x04",
    "\x1f\x8b",
    "\x28\xb5\x2f\xfd",
    "PAR1",
    "\0",
    "BZh",
    "[",
    "{",
    "\r",
]


def draw(random: Random, sound: Path) -> Case:
    file = random.choice(["text.txt", "lines.jsonl", "one.json"])
    edits = random.choice([_content, _content, _bytes, _bytes, _kinds])(random, sound / file, file)
    if random.random() < 0.5:
        other = f"other{random.choice(ENDINGS)}"
        edits.append(["move", file, other])
        file = other
    return Case(kind="texts", command=commands.reading_text(random, file), edits=edits)


def _content(random: Random, path: Path, file: str) -> list:
    """Another content of the same format."""
    text = random.choice(
        [
            *("", " \n\t", "a", "\n" * 5000, "a" * 200_000, "a b " * 50_000, "\0" * 5000, "é" * 3000, "𝔘" * 1000),
            *("\x1b[31m" * 500, "<|endoftext|>" * 500, "\u2028" * 2000, "\r\n" * 3000 + "a", word(random) * 50),
        ]
    )
    if file == "text.txt":
        return [["write", file, text.encode("utf-8", "surrogatepass").decode("latin-1")]]
    objects = [{"text": text}] * random.choice([1, 2, 30]) + [
        random.choice([{"text": hostile(random)}, hostile(random)])
    ]
    random.shuffle(objects)
    lines = json.dumps(objects) if file == "one.json" else "\n".join(map(json.dumps, objects))
    return [["write", file, lines]]


def _bytes(random: Random, path: Path, file: str) -> list:
    """The same content with other bytes in it, or compressed, or both."""
    size = path.stat().st_size
    content = "".join(chr(random.randrange(256)) for _ in range(random.choice([1, 1, 4, 16])))
    change = random.choice(
        [
            ["splice", file, random.randrange(size), random.choice([0, len(content)]), content],
            ["splice", file, 0, 0, random.choice(STARTS)],
            ["splice", file, random.randrange(size), size, ""],
            ["pack", file, random.choice(["gz", "zst", "zip"])],
        ]
    )
    packed = [["pack", file, random.choice(["gz", "gz", "zst"])]] if random.random() < 0.4 else []
    more = [["splice", file, random.randrange(400), 1, content[:1]]] if packed and random.random() < 0.5 else []
    return [change, *packed, *more]


def _kinds(random: Random, path: Path, file: str) -> list:
    """What is no regular file, or an archive without end."""
    choices = [["fifo", file], ["link", file, "/dev/zero"], ["link", file, file], ["folder", file], ["remove", file]]
    choices += [["mode", file, 0], ["sparse", file, 10**6], ["link", file, "dense/config.json"]]
    return [random.choice(choices if random.random() < 0.9 else [["pack", file, "bomb"]])]
