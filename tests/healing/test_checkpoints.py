"""What a run leaves: complete checkpoints whatever happens, its settings, and nothing in the working directory."""

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from healing_runs import TINY, heal, text
from krony import KronyConfig, KronyError, compress, load_model
from krony.data.rows import Rows
from krony.healing.checkpoints import FINGERPRINTS, START, explain_write_errors, find_last, last_checkpoint, save_start
from krony.healing.options import HealOptions
from krony.healing.training import settings_of
from krony.storage import tensor_files
from small_models import gpt2


def rows(count: int = 44) -> tuple[Rows, Rows]:
    return text(count).split(4)


def small():
    model = gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    return model


@pytest.mark.parametrize("limit", [20_000, 450_000])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, limit):
    """No file may grow beyond the limit from step 6 on: it hits the weights, or the optimizer's state."""
    whole = small()
    expected = heal(whole, *rows(), work=tmp_path / "whole", device="cpu")
    files = {path.name: path.stat().st_size for path in last(tmp_path / "whole").iterdir()}
    assert files["model.safetensors"] < 450_000 < files["optimizer.pt"]

    work, before = tmp_path / "work", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int, *_) -> None:
        if done == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    try:
        with pytest.raises(KronyError, match=r"work can't be written, .*: make room, and resume from checkpoint-5"):
            heal(small(), *rows(), work=work, device="cpu", progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last(work).name == "checkpoint-5" and not (work / "checkpoint-6").exists()

    again = small()
    report = heal(again, *rows(), work=work, device="cpu", resume=True)
    assert report.curve == expected.curve and report.validation == expected.validation
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def last(work: Path) -> Path:
    return Path(last_checkpoint(work))


def test_half_a_checkpoint_is_none(tmp_path):
    for step, content in ((9, "{}"), (10, '{"half": '), (11, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if content is not None:
            (folder / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-old").mkdir()
    assert last(tmp_path).name == "checkpoint-9"
    shutil.rmtree(tmp_path / "checkpoint-9")
    assert find_last(tmp_path) is None
    with pytest.raises(KronyError, match="holds no checkpoint: there is nothing to resume"):
        last_checkpoint(tmp_path)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="size mismatch"), explain_write_errors(tmp_path):
        raise RuntimeError("size mismatch")


def test_a_new_run_does_not_mix_its_checkpoints_with_an_earlier_ones(tmp_path):
    heal(small(), *rows(), work=tmp_path, device="cpu")
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KronyError, match=r"holds checkpoint-\d+ of an earlier run: resume it, or name a new folder"):
        heal(small(), *rows(), work=tmp_path, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_a_resumed_run_keeps_its_settings(tmp_path):
    heal(small(), *rows(), work=tmp_path, device="cpu")
    for changes, words in [
        ({"recipe": replace(TINY, learning_rate=1e-3)}, "with learning_rate 0.003, and now it is 0.001: resume with"),
        ({"freeze": "none"}, "with freeze right, and now it is none"),
        ({"seed": 1}, "with seed 0, and now it is 1"),
        ({"recipe": replace(TINY, text=0.75)}, "with text 0.0, and now it is 0.75"),
        ({"teacher": gpt2()}, "belongs to a run with another teacher: resume with the same"),
    ]:
        with pytest.raises(KronyError, match=words):
            heal(small(), *rows(), work=tmp_path, resume=True, device="cpu", **({"recipe": TINY} | changes))
    other = Rows(np.zeros(44 * 32, dtype=np.uint16), 32).split(4)
    with pytest.raises(KronyError, match="with another training text"):
        heal(small(), *other, work=tmp_path, resume=True, device="cpu")
    others = gpt2(), small()  # of other shapes, and of other values alone
    with torch.no_grad():
        others[1].transformer.h[1].mlp.c_fc.weight.mul_(1.01)
    for model in others:
        with pytest.raises(KronyError, match="with another model"):
            heal(model, *rows(), work=tmp_path, resume=True, device="cpu")
    heal(small(), *rows(), work=tmp_path, resume=True, recipe=replace(TINY, batch=4), device="cpu")  # another machine


def test_a_text_with_another_end_is_another_text():
    tokens = np.zeros(1_100_000, dtype=np.uint16)
    longer = tokens.copy()
    longer[-1] = 1
    model, held = gpt2(), text(4)
    one, other = (
        settings_of(model, Rows(ids, 32), held, recipe=TINY, teacher=None, options=HealOptions())
        for ids in (tokens, longer)
    )
    assert one[FINGERPRINTS].pop("training text") != other[FINGERPRINTS].pop("training text")
    assert one == other


def test_the_start_is_complete_or_absent(tmp_path, monkeypatch):
    model = small()
    save_start(model, tmp_path)
    before = (tmp_path / START).read_bytes()

    def killed(_: dict, file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tensor_files, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_start(gpt2(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {START: before}


def test_a_checkpoint_is_a_model(tmp_path, tokenizer):
    """What a run that broke tells to start from can be started from."""
    with pytest.raises(KronyError, match="is a model to start from"):
        recipe = replace(TINY, learning_rate=1e30)  # the first step of the warm-up is none
        heal(small(), *rows(), work=tmp_path, recipe=recipe, tokenizer=tokenizer, device="cpu")
    checkpoint = str(last(tmp_path))
    assert AutoTokenizer.from_pretrained(checkpoint)("ab")["input_ids"] == tokenizer("ab")["input_ids"]
    assert load_model(checkpoint)(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_nothing_is_written_elsewhere(tmp_path, monkeypatch):
    """The log too: TensorBoard's default is the working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    heal(small(), *rows(), work=tmp_path / "work", device="cpu", seed=1)
    heal(small(), *rows(), work=tmp_path / "work", device="cpu", seed=1, resume=True)
    assert not list(here.iterdir())
    assert list((tmp_path / "work/runs").glob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "work/settings.json").read_text())["seed"] == 1


def test_weights_and_biases_where_it_is_installed(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("WANDB_MODE", "offline")
    heal(small(), *rows(), work=tmp_path / "work", device="cpu")
    assert list((tmp_path / "work/wandb").glob("offline-run-*/*.wandb")) and wandb.run is None
    assert not list(here.iterdir())
