"""The Hugging Face hub: whether it knows a name, asked for a few seconds at most, and the upload of a folder."""

from __future__ import annotations

from functools import cache
from glob import escape
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, ModelCard, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from krony.errors import KronyError
from krony.storage.tensor_files import INDEX, SINGLE, check_link

SECONDS = 4.0  # how long the hub is waited for
TEMPLATES = "additional_chat_templates"  # transformers' folder for those with names

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


def cached_model(name: str) -> Path | None:
    """The folder of a model in the hub's cache, if its weights are there as safetensors."""
    try:
        for file in (SINGLE, INDEX):
            found = try_to_load_from_cache(name, file)
            if isinstance(found, str):
                return Path(found).parent
    except HFValidationError:  # no name on the hub
        pass
    return None


@cache
def revision(name: str) -> str | None:
    """The commit that a data set on the hub is at, all 40 digits, as the hub wants it; None without an answer."""
    if ask(name, "dataset") != "known":
        return None
    try:
        return HfApi().dataset_info(name, timeout=SECONDS).sha
    except Exception:  # as in ``ask``
        return None


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Uploads a model's files as the repository ``name``, which is made if it isn't there. Returns its address.

    The card is checked by the hub before anything is made.

    Raises:
        KronyError: the folder has no card or one that the hub doesn't take, or a link out of it, nobody is logged in,
            this account may not write there, or the hub can't be reached. No sentence holds the token.
    """
    card = folder / "README.md"
    if not card.is_file():
        raise KronyError(f"{card} is missing: it is the card that the hub shows, and krony's verbs write one")
    patterns = [escape(name) for name in _to_upload(folder)]
    if constants.HF_HUB_OFFLINE:
        raise KronyError("HF_HUB_OFFLINE is set, and push needs the hub: unset it")
    if get_token() is None:
        raise KronyError("the hub asks who you are: log in with hf auth login, or set HF_TOKEN")
    api = HfApi()
    try:
        _check_card(card)
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload by krony", allow_patterns=patterns
        )
    except HFValidationError as error:
        raise KronyError(f"{name!r} can't be the name of a repository: {_plain(error)}") from None
    except HfHubHTTPError as error:
        raise KronyError(f"the hub refuses {name}: {_plain(error)}") from None
    except Exception as error:
        if not type(error).__module__.startswith("http"):  # the hub's http client, which is another in other versions
            raise
        raise KronyError(f"the hub can't be reached ({type(error).__name__}: {_plain(error)})") from None
    return str(address)


def _to_upload(folder: Path) -> list[str]:
    """The names of the files of ``folder`` that ``push`` uploads: the model's, without hidden ones.

    Of the folders in it only the one with chat templates is the model's. Logs of a training name the machine, its user
    and the command line. Raises KronyError for a link out of the folder.
    """
    files = [path for where in (folder, folder / TEMPLATES) if where.is_dir() for path in sorted(where.iterdir())]
    files = [path for path in files if path.is_file() and not path.name.startswith(".")]
    for path in files:
        check_link(folder, path)
    return [path.relative_to(folder).as_posix() for path in files]


def _check_card(card: Path) -> None:
    """Raises KronyError for a card that the hub doesn't take, and what its client raises where it doesn't answer."""
    try:
        read = ModelCard.load(card)
    except Exception as error:  # the hub's client raises whatever its parser of yaml does
        raise KronyError(f"{card}: its metadata can't be read: {_plain(error)}") from None
    try:
        read.validate()
    except ValueError as error:
        raise KronyError(f"{card}: the hub doesn't take this card: {_plain(error)}") from None


def _plain(error: Exception) -> str:
    """What an error says in one line, without the token."""
    said = getattr(error, "server_message", None) or str(error)
    return " ".join(said.replace(get_token() or "\0", "…").split())
