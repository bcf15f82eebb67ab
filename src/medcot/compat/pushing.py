"""Pushing as the tutorial does: adapter, tokenizer and merged weights, all to one repository, privately.

Every push goes through ``hub.deliver``: nothing shows before all is there, and what arrived is read back and compared.
That function keeps adapters and merged weights in repositories of their own. The tutorial puts both into one, so here
the adapter is first moved to ``adapter/`` there, in one commit, as ``saving`` does in a folder. Between that commit and
the merged weights' own, the repository holds an adapter where only those find it who ask for it.

Adapters and tokenizers that are put beside other files go in a commit of their own, which ``deliver`` knows nothing of.

transformers' ``push_to_hub`` creates public repositories. A model tuned on clinical text should not be public by
default: here only ``private=False`` makes it so, and a repository that is public already is refused.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot.compat import saving
from medcot.compat.notes import pass_over, say_once
from medcot.errors import OutputError
from medcot.export.adapter import ADAPTER_FILES
from medcot.hub import Kind, Parcel, deliver, pack, pack_folder
from medcot.hub.parcels import check_no_secrets
from medcot.quiet import quiet_libraries
from medcot.secrets import SecretName, find_secret

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MESSAGE = "is not needed: medcot names its commits"
IDLE_PUSHING = {
    **saving.IDLE_SAVING,
    "commit_message": _MESSAGE,
    "commit_description": _MESSAGE,
    "create_pr": "is not needed: a push goes to the main branch",
    "use_temp_dir": "is not needed: a push is put together in a temporary folder",
    "datasets": "is not needed: a card made by 'medcot push' names the data",
}
KNOWN = ("repo_id", "tokenizer", "save_method", "private", "token")


def push_adapter(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    private: bool | None = None,
    token: str | None = None,
    **others: Any,
) -> str:
    """Push the adapter and return the repository's address; beside merged weights it goes to ``adapter/``.

    Args:
        model: with an adapter.
        repo_id: ``owner/name``, or a name of the token's owner.
        tokenizer: the model's own if ``None``.
        private: only ``False`` makes it public.
        token: a write token; ``None`` takes that of ``from_pretrained``, else what ``medcot doctor`` shows.
        **others: accepted where they have no meaning here, and said once.

    Raises:
        MedcotError: no token, no permission, no network, or a public repository.
    """
    pass_over(others, IDLE_PUSHING, "model.push_to_hub", KNOWN)
    with _opened(repo_id, private, token) as remote, tempfile.TemporaryDirectory() as scratch:
        kind, parcels, _ = pack_folder(saving.write_adapter(model, tokenizer, Path(scratch)))
        if saving.MODEL not in remote.names:
            return remote.deliver(parcels, kind)
        say_once(f"the adapter goes to adapter/ in {remote.repo_id}: beside merged weights it would be applied twice")
        remote.commit(_nested(parcels), "Upload adapter")
        return remote.url


def push_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    private: bool | None = None,
    token: str | None = None,
    **others: Any,
) -> str:
    """Push merged weights and return the repository's address; an adapter that is there moves to ``adapter/``.

    Args:
        model: with an adapter.
        repo_id: as for ``push_adapter``.
        tokenizer: the model's own if ``None``.
        save_method: ``merged_16bit``, ``merged_4bit`` or ``lora``.
        private: as for ``push_adapter``.
        token: as for ``push_adapter``.
        **others: accepted where they have no meaning here, and said once.

    Raises:
        MedcotError: as for ``push_adapter``, or weights that cannot be merged.
    """
    pass_over(others, IDLE_PUSHING, "model.push_to_hub_merged", KNOWN)
    method = saving.check_method(save_method)
    if method == "lora":
        return push_adapter(model, repo_id, tokenizer, private, token)
    with _opened(repo_id, private, token) as remote, tempfile.TemporaryDirectory() as scratch:
        merged = saving.write_merged(model, tokenizer, method, Path(scratch))
        if saving.ADAPTER in remote.names:
            _, parcels, _ = pack_folder(Path(scratch) / saving.NESTED)
            remote.commit(_nested(parcels), "Move the adapter", removed=ADAPTER_FILES)
            say_once(f"the adapter in {remote.repo_id} moved to adapter/: beside merged weights it would apply twice")
        kind, parcels, _ = pack_folder(merged)
        return remote.deliver(parcels, kind)


def push_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "q8_0",
    private: bool | None = None,
    token: str | None = None,
    **others: Any,
) -> str:
    """Push merged weights as GGUF files and return the repository's address; arguments as for the others."""
    pass_over(others, IDLE_PUSHING, "model.push_to_hub_gguf", (*KNOWN, "quantization_method"))
    with _opened(repo_id, private, token) as remote, tempfile.TemporaryDirectory() as scratch:
        saving.save_gguf(model, Path(scratch) / "gguf", tokenizer, quantization_method)
        kind, parcels, _ = pack_folder(Path(scratch) / "gguf")
        return remote.deliver(parcels, kind)


