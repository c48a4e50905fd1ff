"""Tables 5 to 9 and Figure 1, with a model and a budget that train in a moment; the figures are checked against krony's
own verbs."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import krony
from krony.cli import main
from krony.evaluation import evaluate
from krony.reproduce import Options, reproduce
from krony.reproduce.figures import GPT2, SETS, TABLE5_81M
from krony.reproduce.studio import BUDGETS, Studio
from krony.surgery import count_parameters

TRAINED = ("table5", "table6", "table7", "table8", "table9", "figure1")
SENTENCE = "the quick brown fox jumps over the lazy dog and some words more, as they come. "


@pytest.fixture
def place(tmp_path, monkeypatch, gpt2_folder):
    """A folder with text, as ``--data-dir`` wants it, and a quick budget of a few steps."""
    for name, file in [("wikitext-2", "wiki.test.tokens"), ("wikitext-103", "wiki.test.tokens")]:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / file).write_text(f" = A = \n {SENTENCE} \n\n" * 9)
    (tmp_path / "data/lambada").mkdir()
    (tmp_path / "data/lambada/lambada_test_plain_text.txt").write_text("some words and a last one\n" * 9)
    (tmp_path / "data/openwebtext").mkdir()
    (tmp_path / "data/openwebtext/train.jsonl").write_text(json.dumps({"text": SENTENCE * 60}) + "\n")
    (tmp_path / "data/openwebtext/val.jsonl").write_text(json.dumps({"text": SENTENCE * 5}) + "\n")
    quick = BUDGETS["quick"]
    small = replace(
        quick,
        test_tokens=300,
        epoch_tokens=64 * 40,
        train=replace(quick.train, sequences=2, batch=2, epochs=2.0),
        final=replace(quick.final, sequences=4, batch=2),
        validation_rows=4,
    )
    monkeypatch.setitem(BUDGETS, "quick", small)
    return tmp_path


@pytest.fixture
def options(place, gpt2_folder):
    return Options(model=str(gpt2_folder), data_dir=place / "data", work=place / "work")


def test_every_table_runs_and_shares_what_was_trained(options, place):
    outcomes = {target: reproduce(target, options) for target in TRAINED}
    trained = sorted(p.name for p in (place / "work").iterdir())
    assert trained == [
        "KronyPT-80M-2-factors",
        "KronyPT-81M",
        "KronyPT-92M",
        "KronyPT-96M-VL",
        "KronyPT-96M-prune",
        "as-KnGPT2",
        "as-TQCompressor",
    ]
    for outcome in outcomes.values():
        assert any("in GPT-2's place" in sentence for sentence in outcome.header)
        assert all(line.ours is None or line.ours > 0 for line in outcome.lines)
    five, six = ({(x.row, x.quantity): x for x in outcomes[t].lines} for t in ("table5", "table6"))
    for data in SETS:  # one run, two tables
        both = [t["KronyPT-81M", data].ours for t in (five, six)]
        assert both[0] == both[1]
        assert five["GPT2", data].ratio == 1.0
        assert five["DistilGPT2", data].quoted and five["DistilGPT2", data].ours is None
    rows = {line.row for line in outcomes["table8"].lines}
    assert len(rows) == 5 and any("swapped" in line.note for line in outcomes["table8"].lines)
    curves = outcomes["figure1"].curves
    assert [share for share, _ in curves["92M, rescaled"]] == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_figures_are_those_of_the_verbs(options):
    """Before training: compress and evaluate by hand. The ratios: divided by hand."""
    outcome = reproduce("table5", options)
    line = next(x for x in outcome.lines if (x.row, x.quantity) == ("KronyPT-81M", "wikitext-2"))
    model, tokenizer = krony.load_model(options.model), krony.load_tokenizer(options.model)

    def measured():
        found = evaluate(model, tokenizer, "wikitext-2", data_dir=options.data_dir, max_tokens=300)
        return found.perplexity

    base = measured()
    assert line.ratio == pytest.approx(line.ours / base, rel=1e-6)
    assert line.paper_ratio == pytest.approx(TABLE5_81M[1] / GPT2[1])
    assert line.difference == pytest.approx(line.ratio - line.paper_ratio)
    krony.compress(model, krony.KronyConfig("48x48", init="van-loan"))
    held = json.loads((options.work / "KronyPT-81M/figures.json").read_text())["figures"]
    assert held["stages"]["start"][1] == pytest.approx(measured(), rel=1e-5)
    assert held["params"] == count_parameters(model)
    assert held["stages"]["full"][1] < held["stages"]["start"][1]  # training helped


def test_the_first_part_of_an_epoch_is_the_start_of_the_whole(options, place):
    """Table 9's 30 % and Table 8's full run pass through the same state: one schedule, one order of the text."""
    nine = reproduce("table9", options)
    alone = {(x.row, x.quantity): x.ours for x in nine.lines}
    eight = reproduce("table8", replace(options, work=place / "other"))
    assert eight.lines
    held = json.loads((place / "other/KronyPT-92M/figures.json").read_text())["figures"]["stages"]
    for index, data in enumerate(SETS):
        assert held["0.3"][index] == pytest.approx(alone["92M, 30 % of an epoch", data], rel=1e-5)


def test_a_work_folder_of_something_else_is_refused(options, place):
    reproduce("figure1", options)
    with pytest.raises(krony.KronyError, match="is of another model, text, budget or version"):
        reproduce("figure1", replace(options, seed=1))
    file = place / "work/KronyPT-92M/figures.json"
    file.write_text("{")
    with pytest.raises(krony.KronyError, match=r"figures.json is damaged: remove .*KronyPT-92M"):
        reproduce("figure1", options)


def test_what_the_text_needs(options, place, gpt2_folder):
    full = replace(options, budget="full")
    with pytest.raises(krony.KronyError, match=r"needs all of OpenWebText, as nanoGPT writes it, in .*train.bin"):
        reproduce("table5", full)
    with pytest.raises(krony.KronyError, match=r"needs all of OpenWebText on disk: --data-dir DIR"):
        reproduce("table5", replace(full, data_dir=None))
    with pytest.raises(krony.KronyError, match=r"table5 needs OpenWebText to train on: --data-dir DIR, or the hub"):
        reproduce("table5", replace(options, data_dir=None))
    (place / "data/lambada/lambada_test_plain_text.txt").unlink()
    with pytest.raises(krony.KronyError, match=r"lambada_test_plain_text.txt can't be read"):
        reproduce("table5", options)


def test_the_full_budget_says_what_it_would_take(options, place, gpt2_folder):
    """The paper's recipe on the tokens of the .bin: 3 epochs and one more."""
    import numpy as np

    np.random.default_rng(0).integers(0, 256, 64 * 500).astype("<u2").tofile(place / "data/openwebtext/train.bin")
    said = []
    outcome = reproduce("table5", replace(options, budget="full", dry_run=True, say=said.append))
    assert outcome.lines == [] and outcome.header == said
    assert "an epoch is 32,000 tokens" in said[1] and "each test set whole" in said[1]
    assert "KronyPT-81M 128,000; KronyPT-80M-2-factors 128,000. About" in said[2]
    assert not (place / "work").exists()


