"""Python's own documentation: the split is fixed, and nothing that is evaluated on has been seen in calibration."""

import pytest

from krony.data import python_docs

# Topics that Python 3.11 to 3.13 have, and the part each is in.
HELD_OUT = {"async", "bitwise", "break", "customization", "else", "function", "id-classes", "lambda", "nonlocal"}
HELD_OUT |= {"pass", "try", "unary"}
CALIBRATION = {"assert", "class", "comparisons", "for", "formatstrings", "global", "import", "numbers", "typesseq"}


def runs(texts: list[str], words: int) -> set[tuple[str, ...]]:
    """All runs of ``words`` words, whatever the white space between them."""
    split = [text.split() for text in texts]
    return {tuple(text[i : i + words]) for text in split for i in range(len(text) - words + 1)}


def test_membership_is_pinned():
    assert {name for name in HELD_OUT | CALIBRATION if python_docs.is_held_out(name)} == HELD_OUT


def test_held_out_texts_are_complete_and_in_the_order_of_their_names():
    from pydoc_data.topics import topics

    names = sorted(name for name in topics if python_docs.is_held_out(name))
    assert python_docs.topics("held-out") == [topics[name] for name in names]
    assert set(names) >= HELD_OUT


def test_parts_are_the_same_each_time():
    for part in python_docs.PARTS:
        assert python_docs.topics(part) == python_docs.topics(part) != []


def test_no_held_out_text_is_in_calibration():
    held_out, calibration = python_docs.topics("held-out"), python_docs.topics("calibration")
    assert not set(held_out) & set(calibration)
    assert not any(text in other for text in held_out for other in calibration)
    assert not any(text in other for text in calibration for other in held_out)


def test_next_to_no_held_out_phrase_is_in_calibration():
    held_out, calibration = (runs(python_docs.topics(part), words=20) for part in ("held-out", "calibration"))
    assert len(held_out & calibration) < 0.005 * len(held_out)  # turns of phrase that several topics share


def test_calibration_keeps_nearly_everything_else():
    from pydoc_data.topics import topics

    whole = sum(len(text) for name, text in topics.items() if not python_docs.is_held_out(name))
    assert sum(map(len, python_docs.topics("calibration"))) > 0.9 * whole


def test_unknown_part():
    with pytest.raises(ValueError, match="part 'train' is unknown: it is one of calibration, held-out"):
        python_docs.topics("train")
