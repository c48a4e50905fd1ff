"""The spread of repeated measurements, and the verdict on two models, on made-up measurements."""

import math
import random
import statistics

import pytest

from krony.evaluation.spread import Comparison, compare, spread


def interval(values, level=0.9):
    """The two sorted values between which the median lies with this confidence, from the binomial distribution."""
    n = len(values)
    below = [sum(math.comb(n, j) for j in range(k + 1)) / 2**n for k in range(n)]  # P(at most k values are below it)
    k = max(k for k in range(n // 2 + 1) if 1 - 2 * below[k] >= level)
    return sorted(values)[k], sorted(values)[n - 1 - k]


@pytest.mark.parametrize("turns", [5, 6, 7, 8, 9, 15, 16, 31, 101])
def test_the_spread_is_the_width_of_the_interval_of_the_median(turns):
    draw = random.Random(turns)
    values = [draw.lognormvariate(0, 0.3) for _ in range(turns)]
    low, high = interval(values)
    assert spread(values) == pytest.approx((high - low) / statistics.median(values))
    if turns <= 7:
        assert (low, high) == (min(values), max(values))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 1.0, 1.0, 1.0]])
def test_too_few_measurements_have_no_spread(values):
    assert spread(values) is None


def test_equal_measurements_have_a_spread_of_zero():
    assert spread([0.25] * 9) == 0.0


def test_an_outlier_of_many_turns_does_not_count():
    assert spread([1.0] * 8 + [50.0]) == 0.0
    assert spread([1.0] * 4 + [50.0]) == 49.0  # of five turns nobody knows which is the exception


def test_a_machine_that_slows_down_slows_both_models():
    machine = [1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0]
    one, two = [3.0 * load for load in machine], [2.0 * load for load in machine]
    assert spread(one) == 1.0  # by itself
    assert compare(one, two) == (1.5, 0.0)
    assert compare(one, two).verdict == "faster"


def test_the_ratio_is_the_median_of_the_turns_and_not_a_ratio_of_medians():
    one, two = [1.0, 2.0, 9.0, 4.0, 5.0], [1.0, 1.0, 3.0, 4.0, 5.0]
    found = compare(one, two)  # 1, 2, 3, 1, 1
    assert found.ratio == 1.0 and statistics.median(one) / statistics.median(two) != 1.0
    assert found.spread == 2.0


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [
        (1.27, 0.04, "faster"),
        (0.8, 0.04, "slower"),
        (1.05, 0.12, None),
        (0.95, 0.12, None),
        (1.25, 0.25, None),  # as large as the difference is not larger
        (1.0, 0.0, None),
        (9.0, None, None),
    ],
)
def test_a_verdict_needs_a_difference_larger_than_the_spread(ratio, spread, verdict):
    assert Comparison(ratio, spread).verdict == verdict


def test_the_sentences():
    assert Comparison(1.27, 0.04).sentence("out", "demo") == "out is 1.27 times as fast as demo (spread 4.0%)"
    assert Comparison(0.8, 0.04).sentence("out", "demo") == "out is 0.80 times as fast as demo (spread 4.0%)"
    assert Comparison(1.05, 0.12).sentence("out", "demo") == (
        "no verdict on out: 1.05 times as fast as demo, and the spread is 12.0%: measure with more --rounds on a quiet "
        "machine"
    )
    assert Comparison(1.5, None).sentence("out", "demo") == (
        "no verdict on out: 1.50 times as fast as demo, from too few turns for a spread: ask for --rounds 5 or more"
    )


def verdicts(factor, turns, draw, tries=200):
    """How many of the tries call a model faster or slower whose seconds are the first one's divided by ``factor``."""
    called = 0
    for _ in range(tries):
        one, two = ([draw.lognormvariate(0, 0.05) for _ in range(turns)] for _ in range(2))
        called += compare(one, [seconds / factor for seconds in two]).verdict is not None
    return called / tries


def test_chance_gives_no_verdict_and_more_turns_find_a_difference():
    draw = random.Random(0)
    assert verdicts(1.0, 5, draw) < 0.05 and verdicts(1.0, 9, draw) < 0.05
    assert verdicts(1.1, 5, draw) < 0.5 < 0.9 < verdicts(1.1, 51, draw)


def test_turns_that_do_not_pair_are_an_error():
    with pytest.raises(ValueError, match="longer"):
        compare([1.0] * 5, [1.0] * 6)
