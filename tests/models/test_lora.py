"""PEFT's LoRA on a compressed model: on Kronecker layers by name and by ``all-linear``, and on untouched layers."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model

from krony import KronyConfig, KronyError, compress, export_model
from krony.kronecker.linear import KroneckerLinear
from krony.models.fusion import FusedMLP
from krony.models.loading import load_model
from krony.models.lora import LoraKroneckerLinear, kronecker_names
from krony.models.surgery import kronecker_layers
from small_models import BUILDERS, gpt2, llama

ATTENTION = {"gpt2": ["c_attn"], "llama": ["q_proj"]}
MLP = {"gpt2": ["c_fc", "mlp.c_proj"], "llama": ["gate_proj", "up_proj", "down_proj"]}
SMALL = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM"}


@pytest.fixture(params=list(BUILDERS))
def saved(request, tmp_path):
    """The family of a compressed model, and its folder."""
    model = BUILDERS[request.param]()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


def adapted(folder, target_modules, *, random=True, model=None, **options) -> PeftModel:
    """The model with an adapter, which changes its outputs if ``random``: PEFT's new adapters don't."""
    torch.manual_seed(0)
    model = load_model(str(folder)) if model is None else model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT sets it right itself
        result = get_peft_model(model, LoraConfig(target_modules=target_modules, **(SMALL | options))).eval()
    for name, parameter in result.named_parameters():
        if random and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return result


def adapters(model) -> dict[str, LoraKroneckerLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraKroneckerLinear)}


def trained(model, ids) -> list[float]:
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def test_a_layer_adds_its_adapter(saved):
    family, folder = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of layers that it doesn't know
        layers = adapters(adapted(folder, MLP[family], model=load_model(str(folder)).double()))
    assert len(layers) == 3 * len(MLP[family])
    for layer in layers.values():
        x = torch.randn(2, 5, layer.in_features, dtype=torch.float64)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = layer.base_layer.dense_weight() + 3 * b @ a
        expected = torch.nn.functional.linear(x, weight, layer.base_layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["mlp", "all-linear"])
def test_outputs_are_those_of_the_dense_model_with_the_same_adapter(saved, targets, ids, tmp_path):
    family, folder = saved
    model = adapted(folder, MLP[family] if targets == "mlp" else targets, model=load_model(str(folder)).double())
    before = load_model(str(folder)).double()
    assert (model(ids).logits - before(ids).logits).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        dense = PeftModel.from_pretrained(export_model(before), tmp_path / "adapter").eval()
    assert not kronecker_layers(dense)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-9, atol=1e-9)
    merged = dense.merge_and_unload()  # the way that the refusal to merge names
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-9, atol=1e-9)


def test_training_moves_the_adapters_alone_and_they_are_saved(saved, ids, tmp_path):
    family, folder = saved
    model = adapted(folder, MLP[family], random=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = trained(model.train(), ids)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}

    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(str(folder)), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_all_linear_is_every_layer_but_the_head(saved):
    family, folder = saved
    model = adapted(folder, "all-linear")
    inner = model.get_base_model()
    targets = {name for name, module in inner.named_modules() if hasattr(module, "lora_A")}
    plain = {n for n, m in BUILDERS[family]().named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    assert targets == plain - {"lm_head"}
    assert set(kronecker_names(inner)) == set(kronecker_layers(load_model(str(folder)))) < targets


def test_a_compressed_head_is_left_out_of_all_linear():
    model = llama(tie_word_embeddings=False)
    compress(model, KronyConfig("keep=0.5", init="van-loan", modules="down_proj"))
    model.lm_head = copy.deepcopy(kronecker_layers(model)["model.layers.0.mlp.down_proj"])
    assert not any("lm_head" in name for name in adapters(adapted(None, "all-linear", model=model)))


def test_an_excluded_layer_is_left_out(saved):
    _, folder = saved
    excluded = kronecker_names(load_model(str(folder)))[0]
    model = adapted(folder, "all-linear", exclude_modules=[excluded], use_rslora=True)
    assert f"base_model.model.{excluded}" not in adapters(model)
    assert len(adapters(model)) == len(kronecker_layers(model)) - 1


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("options", [{}, {"safe_merge": True}], ids=str)
@torch.no_grad()
def test_merging_is_refused_before_anything_changes(saved, merge, options):
    _, folder = saved
    model = adapted(folder, "all-linear")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(KronyError, match=r"can't be merged .* keep it separate, or .*to=\"dense\""):
        getattr(model, merge)(**options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert before.keys() == dict(model.named_parameters()).keys()
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))
    layer = next(iter(adapters(model).values()))
    with pytest.raises(KronyError, match="can't be merged"):
        layer.merge(**options)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@torch.no_grad()
def test_unloading_and_disabling_give_the_compressed_model_back(saved, ids):
    _, folder = saved
    untouched = load_model(str(folder))
    logits = untouched(ids).logits
    model = adapted(folder, "all-linear")
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, _unfused_logits(folder, ids))
    unloaded = model.unload()
    assert torch.equal(unloaded(ids).logits, logits)
    assert unloaded.state_dict().keys() == untouched.state_dict().keys()
    assert any(isinstance(module, FusedMLP) for module in unloaded.modules())


def _unfused_logits(folder, ids):
    from krony.models.fusion import unfuse

    model = load_model(str(folder))
    unfuse(model)
    return model(ids).logits


@torch.no_grad()
def test_merging_works_again_once_the_layers_have_no_adapter(saved, ids):
    family, folder = saved
    model = adapted(folder, MLP[family])
    model.add_adapter("second", LoraConfig(target_modules=ATTENTION[family], fan_in_fan_out=family == "gpt2", **SMALL))
    model.set_adapter("second")
    with pytest.raises(KronyError, match="can't be merged"):
        model.merge_and_unload()
    model.delete_adapter("default")
    logits = model(ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert kronecker_layers(merged).keys() == kronecker_layers(load_model(str(folder))).keys()


@torch.no_grad()
def test_a_second_adapter_on_the_same_layers(saved, ids):
    family, folder = saved
    model = adapted(folder, MLP[family])
    first = model(ids).logits
    model.add_adapter("second", LoraConfig(target_modules="all-linear", fan_in_fan_out=family == "gpt2", **SMALL))
    assert all(set(layer.lora_A) == {"default", "second"} for layer in adapters(model).values())
    model.set_adapter("second")
    assert torch.equal(model(ids).logits, _unfused_logits(folder, ids))  # a new adapter adds zero
    both = model(ids, adapter_names=["default", "second"]).logits
    torch.testing.assert_close(both[0], first[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[1], model(ids).logits[1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_copy_is_independent(saved, ids):
    family, folder = saved
    model = adapted(folder, MLP[family])
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    logits = model(ids).logits
    for layer in adapters(twin).values():
        layer.lora_B["default"].weight.zero_()
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(twin(ids).logits, _unfused_logits(folder, ids))


@torch.no_grad()
def test_generate_uses_the_adapter(saved, ids):
    """With a key-value cache, whose decoding reuses tensors derived from the factors, and without one."""
    family, folder = saved
    model = adapted(folder, MLP[family], lora_alpha=400)  # enough for other tokens than without it
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    cached = model.generate(input_ids=ids[:1, :8], **options)
    tokens = ids[:1, :8]
    while tokens.shape[1] < cached.shape[1]:
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, tokens)
    assert not torch.equal(cached, load_model(str(folder)).generate(input_ids=ids[:1, :8], **options))


def test_half_precision_and_gradient_checkpointing(saved, ids):
    family, folder = saved
    model = adapted(folder, MLP[family], model=load_model(str(folder)).bfloat16())
    assert model(ids).logits.dtype == torch.bfloat16
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(layer.lora_A["default"].weight.grad.abs().sum() > 0 for layer in adapters(model).values())


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
    ids=str,
)
def test_what_needs_the_dense_matrix_is_refused_before_anything_changes(saved, options):
    family, folder = saved
    model = load_model(str(folder))
    names = {name for name, _ in model.named_modules()}
    ((option, value),) = options.items()
    with pytest.raises(KronyError, match=rf"^{option}={value!r} is not possible on the Kronecker layer \S+\.0\.\S+, "):
        adapted(folder, "all-linear", model=model, **options)
    assert {name for name, _ in model.named_modules()} == names
    adapted(folder, ATTENTION[family], **options)  # other layers have what it takes


def test_options_are_checked_for_a_second_adapter_too(saved):
    family, folder = saved
    model = adapted(folder, MLP[family])
    with pytest.raises(KronyError, match="use_dora=True is not possible"):
        model.add_adapter("second", LoraConfig(target_modules=MLP[family], use_dora=True, **SMALL))


def test_a_factor_is_no_target(saved):
    family, folder = saved
    target = f"{MLP[family][0]}.weight"
    with pytest.raises(KronyError, match=rf"target_parameters '{target}' names a parameter of the Kronecker layer"):
        adapted(folder, [], target_parameters=[target])


def test_models_without_kronecker_layers_and_other_methods_are_as_before(saved):
    config = LoraConfig(target_modules="all-linear", fan_in_fan_out=True, **SMALL)
    get_peft_model(gpt2(), config)
    assert config._custom_modules is None
    family, folder = saved
    model = get_peft_model(load_model(str(folder)), AdaLoraConfig(target_modules="all-linear", total_step=10))
    assert not adapters(model)
    with pytest.raises(ValueError, match=r"KroneckerLinear.* is not supported"):
        get_peft_model(load_model(str(folder)), AdaLoraConfig(target_modules=MLP[family], total_step=10))


@pytest.mark.parametrize(
    "imports",
    [
        "import sys, krony.models.loading; assert 'peft' not in sys.modules; import peft",  # which is an extra
        "import peft, krony",
        "import krony, transformers, peft",
    ],
)
def test_the_order_of_imports_does_not_matter(imports, tmp_path):
    compress(model := gpt2(), KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(tmp_path)
    code = (
        f"{imports}; import sys\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model = peft.get_peft_model(model, peft.LoraConfig(target_modules='all-linear', fan_in_fan_out=True))\n"
        "print(sum(type(m).__name__ == 'LoraKroneckerLinear' for m in model.modules()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(kronecker_layers(model))


def test_untouched_layers_train_are_saved_and_merge(saved, ids, tmp_path):
    family, folder = saved
    model = adapted(folder, ATTENTION[family], random=False)
    assert all(type(layer) is KroneckerLinear for layer in kronecker_layers(model).values()) and not adapters(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = trained(model, ids)
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.eval()
    logits = model(ids).logits.detach()

    model.save_pretrained(tmp_path / "adapter")
    assert [p.suffix for p in (tmp_path / "adapter").glob("adapter_model*")] == [".safetensors"]
    again = PeftModel.from_pretrained(load_model(str(folder)), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-5, atol=1e-6)

    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)
    layers = kronecker_layers(merged)
    assert layers and set(layers) == set(kronecker_layers(load_model(str(folder))))
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_model(str(tmp_path / "merged"))(ids).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", list(BUILDERS))
def test_compressing_a_model_with_adapters_asks_to_merge_them(family):
    model = adapted(None, MLP[family], model=BUILDERS[family]())
    with pytest.raises(KronyError, match=r"carries adapters, such as that of .*\.0\.mlp\.\w+: merge them"):
        compress(model, KronyConfig("keep=0.5", init="van-loan"))
    compress(model.merge_and_unload(), KronyConfig("keep=0.5", init="van-loan"))
