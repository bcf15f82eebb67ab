"""The rows of a data set on the Hugging Face Hub, by way of the ``datasets`` library, imported only when needed.

We call its builder (the first half of ``load_dataset``) rather than ``load_dataset`` itself, because the builder knows
the commit it resolved to, and lets a missing configuration, a missing split and a broken download be told apart by
where they happen. What the library does in silence is said aloud here: when the Hub does not answer, it falls back to
whatever copy lies in its cache, of any revision. The rows stay in the library's memory-mapped files and are made into
Python objects a batch at a time.

Sources: the exceptions are those raised by ``datasets.load.dataset_module_factory`` and ``huggingface_hub.errors``
(https://huggingface.co/docs/huggingface_hub/package_reference/utilities#huggingface_hub.errors).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from medcot.data.files import Part, Places, suggest_path
from medcot.data.formats import STRIDE, RawRow
from medcot.errors import DataError, MedcotError, NetworkError, OutputError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

_TIMEOUT_S = 20  # for the first word from the Hub
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WORK_OFFLINE = (
    "To work offline, download the data file on another machine and pass its path, or set HF_HUB_OFFLINE=1"
    " where an earlier run has filled the cache"
)


class HubRows:
    """The rows of a split, each with the data set's id; an iteration is one pass.

    Attributes:
        revision: the commit, where known.
        num_rows: rows given so far.
        places: all lie in one place.
        parts: no files, as far as the user is concerned.
        notes: what the reader should know of how it was read.
    """

    def __init__(
        self, name: str, config: str | None, split: str, revision: str | None, limit: int | None, token: str | None
    ) -> None:
        self._name = name
        dataset, self.revision, self.notes = _open_split(name, config, split, revision, token)
        first = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
        self._rows = first.with_format("arrow")  # nothing is decoded into pictures or sound on the way
        self._digest = hashlib.sha256()
        self.num_rows = 0
        self.places = Places((name,))
        self.parts: tuple[Part, ...] = ()

    def __iter__(self) -> Iterator[tuple[RawRow, str]]:
        """Yield each row with the id."""
        self.num_rows, self._digest = 0, hashlib.sha256()
        for batch in self._rows.iter(STRIDE):
            for row in batch.to_pylist():
                self._digest.update(_canonical_line(row))
                self.num_rows += 1
                yield row, self._name

    def fetch(self, numbers: Sequence[int]) -> dict[int, RawRow]:
        """Return rows by number, counted from 1."""
        wanted = sorted(set(numbers))
        return dict(zip(wanted, self._rows[[number - 1 for number in wanted]].to_pylist(), strict=True))

    @property
    def sha256(self) -> str:
        """That of the rows taken, in canonical JSON, one a line: sorted keys, no spaces, UTF-8."""
        assert self.num_rows == len(self._rows), "known when the pass has ended"
        return self._digest.hexdigest()


def _open_split(
    name: str, config: str | None, split: str, revision: str | None, token: str | None
) -> tuple[Dataset, str | None, tuple[str, ...]]:
    """Return a Hub data set's split, its commit where known, and notes."""
    import datasets

    with _quiet(datasets), _explain_hub(name, revision):
        builder = _load_builder(name, config, revision, token)
        commit, notes = _check_revision(builder, name, revision)
        builder.download_and_prepare()
        known = list(builder.info.splits or {})
        for wanted in (part.split("[")[0].strip() for part in split.split("+")):
            if wanted not in known and wanted != "all":
                raise DataError(
                    f"'{name}' has no split '{wanted}'",
                    f"Its splits are {', '.join(known)}",
                    _choose(wanted, known, "data.split"),
                )
        try:
            dataset = builder.as_dataset(split=split)
        except ValueError as error:
            raise DataError(
                f"'{split}' cannot be taken from '{name}' ({_first_line(error)})",
                "A split is a name, or a name with a slice such as train[:10%]",
                "Set data.split=train",
            ) from error
    if not len(dataset):
        raise DataError(f"'{name}' holds no rows in split '{split}'", "Training needs rows", "Choose another split")
    return dataset, commit, notes


