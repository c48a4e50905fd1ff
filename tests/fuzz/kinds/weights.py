"""Safetensors files: the header, the tensors, the bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random

from fuzz.cases import Case
from fuzz.edits import TENSORS
from fuzz.kinds import commands
from fuzz.values import NUMBERS, changes, word

ROWS = ["nan", "inf", "-inf", "1e38", "-1e38", "1e-45", "int32", "int8", "bool", "float16", "bfloat16", "float64"]
SHAPES = ["empty", "no rows", "flat", "one more dimension", "turned", "zeros", "negative", "longer", "shorter", "large"]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I8", "U8", "BOOL", "F4", "C64", "x", "", None, 3]


def draw(random: Random, sound: Path) -> Case:
    model = random.choice(["dense", "llama", "compressed", "compressed"])
    file = random.choice(sorted((sound / model).glob("*.safetensors")))
    name = str(file.relative_to(sound))
    how = random.choice([_tensors, _header, _header, _bytes])
    command = commands.reading(random, model, compressed=model == "compressed")
    return Case(kind="weights", command=command, edits=how(random, name, file))


def names(file: Path) -> dict:
    """The header of a safetensors file."""
    raw = file.read_bytes()
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


def _tensors(random: Random, name: str, file: Path) -> list:
    found = [key for key in names(file) if key != "__metadata__"]
    assert set(ROWS + SHAPES) <= set(TENSORS)
    return [
        ["tensor", name, random.choice(found), random.choice(ROWS + SHAPES)] for _ in range(random.choice([1, 1, 2]))
    ]


def _header(random: Random, name: str, file: Path) -> list:
    said = names(file)
    key = random.choice(sorted(said))
    if key == "__metadata__" or random.random() < 0.4:
        return changes(random, name, said, more=["__metadata__", word(random)], named="header")
    field, values = random.choice([("dtype", DTYPES), ("shape", _shapes(random)), ("data_offsets", _shapes(random))])
    return [["header", name, [key, field], random.choice(values)]]


def _shapes(random: Random) -> list:
    whole = [number for number in NUMBERS if isinstance(number, int)]
    return [
        [random.choice(whole) for _ in range(random.choice([0, 1, 2, 2, 2, 3, 40]))],
        [2**32, 2**32],
        [0, 2**62],
        "a",
    ]


def _bytes(random: Random, name: str, file: Path) -> list:
    size = file.stat().st_size
    head = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    start = random.randrange(random.choice([8, head, size]))
    content = "".join(chr(random.randrange(256)) for _ in range(random.choice([1, 1, 4, 8])))
    return random.choice(
        [
            [["splice", name, start, len(content), content]],
            [["splice", name, start, 0, content]],
            [["splice", name, start, size, ""]],
            [
                [
                    "splice",
                    name,
                    0,
                    8,
                    struct.pack("<Q", random.choice([0, 1, head, size, 2**40, 2**63])).decode("latin-1"),
                ]
            ],
            [["sparse", name, random.choice([size * 2, 2**33])]],
        ]
    )
