"""The memory of a run by arithmetic: against sums by hand, what autograd really saves, and what a process takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config

from krony import KronyConfig, compress
from krony.healing.footprint import footprint
from krony.healing.options import HealOptions
from krony.healing.recipes import Recipe
from krony.healing.trainable import trainable
from small_models import BUILDERS, at_random, gpt2, llama

RECIPE = Recipe(sequences=8, batch=2, length=64)
ROOT = Path(__file__).parents[2]


def compressed(family: str):
    model = BUILDERS[family]()
    compress(model, KronyConfig("24x24:4", init="van-loan"))
    return model


def saved(model, batch: int, length: int) -> int:
    """Bytes that autograd keeps for the backward pass of a real forward pass, beside the weights."""
    kept = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


@pytest.mark.parametrize("build", [gpt2, llama, lambda: compressed("gpt2"), lambda: compressed("llama")])
def test_one_device(build):
    model = build()
    size = sum(p.numel() for p in model.parameters()) * 4
    logits = 2 * 64 * 257 * 4
    with trainable(model, ()):  # without dropout
        expected = saved(model, 2, 64) + 2 * logits
    found = footprint(model, None, RECIPE, HealOptions(freeze=()), processes=1, half=False)
    assert (found.parameters, found.gradients, found.optimizer, found.teacher) == (size, size, 2 * size, 0)
    assert found.activations == pytest.approx(expected, rel=0.1)  # while it traces, Llama makes a mask
    assert found.peak == 4 * size + found.activations  # four batches are accumulated


def test_copies():
    model, teacher = llama(tie_word_embeddings=False), llama(tie_word_embeddings=False).bfloat16()
    size = sum(p.numel() for p in model.parameters()) * 4
    copies = footprint(model, teacher, RECIPE, HealOptions(freeze=()), processes=4, half=False)
    assert copies.gradients == 2 * size and copies.teacher == size // 2  # and what is sent
    assert copies.main == size + size // 2  # while they are loaded
    # two rows on each device, at once: nothing is accumulated
    assert copies.peak == size + 2 * size + size + size // 2 + max(size, copies.activations)


def test_a_teacher_that_is_converted():
    """On CPUs with products in bfloat16: its matrices twice, but for the head that is tied to the embeddings."""
    model, teacher = llama(), llama()
    matrices = sum(p.numel() for p in teacher.model.layers.parameters() if p.ndim == 2)
    size = sum(p.numel() for p in teacher.parameters()) * 4
    common = {"recipe": RECIPE, "options": HealOptions(freeze=(), device="cpu"), "processes": 1, "half": True}
    taught, alone = (footprint(model, each, **common) for each in (teacher, None))
    assert taught.teacher == size - 2 * matrices
    on_gpu = replace(common["options"], device=None)  # which converts them in each pass
    assert footprint(model, teacher, **common | {"options": on_gpu}).teacher == size
    others = taught.activations - alone.activations  # the loss
    assert taught.peak - alone.peak == pytest.approx(size + 2 * matrices + others, rel=0.01)


def test_shards():
    model, teacher = llama(tie_word_embeddings=False), llama(tie_word_embeddings=False).bfloat16()
    size = sum(p.numel() for p in model.parameters()) * 4
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    rest, part = size - 3 * layer, size // 4
    on_gpus, on_cpus = (
        footprint(model, teacher, recipe, HealOptions(freeze=(), shard=True, device=device), processes=4, half=False)
        for device, recipe in (("cuda", RECIPE), ("cpu", replace(RECIPE, length=2)))
    )
    near = {"rel": 0.02}  # 257 words are not divided by four
    assert on_gpus.optimizer == pytest.approx(2 * part, **near)
    assert on_gpus.parameters == on_gpus.gradients == pytest.approx(part + rest + 2 * layer, **near)
    assert on_gpus.teacher == pytest.approx(part // 2 + rest // 2 + layer, **near)
    # whole in main memory: both models, and a checkpoint's two averages
    assert on_gpus.main == size + size // 2 + 2 * size
    lasting = 3 * part + part // 2 + rest // 2  # rows are short, so that a step takes less than a checkpoint
    assert on_cpus.main == on_cpus.peak == pytest.approx(on_gpus.main + lasting, **near)


def test_products_in_bfloat16():
    """The backward pass needs autocast's copies of all sharded weights, unless it makes them again layer by layer."""
    model = llama(num_hidden_layers=8)
    copies = 7 * sum(p.numel() for p in model.model.layers[0].parameters()) * 2
    kept, again = (
        footprint(model, None, RECIPE, replace(options, gradient_checkpointing=on), processes=2, half=True)
        for options in [HealOptions(freeze=(), shard=True)]
        for on in (False, True)
    )
    assert kept.activations - again.activations > copies


