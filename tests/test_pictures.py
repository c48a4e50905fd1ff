"""Pictures hold what they were given, cover no data with their legends, and adapt to light and dark pages."""

import base64
import io
import itertools
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from krony.pictures import COLOURS, FAINT, bars, heatmaps, lines

CURVES = {"neurons": [(1, 1.5), (2, 1.2)], "van-loan": [(1, 516_862.0), (2, 1_363.0)], "svd": [(1, 124.9), (2, 7.9)]}


def texts(svg: str) -> list[tuple[str, float, float]]:
    """All words of a picture with their places in points, from the top left; it must be well-formed."""
    found = []
    for element in ElementTree.fromstring(svg).iter():
        if element.tag.endswith("text"):
            place = re.search(r"translate\(([-\d.]+) ([-\d.]+)\)", element.get("transform", ""))
            x, y = place.groups() if place else (element.get("x"), element.get("y"))
            found.append(("".join(element.itertext()).strip(), float(x or 0), float(y or 0)))
    return found


def words(svg: str) -> set[str]:
    return {text for text, _, _ in texts(svg)}


def height(svg: str) -> float:
    return float(re.search(r'height="([\d.]+)pt"', svg)[1])


def test_curves_name_their_axes_and_themselves():
    options = {"title": "Neurons are better", "x": "megabytes", "y": "perplexity", "level": ("the original", 1.0)}
    svg = lines(CURVES, **options, log=True)
    assert {"megabytes", "perplexity", "neurons", "van-loan", "the original", "Neurons are better"} <= words(svg)
    assert svg == lines(CURVES, **options, log=True)  # the same figures give the same file


def test_values_above_the_top_are_in_the_legend_and_flatten_nothing():
    svg = lines(CURVES, title="t", x="x", y="y", log=True, top=10.0)
    assert {"van-loan (all above: 516,862, 1,363)", "svd (above: 125)", "neurons"} <= words(svg)
    ticks = {text for text in words(svg) if re.fullmatch(r"[\d.,]+", text)}
    assert {"1.5", "2", "5", "10"} <= ticks and "100" not in ticks


def test_a_logarithmic_horizontal_axis_has_plain_numbers_at_equal_distances():
    svg = lines({"a": [(1, 1.5), (10, 1.2), (10_000, 1.3)]}, title="t", x="tokens", y="gain", log_x=True)
    places = {text: x for text, x, _ in texts(svg)}
    ticks = [places[text] for text in ("1", "10", "100", "1,000", "10,000")]
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert min(steps) > 0.8 * max(steps) > 0  # but for the widths of the numbers


@pytest.mark.parametrize("curves", [1, 3, 8])
def test_legends_are_below_the_axes(curves):
    """Where they cover no data; the picture grows by what they need."""
    svg = lines({f"way {n}": [(1, 2), (2, 1)] for n in range(curves)}, title="t", x="x", y="y")
    places = {text: y for text, _, y in texts(svg)}
    assert min(y for text, y in places.items() if text.startswith("way")) > places["x"]
    assert all(f"way {n}" in places for n in range(curves))
    assert height(svg) >= height(lines({"way 0": [(1, 2), (2, 1)]}, title="t", x="x", y="y"))


def test_long_titles_are_wrapped_within_the_picture():
    svg = lines({"a": [(0, 1)]}, title="word " * 60, x="x", y="y")
    assert max(len(text) for text in words(svg)) <= 78
    assert height(svg) > height(lines({"a": [(0, 1)]}, title="word", x="x", y="y"))


def test_bars_name_their_groups():
    groups = {"neurons": {"prefill": 1.3, "decode": 1.1}, "van-loan": {"prefill": 1.2}}
    svg = bars(groups, title="t", axis="times the original")
    assert {"prefill", "decode", "neurons", "van-loan", "times the original", "1.30", "1.10", "1.20"} <= words(svg)


