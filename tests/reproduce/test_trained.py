"""Tables 5 to 9 and Figure 1, with a model and a budget that train in a moment; the figures are checked against krony's
own verbs."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import krony
from data_folder import DATA, needs_data
from krony.cli.app import main
from krony.evaluation.perplexity import evaluate
from krony.models.surgery import count_parameters
from krony.reproduce.budgets import BUDGETS
from krony.reproduce.figures import GPT2, SETS, TABLE5_81M
from krony.reproduce.options import TableOptions
from krony.reproduce.targets import reproduce

TRAINED = ("table5", "table6", "table7", "table8", "table9", "figure1")
REAL = BUDGETS["quick"]
SENTENCE = "the quick brown fox jumps over the lazy dog and some words more, as they come. "


def write_data(folder):
    """Text as ``--data-dir`` wants it."""
    for name in ("wikitext-2", "wikitext-103"):
        (folder / name).mkdir(parents=True)
        (folder / name / "wiki.test.tokens").write_text(f" = A = \n {SENTENCE} \n\n" * 9)
    (folder / "lambada").mkdir()
    (folder / "lambada/lambada_test_plain_text.txt").write_text("some words and a last one\n" * 9)
    (folder / "openwebtext").mkdir()
    (folder / "openwebtext/train.jsonl").write_text(json.dumps({"text": SENTENCE * 60}) + "\n")
    (folder / "openwebtext/val.jsonl").write_text(json.dumps({"text": SENTENCE * 5}) + "\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_budget():
    """A quick budget of a few steps."""
    quick = BUDGETS["quick"]
    small = replace(
        quick,
        test_tokens=300,
        epoch_tokens=64 * 20,
        train=replace(quick.train, sequences=2, batch=2, epochs=1.5),
        final=replace(quick.final, sequences=4, batch=4),
        validation_rows=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "quick", small)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def options(place, gpt2_folder):
    return TableOptions(model=str(gpt2_folder), data_dir=write_data(place / "data"), work=place / "work")


@pytest.fixture(scope="module")
def outcomes(options):
    """Every table, with one work folder."""
    return {target: reproduce(target, options) for target in TRAINED}


def test_every_table_runs_and_shares_what_was_trained(outcomes, place):
    trained = sorted(p.name.rpartition("-")[0] for p in (place / "work").iterdir())
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
        assert any("in place of GPT-2" in sentence for sentence in outcome.header)
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


def test_figures_are_those_of_the_verbs(outcomes, options):
    """Before training: compress and evaluate by hand. The ratios: divided by hand."""
    outcome = outcomes["table5"]
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
    (file,) = options.work.glob("KronyPT-81M-*/figures.json")
    held = json.loads(file.read_text())["figures"]
    assert held["stages"]["start"][1] == pytest.approx(measured(), rel=1e-5)
    assert held["params"] == count_parameters(model)
    assert held["stages"]["full"][1] < held["stages"]["start"][1]  # training helped


def test_the_first_part_of_an_epoch_is_the_start_of_the_whole(outcomes, options):
    """Table 9 alone, which stops at 30 %, and the full training pass through the same state."""
    alone = reproduce("table9", replace(options, work=None))
    together = {(x.row, x.quantity): x.ours for x in outcomes["table9"].lines}
    for line in alone.lines:
        assert together[line.row, line.quantity] == pytest.approx(line.ours, rel=1e-5)


@pytest.fixture
def kept(outcomes, options, tmp_path):
    """The options with a copy of the work folder after all tables."""
    return replace(options, work=Path(shutil.copytree(options.work, tmp_path / "work")))


def swap_words(folder, name):
    """The same characters in another order: as many tokens, and another text."""
    file = folder / name
    file.write_text(file.read_text().replace("quick brown", "brown quick").replace("a last one", "one last a"))


@pytest.mark.parametrize(
    "name", ["openwebtext/train.jsonl", "openwebtext/val.jsonl", "wikitext-2/wiki.test.tokens", "lambada"]
)
def test_another_text_of_the_same_length_has_other_figures(outcomes, kept, tmp_path, name):
    """With the work folder of the first text: nothing of it is taken for the second's."""
    data = write_data(tmp_path / "data")
    swap_words(data, "lambada/lambada_test_plain_text.txt" if name == "lambada" else name)
    swapped = reproduce("figure1" if "val" in name else "table9", replace(kept, data_dir=data))
    before = outcomes[swapped.target].lines
    changed = {line.quantity for line, old in zip(swapped.lines, before, strict=True) if line.ours != old.ours}
    if "openwebtext" not in name:
        assert changed == {name.partition("/")[0]}
    else:
        assert changed


