"""What ``quality.py`` measures of a model: perplexities, losses per window, and the divergence from the original."""

from __future__ import annotations

import argparse
import copy
import math
from typing import Any

import torch
from quality_bytes import tensor_bytes
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import krony
from krony.data.sets import join_documents, load_texts
from krony.evaluation.perplexity import WINDOW, measure_losses
from krony.models.divergence import divergence
from krony.models.loading import context_length
from krony.models.modes import evaluating

SETS = {"OpenWebText": "token", "WikiText-2": "paper", "LAMBADA": "paper"}
KL_TOKENS = 16_384  # of OpenWebText, for the divergence from the original


class Measures:
    """Measures models on the same texts, each as the original is measured.

    Args:
        original: in float32; it does not change.
        options: ``data_dir``, ``tokens``, ``lambada_tokens`` and ``dtype`` are read.
    """

    def __init__(
        self, original: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
    ) -> None:
        self.original, self.tokenizer, self.options = original, tokenizer, options
        web = load_texts(str(options.data_dir / "openwebtext/val.jsonl"), options.data_dir)
        self.ids = join_documents(web, tokenizer)[: options.tokens]
        self.window = min(context_length(original), WINDOW)
        self._teacher: PreTrainedModel | None = None

    def row(self, model: PreTrainedModel, *, is_original: bool = False) -> dict[str, Any]:
        """A model's quality, and the bytes that its tensors take."""
        found = {"sets": self.sets(model), "measured_bytes": tensor_bytes(model)}
        return found if is_original else found | {"kl": self.divergence(model)}

    def sets(self, model: PreTrainedModel) -> dict[str, dict]:
        """Perplexity (and last-word accuracy) on each set; on OpenWebText also the mean loss of each window."""
        figures = {"OpenWebText": self.web(model)}
        tokens = {"WikiText-2": self.options.tokens, "LAMBADA": self.options.lambada_tokens}
        for name, most in tokens.items():
            result = krony.evaluate(
                model,
                self.tokenizer,
                name.lower(),
                data_dir=self.options.data_dir,
                protocol=SETS[name],
                max_tokens=most or None,
            )
            figures[name] = {"perplexity": result.perplexity, "accuracy": result.accuracy, "tokens": result.tokens}
        return figures

    def web(self, model: PreTrainedModel) -> dict[str, Any]:
        """The perplexity on OpenWebText by the ``token`` protocol, and the mean loss of every complete window."""
        with evaluating(model):
            losses, counts = measure_losses(model, self.ids, window=self.window, stride=self.window)
        nll = float(losses.sum() / counts.sum())
        complete = counts == counts.max()
        means = (losses / counts)[complete].tolist()
        return {
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "accuracy": None,
            "tokens": int(counts.sum()),
            "losses": [round(mean, 6) for mean in means],
        }

    @torch.inference_mode()
    def divergence(self, model: PreTrainedModel) -> float:
        """KL(original ‖ model) in nats per token, on the first tokens of OpenWebText, both in the measured dtype."""
        if self._teacher is None:
            self._teacher = copy.deepcopy(self.original).to(self.options.dtype).eval()
        pieces = self.ids[:KL_TOKENS].split(self.window)
        with evaluating(model):
            lost = [len(piece) * self._piece(model, piece).item() for piece in pieces]
        return sum(lost) / sum(map(len, pieces))

    def _piece(self, model: PreTrainedModel, piece: Tensor) -> Tensor:
        assert self._teacher is not None
        ids = piece[None].to(model.device)
        return divergence(model(ids, use_cache=False).logits, self._teacher(ids, use_cache=False).logits)