@pytest.mark.parametrize("half", [False, True])
def test_a_validation_makes_whole_logits(half):
    """A teacher's loss goes through them in pieces, so that the validation takes the most."""
    model, teacher = llama(vocab_size=20_000), llama(vocab_size=20_000)
    options = HealOptions(freeze=(), device="cpu", gradient_checkpointing=True)
    found = footprint(model, teacher, RECIPE, options, processes=1, half=half)
    logits = 2 * 64 * 20_000 * 4
    weights = sum(p.numel() for p in model.parameters()) * 4
    copies = weights // 2 if half else 0  # autocast's
    assert found.activations == copies + (2.5 if half else 2) * logits
    assert found.peak >= 3 * weights + found.teacher + found.activations


def test_a_factorised_head_has_the_logits_of_a_dense_one():
    model = llama(tie_word_embeddings=False, vocab_size=4112)
    dense = footprint(model, None, RECIPE, HealOptions(freeze=()), processes=1, half=False)
    compress(model, KronyConfig("keep=0.5", init="van-loan", modules="lm_head"))
    assert footprint(model, None, RECIPE, HealOptions(freeze=()), processes=1, half=False).activations > (
        0.9 * dense.activations
    )


def test_attention_on_cpus_with_bfloat16_keeps_its_scores():
    """There ``fast_training`` chooses transformers' plain attention, for rows of at most 1,024 tokens."""
    models = [llama(num_hidden_layers=1, max_position_embeddings=2048) for _ in range(2)]
    models[1].set_attn_implementation("eager")
    for length, options in ((512, HealOptions(freeze=(), device="cpu")), (512, HealOptions(freeze=()))):
        recipe = replace(RECIPE, length=length)
        sdpa, eager = (footprint(model, None, recipe, options, processes=1, half=True).activations for model in models)
        assert (sdpa == eager) == (options.device == "cpu")
        assert models[0].config._attn_implementation == "sdpa"


def test_capped_logits_are_held():
    """Gemma 2 changes the logits after the head, so a teacher's are compared as they are."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96, "head_dim": 12, "vocab_size": 257}
    model = at_random(Gemma2Config(num_attention_heads=4, num_key_value_heads=2, **sizes))
    found = footprint(model, model, RECIPE, HealOptions(freeze=()), processes=1, half=False)
    logits = 2 * 64 * model.config.vocab_size * 4
    assert found.activations >= 3 * logits


def test_what_is_frozen_and_what_is_computed_again():
    model = compressed("llama")
    whole = footprint(model, None, RECIPE, HealOptions(freeze=()), processes=1, half=False)
    part = footprint(model, None, RECIPE, HealOptions(freeze={"embeddings"}), processes=1, half=False)
    assert whole.gradients - part.gradients == 257 * 48 * 4
    again = footprint(model, None, RECIPE, HealOptions(gradient_checkpointing=True), processes=1, half=False)
    assert again.activations < 0.7 * whole.activations
    assert not any(p.is_meta for p in model.parameters()) and not model.is_activation_checkpointing


def kept_results():
    return json.loads((ROOT / "benchmarks/results/large_models.json").read_text())


def test_the_kept_measurements_are_within_a_tenth():
    """``benchmarks/large_models.py`` measures each run in processes of their own."""
    rows = kept_results()["measured"]
    assert {"one process", "two, a copy each", "two, sharded"} <= {row["case"] for row in rows}
    for row in rows:
        for which in ("first", "other"):
            if which in row:
                assert row[which]["computed"] == pytest.approx(row[which]["measured"], rel=0.1), row


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import large_models

    return large_models


def test_what_stands_beside_the_measurements_is_what_is_computed(benchmark):
    for row in kept_results()["measured"]:
        kept = {which: row[which]["computed"] for which in ("first", "other") if which in row}
        assert benchmark.foretold(row["case"]) == kept, row["case"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one process", "two, sharded"])
def test_what_a_run_takes_is_within_a_tenth(case, benchmark):
    row = benchmark.measured(case)
    for which in ("first", "other"):
        if which in row:
            assert row[which]["computed"] == pytest.approx(row[which]["measured"], rel=0.1)


def test_the_table_of_the_smallest_model_is_what_is_computed(benchmark):
    rows = [row for row in kept_results()["computed"] if row["model"] == "1B"]
    assert benchmark.computed("1B") == rows


@pytest.mark.slow
def test_the_table_is_what_is_computed(benchmark):
    assert benchmark.computed() == kept_results()["computed"]
