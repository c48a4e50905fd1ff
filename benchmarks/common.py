"""What the benchmarks share: where results and pages are, and pages with a part that a benchmark writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from krony.runtime.hardware import machine
from krony.storage.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"
END = "<!-- end -->"


def read_results(name: str) -> dict[str, Any]:
    """The results of an earlier run, from ``benchmarks/results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


class Runs:
    """Runs of a benchmark in a file, each kept as soon as it is measured, so that an interrupted benchmark resumes.

    Args:
        file: a JSON file; its runs stay, and more are added.
        same: what has to be the same for all runs in a file, such as the number of tokens.

    Attributes:
        results: the content of the file, with ``runs``, ``machine`` and ``same``. More can be put in.
    """

    def __init__(self, file: Path, **same: Any) -> None:
        self.file = file
        self.results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": []}
        for name, value in same.items():
            if self.results["runs"] and self.results[name] != value:
                raise SystemExit(f"{file} holds runs with {name} {self.results[name]}: name another --out")
        self.results |= same | {"machine": machine()}

    def has(self, key: dict[str, Any]) -> bool:
        """Whether there is a run with these values."""
        return any(key.items() <= run.items() for run in self.results["runs"])

    def add(self, run: dict[str, Any]) -> None:
        """Keeps a run."""
        self.results["runs"].append(run)
        write_json(self.file, self.results)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring, with --draw-only, which all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--draw-only", action="store_true", help="measure nothing: write the pages and pictures from the results"
    )
    return parser


def draw_or_measure(
    options: argparse.Namespace,
    name: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    write_page: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    """What ``measure`` returns; None with --draw-only, which writes the page of the results that are kept.

    The page is that of ``benchmarks/results/NAME.json``: measurements for another --out leave it alone.
    """
    if options.draw_only:
        write_page(read_results(name))
        return None
    quiet_transformers()
    results = measure(options)
    if options.out == RESULTS / f"{name}.json":
        write_page(results)
    return results


def results_of(name: str, measure: Callable[[], dict[str, Any]], description: str | None) -> dict[str, Any]:
    """What ``measure`` returns, written to the results; with --draw-only, the results of an earlier run."""
    if arguments(description).parse_args().draw_only:
        return read_results(name)
    results = measure()
    write_json(RESULTS / f"{name}.json", results)
    return results


def fill(page: Path, script: str, text: str) -> None:
    """Puts ``text`` between the marks of ``script`` (``benchmarks/NAME.py``) in a page that has them."""
    begin = f"<!-- written by {script}: begin -->\n"
    before, mark, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"{page} has no marks of {script}")
    write_text(page, f"{before}{mark}{text}\n{end}{after}")


def quiet_transformers() -> None:
    """No progress bars and no advice of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
