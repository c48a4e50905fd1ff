"""Tasks of the lm-evaluation-harness, offline: its accuracy of the last word is krony's own."""

import importlib.util
import json
import logging
import re
import sys
from pathlib import Path

import pytest

import krony
from data_folder import DATA, needs_data
from krony.evaluation.harness import run_tasks
from krony.evaluation.perplexity import last_word_accuracy
from small_models import gpt2

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' ' + text.split(' ')[-1]}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Writes a task over passages; the harness caches the data in ``tmp_path``."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, passages):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": p}) + "\n" for p in passages))
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=file))
        return str(tmp_path / f"{name}.yaml")

    return write


@needs_harness
@needs_data
@pytest.mark.parametrize("kind", ["plain", "openai"])
def test_lambada_has_the_accuracy_of_krony_eval(kind, task):
    """All 5,153 passages give the same figure too (0.0833 on the OpenAI variant); a part of them is enough here."""
    if kind == "plain":
        passages = (DATA / "lambada/lambada_test_plain_text.txt").read_text().splitlines()[:120]
    else:
        lines = (DATA / "lambada/lambada_test.jsonl").read_text().splitlines()[:120]
        passages = [json.loads(line)["text"] for line in lines]
    model, tokenizer = krony.demo_model(), krony.load_tokenizer("demo")
    expected = last_word_accuracy(model, tokenizer, [p.strip() for p in passages])
    (result,) = run_tasks(model, tokenizer, [task(f"lambada_{kind}", [p.strip() for p in passages])])
    assert result.metric == "acc" and result.value == expected
    assert 0 < expected < 0.5


@needs_harness
def test_on_the_command_line(task, tmp_path, gpt2_folder, monkeypatch, capsys):
    from krony.cli.app import main

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["krony", "eval", str(gpt2_folder), *map(str, options)])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, capsys.readouterr()

    file = task("words", ["one two three", "four five six"])
    code, said = run("--tasks", file, "--limit", 1, "--report", tmp_path / "r.html", "--json", "-")
    assert code == 0, said.err
    figures = json.loads(said.out)
    assert figures["results"] == [] and figures["tasks"][0]["task"] == "words"
    assert "words" in (tmp_path / "r.html").read_text() and "it/s" not in said.err
    assert run("--limit", 3)[0] == 2
    code, said = run("--tasks", " , ")
    assert code == 2 and "--tasks names no task" in said.err


@needs_harness
def test_tasks_that_are_not_known_or_whose_data_cannot_be_had(tokenizer):
    for task, words in [
        ("no_such_task", "knows no task 'no_such_task'"),
        ("none.yaml", "there is no such task file"),
        ("lambada_openai", "lambada_openai: the harness can't run them here: .*Hub"),
    ]:
        with pytest.raises(krony.KronyError, match=words):
            run_tasks(gpt2(), tokenizer, [task])


@needs_harness
def test_loggers_are_as_they_were(task, tokenizer):
    """Only the harness's own are quiet, and only while it runs; the root logger belongs to the application."""
    import lm_eval.tasks

    names = [None, "lm_eval", lm_eval.tasks.__name__, "datasets"]
    for number, name in enumerate(names):
        logging.getLogger(name).setLevel(logging.INFO + number)
    try:
        run_tasks(gpt2(), tokenizer, [task("quiet", ["one two", "three four"])])
        with pytest.raises(krony.KronyError):
            run_tasks(gpt2(), tokenizer, ["no_such_task"])
        assert [logging.getLogger(name).level - logging.INFO for name in names] == [0, 1, 2, 3]
    finally:
        for name, level in zip(names, (logging.WARNING, 0, 0, logging.WARNING), strict=True):
            logging.getLogger(name).setLevel(level)


def test_no_file_of_the_package_touches_the_root_logger():
    for path in Path(krony.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"getLogger\(\)|basicConfig|logging\.root|logging\.disable\(", text), path


def test_without_the_harness(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(krony.KronyError, match=r"pip install lm-eval"):
        run_tasks(gpt2(), tokenizer, ["lambada_openai"])


def test_counts_of_parameters(gpt2_folder, monkeypatch, capsys):
    from krony.cli.app import main

    file = gpt2_folder.parent / "text.txt"
    file.write_text("some words to predict")
    options = ["--data", str(file), "--count", "untied", "--json", "-"]
    monkeypatch.setattr(sys, "argv", ["krony", "eval", str(gpt2_folder), *options])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert figures["params_untied"] == figures["params"] + 257 * 48
    assert f"{figures['params_untied']:,} with the head counted separately" in said.err
    monkeypatch.setattr(sys, "argv", ["krony", "eval", str(gpt2_folder), "--count", "twice"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2 and "it is tied or untied" in capsys.readouterr().err
