"""The published code's checkpoints: their own arithmetic gives the same logits, and a round trip changes no bit."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config

import krony
from krony import KronyError
from krony.models.published_code import (
    ACTIVATIONS,
    from_reference,
    read_reference,
    to_reference,
    write_reference,
)
from krony.models.surgery import kronecker_layers
from small_models import gpt2, llama

WIDTH, HEADS, LAYERS, VOCABULARY, CONTEXT = 48, 4, 2, 257, 64
LIKE = GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=3, n_positions=CONTEXT, vocab_size=VOCABULARY)


def checkpoint(k=2, d1=24, d2=96):
    """Tensors at random, as their ``KronyGPT(config).state_dict()`` has them for dim_1 = d1, dim_2 = d2."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, std=0.1):
        return torch.randn(*size, generator=generator) * std

    tensors = {"transformer.wte.weight": draw(VOCABULARY, WIDTH), "transformer.wpe.weight": draw(CONTEXT, WIDTH)}
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            tensors |= {f"{h}{norm}.weight": 1 + draw(WIDTH), f"{h}{norm}.bias": draw(WIDTH)}
        tensors |= {f"{h}attn.c_attn.weight": draw(3 * WIDTH, WIDTH), f"{h}attn.c_attn.bias": draw(3 * WIDTH)}
        tensors |= {f"{h}attn.c_proj.weight": draw(WIDTH, WIDTH), f"{h}attn.c_proj.bias": draw(WIDTH)}
        tensors |= {
            f"{h}mlp.c_fc_0": draw(k, d1, d2, std=0.5),
            f"{h}mlp.c_fc_1": draw(k, WIDTH // d1, 4 * WIDTH // d2, std=1),
        }
        tensors |= {
            f"{h}mlp.c_proj_0": draw(k, d2, d1, std=0.5),
            f"{h}mlp.c_proj_1": draw(k, 4 * WIDTH // d2, WIDTH // d1, std=1),
        }
        tensors |= {f"{h}mlp.c_fc_bias": draw(4 * WIDTH), f"{h}mlp.c_proj_bias": draw(WIDTH)}
    tensors |= {"transformer.ln_f.weight": 1 + draw(WIDTH), "transformer.ln_f.bias": draw(WIDTH)}
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


def published_forward(t, ids, gelu):
    """Their model.py, written out: ``x @ kron(c_fc_0, c_fc_1) + c_fc_bias``, torch.kron and all."""

    def summed(name):
        return sum(
            torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(t[f"{name}_0"], t[f"{name}_1"], strict=True)
        )

    x = t["transformer.wte.weight"][ids] + t["transformer.wpe.weight"][: ids.shape[1]]
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        y = F.layer_norm(x, (WIDTH,), t[f"{h}ln_1.weight"], t[f"{h}ln_1.bias"], 1e-5)
        q, k, v = F.linear(y, t[f"{h}attn.c_attn.weight"], t[f"{h}attn.c_attn.bias"]).split(WIDTH, dim=2)
        q, k, v = (z.view(*ids.shape, HEADS, -1).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + F.linear(y, t[f"{h}attn.c_proj.weight"], t[f"{h}attn.c_proj.bias"])
        y = F.layer_norm(x, (WIDTH,), t[f"{h}ln_2.weight"], t[f"{h}ln_2.bias"], 1e-5)
        y = gelu(y @ summed(f"{h}mlp.c_fc") + t[f"{h}mlp.c_fc_bias"])
        x = x + y @ summed(f"{h}mlp.c_proj") + t[f"{h}mlp.c_proj_bias"]
    x = F.layer_norm(x, (WIDTH,), t["transformer.ln_f.weight"], t["transformer.ln_f.bias"], 1e-5)
    return x @ t["lm_head.weight"].T


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 24, 192), (2, 24, 96), (1, 48, 48), (3, 16, 64)])
def test_the_logits_are_those_of_the_published_model(activation, shape, ids):
    tensors = checkpoint(*shape)
    gelu = nn.GELU() if activation == "gelu" else nn.GELU(approximate="tanh")
    model = from_reference(tensors, LIKE, activation=activation)
    expected = published_forward(tensors, ids, gelu)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    other = published_forward(tensors, ids, nn.GELU(approximate="tanh" if activation == "gelu" else "none"))
    assert (model(ids).logits - expected).abs().max() < 0.1 * (other - expected).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_a_round_trip_through_the_file_and_a_saved_model_is_exact(dtype, prefix, tmp_path):
    tensors = {name: value.to(dtype) for name, value in checkpoint().items()}
    torch.save({prefix + name: value for name, value in tensors.items()}, tmp_path / "in.pt")
    model = from_reference(read_reference(tmp_path / "in.pt"), LIKE)
    model.save_pretrained(tmp_path / "model")
    loaded = krony.load_model(str(tmp_path / "model"))
    assert loaded.config.n_layer == LAYERS and loaded.dtype == dtype
    write_reference(tmp_path / "out.pt", to_reference(loaded))
    again = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(again) == set(tensors)
    for name, value in tensors.items():
        assert again[name].dtype == dtype and torch.equal(again[name], value), name


