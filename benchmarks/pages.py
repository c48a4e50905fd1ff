"""Pages with a part that a benchmark writes."""

from __future__ import annotations

from pathlib import Path

from krony.storage.files import write_text

END = "<!-- end -->"


def fill(page: Path, script: str, text: str) -> None:
    """Puts ``text`` between the marks of ``script`` (``benchmarks/NAME.py``) in a page that has them."""
    begin = f"<!-- written by {script}: begin -->\n"
    before, mark, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"{page} has no marks of {script}")
    write_text(page, f"{before}{mark}{text}\n{end}{after}")
