"""A user's mistake: exit code 2, one clear sentence, nothing half-written."""

import json
import shutil
import sys

import pytest
import torch
import transformers

from small_models import gpt2, llama


@pytest.fixture
def damaged(compressed, tmp_path):
    """Gives a copy of the compressed model to damage."""
    folder = tmp_path / "damaged"
    shutil.copytree(compressed, folder)
    return folder


VAN_LOAN = ("--init", "van-loan")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheme", "100x7"), "c_fc: a left factor of 100x7 does not divide a matrix of 192x48"),
        (("--scheme", "81M"), "81M is the paper's name for a size of GPT-2 124M"),
        (("--scheme", "big"), "'big' is not understood"),
        (("--scheme", "keep=0.5", "--modules", "nothing"), "'nothing' matches no linear layer"),
        (("--scheme", "keep=0.5", "--layers", "7-9"), "chooses none of the layers 0-2"),
        (("--scheme", "keep=0.5", "--params", "1M"), "compress needs one size: --scheme"),
        ((), "compress needs one size: --scheme"),
        (("--scheme", "keep=0.5", "--within", "5%"), "compress needs one size: --scheme"),
        (("--scheme", "keep=0.5", "--val", "x.jsonl"), "--val works with --within"),
        (("--scheme", "keep=0.5", "--effort", "great"), "effort 'great' is unknown: it is one of start, tuned, best"),
        (("--scheme", "keep=0.5", "--tune-all"), "tune_all says what tune trains, and tune is 0 steps"),
        (("--scheme", "keep=0.5", "--seed", "-1"), "seed is -1: it takes a number from 0"),
        (("--scheme", "keep=0.5", "--seed", str(2**40)), "to 4294967295"),
        (("--scheme", "keep=0.5", "--tune-text", "2"), "tune_text is 2.0: it is a share, from 0 to 1"),
        (
            ("--scheme", "keep=0.5", "--tune-text", "0.2"),
            "tune_text says what tune trains towards, and tune is 0 steps",
        ),
        (("--scheme", "keep=0.5", "--calibration-tokens", "700"), "--calibration-tokens works with --calibration"),
        (("--scheme", "keep=0.5", "--no-token-weighting"), "--no-token-weighting works with --calibration"),
        (("--params", "_"), "'_' is not a number of parameters"),
        (("--within", "5%"), "--within needs text similar to what the model will see in use"),
        (("--within", "five", "--calibration", "python-docs"), "--within five: it takes a share above 0, such as 5%"),
        (("--within", "5%", "--calibration", "python-docs"), "sizes are compared with init neurons"),
        (("--within", "5%", "--calibration", "python-docs", "--stream"), "--stream doesn't work with --within"),
        (("--within", "5%", "--calibration", "lambada"), "lambada is a test set: a size is chosen on other text"),
        (("--params", "5M"), "the model has only"),
        (("--scheme", "keep=0.5", "--dtype", "int3"), "dtype 'int3' is unknown"),
        (("--scheme", "keep=0.5", "--device", "cuda:9"), "device 'cuda:9' can't be used"),
        (("--scheme", "keep=0.5", "--reinit", "some"), "reinit 'some' is unknown"),
        (
            ("--scheme", "keep=0.5", "--embedding", "5"),
            "embedding 5: the right factor's columns",
        ),
    ],
)
def test_compress_options(refused, gpt2_folder, tmp_path, options, words):
    assert words in refused("compress", gpt2_folder, tmp_path / "out", *VAN_LOAN, *options)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_init_and_rescale_of_another(refused, gpt2_folder, tmp_path):
    arguments = ("compress", gpt2_folder, tmp_path / "out", "--scheme", "keep=0.5", "--init")
    assert "init 'magic' is unknown: it is one of" in refused(*arguments, "magic")
    assert "--rescale works with init van-loan and permuted" in refused(*arguments, "prune", "--no-rescale")
    for init in ("van-loan", "permuted", "svd", "random"):
        assert f"and the init is {init}: leave it out" in refused(*arguments, init, "--epsilon", 0.1)
    single = (*arguments, "permuted", "--modules", "c_fc", "--dry-run")  # before anything is read
    assert "mlp.c_fc: init permuted needs complete MLPs" in refused(*single)


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--stream",)], ids=str)
@pytest.mark.parametrize("init", ["van-loan", "als"])
def test_text_for_a_head_is_refused_whichever_way_it_would_be_compressed(refused, tokenizer, tmp_path, init, more):
    llama(tie_word_embeddings=False, vocab_size=256).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    options = ("--scheme", "keep=0.5", "--modules", "lm_head", "--init", init, "--calibration", "python-docs", *more)
    said = refused("compress", tmp_path / "source", tmp_path / "out", *options)
    assert "lm_head is in no transformer layer, and calibration text is measured in these" in said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_calibration(refused, gpt2_folder, tmp_path):
    arguments = ("compress", gpt2_folder, tmp_path / "out", "--scheme", "keep=0.5")
    assert "init neurons needs text similar to what the model will see in use" in refused(*arguments)
    assert "wikitext-2 is a test set" in refused(*arguments, "--calibration", "wikitext-2")
    assert "nowhere.txt" in refused(*arguments, "--calibration", "nowhere.txt")
    assert "max_width works with allocation global" in refused(*arguments, "--max-width", 64)
    assert "allocation global works with init neurons" in refused(*arguments, *VAN_LOAN, "--allocation", "global")
    (tmp_path / "short.txt").write_text("a few words")
    short = ("--calibration", tmp_path / "short.txt")
    assert "has 12 tokens: at least 64 are needed, for one sequence" in refused(*arguments, *short)
    assert "calibration on 63 tokens: at least 64 are needed" in refused(*arguments, *short, "--calibration-tokens", 63)
    assert [p.name for p in tmp_path.iterdir()] == ["short.txt"]


