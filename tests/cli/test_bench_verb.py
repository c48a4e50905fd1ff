"""``krony bench``, used as its help says and wrongly."""

import json
import shutil

import pytest

from krony.models.loading import load_model

FAST = ("--rounds", 1, "--length", 8, "--context", 4, "--new-tokens", 1, "--no-train")


def test_bench_beside_one_another(krony, gpt2_folder, compressed, tmp_path):
    options = ("--sweep-lengths", "4,8", "--plot", tmp_path / "p.svg", "--report", tmp_path / "r.html")
    done = krony("bench", gpt2_folder, compressed, "--scheme", "48x48", *FAST[:-1], *options, "--json", "-")
    assert done.code == 0, done.err
    names = [model["name"] for model in done.json["models"]]
    assert names == [gpt2_folder.name, compressed.name, f"{gpt2_folder.name} 48x48"]
    assert str(gpt2_folder) not in done.err and done.json["device"] == "cpu"
    assert f"no verdict on {compressed.name}" in done.err and len(done.json["verdicts"]) == 6
    assert all(sentence in done.err for sentence in done.json["verdicts"])
    rows = [line.split()[:3] for line in done.err.splitlines()]
    assert ["1", "x", "4"] in rows and ["1", "x", "8"] in rows
    size = (compressed / "model.safetensors").stat().st_size
    assert done.json["models"][1]["bytes"] == size
    assert done.json["models"][0]["ratio"]["train"] == 1.0 and len(done.json["models"][2]["sweep"]) == 2
    assert "prefill of 1 x 8 tokens" in done.err and "<svg" in (tmp_path / "p.svg").read_text()
    page = (tmp_path / "r.html").read_text()
    assert "48x48" in page and page.count("<svg") == 3


def test_models_of_two_dtypes(krony, gpt2_folder, compressed, tmp_path):
    """Each as it is saved, which is said; --dtype sets one, and sizes are then of files of that dtype."""
    load_model(gpt2_folder, dtype="bfloat16").save_pretrained(tmp_path / "half")
    done = krony("bench", gpt2_folder, tmp_path / "half", *FAST, "--json", "-")
    assert done.code == 0, done.err
    assert done.json["dtype"] == "float32 and bfloat16"
    assert f"the dtypes differ ({gpt2_folder.name} float32, half bfloat16)" in done.json["verdicts"][-1]
    done = krony("bench", gpt2_folder, tmp_path / "half", *FAST, "--dtype", "bfloat16", "--json", "-")
    assert done.code == 0, done.err
    assert done.json["dtype"] == "bfloat16" and "dtypes differ" not in done.err
    first, second = done.json["models"]
    assert first["bytes"] == second["bytes"] == (tmp_path / "half/model.safetensors").stat().st_size


def test_random_and_a_forced_path(krony, gpt2_folder, tmp_path):
    done = krony(
        "bench", gpt2_folder, "--random", "--scheme", "keep=0.5", "--path", "dense", *FAST, "--json", tmp_path / "j"
    )
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "j").read_text())
    assert figures["path"] == "dense" and figures["models"][1]["params"] < figures["models"][0]["params"]
    assert "keep=0.5" in done.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--path", "fast"), "path 'fast' is unknown: it is one of left, right, dense"),
        (("--rounds", 0), "rounds is 0"),
        (("--sweep-lengths", "1,x"), "--sweep-lengths '1,x': it takes numbers from 1, such as 1,4,16"),
        (("--sweep-batches", ""), "--sweep-batches '': it takes numbers from 1"),
        (("--sweep-batches", "1,0"), "--sweep-batches '1,0': it takes numbers from 1"),
        (("--length", 100, "--context", 4), "takes at most 64 tokens"),
        (("--scheme", "100x7"), "does not divide"),
        (("--plot", "p.png"), "ends in .svg"),
        (("--report", "nowhere/r.html"), "there is no folder nowhere"),
        (("--dtype", "int3"), "dtype 'int3' is unknown"),
        (("--device", "cuda:9"), "device 'cuda:9' can't be used"),
        (("--random", "--device", "cuda:9"), "device 'cuda:9' can't be used"),
        (("--device", "auto"), "--device auto spreads a model over devices, and bench measures on one"),
    ],
)
def test_mistakes(refused, gpt2_folder, options, words):
    assert words in refused("bench", gpt2_folder, *options)


def test_random_of_a_compressed_model_and_a_scheme_of_one(refused, compressed):
    assert "is a compressed model: --random builds the original" in refused("bench", compressed, "--random", *FAST)
    assert "compressed already" in refused("bench", compressed, "--scheme", "keep=0.5", *FAST)


def test_models_of_one_name_are_told_apart(krony, gpt2_folder, tmp_path, monkeypatch):
    (tmp_path / "a").symlink_to(gpt2_folder)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a").symlink_to(gpt2_folder)
    monkeypatch.chdir(gpt2_folder)
    models = (tmp_path / "a", f"{tmp_path}/b/a/", ".")
    done = krony("bench", *models, "--scheme", "48x48", "--scheme", "48x48", *FAST, "--json", "-")
    assert done.code == 0, done.err
    names = [model["name"] for model in done.json["models"]]
    assert names == ["a", "a (2)", gpt2_folder.name, "a 48x48", "a 48x48 (2)"]


def test_five_rounds_have_a_spread(krony, gpt2_folder):
    done = krony("bench", gpt2_folder, gpt2_folder, "--rounds", 5, *FAST[2:], "--json", "-")
    assert done.code == 0, done.err
    spread = done.json["spread"]
    assert spread > 0 and f"medians of 5 turns (spread up to {spread:.1%})" in done.err
    assert done.json["verdicts"][0].startswith("prefill: ") and done.json["models"][1]["ratio_spread"]["decode"] > 0


def test_a_draft(krony, refused, gpt2_folder, compressed, tmp_path):
    options = ("--rounds", 1, "--length", 8, "--context", 8, "--new-tokens", 4, "--no-train")
    done = krony("bench", gpt2_folder, "--draft", compressed, "--draft-tokens", "1,2", *options, "--json", "-")
    assert done.code == 0, done.err
    assert [each["drafted"] for each in done.json["drafts"]] == [1, 2]
    assert "drafted at a time" in done.err and done.json["verdicts"][-1].startswith("drafts: no verdict")
    for words in ("0", "two", "1,-4", ""):
        assert "--draft-tokens" in refused("bench", gpt2_folder, "--draft", compressed, "--draft-tokens", words)
    assert "--draft-tokens works with --draft" in refused("bench", gpt2_folder, "--draft-tokens", "3")
    assert "leave out --random or --draft" in refused("bench", gpt2_folder, "--random", "--draft", compressed)
    assert "has another tokenizer" in refused("bench", gpt2_folder, "--draft", "demo", *options)
    assert "no such folder" in refused("bench", gpt2_folder, "--draft", tmp_path / "none", *options)
    shutil.copytree(gpt2_folder, tmp_path / "short")
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps(config | {"n_positions": 11}))
    said = refused("bench", gpt2_folder, "--draft", tmp_path / "short", *options)
    assert "the draft takes 11 tokens, and 12 are written" in said


def test_a_folder_of_the_name_demo_is_not_the_model_of_that_name(krony, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    done = krony("bench", "demo", *FAST, "--json", "-")
    assert done.code == 0, done.err
    assert done.json["models"][0]["bytes"] == pytest.approx(4 * done.json["models"][0]["params"], rel=0.01)
