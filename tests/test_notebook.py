"""The example notebook runs from its first cell to its last, offline, and shows its pictures."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples/quickstart.ipynb"


def shown(notebook, kind):
    """What the cells show as ``kind``, such as ``image/png``."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.fixture
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def executed(stored, tmp_path):
    for cell in stored.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(stored, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    return client.execute()


@pytest.mark.slow
def test_it_runs_and_shows_what_is_stored(executed, stored):
    """The stored outputs are those of the code beside them: the same perplexities, and as many pictures."""
    before = nbformat.read(NOTEBOOK, as_version=4)
    for kind in ("image/png", "text/html"):
        assert len(shown(executed, kind)) == len(shown(before, kind)) > 0
    first = [shown(notebook, "text/plain")[0] for notebook in (executed, before)]
    assert first[0] == first[1]
    assert "<svg" in shown(executed, "text/html")[0]
    errors = [
        o for cell in executed.cells if cell.cell_type == "code" for o in cell.outputs if o.get("name") == "stderr"
    ]
    assert all("IProgress" in error.text for error in errors), errors


def test_the_stored_outputs_are_complete_and_in_order(stored):
    """What a reader sees on a page that only shows the file."""
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    assert shown(stored, "image/png")
    assert any("<svg" in html for html in shown(stored, "text/html"))
    assert "/work/" not in NOTEBOOK.read_text(encoding="utf-8")
