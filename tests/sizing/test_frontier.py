"""The frontier: one row per size, a picture, and the figures that were promised."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import krony
from krony.cli.app import app
from krony.models.surgery import count_parameters


def test_the_frontier_of_the_shipped_model(tmp_path):
    model, tokenizer = krony.demo_model(), krony.load_tokenizer("demo")
    found = krony.frontier(model, "python-docs", tokenizer=tokenizer, keeps=(0.25, 0.75), tokens=8192, cache=tmp_path)
    large, small = found.points
    assert (large.scheme, small.scheme) == ("keep=0.75", "keep=0.25") and found.params == count_parameters(model)
    assert 1 < large.measured < small.measured and 1 < large.predicted < small.predicted
    assert all(p.low <= p.measured <= p.high and p.bytes == 4 * p.params for p in found.points)
    assert set(found.to_json()) >= {"model", "params", "points"}
    assert set(found.to_json()["points"][0]) >= {"scheme", "params", "bytes", "predicted", "measured"}
    assert "<svg" in found.picture() and "keep=0.25" in str(found)
    assert found.model == "demo" and str(krony.__path__[0]) not in found.picture()
    assert all(part in found._repr_html_() for part in ("<table", "<svg", found.summary()))


@pytest.fixture
def short(monkeypatch):
    """Little text, so that the verb takes a moment."""
    monkeypatch.setattr("krony.sizing.text.HELD_TOKENS", 4096)


def test_the_verbs(short, tmp_path):
    run = CliRunner().invoke
    plot, figures = tmp_path / "f.svg", tmp_path / "f.json"
    text = ["--calibration", "python-docs", "--calibration-tokens", "8192"]
    done = run(app, ["frontier", "demo", *text, "--keep", "0.5", "--plot", str(plot), "--json", str(figures)])
    assert done.exit_code == 0, done.output
    assert json.loads(figures.read_text())["points"][0]["scheme"] == "keep=0.5" and "<svg" in plot.read_text()
    out = tmp_path / "out"
    done = run(app, ["compress", "demo", str(out), "--within", "40%", *text, "--json", str(figures)])
    assert done.exit_code == 0, done.output
    told = json.loads(figures.read_text())
    assert told["within"]["high"] <= 1.4 and told["params_after"] == count_parameters(krony.load_model(str(out)))
    assert "promised: at most 1.400" in done.output and "promised: at most 1.400" in (out / "README.md").read_text()


WITHIN = ["--within", "40%", "--calibration", "python-docs", "--calibration-tokens", "4096"]


@pytest.mark.parametrize(
    "verb", [("frontier", "demo", "--keep", "0.5", *WITHIN[2:]), ("compress", "demo", "OUT", *WITHIN)]
)
def test_several_processes_share_the_work_and_one_writes(verb, tmp_path):
    out, figures = tmp_path / "out", [tmp_path / "one.json", tmp_path / "two.json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    printed = []
    for start, file in zip([[], launcher], figures, strict=True):
        arguments = [str(out / file.stem) if word == "OUT" else word for word in verb]
        command = [sys.executable, *start, "-m", "krony", *arguments, "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout.splitlines())
    one, two = (json.loads(file.read_text()) for file in figures)
    if verb[0] == "frontier":
        assert [p["measured"] for p in one["points"]] == pytest.approx([p["measured"] for p in two["points"]], rel=1e-3)
    else:
        assert one["within"]["scheme"] == two["within"]["scheme"]
        assert krony.load_model(str(out / "two")).num_parameters() == two["params_after"]
    assert len(printed[0]) == len(printed[1])
