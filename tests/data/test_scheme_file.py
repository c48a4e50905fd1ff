"""A scheme file is read as it is written, and a mistake is named with its line."""

import pytest

from krony import KronyConfig, KronyError
from krony.data.scheme_file import read_scheme_file


@pytest.fixture
def written(tmp_path):
    def write(text, name="layers.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_patterns_keep_their_order_and_their_lines(written):
    file = written('# sizes\n"*.mlp": keep=0.5\n\ntransformer.h.0: dense\ntransformer.h.1.mlp.c_fc: 48x24:2\n')
    found = read_scheme_file(file)
    assert list(found.patterns.items()) == [
        ("*.mlp", "keep=0.5"),
        ("transformer.h.0", "dense"),
        ("transformer.h.1.mlp.c_fc", "48x24:2"),
    ]
    assert found.lines == {"*.mlp": 2, "transformer.h.0": 4, "transformer.h.1.mlp.c_fc": 5} and found.file == str(file)
    assert KronyConfig(str(file)).scheme == KronyConfig(file).scheme == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("*.mlp: keep=0.5\n", r"line 1: this is no YAML: .*; a text that begins with \* stands in quotes"),
        ("*mlp: keep=0.5\n", r"line 1: this is no YAML: .*; a text that begins with \* stands in quotes"),
        ("a: keep=0.5\nb: [\n", "line 3: this is no YAML"),
        ("a: keep=0.5\nb: dense\na: dense\n", "line 3: a is there twice"),
        ("a: keep=0.5\nb: half\n", "line 2: b: scheme 'half' is not understood"),
        ("a: keep=0.5\nb: keep=1.5\n", "line 2: b: scheme 'keep=1.5': keep= takes a fraction"),
        ("a: keep=0.5\nb:\n", "line 2: b has no scheme: dense leaves a layer as it is"),
        ("a: keep=0.5\nb: [1536x768, 4]\n", "line 2: b is one scheme, such as keep=0.5 or 1024x256:4, or dense"),
        ("- keep=0.5\n", "line 1: a scheme file has a pattern and its scheme on each line"),
        ("{}\n", "names no layer: a scheme file has a pattern"),
        ("# nothing\n", "a scheme file has a pattern and its scheme on each line"),
    ],
)
def test_a_mistake_is_named_with_its_line(written, text, words):
    file = written(text)
    with pytest.raises(KronyError, match=words) as error:
        KronyConfig(str(file))
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KronyError, match=r"none\.yml can't be read: No such file"):
        KronyConfig(tmp_path / "none.yml")
