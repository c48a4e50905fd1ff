"""Compression layer by layer: the same tensors as through memory, and what is wrong with a folder is named."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from krony import KronyConfig, KronyError
from krony.cli.app import main
from krony.models.loading import load_model
from krony.models.source import ModelSource
from krony.streaming.plan import choose, prepare
from krony.streaming.stream import run
from small_models import BUILDERS, gpt2, llama
from streamed_runs import both_ways, digest, text


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize(
    "init", ["van-loan", "prune", "random", "neurons", "als", "svd", "flap", "wanda", "magnitude", "random-neurons"]
)
def test_it_is_what_memory_gives(family, init, tmp_path):
    BUILDERS[family]().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    assert (tmp_path / "source/model.safetensors.index.json").exists()
    config = KronyConfig("keep=0.5", init=init)
    memory, stream = both_ways(tmp_path / "source", config, tmp_path, shard_size=150_000)
    assert digest(memory) == digest(stream)
    for name in ("config.json", "generation_config.json"):
        assert (memory / name).read_text() == (stream / name).read_text()
    index = json.loads((stream / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory", "source", "stream"]
    ids = text(1)
    assert torch.equal(load_model(str(stream))(ids).logits, load_model(str(memory))(ids).logits)


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("init", ["van-loan", "prune", "random"])
def test_the_errors_of_outputs_where_text_is_given_and_not_needed(family, init, tmp_path):
    BUILDERS[family]().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    memory, stream = both_ways(tmp_path / "source", KronyConfig("keep=0.5", init=init), tmp_path, reads=True)
    assert digest(memory) == digest(stream)
    with pytest.raises(KronyError, match="the plan was made without"):
        plan = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init=init))
        run(plan, tmp_path / "other", calibration=text())


def test_a_plan_that_is_run_twice_gives_the_same(tmp_path):
    gpt2().save_pretrained(tmp_path / "source")
    plan = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune"))
    assert run(plan, tmp_path / "one").made_with == run(plan, tmp_path / "two").made_with
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()


def test_what_is_too_large_for_the_wanted_dtype_is_refused(tmp_path):
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 1e6
    model.save_pretrained(tmp_path / "source")
    plan = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune"), dtype="float16")
    with pytest.raises(KronyError, match=r"ln_f\.weight has values that are not finite in float16"):
        run(plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("init", ["prune", "neurons"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_too(init, dtype, tmp_path):
    llama().to(dtype).save_pretrained(tmp_path / "source")
    memory, stream = both_ways(tmp_path / "source", KronyConfig("keep=0.75", init=init, layers="odd"), tmp_path)
    assert digest(memory) == digest(stream)


def test_the_dtype_of_files_that_hold_two(tmp_path):
    """The config says none. transformers takes that of the first name; the file begins with the wider dtype."""
    llama().bfloat16().save_pretrained(tmp_path / "source")
    file, config = tmp_path / "source/model.safetensors", tmp_path / "source/config.json"
    save_file({n: v.float() if "norm" in n else v for n, v in load_file(file).items()}, file, {"format": "pt"})
    said = json.loads(config.read_text())
    del said["dtype"]
    config.write_text(json.dumps(said))
    memory, stream = both_ways(tmp_path / "source", KronyConfig("keep=0.5", init="van-loan"), tmp_path)
    assert digest(memory) == digest(stream)


@pytest.mark.parametrize("builder", [gpt2, llama])
def test_a_head_that_is_tied_by_the_config_and_stored_apart(builder, tmp_path):
    """transformers loads both; equal copies are one."""
    folder = tmp_path / "source"
    builder().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (table,) = (name for name in tensors if name.endswith(("wte.weight", "embed_tokens.weight")))
    config = KronyConfig("keep=0.5", init="van-loan")
    save_file(tensors | {"lm_head.weight": tensors[table].clone()}, folder / "model.safetensors", {"format": "pt"})
    memory, stream = both_ways(folder, config, tmp_path)
    assert digest(memory) == digest(stream)

    save_file(tensors | {"lm_head.weight": tensors[table] + 1}, folder / "model.safetensors", {"format": "pt"})
    source, options = ModelSource.find(str(folder)), {"dtype": "auto", "device": "cpu"}
    assert choose(source, config, wanted=None, **options) is None  # in memory then
    with pytest.raises(KronyError, match=r"are one by its config, and its files hold them with other values"):
        choose(source, config, wanted=True, **options)


def test_names_without_the_base_models_prefix_as_gpt2_has_them_on_the_hub(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "source")
    tensors = {n.removeprefix("transformer."): v for n, v in load_file(tmp_path / "source/model.safetensors").items()}
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(3)}  # which old checkpoints have
    save_file(tensors | masks, tmp_path / "source/model.safetensors", {"format": "pt"})
    memory, stream = both_ways(tmp_path / "source", KronyConfig("keep=0.5", init="van-loan"), tmp_path)
    assert digest(memory) == digest(stream)


def test_other_layers_than_mlps(tmp_path):
    llama(tie_word_embeddings=False, vocab_size=260).save_pretrained(tmp_path / "source")
    config = KronyConfig("keep=0.5", init="van-loan", modules="o_proj|up_proj|lm_head")
    memory, stream = both_ways(tmp_path / "source", config, tmp_path)
    assert digest(memory) == digest(stream)


def test_values_that_are_not_finite_are_named_and_nothing_is_left(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "source")
    stream = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="van-loan"))
    with pytest.raises(KronyError, match=r"model\.safetensors: model\.layers\.2\.self_attn\.q_proj\.weight has values"):
        run(stream, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_that_lacks_a_tensor(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    with pytest.raises(KronyError, match=r"incomplete: there is no model\.layers\.1\.mlp\.up_proj\.weight"):
        prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="prune"))


def test_the_command_keeps_tokenizer_and_card(gpt2_folder, tmp_path, monkeypatch):
    arguments = ["compress", str(gpt2_folder), str(tmp_path / "out"), "--scheme", "keep=0.5", "--init", "van-loan"]
    monkeypatch.setattr(sys, "argv", ["krony", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    there = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= there
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