def test_a_missing_option_or_argument(krony, gpt2_folder, tmp_path):
    for arguments in (("generate", gpt2_folder), ("compress", gpt2_folder), ("eval",), ("compress", "--bad"), ("fly",)):
        done = krony(*arguments)
        assert done.code == 2 and "Traceback" not in done.err and done.err


def test_a_folder_without_a_model(refused, tmp_path):
    assert "there is no config.json in it" in refused("eval", tmp_path)
    assert "there is no such folder" in refused("eval", tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "is a file: MODEL is a folder" in refused("eval", tmp_path / "file")


def test_a_hub_name_without_network(refused, tmp_path):
    for verb in (("eval",), ("compress", tmp_path / "out", "--scheme", "keep=0.5", "--init", "van-loan")):
        assert "the hub can't be reached" in refused(verb[0], "someone/model", *verb[1:])
    assert list(tmp_path.iterdir()) == []


def test_truncated_and_corrupted_weights(refused, damaged):
    file = damaged / "model.safetensors"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 8 + whole[8:], whole[:9] + b"\0" + whole[10:]):
        file.write_bytes(broken)
        assert "damaged" in refused("eval", damaged, "--data", "python-docs")


def test_a_config_that_is_no_json(refused, damaged):
    (damaged / "config.json").write_text('{"model_type": ')
    assert "damaged/config.json is not JSON" in refused("eval", damaged)


