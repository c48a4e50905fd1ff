"""Tables and pages hold what they were given."""

import re
from xml.etree import ElementTree

from krony.pages import Table, page, paragraphs
from krony.pictures import bars


def test_a_table_in_markdown_and_html():
    table = Table(["init", "perplexity"], [["van-loan", "1,234.5"], ["a < b", "2"]])
    assert table.markdown().splitlines() == [
        "| init | perplexity |",
        "| --- | ---: |",
        "| van-loan | 1,234.5 |",
        "| a < b | 2 |",
    ]
    rows = ElementTree.fromstring(table.html()).findall(".//tr")
    assert [[cell.text for cell in row] for row in rows] == [
        ["init", "perplexity"],
        ["van-loan", "1,234.5"],
        ["a < b", "2"],
    ]


def test_a_page_stands_alone_and_escapes():
    picture = bars({"a": {"b": 1.0}}, title="t", axis="y")
    made = page("a & b", [("Part", paragraphs("x < y")), ("Picture", picture)])
    assert "<h1>a &amp; b</h1>" in made and "<p>x &lt; y</p>" in made and "<svg" in made
    assert not re.search(r'(src|href)="http', made)
    assert "color-scheme: light dark" in made
