"""Derived tensors follow the parameters, whoever changes them, and are made once per generation."""

import copy
import functools
import gc
import inspect
import os
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import DynamicCache, StaticCache

import krony
from krony.kronecker import fused_mlp
from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear
from krony.models.surgery import kronecker_layers, put_in
from small_models import BUILDERS

SCHEMES = {
    "dense from 8 tokens": krony.KronyConfig("512x128:3", init="van-loan", scalars=True),
    "always dense": krony.KronyConfig("512x128:4", init="van-loan", scalars=True),
    "selection": krony.KronyConfig("keep=0.5", init="prune", epsilon=0.0, scalars=True),
}
IDS = torch.randint(1, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


@functools.cache
def compressed(scheme: str):
    """The shipped model, compressed; it never computes anything, so nothing in it can be stale."""
    model = krony.demo_model()
    krony.compress(model, SCHEMES[scheme])
    return model


def built(scheme: str):
    return copy.deepcopy(compressed(scheme)).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits


def scores(model, **options):
    """The logits of every new token of a generation, ``(steps, batch, vocabulary)``."""
    length = 6
    options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0} | options
    made = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.stack(made.logits)


def check(model, scheme: str) -> None:
    """Everything equals, to the bit, what a model gives that was built from the same values."""
    fresh = built(scheme)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(fresh))
    assert torch.equal(scores(model), scores(fresh))


def small(scheme="24x24:2", family="gpt2", **changes):
    model = BUILDERS[family](**changes)
    krony.compress(model, krony.KronyConfig(scheme, init="van-loan", scalars=True))
    return model.eval()


def factors(model):
    return [p for layer in kronecker_layers(model).values() for p in layer.parameters()]


# ---------------------------------------------------------------------------------------------------- what changes


def optimisers() -> dict[str, tuple[type, dict]]:
    """Every optimiser of torch that takes these parameters, in every variant that runs on this machine."""
    found = {}
    for name, kind in inspect.getmembers(torch.optim, inspect.isclass):
        if kind is torch.optim.Optimizer or name == "Muon":  # it takes matrices only, and factors are stacked
            continue
        for flag in ("", "foreach", "fused", "capturable"):
            options = {flag: True} if flag else {}
            if flag and (flag not in inspect.signature(kind).parameters or flag == "capturable"):
                continue  # capturable needs an accelerator
            found[f"{name} {flag}".strip()] = kind, options
    return found


OPTIMISERS = optimisers()


def test_the_optimisers_are_there():
    assert {"SGD fused", "Adam fused", "AdamW fused", "Adagrad fused", "AdamW foreach", "LBFGS"} <= set(OPTIMISERS)
    assert len(OPTIMISERS) > 25


def step(name: str, parameters: list[nn.Parameter]) -> None:
    kind, options = OPTIMISERS[name]
    optimiser = kind(parameters, lr=0.1, **options)

    def closure():
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
            if kind is torch.optim.SparseAdam:
                parameter.grad = parameter.grad.to_sparse()
        return torch.ones(())

    closure()
    optimiser.step(closure)
    optimiser.zero_grad()


