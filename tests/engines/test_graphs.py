"""ONNX and OpenVINO files in their engines: the logits and 64 greedy tokens of the model, and rows of two lengths."""

import contextlib

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import krony
from krony import KronyConfig, KronyError
from krony.cli.app import main
from krony.engines.graphs import past, write_graph
from krony.engines.plain import plain

EXACT = {
    "onnx": {},
    "openvino": {"config": {"INFERENCE_PRECISION_HINT": "f32"}},
}  # else some processors compute in bf16


def greedy(run, ids, cache, count=64):
    """The tokens that follow, one at a time, and the logits of the first ones."""
    found, first, new, before = [], None, ids, 0
    for _ in range(count):
        seen = before + new.shape[1]
        made = run(
            input_ids=new, attention_mask=torch.ones(1, seen, dtype=torch.long),
            position_ids=torch.arange(before, seen)[None], past_key_values=cache,
        )  # fmt: skip
        first = made.logits if first is None else first
        new, cache, before = made.logits[:, -1:].argmax(-1), made.past_key_values, seen
        found.append(new.item())
    return found, first


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("gpt2", "onnx"),
        ("llama", "openvino"),
        pytest.param("llama", "onnx", marks=pytest.mark.slow),
        pytest.param("gpt2", "openvino", marks=pytest.mark.slow),
    ],
)
def test_the_engine_continues_as_the_model_does(form, name, of_type, tmp_path, capfd):
    """And nothing is printed by what writes the graph."""
    from transformers.exporters import ExportedModel

    model, text = (
        of_type(name, num_hidden_layers=2),
        torch.randint(0, 4096, (24, 64), generator=torch.Generator().manual_seed(1)),
    )
    krony.compress(model, KronyConfig("keep=0.5"), calibration=text)
    ids = text[:1, :9]
    expected = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)[0, 9:].tolist()
    made, _ = plain(model)
    capfd.readouterr()
    write_graph(made, tmp_path, form)
    printed = capfd.readouterr()
    assert printed.out == "" and "torch.onnx" not in printed.err and "dynamic=True" not in printed.err
    run = ExportedModel.from_pretrained(tmp_path, **EXACT[form])
    found, logits = greedy(run, ids, past(made))
    assert found == expected
    torch.testing.assert_close(logits, made(ids).logits, rtol=1e-4, atol=1e-3)
    # two rows, one of them shorter: its first place is masked
    mask, positions = torch.ones(2, 9, dtype=torch.long), torch.arange(9).repeat(2, 1)
    mask[1, 0], positions[1] = 0, (positions[1] - 1).clamp_min(0)
    cache = DynamicCache(config=made.config)
    given = {"input_ids": text[:2, :9], "attention_mask": mask, "position_ids": positions}
    logits = run(**given, past_key_values=past(made, batch=2)).logits
    torch.testing.assert_close(logits[:, 1:], made(**given, past_key_values=cache).logits[:, 1:], rtol=1e-4, atol=1e-3)


def test_a_model_in_bfloat16_is_written_for_onnx_in_float32(of_type, tokenizer, tmp_path, monkeypatch, capsys):
    from transformers.exporters import ExportedModel

    model = of_type("llama", num_hidden_layers=1).bfloat16()
    krony.compress(model, KronyConfig("keep=0.5", init="magnitude"))
    model.generation_config.update(do_sample=True, temperature=0.6)
    model.save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    monkeypatch.setattr("sys.argv", ["krony", "export", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "onnx"])
    with contextlib.suppress(SystemExit):
        main()
    assert "in float32: ONNX Runtime has few operations in bfloat16" in capsys.readouterr().out
    made, ids = plain(krony.load_model(str(tmp_path / "in"), dtype="float32"))[0], torch.arange(9)[None]
    _, logits = greedy(ExportedModel.from_pretrained(tmp_path / "out"), ids, past(made), count=1)
    torch.testing.assert_close(logits, made(ids).logits, rtol=1e-4, atol=1e-3)
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6


def test_what_is_missing_or_fails_is_one_sentence(of_type, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(KronyError, match=r"openvino is not installed .*: pip install 'krony\[openvino\]'"):
        write_graph(of_type("gpt2"), tmp_path, "openvino")
    monkeypatch.setattr("transformers.exporters.OnnxExporter.export", lambda *_: 1 / 0)
    with pytest.raises(KronyError, match="export to onnx: transformers can't trace this model: division by zero"):
        write_graph(of_type("gpt2"), tmp_path, "onnx")


def test_missing_memory_is_not_taken_for_a_model_that_can_not_be_traced(of_type, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("transformers.exporters.OnnxExporter.export", fail)
    with pytest.raises(MemoryError):
        write_graph(of_type("gpt2"), tmp_path, "onnx")
