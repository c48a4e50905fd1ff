"""``krony heal --dry-run``: tokens, steps and memory of as many processes as one likes, or one sentence."""

import pytest

from small_models import gpt2


@pytest.fixture
def dry_run(gpt2_folder, tmp_path):
    """The command, with text of 40 documents and a teacher."""
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{"one two three four " * 8} {i}"}}\n' for i in range(40)))
    given = ["--data", tmp_path / "text.jsonl", "--length", 32, "--teacher", gpt2_folder, "--dry-run"]
    return ["heal", gpt2_folder, tmp_path / "out", *given]


def test_shards_take_less_than_copies(krony, dry_run, tmp_path):
    sharded, copied = (krony(*dry_run, "--json", "-", "--world-size", 2, *more).json for more in (("--shard",), ()))
    assert sharded["processes"] == 2 and sharded["shard"] and sharded["steps"] * 2 * 32 == sharded["tokens"]
    assert sharded["memory"]["peak"] < copied["memory"]["peak"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl"]


def test_what_a_run_would_refuse(refused, dry_run, tmp_path):
    """Before anything is printed, and as the run itself says it."""
    assert "can't be shared by 3 processes" in refused(*dry_run, "--world-size", 3)
    assert "say how many with --world-size" in refused(*dry_run, "--shard")
    assert "compile and shards don't go together" in refused(*dry_run, "--world-size", 2, "--shard", "--compile")
    assert "the model takes" in refused(*dry_run, "--length", 100_000)
    assert "one step of this recipe takes 4000" in refused(*dry_run, "--sequences", 4000)
    gpt2(vocab_size=300).save_pretrained(tmp_path / "other")
    assert "the teacher knows 300 tokens" in refused(*dry_run, "--teacher", tmp_path / "other")
    assert "leave --control out" in refused(*dry_run, "--control", tmp_path / "other")


def test_a_number_of_processes_without_a_dry_run(refused, gpt2_folder, tmp_path):
    command = ("heal", gpt2_folder, tmp_path / "out", "--data", "python-docs", "--world-size", 2)
    assert "--world-size goes with --dry-run" in refused(*command)
