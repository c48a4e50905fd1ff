"""``krony heal``, used as its help says, stopped, resumed, and where it must refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from krony.errors import KronyError
from krony.models.loading import load_model
from krony.models.surgery import kronecker_layers
from krony.pages import shown
from krony.storage.locks import working_in
from processes import Process
from processes import krony as run_krony
from small_models import gpt2


@pytest.fixture
def options(tmp_path) -> tuple:
    """Documents that repeat each other's words, and rows of 32 tokens."""
    words = "one two three four five six seven eight nine ten. " * 4
    lines = [json.dumps({"text": f"{number}: {words}"}) + "\n" for number in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return ("--data", tmp_path / "text.jsonl", "--length", 32, "--learning-rate", 0.003, "--max-tokens", 6000)


def test_the_scalars_of_a_healed_model_are_shown_and_drawn(krony, refused, gpt2_folder, tmp_path, options):
    made = krony("compress", gpt2_folder, tmp_path / "in", "--scheme", "48x48:2", "--init", "van-loan")
    assert made.code == 0
    options += ("--scalar-learning-rate", 0.05, "--json", "-")
    healed = krony("heal", tmp_path / "in", tmp_path / "out", *options)
    assert healed.code == 0, healed.err
    shown = krony("inspect", tmp_path / "out", "--trajectory", "--plot", tmp_path / "s.svg", "--json", "-")
    assert shown.code == 0 and shown.json["scalars"] == healed.json["scalars"] and len(shown.json["scalars"]) == 6
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "out").transformer.h[0].mlp.c_fc.scalars
    points = shown.json["scalars"]["transformer.h.0.mlp.c_fc"]
    assert any(values == pytest.approx(last.tolist(), abs=1e-6) for _, values in points)  # the best state's
    assert "the 12 scalars go from" in (tmp_path / "s.svg").read_text()
    assert "holds no scalars.json" in refused("inspect", tmp_path / "in", "--trajectory")
    assert "leave --base out" in refused("inspect", tmp_path / "out", "--trajectory", "--base", gpt2_folder)


def test_heal(krony, compressed, gpt2_folder, tmp_path, options):
    options += ("--teacher", gpt2_folder, "--hidden", 1, "--control", gpt2_folder, "--json", tmp_path / "h.json")
    done = krony("heal", compressed, tmp_path / "out", *options)
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "h.json").read_text())
    control = figures["control"]
    assert control["tokens"] == figures["tokens"] and control["perplexity_after"] < control["perplexity_before"]
    assert figures["perplexity_original"] == control["perplexity_before"] and figures["improved"]
    assert f"{control['perplexity_after']:.2f}" in done.out
    assert list((tmp_path / "out/control/runs").rglob("events*"))
    assert 0 < figures["tokens"] <= 6000 and figures["perplexity_after"] > 1 and len(figures["curve"]) > 5
    assert "validation perplexity" in done.out and "to train on, 512 to validate on" in done.out
    assert not (tmp_path / "out.work").exists() and list((tmp_path / "out/runs").rglob("events*"))
    assert f"{figures['tokens']:,} tokens" in (tmp_path / "out/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert kronecker_layers(model) and AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]


def test_one_recipe_after_another(krony, compressed, gpt2_folder, tmp_path, options):
    done = krony("heal", compressed, tmp_path / "out", *options, "--then", "quick", "--json", "-")
    assert done.code == 0, done.err
    assert done.json["recipe"] == "quick, then quick" and done.json["tokens"] > 6000
    assert list((tmp_path / "out/then/runs").rglob("events*")) and not (tmp_path / "out.work").exists()
    assert "quick, then quick" in (tmp_path / "out/README.md").read_text()
    for extra, words in [
        (("--then", "fast"), "recipe 'fast' is unknown"),
        (("--then", "quick", "--control", gpt2_folder), "--control trains by one recipe, and --then adds another"),
        (("--then", "paper-final"), "one step of this recipe takes 320"),
    ]:
        refused = krony("heal", compressed, tmp_path / "other", *options, *extra)
        assert refused.code == 2 and words in " ".join(refused.err.split())
        assert not (tmp_path / "other").exists()


def test_a_model_that_nothing_improves_is_not_written(krony, compressed, tmp_path, options):
    """Exit code 1; the figures are written all the same, and the trained state by a second command."""
    options += ("--learning-rate", 1, "--warm-up", 0, "--json")
    done = krony("heal", compressed, tmp_path / "out", *options, tmp_path / "h.json")
    assert done.code == 1 and not (tmp_path / "out").exists(), done
    said = " ".join(done.err.split())
    assert "training did not improve the model: validation perplexity was 2" in said
    assert "out was not written;" in said and "out.work holds the checkpoints" in said and "--keep-anyway" in said
    figures = json.loads((tmp_path / "h.json").read_text())
    assert not figures["improved"] and figures["perplexity_after"] == figures["perplexity_before"]
    assert figures["perplexity_trained"] > figures["perplexity_before"]
    assert f"after {shown(figures['perplexity_trained'])}" in " ".join(done.out.split())
    again = krony("heal", compressed, tmp_path / "out", *options, tmp_path / "out/h.json", "--resume")
    assert again.code == 1 and json.loads((tmp_path / "out.work/h.json").read_text())["improved"] is False
    kept = krony("heal", compressed, tmp_path / "out", *options, "-", "--resume", "--keep-anyway")
    assert kept.code == 0 and not (tmp_path / "out.work").exists(), kept.err
    assert kept.json["perplexity_after"] == kept.json["perplexity_trained"] == figures["perplexity_trained"]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (compressed, tmp_path / "out"))
    assert not torch.equal(ours.transformer.h[0].mlp.c_fc.weight, theirs.transformer.h[0].mlp.c_fc.weight)