def _load_builder(name: str, config: str | None, revision: str | None, token: str | None) -> DatasetBuilder:
    """Resolve a Hub id to a builder; the library reports a wrong configuration and a script as plain errors."""
    import datasets
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        try:
            # Asked first because it answers precisely and, without a network, at once; datasets retries for 24 s.
            HfApi(token=token).dataset_info(name, revision=revision, timeout=_TIMEOUT_S)
        except (
            httpx.TransportError,
            ConnectionError,
            json.JSONDecodeError,
        ) as error:  # the last: a hotel's log-in page
            return _find_cached(name, config, _unreachable(name, error))
        except HfHubHTTPError as error:
            if error.response.status_code < 500 and error.response.status_code != 429:
                raise
            return _find_cached(name, config, _http_error(name, error.response.status_code))
        return datasets.load_dataset_builder(name, config, revision=revision, token=token)
    except HFValidationError as error:  # a ValueError too, so it comes first
        raise DataError(
            f"'{name}' is not a valid Hub id ({_first_line(error)})", "A Hub id has the form owner/name", "Correct it"
        ) from error
    except ValueError as error:
        raise _explain_config(name, config, error) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise DataError(f"'{name}' is a Python script", "Remote code is never run to get data", _BY_HAND) from error


def _find_cached(name: str, config: str | None, failure: MedcotError) -> DatasetBuilder:
    """Return the newest copy in the library's cache, or raise ``failure`` where there is none."""
    from datasets.packaged_modules.cache.cache import Cache

    try:
        return Cache(
            repo_id=name, dataset_name=name.rpartition("/")[2], config_name=config, version="auto", hash="auto"
        )
    except ValueError as error:
        if _list_configs(str(error)):
            raise  # other configurations are there
        raise failure from None


def _explain_config(name: str, config: str | None, error: ValueError) -> DataError:
    """Tell a wrong or missing configuration from files that cannot be read; both come as a ``ValueError``."""
    listed = _list_configs(str(error))
    if not listed:
        return DataError(f"'{name}' cannot be loaded ({_first_line(error)})", "Its files must be readable", _BY_HAND)
    if config is None:
        return DataError(
            f"'{name}' has several configurations", f"They are {', '.join(listed)}", f"Set data.config={listed[0]}"
        )
    return DataError(
        f"'{name}' has no configuration '{config}'",
        f"It offers {', '.join(listed)}",
        _choose(config, listed, "data.config"),
    )


def _list_configs(message: str) -> list[str]:
    """Return the configurations that an error of the library lists; of its four wordings one has no brackets."""
    loose = re.search(r"configurations in the cache: ([^\n]+)", message)
    if loose:
        return [name.strip() for name in loose[1].split(",")]
    bracketed = re.search(r"(?:[Aa]vailable|[Cc]onfig)[^\[\n]*\[('[^\]]*')\]", message)
    return re.findall(r"'([^']*)'", bracketed[1]) if bracketed else []


_BY_HAND = "Download its data file (JSON, JSON Lines, CSV or Parquet) from its page and pass the path"


def _check_revision(builder: DatasetBuilder, name: str, revision: str | None) -> tuple[str | None, tuple[str, ...]]:
    """Return the commit and, where the cache had to stand in for the Hub, a note.

    Raises:
        NetworkError: the cache stands in, and cannot be shown to hold the revision asked for.
    """
    from datasets.packaged_modules.cache.cache import Cache

    commit = builder.hash if builder.hash and _COMMIT.fullmatch(builder.hash) else None
    if not isinstance(builder, Cache):
        return commit, ()
    if revision is not None and not (commit and len(revision) >= 7 and commit.startswith(revision)):
        raise NetworkError(
            f"Revision '{revision}' of '{name}' cannot be had: the Hub does not answer, and the cache holds {commit}",
            "A pinned revision is never replaced by another",
            f"Connect, or set data.revision={commit or 'null'} to use the cached copy",
        )
    where = f"commit {commit}" if commit else "of unknown commit"
    return commit, (f"The Hub gave no answer for {name}, so the copy in the local cache was read ({where})",)


@contextlib.contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """Silence bars and log lines of ``datasets`` and the Hub client meanwhile, and leave their settings as they were.

    Even their error lines: each belongs to an exception, which becomes a message of ours.
    """
    from huggingface_hub import utils as hub

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = [(lib, lib.are_progress_bars_disabled()) for lib in (datasets, hub)]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        for lib, _ in bars:
            lib.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for lib, were_off in bars:
            if not were_off:
                lib.enable_progress_bars()


