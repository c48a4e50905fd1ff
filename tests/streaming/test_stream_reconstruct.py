"""Training each MLP by itself, layer by layer: the same as the steps on the full model without its gradient."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from krony import KronyConfig, KronyError
from krony.cli.app import main
from krony.compression import reconstruction
from krony.compression.moments import Calibration
from krony.compression.plan import plan
from krony.compression.reconstruction import Examples, module_name, reconstruct
from krony.compression.replacement import replacements
from krony.models.loading import load_model
from krony.models.source import ModelSource
from krony.models.surgery import find_groups
from krony.streaming.plan import prepare
from krony.streaming.stream import run
from small_models import BUILDERS, llama
from streamed_runs import Stop

STEPS = 20
CONFIGS = (
    {"init": "neurons"},
    {"init": "van-loan"},
    {"init": "als", "modules": "mlp|o_proj|c_proj"},
    {"init": "neurons", "token_weighting": False, "layers": "odd"},
)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    """The errors of these tiny models are below what bfloat16 sees."""
    monkeypatch.setattr(reconstruction, "fast_dtype", lambda _: torch.float32)


def text(rows: int = 80) -> torch.Tensor:
    """More than one batch of the model's forward pass, the last one smaller."""
    return torch.randint(0, 256, (rows, 64), generator=torch.Generator().manual_seed(2))


def streamed(source: Path, out: Path, config: KronyConfig, **options):
    return run(prepare(ModelSource.find(str(source)), config, reads=True), out, calibration=text(), **options)


def reads(model, group) -> Examples:
    """What the group's module reads in the full model, from a hook, and the weights by the layer's outputs."""
    seen, name = [], module_name(group)
    number = next(int(part) for part in name.split(".") if part.isdigit())
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    layers = getattr(model.base_model, "h", None) or model.base_model.layers
    after = []
    other = layers[number].register_forward_hook(
        lambda _, __, output: after.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))
    )
    with torch.no_grad():
        for rows in text().split(64):  # as many sequences as the library runs at a time: 4,096 tokens
            model(rows)
    hook.remove()
    other.remove()
    weights = 1 / torch.cat(after).square().sum(-1)
    return Examples(torch.cat(seen), weights / weights.mean())


def by_hand(model, config: KronyConfig) -> dict[str, torch.Tensor]:
    """The new tensors by name: the library's steps one by one on the full model, without sensitivity."""
    settled, found = plan(model, config), {}
    moments = Calibration(model, settled.groups, text(), token_weighting=config.token_weighting, sensitivity=False)
    for group, known in zip(settled.groups, moments, strict=True):
        examples, name = reads(model, group), module_name(group)
        if not config.token_weighting:
            examples = Examples(examples.inputs, torch.ones(len(examples.inputs)))
        with torch.no_grad():
            made = replacements(model, group, settled.shapes, config, known)
            layers = {full.removeprefix(name).removeprefix("."): one.layer for full, one in made.items()}
            reconstruct(model.get_submodule(name), layers, examples, steps=config.reconstruct, seed=config.seed)
        for full, one in made.items():
            found |= {f"{full}.{key}": value for key, value in one.layer.state_dict().items()}
    return found


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("family", list(BUILDERS))
def test_it_is_what_the_steps_give_on_the_full_model(family, options, tmp_path):
    BUILDERS[family]().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    if options.get("modules"):  # matrices one by one, some of which read the same inputs
        options = options | {"modules": "mlp" if family == "gpt2" else "mlp|q_proj|k_proj"}
    config = KronyConfig("keep=0.5", reconstruct=STEPS, **options)
    expected = by_hand(load_model(str(tmp_path / "source")), config)
    streamed(tmp_path / "source", tmp_path / "out", config)
    got = load_file(tmp_path / "out/model.safetensors")
    assert set(expected) <= set(got)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("init", ["neurons", "van-loan"])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_every_mlp_comes_nearer_to_the_original(family, init, tmp_path):
    """The outputs of each MLP on the inputs that it has in the original."""
    model, lost = BUILDERS[family](), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name and parameter.ndim == 2:
                parameter.mul_(30)  # a GELU near zero is a line, and leaves nothing to train after the least squares
    model.save_pretrained(tmp_path / "source")
    for steps in (0, STEPS):
        streamed(tmp_path / "source", tmp_path / f"{steps}", KronyConfig("keep=0.5", init=init, reconstruct=steps))
        new = load_model(str(tmp_path / f"{steps}"))
        for group in find_groups(model):
            examples, name = reads(model, group), module_name(group)
            with torch.no_grad():
                e = new.get_submodule(name)(examples.inputs) - model.get_submodule(name)(examples.inputs)
            lost[steps, name] = (examples.weights * e.square().sum(-1)).mean().item()
    names = [name for steps, name in lost if steps]
    assert len(names) == 3 and all(lost[STEPS, name] < 0.99 * lost[0, name] for name in names)