def test_a_control_that_nothing_improves_is_said_to_be_the_control(krony, compressed, gpt2_folder, tmp_path, options):
    """The model has a teacher and improves; the original is trained at a rate that is too high for it."""
    options += ("--teacher", gpt2_folder, "--control", gpt2_folder, "--warm-up", 0, "--json", "-")
    options += ("--inherited-learning-rate", 1.5, "--freeze", "inherited")
    done = krony("heal", compressed, tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert "warning: training did not improve the control" in done.err
    control = done.json["control"]
    assert control["perplexity_after"] == control["perplexity_before"] == done.json["perplexity_original"]


def test_resumed_before_the_first_checkpoint(krony, compressed, tmp_path, options):
    """A run that was stopped that early has nothing to resume, and nothing that stands in the way of starting."""
    (tmp_path / "out.work").mkdir()
    done = krony("heal", compressed, tmp_path / "out", *options, "--resume")
    assert done.code == 0, done.err
    assert "holds no checkpoint yet: starting from the beginning" in " ".join((done.out + done.err).split())
    assert (tmp_path / "out/config.json").exists() and not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KronyError("the loss is nan at step 3: lower the learning rate"), "the loss is nan at step 3"),
        (torch.OutOfMemoryError("CUDA out of memory"), "there is not enough memory"),
    ],
    ids=["a loss that is no number", "no memory"],
)
def test_a_control_that_cannot_be_trained_does_not_cost_the_model(
    krony, compressed, gpt2_folder, tmp_path, monkeypatch, options, error, words
):
    from krony.healing import control

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(control, "train_on_rows", fail)
    options += ("--control", gpt2_folder, "--json", tmp_path / "h.json")
    done = krony("heal", compressed, tmp_path / "out", *options)
    said = " ".join(done.err.split())
    assert done.code == 1 and f"the control {gpt2_folder} could not be trained: {words}" in said
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") and not (tmp_path / "out.work").exists()
    figures = json.loads((tmp_path / "h.json").read_text())
    assert figures["improved"] and figures["control"]["error"].startswith(words)


def test_resumed_while_the_control_had_no_checkpoint(krony, compressed, gpt2_folder, tmp_path, monkeypatch, options):
    """The model itself is trained to its end by then: it resumes from its last checkpoint, and the control starts."""
    from krony.healing import control

    options += ("--control", gpt2_folder)
    train = control.train_on_rows

    def stop(*_, work, **__):
        work.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(control, "train_on_rows", stop)
    stopped = krony("heal", compressed, tmp_path / "out", *options)
    assert stopped.code == 130 and "the same command with --resume continues from there" in stopped.err
    assert list((tmp_path / "out.work").glob("checkpoint-*")) and (tmp_path / "out.work/control").exists()
    monkeypatch.setattr(control, "train_on_rows", train)
    done = krony("heal", compressed, tmp_path / "out", *options, "--resume", "--json", tmp_path / "h.json")
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "h.json").read_text())
    assert figures["control"]["tokens"] == figures["tokens"] > 0


def test_stopped_by_sigterm_and_resumed(krony, compressed, tmp_path, options):
    """Somewhere between two steps; the weights are those of a run that nothing stopped."""
    options += ("--device", "cpu", "--epochs", 2)
    assert krony("heal", compressed, tmp_path / "expected", *options).code == 0
    process = Process(tmp_path / "process", run_krony, "heal", compressed, tmp_path / "out", *options)
    while not list((tmp_path / "out.work").glob("checkpoint-*/trainer_state.json")) and process.is_alive():
        time.sleep(0.02)
    process.send(signal.SIGTERM)
    code, errors = process.ended()
    assert code == 143 and "Traceback" not in errors, errors
    assert "is the last checkpoint: the same command with --resume continues from there" in errors
    assert not (tmp_path / "out").exists()
    assert krony("heal", compressed, tmp_path / "out", *options, "--resume").code == 0
    expected, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("expected", "out"))
    assert expected == resumed


