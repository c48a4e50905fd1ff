"""``krony eval``, used wrongly, and what it writes."""

import json

import pytest

TEXT = "some text to be predicted, byte by byte, and then some more of it"


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "a.txt"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--window", 0), "a window of 0 tokens: at least 2"),
        (("--window", -5), "a window of -5 tokens"),
        (("--window", 65), "a window of 65 tokens: this model takes from 2 to 64"),
        (("--stride", 0), "a stride of 0 tokens"),
        (("--window", 8, "--stride", 9), "a stride of 9 tokens: it takes a number from 1 to the window, 8"),
        (("--max-tokens", 0), "max_tokens is 0"),
        (("--protocol", "best"), "protocol 'best' is unknown: it is paper or token"),
        (("--count", "twice"), "--count twice: it is tied or untied"),
        (("--limit", 3), "--limit works with --tasks"),
        (("--tasks", " , "), "--tasks names no task"),
    ],
)
def test_mistakes(refused, gpt2_folder, text_file, options, words):
    """Zero is a number like others, and not the default."""
    assert words in refused("eval", gpt2_folder, "--data", text_file, *options)


def test_what_is_wrong_with_one_text_is_found_before_another_is_measured(refused, gpt2_folder, text_file, tmp_path):
    """Before the model is loaded: this folder has none."""
    missing = tmp_path / "missing.txt"
    assert f"{missing} can't be read" in refused("eval", tmp_path, "--data", text_file, "--data", missing)


def test_options_of_text_where_only_tasks_are_measured(refused, gpt2_folder):
    assert "--max-tokens works with --data" in refused("eval", gpt2_folder, "--tasks", "piqa", "--max-tokens", 9)
    assert "--protocol works with --data" in refused("eval", gpt2_folder, "--tasks", "piqa", "--protocol", "token")


def test_options_reach_the_measurement(krony, gpt2_folder, text_file, tmp_path):
    options = ("--protocol", "token", "--window", 16, "--stride", 8, "--max-tokens", 40)
    done = krony("eval", gpt2_folder, "--data", text_file, *options, "--json", tmp_path / "r.json")
    assert done.code == 0, done.err
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [result[key] for key in ("protocol", "window", "stride", "tokens")] == ["token", 16, 8, 39]


def test_one_model_on_all_devices_does_not_fit_many_processes(refused, gpt2_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "here each process has its own" in refused("eval", gpt2_folder, "--device", "auto")
