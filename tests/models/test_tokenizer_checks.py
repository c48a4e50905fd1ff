"""What a tokenizer's files ask for is bounded before any memory is taken, and a panic is one sentence."""

import pytest

from krony import KronyError, load_tokenizer
from krony.models.tokenizer_checks import check_tokenizer


def test_a_tokenizer_that_multiplies_text(folder, change):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    change("tokenizer.json", normalizer={"type": "Sequence", "normalizers": [step] * 9})
    with pytest.raises(KronyError, match=r"its normalizer can make a text 1,000,000,000 times longer"):
        load_tokenizer(str(folder))


def test_the_normalisers_of_well_known_tokenizers_are_fine(folder, change):
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    for known in (None, {"type": "NFC"}, prepend):
        change("tokenizer.json", normalizer=known)
        check_tokenizer(folder)


def test_an_id_that_would_need_a_table_of_gigabytes(folder, change):
    change("tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 10**9}, "unk_token": "a"})
    with pytest.raises(KronyError, match=r"tokenizer\.json: model\.vocab\.a is 1000000000: no tokenizer has so many"):
        load_tokenizer(str(folder))


def test_a_bound_on_the_length_of_a_text_may_be_large(folder, change):
    cut = {"direction": "Right", "max_length": 2**40, "strategy": "LongestFirst", "stride": 0}
    change("tokenizer.json", truncation=cut)
    check_tokenizer(folder)


@pytest.mark.parametrize(
    "step",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # panics when it is read
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # panics when it is used
    ],
)
def test_a_panic_is_one_sentence_and_prints_nothing(folder, change, step, capfd):
    change("tokenizer.json", **step)
    with pytest.raises(KronyError, match="no tokenizer can be loaded from there: "):
        load_tokenizer(str(folder))
    assert capfd.readouterr().err == ""