def test_bars_stay_readable_however_many_they_are():
    few, many = (bars({"a": {f"place {n}": 1.0 + n for n in range(count)}}, title="t", axis="x") for count in (5, 96))
    assert height(many) > 8 * height(few)
    rows = sorted(y for text, _, y in texts(many) if text.startswith("place"))
    assert len(rows) == 96 and min(b - a for a, b in itertools.pairwise(rows)) >= 10  # points


def test_logarithmic_bars_start_at_the_level():
    """A bar of the level's own height has no length."""
    svg = bars({"a": {"one": 1.0, "ten": 10.0}}, title="t", axis="x", level=1.0, log=True)
    lengths = []
    for element in ElementTree.fromstring(svg).iter():
        if "fill: #0072b2" in (element.get("style") or "") and element.get("d"):
            xs = [float(x) for x in re.findall(r"[ML] ([-\d.]+)", element.get("d"))]
            lengths.append(max(xs) - min(xs))
    assert sorted(lengths)[0] == 0 and sorted(lengths)[1] > 100


def pixels(svg: str) -> list[list[tuple[int, int, int, int]]]:
    """The red, green, blue and alpha of every cell of each matrix in a picture; the last image is the colour bar's."""
    found = []
    for packed in re.findall(r'xlink:href="data:image/png;base64,\s*([^"]+)"', svg):
        image = Image.open(io.BytesIO(base64.b64decode(packed))).convert("RGBA")
        found.append([[image.getpixel((x, y)) for x in range(image.width)] for y in range(image.height)])
    return found


def test_cells_have_the_colour_of_their_sign_and_the_opacity_of_their_size():
    options = {"title": "t", "axis": "entry", "x": "column", "y": "row"}
    svg = heatmaps({"one": [[1.0, 0.0], [-1.0, 0.5]], "two": [[0.0] * 2] * 2}, **options, columns=2, signed=True)
    assert {"one", "two", "entry", "column", "row", "t"} <= words(svg)
    blue, vermilion = ([int(pair[0][i : i + 2], 16) for i in (1, 3, 5)] for pair in COLOURS[:2])
    image = next(p for p in pixels(svg) if len(p) >= 2 and max(c[3] for row in p for c in row) == 255)
    high, wide = len(image) // 2, len(image[0]) // 2
    (one, nothing), (minus, half) = ([image[y * high][x * wide] for x in (0, 1)] for y in (0, 1))
    assert list(one) == pytest.approx([*blue, 255], abs=3) and list(minus) == pytest.approx([*vermilion, 255], abs=3)
    assert nothing[3] <= 3 and half[3] == pytest.approx(128, abs=3)
    assert not re.search(r'href="http', svg)


def test_rows_and_columns_of_a_matrix_have_names():
    svg = heatmaps({"a": [[0.0, 1.0], [1.0, 0.0]]}, title="t", axis="a", x="x", y="y", ticks=["0.0", "0.1"])
    assert [text for text, *_ in texts(svg)].count("0.1") == 2


def test_dark_pages_get_their_own_colours():
    svg = bars({"a": {"b": 1.0}}, title="a < b", axis="x")
    style = re.search(r"<style>@media \(prefers-color-scheme: dark\)(.*?)</style>", svg, re.DOTALL)[1]
    for light, dark in (*COLOURS, FAINT):
        for what in ("fill", "stroke"):
            assert f'[style*="{what}: {light}"], [{what}="{light}"] {{ {what}: {dark} !important }}' in style
    assert "<title>a &lt; b</title>" in svg
    assert "#ffffff" not in svg.split("</style>")[-1].split("patch_2")[0]  # the background is transparent
    used = {c.lower() for c in re.findall(r"(?:fill|stroke): (#[0-9a-fA-F]{6})", svg.split("</style>", 1)[1])}
    assert used <= {light for light, _ in (*COLOURS, FAINT)} | {"#ffffff"}  # white: the lines of hatches


def test_contrast_on_light_and_dark_pages():
    """At least 3:1, which WCAG asks of graphics, on white and on a dark page's background."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    for light, dark in COLOURS:
        assert contrast(light, "#ffffff") >= 3 and contrast(dark, "#0d1117") >= 3
