"""Hostile values, and where in JSON they go."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 16, 64, 100, 257, 1000, 65_536, 10**6, 10**7, 10**8, 10**9, 2**31 - 1, 2**31, 2**40),
    *(2**63 - 1, 2**63, 10**30, 10**400, -(2**31), -(10**9), 0.0, -0.0, 0.5, 1.5, 1e-45, 1e-9, 1e9, 1e38, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
]
STRINGS = [
    *("", " ", "a", "x" * 300, "x" * 100_000, "../../etc/passwd", "/etc/passwd", "..", ".", "a/../../b", "a\\..\\b"),
    *("a\0b", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\rb", "a\nb\nc", "\u202eabc", "\ud800", "\u009b1m", "é", "𝔘"),
    *("{}", "[]", "null", "nan", "1e999", "${HOME}", "%s%n", "{0.__class__}", "'; DROP", "[bold]x[/bold]", "[/red]"),
    *("os.system", "__import__('os')", "https://127.0.0.1:1/x", "evil/code--Model", "cuda", "meta", "auto", "float8"),
    *("gelu", "silu", "eager", "flash_attention_2", "float16", "bfloat16", "int8", "linear", "yarn", "dynamic"),
    *("gpt2", "llama", "opt", "mixtral", "bert", "t5", "mamba", "krony", "gptq", "bitsandbytes", "fp8", "awq"),
]
COLLECTIONS = [
    *([], {}, [[]], [None], [0], [1, 2], [-1, 10**9], [1e308], ["a"], {"a": 1}, {"": None}, {"0": [0, 1]}, {"type": 3}),
    *([0] * 10_000, ["full_attention"] * 3, {str(n): n for n in range(2000)}, {"rope_type": "yarn", "factor": 1e9}),
]


def hostile(random: Random) -> Any:
    """A value that is of the wrong type, too large, or says what it must not."""
    pool = random.choice([NUMBERS, NUMBERS, STRINGS, COLLECTIONS, [None, True, False], ["deep"]])
    value = random.choice(pool)
    return deep(random.choice([10, 200, 900])) if value == "deep" and pool == ["deep"] else value


def deep(levels: int) -> Any:
    """Lists in lists, or maps in maps."""
    made: Any = 1
    for _ in range(levels):
        made = [made]
    return made


def word(random: Random) -> str:
    """A hostile string."""
    return random.choice(STRINGS)


def places(tree: Any, prefix: tuple[Any, ...] = (), *, most: int = 12) -> Iterator[list[Any]]:
    """The paths of the values in JSON; of a long list or map, only the first few and the last."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    for key in keys if len(keys) <= most else [*keys[: most - 1], keys[-1]]:
        yield [*prefix, key]
        yield from places(tree[key], (*prefix, key), most=most)


def changes(random: Random, file: str, tree: Any, *, more: list[str] = (), named: str = "put") -> list[list[Any]]:
    """One to three edits of a JSON file: hostile values, dropped ones, and ``more`` names that it doesn't hold yet."""
    where = [*places(tree), *([name] for name in more)]
    made = []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        path = random.choice(where)
        if random.random() < 0.1 and named == "put":
            made.append(["drop", file, path])
        else:
            made.append([named, file, path, near(random, tree, path)])
    return made


def near(random: Random, tree: Any, path: list[Any]) -> Any:
    """A hostile value, or one close to what is there."""
    inner = tree
    try:
        for key in path:
            inner = inner[key]
    except (KeyError, IndexError, TypeError):
        return hostile(random)
    if type(inner) in (int, float) and random.random() < 0.5:
        return random.choice([inner + 1, inner - 1, -inner, inner * 2, inner * 1000, inner / 2, str(inner), [inner]])
    return hostile(random)
