"""Several processes share a compression: each does its own groups, and all get the model that one process makes."""

import time
from datetime import timedelta

import pytest
import torch

from krony import KronyConfig, compress
from krony.compression import allocation, reconstruction
from krony.compression import compress as module
from krony.runtime import distributed
from processes import started, together
from small_models import BUILDERS

CONFIGS = {
    "neurons": {"allocation": "global", "reconstruct": 3},
    "als": {"init": "als", "tune": 2},
}


def text(seed=0):
    return torch.randint(0, 256, (6, 24), generator=torch.Generator().manual_seed(seed))


def noted(work, note):
    """``work``, of which ``note`` learns each call."""

    def call(*arguments, **options):
        note(*arguments)
        return work(*arguments, **options)

    return call


def compressed(family, options, out, cache=None, damage=None):
    """Compresses a small model, and writes its tensors, its errors and what this process did itself."""
    distributed.init("cpu")
    done = {"replaced": [], "costs": 0, "trained": 0}
    counted = {
        (module, "replacements"): lambda *a: done["replaced"].append(a[1].sites[0].name),
        (reconstruction, "reconstruct"): lambda *a: done.update(trained=done["trained"] + 1),
        (allocation, "take_out"): lambda *a: done.update(costs=done["costs"] + 1),
    }
    for (where, name), note in counted.items():
        setattr(where, name, noted(getattr(where, name), note))
    model = BUILDERS[family]().double()
    if damage is not None:
        model.get_parameter(damage).data[0] = float("nan")
    report = compress(model, KronyConfig("keep=0.5", **options), calibration=None if damage else text(), cache=cache)
    errors = [(layer.name, layer.error, layer.calibrated_error) for layer in report.layers]
    torch.save((dict(model.state_dict()), errors, done), f"{out}-{distributed.rank()}")


def slow(patience, out):
    """Compresses, and takes five seconds for the second group, which is that of the second process."""
    distributed.init("cpu", patience=timedelta(seconds=patience))
    replacements = module.replacements
    module.replacements = lambda *a, **k: (time.sleep(5 * ("h.1." in a[1].sites[0].name)), replacements(*a, **k))[1]
    compress(BUILDERS["gpt2"](), KronyConfig("keep=0.5", init="van-loan"))
    torch.save("done", f"{out}-{distributed.rank()}")


def results(folder, count, *arguments, **options):
    together(count, folder / f"of-{count}", compressed, *arguments, str(folder / f"result-{count}"), **options)
    return [torch.load(folder / f"result-{count}-{rank}", weights_only=False) for rank in range(count)]


@pytest.mark.parametrize("family", list(BUILDERS))
@pytest.mark.parametrize("name", list(CONFIGS))
def test_each_does_its_groups_and_all_get_the_same_model(family, name, tmp_path):
    """To the bit where they have the same second moments, which are kept: sums over processes round differently."""
    [(expected, errors, alone)] = results(tmp_path, 1, family, CONFIGS[name], cache=tmp_path / "cache")
    both = results(tmp_path, 2, family, CONFIGS[name], cache=tmp_path / "cache")
    assert len(alone["replaced"]) == 3
    assert [len(done["replaced"]) for _, _, done in both] == [2, 1]
    assert sorted(both[0][2]["replaced"] + both[1][2]["replaced"]) == sorted(alone["replaced"])
    if name == "neurons":
        assert (alone["trained"], alone["costs"]) == (3, 3)
        assert [(done["trained"], done["costs"]) for _, _, done in both] == [(2, 2), (1, 1)]
    for tensors, found, _ in both:
        assert found == errors
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], value) for key, value in expected.items())


def test_layers_that_are_kept_are_not_trained_again(tmp_path, monkeypatch):
    """What one process has trained, several take from it."""
    cache = tmp_path / "cache"
    options = CONFIGS["neurons"] | {"reconstruct": 2}
    with monkeypatch.context() as patch:
        patch.setattr(module.KeptLayers, "clear", lambda self: None)
        model = BUILDERS["gpt2"]().double()
        compress(model, KronyConfig("keep=0.5", **options), calibration=text(), cache=cache)
    both = results(tmp_path, 2, "gpt2", options, cache=cache)
    assert [done["trained"] for _, _, done in both] == [0, 0]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(both[0][0][key], value)


def test_an_error_in_one_process_ends_the_others(tmp_path):
    """A weight of the second group is damaged, which the second process finds."""
    options = {"init": "van-loan"}
    processes = started(
        2,
        tmp_path / "two",
        compressed,
        "gpt2",
        options,
        str(tmp_path / "out"),
        damage="transformer.h.1.mlp.c_fc.weight",
    )
    ends = [process.ended() for process in processes]
    assert all(code != 0 for code, _ in ends)
    assert "h.1.mlp.c_fc: its weight has values that are not finite" in ends[1][1]


@pytest.mark.parametrize(("patience", "ends"), [(60, True), (1, False)])
def test_a_process_waits_for_another_that_has_a_large_layer(patience, ends, tmp_path):
    processes = started(2, tmp_path / "two", slow, patience, str(tmp_path / "out"))
    codes = [process.ended()[0] for process in processes]
    assert (tmp_path / "out-0").exists() == ends == (codes[0] == 0)
