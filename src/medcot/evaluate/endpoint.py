"""Any OpenAI-compatible server as a back end: o1, o3, DeepSeek's own API, vLLM, llama.cpp, transformers serve.

What goes wrong with servers goes wrong in the middle of the night, at item 900 of 1,273. So every item ends in exactly
one answer: what may pass (429, 5xx, a timeout, a reset, a stream that breaks off, a server that is restarted) is tried
again after a growing, jittered pause, for at least as long as ``Retry-After`` asks; what concerns one question alone (a
refusal, a prompt too long) becomes that item's error; what concerns all of them (a wrong key, no such model, no money)
stops the evaluation at once. A reply is counted when it is whole, so an attempt that broke off leaves nothing behind.
No redirect is followed: what the address was given for, the key and the questions, goes there and nowhere else.

A 429 slows all requests down, not only the one it met: it is the account that is limited. Limits known beforehand are
kept by ``Pace``, requests evenly spaced and tokens by what answers turn out to need.

Reasoning models are sent no system prompt, and a temperature unless the server's dialect knows none (DeepSeek-R1's
model card; OpenAI's reasoning guide). The key travels in one header, and in no message, log or answer.

Full jitter: M. Brooker, "Exponential backoff and jitter", AWS Architecture Blog, 2015. Retry-After: RFC 9110, 10.2.3.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

import httpx

from medcot.errors import ModelError, NetworkError
from medcot.evaluate.backends import Answer, Ending, OnAnswer, Request, answer_failed
from medcot.evaluate.pace import Pace
from medcot.evaluate.replies import Broken, Price, Refused, Reply, Thinks, build_answer, read_body, read_stream
from medcot.secrets import HIDDEN, Secret

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_KEY_OR_MONEY = {401, 402, 403}
_WRONG_PLACE = {301, 302, 303, 307, 308, 404, 405}
_NO_MONEY = "insufficient_quota"  # OpenAI sends it as a 429, which no waiting mends
_FLAGGED = ("flagged", "moderation", "content_policy")  # OpenRouter's 403 of one question
LONGEST_CHECK_S = 30.0  # for the first sign of a server
FEWEST_FAILED = 4  # requests that may fail in a row, however few are under way together
FEWEST_REFUSED = 32  # requests that may be refused in one and the same word before any was answered
LONGEST_WISH_S = 3600.0  # of a Retry-After; a longer one is a daily limit, and not to be slept through
LONGEST_ATTEMPT = 10  # times timeout_s: a server that sends signs of life and never an end
CHARS_A_TOKEN = 4  # English, for the token limit's first guess at a prompt


class Dialect(StrEnum):
    """Which names a server has for the settings."""

    CHAT = "chat"  # max_tokens, temperature, top_p, seed
    REASONING = "reasoning"  # OpenAI's o-series: max_completion_tokens, and no say in the drawing


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server and how to treat it.

    Attributes:
        base_url: up to and with ``/v1``.
        model: the name it serves the model by.
        api_key: sent as a bearer token.
        concurrency: requests under way together.
        requests_a_minute: as the account allows.
        tokens_a_minute: prompt and completion together, as the account allows.
        timeout_s: for one attempt without a sign of life; a stream gives one at each token. Ten times that is the end.
        deadline_s: for all of it; what has no answer then has failed.
        max_attempts: of one request.
        pause_s: before the second attempt; it doubles from one to the next.
        longest_pause_s: where the doubling ends; a server may ask for more.
        stream: whether replies come in pieces.
        thinks: how the model shows its reasoning.
        dialect: names of the settings.
        no_thinking: fields that keep the model from thinking, such as ``chat_template_kwargs``; ``None`` where nothing
            does.
        extra: further fields of every request; ``None`` leaves one of ours out, for a server that does not know it.
        prices: of models by name; one that is not there costs nothing that is known.
    """

    base_url: str
    model: str
    api_key: Secret | None = None
    concurrency: int = 8
    requests_a_minute: float | None = None
    tokens_a_minute: float | None = None
    timeout_s: float = 600.0
    deadline_s: float | None = None
    max_attempts: int = 10
    pause_s: float = 1.0
    longest_pause_s: float = 60.0
    stream: bool = False
    thinks: Thinks = Thinks.AUTO
    dialect: Dialect = Dialect.CHAT
    no_thinking: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    prices: Mapping[str, Price] = field(default_factory=dict)


