"""tokenizer.json and tokenizer_config.json: steps that multiply a text, expressions, ids, names of files."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz.cases import Case
from fuzz.kinds import commands
from fuzz.values import NUMBERS, changes, hostile, word

PATTERNS = [
    "",
    ".",
    "(a+)+$",
    "(.*)*",
    "(?=",
    "[",
    "\\s+",
    "a{1000}{1000}",
    "(?i)(x|y)*z",
    "\\p{L}",
    "(?<n>a)\\k<n>",
    "a|b",
]
KINDS = [
    "Sequence",
    "Replace",
    "Prepend",
    "NFC",
    "NFKD",
    "Lowercase",
    "Strip",
    "Precompiled",
    "ByteLevel",
    "BertNormalizer",
]
SPLITS = ["Split", "Digits", "Whitespace", "Metaspace", "ByteLevel", "Punctuation", "CharDelimiterSplit", "FixedLength"]
MODELS = ["BPE", "WordPiece", "WordLevel", "Unigram", "X"]
MORE = ["truncation", "padding", "normalizer", "post_processor", "decoder", "pre_tokenizer", "added_tokens", "version"]
CONFIG = [
    *(
        "model_max_length",
        "tokenizer_class",
        "chat_template",
        "extra_special_tokens",
        "added_tokens_decoder",
        "auto_map",
    ),
    *("padding_side", "truncation_side", "clean_up_tokenization_spaces", "bos_token", "unk_token", "add_bos_token"),
    *("add_prefix_space", "split_special_tokens", "backend", "vocab_file", "name_or_path", "legacy", "pad_token"),
]


def draw(random: Random, sound: Path) -> Case:
    how = random.choice([_generic, _steps, _steps, _sizes, _config])
    return Case(kind="tokenizers", command=commands.tokenizing(random, "dense"), edits=how(random, sound))


def _generic(random: Random, sound: Path) -> list:
    file = "dense/tokenizer.json"
    return changes(random, file, json.loads((sound / file).read_text()), more=MORE)


def _config(random: Random, sound: Path) -> list:
    file = "dense/tokenizer_config.json"
    edits = changes(random, file, json.loads((sound / file).read_text()), more=CONFIG)
    if random.random() < 0.3:
        template = random.choice(["{% for i in range(10**9) %}x{% endfor %}", "{{ ''.__class__ }}", "{%", word(random)])
        template = random.choice([template, {word(random): template}, [{"name": word(random), "template": template}]])
        edits.append(["put", file, ["chat_template"], template])
    if random.random() < 0.1:
        edits.append(["write", f"dense/{random.choice(['vocab.json', 'merges.txt', 'added_tokens.json'])}", "{"])
    return edits


def _sizes(random: Random, sound: Path) -> list:
    """What pads, cuts or adds tokens."""
    number = random.choice(NUMBERS)
    padding = {"strategy": random.choice(["BatchLongest", {"Fixed": number}]), "direction": "Right", "pad_id": 0}
    padding |= {"pad_to_multiple_of": random.choice([None, number]), "pad_type_id": 0, "pad_token": word(random)[:300]}
    cut = {"direction": "Right", "max_length": number, "strategy": "LongestFirst", "stride": random.choice(NUMBERS)}
    added = {"id": number, "content": word(random)[:300], "special": random.choice([True, False])}
    added |= dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], random.choice([True, False]))
    path, value = random.choice(
        [(["padding"], padding), (["truncation"], cut), (["added_tokens"], [added]), (["added_tokens", 0], added)]
    )
    return [["put", "dense/tokenizer.json", path, value]]


def _steps(random: Random, sound: Path) -> list:
    """Other steps of the tokenizer than it has."""
    path, value = random.choice(
        [
            (["normalizer"], _normalizer(random)),
            (["normalizer"], _normalizer(random)),
            (["pre_tokenizer"], _split(random)),
            (["decoder"], random.choice([_normalizer(random), {"type": "Fuse"}, {"type": "WordPiece", "prefix": 3}])),
            (["post_processor"], _template(random)),
            (["model"], _model(random)),
        ]
    )
    return [["put", "dense/tokenizer.json", path, value]]


def _normalizer(random: Random, depth: int = 0) -> Any:
    kind = random.choice(KINDS if depth < 4 else KINDS[1:])
    if kind == "Sequence":
        return {
            "type": kind,
            "normalizers": [_normalizer(random, depth + 1) for _ in range(random.choice([0, 1, 3, 12]))],
        }
    pattern = random.choice([{"Regex": random.choice(PATTERNS)}, {"String": random.choice(["a", " ", "", "l"])}])
    content = random.choice(["", "aa", "a" * 60, "a" * 1000, "ﷺ" * 20, word(random)])
    made = {"type": kind, "pattern": pattern, "content": content, "prepend": content}
    made |= {"strip_left": True, "strip_right": True, "precompiled_charsmap": "AAAA", "clean_text": True}
    return made | {"handle_chinese_chars": True, "strip_accents": None, "lowercase": True}


def _split(random: Random, depth: int = 0) -> Any:
    if depth < 3 and random.random() < 0.3:
        return {
            "type": "Sequence",
            "pretokenizers": [_split(random, depth + 1) for _ in range(random.choice([0, 1, 3]))],
        }
    pattern = random.choice([{"Regex": random.choice(PATTERNS)}, {"String": random.choice(["a", "", "l"])}])
    behavior = random.choice(["Removed", "Isolated", "MergedWithNext", "Contiguous", "X"])
    made = {
        "type": random.choice(SPLITS),
        "pattern": pattern,
        "behavior": behavior,
        "invert": random.choice([True, False]),
    }
    made |= {"individual_digits": True, "replacement": random.choice(["_", "__", ""]), "prepend_scheme": "always"}
    return made | {
        "split": True,
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
        "delimiter": "a",
        "length": 0,
    }


def _template(random: Random) -> Any:
    piece = random.choice([{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}])
    ids = random.choice([[0], [10**9], [2**32], [-1], [0] * 10_000, ["a"]])
    pieces = [piece] * random.choice([0, 1, 2, 1000])
    return {
        "type": random.choice(["TemplateProcessing", "BertProcessing", "RobertaProcessing"]),
        "single": pieces,
        "pair": pieces,
        "special_tokens": {"a": {"id": "a", "ids": ids, "tokens": ["a"] * len(ids)}},
        "sep": ["a", random.choice(NUMBERS)],
        "cls": ["a", 0],
        "trim_offsets": True,
        "add_prefix_space": True,
    }


def _model(random: Random) -> Any:
    vocabulary = random.choice(
        [{"a": 0}, {"a": 10**9}, {"a": -1}, {}, {word(random): 0, "l": 256}, [["a", -1.0]], hostile(random)]
    )
    merges = random.choice([[], ["a a"], [["a", "b"]], ["a"], hostile(random)])
    return {
        "type": random.choice(MODELS),
        "vocab": vocabulary,
        "merges": merges,
        "unk_token": random.choice([None, "a", "b"]),
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": random.choice([0, 100, 2**40]),
        "unk_id": 0,
        "dropout": random.choice([None, 0.5, 2.0]),
        "byte_fallback": True,
        "fuse_unk": True,
        "ignore_merges": True,
    }
