"""llama.cpp with one model, asked through its own web interface: for benchmarks/engines.py and tests/engines.

It runs in a process of its own, which is killed at the end: the deletion of a server of xllamacpp 2026.10 can wait for
ever, with Python's lock.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
import weakref
from pathlib import Path
from typing import Any

LIMIT = 300  # seconds that an answer may take


def serve(file: str, port: str, threads: str, context: str) -> None:
    """What the process does: says a line when it is ready, and ends with its input."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.port, options.n_ctx = file, int(port), int(context)
    options.n_parallel, options.n_gpu_layers, options.verbosity, options.warmup = 1, 0, -1, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = int(threads)
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    _server = xllamacpp.Server(options)  # is never deleted
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


def end(process: subprocess.Popen[str]) -> None:
    """Kills it, and waits until it is gone."""
    with process:
        process.kill()


class LlamaCpp:
    """Loads a GGUF file; keys, values and attention in float32, which llama.cpp lets one choose.

    Args:
        file: the model.
        threads: processor threads.
        context: tokens that a text may have.
    """

    def __init__(self, file: Path, threads: int, context: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, str(file), str(port), str(threads), str(context)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = f"http://127.0.0.1:{port}"
        weakref.finalize(self, end, process)
        if process.stdout is None or process.stdout.readline() != "ready\n":
            raise RuntimeError(f"llama.cpp doesn't load {file}")

    def ask(self, path: str, **question: Any) -> dict[str, Any]:
        """What the server answers."""
        body, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.address}/{path}", body, kind)
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return json.loads(answer.read())

    def greedy(self, ids: list[int], count: int) -> dict[str, Any]:
        """Continues token ids: the answer has ``tokens`` and ``timings``."""
        how = {"temperature": 0, "n_predict": count, "ignore_eos": True, "cache_prompt": False}
        return self.ask("completion", prompt=ids, return_tokens=True, **how)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text, with those that its tokenizer adds."""
        return self.ask("tokenize", content=text, add_special=True)["tokens"]


if __name__ == "__main__":
    serve(*sys.argv[1:])
