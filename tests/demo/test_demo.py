"""The demo, measured on half of its text: its table's figures are those of the models, and the report holds them."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import krony
from krony.cli.app import main
from krony.models.surgery import count_parameters, kronecker_layers

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder that the demo wrote, and its figures."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["krony", "demo", folder / "out", "--max-tokens", 6144, "--json", folder / "d.json"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", list(map(str, arguments)))
        main()
    assert exit.value.code == 0
    return folder / "out", json.loads((folder / "d.json").read_text())


def test_the_table_tells_the_story(demo):
    rows = {row["init"]: row for row in demo[1]["rows"]}
    assert list(rows) == ["original", "neurons", "van-loan", "prune"]
    assert rows["original"]["ratio"] == 1.0 and rows["original"]["prefill_ratio"] == 1.0
    assert rows["neurons"]["params"] == rows["van-loan"]["params"] == rows["prune"]["params"]
    assert rows["neurons"]["ratio"] <= 1.25 < 5 < min(rows["van-loan"]["ratio"], rows["prune"]["ratio"])
    assert rows["neurons"]["perplexity_healed"] < rows["neurons"]["perplexity"]
    assert rows["neurons"]["ratio_healed"] <= 1.08
    assert rows["neurons"]["ratio_healed"] == rows["neurons"]["perplexity_healed"] / rows["original"]["perplexity"]
    assert rows["original"]["perplexity_healed"] and rows["van-loan"]["perplexity_healed"] is None


def test_its_figures_are_those_of_the_models(demo):
    out, figures = demo
    original, neurons = figures["rows"][:2]
    tokenizer = krony.load_tokenizer("demo")
    options = {"protocol": "token", "max_tokens": 6144}
    assert original["params"] == count_parameters(krony.demo_model()) and original["bytes"] == 4 * original["params"]
    measured = krony.evaluate(krony.demo_model(), tokenizer, "python-docs", **options).perplexity
    assert original["perplexity"] == pytest.approx(measured, rel=1e-4)
    healed = krony.load_model(str(out))
    assert "it was compressed (scheme `" in (out / "README.md").read_text()
    assert len(kronecker_layers(healed)) == 12 and count_parameters(healed) == neurons["params"]
    measured = krony.evaluate(healed, krony.load_tokenizer(str(out)), "python-docs", **options).perplexity
    assert neurons["perplexity_healed"] == pytest.approx(measured, rel=1e-4)


def test_the_report_holds_the_table_and_its_pictures(demo):
    out, figures = demo
    page = (out / "report.html").read_text()
    for row in figures["rows"]:
        assert f"{row['perplexity']:,.2f}" in page and f"{row['params']:,}" in page
    assert page.count("<svg") == 5 and "times the original" in page
    assert not re.search(r'(src|href)="http', page)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
def test_a_browser_shows_the_table_and_every_picture(demo):
    out, figures = demo
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", (out / "report.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    for row in figures["rows"]:
        assert f"<td>{row['perplexity']:,.2f}</td>" in shown
    assert shown.count("<svg") == 5


def test_an_out_that_is_taken(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(sys, "argv", ["krony", "demo", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2 and "is not empty" in capsys.readouterr().err


def test_the_example_runs(monkeypatch, capsys):
    """On a part of its text, for time."""
    monkeypatch.setattr(krony, "evaluate", partial(krony.evaluate, max_tokens=2048))
    monkeypatch.setattr(krony, "calibration_set", partial(krony.calibration_set, tokens=8192))
    runpy.run_path(str(EXAMPLES / "compress_and_reload.py"))
    assert "5,918,720 -> 4,345,880 parameters, 12 matrices replaced" in capsys.readouterr().out
