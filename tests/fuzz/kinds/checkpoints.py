"""``.pt`` files for ``krony import``: tensors, names, the pickle's opcodes, the zip archive."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.cases import Case
from fuzz.edits import TENSORS
from fuzz.values import NUMBERS, word

FILE = "checkpoint.pt"
NAMES = [
    "module.",
    "_orig_mod.",
    "transformer.h.0.mlp.c_fc_0",
    "transformer.h.999999999.attn.c_attn.weight",
    "lm_head.weight",
]
OPCODES = [
    ".",
    "0",
    "1",
    "2",
    "(",
    ")",
    "]",
    "}",
    "N",
    "R",
    "b",
    "c",
    "i",
    "o",
    "Q",
    "P",
    "s",
    "u",
    "e",
    "h",
    "j",
    "\x80",
    "\x88",
]


class Loud:
    """A pickle that says so when it is read."""

    def __reduce__(self):
        return exec, ("open('/tmp/krony-was-here', 'w')",)


def draw(random: Random, sound: Path) -> Case:
    how = random.choice([_tensors, _tensors, _names, _opcodes, _opcodes, _archive, _bytes, _others])
    out = ["import", FILE, "out", "--like", random.choice(["dense", "dense", "dense", "compressed", "llama"])]
    return Case(kind="checkpoints", command=out, edits=how(random, sound / FILE))


def _tensors(random: Random, file: Path) -> list:
    names = list(torch.load(file))
    return [
        ["tensor", FILE, random.choice(names), random.choice(list(TENSORS))] for _ in range(random.choice([1, 1, 2]))
    ]


def _names(random: Random, file: Path) -> list:
    name = random.choice(list(torch.load(file)))
    other = random.choice(
        [*NAMES, word(random), name.replace("0", random.choice(["1", "7", "1000000", "-1", "٣"])), name[:-1]]
    )
    return [["rename", FILE, name, random.choice([other, random.choice(NAMES[:2]) + name])]]


def _opcodes(random: Random, file: Path) -> list:
    made = []
    for _ in range(random.choice([1, 1, 3])):
        content = random.choice([random.choice(OPCODES), _number(random), "".join(random.choices(OPCODES, k=4))])
        made.append(["opcodes", FILE, random.randrange(10_000), random.choice([0, 1, len(content)]), content])
    return made


def _number(random: Random) -> str:
    """A number as a pickle has it."""
    number = random.choice([n for n in NUMBERS if isinstance(n, int)])
    return pickle.dumps(number, protocol=2)[2:-1].decode("latin-1")


def _archive(random: Random, file: Path) -> list:
    with zipfile.ZipFile(file) as archive:
        name = random.choice(archive.namelist())
        size = archive.getinfo(name).file_size
    content = random.choice([None, "", "x", "\0" * size, "\xff" * size, "\0" * (size + 64), "big"])
    return random.choice(
        [
            [["member", FILE, name, content, random.choice([True, False])]],
            [["member", FILE, random.choice(["archive/data/../../x", "/etc/x", "checkpoint/a\0b", "x" * 60_000]), "x"]],
            [["member", FILE, "checkpoint/byteorder", random.choice(["big", "little", "", "x" * 100])]],
        ]
    )


def _bytes(random: Random, file: Path) -> list:
    size = file.stat().st_size
    content = "".join(
        chr(random.choice([0, 1, 255, random.randrange(256)])) for _ in range(random.choice([1, 2, 4, 8]))
    )
    tail = size - random.randrange(1, min(size, 4000))  # the archive's directory
    start = random.choice([random.randrange(size), tail, tail])
    return random.choice([[["splice", FILE, start, len(content), content]], [["splice", FILE, start, size, ""]]])


def _others(random: Random, file: Path) -> list:
    """No checkpoint at all, or something else than a dictionary of tensors."""
    made: Any = random.choice(
        [
            *(
                [["write", FILE, pickle.dumps(Loud()).decode("latin-1")]],
                [["pack", FILE, "zip"]],
                [["pack", FILE, "gz"]],
            ),
            *(
                [["fifo", FILE]],
                [["link", FILE, "/dev/zero"]],
                [["folder", FILE]],
                [["write", FILE, ""]],
                [["remove", FILE]],
            ),
            *(
                [["opcodes", FILE, 0, 10**9, pickle.dumps(thing, protocol=2).decode("latin-1")]]
                for thing in _things(random)
            ),
        ]
    )
    return made


def _things(random: Random) -> list[Any]:
    whole = {"transformer.h.0.mlp.c_fc_0": random.choice(NUMBERS)}
    return [
        Loud(),
        whole,
        {"model": whole},
        [1, 2],
        {},
        None,
        {"model": {"model": {}}},
        {3: 4},
        "a" * 10_000,
        {"model": Loud()},
    ]