def test_weights_that_miss_a_tensor(refused, damaged):
    from safetensors.torch import load_file, save_file

    tensors = load_file(damaged / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.right"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert "transformer.h.1.mlp.c_fc.right" in refused("generate", damaged, "--prompt", "x")


def test_weights_of_another_shape(refused, damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["n_embd"], config["quantization_config"]["modules"] = 96, {}
    (damaged / "config.json").write_text(json.dumps(config))
    assert "wte.weight is 257x48, and by config.json 257x96" in refused("eval", damaged)


def test_pickled_weights_are_not_read(refused, damaged):
    import torch

    (damaged / "model.safetensors").unlink()
    torch.save({}, damaged / "pytorch_model.bin")
    assert "safetensors" in refused("eval", damaged)


def test_an_out_that_is_taken(refused, gpt2_folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("x")
    arguments = ("--scheme", "keep=0.5", *VAN_LOAN)
    assert "taken is not empty" in refused("compress", gpt2_folder, tmp_path / "taken", *arguments)
    assert "is a file" in refused("compress", gpt2_folder, tmp_path / "taken/file", *arguments)
    assert "can't be written" in refused("compress", gpt2_folder, tmp_path / "taken/file/out", *arguments)
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["file"]


def test_text_that_cannot_be_read(refused, compressed, tmp_path):
    for name, content, words in [("e.txt", b"", "is empty"), ("l.txt", b"\xff\xfe", "is not UTF-8")]:
        (tmp_path / name).write_bytes(content)
        assert words in refused("eval", compressed, "--data", tmp_path / name)
    assert "nor a data set of this name" in refused("eval", compressed, "--data", "wikitext-9")
    assert "can't be fetched from the hub" in refused("eval", compressed, "--data", "wikitext-2")


def test_a_model_without_a_tokenizer(refused, damaged):
    (damaged / "tokenizer.json").unlink()
    (damaged / "tokenizer_config.json").unlink()
    assert "no tokenizer can be loaded" in refused("generate", damaged, "--prompt", "x")


def test_prompts(refused, compressed):
    assert "--prompt has 0 tokens" in refused("generate", compressed, "--prompt", "")
    assert "--prompt has 80 tokens: from 1 to 63" in refused("generate", compressed, "--prompt", "x" * 80)


def test_inspect_with_another_base(refused, compressed, tmp_path):
    gpt2(n_inner=96).save_pretrained(tmp_path / "thin")
    llama().save_pretrained(tmp_path / "llama")
    assert "is 96x48 in the base model and 192x48 here" in refused("inspect", compressed, "--base", tmp_path / "thin")
    assert "has no layer transformer.h.0.mlp.c_fc" in refused("inspect", compressed, "--base", tmp_path / "llama")


def test_figures_pictures_and_pages_that_cannot_be_written(refused, gpt2_folder, compressed, tmp_path):
    """All of it is noticed before any work: nothing is printed, and OUT isn't there."""
    missing = f"can't be written: there is no folder {tmp_path / 'none'}"
    assert missing in refused("inspect", compressed, "--json", tmp_path / "none/x.json")
    arguments = ("compress", gpt2_folder, tmp_path / "out", "--scheme", "keep=0.5", *VAN_LOAN)
    assert missing in refused(*arguments, "--json", tmp_path / "none/x.json")
    assert f"{tmp_path} is a folder: name a file" in refused(*arguments, "--json", tmp_path)
    assert "can't be written" in refused(*arguments, "--json", "/proc/figures.json")
    assert "the name ends in .svg" in refused("inspect", compressed, "--plot", tmp_path / "p.gif")
    assert missing in refused("inspect", compressed, "--plot", tmp_path / "none/p.svg")
    assert "the name ends in .html" in refused("eval", compressed, "--report", tmp_path / "r.txt")
    assert missing in refused("eval", compressed, "--report", tmp_path / "none/r.html")
    assert "the name ends in .svg" in refused("reproduce", "figure1", "--plot", tmp_path / "f.png")
    assert "it draws figure1, and this is table1" in refused("reproduce", "table1", "--plot", tmp_path / "f.svg")
    assert [p.name for p in tmp_path.iterdir()] == ["compressed"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:130] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory(refused, gpt2_folder, tmp_path, monkeypatch, error):
    """torch raises it as a RuntimeError; another RuntimeError is a defect, and shows where it is."""
    import krony.cli.compress_job
    import krony.models.source

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(krony.cli.compress_job, "compress", fail)
    arguments = ("compress", gpt2_folder, tmp_path / "out", "--scheme", "keep=0.5", *VAN_LOAN, "--no-stream")
    assert "there is not enough memory" in refused(*arguments)
    with monkeypatch.context() as while_loading:
        while_loading.setattr(krony.models.source.AutoModelForCausalLM, "from_pretrained", fail)
        assert refused(*arguments).startswith("error: there is not enough memory")
    with monkeypatch.context() as at_the_first_tokens:
        at_the_first_tokens.setattr(transformers.GPT2LMHeadModel, "forward", fail)
        assert refused(*arguments).startswith("error: there is not enough memory")
    assert not list(tmp_path.iterdir())
    error = RuntimeError("another defect")
    monkeypatch.setattr(krony.cli.compress_job, "compress", fail)
    with pytest.raises(RuntimeError, match="another defect"):
        refused(*arguments)


def test_what_allocation_cannot_share_out(refused, gpt2_folder, tmp_path):
    """Before the text is read: --dry-run says it too."""
    arguments = ("compress", gpt2_folder, tmp_path / "out", "--allocation", "global", "--dry-run")
    fine = (*arguments, "--scheme", "keep=0.5", "--multiple-of", 1)
    assert "multiple_of 1 makes more portions of 192 neurons than a layer can have factors" in refused(*fine)
    coarse = (*arguments, "--scheme", "keep=0.25", "--multiple-of", 64)
    assert "scheme keep=0.25 keeps 48 neurons per layer, and allocation global gives each layer at least 64" in refused(
        *coarse
    )
    narrow = (*arguments, "--scheme", "keep=0.5", "--max-width", 4)
    assert "max_width is 4, and every layer keeps at least 8 neurons" in refused(*narrow)
    assert "no scheme is within 51,000 parameters" in refused(*arguments, "--params", 51_000, "--multiple-of", 64)


def test_factors_that_are_no_numbers(refused):
    assert "it takes numbers of factors" in refused("schemes", "gpt2", "--factors", "1,x")
    assert "it takes numbers of factors" in refused("schemes", "gpt2", "--factors", "0")


def test_export_of_a_dense_model(refused, gpt2_folder, tmp_path):
    assert "plain already" in refused("export", gpt2_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slim_where_it_is_not_exact(refused, compressed, tmp_path):
    assert "removes neurons, and all of them are used" in refused(
        "export", compressed, tmp_path / "out", "--to", "slim"
    )
    assert "--multiple-of works with --to slim" in refused("export", compressed, tmp_path / "out", "--multiple-of", 8)
    assert not (tmp_path / "out").exists()


def test_data_prepare(refused, gpt2_folder, tmp_path):
    (tmp_path / "t.txt").write_text("one document")
    arguments = ("data", "prepare", tmp_path / "t.txt", tmp_path / "out", "--tokenizer", gpt2_folder)
    assert "is one document, which can't be split" in refused(*arguments)
    assert "the val share is 2.0: it is a share of the documents" in refused(*arguments, "--val-share", 2)
    assert "holds no model" in refused(*arguments[:-1], tmp_path)
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    few = ("data", "prepare", tmp_path / "few.jsonl", *arguments[3:], "--val-share", 0.6)
    assert "a val share of 0.6 of 2 documents leaves none to train on" in refused(*few)
    missing = ("data", "prepare", tmp_path / "none.jsonl", tmp_path / "out", "--tokenizer", tmp_path)
    assert "No such file" in refused(*missing)  # before the tokenizer, which may be a download away
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "pdf"), "export to 'pdf' is unknown: it is one of dense, slim, gguf, onnx, openvino, reference"),
        (("--to", "gguf", "--type", "q4"), "GGUF type 'q4' is unknown: it is one of f32, f16, bf16, q8_0"),
        (("--to", "onnx", "--type", "f16"), "--type works with --to gguf, and this is --to onnx: leave out --type"),
        (("--to", "gguf", "--multiple-of", "8"), "--multiple-of works with --to slim, and this is --to gguf"),
    ],
)
def test_exports_that_can_not_be_meant(refused, tmp_path, options, words):
    assert words in refused("export", "demo", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_type_that_llama_cpp_does_not_have_is_known_before_the_work(refused, tmp_path, tokenizer, monkeypatch):
    options = {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**options, vocab_size=257)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "neox")
    tokenizer.save_pretrained(tmp_path / "neox")
    monkeypatch.setattr("krony.models.source.ModelSource.load", lambda *_, **__: 1 / 0)
    said = refused("export", tmp_path / "neox", tmp_path / "out", "--to", "gguf")
    assert "export to gguf writes models of the types gpt2, llama, qwen2, gemma3_text, and this one is gpt_neox" in said


