"""Fused MLPs in models: which MLPs are fused, that nothing else changes, and when an MLP runs layer by layer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig, OPTConfig

import krony
from krony import KronyConfig, compress
from krony.kronecker.linear import KroneckerLinear
from krony.models.fusion import FusedMLP, find_parts, fuse
from small_models import BUILDERS, _random, gpt2, llama

SCHEMES = ["keep=0.5", "keep=0.75", "48x48", "24x16:2", "48x24:4"]


def compressed(model, scheme="keep=0.5"):
    compress(model, KronyConfig(scheme, init="van-loan"))
    return model


def mlps(model):
    return [m for m in model.modules() if isinstance(m, FusedMLP)]


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_fused_models_give_the_dense_logits_and_gradients(family, scheme, ids):
    wide = {"n_inner": 192} if family == "gpt2" else {"intermediate_size": 192}
    model = compressed(BUILDERS[family](**wide), scheme)
    assert len(mlps(model)) == 3
    plain = krony.export_model(copy.deepcopy(model), to="dense")
    assert not mlps(plain) and type(plain.base_model) is type(model.base_model)
    expected = plain(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    name = "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    for each in (model, plain):
        each.zero_grad()
        each(ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("path", ["left", "right", "dense"])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_save_and_load_keeps_every_bit_on_every_path(family, path, ids, tmp_path):
    model = compressed(BUILDERS[family](), "keep=0.75")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(mlps(again)) == 3
    for each in (model, again):
        for layer in krony.models.surgery.kronecker_layers(each).values():
            layer.path = path
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(model(ids).logits, again(ids).logits)


def test_names_classes_and_copies(model, ids):
    names, kinds = list(model.state_dict()), [type(m).__name__ for m in model.modules()]
    compressed(model)
    assert {n.rpartition(".")[0] for n in names} == {n.rpartition(".")[0] for n in model.state_dict()}
    assert [k for k in kinds if "MLP" in k] == [type(m).__name__ for m in mlps(model)]
    with torch.no_grad():
        expected = model(ids).logits
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert len(mlps(again)) == 3 and torch.equal(again(ids).logits, expected)
            next(iter(krony.models.surgery.kronecker_layers(again).values())).weight.zero_()
            assert not torch.equal(again(ids).logits, expected)  # its own parameters, not the first one's
        assert torch.equal(model(ids).logits, expected)


def test_dropout_comes_after(ids):
    model = compressed(gpt2(resid_pdrop=1.0, embd_pdrop=0.0, attn_pdrop=0.0))
    mlp = mlps(model)[0].train()
    assert not mlp(torch.randn(2, 48)).any()
    assert mlp.eval()(torch.randn(2, 48)).any()


def test_hooks_are_called_and_other_layers_run(model, ids):
    compressed(model)
    mlp = mlps(model)[0]
    parts = mlp.krony_parts
    with torch.no_grad():
        expected = model(ids).logits
        down, seen = mlp.get_submodule(parts.down), []
        handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        torch.testing.assert_close(model(ids).logits, expected)
        assert seen[0].shape == (2, 24, down.in_features)  # the hidden features as the model's own class orders them
        up = mlp.get_submodule(parts.ups[0])
        act = mlp.get_submodule(parts.act)
        x = torch.randn(1, up.in_features)
        mlp(x)
        if len(parts.ups) == 1:
            torch.testing.assert_close(seen[1], act(up(x)))
        handle.remove()

        class Wrapped(nn.Module):  # as adapters do it
            def __init__(self, base):
                super().__init__()
                self.base = base

            def forward(self, x):
                return self.base(x) + 1

        before = mlp(x)
        mlp._modules[parts.down] = Wrapped(down)
        torch.testing.assert_close(mlp(x), before + 1)


def test_other_forwards_are_left_alone():
    class Mixed(nn.Module):
        def __init__(self, change):
            super().__init__()
            from krony.kronecker.algebra import KronShape

            shape = KronShape(4, 6, 2, 1)
            self.up, self.down, self.act = KroneckerLinear(shape), KroneckerLinear(shape.transposed), nn.GELU()
            self.change = change

        def forward(self, x):
            return self.change(self, x)

    class Second(Mixed):
        def forward(self, unused=None, x=None):
            return self.change(self, x)

    class Nothing(Mixed):
        def forward(self):
            return None

    right = Mixed(lambda m, x: m.down(m.act(m.up(x))))
    assert find_parts(right).ups == ("up",)
    assert find_parts(Second(right.change)) is None and find_parts(Nothing(right.change)) is None
    for change in (
        lambda m, x: m.down(m.act(m.up(x))) + x,
        lambda m, x: m.down(m.act(m.up(x) * 2)),
        lambda m, x: m.down(m.act(m.up(x)) * m.act(m.up(x))),
        lambda m, x: m.down(m.up(m.act(x))),
        lambda m, x: m.down(m.up(x)),
        lambda m, x: x if x.sum() > 0 else m.down(m.act(m.up(x))),
    ):
        holder = nn.Sequential(Mixed(change))
        fuse(holder)
        assert type(holder[0]) is Mixed


def test_a_model_without_a_module_for_its_mlps_runs_layer_by_layer(ids):
    options = {"hidden_size": 48, "ffn_dim": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = _random(OPTConfig(vocab_size=257, max_position_embeddings=64, word_embed_proj_dim=48, **options))
    dense = krony.export_model(copy.deepcopy(compressed(model)), to="dense")
    assert not mlps(model)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


def test_generate_with_and_without_the_cache(model, ids):
    compressed(model, "keep=0.75")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.slow
@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("scheme", ["keep=0.5", "48x48", "48x24:4"])
def test_compiled_without_breaks_and_recompiles(family, scheme):
    wide = {"n_inner": 192, "resid_pdrop": 0.0} if family == "gpt2" else {"intermediate_size": 192}
    model = compressed(BUILDERS[family](**wide), scheme)
    mlp = mlps(model)[0].requires_grad_(True)
    torch._dynamo.reset()
    run = torch.compile(mlp, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for train in (False, True):
            mlp.train(train)
            torch._dynamo.reset()
            with torch.set_grad_enabled(train):
                for tokens in (20, 21):  # the second makes the length a variable
                    torch.testing.assert_close(run(torch.ones(1, tokens, 48)), mlp(torch.ones(1, tokens, 48)))
                with torch._dynamo.config.patch(error_on_recompile=True):
                    for tokens in (22, 30, 42, 17):
                        x = torch.randn(1, tokens, 48)
                        torch.testing.assert_close(run(x), mlp(x), rtol=1e-4, atol=1e-5)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("scheme", ["keep=0.5", "48x48", "48x24:4"])
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=GPU)])
def test_compiled_decoding_gives_the_tokens_of_eager_decoding(family, scheme, device, ids):
    """On a GPU ``reduce-overhead`` replays a CUDA graph for each new token: what it reads must not have been freed."""
    wide = {"n_inner": 192} if family == "gpt2" else {"intermediate_size": 192}
    model, ids = compressed(BUILDERS[family](**wide), scheme).to(device), ids.to(device)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    expected = model.generate(ids, **options, disable_compile=True)
    torch._dynamo.reset()
    compiled = CompileConfig(fullgraph=True, mode="reduce-overhead")
    compiled._compile_all_devices = True  # generate compiles on GPUs only
    for _ in range(2):  # the second call has graphs of the first
        assert torch.equal(model.generate(ids, **options, compile_config=compiled), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_both_families_are_known():
    assert mlps(compressed(llama()))[0].krony_parts.ups == ("gate_proj", "up_proj")
    assert mlps(compressed(gpt2()))[0].krony_parts.after == ("dropout",)
