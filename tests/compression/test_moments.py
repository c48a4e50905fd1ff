"""Second moments against sums in float64 over the activations of a plain forward pass."""

import os
import time
from pathlib import Path

import pytest
import torch

from krony import KronyError, calibration_set
from krony.compression import moments as module
from krony.compression.moments import Calibration
from krony.data.calibration_set import pack
from krony.models.surgery import find_groups
from krony.runtime import distributed
from processes import together
from small_models import BUILDERS


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (6, 20), generator=torch.Generator().manual_seed(1))


def by_hand(model, ids, group, weighted: bool):
    """The same moments from one pass in float64."""
    model = model.double()
    seen = {}
    layer = model.get_submodule(".".join(group.sites[0].name.split(".")[:3]))
    handles = [
        model.get_submodule(group.sites[0].name).register_forward_pre_hook(
            lambda _, args: seen.update(inputs=args[0].flatten(0, 1))
        ),
        model.get_submodule(group.sites[-1].name).register_forward_pre_hook(
            lambda _, args: seen.update(hidden=args[0].flatten(0, 1))
        ),
        layer.register_forward_hook(
            lambda *call: seen.update(after=call[2][0] if isinstance(call[2], tuple) else call[2])
        ),
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    after = seen.pop("after").flatten(0, 1)
    weights = 1 / after.square().sum(1) if weighted else torch.ones(len(after), dtype=torch.float64)
    weights = weights / weights.sum()
    return {key: ((x * weights[:, None]).T @ x, (x * weights[:, None]).sum(0)) for key, x in seen.items()}


@pytest.mark.parametrize("weighted", [True, False])
def test_moments_are_the_weighted_means(model, ids, weighted):
    groups = find_groups(model)
    made = list(Calibration(model, groups, ids, token_weighting=weighted))
    for group, moments in zip(groups, made, strict=True):
        expected = by_hand(model, ids, group, weighted)
        for key in ("inputs", "hidden"):
            second = getattr(moments, key)
            scale = float(expected[key][0].abs().max())
            torch.testing.assert_close(second.matrix, expected[key][0], rtol=1e-4, atol=1e-6 * scale)
            torch.testing.assert_close(second.mean, expected[key][1], rtol=1e-4, atol=1e-6 * scale**0.5)
        assert moments.tokens == 120


def test_sensitivity_is_of_the_gradients_at_the_output(model, ids):
    groups = find_groups(model)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    made = list(Calibration(model, groups, ids, sensitivity=True))
    assert not frozen.requires_grad and all(p.grad is None for p in model.parameters())
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters())) - 1
    outputs = {}
    for group in groups:
        name = group.sites[-1].name
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    logits = model.double()(ids).logits
    drawn = module._draw(logits.float().log_softmax(-1), ids).squeeze(-1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum")
    for group, moments in zip(groups, made, strict=True):
        (gradient,) = torch.autograd.grad(loss, outputs[group.sites[-1].name], retain_graph=True)
        g = gradient.flatten(0, 1)
        expected = g.T @ g / len(g)
        torch.testing.assert_close(moments.sensitivity, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_sensitivity_of_a_part_leaves_the_moments_whole(model, ids, monkeypatch):
    groups = find_groups(model)
    whole = list(Calibration(model, groups, ids, sensitivity=True))
    monkeypatch.setattr(module, "SENSITIVITY_TOKENS", 40)
    part = list(Calibration(model, groups, ids, sensitivity=True))
    first = list(Calibration(model, groups, ids[:2], sensitivity=True))
    for a, b, c in zip(whole, part, first, strict=True):
        torch.testing.assert_close(a.hidden.matrix, b.hidden.matrix, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(b.sensitivity, c.sensitivity)


def test_drawn_tokens_follow_the_model(ids):
    probabilities = torch.tensor([0.5, 0.2, 0.3, 0.0])
    rows = torch.arange(400 * 5).view(400, 5)
    drawn = module._draw(probabilities.log().expand(400, 5, 4), rows)
    shares = drawn.flatten().bincount(minlength=4) / drawn.numel()
    torch.testing.assert_close(shares, probabilities, atol=0.04, rtol=0)
    assert torch.equal(drawn[7:9], module._draw(probabilities.log().expand(2, 5, 4), rows[7:9]))


def test_passes_over_a_few_layers_at_a_time_give_the_same(model, ids, monkeypatch):
    groups = find_groups(model)
    whole = list(Calibration(model, groups, ids))
    monkeypatch.setattr(module, "MEMORY", 1)
    calibration = Calibration(model, groups, ids)
    assert len(list(calibration._chunks())) == len(groups)
    for a, b in zip(whole, calibration, strict=True):
        assert torch.equal(a.hidden.matrix, b.hidden.matrix) and torch.equal(a.inputs.mean, b.inputs.mean)


def test_it_is_kept_and_found_again(model, ids, tmp_path, monkeypatch):
    groups = find_groups(model)
    first = Calibration(model, groups, ids, cache=tmp_path)
    assert "is read and kept in" in first.source
    made = list(first)
    again = Calibration(model, groups, ids, cache=tmp_path)
    assert "is taken from" in again.source
    monkeypatch.setattr(Calibration, "_run", None)  # what is kept needs no run
    for a, b in zip(made, again, strict=True):
        assert torch.equal(a.hidden.matrix, b.hidden.matrix) and a.tokens == b.tokens
    others = [
        Calibration(model, groups, ids.flip(0), cache=tmp_path),
        Calibration(model, groups, ids, token_weighting=False, cache=tmp_path),
        Calibration(model, groups, ids, sensitivity=True, cache=tmp_path),
        Calibration(model, groups[1:], ids, cache=tmp_path),
    ]
    with torch.no_grad():
        next(model.parameters())[0] += 1
    others.append(Calibration(model, groups, ids, cache=tmp_path))
    model.config.layer_norm_epsilon = 1e-3  # equal weights, and another model
    others.append(Calibration(model, groups, ids, cache=tmp_path))
    assert len({first.folder, *(c.folder for c in others)}) == 7


def test_the_same_tokens_in_other_sequences_are_another_text(model, ids, tmp_path):
    groups = find_groups(model)
    list(Calibration(model, groups, ids, cache=tmp_path))
    assert "was kept" in Calibration(model, groups, ids, cache=tmp_path).source
    assert "is read" in Calibration(model, groups, ids.view(12, 10), cache=tmp_path).source


def test_an_interrupted_one_goes_on(model, ids, tmp_path):
    groups = find_groups(model)
    first = Calibration(model, groups, ids, cache=tmp_path)
    made = list(first)
    next(iter(first.folder.glob("00001*"))).unlink()
    again = list(Calibration(model, groups, ids, cache=tmp_path))
    assert torch.equal(made[1].hidden.matrix, again[1].hidden.matrix)


def test_what_a_killed_process_left_is_cleared_away(model, ids, tmp_path):
    """After a day; what is younger may still be written."""
    groups = find_groups(model)
    list(Calibration(model, groups, ids, cache=tmp_path))
    folder = next(tmp_path.iterdir())
    old, young = folder / "00000.123.partial", folder / "00001.124.partial"
    for file in (old, young):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    Calibration(model, groups, ids, cache=tmp_path)
    assert not old.exists() and young.exists()


def test_one_that_is_stopped_while_it_is_kept_leaves_nothing(model, ids, tmp_path, monkeypatch):
    def stop(_, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("krony.storage.tensor_files.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        list(Calibration(model, find_groups(model), ids, cache=tmp_path))
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("cache", ["file", "file/cache", "/proc/krony"])
def test_a_cache_that_cannot_be_written_is_refused_before_the_text_is_read(model, ids, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(Calibration, "_run", None)
    calibration = Calibration(model, find_groups(model), ids, cache=cache)
    with pytest.raises(KronyError, match=r"the calibration can't be stored there: .*KRONY_CACHE.*--no-cache"):
        list(calibration)


def test_a_damaged_cache_is_named(model, ids, tmp_path):
    groups = find_groups(model)
    calibration = Calibration(model, groups, ids, cache=tmp_path)
    list(calibration)
    (calibration.folder / "00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(KronyError, match=r"00000\.safetensors is a damaged calibration: delete it"):
        list(Calibration(model, groups, ids, cache=tmp_path))


def test_the_model_is_left_as_it_was(model, ids):
    model.train()
    list(Calibration(model, find_groups(model), ids))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_documents_are_packed_by_seed(tokenizer):
    documents = ["aaaa", "bbbb", "cccc", "dddd"]
    rows = pack(documents, tokenizer, tokens=12, length=6, seed=0)
    assert rows.shape == (2, 6)
    assert torch.equal(rows, pack(documents, tokenizer, tokens=12, length=6, seed=0))
    assert any(not torch.equal(rows, pack(documents, tokenizer, tokens=12, length=6, seed=s)) for s in range(1, 5))
    assert (rows == tokenizer.eos_token_id).sum() >= 2  # documents are apart
    with pytest.raises(KronyError, match="has 20 tokens: at least 32 are needed, for one sequence"):
        pack(documents, tokenizer, length=32)


def test_python_docs_are_there_everywhere_and_test_sets_are_refused(tokenizer):
    assert calibration_set("python-docs", tokenizer, tokens=1000, length=100).shape == (10, 100)
    with pytest.raises(KronyError, match="lambada is a test set"):
        calibration_set("lambada", tokenizer)


def test_sequences_longer_than_the_model_takes(model):
    with pytest.raises(KronyError, match="sequences of 80 tokens, the model takes 64"):
        Calibration(model, find_groups(model), torch.zeros(1, 80, dtype=torch.long))


def moments_found(family: str, ids: torch.Tensor, out: str) -> None:
    """All that a process does: the moments, which every process saves."""
    distributed.init()
    model = BUILDERS[family]()
    made = list(Calibration(model, find_groups(model), ids))
    torch.save([m.hidden.matrix for m in made], f"{out}{distributed.rank()}")


@pytest.mark.parametrize("family", BUILDERS)
def test_two_processes_share_the_work(family, ids, tmp_path):
    model = BUILDERS[family]()
    expected = [m.hidden.matrix for m in Calibration(model, find_groups(model), ids)]
    together(2, tmp_path / "processes", moments_found, family, ids, str(tmp_path / "rank"))
    for rank in (0, 1):
        for a, b in zip(expected, torch.load(tmp_path / f"rank{rank}"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(a.abs().max()))


def test_a_file_in_the_cache_that_is_longer_than_its_tensors_is_not_read(model, ids, tmp_path):
    list(Calibration(model, find_groups(model), ids, cache=tmp_path))
    file = sorted(tmp_path.rglob("*.safetensors"))[0]
    os.truncate(file, 2**40)
    with pytest.raises(KronyError, match=f"{file.name} is a damaged calibration.* bytes and should have"):
        list(Calibration(model, find_groups(model), ids, cache=tmp_path))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda t: t["inputs.matrix"].fill_(float("nan")), "not finite"),
        (lambda t: t["hidden.matrix"].diagonal().neg_(), "negative diagonal"),
        (lambda t: t["hidden.matrix"][0, 1].add_(1e4), "not symmetric"),
        (lambda t: t.update({"inputs.mean": torch.zeros(3)}), "has shape"),
        (lambda t: t.pop("tokens"), "tokens is missing"),
        (lambda t: t.update({"inputs.mean": t["inputs.mean"].bool()}), "inputs.mean is of type bool"),
    ],
)
def test_values_in_the_cache_that_cannot_be_moments(model, ids, tmp_path, spoil, why):
    from safetensors.torch import load_file, save_file

    list(Calibration(model, find_groups(model), ids, cache=tmp_path))
    file = sorted(tmp_path.rglob("*.safetensors"))[0]
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)
    with pytest.raises(KronyError, match=f"{file.name} is a damaged calibration.*{why}"):
        list(Calibration(model, find_groups(model), ids, cache=tmp_path))
