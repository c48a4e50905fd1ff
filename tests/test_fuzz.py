"""Damaged files and hostile names: every verb ends well or with one sentence, in little memory and time.

``make test`` runs the cases that once found something, ``make test-slow`` new ones: 5,000, or ``KRONY_FUZZ_CASES``,
from the seed ``KRONY_FUZZ_SEED`` (0). A case that fails is kept as a small file in ``fuzz-found``, which
``python -m fuzz FILE`` in ``tests`` runs again.
"""

import os
import sys
import time
from pathlib import Path

import pytest

from fuzz import campaign, trial
from fuzz.cases import CORPUS, Case

CASES, SEED = (int(os.environ.get(f"KRONY_FUZZ_{name}", default)) for name, default in (("CASES", 5000), ("SEED", 0)))
PARTS = 10  # which several processes share
KEPT = Path(__file__).parents[1] / "fuzz-found"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return campaign.sound_files(tmp_path_factory.mktemp("sound"))


def test_cases_that_once_found_something(sound):
    cases = {file.name: trial.run(Case.read(file), sound) for file in sorted(CORPUS.glob("*.json"))}
    assert {name: outcome.problem for name, outcome in cases.items() if outcome.problem} == {}
    assert cases


def test_the_sound_files_are_sound(sound):
    commands = [["inspect", "compressed"], ["import", "checkpoint.pt", "out", "--like", "dense"]]
    for command in [*commands, ["data", "prepare", "lines.jsonl", "out", "--tokenizer", "dense"]]:
        assert trial.run(Case(kind="none", command=command), sound).code == 0


def test_what_is_wrong_with_an_end_is_seen(sound, monkeypatch):
    """Each rule of a trial, broken by a command of its own."""
    rules = {
        "a traceback": lambda: 1 / 0,
        "ended by signal 9": lambda: os.kill(os.getpid(), 9),
        "more than 1 seconds": lambda: time.sleep(9),
        "GB of memory": lambda: b"x" * 6 * 10**8,
        "it leaves x.partial": lambda: Path("x.partial").touch(),
        "fails and leaves ['rest']": lambda: (Path("rest").touch(), complain_and_end()),
        "takes away ['text.txt']": lambda: (Path("text.txt").unlink(), complain_and_end()),
        "2 lines instead of one": lambda: (print("more", file=sys.stderr), complain_and_end()),
        "it prints ['\\x1b']": lambda: print("\x1b"),
        "with exit code 0": lambda: print("odd", file=sys.stderr),
    }
    monkeypatch.setattr(trial, "MEMORY", 4 * 10**8)
    for problem, act in rules.items():
        monkeypatch.setattr("krony.cli.app.main", act)
        monkeypatch.setattr(trial, "SECONDS", 1 if "seconds" in problem else 20)
        assert problem in str(trial.run(Case(kind="none", command=["none"]), sound).problem)


def complain_and_end() -> None:
    from krony.cli.output import complain

    complain("no")
    raise SystemExit(2)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_new_cases(part, sound):
    tally = campaign.run(sound, range(part, CASES, PARTS), SEED, KEPT)
    print(tally)
    assert [problem for _, problem in tally.found] == [], f"kept in {KEPT}"
