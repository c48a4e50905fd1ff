"""Asks the Hugging Face hub for a name, for a few seconds at most; its client alone tries for half a minute."""

from __future__ import annotations

from functools import cache
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

SECONDS = 4.0  # how long the hub is waited for

Answer = Literal["known", "unknown", "no name", "no answer"]


@cache
def ask(name: str, kind: Literal["model", "dataset"]) -> Answer:
    """Whether the hub knows a model or data set of this name that this user may read.

    ``no name`` is what can't be one; ``no answer`` is a missing network, or offline mode.
    """
    if constants.HF_HUB_OFFLINE:
        return "no answer"
    api = HfApi()
    try:
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=SECONDS)
    except RepositoryNotFoundError:
        return "unknown"
    except HFValidationError:
        return "no name"
    except Exception:  # the http client's errors: no network, no answer in time
        return "no answer"
    return "known"
