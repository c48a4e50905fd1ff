"""What a figure was measured on: said beside every one."""

from krony.hardware import machine

__all__ = ["machine"]
