"""Tables and HTML pages."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table of text: the first column names the rows, the others hold figures.

    Examples:
        >>> print(Table(["init", "error"], [["prune", "0.71"]]).markdown())
        | init | error |
        | --- | ---: |
        | prune | 0.71 |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in Markdown."""
        marks = ["---", *["---:"] * (len(self.columns) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, marks, *self.rows))

    def html(self) -> str:
        """The table in HTML."""
        head = "".join(f"<th>{html.escape(c)}</th>" for c in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>\n" for row in self.rows)
        return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def page(title: str, parts: Sequence[tuple[str, str]]) -> str:
    """A complete HTML page, light or dark as the browser prefers: headings, with HTML below each."""
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #8886; }}
th:first-child, td:first-child {{ text-align: left; }}
svg {{ max-width: 100%; height: auto; }}
figure {{ margin: 1.5rem 0; }}
figcaption, small {{ font-size: 0.85rem; opacity: 0.8; }}
mark {{ background: #e69f0055; color: inherit; font-weight: 600; }}
blockquote {{ margin: 0.5rem 0; padding-left: 1rem; border-left: 3px solid #8886; }}
</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}
</body>
</html>
"""


def paragraphs(*sentences: str) -> str:
    """Text as HTML paragraphs."""
    return "\n".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)


def figure(svg: str, caption: str) -> str:
    """A picture with a caption below it; the caption is escaped."""
    return f"<figure>\n{svg}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>"


def shown(value: float) -> str:
    """A perplexity in a sentence or table, however large it is.

    >>> shown(1234.5), shown(1e12)
    ('1,234.50', '1e+12')
    """
    return f"{value:,.2f}" if value < 1e7 else f"{value:.3g}"
