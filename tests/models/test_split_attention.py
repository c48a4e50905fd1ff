"""Q, K and V of a fused attention matrix as three layers: same outputs, saved, loaded, whole again."""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import krony
from krony import KronyConfig, KronyError, compress
from krony.kronecker.linear import KroneckerLinear
from krony.models.split_attention import SplitAttention, fused_attention, splitting
from krony.models.surgery import kronecker_layers, put_in, take_out


def small_gpt2(**options):
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=256, n_positions=32, **options))


def small_mpt():
    return MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=256, max_seq_len=32))


def small_phi3():  # fewer heads for K and V
    return Phi3ForCausalLM(
        Phi3Config(
            hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
            vocab_size=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


FAMILIES = {"gpt2": (small_gpt2, "c_attn"), "mpt": (small_mpt, "Wqkv"), "phi3": (small_phi3, "qkv_proj")}


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """A model whose biases are not zero, and the name of its fused matrices."""
    torch.manual_seed(0)
    build, matrix = FAMILIES[request.param]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.2)
    return model, matrix


def logits(model, ids):
    return model(ids).logits.detach()


def test_the_three_layers_give_the_outputs_of_the_matrix_and_leave_it_as_it_was(family, ids):
    model, _ = family
    before, tensors = logits(model, ids), dict(model.named_parameters())
    with splitting(model, fused_attention(model)):
        assert sum(isinstance(module, SplitAttention) for module in model.modules()) == 2
        torch.testing.assert_close(logits(model, ids), before)
    assert dict(model.named_parameters()) == tensors  # the very tensors, under the same names
    assert torch.equal(logits(model, ids), before)


def test_each_part_is_the_nearest_sum_of_products_to_its_own_rows(family):
    """The reference is Van Loan's best approximation of the rows of Q, K and V, each cut out of the matrix by hand."""
    model, matrix = family
    name, rows = next(iter(fused_attention(model).items()))
    weight, bias = (None if t is None else t.clone() for t in take_out(model, name))
    compress(model, KronyConfig("keep=0.5", init="van-loan", rescale=False, modules=matrix, split_attention=True))
    first = 0
    for part, count in zip("qkv", rows, strict=True):
        layer = kronecker_layers(model)[f"{name}.{part}"]
        own, (m1, n1), (m2, n2) = weight[first : first + count].double(), layer.shape.left, layer.shape.right
        turned = own.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
        u, s, v = torch.linalg.svd(turned)
        best = torch.kron((s[0] * u[:, 0]).reshape(m1, n1), v[0].reshape(m2, n2))
        torch.testing.assert_close(layer.dense_weight(torch.float64), best, atol=1e-6, rtol=1e-5)
        assert bias is None or torch.equal(layer.bias, bias[first : first + count])
        first += count
    assert first == len(weight)


def test_saved_loaded_continued_and_made_dense(family, ids, tmp_path):
    model, matrix = family
    kind = type(model.get_submodule(next(iter(fused_attention(model)))))
    compress(model, KronyConfig("keep=0.5", init="van-loan", modules=matrix, split_attention=True))
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), expected)
    cached = loaded(ids[:, :-1], use_cache=True)
    stepped = loaded(ids[:, -1:], past_key_values=cached.past_key_values).logits[:, -1]
    torch.testing.assert_close(stepped, expected[:, -1])
    body = AutoModel.from_pretrained(tmp_path)
    assert len(kronecker_layers(body)) == 6
    dense = krony.export_model(loaded)
    torch.testing.assert_close(logits(dense, ids), expected)
    assert {type(dense.get_submodule(name)) for name in fused_attention(dense)} == {kind}
    assert not any(isinstance(module, SplitAttention) for module in dense.modules())


def test_a_pattern_takes_q_alone_and_the_rest_of_the_matrix_stays_exact(ids, tmp_path):
    model = small_gpt2().eval()
    weight = take_out(model, "transformer.h.1.attn.c_attn")[0].clone()
    scheme = {"transformer.h.1.attn.c_attn.q": "keep=0.5"}
    report = compress(model, KronyConfig(scheme, init="van-loan", split_attention=True))
    assert [layer.name for layer in report.layers] == ["transformer.h.1.attn.c_attn.q"]
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)  # of which nothing was replaced
    split = model.transformer.h[1].attn.c_attn
    assert torch.equal(torch.cat([split.k.weight.T, split.v.weight.T]), weight[32:])
    assert split.k.weight.untyped_storage().nbytes() == 32 * 32 * 4  # not a view that keeps the matrix alive
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))


