"""The machine: its memory, its devices, and the dtype that is fast on them."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from krony._version import __version__
from krony.errors import KronyError


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 if this device multiplies matrices in it faster than in float32, else float32."""
    kind = torch.device(device).type
    fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        fast = has_tiles() or bool(_abilities().get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def has_tiles() -> bool:
    """Whether the processor multiplies bfloat16 matrices in tiles (Intel's AMX)."""
    return bool(_abilities().get("amx_bf16"))


def _abilities() -> dict[str, Any]:
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.10
    return found


def memory() -> int:
    """Bytes of memory that this process may use: the machine's, or the control group's limit if that is less."""
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out; torch reports that in the text of a RuntimeError.

    Examples:
        >>> is_out_of_memory(RuntimeError("CUDA out of memory")), is_out_of_memory(RuntimeError("other"))
        (True, False)
    """
    words = str(error).lower()
    from_torch = any(sign in words for sign in ("out of memory", "can't allocate memory", "not enough memory"))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and from_torch)


def check_device(device: str) -> None:
    """Raises KronyError unless torch can use the device of this name; ``auto`` is always accepted."""
    if device == "meta":
        raise KronyError("device 'meta' can't be used: it holds no values, so nothing can be computed on it")
    try:
        torch.empty(0, device="cpu" if device == "auto" else device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that isn't there
        raise KronyError(f"device {device!r} can't be used: {str(error).strip().splitlines()[0]}") from None


def machine() -> dict[str, str | int]:
    """Processor, cores, accelerator and versions, recorded beside every figure."""
    import transformers

    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "krony": __version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def trim_memory() -> None:
    """Gives freed memory back to the system where the C library is glibc, which otherwise keeps much of it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