@pytest.mark.parametrize("package", ["gguf", "onnx", "onnxscript", "openvino"])
def test_a_missing_extra_is_known_before_the_work(refused, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    form = {"onnxscript": "onnx"}.get(package, package)
    said = refused("export", "demo", tmp_path / "out", "--to", form)
    assert f"{package} is not installed" in said and f"pip install 'krony[{form}]'" in said


GRAPHS = [pytest.param(form, marks=pytest.mark.slow) for form in ("onnx", "openvino")]  # tracing takes long


@pytest.mark.parametrize("form", ["dense", "slim", "gguf", "reference", *GRAPHS])
def test_a_full_disk_leaves_nothing_of_an_export(krony, refused, gpt2_folder, tmp_path, form):
    """No file may grow beyond a part of the model, so that every writer fails as on a full disk."""
    resource = pytest.importorskip("resource")
    # llama.cpp knows the shipped model's tokenizer; a smaller model is traced faster
    model, largest = ("demo", 2_000_000) if form == "gguf" else (gpt2_folder, 50_000)
    assert krony("compress", model, tmp_path / "half", "--scheme", "keep=0.5", "--init", "magnitude").code == 0
    out = tmp_path / ("out.pt" if form == "reference" else "out")
    before, (limit, most) = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, most))
    try:
        said = refused("export", tmp_path / "half", out, "--to", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert "can't be written" in said and any(words in said for words in ("too large", "disk full"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_reference_in_a_folder_that_is_not_there_or_takes_no_file(refused, tmp_path):
    assert "there is no folder" in refused("export", "demo", tmp_path / "none/out.pt", "--to", "reference")
    assert "/proc/out.pt can't be written" in refused("export", "demo", "/proc/out.pt", "--to", "reference")