def test_other_weights_or_another_seed_have_other_figures_and_another_name_of_the_same_has_not(
    outcomes, kept, tmp_path
):
    model, tokenizer = krony.load_model(kept.model), krony.load_tokenizer(kept.model)

    def figures(**changes):
        model.save_pretrained(tmp_path / "copy")
        tokenizer.save_pretrained(tmp_path / "copy")
        lines = reproduce("figure1", replace(kept, model=str(tmp_path / "copy"), **changes)).lines
        return [line.ours for line in lines]

    before = [line.ours for line in outcomes["figure1"].lines]
    folders = set(kept.work.iterdir())
    assert figures() == before and set(kept.work.iterdir()) == folders  # nothing is trained again
    assert figures(seed=1) != before
    with torch.no_grad():
        model.transformer.h[2].mlp.c_proj.weight[-1, -1] += 0.5
    assert figures() != before


def test_a_damaged_work_folder_is_refused(kept):
    (file,) = kept.work.glob("KronyPT-92M-*/figures.json")
    file.write_text("{")
    with pytest.raises(krony.KronyError, match=r"figures.json is damaged: remove .*KronyPT-92M"):
        reproduce("figure1", kept)


def test_what_the_text_needs(options, tmp_path):
    options = replace(options, data_dir=write_data(tmp_path / "data"))
    full = replace(options, budget="full")
    with pytest.raises(krony.KronyError, match=r"needs all of OpenWebText, as nanoGPT writes it, in .*train.bin"):
        reproduce("table5", full)
    with pytest.raises(krony.KronyError, match=r"needs all of OpenWebText on disk: --data-dir DIR"):
        reproduce("table5", replace(full, data_dir=None))
    with pytest.raises(krony.KronyError, match=r"table5 needs OpenWebText to train on: --data-dir DIR, or the hub"):
        reproduce("table5", replace(options, data_dir=None))
    (tmp_path / "data/lambada/lambada_test_plain_text.txt").unlink()
    with pytest.raises(krony.KronyError, match=r"lambada_test_plain_text.txt can't be read"):
        reproduce("table5", options)


def test_the_full_budget_says_what_it_would_take(options, tmp_path):
    """The paper's recipe on the tokens of the .bin: 3 epochs and one more."""
    import numpy as np

    np.random.default_rng(0).integers(0, 256, 64 * 2000).astype("<u2").tofile(
        write_data(tmp_path / "data") / "openwebtext/train.bin"
    )
    said: list[str] = []
    full = replace(options, budget="full", dry_run=True, data_dir=tmp_path / "data", work=tmp_path / "w")
    outcome = reproduce("table5", replace(full, say=said.append))
    assert outcome.lines == [] and outcome.header == said
    assert "an epoch is 128,000 tokens" in said[1] and "each test set is complete" in said[1]
    assert "The text is too short for this budget" in said[2] and "240 rows of 64 tokens" in said[2]
    assert "KronyPT-81M 512,000; KronyPT-80M-2-factors 512,000 (" in said[3] and "About" in said[3]
    assert not (tmp_path / "w").exists()


def test_a_text_of_ones_own_keeps_the_budget_or_the_plan_says_what_changes(options, tmp_path):
    """Validation rows come from the same text, so a text with room for both has exactly the budget."""
    file, dry = tmp_path / "own.txt", replace(options, data=str(tmp_path / "own.txt"), dry_run=True, work=None)
    file.write_text(SENTENCE * 60)  # 79 * 60 = 4740 tokens, of which the budget takes 1280 and 2 rows of 64
    header = reproduce("figure1", dry).header
    assert "an epoch is 1,280 tokens" in header[1] and header[2].startswith("Tokens to train on")
    file.write_text(SENTENCE * 17 + SENTENCE[:40])  # 1343 tokens: 21 whole rows, one short of the budget's 20 and 2
    (sentence,) = [one for one in reproduce("figure1", dry).header if "too short" in one]
    assert "epochs of 1,280 tokens and 2 rows of 64" in sentence and "an epoch is 1,280 tokens, and 1 row" in sentence


def test_several_seeds(outcomes, kept):
    """The mean of both tables, and a range from one to the other; every table ends with a verdict."""
    alone = reproduce("table9", replace(kept, seed=1))
    both = reproduce("table9", replace(kept, seeds=2))
    for line, first, second in zip(both.lines, outcomes["table9"].lines, alone.lines, strict=True):
        assert line.ours == pytest.approx((first.ours + second.ours) / 2)
        assert line.spread == (min(first.ours, second.ours), max(first.ours, second.ours))
    assert any(line.spread[0] < line.spread[1] for line in both.lines)
    assert all("Verdict: " in str(outcome.verdict) for outcome in (both, *outcomes.values()))
    assert "--seeds 3" in str(outcomes["table9"].verdict) or outcomes["table9"].verdict.agrees