@contextlib.contextmanager
def _explain_hub(name: str, revision: str | None) -> Iterator[None]:
    """Turn what ``datasets``, ``huggingface_hub`` and ``httpx`` raise into errors with a rule and a remedy."""
    import httpx
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError
    from huggingface_hub import errors as hub

    try:
        yield
    except MedcotError:
        raise
    except hub.GatedRepoError as error:
        raise _gated(name) from error
    except hub.RevisionNotFoundError as error:
        raise _no_revision(name, revision) from error
    except hub.RepositoryNotFoundError as error:
        raise _not_found(name) from error
    except DatasetNotFoundError as error:
        raise _explain_not_found(name, revision, str(error)) from error
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        raise DataError(f"'{name}' holds no data files", "Its page must list JSON, CSV or Parquet", _BY_HAND) from error
    except hub.HfHubHTTPError as error:
        raise _http_error(name, error.response.status_code) from error
    except (hub.LocalEntryNotFoundError, httpx.TransportError, ConnectionError, TimeoutError) as error:
        raise _unreachable(name, error) from error
    except DatasetsError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            raise _disk_full(name, cause) from error
        raise DataError(
            f"'{name}' cannot be made into rows ({_first_line(cause)})",
            "Its files must be whole and agree in their columns",
            _BY_HAND,
        ) from error
    except FileNotFoundError as error:
        raise _not_found(name) from error
    except OSError as error:
        if not str(error).startswith("Not enough disk space") and error.errno != errno.ENOSPC:
            raise
        raise _disk_full(name, error) from error


def _disk_full(name: str, error: OSError) -> OutputError:
    return OutputError(
        f"No disk space to download '{name}' ({_first_line(error)})",
        "Hub data sets are kept in the Hugging Face cache",
        "Free some space, or set HF_HOME to a folder on another disk",
    )


def _unreachable(name: str, error: Exception) -> NetworkError:
    return NetworkError(
        f"The Hub cannot be reached for '{name}' ({type(error).__name__})",
        "A data set that is not on this disk has to be downloaded",
        _offline_remedy(name),
    )


def _explain_not_found(name: str, revision: str | None, message: str) -> DataError:
    """``datasets`` has one class for three causes, told apart only by its own wording."""
    if "gated" in message:
        return _gated(name)
    return _no_revision(name, revision) if message.startswith("Revision ") else _not_found(name)


def _gated(name: str) -> DataError:
    return DataError(
        f"'{name}' is a gated data set",
        "Its owner grants access to accounts, one by one",
        f"Ask for access on https://huggingface.co/datasets/{name}, then set HF_TOKEN or run 'hf auth login'",
    )


def _no_revision(name: str, revision: str | None) -> DataError:
    return DataError(
        f"'{name}' has no revision '{revision}'",
        "A revision is a branch, a tag or a commit of the data set",
        f"See https://huggingface.co/datasets/{name}/commits/main, or set data.revision=null",
    )


def _not_found(name: str) -> DataError:
    local = suggest_path(Path(name))
    return DataError(
        f"'{name}' is not on the Hub, or private, and not a file or folder in {Path.cwd()}",
        "A source is a path or the Hub id of a data set (not of a model)",
        local or "Check the spelling; for a private data set set HF_TOKEN or run 'hf auth login'",
    )


def _http_error(name: str, status: int) -> MedcotError:
    """Say what an HTTP status means; the body is not quoted, since signed addresses in it are secrets."""
    if status in (401, 403):
        return DataError(
            f"The Hub refuses '{name}' (HTTP {status})",
            "A private data set needs a token with read access",
            "Set HF_TOKEN or run 'hf auth login', and check the token's rights",
        )
    return NetworkError(
        f"The Hub failed on '{name}' (HTTP {status})",
        "The Hub must answer",
        f"Try again later. {_offline_remedy(name)}",
    )


def _offline_remedy(name: str) -> str:
    local = suggest_path(Path(name))
    return f"{_WORK_OFFLINE}. If a local file was meant: {local}" if local.startswith("Did") else _WORK_OFFLINE


def _choose(word: str, known: list[str], key: str) -> str:
    """Return the nearest of the names that the message has listed already, or the key to set."""
    near = did_you_mean(word, known)
    return near if near.startswith("Did") else f"Set {key} to one of them"


def _canonical_line(row: RawRow) -> bytes:
    """Return a row as the checksum takes it."""
    text = json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_canonical)
    return text.encode() + b"\n"


def _canonical(value: object) -> str:
    """Return what JSON lacks (bytes, dates, decimals: the rest of Arrow's types) as text that never varies."""
    return value.hex() if isinstance(value, bytes) else str(value)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:160]
