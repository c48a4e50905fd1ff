"""Where sharding is refused, and how a model is split."""

import copy
import json

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from healing_runs import heal, text
from krony import KronyConfig, KronyError, compress
from krony.healing.options import HealOptions
from krony.healing.sharding import (
    check_sharding,
    decoder_layers,
    gather,
    keep_whole_states,
    load_once,
    placement,
    sharded_copy,
)
from krony.models.loading import load_model, load_shapes
from krony.models.source import ModelSource
from krony.runtime import distributed
from processes import together
from small_models import gpt2, llama

SHARD = HealOptions(shard=True)


@pytest.fixture
def launched(monkeypatch):
    """As in one of two processes that ``accelerate launch --use_fsdp --fsdp_version 2`` starts."""
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")


@pytest.mark.parametrize("word", ["true", "1", "yes", "ON"])
def test_one_process_has_nobody_to_share_with(tmp_path, monkeypatch, word):
    """accelerate would quietly run without FSDP on processors, and everywhere where the word is not ``true``."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", word)
    with pytest.raises(KronyError, match="shards are for several processes, and this is one"):
        heal(gpt2(), *text(20).split(4), work=tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "0")
    assert heal(gpt2(), *text(20).split(4), work=tmp_path).tokens
    with pytest.raises(KronyError, match="shards are for several processes, and this is one"):
        heal(gpt2(), *text(20).split(4), work=tmp_path / "other", shard=True)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FSDP_VERSION", "1", "shards with FSDP's version 2: launch with --use_fsdp --fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "FSDP_OFFLOAD_PARAMS is set, which healing does not do: leave"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "krony heal --gradient-checkpointing does the same"),
    ],
)
def test_a_launch_that_asks_for_something_else(launched, monkeypatch, name, value, words):
    check_sharding(gpt2(), llama(), HealOptions(), 2)
    monkeypatch.setenv(name, value)
    with pytest.raises(KronyError, match=words):
        check_sharding(gpt2(), None, HealOptions(), 2)


def test_version_1_is_what_accelerate_takes_if_none_is_named(launched, monkeypatch):
    monkeypatch.delenv("FSDP_VERSION")
    with pytest.raises(KronyError, match="version 2"):
        check_sharding(gpt2(), None, HealOptions(), 2)


def test_models_that_cannot_be_sharded(launched):
    mixed = gpt2()
    mixed.transformer.ln_f.double()
    with pytest.raises(KronyError, match="a model of float32 and float64 can't be sharded"):
        check_sharding(mixed, None, SHARD, 2)
    check_sharding(gpt2(), mixed, SHARD, 2)  # a teacher has no gradients to reduce
    shared = gpt2()
    shared.transformer.h[1].mlp = shared.transformer.h[0].mlp
    with pytest.raises(KronyError, match="layers of this GPT2LMHeadModel share parameters"):
        check_sharding(shared, None, SHARD, 2)
    unknown = gpt2()
    unknown._no_split_modules = None
    with pytest.raises(KronyError, match="doesn't say which modules are its layers"):
        check_sharding(unknown, None, SHARD, 2)
    with pytest.raises(KronyError, match="compile and shards don't go together"):
        check_sharding(gpt2(), None, HealOptions(shard=True, compile=True), 2)


def load_and_shard(folder, damaged) -> None:
    """In each of two processes: only the first has values, and what it can't load no process can."""
    distributed.init()
    model = load_once(ModelSource.find(folder), "auto")
    assert [p.is_meta for p in model.parameters()] == [distributed.rank() > 0] * len(list(model.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    sharded = sharded_copy(model, "cpu", trains=False)
    gathered = {name: p.full_tensor() for name, p in sharded.named_parameters()}
    expected = load_model(folder)
    assert all(torch.equal(gathered[name], p) for name, p in expected.named_parameters())
    for (name, ours), (their_name, theirs) in zip(sharded.named_buffers(), expected.named_buffers(), strict=True):
        assert name == their_name and torch.equal(ours, theirs)  # a Llama's frequencies are in no file
    load = load_model if distributed.is_first() else load_shapes  # as a script of one's own does it
    again = sharded_copy(load(folder, dtype="bfloat16"), "cpu")
    assert all(torch.equal(p.full_tensor(), gathered[name]) for name, p in again.named_parameters())
    untied = load_once(ModelSource.find(f"{folder}-untied"), "auto")
    parts = dict(sharded_copy(untied, "cpu", trains=False).named_parameters())
    head, embeddings = (parts[name].full_tensor() for name in ("lm_head.weight", next(iter(parts))))
    assert torch.equal(head, 2 * embeddings)
    with pytest.raises(KronyError, match="has values that are not finite"):
        load_once(ModelSource.find(damaged), "auto")
    other = gpt2() if distributed.is_first() else llama()
    where = "" if distributed.is_first() else r" \([\w.]+\)"  # only another can tell what differs from the first
    with pytest.raises(KronyError, match=f"the processes have different models{where}, so they can't each hold a part"):
        sharded_copy(other, "cpu")


@pytest.mark.parametrize("build", [gpt2, llama])
def test_one_process_loads_for_all(tmp_path, build):
    """Its config doesn't say the dtype, so the others can't know it."""
    model = build().bfloat16()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    untied = build(tie_word_embeddings=False).bfloat16()
    untied.get_output_embeddings().weight.data = 2 * untied.get_input_embeddings().weight.data
    untied.config.tie_word_embeddings = True  # transformers loads both matrices all the same
    untied.save_pretrained(tmp_path / "model-untied")
    model.get_input_embeddings().weight.data[0, 0] = torch.nan  # the file is sound: only loading it shows this
    model.save_pretrained(tmp_path / "damaged")
    together(2, tmp_path / "runs", load_and_shard, str(tmp_path / "model"), str(tmp_path / "damaged"))


@pytest.mark.parametrize("build", [gpt2, llama])
def test_groups_are_whole_layers(build):
    """Fused MLPs read the parameters of their layers outside these layers' forward."""
    model = build()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    stack = model.transformer.h if build is gpt2 else model.model.layers
    assert decoder_layers(model) == list(stack)


@pytest.mark.parametrize(
    ("shape", "processes", "dim"),
    [
        ((1, 48, 12), 2, 1),  # one term
        ((4, 48, 12), 2, 0),
        ((4, 48, 12), 8, 1),
        ((1, 9, 12), 4, 2),
        ((1, 9, 7), 4, 0),  # nothing can be split equally
        ((1,), 2, 0),
        ((257, 48), 2, 0),
    ],
)
def test_what_is_split(shape, processes, dim):
    assert placement(nn.Parameter(torch.empty(shape)), processes).dim == dim


@pytest.fixture
def alone(tmp_path):
    """A group of one process: what is sharded is whole, and handled as shards are."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_sharded_copy(alone, ids, build):
    """Takes whole tensors, gives them back, and leaves the model that it was made of as it was."""
    model = build()
    compress(model, KronyConfig("keep=0.5", init="van-loan", scalars=True))
    before = copy.deepcopy(model.state_dict())
    sharded = sharded_copy(model, "cpu")
    groups = [module for module in sharded.modules() if isinstance(module, FSDPModule)]
    assert groups == [sharded, *(sharded.transformer.h if build is gpt2 else sharded.model.layers)]
    assert all(isinstance(p, DTensor) and p.requires_grad for p in sharded.parameters())
    torch.testing.assert_close(sharded(ids).logits, model(ids).logits)
    changed = {name: value * 1.5 for name, value in before.items()}
    assert not sharded.load_state_dict(changed, strict=False).unexpected_keys
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gather(sharded, model)
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(sharded(ids).logits, model(ids).logits)


def test_a_teacher_of_several_dtypes(alone, ids):
    """MLPs in float32 in a model of bfloat16; without gradients a group may mix them."""
    teacher = llama().bfloat16()
    for layer in teacher.model.layers:
        layer.mlp.float()
        layer.mlp.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        layer.mlp.register_forward_hook(lambda _, __, output: output.bfloat16())
    sharded = sharded_copy(teacher, "cpu", trains=False)
    assert not any(p.requires_grad for p in sharded.parameters()) and all(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(sharded(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("first", [True, False])
def test_the_state_of_the_optimiser_is_gathered_in_the_first_process(first, monkeypatch):
    """In the others, a copy of it would take as much memory again."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    keep_whole_states(optimizer)
    parameter.sum().backward()
    optimizer.step()
    monkeypatch.setattr(distributed, "is_first", lambda: first)
    state = optimizer.state_dict()["state"]
    assert list(state) == ([0] if first else [])
    assert len(optimizer.state[parameter]["exp_avg"]) == 3
