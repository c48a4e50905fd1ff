"""Calibration text that the model writes itself, so that none has to be found.

Each sequence starts with a token drawn from the vocabulary, as in LLM-QAT (Liu et al. 2023, arXiv 2305.17888), and
continues with tokens drawn from the model's own predictions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from krony.data.calibration_set import LENGTH, TOKENS
from krony.errors import KronyError
from krony.models.loading import context_length
from krony.models.modes import evaluating
from krony.runtime.progress import Progress, silent

AT_ONCE = 16  # sequences that are written together


def own_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    seed: int = 0,
    progress: Progress = silent,
) -> Tensor:
    """Token ids ``(sequences, length)``, int64, on the CPU, that the model writes by sampling at temperature 1.

    A token that ends a text does not end the sequence: another text follows, as in calibration text that is read.
    Where the model's ``generation_config`` says otherwise, it is ignored.

    Args:
        model: a causal LM of transformers; it does not change.
        tokenizer: the model's; its tokens, without the special ones, start the sequences.
        tokens: at most this many.
        length: tokens per sequence; at most those of the model's context are used.
        seed: of the first tokens and of the sampling.
        progress: called with the number of sequences written, the number of all, and what is being done.

    Raises:
        KronyError: fewer tokens than one sequence are asked for, or the model's predictions are not finite.

    Examples:
        >>> import krony
        >>> krony.own_text(krony.demo_model(), krony.load_tokenizer("demo"), tokens=64, length=32).shape
        torch.Size([2, 32])
    """
    length = min(length, context_length(model))
    if tokens < length:
        raise KronyError(f"calibration on {tokens} tokens: at least {length} are needed, which make one sequence")
    known = model.get_input_embeddings().weight.shape[0]
    special = set(tokenizer.all_special_ids)
    plain = torch.tensor([token for token in range(min(len(tokenizer), known)) if token not in special])
    rows: list[Tensor] = []
    usual = model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        torch.manual_seed(seed)
        model.generation_config = _sampling(length)
        try:
            starts = plain[torch.randint(len(plain), (tokens // length, 1))]
            for some in starts.split(AT_ONCE):
                progress(AT_ONCE * len(rows), len(starts), "the model writes text")
                ids = some.to(model.device)
                rows.append(model.generate(ids, attention_mask=torch.ones_like(ids)).cpu())
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise KronyError("the model's predictions are not finite, so it can't write text: name a text") from None
        finally:
            model.generation_config = usual
    return torch.cat(rows)


def _sampling(length: int) -> GenerationConfig:
    """From all tokens by their probabilities, and no token ends a sequence."""
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=length, eos_token_id=None, pad_token_id=0
    )