def test_quick_on_rows_that_are_few(options, place):
    (place / "few.txt").write_text(SENTENCE * 8)
    studio = Studio(replace(options, data=str(place / "few.txt")), krony.load_model(options.model), "table5")
    assert len(studio.train) + 0 >= 1 and len(studio.validation) >= 1


def test_on_the_command_line(options, place, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["krony", "reproduce", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code or 0, capsys.readouterr()

    common = ("--model", options.model, "--data-dir", options.data_dir, "--work", options.work)
    code, said = run("figure1", *common, "--plot", place / "f.svg", "--json", "-")
    assert code == 0, said.err
    assert len(json.loads(said.out)["lines"]) == 10 and "92M, rescaled" in (place / "f.svg").read_text()
    assert said.err.count("in GPT-2's place") == 1
    code, said = run("table1")
    assert code == 0 and "124,439,832" in said.out
    for arguments, words in [
        (("table5", "--plot", "x.svg"), "it draws figure1"),
        (("figure1", *common, "--plot", "x.png"), "ends in .svg"),
        (("table11",), "is unknown: it is one of table1"),
        (("table5", *common, "--budget", "huge"), "it is quick or full"),
        (("table5", "--model", "nowhere/none"), "can't be fetched from the hub"),
    ]:
        code, said = run(*arguments)
        assert code == 2 and words in said.err and "Traceback" not in said.err and said.err.count("\n") == 1


def test_the_peers_are_what_they_say(options):
    """KnGPT2's way compresses attention of odd layers too; both have an embedding of their own, and a teacher."""
    from krony.reproduce.trained import _bench

    bench = _bench(options, "table6", "81M", "TQ")
    assert bench.tqcompressor.taught and bench.kngpt2.taught and not bench.krony_81m.taught
    counts = {}
    for run in (bench.tqcompressor, bench.kngpt2):
        model = krony.load_model(options.model)
        report = krony.compress(model, run.config)
        counts[run.name] = [layer.name for layer in report.layers]
    assert counts["as TQCompressor"] == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj", "transformer.wte"]
    assert len(counts["as KnGPT2"]) == 5 and "transformer.h.1.attn.c_attn" in counts["as KnGPT2"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TRAINED)
def test_the_shipped_model_to_the_end(target, tmp_path):
    """The real quick budget, without --work: each within ten minutes on two quiet cores."""
    import os
    from pathlib import Path

    data = Path(os.environ.get("KRONY_DATA") or Path(__file__).parents[3] / "shared/data")
    if not data.is_dir():
        pytest.skip("the data folder is not here")
    outcome = reproduce(target, Options(model="demo", data_dir=data))
    assert outcome.lines and all(torch.isfinite(torch.tensor(x.ours)) for x in outcome.lines if x.ours is not None)
