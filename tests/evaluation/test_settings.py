"""Options of measurements are shared by Python and the command line, and light enough for ``--help``."""

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest

from krony import KronyError, evaluate
from krony.evaluation.settings import EvaluationOptions, SpeedSettings
from krony.reproduce.options import TableOptions


def test_the_keywords_of_evaluate_are_the_options_of_the_verb():
    keywords = {p.name: p.default for p in inspect.signature(evaluate).parameters.values() if p.kind is p.KEYWORD_ONLY}
    keywords.pop("progress")
    assert keywords == {field.name: field.default for field in fields(EvaluationOptions)}


@pytest.mark.parametrize("options", [EvaluationOptions, SpeedSettings, TableOptions])
def test_every_option_has_its_sentence(options):
    """A field without one is no option of the command line."""
    for field in fields(options):
        if field.name not in ("batches", "lengths", "say", "progress"):
            assert field.metadata["help"].endswith("."), field.name


def test_numbers_of_a_sweep():
    assert SpeedSettings(batches=(1, 4), lengths=(8,)).sweep == [(1, 8), (4, 8)]
    assert SpeedSettings(lengths=(8, 16), batch=2).sweep == [(2, 8), (2, 16)] and SpeedSettings().sweep == []
    assert SpeedSettings(length=10, context=4, new_tokens=9, lengths=(12,)).longest == 13
    with pytest.raises(KronyError, match="take numbers from 1"):
        SpeedSettings(batches=(0,))


def test_the_command_line_needs_no_torch_to_show_its_help():
    code = "import krony.cli.app, sys; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