@pytest.mark.parametrize("name", list(OPTIMISERS))
def test_after_every_optimiser(name):
    model = small()
    before, _ = logits(model, IDS % 257), model.generate(IDS % 257, max_new_tokens=3, pad_token_id=0)
    step(name, factors(model))
    fresh = small()
    fresh.load_state_dict(model.state_dict())
    after = logits(model, IDS % 257)
    assert not torch.equal(after, before) and torch.equal(after, logits(fresh, IDS % 257))
    options = {"max_new_tokens": 3, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    generated, expected = (torch.stack(m.generate(IDS % 257, **options).logits) for m in (model, fresh))
    assert torch.equal(generated, expected)


def fused_step(model):
    step("AdamW fused", factors(model))


def assign_data(model):
    for p in factors(model):
        p.data = p.data * 1.5


def copy_data(model):
    for p in factors(model):
        p.data.copy_(p.data * 1.5)


def multiply_data(model):
    for p in factors(model):
        p.data.mul_(1.5)


def dropped_neurons_return(model):
    """In the selection, zeros of the right factors become other numbers."""
    for layer in kronecker_layers(model).values():
        layer.right.data.add_(0.25)


@torch.no_grad()
def copy_in_place(model):
    for p in factors(model):
        p.copy_(p * 1.5)


@torch.no_grad()
def set_storage(model):
    for p in factors(model):
        p.set_((p * 1.5).clone())


def other_state(model):
    return {name: tensor * 1.25 for name, tensor in model.state_dict().items()}


def load(model):
    model.load_state_dict(other_state(model))


def load_by_assignment(model):
    model.load_state_dict(other_state(model), assign=True)


def replace_parameters(model):
    for layer in kronecker_layers(model).values():
        layer.weight, layer.right = (nn.Parameter(p.detach() * 1.5) for p in (layer.weight, layer.right))


def vector(model):
    parameters = factors(model)
    flat = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(flat * 1.5, parameters)


@torch.no_grad()
def moving_average(model):
    own = factors(model)
    torch._foreach_lerp_([p.data for p in own], [p.detach() * 2 for p in own], 0.5)


CHANGES = [
    fused_step, assign_data, copy_data, multiply_data, dropped_neurons_return, copy_in_place, set_storage, load,
    load_by_assignment, replace_parameters, vector, moving_average,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_after_every_change(scheme, change):
    model = built(scheme)
    before = logits(model)
    scores(model)
    change(model)
    assert not torch.allclose(logits(model), before)
    check(model, scheme)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_averaged_models(scheme):
    model = built(scheme)
    average = AveragedModel(model, avg_fn=lambda old, new, _: (old + new) / 2)
    for _ in range(2):
        average.update_parameters(model)
        check(average.module, scheme)
        fused_step(model)
        check(model, scheme)


@pytest.mark.parametrize("change", [fused_step, copy_data, assign_data])
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_cache_that_is_reset_and_reused(scheme, kind, change):
    model = built(scheme)
    options = {"max_cache_len": 64} if kind is StaticCache else {}
    cache = kind(config=model.config, **options)
    scores(model, past_key_values=cache, disable_compile=True)
    change(model)
    cache.reset()
    fresh = built(scheme)
    fresh.load_state_dict(model.state_dict())
    after = scores(model, past_key_values=cache, disable_compile=True)
    assert torch.equal(after, scores(fresh, past_key_values=kind(config=model.config, **options), disable_compile=True))


@pytest.mark.parametrize("length", [2, 12])
@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
@pytest.mark.parametrize("scheme", ["always dense", "selection"])
@torch.no_grad()
def test_a_cache_that_another_model_filled_in_between(scheme, kind, length):
    """The hooks of this model don't see that its cache was reset."""
    model, other = built(scheme), built(scheme)
    cache = kind(config=model.config, **({"max_cache_len": 64} if kind is StaticCache else {}))
    for _ in range(2):
        model(IDS[:, :4], past_key_values=cache)
    multiply_data(model)
    cache.reset()
    other(IDS[:, :length], past_key_values=cache)
    fresh = built(scheme)
    fresh.load_state_dict(model.state_dict())
    expected = fresh(IDS[:, 4:6], past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(IDS[:, 4:6], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("change", ["copy_", "training"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_change_in_the_middle_of_a_generation(scheme, change):
    model = built(scheme)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        for _ in range(2):
            model(IDS[:, :1], past_key_values=cache)
    if change == "training":
        model(IDS, labels=IDS).loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True).step()
    else:
        copy_in_place(model)
    fresh = built(scheme)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = fresh(IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(model(IDS[:, :1], past_key_values=cache).logits, expected)


def test_training_with_frozen_right_factors_reads_them_in_every_step():
    model = built("selection")
    for layer in kronecker_layers(model).values():
        layer.right.requires_grad_(False)
    for _ in range(2):
        fresh = built("selection")
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(IDS).logits, fresh(IDS).logits)
        dropped_neurons_return(model)


# ------------------------------------------------------------------------------------------------------ what is reused


@pytest.fixture
def made(monkeypatch):
    """Counts how often derived values are made: dense matrices, combinations, patterns."""
    for scheme in SCHEMES:
        compressed(scheme)  # kept for all tests; compressing makes dense matrices too, to report errors
    counts = {"dense_weight": 0, "_combination": 0, "_read_pattern": 0}

    def count(owner, name):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(KroneckerLinear, "dense_weight")
    count(fused_mlp, "_combination")
    count(fused_mlp, "_read_pattern")
    return counts


EXPECTED = {  # 6 layers of two matrices
    "dense from 8 tokens": {"dense_weight": 12, "_combination": 0, "_read_pattern": 0},  # by the prefill alone
    "always dense": {"dense_weight": 12, "_combination": 0, "_read_pattern": 0},
    "selection": {"dense_weight": 0, "_combination": 6, "_read_pattern": 6},
}


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
    from krony.kronecker import derived

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


# ------------------------------------------------------------------------------------------------- threads and models


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_two_threads_on_one_model(scheme):
    model = built(scheme)
    prompts = [IDS[:1, start : start + 8] for start in range(6)]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(prompt, **options) for prompt in prompts]
    results, start = {}, threading.Barrier(2)

    def work(own):
        start.wait()
        for index in own:
            results[index] = model.generate(prompts[index], **options)

    threads = [threading.Thread(target=work, args=(range(first, 6, 2),)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(6))


def test_another_thread_does_not_see_the_scope():
    from krony.kronecker.derived import is_reusing

    model, seen = built("always dense"), {}

    def look(*_):
        seen["here"] = is_reusing()
        thread = threading.Thread(target=lambda: seen.update(there=torch.no_grad()(is_reusing)()))
        thread.start()
        thread.join()

    model.transformer.h[3].register_forward_hook(look)
    with torch.no_grad():
        model(IDS, past_key_values=DynamicCache(config=model.config))
        assert seen == {"here": True, "there": False} and not is_reusing()


def test_layers_of_another_model_inside_a_forward():
    """A teacher's layers are called while the student continues its cache: that says nothing of their weights."""
    model, teacher = built("always dense"), built("always dense")
    layer = teacher.transformer.h[0].mlp.c_fc
    outputs = []
    model.transformer.h[0].register_forward_hook(lambda *_: outputs.append(layer(torch.ones(1, 256))))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        for _ in range(2):
            model(IDS[:, :1], past_key_values=cache)
            layer.weight.data.mul_(2)
    torch.testing.assert_close(outputs[1] - layer.bias, 2 * (outputs[0] - layer.bias))


def test_a_teacher_inside_a_students_forward():
    student, teacher = built("always dense"), built("always dense")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = student, teacher

        def forward(self, ids, past_key_values):
            return self.student(ids, past_key_values=past_key_values).logits, self.teacher(ids).logits

    both, cache = Both(), DynamicCache(config=student.config)
    with torch.no_grad():
        for _ in range(2):
            _, ours = both(IDS, past_key_values=cache)
            assert torch.equal(ours, logits(built_like(teacher)))
            multiply_data(teacher)


def built_like(model):
    fresh = built("always dense")
    fresh.load_state_dict(model.state_dict())
    return fresh


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_copies_reuse_their_own(scheme, way, made):
    model = built(scheme)
    scores(model)
    again = way(model)
    assert len(again.transformer._forward_pre_hooks) == len(again.transformer._forward_hooks) == 1
    multiply_data(again)
    made.update(dict.fromkeys(made, 0))
    scores(again)
    assert made == EXPECTED[scheme]
    check(again, scheme)
    check(model, scheme)


# ---------------------------------------------------------------------------------------------------------- the hooks


@pytest.mark.parametrize("family", list(BUILDERS))
def test_hooks_are_registered_once_and_removed_with_the_layers(family, tmp_path):
    from krony.models.fusion import fuse

    model = small("keep=0.5", family)
    fuse(model)
    model.save_pretrained(tmp_path)
    loaded = krony.load_model(str(tmp_path))
    for each in (model, loaded):
        hooked = [m for m in each.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert hooked == [each.base_model]
        assert len(each.base_model._forward_pre_hooks) == len(each.base_model._forward_hooks) == 1
    dense = krony.export_model(loaded)
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._forward_hooks_always_called for m in dense.modules())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_stops_half_way_leaves_no_scope(error):
    """Ctrl-C is no Exception: torch does not call the hooks after it."""
    from krony.kronecker import derived

    model = built("always dense")
    cache = DynamicCache(config=model.config)

    def stop(*_):
        raise error

    with torch.no_grad():
        model(IDS, past_key_values=cache)
        handle = model.transformer.h[4].register_forward_pre_hook(stop)
        with pytest.raises(error):
            model(IDS[:, :1], past_key_values=cache)
        handle.remove()
        assert derived.is_reusing() == (error is KeyboardInterrupt)  # until the next forward, or the end of the cache
    (scope,) = map(weakref.ref, derived._scopes[model.transformer].values())
    multiply_data(model)
    check(model, "always dense")
    with torch.no_grad():
        assert not derived.is_reusing()
        layer = model.transformer.h[0].mlp.c_fc
        x = torch.ones(1, 256)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias))
    del cache
    gc.collect()
    assert scope() is None


def test_after_ctrl_c_the_scope_ends_with_its_cache():
    from krony.kronecker.derived import is_reusing

    model = built("always dense")

    def stop(*_):
        raise KeyboardInterrupt

    model.transformer.h[4].register_forward_pre_hook(stop)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model.generate(IDS, max_new_tokens=2, pad_token_id=0)
        gc.collect()
        assert not is_reusing()


def test_a_pre_hook_that_fails_before_the_scope_is_open():
    from krony.kronecker.derived import is_reusing

    model = built("always dense")

    def stop(*_):
        raise ValueError

    model.transformer.register_forward_pre_hook(stop, prepend=True)
    with torch.no_grad(), pytest.raises(ValueError):
        model(IDS, past_key_values=DynamicCache(config=model.config))
    assert not is_reusing()


def test_a_body_that_fails_inside_another_does_not_close_its_scope():
    from krony.kronecker.derived import is_reusing

    outer, inner, seen = built("always dense"), built("always dense"), []

    def stop(*_):
        raise ValueError

    def call(*_):
        with pytest.raises(ValueError):
            inner(IDS)
        seen.append(is_reusing())

    inner.transformer.register_forward_pre_hook(stop, prepend=True)
    outer.transformer.h[0].register_forward_hook(call)
    with torch.no_grad():
        outer(IDS, past_key_values=DynamicCache(config=outer.config))
    assert seen == [True]


def test_gradients_inside_a_forward_without():
    """As test-time training does it: a value that was stored carries no gradient."""
    model = built("always dense")
    layer = model.transformer.h[0].mlp.c_fc

    def train(*_):
        with torch.enable_grad():
            layer(torch.ones(1, 256)).sum().backward()

    model.transformer.h[0].register_forward_hook(train)
    with torch.no_grad():
        model(IDS, past_key_values=DynamicCache(config=model.config))
    assert layer.weight.grad.abs().sum() > 0 and layer.right.grad.abs().sum() > 0


def test_an_architecture_whose_head_calls_the_decoder_directly(made):
    """OPT's causal model passes its base model by."""
    from transformers import OPTConfig

    from small_models import _random

    options = {"hidden_size": 48, "ffn_dim": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = _random(OPTConfig(vocab_size=257, max_position_embeddings=64, word_embed_proj_dim=48, **options))
    krony.compress(model, krony.KronyConfig("96x24:4", init="van-loan"))
    made["dense_weight"] = 0
    model.generate(IDS % 257, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    assert made["dense_weight"] == 4


class Counted:
    """A cache of another library, which only tells its length; None for one that can't."""

    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        if self.length is None:
            raise ValueError("only linear attention")
        return self.length


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = KroneckerLinear(KronShape(4, 3, 2, 2)).eval()
        for parameter in self.layer.parameters():
            nn.init.ones_(parameter)

    def forward(self, x, cache):
        if cache.length is not None:
            cache.length += len(x)
        return self.layer(x)


@pytest.mark.parametrize("position", ["cache", "past_key_values", None])
@pytest.mark.parametrize("length", [0, None])
def test_caches_that_only_count_or_not_even_that(length, position, made):
    class Named(Body):
        def forward(self, x, past_key_values):
            return super().forward(x, past_key_values)

    from krony.kronecker.derived import reuse_while_decoding

    body = Named() if position == "past_key_values" else Body()
    reuse_while_decoding(body.eval())
    body.layer.path = "dense"
    cache, x = Counted(length), torch.ones(2, 6)
    with torch.no_grad():
        for _ in range(3):
            body(x, cache) if position is None else body(x, **{position: cache})
    assert made["dense_weight"] == (3 if length is None else 1)
    with torch.no_grad():
        cache.length = length
        body(x, cache)
    assert made["dense_weight"] == (4 if length is None else 2)


def test_tensors_without_values():
    """On the meta device, and fake ones, as tools use them that estimate memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mlp = built("selection").transformer.h[0].mlp
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert mlp(torch.ones(2, 3, 256)).shape == (2, 3, 256)
        assert mlp.to("meta")(torch.ones(2, 3, 256, device="meta")).shape == (2, 3, 256)


def test_layers_that_are_replaced_while_a_cache_is_continued():
    model = built("always dense")
    with torch.no_grad():
        cache = model(IDS, past_key_values=DynamicCache(config=model.config)).past_key_values
        replaced = copy.deepcopy(model.transformer.h[0].mlp.c_fc)
        replaced.weight.mul_(2)
        put_in(model, "transformer.h.0.mlp.c_fc", replaced)
        expected = built_like(model)(IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits
        assert torch.equal(model(IDS[:, :1], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("family", list(BUILDERS))
def test_compiled_without_graph_breaks(family):
    """A compiled graph contains no scope: it makes its derived tensors itself, and stores none."""
    wide = {"n_inner": 192} if family == "gpt2" else {"intermediate_size": 192}
    model = small("96x24:4", family, **wide)
    torch._dynamo.reset()
    run = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            cache, own = DynamicCache(config=model.config), DynamicCache(config=model.config)
            for ids in (IDS % 257, IDS[:, :1] % 257):
                expected = model(ids, past_key_values=own).logits
                torch.testing.assert_close(run(ids, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-5)
            multiply_data(model)


def test_eager_and_compiled_calls_take_turns_on_one_cache():
    """A graph that fills a cache again does not open a scope; the call after it must not find the old one."""
    model = small("96x24:4", n_inner=192)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        for first, second in ((model, compiled), (compiled, model), (model, model), (compiled, model)):
            cache.reset()
            own = StaticCache(config=model.config, max_cache_len=64)
            fresh = small("96x24:4", n_inner=192)
            fresh.load_state_dict(model.state_dict())
            for run, ids in ((first, IDS % 257), (second, IDS[:, :1] % 257), (second, IDS[:, 1:2] % 257)):
                expected = fresh(ids, past_key_values=own).logits
                torch.testing.assert_close(run(ids, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-5)
            multiply_data(model)
