"""The smallest size that keeps a promise: found in few trials, checked, and refused where there is none."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import krony
from krony import KronyError, compress_within
from krony.errors import PromiseError
from krony.evaluation.interval import Interval
from krony.models.surgery import count_parameters
from krony.sizing.sizes import Size
from krony.sizing.within import GUESSES, parse_within, smallest


@dataclass
class Curve:
    """Sizes whose losses are known: what is measured is the prediction, bent."""

    steps: int
    bend: float
    held: torch.Tensor = field(default_factory=lambda: torch.zeros(4, 8))
    measured: int = 0

    def __post_init__(self):
        self.ladder = [Size(scheme=str(n), keep=1 - n / 100, params=1000 - n) for n in range(1, self.steps + 1)]

    def predicted(self, size):
        return (1 - size.keep) ** 2

    def measure(self, size):
        self.measured += 1
        ratio = 1 + 0.5 * (1 - size.keep) ** self.bend
        return Interval(ratio, ratio - 0.001, ratio + 0.001)


@given(st.integers(2, 62), st.floats(1.0, 4.0), st.floats(0.002, 0.6))
@settings(max_examples=200, deadline=None)
def test_it_is_the_smallest_that_keeps_it(steps, bend, within):
    """Whatever the curves predict, in at most a few trials more than it takes to halve 62 sizes."""
    curve = Curve(steps, bend)
    right = [size for size in curve.ladder if curve.measure(size).high <= 1 + within]
    curve.measured = 0
    if not right:
        with pytest.raises(PromiseError, match="no size keeps the perplexity within"):
            smallest(curve, 1 + within)
        return
    found = smallest(curve, 1 + within)
    assert found.size == right[-1] and found.measured.high <= 1 + within
    assert len(found.trials) <= GUESSES + steps.bit_length()


def test_a_promise_is_kept_in_place(thin, tmp_path):
    model, tokenizer = krony.load_model(thin), krony.load_tokenizer(thin)
    text = {"tokenizer": tokenizer, "tokens": 4096, "cache": tmp_path}
    found = compress_within(model, 0.1, "python-docs", **text)
    assert found.measured.high <= 1.1
    # the size counts 32 portions a layer, each with a right factor of 32 numbers and a scalar, for both matrices of it;
    # one layer keeps all of its neurons here, and stays dense without them
    assert len(found.report.layers) == 2 * 5
    assert found.report.params_after == count_parameters(model) == found.size.params - 2 * 32 * (32 + 1)
    assert model.config.quantization_config.made_with["scheme"] == found.size.scheme
    assert "promised: at most 1.100 times the original's perplexity; measured: 1." in str(found)
    assert found.to_json()["trials"][0]["scheme"] and found.table().columns[-1] == "within 10%"
    logits = model(torch.arange(20)[None]).logits
    assert torch.isfinite(logits).all()


def test_a_promise_that_no_size_keeps_leaves_the_model(thin, tmp_path):
    model, tokenizer = krony.load_model(thin), krony.load_tokenizer(thin)
    before = model(torch.arange(20)[None]).logits
    with pytest.raises(PromiseError, match=r"within 0\.001% of the original's: the nearest, 2x256:62 with 3,160,820"):
        text = {"tokenizer": tokenizer, "tokens": 4096, "cache": tmp_path}
        compress_within(model, 0.00001, "python-docs", **text)
    assert torch.equal(model(torch.arange(20)[None]).logits, before)


@pytest.mark.parametrize(
    ("text", "words"),
    [("5", "that is 500%; write 5% for 5 percent"), ("x", "a share above 0"), ("0%", "a share"), ("-1%", "a share")],
)
def test_a_share_that_can_not_be_meant(text, words):
    with pytest.raises(KronyError, match=words):
        parse_within(text)
    assert parse_within(" 2.5% ") == pytest.approx(0.025) and parse_within("150%") == 1.5
