"""Tables and pictures hold what they were given."""

import re
from xml.etree import ElementTree

from krony.pages import Table, bars, lines, page, paragraphs


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


def texts(svg: str) -> set[str]:
    """All words in a picture; it must be well-formed."""
    return {"".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")}


def test_curves_name_their_axes_and_themselves():
    series = {"neurons": [(1, 10.0), (2, 8.0)], "van-loan": [(1, 1e6), (2, 1e5)]}
    svg = lines(series, "parameters, millions", "perplexity", level=("the original", 7.0))
    assert {"parameters, millions", "perplexity", "neurons", "van-loan", "the original"} <= texts(svg)
    assert svg == lines(series, "parameters, millions", "perplexity", level=("the original", 7.0))


def test_bars_name_their_groups():
    svg = bars({"neurons": {"prefill": 1.3, "decode": 1.1}, "van-loan": {"prefill": 1.2}}, "times the original")
    assert {"prefill", "decode", "neurons", "van-loan", "times the original"} <= texts(svg)


def test_a_page_stands_alone_and_escapes():
    made = page("a & b", [("Part", paragraphs("x < y")), ("Picture", bars({"a": {"b": 1.0}}, "y"))])
    assert "<h1>a &amp; b</h1>" in made and "<p>x &lt; y</p>" in made and "<svg" in made
    assert not re.search(r'(src|href)="http', made)


def test_many_names_stand_below_the_lines():
    """Inside they would lie on them: the picture grows by what they need."""
    few, many = (lines({f"way {n}": [(1, 2), (2, 1)] for n in range(count)}, "x", "y") for count in (7, 8))
    heights = [float(re.search(r'height="([\d.]+)pt"', picture)[1]) for picture in (few, many)]
    assert heights[0] < heights[1] and all(f"way {n}" in many for n in range(8))
