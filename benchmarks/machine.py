"""What a figure was measured on: said beside every one."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers

import krony


def machine() -> dict[str, str | int]:
    """Processor, cores, and the versions of what decides."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "krony": krony.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
