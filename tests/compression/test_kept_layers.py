"""A compression that is stopped keeps the MLPs that it has trained, and goes on with the next one."""

import os
import signal

import pytest
import torch

from krony import KronyConfig, KronyError, compress
from krony.compression import kept_layers, reconstruction
from krony.compression.reconstruction import reconstruct
from krony.errors import WriteError
from krony.runtime.signals import Interrupt, interruptible
from processes import Process
from small_models import BUILDERS, gpt2

CONFIG = KronyConfig("keep=0.5", reconstruct=5)


def compressed(ids, cache, config=CONFIG, build=gpt2):
    model = build()
    report = compress(model, config, calibration=ids, cache=cache)
    return model, [layer.to_json() for layer in report.layers]


def check_same(one, other) -> None:
    assert one[1] == other[1]
    for a, b in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def trained(monkeypatch):
    """How many MLPs were trained; SIGTERM comes in the third, if ``stop_at`` is set."""
    seen = {"count": 0, "stop_at": None}

    def counted(*args, **options):
        seen["count"] += 1
        if seen["count"] == seen["stop_at"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return reconstruct(*args, **options)

    monkeypatch.setattr(reconstruction, "reconstruct", counted)
    return seen


@pytest.mark.parametrize("config", [CONFIG, KronyConfig("keep=0.5", reconstruct=5, allocation="global", tune=2)])
@pytest.mark.parametrize("family", BUILDERS)
def test_after_sigterm_it_goes_on_with_the_next_mlp(family, config, ids, tmp_path, trained):
    expected = compressed(ids, None, config, BUILDERS[family])
    trained |= {"count": 0, "stop_at": 3}
    with pytest.raises(SystemExit) as stopped, interruptible(lambda: ""):
        compressed(ids, tmp_path, config, BUILDERS[family])
    assert stopped.value.code == 143 and isinstance(stopped.value.__cause__, Interrupt)
    assert len(list(tmp_path.glob("moments-*/reconstructed-*/*.safetensors"))) == 2
    trained |= {"count": 0, "stop_at": None}
    check_same(compressed(ids, tmp_path, config, BUILDERS[family]), expected)
    assert trained["count"] == 1
    assert not list(tmp_path.glob("moments-*/reconstructed-*"))  # the compression is complete
    assert list(tmp_path.glob("moments-*/*.safetensors"))


def stop(ids, cache) -> None:
    count = []

    def killed(*args, **options):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return reconstruct(*args, **options)

    reconstruction.reconstruct = killed
    compressed(ids, cache)


def test_after_sigkill_too(ids, tmp_path, trained):
    assert Process(tmp_path / "process", stop, ids, tmp_path / "cache").ended()[0] == -signal.SIGKILL
    done = compressed(ids, tmp_path / "cache")
    assert trained["count"] == 1
    check_same(done, compressed(ids, None))


def interrupted(ids, cache, trained) -> None:
    trained |= {"count": 0, "stop_at": 3}
    with pytest.raises(SystemExit), interruptible(lambda: ""):
        compressed(ids, cache)
    trained |= {"count": 0, "stop_at": None}


def test_other_options_find_nothing(ids, tmp_path, trained):
    interrupted(ids, tmp_path, trained)
    compressed(ids, tmp_path, KronyConfig("keep=0.5", reconstruct=6))
    assert trained["count"] == 3


def test_a_damaged_file_is_named(ids, tmp_path, trained):
    interrupted(ids, tmp_path, trained)
    file = next(tmp_path.glob("moments-*/reconstructed-*/00001.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        KronyError, match=r"00001.safetensors is damaged: delete it, and krony trains these layers again"
    ):
        compressed(ids, tmp_path)
    file.unlink()
    check_same(compressed(ids, tmp_path), compressed(ids, None))


def test_layers_stay_until_the_model_is_written(ids, tmp_path, trained):
    seen = []

    def full(report) -> None:
        seen.append(len(list(tmp_path.glob("moments-*/reconstructed-*/*.safetensors"))))
        raise OSError(28, "No space left on device")

    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            compress(gpt2(), CONFIG, calibration=ids, cache=tmp_path, finish=full)
    assert seen == [3, 3] and trained["count"] == 3  # the second call trains nothing
    check_same(compressed(ids, tmp_path), compressed(ids, None))
    assert not list(tmp_path.glob("moments-*/reconstructed-*"))


def test_another_run_that_is_complete_first_takes_nothing_away(ids, tmp_path, trained):
    """Both have the same model, text and options, and another OUT."""
    interrupted(ids, tmp_path, trained)
    first = []

    def progress(done, total, what) -> None:
        if not first and done == 1 and what.endswith("c_fc"):  # what was kept has been found
            first.append(compressed(ids, tmp_path))

    model = gpt2()
    report = compress(model, CONFIG, calibration=ids, cache=tmp_path, progress=progress)
    check_same((model, [layer.to_json() for layer in report.layers]), first[0])


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_trained(ids, tmp_path, trained, monkeypatch):
    compressed(ids, tmp_path)
    monkeypatch.setattr(kept_layers, "check_cache", refuse)
    with pytest.raises(WriteError, match="the layers"):
        compressed(ids, tmp_path)
    assert trained["count"] == 3


def refuse(folder, what) -> None:
    raise WriteError(what)
