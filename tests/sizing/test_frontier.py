"""The frontier: one row per size, a picture, and the figures that were promised."""

import json

import pytest
from typer.testing import CliRunner

import krony
from krony.cli.app import app
from krony.models.surgery import count_parameters
from krony.sizing.defaults import GLOBAL_ALLOCATION
from processes import krony as run_krony
from processes import together


def test_the_frontier_of_the_shipped_model(tmp_path):
    model, tokenizer = krony.demo_model(), krony.load_tokenizer("demo")
    few = {"keeps": (0.25, 0.75), "tokens": 2048, "config": krony.KronyConfig(layers="0-1", **GLOBAL_ALLOCATION)}
    found = krony.frontier(model, "python-docs", tokenizer=tokenizer, cache=tmp_path, **few)
    large, small = found.points
    assert (large.scheme, small.scheme) == ("keep=0.75", "keep=0.25") and found.params == count_parameters(model)
    assert 1 < large.measured < small.measured and 1 < large.predicted < small.predicted
    assert all(p.low <= p.measured <= p.high and p.bytes == 4 * p.params for p in found.points)
    assert set(found.to_json()) >= {"model", "params", "points"}
    assert set(found.to_json()["points"][0]) >= {"scheme", "params", "bytes", "predicted", "measured"}
    assert "<svg" in found.picture() and "keep=0.25" in str(found)
    assert found.model == "demo" and str(krony.__path__[0]) not in found.picture()
    assert all(part in found._repr_html_() for part in ("<table", "<svg", found.summary()))


def test_the_verbs(thin, tmp_path):
    run = CliRunner().invoke
    plot, figures = tmp_path / "f.svg", tmp_path / "f.json"
    text = ["--calibration", "python-docs", "--calibration-tokens", "4096"]
    done = run(app, ["frontier", thin, *text, "--keep", "0.5", "--plot", str(plot), "--json", str(figures)])
    assert done.exit_code == 0, done.output
    assert json.loads(figures.read_text())["points"][0]["scheme"] == "keep=0.5" and "<svg" in plot.read_text()
    out = tmp_path / "out"
    done = run(app, ["compress", thin, str(out), "--within", "40%", *text, "--json", str(figures)])
    assert done.exit_code == 0, done.output
    told = json.loads(figures.read_text())
    assert told["within"]["high"] <= 1.4 and told["params_after"] == count_parameters(krony.load_model(str(out)))
    assert "promised: at most 1.400" in done.output and "promised: at most 1.400" in (out / "README.md").read_text()


@pytest.mark.parametrize("verb", [("frontier", "--keep", "0.5"), ("compress", "OUT", "--within", "10%")])
def test_several_processes_share_the_work_and_one_writes(verb, thin, tmp_path):
    out, text = tmp_path / "out", ["--calibration", "python-docs", "--calibration-tokens", 1536]
    figures, printed = [], []
    for count in (1, 2):
        file = tmp_path / f"{count}.json"
        name, *options = (out / file.stem if word == "OUT" else word for word in verb)
        said = together(count, tmp_path / f"of-{count}", run_krony, name, thin, *options, *text, "--json", file)
        assert said[1:] == [""] * (count - 1)
        figures.append(json.loads(file.read_text()))
        printed.append(said[0].splitlines())
    one, two = figures
    if verb[0] == "frontier":
        assert [p["measured"] for p in one["points"]] == pytest.approx([p["measured"] for p in two["points"]], rel=1e-3)
    else:
        assert one["within"]["scheme"] == two["within"]["scheme"]
        assert krony.load_model(str(out / "2")).num_parameters() == two["params_after"]
    assert len(printed[0]) == len(printed[1])