def test_what_krony_compressed_is_what_the_published_model_computes(ids):
    """The other way round: scalars are folded in."""
    model = gpt2(n_layer=LAYERS)
    krony.compress(model, krony.KronyConfig("96x24:2", init="van-loan"))
    assert all(layer.scalars is not None for layer in kronecker_layers(model).values())
    tensors = to_reference(model)
    assert tensors["transformer.h.0.mlp.c_fc_0"].shape == (2, 24, 96)
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (3 * WIDTH, WIDTH)
    expected = published_forward(tensors, ids, nn.GELU(approximate="tanh"))
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_nanogpts_own_file_and_its_masks(tmp_path):
    tensors = checkpoint() | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    torch.save({"model": tensors}, tmp_path / "c.pt")
    assert set(read_reference(tmp_path / "c.pt")) == set(checkpoint())


def test_a_head_that_is_not_the_embedding_is_kept(ids):
    tensors = checkpoint()
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    model = from_reference(tensors, LIKE)
    assert torch.equal(to_reference(model)["lm_head.weight"], tensors["lm_head.weight"])


def damaged(**changes):
    tensors = checkpoint()
    for name, value in changes.items():
        full = f"transformer.h.1.{name.replace('__', '.')}"
        if value is None:
            del tensors[full]
        else:
            tensors[full] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (damaged(mlp__c_fc_bias=None, mlp__c_proj_bias=None), "lacks transformer.h.1.mlp.c_fc_bias and 1 more"),
        (checkpoint() | {"transformer.wte.weight": torch.ones(3)}, r"wte.weight has shape \(3,\): it is a matrix"),
        (damaged(mlp__c_fc_1=None), "lacks transformer.h.1.mlp.c_fc_1"),
        (damaged(mlp__c_fc_1=torch.ones(2, 2, 3)), "h.1.mlp.c_fc: its factors make 48x288, and GPT-2's is 48x192"),
        (damaged(mlp__c_fc_1=torch.ones(1, 2, 2)), "h.1.mlp.c_fc: its factors are"),
        (damaged(mlp__c_fc__weight=torch.ones(3)), "mlp.c_fc_0 makes 3, and the rest of the checkpoint needs"),
        (damaged(attn__other=torch.ones(3)), "has transformer.h.1.attn.other, which no GPT-2 has"),
        (damaged(attn__c_attn__weight=torch.ones(3, 5)), "c_attn.weight makes 5x3, and the rest of the checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(tensors, words):
    with pytest.raises(krony.KronyError, match=words):
        from_reference(tensors, LIKE)


def test_another_model_to_be_like():
    with pytest.raises(krony.KronyError, match="48 wide, and the model that it is to be like 768"):
        from_reference(checkpoint(), GPT2Config())
    with pytest.raises(krony.KronyError, match="this is a config of llama"):
        from_reference(checkpoint(), llama().config)
    with pytest.raises(krony.KronyError, match="'relu' is unknown"):
        from_reference(checkpoint(), LIKE, activation="relu")


class Evil:
    def __reduce__(self):
        return (print, ("never printed",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": Evil()}, "it holds more than tensors"),
        ([torch.ones(1)], "takes a dictionary of tensors"),
        ({"a": 3}, "takes a dictionary of tensors"),
        ({"a": torch.ones(1)}, "no transformer.h.0.mlp.c_fc_0 in it"),
    ],
)
def test_files_of_something_else(content, words, tmp_path, capsys):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(krony.KronyError, match=words):
        read_reference(tmp_path / "c.pt")
    assert capsys.readouterr().out == ""


def test_files_that_are_damaged_or_not_there(tmp_path):
    torch.save(checkpoint(), tmp_path / "c.pt")
    whole = (tmp_path / "c.pt").read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"# a text\n" * 99, pickle.dumps([1])):
        (tmp_path / "c.pt").write_bytes(content)
        with pytest.raises(krony.KronyError, match=r"c.pt: .*only tensors are read"):
            read_reference(tmp_path / "c.pt")
    with pytest.raises(krony.KronyError, match="can't be read: No such file"):
        read_reference(tmp_path / "none.pt")
    with pytest.raises(krony.KronyError, match="is a folder: name a regular file"):
        read_reference(tmp_path)


