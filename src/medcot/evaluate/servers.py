"""From an address and a model's name to an ``Endpoint``: what known servers need, which key, and what is refused.

All of them call themselves OpenAI-compatible, and each wants something else: OpenAI's reasoning models refuse
``max_tokens``, DeepSeek takes a temperature and does not use it, a server on this machine has no key. A table by host
knows this, so that the command line asks for no more than an address. It keys on the host and not on the model, because
a host decides what it understands; only OpenAI's own names tell two dialects apart.

A key goes to the host that it is for (``secrets.find_endpoint_key``), and never in the clear over a network. Prices are
not built in: they change, and a wrong cost is worse than none; whoever wants one says what a million tokens cost.

Sources: OpenAI's reasoning guide and API reference; api-docs.deepseek.com (thinking mode, rate limit, error codes);
openrouter.ai/docs (reasoning tokens, errors); what ``transformers serve`` 5.23 did in tests/evaluate/test_real_server.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from medcot.errors import ModelError
from medcot.evaluate.endpoint import Dialect, Endpoint, is_this_machine
from medcot.evaluate.replies import Price, Thinks
from medcot.secrets import ENDPOINT_KEYS, Secret, find_endpoint_key

# o1, o3-mini, gpt-5-mini, ft:o4-mini:...; but gpt-5-chat-latest does not reason, and gpt-4o is no o-series.
_REASONS = re.compile(r"(?:ft:)?(?:o[1-9]|gpt-5)(?!.*-chat)(?:[-.:]|$)", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"[!-~]+")  # what an HTTP header can carry
# Told by a request, its sampling, limits and seed. Set twice, what the results say was asked would not be what was.
_OURS = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "n")
_SAMPLING = ("temperature", "top_p", "seed")  # null leaves one out, where a server refuses it


@dataclass(frozen=True, slots=True)
class Server:
    """What is known of one host.

    Attributes:
        name: of the service.
        no_thinking: fields that keep its models from thinking, where the host has such.
        notes: what a reader of its scores should know.
    """

    name: str
    no_thinking: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


SERVERS = {
    "api.openai.com": Server(
        "OpenAI",
        notes=(
            "the o-series and GPT-5 draw as they like (no temperature, top_p or seed is sent), and hide their thinking",
        ),
    ),
    "api.deepseek.com": Server(
        "DeepSeek",
        no_thinking={"thinking": {"type": "disabled"}},
        notes=("while it thinks, DeepSeek ignores temperature, and it documents no seed: two seeds are two draws",),
    ),
    "openrouter.ai": Server(
        "OpenRouter",
        no_thinking={"reasoning": {"enabled": False}},
        notes=("OpenRouter spreads one model over providers of different precision; 'provider' in extra pins one",),
    ),
}
THIS_MACHINE = Server(
    "a server on this machine",
    notes=(
        "a model that thinks in tags needs thinks=tags, unless the server puts its thinking into a field of its own",
        "transformers serve draws only where the model's generation_config.json has do_sample; otherwise it is greedy,"
        " and seeds are repeatable only with concurrency 1",
    ),
)
OTHER = Server("an OpenAI-compatible server")


def find_server(base_url: str) -> Server:
    """Return what is known of an address's host."""
    return THIS_MACHINE if is_this_machine(base_url) else SERVERS.get(_host(base_url), OTHER)


def choose_dialect(model: str, base_url: str) -> Dialect:
    """Return the names of the settings that a model at an address understands."""
    openai = _host(base_url) == "api.openai.com"
    return Dialect.REASONING if openai and _REASONS.match(model) else Dialect.CHAT


def build_endpoint(
    model: str,
    base_url: str,
    *,
    api_key_env: str | None = None,
    concurrency: int = 8,
    requests_a_minute: float | None = None,
    tokens_a_minute: float | None = None,
    timeout_s: float = 600.0,
    price: tuple[float, float] | None = None,
    stream: bool = False,
    thinks: Thinks = Thinks.AUTO,
    dialect: Dialect | None = None,
    no_thinking: str | None = None,
    extra: str | None = None,
) -> Endpoint:
    """Return a server and how to treat it, from what a user can say about it.

    Args:
        model: the name it serves the model by.
        base_url: up to and with ``/v1``.
        api_key_env: the name of the secret to send; otherwise it follows from the host.
        concurrency: requests under way together.
        requests_a_minute: as the account allows.
        tokens_a_minute: as the account allows.
        timeout_s: for one attempt without a sign of life.
        price: what a million tokens cost, of the prompt and of the completion, in whatever currency.
        stream: whether replies come in pieces.
        thinks: how the model shows its reasoning.
        dialect: names of the settings; ``None`` for the host's.
        no_thinking: a JSON object of the fields that keep the model from thinking; ``None`` for the host's.
        extra: a JSON object of further fields; null leaves a sampling field out.

    Raises:
        ModelError: an address, a number, JSON or a key that cannot be used.
    """
    url = _check_address(base_url)
    if not model.strip():
        raise ModelError(
            "The model has no name", "A server is asked for a model by name", "Say which, as it lists them"
        )
    for name, number in (
        ("concurrency", concurrency),
        ("requests_a_minute", requests_a_minute),
        ("tokens_a_minute", tokens_a_minute),
        ("timeout_s", timeout_s),
    ):
        _check_positive(name, number)
    told = None if no_thinking is None else _read_object("no_thinking", no_thinking)
    return Endpoint(
        url,
        model,
        api_key=_find_key(url, api_key_env),
        concurrency=int(concurrency),
        requests_a_minute=requests_a_minute,
        tokens_a_minute=tokens_a_minute,
        timeout_s=timeout_s,
        stream=stream,
        thinks=thinks,
        dialect=choose_dialect(model, url) if dialect is None else dialect,
        no_thinking=find_server(url).no_thinking if told is None else told,
        extra={} if extra is None else _read_object("extra", extra, may_leave_out=_SAMPLING),
        prices={} if price is None else {model: _check_price(price)},
    )


