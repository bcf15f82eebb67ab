"""Where tokens and keys are looked for (Hugging Face, Weights & Biases, model servers), and how they stay hidden.

Absent is fine: nothing in medcot needs an account. A secret is looked for where people really keep it, nearest first:
the environment, the notebook's own vault (Kaggle, Colab), then the log-in that the library itself stored. The usual way
with notebooks is to read the vault and write the value into ``os.environ``; then every child process, crash dump and
"log my environment" feature has it. Here the value is handed to the one call that needs it, and nothing is written.

A server's key is for one host. Clients usually send ``OPENAI_API_KEY`` wherever they are pointed, so a mistyped
address, or a friend's server, is handed the key to somebody's account. ``find_endpoint_key`` asks for the host first.

A ``Secret`` shows where it was found and never what it is: ``repr`` and ``str`` leave the value out, so neither a
traceback nor a log of local variables can leak it. ``redact`` is the second line of defence, for text made by others
(an HTTP error that quotes its headers): every known value in it becomes ``•••``.

Sources: the vault clients are Kaggle's ``kaggle_secrets.UserSecretsClient`` and Colab's ``google.colab.userdata``; W&B
keeps its log-in in a netrc file, whose place and host follow ``NETRC`` and ``WANDB_BASE_URL`` as in wandb itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import netrc
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

HIDDEN = "•••"
SHORTEST_REDACTED = 8  # characters; real keys have 37 and more, and replacing "test" everywhere would garble text


class SecretName(StrEnum):
    """The secrets medcot can use."""

    HUGGING_FACE = "Hugging Face token"
    WANDB = "Weights & Biases key"
    ENDPOINT = "API key of a model server"


@dataclass(frozen=True, slots=True)
class Secret:
    """One secret: ``where`` may be shown, ``value`` never is."""

    value: str = field(repr=False)
    where: str

    def __str__(self) -> str:
        return f"{HIDDEN} ({self.where})"


ENDPOINT_KEYS = {  # whose key each name holds, as these services' own documentation calls it
    "api.openai.com": "OPENAI_API_KEY",
    "api.deepseek.com": "DEEPSEEK_API_KEY",
    "openrouter.ai": "OPENROUTER_API_KEY",
}
OTHER_ENDPOINT_KEY = "MEDCOT_API_KEY"  # of every other host

ENVIRONMENT = {
    SecretName.HUGGING_FACE: ("HF_TOKEN", "HUGGINGFACE_TOKEN"),
    SecretName.WANDB: ("WANDB_API_KEY",),
    SecretName.ENDPOINT: (*ENDPOINT_KEYS.values(), OTHER_ENDPOINT_KEY),
}
VAULT = {  # names under which notebook vaults hold them; the tutorial's are HUGGINGFACE_TOKEN and wandb
    SecretName.HUGGING_FACE: ("HF_TOKEN", "HUGGINGFACE_TOKEN"),
    SecretName.WANDB: ("WANDB_API_KEY", "wandb"),
}

_given: dict[SecretName, Secret] = {}  # what a caller put into our hands, as ``token=`` of a function
_found: set[str] = set()  # values handed out by this process, so that redact knows them without asking a vault again


def find_secret(name: SecretName) -> Secret | None:
    """Return the first secret of that name among environment, notebook vault and library log-in, or ``None``."""
    assert name is not SecretName.ENDPOINT, "a server's key is for a host: find_endpoint_key"
    if name in _given:
        return _given[name]
    login = _hugging_face_login if name is SecretName.HUGGING_FACE else _wandb_login
    return _remember(_look_for(ENVIRONMENT[name], VAULT[name]) or login())


def take_secret(name: SecretName, value: str | None, where: str) -> None:
    """Keep a secret that a caller handed over, for this process alone; it is found before any other.

    Args:
        name: what it is.
        value: ``None`` forgets the one that was handed over before.
        where: how it came, in words that may be shown.
    """
    if value is None:
        _given.pop(name, None)
    else:
        _given[name] = Secret(value, where)
        _remember(_given[name])


def find_endpoint_key(host: str, label: str | None = None) -> Secret | None:
    """Return the key for a model server from the environment or a notebook vault, or ``None``.

    Args:
        host: the server's, in lower case, without a port.
        label: the name under which it is kept, where the user says it; otherwise it follows from the host.
    """
    labels = (label or ENDPOINT_KEYS.get(host, OTHER_ENDPOINT_KEY),)
    return _remember(_look_for(labels, labels))


def redact(text: str) -> str:
    """Return the text with the value of every known secret replaced by ``•••``.

    Known are the values in the environment, in the libraries' log-in files, and all that ``find_secret`` returned.
    """
    for value in sorted(set(_known_values()), key=len, reverse=True):  # longest first: one may contain another
        if len(value) >= SHORTEST_REDACTED:
            text = text.replace(value, HIDDEN)
    return text


def _known_values() -> Iterator[str]:
    yield from _found
    for names in ENVIRONMENT.values():
        yield from (os.environ.get(name, "").strip() for name in names)
    wandb_login = _wandb_login()
    if wandb_login is not None:
        yield wandb_login.value
    # Only a loaded huggingface_hub can have put its token into a text; loading it here would cost a fifth of a second.
    hub_login = _hugging_face_login() if "huggingface_hub" in sys.modules else None
    if hub_login is not None:
        yield hub_login.value


def _look_for(variables: tuple[str, ...], labels: tuple[str, ...]) -> Secret | None:
    return _from_environment(variables) or _from_kaggle(labels) or _from_colab(labels)


def _remember(secret: Secret | None) -> Secret | None:
    if secret is not None:
        _found.add(secret.value)
    return secret


def _from_environment(variables: tuple[str, ...]) -> Secret | None:
    for variable in variables:
        value = os.environ.get(variable, "").strip()
        if value:
            return Secret(value, f"environment variable {variable}")
    return None


@functools.cache  # each look-up is a request to Kaggle's server
def _from_kaggle(labels: tuple[str, ...]) -> Secret | None:
    if importlib.util.find_spec("kaggle_secrets") is None:
        return None
    kaggle_secrets = importlib.import_module("kaggle_secrets")
    # BackendError: no such secret, or not attached to this notebook. CredentialError: a kernel without secrets.
    absent = (kaggle_secrets.BackendError, kaggle_secrets.CredentialError, ConnectionError)
    for label in labels:
        try:
            value = kaggle_secrets.UserSecretsClient().get_secret(label)
        except absent:
            continue
        if value and value.strip():
            return Secret(value.strip(), f"Kaggle secret {label}")
    return None


@functools.cache  # each look-up may ask the person for permission
def _from_colab(labels: tuple[str, ...]) -> Secret | None:
    # Loaded means: this process is the notebook's kernel. In a child process ("!medcot run") the vault cannot answer.
    if "google.colab" not in sys.modules:
        return None
    userdata = importlib.import_module("google.colab.userdata")
    absent = (userdata.SecretNotFoundError, userdata.NotebookAccessError, userdata.TimeoutException)
    for label in labels:
        try:
            value = userdata.get(label)
        except absent:
            continue
        if value and value.strip():
            return Secret(value.strip(), f"Colab secret {label}")
    return None


def _hugging_face_login() -> Secret | None:
    from huggingface_hub import constants, get_token

    value = get_token()
    if not value:
        return None
    return Secret(value, f"Hugging Face log-in ({_short(Path(constants.HF_TOKEN_PATH))})")


def _wandb_login() -> Secret | None:
    path = Path(os.environ.get("NETRC") or Path.home() / ("_netrc" if os.name == "nt" else ".netrc")).expanduser()
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        entry = netrc.netrc(path).authenticators(host)
    except (OSError, netrc.NetrcParseError):  # no such file, not readable, or not a netrc: then there is no log-in
        return None
    return Secret(entry[2], f"wandb log-in ({_short(path)})") if entry and entry[2] else None


def _short(path: Path) -> str:
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)