def push_tokenizer(
    tokenizer: Any, repo_id: str, private: bool | None = None, token: str | None = None, **others: Any
) -> str:
    """Push a tokenizer beside what is in the repository, and return its address; arguments as for the others."""
    pass_over(others, IDLE_PUSHING, "tokenizer.push_to_hub", KNOWN)
    with _opened(repo_id, private, token) as remote, tempfile.TemporaryDirectory() as scratch:
        with quiet_libraries():
            tokenizer.save_pretrained(scratch)
        remote.commit([pack(path.name, path) for path in sorted(Path(scratch).iterdir())], "Upload tokenizer")
        return remote.url


class _Remote:
    """A repository that is to be written to.

    Attributes:
        names: its files.
        exists: whether it is there yet.
    """

    def __init__(self, api: HfApi, repo_id: str, private: bool) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        self.api, self.repo_id, self.private = api, repo_id, private
        self.names: set[str] = set()
        self.exists = False
        try:
            info = api.repo_info(repo_id)
        except RepositoryNotFoundError:
            return
        self.exists = True
        self.names = set(api.list_repo_files(repo_id))
        if private and not info.private:
            raise OutputError(
                f"repository '{repo_id}' is public",
                "A push is private unless it is said to be public",
                "Pass private=False, or name another repository",
            )

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo_id}"

    def deliver(self, parcels: Sequence[Parcel], kind: Kind) -> str:
        token = self.api.token
        assert isinstance(token, str)
        return deliver(parcels, kind, self.repo_id, private=self.private, token=token, endpoint=self.api.endpoint).url

    def commit(self, parcels: Sequence[Parcel], message: str, removed: Sequence[str] = ()) -> None:
        """Add files and remove others at once."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        check_no_secrets(parcels)
        added = [CommitOperationAdd(parcel.name, parcel.source) for parcel in parcels]
        with quiet_libraries():
            if not self.exists:
                self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            self.api.create_commit(
                self.repo_id,
                operations=[*added, *(CommitOperationDelete(name) for name in removed if name in self.names)],
                commit_message=f"{message} with medcot",
            )


@contextlib.contextmanager
def _opened(repo_id: str, private: bool | None, token: str | None) -> Iterator[_Remote]:
    """Look at a repository; what the Hub refuses meanwhile becomes an error of ours."""
    from huggingface_hub import HfApi

    from medcot.hub.refusals import LOG_IN, hub_errors

    secret = find_secret(SecretName.HUGGING_FACE)
    value = token if isinstance(token, str) else secret.value if secret else None
    if value is None:
        raise OutputError(f"no Hugging Face token to push to '{repo_id}'", "The Hub takes uploads with a token", LOG_IN)
    api = HfApi(token=value)
    with hub_errors(repo_id):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        yield _Remote(api, repo_id, private is not False)


def _nested(parcels: Sequence[Parcel]) -> list[Parcel]:
    return [replace(parcel, name=f"{saving.NESTED}/{parcel.name}") for parcel in parcels]