def _host(base_url: str) -> str:
    return (urlsplit(base_url).hostname or "").removesuffix(".")


def _check_address(base_url: str) -> str:
    """Return an address without the slash at its end."""
    try:
        parts = urlsplit(base_url.strip())
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        good = False
    if not good:
        raise ModelError(
            f"'{base_url}' is no server's address",
            "It begins with http:// or https://, then the host, and mostly ends with /v1",
            "Write it whole, such as http://127.0.0.1:8000/v1",
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ModelError(  # not quoted: it may hold a password
            f"The address of {parts.hostname} holds a user, a password, a query or a fragment",
            "It is written into the results, so it names a place and nothing else",
            "Leave them out; a key is kept under a name, and api_key_env says which",
        )
    url = parts.geturl().rstrip("/")
    if url.endswith("/chat/completions"):
        raise ModelError(
            f"'{base_url}' names one of the server's functions",
            "The address is the part before /chat/completions",
            f"Take {url.removesuffix('/chat/completions')}",
        )
    return url


def _find_key(url: str, api_key_env: str | None) -> Secret | None:
    """Return the key to send to an address, if there is one for it."""
    host = _host(url)
    if api_key_env is not None and not _VARIABLE.fullmatch(api_key_env):
        raise ModelError(  # not quoted: it is most likely a key
            "What api_key_env was given is no name of a variable",
            "It is the name under which the key is kept, not the key",
            "Put the key into an environment variable and say its name",
        )
    key = find_endpoint_key(host, api_key_env)
    wanted = api_key_env or ENDPOINT_KEYS.get(host)
    if key is None and wanted is not None:
        shown = f"'{wanted}'" if wanted.isupper() else "the name given"  # in small letters it may be a key after all
        raise ModelError(
            f"No key for {host} was found under {shown}",
            "It is looked for in the environment, and in the secrets of a Kaggle or Colab notebook",
            "Keep it under that name",
        )
    if key is None:
        return None
    if not _KEY.fullmatch(key.value):
        raise ModelError(
            f"The key found in {key.where} holds spaces or signs outside ASCII",
            "A header can carry neither",
            "Copy it again, alone",
        )
    if urlsplit(url).scheme == "http" and not is_this_machine(url):
        raise ModelError(
            f"{url} is not encrypted, and a key was found ({key.where})",
            "A key travels to another machine only over https://, since anyone on the way can read it otherwise",
            "Use https://, or a tunnel to 127.0.0.1; if that server wants no key, unset the variable",
        )
    return key


def _check_positive(name: str, number: float | None) -> None:
    if number is None or (number > 0 and math.isfinite(number) and (name != "concurrency" or number == int(number))):
        return
    kind = "a whole number" if name == "concurrency" else "a number"
    raise ModelError(f"{name}={number}", f"It is {kind} above 0", f"Give one, or leave {name} out")


def _check_price(price: tuple[float, float]) -> Price:
    if len(price) != 2 or not all(math.isfinite(part) and part >= 0 for part in price):
        raise ModelError(
            f"price={price}",
            "It is two numbers, what a million tokens of the prompt and of the completion cost",
            "Give both, such as 0.55 2.19, or leave price out",
        )
    return Price(*price)


def _read_object(name: str, text: str, *, may_leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Read a JSON object of fields that may be added to a request."""
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ModelError(
            f"{name}={text!r} is no JSON: {error}",
            "It is an object in JSON: names and text in double quotes, true, false and null in small letters",
            'Write it like {"reasoning_effort": "low"}, in single quotes for the shell',
        ) from None
    if not isinstance(fields, dict):
        raise ModelError(f"{name}={text}", "It is an object in JSON, of fields", 'Write it like {"top_k": 20}')
    taken = [field for field in fields if field in _OURS or (field in _SAMPLING and fields[field] is not None)]
    wrong = [field for field, value in fields.items() if value is None and field not in may_leave_out]
    if taken or wrong:
        raise ModelError(
            f"{name} sets {', '.join(taken or wrong)}",
            "The evaluation sets that itself, and its results say how" if taken else "null is no value for it",
            "Use the option for it" if taken else f"Leave it out; null stands for {', '.join(_SAMPLING)} in extra only",
        )
    return fields
