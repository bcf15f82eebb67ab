"""Pushing to the Hugging Face Hub: what goes (``parcels``), how (``delivery``), and what may refuse it (``refusals``).

One artefact goes to one repository. The one rule of our own: an adapter and merged weights never share a repository.
transformers 5 looks for an adapter beside the weights it loads and applies it, so a repository with both answers as if
the adapter had been applied twice. The folder is checked before anything is sent, the repository's list of files before
anything is added.
"""

from __future__ import annotations

from pathlib import Path

from medcot.hub.delivery import Delivery, Verify, deliver
from medcot.hub.parcels import Kind, Parcel, pack, pack_folder
from medcot.hub.refusals import MismatchError

__all__ = ["Delivery", "Kind", "MismatchError", "Parcel", "Verify", "deliver", "pack", "pack_folder", "push_folder"]


def push_folder(
    folder: Path, repo_id: str, *, private: bool = True, token: str | None = None, endpoint: str | None = None
) -> str:
    """Upload a folder to a model repository, created if need be, and return the repository's address.

    Args:
        folder: an adapter, a merged model or GGUF files; only the files that belong to it go along.
        repo_id: ``owner/name``.
        private: visibility of a repository that is created; an existing public one is refused where this is true.
        token: a write token; ``None`` uses the library's own log-in.
        endpoint: the Hub's address, for a Hub of one's own.

    Raises:
        OutputError: nothing to push, no permission, or adapter and merged weights would meet.
        NetworkError: the Hub does not answer.
    """
    kind, parcels, _ = pack_folder(folder)
    return deliver(parcels, kind, repo_id, private=private, token=token, endpoint=endpoint).url
