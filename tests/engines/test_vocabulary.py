"""Ways to split text that llama.cpp knows by name, and SentencePiece's tokens."""

import copy
import json

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from krony import KronyError
from krony.data import python_docs
from krony.engines.gguf import write_gguf
from krony.engines.vocabulary import BYTES, LLAMA_3, QWEN_2, SPLITS, split_name
from krony.errors import KronyWarning

TEXTS = [
    "The function returns 12345 items.\n\n  Don't",
    " a  b\t\tc\n",
    "ünïcödé — 漢字 🙂 naïve",
    "x = {'a': [1, 22, 333]}",
]


def stored(*steps, at_once=False):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}, "model": {"ignore_merges": at_once}}


def test_known_ways_have_names():
    assert split_name(stored(BYTES | {"trim_offsets": False})) == "gpt-2"
    for name, (steps, at_once) in SPLITS.items():
        assert split_name(stored(*steps, at_once=at_once)) == name
    assert LLAMA_3 != QWEN_2 and r"\p{N}{1,3}" in LLAMA_3


@pytest.mark.parametrize("change", [{"add_prefix_space": True}, {"use_regex": False}])
def test_other_ways_are_refused(change):
    with pytest.raises(KronyError, match="doesn't know this tokenizer: it splits text by"):
        split_name(stored(BYTES | change))
    with pytest.raises(KronyError, match="its normalizer is Lowercase"):
        split_name(stored(BYTES) | {"normalizer": {"type": "Lowercase"}})


def trained(byte_level):
    """A tokenizer of 4,096 tokens at most, trained on the shipped text: byte-level, or as Gemma's."""
    inner = Tokenizer(models.BPE(byte_fallback=not byte_level, fuse_unk=False))
    texts = python_docs.topics("calibration")[:40]
    if byte_level:
        digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Sequence([digits, bytes_]), decoders.ByteLevel()
        first = ["<|endoftext|>"]
    else:
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        first = ["<|endoftext|>", *(f"<0x{number:02X}>" for number in range(256))]
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=first, show_progress=False))
    if not byte_level:
        content = json.loads(inner.to_str())
        content["added_tokens"] = content["added_tokens"][:1]  # the bytes are plain tokens, as in Gemma's
        inner = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


@pytest.mark.parametrize("byte_level", [True, False])
def test_llama_cpp_makes_the_same_tokens(byte_level, of_type, llama_cpp, tmp_path):
    tokenizer = trained(byte_level)
    write_gguf(of_type("gpt2"), tokenizer, tmp_path / "m.gguf")
    engine = llama_cpp(tmp_path / "m.gguf")
    texts = [*TEXTS, python_docs.topics("held-out")[0][:3000]]
    for text in texts:
        assert engine.tokens(text) == tokenizer(text)["input_ids"], text


def test_tokenizers_of_another_kind(of_type, words, tokenizer, tmp_path):
    model = of_type("gpt2")
    word = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), eos_token="a")
    with pytest.raises(KronyError, match="writes byte-pair encoding, and this tokenizer is of another kind"):
        write_gguf(model, word, tmp_path / "m.gguf")
    with pytest.raises(KronyError, match="doesn't load a tokenizer without merges"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf")
    large = copy.deepcopy(words)
    large.add_tokens(["one more"])
    with pytest.raises(KronyError, match="the tokenizer has ids up to 4096, and the model 4096 tokens"):
        write_gguf(model, large, tmp_path / "m.gguf")


@pytest.mark.parametrize("option", ["dropout", "continuing_subword_prefix", "end_of_word_suffix"])
def test_options_of_merging_that_llama_cpp_does_not_have(option, of_type, words, tmp_path):
    inner = json.loads(words.backend_tokenizer.to_str())
    inner["model"][option] = 0.1 if option == "dropout" else "##"
    if option != "dropout":  # merges join whole words only where the vocabulary has them
        inner["model"]["merges"] = []
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(inner)), eos_token="<|endoftext|>")
    with pytest.raises(KronyError, match=f"doesn't know this tokenizer: its {option} is"):
        write_gguf(of_type("gpt2"), changed, tmp_path / "m.gguf")


def test_characters_that_are_composed_are_warned_of():
    with pytest.warns(KronyWarning, match="composes no characters"):
        assert split_name(stored(BYTES) | {"normalizer": {"type": "NFC"}}) == "gpt-2"


def test_templates_with_names(of_type, words, tmp_path):
    named = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = named
    write_gguf(of_type("gpt2"), tokenizer, tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == named["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == named["tool_use"]


def test_an_end_that_the_tokenizer_adds_is_added(of_type, words, llama_cpp, tmp_path):
    inner = Tokenizer.from_str(words.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    write_gguf(of_type("gpt2"), tokenizer, tmp_path / "m.gguf")
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert ids[0] == ids[-1] == 0 and llama_cpp(tmp_path / "m.gguf").tokens(TEXTS[0]) == ids
