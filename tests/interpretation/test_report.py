"""The page stands alone, escapes what comes from elsewhere, and is refused where it can't be written."""

import json
import re
from html.parser import HTMLParser

import pytest

from krony import KronyConfig, compress, interpret
from krony.interpretation.report import interpretation_page, table
from krony.pages import figure
from small_models import gpt2


@pytest.fixture(scope="module")
def seen(tokenizer, tmp_path_factory):
    model = gpt2()
    compress(model, KronyConfig("48x24:3", init="van-loan"))
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("<script>alert(1)</script> & <b>bold</b> " * 20)
    return interpret(model, tokenizer, str(file), tokens=256, ablation_tokens=128)


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found[tag] = self.found.get(tag, 0) + 1
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]


def test_the_page_stands_alone_and_escapes(seen):
    tags = Tags(interpretation_page("<i>model</i>", seen))
    assert not {"script", "i", "b", "link", "img", "iframe"} & set(tags.found)
    assert all(address.startswith(("data:image/png", "#")) for address in tags.addresses)
    assert tags.found["figure"] == tags.found["figcaption"] == 2 * 6 + 6  # of both kinds of matrix, and of each
    contexts = sum(len(g.contexts) for layer in seen.layers for f in layer.factors for g in f.groups)
    assert tags.found["mark"] == contexts > 0
    assert "<figcaption>a &lt; b</figcaption>" in figure("<svg/>", "a < b")


def test_the_page_has_the_figures(seen):
    page = interpretation_page("model", seen)
    factor = seen.layers[2].factors[1]
    assert f"{factor.ratio:.3f} ({factor.low:.3f} to {factor.high:.3f})" in page and f"{factor.share:.1%}" in page
    assert f"perplexity is {seen.perplexity:,.2f}" in page and "256 tokens" in page and "128 of these tokens" in page
    assert len(table(seen).rows) == 18
    assert json.loads(json.dumps(seen.to_json()))["layers"][0]["factors"][0]["groups"][0]["contexts"]
    for found in seen.similarities:
        assert f"mean cos² between layers {found.across:.2f}, by chance {found.chance:.2f}" in re.sub(r"\s+", " ", page)
