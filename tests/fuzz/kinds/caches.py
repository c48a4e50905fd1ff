"""Files in the cache of calibrations, which may be damaged or come from elsewhere."""

from __future__ import annotations

from pathlib import Path
from random import Random

from fuzz.cases import Case
from fuzz.edits import TENSORS
from fuzz.kinds.weights import ROWS, SHAPES, names
from fuzz.values import changes

COMMAND = ["compress", "dense", "out", "--scheme", "keep=0.5", "--calibration", "text.txt", "--no-stream"]


def draw(random: Random, sound: Path) -> Case:
    file = random.choice(sorted((sound / "cache").rglob("*.safetensors")))
    name = f"cache/*/{file.name}"  # the folder is named after weights and version
    size = file.stat().st_size
    content = "".join(chr(random.randrange(256)) for _ in range(random.choice([1, 4, 8])))
    tensor = ["tensor", name, random.choice(sorted(set(names(file)) - {"__metadata__"})), random.choice(ROWS + SHAPES)]
    assert tensor[-1] in TENSORS
    edits = random.choice(
        [
            *([tensor], [tensor]),
            changes(random, name, names(file), named="header"),
            [["splice", name, random.randrange(size), len(content), content]],
            [["splice", name, random.randrange(size), size, ""]],
            [random.choice([["folder", name], ["fifo", name], ["link", name, "/dev/zero"], ["mode", name, 0]])],
            [["remove", "cache/moments-*"], ["write", f"cache/{file.parent.name}", "x"]],
            [["sparse", name, random.choice([size + 8, 2**33])]],
        ]
    )
    more = random.choice([[], [], ["--init", "als"], ["--init", "svd"], ["--allocation", "global"], ["--stream"]])
    return Case(kind="caches", command=[*COMMAND[: -1 if more == ["--stream"] else None], *more], edits=edits)
