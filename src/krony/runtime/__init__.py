"""The machine: devices, memory, processes, progress."""
