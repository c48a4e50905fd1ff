"""What ``krony inspect --trajectory`` reads, shows and draws."""

import json
import re

import pytest

from krony import KronyError
from krony.healing.trajectory import picture, read_trajectories, table, write_trajectories

FEW = {"h.0.mlp.c_fc": [(0, [4.0, 1.0]), (512, [3.5, 1.25])]}
MANY = {f"h.{n}.c_fc": [(0, [1.0 + n, 2.0]), (512, [2.0 + n, 3.0])] for n in range(9)}


def test_it_is_read_as_it_was_written(tmp_path):
    write_trajectories(tmp_path, FEW)
    assert read_trajectories(tmp_path) == FEW
    assert table(FEW).rows == [["h.0.mlp.c_fc", "4.000 1.000", "3.500 1.250", "512"]]


def test_the_picture_names_where_they_come_from_and_go_to():
    few, many = picture(FEW), picture(MANY)
    assert "the 2 scalars go from 1.00 to 4.00 (median 2.50) to 1.25 to 3.50 (median 2.38)" in few
    assert "h.0.mlp.c_fc, factor 1" in few and "median of the layers" not in few
    assert "the 18 scalars go from 1.00 to 9.00 (median 2.00) to 2.00 to 10.00" in re.sub(r"\s+", " ", many)
    assert all(name in many for name in ("factor 0, median of the layers", "factor 1, median", "the largest of all"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no scalars.json: krony heal writes it to OUT where the model has scalars"),
        ("[1]", "scalars.json"),
        ('{"a": []}', "is malformed: per layer it has pairs of tokens and scalars"),
        ('{"a": [[0, [1, 2]], [5, [1]]]}', "is malformed"),
        ('{"a": [[0, "x"]]}', "is malformed"),
        (json.dumps({"a": 3}), "is malformed"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "scalars.json").write_text(content)
    with pytest.raises(KronyError, match=words):
        read_trajectories(tmp_path)
