"""Derived tensors are made once per generation, and die with its key-value cache."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache

import krony
from derived_models import EXPECTED, IDS, SCHEMES, built, check, factors, logits, scores
from krony.kronecker import derived


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 9}], ids=str)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_generation_makes_them_once_per_layer(scheme, options, made):
    model = built(scheme)
    for generation in (1, 2):
        scores(model, **options)
        assert made == {name: generation * count for name, count in EXPECTED[scheme].items()}


def test_assisted_generation_makes_them_once_per_layer(made):
    """Tokens that the assistant guessed wrongly are cropped from the cache."""
    model = built("always dense")
    assistant = krony.demo_model().eval()
    expected = model.generate(IDS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0)
    made["dense_weight"] = 0
    actual = model.generate(IDS[:1], max_new_tokens=12, do_sample=False, pad_token_id=0, assistant_model=assistant)
    assert torch.equal(actual, expected) and made["dense_weight"] == 12


def test_without_a_cache_each_call_plans_for_itself(made):
    """24 tokens are too few to make a dense matrix for one call, and enough for the prefill of a generation."""
    model = built("dense from 8 tokens")
    logits(model)
    assert made["dense_weight"] == 0
    with torch.no_grad():
        model(IDS, past_key_values=DynamicCache(config=model.config))
    assert made["dense_weight"] == 12


@pytest.mark.parametrize("mode", [torch.enable_grad, nn.Module.train])
def test_nothing_is_reused_with_gradients_or_in_training_mode(mode, made):
    model = built("always dense")
    cache = DynamicCache(config=model.config)
    mode(model) if mode is nn.Module.train else None
    with torch.enable_grad() if mode is torch.enable_grad else torch.no_grad():
        for _ in range(2):
            model(IDS[:, :1], past_key_values=cache)
    assert made["dense_weight"] == 24


def test_they_die_with_their_cache():
    model = built("always dense")
    with torch.no_grad():
        cache = model(IDS, past_key_values=DynamicCache(config=model.config)).past_key_values
    assert len(derived._scopes[model.transformer]) == 1
    del cache
    gc.collect()
    assert len(derived._scopes[model.transformer]) == 0
    count = len(derived._scopes)
    del model
    gc.collect()
    assert len(derived._scopes) < count


def test_inference_mode_and_gradients_on_one_cache():
    model = built("always dense")
    cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        fresh = built("always dense")
        with torch.no_grad():
            wanted = fresh(IDS[:, :2], past_key_values=expected).logits
        with mode():
            assert torch.equal(model(IDS[:, :2], past_key_values=cache).logits, wanted)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = built("always dense")
        expected = scores(model)
        for p in factors(model):
            p.mul_(1.5)
        changed = scores(model)
        assert not torch.equal(changed, expected)
        check(model, "always dense")


def test_autocast_for_a_part_of_a_generation():
    """A matrix that was made in bfloat16 is not used in float32, nor the other way round."""
    model = built("always dense")
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        for enabled in (True, False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                assert model(IDS[:, :2], past_key_values=cache).logits.isfinite().all()


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("around", [True, False])
def test_nothing_is_kept_of_parameters_that_fsdp_gathers(mesh, made, around):
    """It frees their memory, so what is derived could share it; address and version are the same the next time."""
    expected, model = scores(built("always dense")), built("always dense")
    made["dense_weight"] = 0
    for layer in (*model.transformer.h, *((model,) if around else ())):
        fully_shard(layer, mesh=mesh)
    torch.testing.assert_close(scores(model), expected, rtol=1e-4, atol=1e-4)
    assert made["dense_weight"] == 6 * 12  # in each of six steps
    assert (model.transformer in derived._scopes) is not around


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import krony

IDS = torch.randint(1, 4096, (2, 24), generator=torch.Generator().manual_seed(0))

def built():
    model = krony.demo_model()
    krony.compress(model, krony.KronyConfig(sys.argv[1], init="van-loan", scalars=True))
    return model.eval()

@torch.no_grad()
def outputs(model):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    made = model.generate(IDS, output_logits=True, return_dict_in_generate=True, **options)
    return torch.cat([model(IDS).logits, torch.stack(made.logits, 1)], 1)

dist.init_process_group("gloo")
model, mesh = built(), init_device_mesh("cpu", (2,))
for block in model.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
for _ in range(2):
    fresh = built()
    fresh.load_state_dict({n: p.full_tensor() for n, p in model.state_dict().items()})
    assert torch.equal(outputs(model), outputs(fresh))
    model.train()(IDS, labels=IDS).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
    model.eval()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["512x128:4", "keep=0.5"])
def test_parameters_that_fsdp_gathers(scheme, tmp_path):
    """FSDP gathers them into memory of its own in every forward, and releases it afterwards."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, scheme], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
