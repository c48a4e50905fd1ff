"""The paper's Tables 1 and 2 to the digit; names, fractions and budgets."""

import pytest

from krony import KronyError
from krony.kronecker import schemes
from krony.kronecker.algebra import KronShape
from krony.kronecker.schemes import ModelShape

GPT2 = ModelShape(124_439_808, ((3072, 768),) * 24)
OTHER = ModelShape(1_000_000, ((192, 48), (192, 48)))

TABLE_1 = """
64 32 3200 67,893,504
64 48 3840 67,908,864
96 32 3840 67,908,864
64 64 4672 67,928,832
128 32 4672 67,928,832
96 48 5120 67,939,584
96 64 6528 67,973,376
128 48 6528 67,973,376
128 64 8480 68,020,224
96 96 9472 68,044,032
192 48 9472 68,044,032
128 96 12480 68,116,224
192 64 12480 68,116,224
128 128 16528 68,213,376
1024 256 262153 74,108,376
768 384 294920 74,894,784
1024 384 393222 77,254,032
768 768 589828 81,972,576
1536 384 589828 81,972,576
1024 768 786435 86,691,144
1536 768 1179650 96,128,304
3072 768 2359297 124,439,832
"""


def test_table_1_to_the_digit():
    rows = {tuple(row["left"]): row for row in (r.to_json() for r in schemes.table(GPT2, everything=True))}
    for line in TABLE_1.split("\n")[1:-1]:
        m1, n1, matrix, model = (int(part.replace(",", "")) for part in line.split())
        assert rows[m1, n1]["params_per_matrix"] == matrix
        assert rows[m1, n1]["model_params"] == model
        assert rows[m1, n1]["rank"] == 768


def test_exactly_the_full_rank_shapes_are_listed():
    listed = {s.left for s in schemes.full_rank_shapes(192, 48)}
    for m1 in range(1, 193):
        for n1 in range(1, 49):
            if 192 % m1 or 48 % n1:
                continue
            s = KronShape.split(192, 48, m1, n1)
            larger = m1 * n1 >= s.m2 * s.n2
            assert (s.left in listed) == (larger and min(m1, n1) * min(s.m2, s.n2) == 48)


def test_table_2():
    rows = {(r.shape.left, r.shape.factors): r for r in schemes.table(GPT2, factors=[1, 2, 3])}
    for left, matrix, sizes in [((256, 64), 16528, "68.2 68.6 69.0"), ((1024, 256), 262153, "74.1 80.4 86.7")]:
        assert rows[left, 1].shape.parameters == matrix
        assert " ".join(f"{rows[left, k].model_params / 1e6:.1f}" for k in (1, 2, 3)) == sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("67M", 67_893_504), ("68M", 68_020_224), ("80M", 80_400_048), ("81M", 81_972_576)]
    + [("92M", 92_983_392), ("96M", 96_128_304)],
)
def test_the_papers_names(name, parameters):
    assert GPT2.parameters_with(name) == parameters
    assert {r.name: r.model_params for r in schemes.table(GPT2)}[name] == parameters


def test_a_name_on_another_model_proposes_a_fraction():
    schemes.check_name("81M", GPT2)
    with pytest.raises(KronyError, match=r"81M is the paper's name .* keep=0.25"):
        schemes.check_name("81M", OTHER)


@pytest.mark.parametrize(
    ("scheme", "left", "factors"),
    [("keep=0.5", (96, 48), 1), ("keep=0.75", (48, 48), 3), ("keep=1/3", (64, 48), 1), ("keep=0.7", (3, 48), 45)],
)
def test_keep(scheme, left, factors):
    shape = schemes.resolve(scheme, 192, 48)
    assert (shape.left, shape.factors) == (left, factors)
    assert shape.n2 == 1  # neurons stay complete


@pytest.mark.parametrize("scheme", ["keep=0", "keep=1", "keep=1.5", "keep=half", "keep=", "keep=1/0"])
def test_keep_takes_a_fraction(scheme):
    with pytest.raises(KronyError, match="fraction between 0 and 1"):
        schemes.resolve(scheme, 192, 48)


def test_a_fraction_that_is_impossible_names_the_nearest():
    with pytest.raises(KronyError, match=r"the nearest is keep=0.5"):
        schemes.resolve("keep=0.55", 2, 2)
    with pytest.raises(KronyError, match="can't be grouped"):
        schemes.resolve("keep=0.5", 97, 3)


@pytest.mark.parametrize("scheme", ["", "82M", "768", "768x", "x768", "768x768:", "768x768:x", "-1x3"])
def test_a_misspelt_scheme_is_refused(scheme):
    with pytest.raises(KronyError, match="is not understood"):
        schemes.resolve(scheme, 3072, 768)


def test_budget_takes_the_largest_that_fits():
    for neurons in (True, False):
        scheme = schemes.for_budget(GPT2, 97_000_000, neurons=neurons)
        assert 96_000_000 < GPT2.parameters_with(scheme) <= 97_000_000
    with pytest.raises(KronyError, match="has only"):
        schemes.for_budget(GPT2, 130_000_000, neurons=True)
    with pytest.raises(KronyError, match="the smallest has"):
        schemes.for_budget(GPT2, 1_000_000, neurons=False)


@pytest.mark.parametrize(
    ("text", "number"), [("82M", 82_000_000), ("1.2B", 1_200_000_000), ("124_439_808", 124_439_808)]
)
def test_parameters_are_read(text, number):
    assert schemes.parse_parameters(text) == number


def test_parameters_that_are_no_number_are_refused():
    with pytest.raises(KronyError, match="not a number of parameters"):
        schemes.parse_parameters("many")


def test_matrices_that_differ_have_no_table():
    with pytest.raises(KronyError, match="differ in shape"):
        schemes.table(ModelShape(10, ((4, 2), (6, 2))))
