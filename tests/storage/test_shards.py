"""Files that are laid out before the first tensor is there."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from krony import KronyError
from krony.storage.shards import Shards, TensorFile, total
from krony.storage.tensor_files import INDEX, read_header
from small_models import gpt2


@pytest.mark.parametrize("size", [20_000, 60_000, 150_000, 10**9])  # 20,000 bytes are less than one tensor has
def test_each_tensor_is_in_the_file_that_save_pretrained_puts_it_in(tmp_path, size):
    model = gpt2(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    tensors = model.state_dict()
    (tmp_path / "ours").mkdir()
    Shards(tmp_path / "ours", {n: (v.dtype, tuple(v.shape)) for n, v in tensors.items()}, size).create()
    files = {path.name for path in (tmp_path / "theirs").glob("*.safetensors*")}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == files
    assert (len(files) == 1) == (size == 10**9)
    if INDEX in files:
        theirs, ours = (json.loads((tmp_path / name / INDEX).read_text()) for name in ("theirs", "ours"))
        assert ours["weight_map"] == theirs["weight_map"]
        assert (
            ours["metadata"]["total_size"]
            == theirs["metadata"]["total_size"]
            == sum(v.nbytes for v in tensors.values())
        )


def test_tensors_are_written_in_any_order_and_in_pieces(tmp_path):
    layout = {"a": (torch.bfloat16, (3,)), "b": (torch.float64, (2, 2)), "c": (torch.float32, ())}
    shards = Shards(tmp_path, layout)
    assert not shards.exist()
    shards.create()
    assert shards.exist() and total(layout) == 6 + 32 + 4
    values = {
        "a": torch.tensor([1, 2, 3]).bfloat16(),
        "b": torch.arange(4.0).double().view(2, 2),
        "c": torch.tensor(7.0),
    }
    shards.put("c", values["c"])
    shards.put("b", values["b"][1:], at=2)
    shards.put("b", values["b"][:1])
    shards.put("a", values["a"])
    shards.sync()
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(values) and all(torch.equal(read[name], values[name]) for name in values)


def test_what_cannot_be_written_is_a_sentence(tmp_path):
    file = TensorFile(tmp_path / "none/model.safetensors", {"a": (torch.float32, (2,))})
    for write in (file.create, file.sync, lambda: file.put("a", torch.zeros(2))):
        with pytest.raises(KronyError, match=r"model.safetensors can't be written: No such file"):
            write()


def test_tensor_files_are_what_safetensors_reads(tmp_path):
    values = {
        "b": torch.arange(6, dtype=torch.int64).view(2, 3),
        "a": torch.randn(5, 7).bfloat16(),
        "c": torch.ones(()),
    }
    file = TensorFile(tmp_path / "x.safetensors", {n: (v.dtype, tuple(v.shape)) for n, v in values.items()})
    file.create()
    file.put("b", values["b"])
    file.put("c", values["c"])
    file.put("a", values["a"][:2], at=0)
    file.put("a", values["a"][2:], at=14)
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(values) and all(torch.equal(read[n], v) for n, v in values.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    entries = {e.name: e for e in read_header(file.path)}
    assert torch.equal(entries["a"].read(1, 3), values["a"][1:3]) and torch.equal(entries["c"].read(), values["c"])
    assert torch.equal(torch.cat(list(entries["b"].pieces())), values["b"].flatten())


def test_shards_hold_about_what_they_are_asked_to(tmp_path):
    layout = {f"t{n}": (torch.float32, (100,)) for n in range(10)}
    shards = Shards(tmp_path, layout, shard_size=1000)
    shards.create()
    assert shards.exist() and len(shards.files) == 5
    shards.files[0].path.unlink()
    assert not shards.exist()
