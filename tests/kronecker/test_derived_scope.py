"""The scope of a key-value cache: threads, models inside models, copies, hooks, exceptions, compiled calls."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import krony
from derived_models import EXPECTED, IDS, SCHEMES, built, check, logits, multiply_data, scores, small
from krony.kronecker.algebra import KronShape
from krony.kronecker.linear import KroneckerLinear
from krony.models.surgery import put_in
from small_models import BUILDERS


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
