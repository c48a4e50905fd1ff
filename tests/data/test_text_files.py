"""Text files are read as what they are, or refused in a sentence."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import zipfile

import pytest

from krony import KronyError
from krony.data import text_files
from krony.data.prepare import check_data
from krony.data.rows import load_rows, read_bin
from krony.data.sets import load_texts
from krony.data.text_files import read_documents

LINES = b'{"text": "one"}\r\n\n{"text": "two", "id": 2}'
LIST = b'[{"text": "one"}, {"text": "two"}]'
BOM = b"\xef\xbb\xbf"


def packed(content: bytes) -> bytes:
    """The content in gzip, the same bytes at any time: tests are named by them."""
    return gzip.compress(content, mtime=0)


def zstd(content: bytes) -> bytes:
    """Compressed by whatever there is; without any of the packages the test is skipped."""
    module = text_files._zstd_module()
    if module is None:
        pytest.skip("no package for zstd is installed")
    return module.compress(content)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("d.jsonl", LINES, ["one", "two"]),
        ("d.JSONL", LINES, ["one", "two"]),
        ("d.ndjson", LINES, ["one", "two"]),
        ("d.v2.jl", LINES, ["one", "two"]),
        ("d.jsonl.gz", BOM + LINES, ["one", "two"]),
        ("d.JSONL.ZST", LINES, ["one", "two"]),
        ("d.json", LIST, ["one", "two"]),
        ("d.Json.gz", LIST, ["one", "two"]),
        ("d.json", b'{\n "text": "one"\n}\n', ["one"]),
        ("d.json", LINES, ["one", "two"]),
        ("d.txt", BOM + b"a\r\nb\rc\n", ["a\nb\nc\n"]),
        ("d.txt.gz", b"a", ["a"]),
        ("d", b"a", ["a"]),
        ("d.gz", b"a", ["a"]),
        ("d.txt", b"{ a brace }\n[1]", ["{ a brace }\n[1]"]),
        ("d.txt", b'{"body": 1}', ['{"body": 1}']),
    ],
)
def test_formats_that_are_read(tmp_path, name, content, documents, pack):
    """Compression shows in the content, so it is undone under any name."""
    (tmp_path / name).write_bytes(pack(content))
    assert read_documents(tmp_path / name) == documents
    assert load_texts(str(tmp_path / name)) == documents


def archive(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as made:
            made.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=stream, mode="w") as made:
            entry = tarfile.TarInfo("a.txt")
            entry.size = 4
            made.addfile(entry, io.BytesIO(b"text"))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.txt", LINES, r'd.txt holds JSON with a "text": name it .jsonl or .json'),
        ("d.txt.gz", packed(LIST), r'd.txt.gz holds JSON with a "text"'),
        ("d", b'[\n{"text": "one"}\n]', r'd holds JSON with a "text"'),
        ("d.json", b"[]", "d.json is empty: there is no document in it"),
        ("d.json", b'["one"]', r'd.json, entry 1: not a JSON object with a "text"'),
        ("d.json", b'[{"text": "a"}, {"text": 3}]', r'd.json, entry 2: "text" is not a string'),
        ("d.json", b'{"text": "a"\n', r"d.json, line 2: not JSON \(Expecting ',' delimiter\)"),
        ("d.json", b"[" * 100_000, r"d.json: not JSON that can be read"),
        ("d.jsonl", b'{"text": "\\ud83d"}', r"d.jsonl, line 1: .text. has half of a surrogate pair"),
        ("d.txt", "a".encode("utf-16"), r"d.txt is not UTF-8 text \(byte 0\): it is UTF-16 text, so unpack or conv"),
        ("d.txt", "text".encode("utf-16-le"), r"d.txt is not UTF-8 text: it is UTF-16 text, so"),
        ("d.txt", bz2.compress(b"a"), r"it is compressed by bzip2, so unpack"),
        ("d.txt.xz", lzma.compress(b"a"), r"it is compressed by xz, so unpack"),
        ("d.txt", archive("zip"), r"it is a zip archive, so unpack"),
        ("d.txt.gz", packed(archive("tar")), r"it is a tar archive, so unpack"),
        ("d.txt.gz", packed(packed(b"a")), r"it is compressed twice, so unpack"),
        ("d.txt.gz", packed(b"a" * 9999)[:-9], r"d.txt.gz is cut short or damaged \(Compressed file ended"),
        ("d.txt.gz", packed(b"a" * 99)[:12] + b"\xff" * 30, r"d.txt.gz is (cut short or )?damaged \("),
        ("d.txt.gz", packed(b"a")[:-8] + bytes(8), r"d.txt.gz is damaged \(CRC check failed"),
        ("d.gz", packed(b" \n"), r"d.gz is empty"),
    ],
)
def test_what_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KronyError, match=words):
        read_documents(tmp_path / name)


def test_zstd_frames_and_damage(tmp_path):
    file = tmp_path / "d.txt.zst"
    two = zstd(b"one " * 9999) + zstd(b"two")
    file.write_bytes(two)
    assert read_documents(file) == ["one " * 9999 + "two"]
    for content in (two[:-3], two + b"rest", two[:20] + b"\xff\xff\xff" + two[23:]):
        file.write_bytes(content)
        with pytest.raises(KronyError, match=r"d.txt.zst is cut short or damaged \("):
            read_documents(file)


def test_zstd_without_a_package_that_reads_it(tmp_path, monkeypatch):
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "d.jsonl.zst").write_bytes(bytes.fromhex("28b52ffd0000"))
    with pytest.raises(
        KronyError, match="compressed by zstd, which takes the package zstandard: pip install zstandard"
    ):
        read_documents(tmp_path / "d.jsonl.zst")


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(text_files, "SAFE", 3 << 20)
    monkeypatch.setattr(text_files, "FRAME_PIECE", 64)
    (tmp_path / "bomb.gz").write_bytes(pack(b" " * (40 << 20)))
    read = []
    for name in ("_gzip", "_zstd"):
        own = getattr(text_files, name)
        monkeypatch.setattr(text_files, name, lambda path, own=own: (read.append(len(p)) or p for p in own(path)))
    with pytest.raises(KronyError, match=r"bomb.gz unpacks to more than 200 times its size"):
        read_documents(tmp_path / "bomb.gz")
    assert sum(read) <= 11 << 20  # 200 times the 40 kB of gzip, and a piece
    (tmp_path / "text.gz").write_bytes(pack(os.urandom(4 << 20).hex().encode()))  # more than is safe, at twice the size
    assert len(read_documents(tmp_path / "text.gz")[0]) == 8 << 20


def test_more_than_fits_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "memory", lambda: 1000)
    (tmp_path / "a.txt").write_text("a" * 501)
    with pytest.raises(KronyError, match=r"a.txt has more text than fits into the 0 GB of memory"):
        read_documents(tmp_path / "a.txt")


def test_what_has_no_end_or_no_reader_is_not_opened(tokenizer, tmp_path):
    """A pipe without a writer would wait for ever, and /dev/zero has no end."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "link.txt").symlink_to("/dev/zero")
    options = {"length": 8, "vocabulary": 257}
    for name, kind in [("pipe.jsonl", "pipe"), ("link.txt", "device"), ("pipe.bin", "pipe"), ("/dev/zero", "device")]:
        data, words = str(tmp_path / name), f"{name} is a {kind}: name a regular file"
        with pytest.raises(KronyError, match=words):
            load_rows(data, tokenizer, **options)
        if not name.endswith(".bin"):
            for read in (load_texts, check_data):
                with pytest.raises(KronyError, match=words):
                    read(data)
    with pytest.raises(KronyError, match=r"d.bin is a folder: name a regular file"):
        (tmp_path / "d.bin").mkdir()
        read_bin(tmp_path / "d.bin")


def test_names_in_the_test_sets_folder_are_text_whatever_they_hold(tmp_path):
    (tmp_path / "lambada").mkdir()
    line = json.dumps({"text": "one"})
    (tmp_path / "lambada/lambada_test_plain_text.txt").write_text(line)
    assert load_texts("lambada", tmp_path) == [line]
