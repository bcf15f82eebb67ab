"""What the Hub or the network says no with, as errors of ours: value, rule, remedy, and whether waiting may help.

The client wraps what it meets in many ways: an HTTP status of the Hub's own, one of the storage behind it inside a
``RuntimeError``, a cut connection as httpx has it, an answer of the LFS batch as ``ValueError``. Only two questions
matter here: can the user do something about it, or will it pass? What passes is a ``PassingError``, and
``delivery.py`` begins again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from medcot.errors import MedcotError, NetworkError, OutputError
from medcot.secrets import redact

LOG_IN = "Run 'hf auth login', or set HF_TOKEN, with a token that may write (https://huggingface.co/settings/tokens)"
AGAIN = "Run the same command again: what has arrived is not sent twice, and nothing shows until all is there"
_CONFLICTS = (409, 412)  # somebody else's commit came first
_WAITING = (408, 425, 429, 500, 502, 503, 504)
_NO_ROOM = (402, 413, 507)


class PassingError(NetworkError):
    """A failure of the moment: the same again, a little later, may well succeed."""


class MismatchError(OutputError):
    """What the Hub holds is not what was sent."""

    exit_code = 1


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into value, rule, remedy; tokens are taken out of the client's words."""
    import httpx
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.HFValidationError as error:
        raise OutputError(
            f"'{repo_id}' is no repository id: {first_line(error)}", "It is owner/name", "Correct it"
        ) from None
    except hub.HfHubHTTPError as error:
        words = redact(error.server_message or "") or first_line(error)
        raise _refused(repo_id, error.response.status_code, " ".join(words.split())) from None
    except hub.OfflineModeIsEnabled:
        raise NetworkError(
            f"HF_HUB_OFFLINE is set, while pushing to '{repo_id}'",
            "A push needs a network",
            "Unset it; with --dry-run nothing is sent and no network is needed",
        ) from None
    except httpx.HTTPError as error:
        raise PassingError(
            f"the Hub does not answer while pushing to '{repo_id}': {type(error).__name__}",
            "A push needs a network",
            AGAIN,
        ) from None


@contextlib.contextmanager
def upload_errors(repo_id: str) -> Iterator[None]:
    """Turn what goes wrong between client and storage into our errors; a signed address that ran out passes too."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with hub_errors(repo_id):
            yield
    except MedcotError:
        raise
    except (RuntimeError, OSError) as error:  # the client's, and hf_xet's, around what the storage said
        cause = error.__cause__
        why = f"{cause.response.status_code}" if isinstance(cause, HfHubHTTPError) else type(cause or error).__name__
        raise PassingError(
            f"{first_line(error).rstrip('.')} ({why})", "All files reach the Hub before any shows", AGAIN
        ) from None
    except ValueError as error:  # the LFS batch's refusal of single files, and front matter that the Hub cannot read
        raise OutputError(
            f"the Hub refuses a file of '{repo_id}': {' '.join(redact(str(error)).split())}",
            "Every file of an artefact goes to the Hub, or none",
            "Look at the reason; where it is storage, free some at https://huggingface.co/settings/billing",
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of a client's words, without tokens."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])


def _refused(repo_id: str, status: int, words: str) -> MedcotError:
    if status == 401:
        return OutputError(f"the Hub does not accept the token for '{repo_id}'", "It must be valid", LOG_IN)
    if status in _NO_ROOM or (status == 403 and "storage" in words.lower()):
        return OutputError(
            f"the Hub has no room for '{repo_id}' ({status}): {words}",
            "Private storage has a limit that goes with the account",
            "Free some or get more at https://huggingface.co/settings/billing, or push a smaller kind",
        )
    if status in (403, 404):
        return OutputError(
            f"the token may not write to '{repo_id}' ({status})",
            "Writing needs a write token of the owner or of a member with that right",
            f"Check the owner's name. {LOG_IN}",
        )
    if status in _CONFLICTS:
        return PassingError(
            f"'{repo_id}' was changed by somebody else meanwhile ({status})",
            "A push adds to the state it looked at",
            AGAIN,
        )
    kind = PassingError if status in _WAITING else NetworkError
    return kind(
        f"the Hub answered {status} while pushing to '{repo_id}': {words}",
        "A push needs the Hub to accept every file",
        AGAIN,
    )
