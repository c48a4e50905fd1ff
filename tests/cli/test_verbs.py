"""Each verb, used as its help says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import krony as library
from krony.data.calibration_set import digest


def test_schemes_gives_table_1_as_json(krony):
    done = krony("schemes", "gpt2", "--all", "--json", "-")
    rows = {tuple(r["left"]): r for r in done.json}
    assert rows[768, 768] == {
        "name": "81M",
        "left": [768, 768],
        "right": [4, 1],
        "factors": 1,
        "rank": 768,
        "params_per_matrix": 589_828,
        "model_params": 81_972_576,
    }
    assert "124,439,808 parameters" in done.err  # the table is for people, on stderr


def test_schemes_of_another_model_are_fractions(krony, gpt2_folder):
    done = krony("schemes", gpt2_folder)
    assert done.code == 0 and "keep=0.5" in done.out and "96x48" in done.out


def test_compress_writes_a_model_that_loads(krony, gpt2_folder, tmp_path, ids):
    (gpt2_folder / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    done = krony("compress", gpt2_folder, out, "--scheme", "keep=0.5", "--init", "van-loan", "--json", "-")
    assert done.code == 0, done.err
    report = done.json
    assert set(report) == {"scheme", "init", "params_before", "params_after", "seconds", "made_with", "layers"}
    assert set(report["layers"][0]) == {"name", "left", "right", "factors", "error", "calibrated_error"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == report["params_after"]
    assert tokenizer("abc")["input_ids"] and tokenizer.chat_template == "{{ messages }}"
    card = (out / "README.md").read_text()
    assert f"{report['params_after']:,}" in card and report["layers"][0]["name"].replace(".0.", ".*.") in card
    reference = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    library.compress(reference, library.KronyConfig("keep=0.5", init="van-loan"))
    assert torch.equal(model(ids).logits, reference(ids).logits)
    (gpt2_folder / "chat_template.jinja").unlink()


def test_a_dry_run_says_what_and_writes_nothing(krony, gpt2_folder, tmp_path):
    arguments = ("compress", gpt2_folder, tmp_path / "out", "--scheme", "keep=0.75", "--init", "van-loan")
    dry = krony(*arguments, "--dry-run", "--json", "-")
    assert dry.code == 0 and not (tmp_path / "out").exists()
    done = krony(*arguments, "--json", "-")
    assert dry.json["params_after"] == done.json["params_after"]
    keys = ("name", "left", "right", "factors")
    assert [{k: layer[k] for k in keys} for layer in done.json["layers"]] == dry.json["layers"]


def test_what_it_was_made_with_is_kept(krony, gpt2_folder, tmp_path):
    """In config.json and in the card, so that it can be done again."""
    (tmp_path / "t.txt").write_text("some words to calibrate on, and some more. " * 10)
    options = ("--scheme", "keep=0.5", "--tune", 2, "--no-token-weighting", "--seed", 7, "--calibration-tokens", 320)
    arguments = ("compress", gpt2_folder, tmp_path / "out", *options, "--calibration", tmp_path / "t.txt")
    done = krony(*arguments, "--json", "-")
    assert done.code == 0, done.err
    made_with = {"krony": library.__version__, "scheme": "keep=0.5", "init": "neurons", "seed": 7, "tune": 2}
    made_with |= {"token_weighting": False, "calibration_tokens": 320}
    made_with["calibration_documents"] = [digest((tmp_path / "t.txt").read_text())]
    assert done.json["made_with"] == made_with
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["made_with"] == made_with
    card = (tmp_path / "out/README.md").read_text()
    assert "token weighting `False`" in card and "tune `2`" in card and "seed `7`" in card
    assert f"calibrated on 320 tokens of {tmp_path / 't.txt'}" in card


@pytest.fixture
def layers(tmp_path):
    """A scheme file for the small GPT-2."""
    (tmp_path / "layers.yaml").write_text('"*.mlp": keep=0.5\ntransformer.h.0: dense\n"*.1.attn.c_attn": 72x24:2\n')
    return tmp_path / "layers.yaml"


def test_a_scheme_file_gives_the_same_model_from_memory_and_from_the_files(krony, gpt2_folder, tmp_path, layers):
    options = ("--scheme", layers, "--init", "van-loan", "--json", "-")
    foretold = krony("compress", gpt2_folder, tmp_path / "none", *options, "--dry-run").json
    made = {
        way: krony("compress", gpt2_folder, tmp_path / way, *options, f"--{way}") for way in ("stream", "no-stream")
    }
    assert {done.code for done in made.values()} == {0} and not (tmp_path / "none").exists()
    sizes = {(each["name"], *each["left"], each["factors"]) for each in foretold["layers"]}
    assert sizes == {
        ("transformer.h.1.attn.c_attn", 72, 24, 2),
        ("transformer.h.1.mlp.c_fc", 96, 48, 1),
        ("transformer.h.1.mlp.c_proj", 48, 96, 1),
        ("transformer.h.2.mlp.c_fc", 96, 48, 1),
        ("transformer.h.2.mlp.c_proj", 48, 96, 1),
    }
    for way, done in made.items():
        assert {(each["name"], *each["left"], each["factors"]) for each in done.json["layers"]} == sizes
        assert done.json["params_after"] == foretold["params_after"] and done.json["scheme"] == str(layers)
        config = json.loads((tmp_path / way / "config.json").read_text())["quantization_config"]
        assert len(config["modules"]) == len(sizes)
        assert config["made_with"]["scheme"][1] == ["transformer.h.0", "dense"]
        assert "schemes `*.mlp: keep=0.5`, `transformer.h.0: dense`" in (tmp_path / way / "README.md").read_text()
    first, second = (load_file(tmp_path / way / "model.safetensors") for way in made)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_scheme_file_in_a_recipe_and_what_it_refuses(krony, refused, gpt2_folder, tmp_path, layers):
    recipe = tmp_path / "r.yaml"
    out = tmp_path / "out"
    recipe.write_text(f"model: {gpt2_folder}\nout: {out}\ncompress: {{scheme: {layers}, init: van-loan}}\n")
    assert krony("run", recipe).code == 0
    assert len(json.loads((out / "figures.json").read_text())["steps"]["compressed"]["figures"]["layers"]) == 5
    layers.write_text('"*.mlp": keep=0.25\n')  # the step is done with another file of this name
    assert f"from {layers}, which has changed since" in refused("run", recipe)
    layers.write_text('"*.mlp": keep=0.5\n\n"*.nothing": dense\n')
    said = refused("compress", gpt2_folder, tmp_path / "no", "--scheme", layers, "--init", "van-loan")
    assert f"error: {layers}, line 3: *.nothing matches no linear layer" in said and not (tmp_path / "no").exists()
    said = refused("compress", gpt2_folder, tmp_path / "no", "--scheme", layers, "--params", "1M")
    assert "compress needs one size" in said


def test_a_dry_run_of_low_rank_and_of_the_shipped_model(krony, gpt2_folder, tmp_path):
    (tmp_path / "t.txt").write_text("some words to calibrate on, and some more. " * 10)
    text = ("--calibration", tmp_path / "t.txt")
    arguments = ("compress", gpt2_folder, tmp_path / "out", "--scheme", "keep=0.5", "--init", "svd", *text)
    dry, done = krony(*arguments, "--dry-run", "--json", "-"), krony(*arguments, "--json", "-")
    assert dry.json["params_after"] == done.json["params_after"]
    assert dry.json["layers"][0]["left"] == done.json["layers"][0]["left"] == [192, 1]
    arguments = ("compress", "demo", tmp_path / "d", "--scheme", "keep=0.5", "--init", "van-loan", "--no-stream")
    dry, done = krony(*arguments, "--dry-run", "--json", "-"), krony(*arguments)
    assert done.code == 0
    size = (tmp_path / "d/model.safetensors").stat().st_size  # float32, with a header
    assert 0 < size - dry.json["write_bytes"] < 20_000


def test_the_embedding_too(krony, gpt2_folder, tmp_path):
    arguments = (
        "compress",
        gpt2_folder,
        tmp_path / "out",
        "--scheme",
        "keep=0.5",
        "--init",
        "permuted",
        "--embedding",
        2,
    )
    dry = krony(*arguments, "--dry-run", "--json", "-")
    done = krony(*arguments, "--json", "-")
    assert done.code == 0 and "transformer.wte" in done.err
    assert (
        dry.json["params_after"]
        == done.json["params_after"]
        == done.json["params_before"] - 3 * 192 * 48 + 12 + 257 * 24 + 2
    )
    counted = krony(
        "eval", tmp_path / "out", "--data", "python-docs", "--max-tokens", 99, "--count", "untied", "--json", "-"
    )
    assert counted.json["params_untied"] == counted.json["params"] == done.json["params_after"]


def test_a_budget_instead_of_a_scheme(krony, gpt2_folder, tmp_path):
    done = krony("compress", gpt2_folder, tmp_path / "out", "--params", "70k", "--init", "van-loan", "--json", "-")
    assert 60_000 < done.json["params_after"] <= 70_000


@pytest.mark.parametrize(
    "options",
    [
        ("--init", "prune", "--scalars"),
        ("--init", "van-loan", "--embedding", 2),
        ("--allocation", "global"),
        ("--allocation", "global", "--multiple-of", 16, "--no-scalars"),
        ("--allocation", "global", "--max-width", 136),
        ("--init", "svd"),
        (),
    ],
)
def test_a_budget_counts_all_there_is(krony, gpt2_folder, tmp_path, options):
    """Scalars and a factorised embedding too; the next larger scheme would be over it."""
    (tmp_path / "t.txt").write_text("some words to calibrate on, and some more. " * 60)
    arguments = ("compress", gpt2_folder, tmp_path / "out", *options, "--calibration", tmp_path / "t.txt")
    for budget in (58_000, 64_321):
        dry = krony(*arguments, "--params", budget, "--dry-run", "--json", "-")
        done = krony(*arguments, "--params", budget, "--json", "-")
        assert done.code == 0, done.err
        assert budget - 2_500 < done.json["params_after"] <= dry.json["params_after"] <= budget
        if "global" not in options:
            assert done.json["params_after"] == dry.json["params_after"]
        shutil.rmtree(tmp_path / "out")


def test_a_budget_and_a_dry_run_of_a_compressed_model_count_what_it_is(krony, compressed, tmp_path):
    options = ("--init", "van-loan", "--modules", "attn.c_proj", "--params", 71_500)
    dry = krony("compress", compressed, tmp_path / "out", *options, "--dry-run", "--json", "-")
    done = krony("compress", compressed, tmp_path / "out", *options, "--json", "-")
    assert done.code == 0, done.err
    assert 70_000 < dry.json["params_after"] == done.json["params_after"] <= 71_500
    assert dry.json["params_before"] == done.json["params_before"]


def test_figures_may_go_into_out(krony, gpt2_folder, tmp_path):
    out = tmp_path / "out"
    done = krony("compress", gpt2_folder, out, "--scheme", "keep=0.5", "--init", "van-loan", "--json", out / "f.json")
    assert done.code == 0 and json.loads((out / "f.json").read_text())["scheme"] == "keep=0.5"


def test_text_that_only_measures_is_not_called_calibration(krony, gpt2_folder, tmp_path):
    (tmp_path / "t.txt").write_text("some words to calibrate on, and some more. " * 10)
    options = ("--scheme", "keep=0.5", "--init", "van-loan", "--calibration", tmp_path / "t.txt")
    done = krony("compress", gpt2_folder, tmp_path / "out", *options, "--json", "-")
    assert "calibration_tokens" not in done.json["made_with"] and done.json["layers"][0]["calibrated_error"] > 0
    assert "errors of outputs measured on 384 tokens" in (tmp_path / "out/README.md").read_text()


def test_eval_reports_every_set(krony, compressed, tmp_path):
    (tmp_path / "a.txt").write_text("some text to be predicted, byte by byte")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    done = krony("eval", compressed, "--data", tmp_path / "a.txt", "--data", tmp_path / "b.jsonl", "--json", "-")
    assert [r["tokens"] for r in done.json["results"]] == [38, 7]
    assert {"data", "protocol", "tokens", "perplexity", "accuracy"} <= set(done.json["results"][0])
    assert done.json["params"] == sum(p.numel() for p in library.load_model(str(compressed)).parameters())


def test_eval_of_a_named_set_from_a_folder(krony, compressed, tmp_path):
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2/wiki.test.tokens").write_text(" = A = \n some text . \n" * 20)
    options = ("--data", "wikitext-2", "--data-dir", tmp_path, "--max-tokens", 100, "--json", tmp_path / "r.json")
    done = krony("eval", compressed, *options)
    assert "wikitext-2" in done.out and "perplexity" in done.out
    assert json.loads((tmp_path / "r.json").read_text())["results"][0]["tokens"] == 98  # two windows of 64 and 36


def test_inspect_compares_with_the_base(krony, compressed, gpt2_folder):
    done = krony("inspect", compressed, "--base", gpt2_folder, "--json", "-")
    layer = done.json["layers"][0]
    dense = library.load_model(str(gpt2_folder)).transformer.h[0].mlp.c_fc.weight.detach()
    made = library.load_model(str(compressed)).transformer.h[0].mlp.c_fc.dense_weight().detach().T
    assert layer["base_frobenius"] == pytest.approx(dense.norm().item(), rel=1e-5)
    assert layer["base_l1"] == pytest.approx(dense.abs().sum().item(), rel=1e-5)
    assert layer["frobenius"] == pytest.approx(made.norm().item(), rel=1e-5)
    assert layer["kept"] == pytest.approx(1.0, rel=1e-5)  # adaptive normalisation
    assert layer["error"] == pytest.approx(((dense - made).norm() / dense.norm()).item(), rel=1e-4)
    assert layer["singular_values"][0] == pytest.approx(torch.linalg.matrix_norm(made, 2).item(), rel=1e-4)
    assert layer["path"] == layer["decode_path"] == "left" and layer["fused"]
    assert "0.52 of the dense matrix's multiply-adds" in layer["why"] and layer["why"] in done.err
    assert krony("inspect", gpt2_folder).code == 0


def test_pictures_and_pages(krony, compressed, gpt2_folder, tmp_path):
    assert krony("inspect", compressed, "--base", gpt2_folder, "--plot", tmp_path / "p.svg").code == 0
    picture = (tmp_path / "p.svg").read_text()
    assert "relative error, Frobenius norm" in picture and "mlp.c_proj" in picture
    options = ("--data", "python-docs", "--max-tokens", 200, "--report", tmp_path / "r.html", "--json", "-")
    done = krony("eval", compressed, *options)
    assert f"{done.json['results'][0]['perplexity']:,.2f}" in (tmp_path / "r.html").read_text()


def test_generate(krony, compressed):
    done = krony("generate", compressed, "--prompt", "The", "--max-new-tokens", "5", "--json", "-")
    assert done.json["text"].startswith("The") and done.json["new_tokens"] <= 5
    assert done.json["stopped"] == ("max_new_tokens" if done.json["new_tokens"] == 5 else "end of text")
    warm = [krony("generate", compressed, "--prompt", "The", "--temperature", "1", "--seed", s).out for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_export_dense(krony, compressed, tmp_path, ids):
    done = krony("export", compressed, tmp_path / "dense", "--to", "dense", "--json", "-")
    assert done.json["params_after"] > done.json["params_before"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    expected = AutoModelForCausalLM.from_pretrained(compressed)(ids).logits
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("a")["input_ids"]


CALIBRATED = ("--scheme", "keep=0.5", "--calibration", "python-docs", "--calibration-tokens", 2048)


def test_compress_by_neuron_selection_and_export_slim(krony, gpt2_folder, tmp_path, ids):
    first = krony("compress", gpt2_folder, tmp_path / "a", *CALIBRATED, "--json", tmp_path / "a.json")
    assert first.code == 0, first.err
    assert "2,048 tokens of python-docs" in first.out and "kept in" in first.out and "of outputs" in first.out
    report = json.loads((tmp_path / "a.json").read_text())
    assert all(0 < layer["calibrated_error"] < 1 for layer in report["layers"] if "c_proj" in layer["name"])
    again = krony("compress", gpt2_folder, tmp_path / "b", *CALIBRATED)
    assert "where it was kept" in again.out
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert same[0] == same[1]
    done = krony("export", tmp_path / "a", tmp_path / "slim", "--to", "slim", "--multiple-of", 64, "--json", "-")
    assert done.json["width"] == 128 and done.json["padding"] == 3 * 32 * 96
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "a")(ids).logits
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-6, atol=1e-6)


def test_global_allocation_and_its_dry_run(krony, gpt2_folder, tmp_path):
    options = (*CALIBRATED, "--allocation", "global", "--max-width", 128)
    dry = krony("compress", gpt2_folder, tmp_path / "a", *options, "--dry-run")
    assert "shares it among the layers" in dry.out
    done = krony("compress", gpt2_folder, tmp_path / "a", *options, "--json", "-")
    kept = {layer["left"][0] * layer["factors"] for layer in done.json["layers"] if layer["name"].endswith("c_fc")}
    assert max(kept) <= 128


def test_the_installed_command(gpt2_folder):
    done = subprocess.run([sys.executable, "-m", "krony", "schemes", "gpt2", "--json", "-"], capture_output=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 6


@pytest.mark.parametrize(
    "verb", ["schemes", "compress", "heal", "eval", "inspect", "generate", "export", "import", "reproduce"]
)
def test_every_verb_has_help(krony, verb):
    done = krony(verb, "--help")
    assert done.code == 0 and "--json" in done.out


def test_data_prepare(krony, gpt2_folder, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(40)))
    out = tmp_path / "bins"
    done = krony("data", "prepare", tmp_path / "t.jsonl", out, "--tokenizer", gpt2_folder, "--json", "-")
    assert done.code == 0, done.err
    figures = json.loads(done.out)
    assert {name: part["documents"] for name, part in figures.items()} == {"train": 39, "val": 1}
    for part in figures.values():
        assert Path(part["file"]).stat().st_size == 2 * part["tokens"]
    assert "--val-share" in krony("data", "prepare", "--help").out


def test_calibration_on_text_that_the_model_writes(krony, gpt2_folder, tmp_path):
    options = ("--scheme", "keep=0.5", "--calibration", "self", "--calibration-tokens", 320)
    done = krony("compress", gpt2_folder, tmp_path / "out", *options, "--allocation", "global", "--json", "-")
    assert done.code == 0, done.err
    assert done.json["made_with"]["calibration_tokens"] == 320
    assert "calibrated on 320 tokens that the model wrote itself" in (tmp_path / "out/README.md").read_text()
    assert krony("compress", gpt2_folder, tmp_path / "again", *options, "--allocation", "global").code == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for arguments, words in (
        (("compress", gpt2_folder, tmp_path / "no", *options, "--stream"), "load the model with --no-stream"),
        (
            ("compress", gpt2_folder, tmp_path / "no", "--within", "5%", *options[2:]),
            "--within measures on text that is held back, and",
        ),
        (("frontier", gpt2_folder, *options[2:]), "self is text that the model writes"),
    ):
        done = krony(*arguments)
        assert done.code == 2 and words in " ".join(done.err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


def test_an_effort_sets_options_and_what_is_given_wins(krony, gpt2_folder, tmp_path):
    (tmp_path / "t.txt").write_text("some words to calibrate on, and some more. " * 10)
    options = ("--scheme", "keep=0.5", "--effort", "tuned", "--calibration", tmp_path / "t.txt", "--tune", 2)
    arguments = ("compress", gpt2_folder, tmp_path / "out", *options, "--calibration-tokens", 320)
    done = krony(*arguments, "--allocation", "uniform", "--json", "-")
    assert done.code == 0, done.err
    made_with = done.json["made_with"]
    assert made_with["tune"] == 2 and made_with["tune_all"] is True and "allocation" not in made_with
    said = " ".join(done.err.split())
    assert re.search(r"this takes about [\d.]+ \w+ on this machine \(with --effort start [\d.]+ \w+, best [\d.]", said)
    done = krony(*arguments[:2], tmp_path / "wide", *arguments[3:], "--multiple-of", 48, "--json", "-")
    assert done.code == 0, done.err  # an option that needs what the effort sets
    assert done.json["made_with"]["multiple_of"] == 48 and done.json["made_with"]["allocation"] == "global"
    done = krony(*arguments[:2], tmp_path / "untuned", *arguments[3:], "--tune", 0, "--json", "-")
    assert done.code == 0, done.err
    assert done.json["made_with"]["allocation"] == "global" and not {"tune", "tune_all"} & done.json["made_with"].keys()


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("gguf", {"model-q8_0.gguf"}),
        pytest.param("onnx", {"model.onnx", "tokenizer.json"}, marks=pytest.mark.slow),  # also in docs/deployment.md
    ],
)
def test_export_for_engines_takes_plain_and_compressed_models(krony, tmp_path, form, files):
    options = ("--type", "q8_0") if form == "gguf" else ()
    assert krony("compress", "demo", tmp_path / "half", "--scheme", "keep=0.5", "--init", "magnitude").code == 0
    said = {"demo": "it is a plain model already", str(tmp_path / "half"): "hidden width 512"}
    sizes = []
    for number, (model, words) in enumerate(said.items()):
        out = tmp_path / f"out{number}"
        done = krony("export", model, out, "--to", form, *options, "--json", tmp_path / "j.json")
        assert done.code == 0 and words in done.out, done
        assert files <= {path.name for path in out.iterdir()}
        figures = json.loads((tmp_path / "j.json").read_text())
        assert figures["files"] == {path.name: path.stat().st_size for path in out.iterdir()}
        sizes.append(sum(figures["files"].values()))
    assert sizes[1] < 0.8 * sizes[0]
    card = (out / "README.md").read_text()
    assert "compressed by krony (scheme `keep=0.5`, initialisation `magnitude`" in card and str(tmp_path) not in card
