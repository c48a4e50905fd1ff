"""Folders of several weight files: the index, the files it names, what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from fuzz.cases import Case
from fuzz.kinds import commands
from fuzz.values import changes, word

INDEX = "dense/model.safetensors.index.json"
TARGETS = ["/dev/zero", "/etc/passwd", "../llama/model.safetensors", "model.safetensors.index.json", "config.json", "."]
NAMES = [
    "../llama/model.safetensors",
    "/dev/zero",
    "/dev/zero.safetensors",
    "a\0.safetensors",
    ".safetensors",
    "pytorch_model.bin",
]


def draw(random: Random, sound: Path) -> Case:
    said = json.loads((sound / INDEX).read_text())
    shards = sorted(set(said["weight_map"].values()))
    shard = f"dense/{random.choice(shards)}"
    file = random.choice([shard, INDEX, "dense/config.json", "dense/tokenizer.json", "dense/model.safetensors"])
    edits = random.choice(
        [
            changes(random, INDEX, said, more=["weight_map", "metadata"]),
            changes(random, INDEX, said, more=["weight_map", "metadata"]),
            [
                ["put", INDEX, ["weight_map", name], random.choice([*NAMES, *shards, word(random)])]
                for name in _some(random, said)
            ],
            [["put", INDEX, ["weight_map", word(random)], random.choice(shards)]],
            [["link", file, random.choice(TARGETS)]],
            [[random.choice(["fifo", "folder", "remove"]), file]],
            [
                [
                    "splice",
                    file,
                    random.randrange(1000),
                    random.choice([0, 1, 10**6]),
                    random.choice(["", "x", "\xff", "{"]),
                ]
            ],
            [["mode", file, 0]],
            [["move", shard, random.choice(["model.safetensors", "pytorch_model.bin"])]],
            [["write", f"dense/{random.choice(['adapter_config.json', 'model.safetensors', 'modeling.py'])}", "{}"]],
        ]
    )
    return Case(kind="indexes", command=commands.reading(random, "dense"), edits=edits)


def _some(random: Random, said: dict) -> list[str]:
    names = sorted(said["weight_map"])
    return random.choice([names, random.sample(names, 2)])