def test_what_is_kept_is_not_planned_again(outcomes, kept):
    planned = {name: reproduce("table5", replace(kept, dry_run=True, **changes)).header[-1] for name, changes in
               {"kept": {}, "new": {"seed": 5}}.items()}  # fmt: skip
    assert "KronyPT-81M 0; KronyPT-80M-2-factors 0 (" in planned["kept"]
    tokens = 64 * 20 * 2.5  # the small budget: 1.5 epochs and one more
    assert f"KronyPT-81M {tokens:,.0f}; KronyPT-80M-2-factors {tokens:,.0f} (" in planned["new"]


@pytest.mark.parametrize(
    ("stages", "epochs", "evaluations", "tested", "curve"),
    [
        ({"start", "full"}, (1.5, 1.0), 24, 2, 5),
        ({"start", "0.3"}, (0.3, 0.0), 4, 2, 4),
        ({"0.4"}, (0.4, 0), 0.4 / 0.15 + 2, 0, 5),
    ],
)
def test_the_work_of_a_run(options, stages, epochs, evaluations, tested, curve):
    """Counted by hand from the recipes: what the estimate of time multiplies."""
    from krony.reproduce.table_trainer import TableTrainer
    from krony.reproduce.trained import _set_up

    options = replace(options, work=None)
    setup = _set_up(options, "table7", "96M")
    trainer = TableTrainer(options, setup.base, "table7")
    work = trainer._work_left(setup.classic_96m, stages)
    assert work.tokens == pytest.approx(sum(epochs) * 64 * 20)
    assert work.steps == pytest.approx(epochs[0] * 20 / 2 + epochs[1] * 20 / 4)
    assert work.validated == pytest.approx(evaluations * 2 * 64)
    assert work.tested == pytest.approx(tested * sum(map(len, trainer.tests)) + curve * 2 * 64)


def test_text_that_is_too_short(options, tmp_path):
    (tmp_path / "few.txt").write_text(SENTENCE * 9)
    with pytest.raises(krony.KronyError, match=r"few.txt gives \d+ tokens to train on: at least 1,280 are needed"):
        reproduce("figure1", replace(options, data=str(tmp_path / "few.txt"), work=None))


def test_on_the_command_line(outcomes, options, place, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["krony", "reproduce", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code or 0, capsys.readouterr()

    common = ("--model", options.model, "--data-dir", options.data_dir, "--work", options.work)
    code, said = run("figure1", *common, "--plot", place / "f.svg", "--json", "-")
    assert code == 0, said.err
    assert len(json.loads(said.out)["lines"]) == 10 and "92M, rescaled" in (place / "f.svg").read_text()
    assert said.err.count("in place of GPT-2") == 1
    assert json.loads(said.out)["verdict"]["sentences"] and "Verdict: " in said.err
    code, said = run("table1")
    assert code == 0 and "124,439,832" in said.out and "Verdict: agrees. All 44 figures" in said.out
    for arguments, words in [
        (("table5", "--plot", "x.svg"), "it draws figure1"),
        (("figure1", *common, "--plot", "x.png"), "ends in .svg"),
        (("table11",), "is unknown: it is one of table1"),
        (("table5", *common, "--budget", "huge"), "it is quick or full"),
        (("table5", "--model", "nowhere/none"), "it is not in the hub's cache"),
    ]:
        code, said = run(*arguments)
        assert code == 2 and words in said.err and "Traceback" not in said.err and said.err.count("\n") == 1


def test_the_peers_are_what_they_say(options):
    """KnGPT2's way compresses attention of odd layers too; both have an embedding of their own, and a teacher."""
    from krony.reproduce.trained import _set_up

    setup = _set_up(options, "table6", "81M", "TQ")
    assert setup.tqcompressor.taught and setup.kngpt2.taught and not setup.krony_81m.taught
    counts = {}
    for run in (setup.tqcompressor, setup.kngpt2):
        model = krony.load_model(options.model)
        report = krony.compress(model, run.config)
        counts[run.name] = [layer.name for layer in report.layers]
    assert counts["as TQCompressor"] == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj", "transformer.wte"]
    assert len(counts["as KnGPT2"]) == 5 and "transformer.h.1.attn.c_attn" in counts["as KnGPT2"]


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("target", TRAINED)
def test_the_shipped_model_to_the_end(target, monkeypatch):
    """The real quick budget, without --work: each within ten minutes on two quiet cores."""
    monkeypatch.setitem(BUDGETS, "quick", REAL)
    outcome = reproduce(target, TableOptions(model="demo", data_dir=DATA))
    assert outcome.lines and all(math.isfinite(x.ours) for x in outcome.lines if x.ours is not None)
