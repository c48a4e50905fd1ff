"""An extension of mkdocstrings' reader: examples in docstrings are shown as code on the API page.

The reader knows a section of doctests by the name ``Examples`` alone. Our docstrings call it ``Example``, write one as
a literal block after ``Example::``, or put a doctest at the end without a heading.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

LITERAL = re.compile(r"^Examples?::\n\n?((?:(?: {4}.*)?\n)*(?: {4}.*))", re.MULTILINE)
BARE = re.compile(r"^>>> .*\n?(?:.+\n?)*", re.MULTILINE)  # up to a blank line


def as_markdown(docstring: str) -> str:
    """The docstring with its examples as Markdown or as the section that the reader knows."""
    docstring = LITERAL.sub(lambda found: _fenced("python", textwrap.dedent(found[1])), docstring)
    docstring = BARE.sub(lambda found: _fenced("pycon", found[0]), docstring)
    return re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)


def _fenced(language: str, code: str) -> str:
    return f"```{language}\n{code.rstrip()}\n```\n"


class DocstringExamples(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
