"""Save, load, generate, train: through transformers alone, in processes of their own where that matters."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

import krony
from krony import KronyConfig, KronyError, compress
from krony.kronecker.linear import KroneckerLinear
from krony.models.surgery import kronecker_layers
from processes import together
from small_models import BUILDERS, gpt2, llama

ELSEWHERE = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
ids, found = torch.load(sys.argv[1]), []
for folder in sys.argv[3:]:
    try:
        found.append(AutoModelForCausalLM.from_pretrained(folder)(ids).logits.detach())
    except RuntimeError as error:
        found.append(str(error))
torch.save(found, sys.argv[2])
"""


def logits_elsewhere(folders, ids, tmp_path, *, imports: str) -> tuple[list[torch.Tensor | str], str]:
    """What a fresh process computes from saved models, or the errors that it gets, and what it prints on stderr."""
    torch.save(ids, tmp_path / "ids")
    code = ELSEWHERE.format(imports=imports)
    arguments = [str(path) for path in (tmp_path / "ids", tmp_path / "found", *folders)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return torch.load(tmp_path / "found"), done.stderr


def compute(folder, ids, out, **options) -> None:
    """All that a process does: it loads the model and writes its logits."""
    torch.save(AutoModelForCausalLM.from_pretrained(folder, **options)(ids).logits.detach(), out)


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_process_gives_bit_identical_logits(family, dtype, ids, tmp_path):
    BUILDERS[family]().save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    compress(model, KronyConfig("keep=0.75", init="van-loan"))
    expected = model(ids).logits.detach()
    model.save_pretrained(tmp_path / "once")
    AutoModelForCausalLM.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for number, (name, options) in enumerate([("once", {}), ("once", {"device_map": "auto"}), ("twice", {})]):
        together(1, tmp_path / f"process-{number}", compute, tmp_path / name, ids, tmp_path / "logits", **options)
        assert torch.equal(torch.load(tmp_path / "logits"), expected)
    assert (tmp_path / "once/config.json").read_text() == (tmp_path / "twice/config.json").read_text()


@pytest.mark.parametrize(
    "imports", ["import krony", "import transformers; from transformers import GPT2LMHeadModel; import krony"]
)
def test_krony_is_imported_before_or_after_transformers(imports, ids, tmp_path):
    model = gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(tmp_path / "model")
    [found], _ = logits_elsewhere([tmp_path / "model"], ids, tmp_path, imports=imports)
    assert torch.equal(found, model(ids).logits)


def test_without_krony_loading_stops_instead_of_drawing_weights(ids, tmp_path):
    folders = []
    for family, scheme in itertools.product(BUILDERS, ["keep=0.5", "48x48", "96x48:2", "24x16:2"]):
        model = BUILDERS[family](**({"n_inner": 192} if family == "gpt2" else {"intermediate_size": 192}))
        compress(model, KronyConfig(scheme, init="van-loan"))
        folders.append(tmp_path / f"{family} {scheme}")
        model.save_pretrained(folders[-1])
    found, said = logits_elsewhere(folders, ids, tmp_path, imports="")
    assert len(found) == 8 and all("mismatch" in error for error in found)
    assert "Unknown quantization type, got krony" in said


def test_config_says_how(tmp_path):
    model = llama()
    compress(model, KronyConfig("keep=0.75", init="van-loan"))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "krony"
    entry = {"left": [36, 48], "right": [4, 1], "factors": 3, "scalars": True}
    assert written["modules"]["model.layers.0.mlp.up_proj"] == entry
    assert written["made_with"]["init"] == "van-loan"


def test_a_loaded_model_can_be_cast_and_trained(model, tmp_path):
    compress(model, KronyConfig("keep=0.5", init="van-loan", scalars=True))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.half().dtype == torch.float16 and loaded.float().dtype == torch.float32
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("loaded", [False, True])
def test_trainer_runs(model, tmp_path, loaded):
    compress(model, KronyConfig("keep=0.5", init="van-loan", scalars=True))
    if loaded:
        model.save_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 256, (8, 16))]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        save_strategy="steps", save_steps=2, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    layer = next(iter(kronecker_layers(model)))
    for part in ("weight", "right", "scalars"):
        assert not torch.equal(before[f"{layer}.{part}"], model.get_parameter(f"{layer}.{part}"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-2")
    assert torch.equal(again.get_parameter(f"{layer}.right"), model.get_parameter(f"{layer}.right"))


def test_pipeline_generates(model, tokenizer, tmp_path):
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    text = generate("The ", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text.startswith("The ") and len(text) > 4


def test_the_dense_form_has_the_logits_and_needs_no_krony(ids, tmp_path):
    expected, folders = [], []
    for family, scheme in itertools.product(BUILDERS, ["keep=0.5", "24x16:2"]):
        model = BUILDERS[family]()
        compress(model, KronyConfig(scheme, init="van-loan"))
        expected.append(model(ids).logits.detach())
        plain = krony.export_model(model, to="dense")
        assert type(plain).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM") and not kronecker_layers(plain)
        folders.append(tmp_path / f"{family} {scheme}")
        plain.save_pretrained(folders[-1])
        assert "quantization_config" not in json.loads((folders[-1] / "config.json").read_text())
    actual, _ = logits_elsewhere(folders, ids, tmp_path, imports="")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_compressed_has_nothing_to_export(model):
    with pytest.raises(KronyError, match="plain already"):
        krony.export_model(model)
    with pytest.raises(KronyError, match="'thin' is unknown"):
        krony.export_model(model, to="thin")


MALFORMED = [
    (lambda q: q["modules"].update({"transformer.h.9.mlp.c_fc": next(iter(q["modules"].values()))}), "no linear layer"),
    (lambda q: q["modules"].update({"transformer.wte": next(iter(q["modules"].values()))}), "no linear layer"),
    (lambda q: next(iter(q["modules"].values())).update(left=[7, 7]), "its factors make"),
    (lambda q: next(iter(q["modules"].values())).update(left=[96]), "malformed"),
    (lambda q: next(iter(q["modules"].values())).update(factors=-1), "malformed"),
    (lambda q: next(iter(q["modules"].values())).pop("right"), "malformed"),
    (lambda q: q.update(modules=[1]), "not a map"),
]


@pytest.mark.parametrize(("damage", "words"), MALFORMED)
def test_a_config_that_does_not_fit_is_named(damage, words, tmp_path):
    model = gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    damage(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KronyError, match=words):
        krony.load_model(str(tmp_path))


def test_the_body_alone_loads_and_is_saved(model, ids, tmp_path):
    """AutoModel builds the model without its head: names lack the prefix that the file has."""
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(tmp_path / "all")
    body = AutoModel.from_pretrained(tmp_path / "all").eval()
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(body(ids).last_hidden_state, expected, rtol=0, atol=0)
        body.save_pretrained(tmp_path / "body")
        again = AutoModel.from_pretrained(tmp_path / "body").eval()
        torch.testing.assert_close(again(ids).last_hidden_state, expected, rtol=0, atol=0)


def test_a_model_of_another_head_shares_the_body(ids, tmp_path):
    model = gpt2()
    compress(model, KronyConfig("keep=0.5", init="van-loan"))
    model.save_pretrained(tmp_path)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert isinstance(other.transformer.h[0].mlp.c_fc, KroneckerLinear)
