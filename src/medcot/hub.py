"""Pushing a saved folder to the Hugging Face Hub.

One folder goes to one repository, through ``create_repo`` and ``upload_folder``. The one rule of our own: an adapter
and merged weights never share a repository. transformers 5 looks for an adapter beside the weights it loads and applies
it, so a repository with both answers as if the adapter had been applied twice. The folder is checked before anything is
sent, the repository's list of files before anything is added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from medcot.errors import MedcotError, NetworkError, OutputError
from medcot.quiet import quiet_libraries
from medcot.secrets import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG_IN = "Run 'hf auth login', or set HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)"


def push_folder(
    folder: Path, repo_id: str, *, private: bool = True, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a folder to a model repository, created if need be, and return the repository's address.

    Args:
        folder: an adapter or a merged model, as export.py writes them; nested folders go along.
        repo_id: ``owner/name``.
        private: visibility of a repository that is created; an existing one keeps its own.
        token: a write token; ``None`` uses the library's own log-in.
        endpoint: the Hub's address, for a Hub of one's own.

    Raises:
        OutputError: nothing to push, no permission, or adapter and merged weights would meet.
        NetworkError: the Hub does not answer.
    """
    from huggingface_hub import HfApi, get_token

    kind = _kind_of({path.name for path in folder.iterdir()} if folder.is_dir() else set())
    if kind is None:
        raise OutputError(
            f"'{folder}' holds neither an adapter nor a model alone",
            "A push takes one folder with an adapter (adapter_config.json) or a merged model (config.json)",
            "Push the run's adapter/ or merged/ folder",
        )
    token = token or get_token()
    if token is None:
        raise OutputError(f"no Hugging Face token to push to '{repo_id}'", "The Hub takes uploads with a token", LOG_IN)
    api = HfApi(endpoint=endpoint, token=token)
    with _hub_errors(repo_id), quiet_libraries():
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        _refuse_mixture(api, url.repo_id, kind)
        api.upload_folder(folder_path=folder, repo_id=url.repo_id, commit_message=f"Upload {kind} with medcot")
    return str(url)


def _kind_of(names: set[str]) -> str | None:
    """Return "adapter" or "merged model"; ``None`` for neither and for both."""
    is_adapter, is_model = "adapter_config.json" in names, "config.json" in names
    if is_adapter == is_model:
        return None
    return "adapter" if is_adapter else "merged model"


def _refuse_mixture(api: HfApi, repo_id: str, kind: str) -> None:
    names = set(api.list_repo_files(repo_id))
    other = "config.json" if kind == "adapter" else "adapter_config.json"
    if other in names:
        raise OutputError(
            f"repository '{repo_id}' already holds {'a model' if kind == 'adapter' else 'an adapter'} ({other})",
            "An adapter and merged weights in one repository are both loaded, so the adapter acts twice",
            "Push to another repository",
        )


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into value, rule, remedy; tokens are taken out of the client's words."""
    import httpx
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.HFValidationError as error:
        raise OutputError(
            f"'{repo_id}' is no repository id: {str(error).splitlines()[0]}", "It is owner/name", "Correct it"
        ) from None
    except hub.HfHubHTTPError as error:
        raise _refused(repo_id, error.response.status_code, redact(str(error).strip().splitlines()[0])) from None
    except (hub.OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise NetworkError(
            f"the Hub does not answer while pushing to '{repo_id}': {type(error).__name__}",
            "A push needs a network",
            "Try again later; the folder is kept, and 'hf upload' can send it as well",
        ) from None


def _refused(repo_id: str, status: int, words: str) -> MedcotError:
    if status == 401:
        return OutputError(f"the Hub does not accept the token for '{repo_id}'", "It must be valid", LOG_IN)
    if status in (403, 404):
        return OutputError(
            f"the token may not write to '{repo_id}' ({status})",
            "Writing needs a write token of the owner or of a member with that right",
            f"Check the owner's name. {LOG_IN}",
        )
    return NetworkError(
        f"the Hub answered {status} while pushing to '{repo_id}': {words}",
        "A push needs the Hub to accept every file",
        "Try again later; the folder is kept",
    )