def test_stopped_when_out_is_complete(krony, compressed, tmp_path, monkeypatch, options):
    """While the checkpoints are removed: there is nothing to resume."""
    remove = shutil.rmtree

    def stopped(path, *given, **more):
        if Path(path).name == "out.work":
            os.kill(os.getpid(), signal.SIGTERM)
        remove(path, *given, **more)

    monkeypatch.setattr("krony.cli.heal.shutil.rmtree", stopped)
    done = krony("heal", compressed, tmp_path / "out", *options)
    assert done.code == 143 and f"{tmp_path / 'out'} is complete" in done.err and "--resume" not in done.err
    load_model(str(tmp_path / "out"))


def test_tokens_need_no_tokenizer(krony, refused, tmp_path, options):
    """As published checkpoints come without one. Its documents are known by their text, where it was calibrated."""
    gpt2().save_pretrained(tmp_path / "in")
    (np.arange(4000) * 3 % 250).astype("<u2").tofile(tmp_path / "train.bin")
    np.full(640, 7).astype("<u2").tofile(tmp_path / "val.bin")
    options = (tmp_path / "out", *options[2:], "--val", tmp_path / "val.bin", "--freeze", "none")
    assert krony("heal", tmp_path / "in", *options, "--data", tmp_path / "train.bin", "--dry-run").code == 0
    done = krony("heal", tmp_path / "in", *options, "--data", tmp_path / "train.bin", "--keep-anyway")
    assert done.code == 0, done.err
    assert not (tmp_path / "out/tokenizer.json").exists() and load_model(str(tmp_path / "out"))
    words = "no tokenizer can be loaded from there"
    assert words in refused("heal", tmp_path / "in", tmp_path / "new", *options[1:], "--data", tmp_path / "text.jsonl")
    assert not (tmp_path / "new").exists()


def test_one_run_at_a_time(refused, compressed, tmp_path, options):
    command = "from krony.storage.locks import working_in; from pathlib import Path; import sys, time\n"
    command += f"with working_in(Path({str(tmp_path / 'out')!r})): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert "out is in use by process" in refused("heal", compressed, tmp_path / "out", *options)
    finally:
        holder.kill()
        holder.communicate()
    with working_in(tmp_path / "out"):
        pass


def test_mistakes(refused, compressed, tmp_path, options):
    (tmp_path / "text.txt").write_text("too short")
    arguments = ("heal", compressed, tmp_path / "out", "--data", tmp_path / "text.txt")
    assert "has 9 tokens: at least 64 make one row" in refused(*arguments)
    assert "recipe 'slow' is unknown: it is one of quick, paper" in refused(*arguments, "--recipe", "slow")
    assert "--hidden works with a teacher: name it with --teacher" in refused(*arguments, "--hidden", 1)
    assert "learning_rate is -1.0: it takes a number above 0" in refused(*arguments, "--learning-rate", -1)
    (tmp_path / "out.work").mkdir()
    assert "belongs to an unfinished run: --resume continues it, or remove it" in refused(*arguments)
    (tmp_path / "out.work").rmdir()
    assert "device is 'banana': healing takes cpu or cuda" in refused(*arguments, "--device", "banana")
    (tmp_path / "text.txt").write_text("long enough for some rows of text " * 100)
    assert "is one document, and validation takes complete documents" in refused(*arguments)
    assert "holds no checkpoint: there is nothing to resume" in refused(*arguments, "--resume")
    assert "freeze 'left' is unknown: it is one of none, right" in refused(*arguments, "--freeze", "left")
    longer = (*arguments[:3], *options, "--length", 100)
    assert "rows of 100 tokens: the model takes 64" in refused(*longer)
    assert "nowhere: there is no such folder" in refused(*arguments, "--control", "nowhere")
    assert "lambada is a test set" in refused(*arguments[:3], "--data", "lambada")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["--teacher", "--control"])
def test_sharded_it_gives_the_same_model(krony, compressed, gpt2_folder, tmp_path, options, beside):
    """The original too is measured, or trained, in shards."""
    options += (beside, gpt2_folder, "--device", "cpu", "--dtype", "float64", "--max-tokens", 1500, "--json")
    alone = krony("heal", compressed, tmp_path / "alone", *options, "-")
    assert alone.code == 0, alone.err
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "krony"]
    command = [*launcher, "heal", compressed, tmp_path / "out", *options, tmp_path / "h.json", "--shard"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    figures, expected = json.loads((tmp_path / "h.json").read_text()), alone.json
    for key in ("perplexity_before", "perplexity_after", "perplexity_original"):
        assert figures[key] == pytest.approx(expected[key], rel=1e-6), key
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("alone", "out"))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-7, atol=1e-7, msg=name)
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "alone/config.json").read_text()