def test_a_few_groups_at_a_time_give_the_same(tmp_path, monkeypatch):
    """Where the inputs of a layer's groups don't fit, the layer runs again for the next ones."""
    llama().save_pretrained(tmp_path / "source")
    config = KronyConfig("keep=0.5", init="van-loan", modules="mlp", reconstruct=2)
    streamed(tmp_path / "source", tmp_path / "one", config)
    monkeypatch.setattr(reconstruction, "MEMORY", 1)
    streamed(tmp_path / "source", tmp_path / "two", config)
    one, two = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_goes_on_with_the_next_layer(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    config = KronyConfig("keep=0.5", reconstruct=STEPS)
    whole = streamed(tmp_path / "source", tmp_path / "whole", config)
    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path / "source", tmp_path / "out", config, progress=Stop(2))
    last = Stop()
    again = streamed(tmp_path / "source", tmp_path / "out", config, progress=last)
    assert last.seen == [2, 3] and again.layers == whole.layers
    one, two = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


def test_without_text(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    plan = prepare(ModelSource.find(str(tmp_path / "source")), KronyConfig("keep=0.5", init="van-loan", reconstruct=2))
    with pytest.raises(KronyError, match="reconstruct needs calibration text"):
        run(plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def krony(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["krony", "compress", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code or 0


def test_a_dry_run_names_more_memory(gpt2_folder, tmp_path, monkeypatch, capsys):
    named = {}
    for steps in (0, 5):
        options = ["--scheme", "keep=0.5", "--calibration", "python-docs", "--stream", "--reconstruct", steps]
        written = ["--dry-run", "--json", tmp_path / f"{steps}.json"]
        assert krony(monkeypatch, gpt2_folder, tmp_path / "out", *options, *written) == 0
        assert ("plain outputs of each MLP" in capsys.readouterr().out.replace("\n", " ")) == bool(steps)
        named[steps] = json.loads((tmp_path / f"{steps}.json").read_text())["memory_bytes"]
    width = json.loads((gpt2_folder / "config.json").read_text())["n_embd"]
    assert named[5] - named[0] > 2 * 4 * 49_152 * width  # the default text's inputs and targets at least
    assert not (tmp_path / "out").exists()


def test_the_command_on_the_demo(tmp_path, monkeypatch, capsys):
    model = tmp_path / "demo"
    ModelSource.find("demo").load().save_pretrained(model)
    ModelSource.find("demo").save_tokenizer(model)
    options = ["--scheme", "keep=0.5", "--calibration", "python-docs", "--calibration-tokens", 2048, "--stream"]
    assert krony(monkeypatch, model, tmp_path / "plain", *options) == 0
    assert "plain outputs of each MLP" not in capsys.readouterr().out.replace("\n", " ")
    assert krony(monkeypatch, model, tmp_path / "out", *options, "--reconstruct", 5) == 0
    assert "plain outputs of each MLP" in capsys.readouterr().out.replace("\n", " ")
    made_with = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["made_with"]
    assert made_with["reconstruct"] == 5 and made_with["stream"] is True
    plain, new = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("plain", "out"))
    changed = {name for name in new if not torch.equal(new[name], plain[name])}
    layers = {name.rpartition(".")[0] for name in new if ".mlp." in name}
    assert {name.rpartition(".")[0] for name in changed} <= layers and len(changed) >= len(layers)
    assert load_model(str(tmp_path / "out"))(torch.arange(8)[None]).logits.isfinite().all()
