"""A tokenizer as llama.cpp reads it: tokens with their kinds, merges or scores, and how text is split beforehand.

llama.cpp knows ways to split text by name only. A tokenizer that splits differently would give other tokens without a
word, so it is refused; so are options of merging that llama.cpp doesn't have.
"""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError, KronyWarning

if TYPE_CHECKING:
    from gguf import GGUFWriter

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3, QWEN_2 = WORDS + r"\p{N}{1,3}" + REST, WORDS + r"\p{N}" + REST  # up to three digits together, or one
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES_ALONE = BYTES | {"use_regex": False}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
# llama.cpp's name of a way to split -> the steps of it, and whether a word that is a token is taken before any merge
SPLITS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([BYTES], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, BYTES], False),
    "llama-bpe": ([SPLIT | {"pattern": {"Regex": LLAMA_3}}, BYTES_ALONE], True),
    "qwen2": ([SPLIT | {"pattern": {"Regex": QWEN_2}}, BYTES_ALONE], False),
}


def write_vocabulary(writer: GGUFWriter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the tokenizer of a model. Raises KronyError for one that llama.cpp doesn't know."""
    stored = _stored(tokenizer)
    size = model.get_input_embeddings().num_embeddings
    _check_merging(stored["model"])
    highest = max([*stored["model"]["vocab"].values(), *(added["id"] for added in stored["added_tokens"])])
    if highest >= size:
        raise KronyError(f"the tokenizer has ids up to {highest}, and the model {size} tokens")
    if stored["model"].get("byte_fallback"):
        _write_sentencepiece(writer, stored, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(stored))
        if not (merges := _merges(stored)):
            raise KronyError("llama.cpp doesn't load a tokenizer without merges, whose tokens are single bytes")
        writer.add_token_merges([" ".join(pair) for pair in merges])
    tokens, kinds = _tokens(stored, size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": each} for name, each in template.items()]
    if template:
        writer.add_chat_template(template)


def split_name(stored: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits text.

    ``stored``: the content of tokenizer.json. Raises KronyError for a way that has no name, and warns of the one thing
    that llama.cpp is known to leave out: it composes no characters (NFC), which Qwen's tokenizers do.
    """
    change = stored.get("normalizer")
    if change is not None and change["type"] != "NFC":
        raise KronyError(f"llama.cpp doesn't know this tokenizer: its normalizer is {change['type']}")
    if change is not None:
        warnings.warn(
            "llama.cpp composes no characters (NFC), as this tokenizer does: a letter and a combining accent, written "
            "as two characters, get other tokens there",
            KronyWarning,
            stacklevel=2,
        )
    before = stored["pre_tokenizer"]
    steps = before["pretokenizers"] if before is not None and before["type"] == "Sequence" else [before]
    found = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps if step is not None]
    at_once = bool(stored["model"].get("ignore_merges"))
    for name, known in SPLITS.items():
        if (found, at_once) == known:
            return name
    raise KronyError(
        f"llama.cpp doesn't know this tokenizer: it splits text by {found}, and the ways that krony can name are "
        f"{', '.join(SPLITS)}"
    )


def _check_merging(model: dict[str, Any]) -> None:
    """Raises KronyError for options of byte-pair encoding that llama.cpp doesn't have."""
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise KronyError(f"llama.cpp doesn't know this tokenizer: its {option} is {model[option]!r}")


def _stored(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of tokenizer.json. Raises KronyError for a tokenizer that isn't byte-pair encoding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    if stored.get("model", {}).get("type") != "BPE":
        raise KronyError("export to gguf writes byte-pair encoding, and this tokenizer is of another kind")
    return stored


def _merges(stored: dict[str, Any]) -> list[list[str]]:
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in stored["model"]["merges"]]


def _tokens(stored: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The tokens in the order of their ids, and their kinds; ids that the tokenizer doesn't use get a name."""
    from gguf import TokenType

    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [int(TokenType.UNUSED)] * size
    for token, number in stored["model"]["vocab"].items():
        is_byte = stored["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[number], kinds[number] = token, int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for added in stored["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, kinds


def _write_sentencepiece(writer: GGUFWriter, stored: dict[str, Any], size: int) -> None:
    """SentencePiece's byte-pair encoding, as Gemma and Llama 2 have it: llama.cpp merges by score, not by rank.

    Raises KronyError for another treatment of spaces than replacing them by ``▁``.
    """
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    front = {"type": "Prepend", "prepend": "▁"}
    before, split = stored.get("normalizer"), stored.get("pre_tokenizer")
    steps = before["normalizers"] if before is not None and before["type"] == "Sequence" else [before]
    # Gemma splits at spaces, after they were replaced: that does nothing
    splits_nothing = split is None or (split["type"], split.get("pattern")) == ("Split", {"String": " "})
    if steps not in ([spaces], [front, spaces]) or not splits_nothing:
        raise KronyError(f"llama.cpp doesn't know this tokenizer: it changes text by {before} and splits it by {split}")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(steps[0] == front)
    scores = [0.0] * size
    vocabulary = stored["model"]["vocab"]
    for rank, (left, right) in reversed(list(enumerate(_merges(stored)))):  # of several merges the first one counts
        scores[vocabulary[left + right]] = -float(rank)
    writer.add_token_scores(scores)
