"""What verbs print and write."""

import json
import math

from krony.cli.output import Output


def test_figures_that_json_does_not_have_are_null(tmp_path, capsys):
    payload = {"perplexity": math.inf, "rows": [{"high": -math.inf, "low": 1.5}, (math.nan, "inf", 3)], "none": None}
    expected = {"perplexity": None, "rows": [{"high": None, "low": 1.5}, [None, "inf", 3]], "none": None}
    Output("-").json(payload)
    Output(str(tmp_path / "j")).json(payload)
    for text in (capsys.readouterr().out, (tmp_path / "j").read_text()):
        assert json.loads(text) == expected and "NaN" not in text and "Infinity" not in text