def test_a_failure_leaves_the_model_as_it_was():
    model = small_gpt2()
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 40] = float("nan")  # in K
    tensors = dict(model.named_parameters())
    with pytest.raises(KronyError, match=r"h\.1\.attn\.c_attn\.k: its weight has values that are not finite"):
        compress(model, KronyConfig("keep=0.5", init="van-loan", modules="c_attn", split_attention=True))
    assert dict(model.named_parameters()) == tensors


def test_trained_with_attention_and_mlp_on_text(ids):
    """Calibration, a short training of everything, and a redrawn model know the three layers too."""
    model, again = small_gpt2(), small_gpt2()
    config = KronyConfig("keep=0.5", init="als", modules="attn|mlp", split_attention=True, tune=2, tune_all=True)
    report = compress(model, config, calibration=ids)
    assert len(report.layers) == 2 * 6
    assert all(layer.calibrated_error is not None for layer in report.layers)
    compress(again, KronyConfig("keep=0.5", init="random", modules="c_attn$|q$", split_attention=True, reinit="all"))
    assert isinstance(again.transformer.h[0].attn.c_attn.q, KroneckerLinear)


def test_errors_against_the_original_are_those_of_the_report():
    base, model = small_gpt2(), small_gpt2()
    model.load_state_dict(base.state_dict())
    report = compress(model, KronyConfig("keep=0.5", init="van-loan", modules="c_attn", split_attention=True))
    for view, layer in zip(krony.inspect_model(model, base), report.layers, strict=True):
        assert view.name == layer.name
        assert view.error == pytest.approx(layer.error, rel=1e-6)


def test_what_can_not_be_split_is_refused():
    with pytest.raises(KronyError, match=r"modules mlp replaces none of them: choose them too, such as modules='mlp"):
        KronyConfig("keep=0.5", split_attention=True)
    torch.manual_seed(0)
    heads = GPTNeoXForCausalLM(  # the rows of one head are its Q, K and V
        GPTNeoXConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=64)
    )
    config = KronyConfig("keep=0.5", init="van-loan", modules="query_key_value", split_attention=True)
    with pytest.raises(KronyError, match="GPTNeoXForCausalLM has no attention matrix that holds Q, then K, then V"):
        compress(heads, config)


def test_the_k_and_v_of_cross_attention_are_no_three_parts():
    model = small_gpt2(add_cross_attention=True)
    assert list(fused_attention(model)) == [f"transformer.h.{n}.attn.c_attn" for n in range(2)]


def test_a_damaged_config_is_refused(tmp_path):
    model = small_gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan", modules="c_attn", split_attention=True))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entries = config["quantization_config"]["modules"]
    entries["transformer.h.0.mlp.c_fc.q"] = entries["transformer.h.0.attn.c_attn.q"]  # a matrix that is no attention's
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KronyError, match=r"transformer\.h\.0\.mlp\.c_fc\.q is no linear layer of GPT2LMHeadModel"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_split_that_was_put_there_by_hand_survives(ids):
    model = small_gpt2().eval()
    before = logits(model, ids)
    with splitting(model, ["transformer.h.0.attn.c_attn"]):
        split = model.transformer.h[0].attn.c_attn
        put_in(model, "transformer.h.0.attn.c_attn.q", torch.nn.Sequential(split.q))
    assert isinstance(model.transformer.h[0].attn.c_attn, SplitAttention)
    torch.testing.assert_close(logits(model, ids), before)


def test_the_rest_of_a_split_matrix_is_compressed_later(ids):
    """A second call finds K and V of layers that are split already, beside matrices that are still whole."""
    model = small_gpt2().eval()
    first = {"transformer.h.0.attn.c_attn.q": "keep=0.5"}
    compress(model, KronyConfig(first, init="van-loan", split_attention=True))
    report = compress(model, KronyConfig("keep=0.5", init="van-loan", modules=r"c_attn\.[kv]$", split_attention=True))
    assert [layer.name.removeprefix("transformer.h.") for layer in report.layers] == [
        f"{layer}.attn.c_attn.{part}" for layer in range(2) for part in "kv"
    ]
    assert len(kronecker_layers(model)) == 5 and logits(model, ids).isfinite().all()