def test_models_that_the_layout_cannot_hold(tmp_path):
    odd, other, dense = gpt2(), llama(), gpt2()
    krony.compress(odd, krony.KronyConfig("96x48", init="van-loan", layers="odd"))
    krony.compress(other, krony.KronyConfig("72x48", init="van-loan"))
    for model, words in ((odd, "2 layers are where 6 would be"), (dense, "0 layers are where"), (other, "Llama")):
        with pytest.raises(krony.KronyError, match=words):
            to_reference(model)
    with pytest.raises(krony.KronyError, match="can't be written"):
        write_reference(tmp_path / "none" / "c.pt", {})


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    import sys

    from krony.cli.app import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["krony", *map(str, arguments)])
        try:
            main()
        except SystemExit as exit:
            return exit.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    original = gpt2(n_layer=LAYERS)
    original.generation_config.update(do_sample=True, temperature=0.6)
    original.save_pretrained(tmp_path / "dense")
    assert run("compress", tmp_path / "dense", tmp_path / "a", "--scheme", "96x48", "--init", "van-loan")[0] == 0
    code, said = run("export", tmp_path / "a", tmp_path / "a.pt", "--to", "reference")
    assert code == 0 and "krony import reads it back" in said.out
    code, said = run("import", tmp_path / "a.pt", tmp_path / "b", "--like", tmp_path / "dense", "--activation", "gelu")
    assert code == 0 and "2 layers of scheme 96x48" in said.out and "without a tokenizer" in said.out
    made = krony.load_model(str(tmp_path / "b"))
    assert made.config.activation_function == "gelu" and made.generation_config.temperature == 0.6
    assert "`a.pt`, a checkpoint of the published code" in (tmp_path / "b/README.md").read_text()
    for out, words in ((tmp_path / "c", "OUT ends in .pt"), (tmp_path / "a.pt", "exists already")):
        code, said = run("export", tmp_path / "a", out, "--to", "reference")
        assert code == 2 and words in said.err
    code, said = run("import", tmp_path / "a.pt", tmp_path / "d")
    assert code == 2 and "48 wide" in said.err and not (tmp_path / "d").exists()


def saved(tmp_path, change):
    tensors = checkpoint()
    change(tensors)
    torch.save(tensors, tmp_path / "f.pt")
    return tmp_path / "f.pt"


BIAS = "transformer.ln_f.weight"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(WIDTH, dtype=torch.int64), "is of type int64"),
        (torch.ones(WIDTH, dtype=torch.complex64), "is of type complex64"),
        (torch.ones(WIDTH).to(torch.float8_e4m3fn), "is of type float8_e4m3fn"),
        (torch.ones(WIDTH, dtype=torch.bool), "is of type bool"),
        (torch.ones(WIDTH).to_sparse(), "is sparse or quantised"),
        (torch.empty(WIDTH, device="meta"), "has no values"),
        (torch.quantize_per_tensor(torch.ones(WIDTH), 0.1, 0, torch.qint8), "is sparse or quantised"),
        (torch.tensor(1.0), "is a single number"),
        (torch.full((WIDTH,), float("nan")), "has values that are not finite"),
        (torch.ones(1).expand(10**9, 10**6), "has more elements than the file holds"),
    ],
)
def test_tensors_that_can_not_be_weights(value, words, tmp_path):
    with pytest.raises(KronyError, match=rf"f\.pt: {BIAS} {words}"):
        read_reference(saved(tmp_path, lambda tensors: tensors.update({BIAS: value})))


def test_many_names_for_the_same_bytes(tmp_path):
    big = torch.ones(500_000)
    file = saved(tmp_path, lambda tensors: tensors.update({f"copy.{n}": big for n in range(50)}))
    with pytest.raises(KronyError, match=r"its tensors would take 100,"):
        read_reference(file)


def test_a_name_that_says_a_billion_layers(tmp_path):
    file = saved(tmp_path, lambda tensors: tensors.update({"transformer.h.999999999.ln_1.weight": torch.ones(WIDTH)}))
    with pytest.raises(KronyError, match=r"the checkpoint has layer 999999999, and \d layers in all"):
        from_reference(read_reference(file), LIKE)


def test_an_archive_that_is_compressed(tmp_path):
    file = saved(tmp_path, lambda tensors: None)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(KronyError, match=r"z\.pt: .* in it is compressed"):
        read_reference(tmp_path / "z.pt")


def test_a_pipe_and_a_device(tmp_path):
    os.mkfifo(tmp_path / "p.pt")
    with pytest.raises(KronyError, match="is a pipe"):
        read_reference(tmp_path / "p.pt")
    with pytest.raises(KronyError, match="is a device"):
        read_reference(Path("/dev/zero"))
