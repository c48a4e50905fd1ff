"""The documentation speaks of what exists: names, files, links; it is in plain words, and builds as a site offline."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import krony

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
BY_HAND = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
PUBLIC = sorted(set(krony.__all__) - {"__version__"})


def anchors(page: Path) -> set[str]:
    """The fragments that lead to a heading of the page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not fragment or fragment in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_names_in_the_code_exist(page):
    """Every ``krony.package.name`` in backticks."""
    for name in re.findall(r"`(krony(?:\.\w+)+)", page.read_text(encoding="utf-8")):
        if name.endswith((".svg", ".html")):
            continue
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:count]))
            except ModuleNotFoundError:
                continue
            for part in parts[count:]:
                found = getattr(found, part)
            break


def test_the_oldest_python_is_the_one_that_the_tests_know():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    oldest = settings["project"]["requires-python"].removeprefix(">=")
    assert settings["tool"]["mypy"]["python_version"] == oldest
    for page in ("README.md", "docs/quickstart.md"):
        assert f"Python {oldest} or newer" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:src|tests|benchmarks|docs|examples)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_architecture_page_names_every_file():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "src/krony").rglob("*.py"):
        assert path.stem == "__init__" or f"`{path.stem}`" in page, path.relative_to(ROOT)


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: krony\.(\w+)$", page, re.MULTILINE)) == PUBLIC


@pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)
def test_words_are_plain(page):
    """The words that make a reader stop; the blocks that benchmarks write are theirs."""
    text = page.read_text(encoding="utf-8")
    if re.search(r"^(Written by `python|`python benchmarks)", text, re.MULTILINE):
        return
    text = " ".join(re.sub(r"<!-- written by .*?<!-- end -->", "", text, flags=re.DOTALL).split())
    for words in (
        "anew",
        "alike",
        "has not",
        "is of ",
        "so many",
        "goes on",
        "go on",
        "by itself",
        "like that",
        "dear",
    ):
        assert not re.search(rf"\b{words}\b", text), f"{page.name}: {words}"


def test_the_citation_is_of_this_version_and_this_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    assert citation["version"] == krony.__version__
    (reference,) = citation["references"]
    assert f"title         = {{{reference['title']}}}" in paper
    assert f"year          = {{{reference['year']}}}" in paper
    assert reference["url"] in paper


@pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("mkdocstrings") is None, reason="make docs installs mkdocs"
)
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {f"{page.stem}.html" for page in DOCS} <= {page.name for page in pages}
    for page in pages:
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?://[^\"> ]+)", html)
        assert not fetched, f"{page.name}: {fetched}"
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert all(f'id="krony.{name}"' in api for name in PUBLIC)
    assert "<blockquote>" not in api  # what Markdown makes of a doctest that isn't shown as code
