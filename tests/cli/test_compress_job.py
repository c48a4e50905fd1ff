"""What ``krony compress`` holds while it works, and leaves when it can't finish."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from krony import KronyError
from krony.cli import compress_job
from krony.storage.files import check_writable


def test_no_other_process_takes_out_meanwhile(krony, gpt2_folder, tmp_path, monkeypatch):
    usual, seen = compress_job.compress, []

    def compress(*args, **options):
        with ThreadPoolExecutor(1) as pool, pytest.raises(KronyError, match="out is in use by process"):
            pool.submit(check_writable, tmp_path / "out").result()
        seen.append(True)
        return usual(*args, **options)

    monkeypatch.setattr(compress_job, "compress", compress)
    done = krony("compress", gpt2_folder, tmp_path / "out", "--scheme", "keep=0.5", "--init", "prune", "--no-stream")
    assert done.code == 0 and seen and (tmp_path / "out/config.json").is_file(), done.err


def test_a_full_disk_keeps_the_layers_that_were_trained(krony, refused, gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KRONY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("words to calibrate on. " * 200)
    words = ["compress", gpt2_folder, tmp_path / "out", "--scheme", "keep=0.5", "--calibration", tmp_path / "text.txt"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("krony.models.source.ModelSource.save", full)
        failed = krony(*words, "--reconstruct", "2")
    assert failed.code == 2 and "out can't be written: No space left on device" in failed.err
    assert list(tmp_path.glob("cache/moments-*/reconstructed-*/*.safetensors"))
    assert krony(*words, "--reconstruct", "2").code == 0
    assert not list(tmp_path.glob("cache/moments-*/reconstructed-*"))