class EndpointBackend:
    """A back end over a server.

    Args:
        endpoint: the server.
        transport: httpx's, where it is not the usual one.
    """

    def __init__(self, endpoint: Endpoint, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.endpoint = endpoint
        self._transport = transport
        self._failed_in_a_row, self._refusals = 0, list[str]()
        if urlsplit(endpoint.base_url).scheme not in ("http", "https"):
            raise ModelError(
                f"'{endpoint.base_url}' is no address",
                "A server's begins with http:// or https:// and ends with /v1",
                "Write it whole",
            )

    def prompt_of(self, request: Request) -> str:
        """Return the request's body: all that the server is told, and how its reply is read if not in the usual way.

        Answers are kept as they were read, so another way to read is another answer.
        """
        thinks = {} if self.endpoint.thinks is Thinks.AUTO else {"thinks": self.endpoint.thinks}
        return json.dumps(self.body_of(request) | thinks, sort_keys=True)

    def answer(self, requests: Sequence[Request], on_answer: OnAnswer) -> None:
        """Answer all requests, several at a time.

        Raises:
            NetworkError: the server refuses all of them, for the key or the account.
            ModelError: it does not have the model, or cannot do what the limits ask for.
        """
        for request in requests:
            self.body_of(request)  # what cannot be asked for at all, is said before anything is paid
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._answer_all(requests, on_answer))
        else:  # a notebook's cell runs inside a loop, which cannot be entered again
            with ThreadPoolExecutor(1) as pool:
                pool.submit(asyncio.run, self._answer_all(requests, on_answer)).result()

    async def _answer_all(self, requests: Sequence[Request], on_answer: OnAnswer) -> None:
        it = self.endpoint
        self._failed_in_a_row, self._refusals = 0, []
        deadline = None if it.deadline_s is None else time.monotonic() + it.deadline_s
        pace = Pace(it.requests_a_minute, it.tokens_a_minute)
        waiting = iter(requests)
        headers = {} if it.api_key is None else {"Authorization": f"Bearer {it.api_key.value}"}
        async with httpx.AsyncClient(
            base_url=it.base_url.rstrip("/") + "/",
            headers=headers,
            timeout=it.timeout_s,
            limits=httpx.Limits(max_connections=it.concurrency),
            trust_env=not is_this_machine(it.base_url),  # a proxy of the environment has no way to this machine
            transport=self._transport,
        ) as client:

            async def work() -> None:
                for request in waiting:  # shared: each worker takes the next
                    attempts = _Attempts(self, client, pace, request, deadline)
                    answer = await attempts.answer()
                    on_answer(answer)
                    self._look_whether_it_lives(answer, attempts.refusal)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(it.concurrency, len(requests))):
                        group.create_task(work())
            except BaseExceptionGroup as errors:  # the first error stops all; the others are cancellations
                raise errors.exceptions[0] from None

    def _look_whether_it_lives(self, answer: Answer, refusal: str | None) -> None:
        """Stop where request after request ran out of attempts, or the first are all refused alike.

        The rest would take hours to fail one by one, or be done in seconds with nothing to grade.
        """
        it = self.endpoint
        gave_up = answer.error is not None and answer.num_attempts == it.max_attempts and refusal is None
        self._failed_in_a_row = self._failed_in_a_row + 1 if gave_up else 0
        self._refusals.append(refusal or "")  # one that was not refused ends the row for good
        if self._failed_in_a_row > max(it.concurrency, FEWEST_FAILED):
            raise NetworkError(
                f"{self._failed_in_a_row} requests in a row failed at {it.base_url}: {answer.error}",
                f"Each was tried {it.max_attempts} times",
                "See to the server; what was answered is kept, and the same command goes on from there",
            )
        if len(self._refusals) == FEWEST_REFUSED and len(set(self._refusals)) == 1 and refusal:
            raise ModelError(
                f"The first {FEWEST_REFUSED} requests were all refused by {it.base_url}: {refusal}",
                f"It must serve '{it.model}' and know every setting that it is sent",
                "Correct what it names; a field that it does not know is left out by null in the extra fields",
            )

    def body_of(self, request: Request) -> dict[str, Any]:
        """Return what is sent for a request.

        Raises:
            ModelError: a server cannot be asked for it.
        """
        it, limits = self.endpoint, request.limits
        if limits.ending is not Ending.WRITTEN:
            raise ModelError(
                f"The limits end thinking by '{limits.ending}'",
                "A chat server takes no half-written answer, so thinking cannot be closed for its model",
                "Take ending=written, or the local back end",
            )
        body: dict[str, Any] = {
            "model": it.model,
            "messages": [{"role": "user", "content": request.question}],
            **{name: value for name, value in it.extra.items() if value is not None},
        }
        if limits.think_tokens == 0:
            if it.no_thinking is None:
                raise ModelError(
                    f"'{it.model}' was asked to answer without thinking",
                    "Servers have no common word for it",
                    "Set no_thinking to the fields that this one understands, or leave the control out",
                )
            body |= it.no_thinking
        max_tokens = limits.think_tokens + limits.answer_tokens
        if it.dialect is Dialect.REASONING:
            body["max_completion_tokens"] = max_tokens
        else:
            sampling = request.sampling
            body |= {"max_tokens": max_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
            body["seed"] = request.seed
        return {name: value for name, value in body.items() if it.extra.get(name, value) is not None}


class _Attempts:
    """One request, until it has its answer."""

    def __init__(
        self, backend: EndpointBackend, client: httpx.AsyncClient, pace: Pace, request: Request, deadline: float | None
    ) -> None:
        self.it, self.client, self.pace, self.request = backend.endpoint, client, pace, request
        self.body = backend.body_of(request)
        if self.it.stream:
            self.body |= {"stream": True, "stream_options": {"include_usage": True}}
        self.deadline = deadline
        self.refusal: str | None = None  # what was said to a request that no further attempt would mend

    async def answer(self) -> Answer:
        """Try until there is an answer, or no hope of one."""
        error = "no attempt was whole"
        for attempt in range(1, self.it.max_attempts + 1):
            if self._left() <= 0:
                return self._failed(f"{error}; no time is left", attempt - 1)
            wish = None
            try:
                async with asyncio.timeout(None if self.deadline is None else self._left()):
                    return await self._try(attempt)
            except TimeoutError:
                return self._failed(f"{error}; no time is left", attempt)
            except Refused as refusal:
                self.refusal = self._clean(str(refusal))
                return self._failed(self.refusal, attempt)
            except _Status as status:
                error, wish = str(status), status.retry_after_s
                if status.code == 429:
                    self.pace.hold(self._pause(attempt, wish))
            except (httpx.RequestError, Broken) as failure:
                error = f"{type(failure).__name__}: {failure}"
            if attempt < self.it.max_attempts:
                await asyncio.sleep(min(self._pause(attempt, wish), max(0.0, self._left())))
        return self._failed(f"{error}, and so on {self.it.max_attempts} times", self.it.max_attempts)

    async def _try(self, attempt: int) -> Answer:
        guess = len(self.request.question) // CHARS_A_TOKEN
        reserved = await self.pace.enter(guess, self.request.limits.think_tokens + self.request.limits.answer_tokens)
        start = time.monotonic()
        used = None
        try:
            reply = await self._send_in_time()
            used = int(reserved) if reply.num_tokens is None else reply.num_tokens  # told nothing, all of it is spent
        finally:
            self.pace.settle(reserved, guess, used)
        price = self.it.prices.get(self.it.model)
        seconds = time.monotonic() - start
        return build_answer(reply, self.request, self.it.thinks, price, seconds=seconds, num_attempts=attempt)

    async def _send_in_time(self) -> Reply:
        longest_s = LONGEST_ATTEMPT * self.it.timeout_s
        try:
            async with asyncio.timeout(longest_s):
                return await self._send()
        except TimeoutError:  # the deadline's, around this one, comes as a cancellation
            raise Broken(f"it had no end after {longest_s:.0f} s") from None

    async def _send(self) -> Reply:
        async with self.client.stream("POST", "chat/completions", json=self.body) as response:
            if response.status_code != 200:
                self._refuse(response.status_code, response.headers, await response.aread())
            data = await response.aread()
            is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
            return read_stream(data) if is_stream else read_body(data)

    def _refuse(self, code: int, headers: Mapping[str, str], body: bytes) -> None:
        """Raise what a status other than 200 means."""
        it, whole = self.it, self._clean(body.decode(errors="replace"))
        said = whole[:300]
        value = f"{it.base_url} answers {code}: {said}"
        if code in _WRONG_PLACE:
            moved = f" It points to {self._clean(headers['location'])}." if "location" in headers else ""
            raise ModelError(
                value + moved,
                f"It must serve '{it.model}' there",
                "Check the address, which mostly ends with /v1, and the model's name",
            )
        flagged = code == 403 and any(word in whole.lower() for word in _FLAGGED)
        if (code in _KEY_OR_MONEY and not flagged) or _NO_MONEY in whole:
            raise NetworkError(value, "It must accept the key, and the account must be in credit", "Check both")
        if code not in _RETRIED:
            raise Refused(f"status {code}: {said}")
        wish_s = _read_retry_after(headers.get("retry-after"))
        if wish_s is not None and wish_s > LONGEST_WISH_S:
            raise NetworkError(
                f"{value} (asking for a pause of {wish_s / 3600:.1f} hours)",
                f"Pauses of up to {LONGEST_WISH_S / 3600:.0f} hour are waited for",
                "Give the same command again then; what was answered is kept",
            )
        raise _Status(code, said, wish_s)

    def _pause(self, attempt: int, wish_s: float | None) -> float:
        longest = min(self.it.longest_pause_s, self.it.pause_s * 2.0 ** (attempt - 1))
        return (wish_s or 0.0) + random.uniform(0.5, 1.0) * (self.it.pause_s if wish_s else longest)

    def _left(self) -> float:
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def _failed(self, error: str, num_attempts: int) -> Answer:
        return answer_failed(self.request, self._clean(error), num_attempts=num_attempts)

    def _clean(self, text: str) -> str:
        """Take the key out of what others wrote: some servers quote it."""
        return text if self.it.api_key is None else text.replace(self.it.api_key.value, HIDDEN)


def is_this_machine(base_url: str) -> bool:
    """Return whether an address is on this machine, so that what is sent there passes no network."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


def check_there(endpoint: Endpoint) -> None:
    """Ask for the list of models, without the key: any reply shows that somebody is there.

    A server that goes away later is waited for; one that was never there is most likely a wrong address, and waiting
    for it through all attempts would hide that for minutes.

    Raises:
        NetworkError: nobody answers.
    """
    try:
        httpx.get(
            f"{endpoint.base_url.rstrip('/')}/models",
            timeout=min(endpoint.timeout_s, LONGEST_CHECK_S),
            trust_env=not is_this_machine(endpoint.base_url),
        )
    except httpx.RequestError as error:
        raise NetworkError(
            f"nobody answers at {endpoint.base_url}: {type(error).__name__}",
            "A server must be there when an evaluation begins; one that goes away later is waited for",
            "Check the address, and that the server has started",
        ) from None


class _Status(Exception):
    """A status that may pass."""

    def __init__(self, code: int, said: str, retry_after_s: float | None) -> None:
        super().__init__(f"status {code}: {said}")
        self.code, self.retry_after_s = code, retry_after_s


def _read_retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for: a number, or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        pass
    else:
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        then = parsedate_to_datetime(value)
    except ValueError:  # neither of the two forms there are, so nothing that could be kept
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())
