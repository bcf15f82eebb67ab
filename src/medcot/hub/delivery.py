"""How a push travels: everything is uploaded first, then appears in one commit, and is read back.

``upload_folder`` is the usual way. With hf_xet installed, huggingface_hub 1.33 streams a folder in several commits
(``_upload_pipeline.py``), so a push that is cut shows some of its files, and whoever downloads then gets half a model
that looks like one. Here the large files are put into the Hub's storage first (``preupload_lfs_files``), where nobody
sees them, and one commit then makes all of them files of the repository. A cut before that commit leaves the repository
as it was; the same push again finds in storage what had arrived and sends the rest.

The commit names its parent. So a commit that was made while its answer was lost, or after an error 500 (both happen:
https://github.com/huggingface/datasets/pull/7708), is not made twice: the second attempt is refused with 412, looks
again, and finds its files there. Somebody else's commit in between is met the same way.

Afterwards every file is compared with what the Hub reports at that commit: sha256 of a large file, git's blob id of a
small one. Of a large file the Hub reports what the client said when it sent it, so small ones are also downloaded, and
with ``Verify.DOWNLOAD`` all of them: only that proves the stored bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from medcot.errors import OutputError
from medcot.hub.parcels import Kind, Parcel, check_no_secrets, find_kinds, is_weights
from medcot.hub.refusals import LOG_IN, MismatchError, PassingError, hub_errors, upload_errors
from medcot.quiet import quiet_libraries

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

PAUSES_S = (1.0, 4.0, 10.0)  # between attempts; the client itself tries each upload six times
SMALL_BYTES = 10 * 2**20
_CONFIG = "config.json"


class Verify(StrEnum):
    """What is read back after a push, besides the hashes that the Hub reports."""

    HASH = "hash"  # nothing
    SMALL = "small"  # files up to SMALL_BYTES are downloaded
    DOWNLOAD = "download"  # all are


@dataclass(frozen=True, slots=True)
class Delivery:
    """A push that arrived.

    Attributes:
        url: the repository's address.
        commit: the commit that holds every file as it was sent.
        num_files: files of the push.
        num_changed: of those, how many were not there before; 0 means that no commit was made.
        num_downloaded: of those, how many were downloaded and compared.
        removed: weights of an earlier push that belonged to no file of this one.
        private: the repository's visibility.
    """

    url: str
    commit: str
    num_files: int
    num_changed: int
    num_downloaded: int
    removed: tuple[str, ...]
    private: bool


def deliver(
    parcels: Sequence[Parcel],
    kind: Kind,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    verify: Verify = Verify.SMALL,
    tell: Callable[[str], None] = lambda _: None,
    wait: Callable[[float], None] = time.sleep,
) -> Delivery:
    """Bring files to a model repository, created if need be, in one commit; do nothing if they are there already.

    Args:
        parcels: all files of the artefact.
        kind: what they are; a repository holds one kind.
        repo_id: ``owner/name``.
        private: how a repository is created; a public one is refused where private is meant, a private one stays so.
        token: a write token; ``None`` uses the library's own log-in.
        endpoint: the Hub's address, for a Hub of one's own.
        verify: what is downloaded again.
        tell: is called with a sentence before a pause.
        wait: sleeps.

    Raises:
        OutputError: no permission, no room, another kind is there, a file holds a secret.
        MismatchError: the Hub holds other bytes than were sent.
        NetworkError: the Hub does not answer, or refuses again and again.
    """
    from huggingface_hub import HfApi, get_token

    check_no_secrets(parcels)
    token = token or get_token()
    if token is None:
        raise OutputError(f"no Hugging Face token to push to '{repo_id}'", "The Hub takes uploads with a token", LOG_IN)
    job = _Job(HfApi(endpoint=endpoint, token=token), repo_id, kind, parcels, verify, token)
    with quiet_libraries():
        for pause in PAUSES_S:
            try:
                return job.attempt(private=private)
            except PassingError as error:
                if not job.has_contact:  # never an answer: a wrong address or no network, which seconds do not change
                    raise
                tell(f"{error.value}; trying again in {pause:g} s")
                wait(pause)
        return job.attempt(private=private)


class _Job:
    """One push, attempted as often as it takes; what is known between attempts."""

    def __init__(
        self, api: HfApi, repo_id: str, kind: Kind, parcels: Sequence[Parcel], verify: Verify, token: str
    ) -> None:
        self.api, self.repo_id, self.kind, self.parcels, self.verify, self.token = (
            *(api, repo_id, kind),
            *(parcels, verify, token),
        )
        self.has_contact = False
        self.changed: set[str] = set()  # over all attempts: one may have been made whose answer was lost
        self.removed: tuple[str, ...] = ()

    def attempt(self, *, private: bool) -> Delivery:
        """Look, send what is not there, look again."""
        with hub_errors(self.repo_id):
            is_private, head = self._open(private)
            there = self._list(head)
            self._refuse_mixture(there, head)
            changed = [parcel for parcel in self.parcels if not _is_there(parcel, there)]
            stale = self._find_stale(there)
        self.changed |= {parcel.name for parcel in changed}
        self.removed = self.removed or stale
        commit = self._send(changed, stale, head) if changed or stale else head
        with hub_errors(self.repo_id):
            unlike = self._compare(self._list(commit), commit)
            num_downloaded = self._download(commit, unlike)
        url = f"{self.api.endpoint}/{self.repo_id}"
        counts = len(self.parcels), len(self.changed), num_downloaded
        return Delivery(url, commit, *counts, self.removed, is_private)

    def _open(self, private: bool) -> tuple[bool, str]:
        """Return the repository's visibility and its last commit; create it where there is none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self.api.repo_info(self.repo_id)
        except RepositoryNotFoundError:
            self.has_contact = True
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)
            info = self.api.repo_info(self.repo_id)
        self.has_contact = True
        if private and not info.private:
            raise OutputError(
                f"repository '{self.repo_id}' is public",
                "A push is private unless it is said to be public",
                "Add --public (push.private=false in a recipe), or name another repository",
            )
        return bool(info.private), str(info.sha)

    def _list(self, commit: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        tree = self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _refuse_mixture(self, there: dict[str, RepoFile], head: str) -> None:
        """Refuse to put two kinds into one repository."""
        others = sorted(find_kinds(there) - {self.kind})
        if others:
            named = {Kind.ADAPTER: "an adapter (adapter_config.json)", Kind.MODEL: "a model (config.json)"}
            rule = (
                "A repository holds one kind of artefact, so that a loader cannot take the wrong one"
                if Kind.GGUF in (*others, self.kind)
                else "An adapter and merged weights in one repository are both loaded, so the adapter acts twice"
            )
            raise OutputError(
                f"repository '{self.repo_id}' already holds {named.get(others[0], others[0])}",
                rule,
                "Push to another repository",
            )
        config = next((parcel for parcel in self.parcels if parcel.name == _CONFIG), None)
        if self.kind is Kind.MODEL and config is not None and _CONFIG in there:
            has = _is_quantised(self._fetch(_CONFIG, head))
            if has != _is_quantised(_read(config)):
                raise OutputError(
                    f"repository '{self.repo_id}' already holds {'4' if has else '16'}-bit weights",
                    "Weights of the same names would replace them",
                    "Push to another repository",
                )

    def _find_stale(self, there: dict[str, RepoFile]) -> tuple[str, ...]:
        """Return weights in the repository that would lie beside the new ones and belong to none of them.

        GGUF files stand each for itself, so those of earlier pushes stay.
        """
        if self.kind is Kind.GGUF:
            return ()
        names = {parcel.name for parcel in self.parcels}
        return tuple(sorted(name for name in there if is_weights(name, self.kind) and name not in names))

    def _send(self, changed: Sequence[Parcel], stale: Sequence[str], head: str) -> str:
        """Upload, then commit; return the commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [CommitOperationAdd(parcel.name, parcel.source) for parcel in changed]
        with upload_errors(self.repo_id):
            self.api.preupload_lfs_files(self.repo_id, additions=additions, free_memory=False)
            return self.api.create_commit(
                self.repo_id,
                operations=[*additions, *(CommitOperationDelete(name) for name in stale)],
                commit_message=f"Upload {self.kind} with medcot",
                parent_commit=head,
            ).oid

    def _compare(self, there: dict[str, RepoFile], commit: str) -> set[str]:
        """Return the files of which the Hub reports another checksum; a Hub of one's own may count in its own way."""
        for parcel in self.parcels:
            found = there.get(parcel.name)
            if found is None or found.size != parcel.num_bytes:
                met = "is not there" if found is None else f"has {found.size:,} bytes"
                raise _mismatch(self.repo_id, parcel, f"{met} at {commit[:12]}")
        return {parcel.name for parcel in self.parcels if not _is_there(parcel, there)}

    def _download(self, commit: str, unlike: set[str]) -> int:
        """Fetch files again, those of another checksum in any case, and compare their bytes; return how many."""
        limits = {Verify.HASH: -1, Verify.SMALL: SMALL_BYTES}
        limit = limits.get(self.verify)
        fetched = [p for p in self.parcels if limit is None or p.num_bytes <= limit or p.name in unlike]
        for parcel in fetched:
            digest = hashlib.sha256()
            self._fetch(parcel.name, commit, digest.update)
            if digest.hexdigest() != parcel.sha256:
                raise _mismatch(self.repo_id, parcel, f"comes back with other bytes (sha256 {digest.hexdigest()})")
        return len(fetched)

    def _fetch(self, name: str, commit: str, take: Callable[[bytes], object] | None = None) -> bytes:
        """Return a file's bytes, or hand them to ``take`` piece by piece.

        Not through ``hf_hub_download``: its cache would keep a second copy of the weights, and answer from it.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.repo_id, name, revision=commit, endpoint=self.api.endpoint)
        kept = bytearray()
        # "identity": what is compared are the stored bytes, not what a compressing proxy makes of them.
        headers = {**build_hf_headers(token=self.token), "Accept-Encoding": "identity"}
        with http_stream_backoff("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            for piece in response.iter_bytes():
                (take or kept.extend)(piece)
        return bytes(kept)


def _is_there(parcel: Parcel, there: dict[str, RepoFile]) -> bool:
    found = there.get(parcel.name)
    if found is None or found.size != parcel.num_bytes:
        return False
    return found.lfs.sha256 == parcel.sha256 if found.lfs is not None else found.blob_id == parcel.blob_id


def _read(parcel: Parcel) -> bytes:
    return parcel.source if isinstance(parcel.source, bytes) else parcel.source.read_bytes()


def _is_quantised(config: bytes) -> bool:
    return b'"quantization_config"' in config


def _mismatch(repo_id: str, parcel: Parcel, met: str) -> MismatchError:
    return MismatchError(
        f"'{parcel.name}' in '{repo_id}' {met}",
        f"It was sent with {parcel.num_bytes:,} bytes and sha256 {parcel.sha256}",
        "Push again; if it stays so, delete the repository and push to a new one",
    )
