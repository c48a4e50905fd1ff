"""What is said of the machine."""

import ctypes
import platform

import psutil
import pytest
import torch
import transformers

from krony import KronyError
from krony.runtime.hardware import check_device, fast_dtype, machine, trim_memory


def test_a_figure_says_where_it_is_from():
    found = machine()
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1 and found["processor"]
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__


def test_the_fast_dtype_is_one_of_two():
    assert fast_dtype("cpu") in (torch.float32, torch.bfloat16)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides by itself")
def test_trimming_gives_freed_memory_back():
    """Of small blocks, of which the last is in use: the library keeps what lies below it."""
    process = psutil.Process()
    blocks = [bytearray(100_000) for _ in range(2_000)]
    last = blocks.pop()
    full = process.memory_info().rss
    blocks.clear()
    trim_memory()
    assert full - process.memory_info().rss > 150_000_000 and last is not None


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no libc.so.6")))
    trim_memory()


def test_a_device_without_values_is_refused():
    with pytest.raises(KronyError, match="device 'meta' can't be used: it holds no values"):
        check_device("meta")
    check_device("auto")
