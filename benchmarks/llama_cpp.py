"""llama.cpp with one model, asked through its own web interface: for benchmarks/engines.py and tests/engines."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path
from typing import Any


class LlamaCpp:
    """Loads a GGUF file; keys, values and attention in float32, which llama.cpp lets one choose.

    Args:
        file: the model.
        threads: processor threads.
        context: tokens that a text may have.
    """

    def __init__(self, file: Path, threads: int, context: int) -> None:
        import xllamacpp

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = xllamacpp.CommonParams()
        options.model.path, options.port, options.n_ctx = str(file), port, context
        options.n_parallel, options.n_gpu_layers, options.verbosity, options.warmup = 1, 0, -1, False
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server, self.address = xllamacpp.Server(options), f"http://127.0.0.1:{port}"

    def ask(self, path: str, **question: Any) -> dict[str, Any]:
        """What the server answers."""
        body, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.address}/{path}", body, kind)) as answer:
            return json.loads(answer.read())

    def greedy(self, ids: list[int], count: int) -> dict[str, Any]:
        """Continues token ids: the answer has ``tokens`` and ``timings``."""
        how = {"temperature": 0, "n_predict": count, "ignore_eos": True, "cache_prompt": False}
        return self.ask("completion", prompt=ids, return_tokens=True, **how)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text, with those that its tokenizer adds."""
        return self.ask("tokenize", content=text, add_special=True)["tokens"]
