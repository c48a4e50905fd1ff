"""MODEL is resolved once; the hub is asked quickly."""

import httpx2 as httpx
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import GemmaConfig

from krony import KronyConfig, KronyError, compress
from krony.models import source
from krony.models.loading import load_model, load_shapes, load_tokenizer
from krony.models.source import ModelSource
from krony.storage import hub as storage
from small_models import at_random, llama


@pytest.fixture(autouse=True)
def no_memory_of_the_hub():
    storage.ask.cache_clear()
    yield
    storage.ask.cache_clear()


def hub(monkeypatch, error):
    """A hub that answers with ``error``; returns how often it was asked, and for how long it may take."""
    asked = []

    def model_info(self, name, timeout=None):
        asked.append(timeout)
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    return asked


def test_without_network_it_is_asked_once_and_for_seconds(monkeypatch):
    asked = hub(monkeypatch, OSError("no route"))
    for _ in range(2):
        with pytest.raises(KronyError, match=r"no-such/model: .*not in the hub's cache, and the hub can't be reached"):
            ModelSource.find("no-such/model")
    assert asked == [storage.SECONDS] and storage.SECONDS <= 5


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    answer = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
    hub(monkeypatch, RepositoryNotFoundError("404", response=answer))
    with pytest.raises(KronyError, match="no-such/model: there is no such folder, and no such model on the hub"):
        ModelSource.find("no-such/model")


def test_what_the_hub_knows_and_does_not_give_is_not_called_a_missing_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    hub(monkeypatch, None)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: object())
    monkeypatch.setattr(source.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(
        KronyError, match=r"some/model: the hub knows it, and .*: You are trying to access a gated repo"
    ):
        ModelSource.find("some/model")


def test_paths_are_names_too(gpt2_folder):
    assert load_model(gpt2_folder).num_parameters() == load_shapes(gpt2_folder).num_parameters()
    assert load_tokenizer(gpt2_folder).get_vocab() == load_tokenizer(str(gpt2_folder)).get_vocab()


def test_a_folder_is_resolved_once(gpt2_folder, monkeypatch):
    checked = []
    monkeypatch.setattr(source, "check_folder", checked.append)
    found = ModelSource.find(str(gpt2_folder))
    model, tokenizer = found.load(), found.tokenizer
    assert checked == [gpt2_folder] and found.folder == gpt2_folder
    assert found.skeleton.device.type == "meta" and model.device.type == "cpu"
    assert tokenizer("a")["input_ids"]


def test_the_demo_is_loaded_in_float32():
    found = ModelSource.find("demo")
    assert found.dtype() == torch.float32 and found.dtype("bfloat16") == torch.bfloat16
    assert not found.is_compressed


def gemma():
    """Its scale of the embeddings is a buffer in the dtype of the model."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96, "head_dim": 12, "vocab_size": 257}
    return at_random(GemmaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


@pytest.mark.parametrize("build", [llama, gemma])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_shapes_without_values(tmp_path, dtype, build):
    """Dense and compressed: what is loaded but for the device, and no weight is read."""
    for number, compressed in enumerate((False, True)):
        model = build().bfloat16()
        if compressed:
            compress(model, KronyConfig("keep=0.5", init="van-loan"))
        model.save_pretrained(tmp_path / str(number))
        found = ModelSource.find(str(tmp_path / str(number)))
        loaded = found.load(dtype=dtype)
        (tmp_path / f"{number}/model.safetensors").unlink()
        shapes = load_shapes(found.name, dtype=dtype)
        assert not shapes.training and all(p.is_meta for p in shapes.parameters())
        for one, other in (
            (shapes.named_parameters, loaded.named_parameters),
            (shapes.named_buffers, loaded.named_buffers),
        ):
            assert [(n, t.shape, t.dtype) for n, t in one()] == [(n, t.shape, t.dtype) for n, t in other()]
