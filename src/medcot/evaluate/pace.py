"""Keeping to an account's limits: requests evenly spaced, tokens by what answers turn out to need.

Tokens are not known before an answer is there. Reserving the full limit for each (4,000 tokens, of which 900 are used)
would leave three quarters of an allowance idle; so the first answers reserve it, later ones the mean of those before
them, and each settles its difference when it ends.
"""

from __future__ import annotations

import asyncio
import time


class Pace:
    """When the next request may be sent; for one event loop.

    Args:
        requests_a_minute: at most; ``None`` for no limit.
        tokens_a_minute: at most, prompt and completion; ``None`` for no limit.
    """

    def __init__(self, requests_a_minute: float | None, tokens_a_minute: float | None) -> None:
        self._interval_s = 60.0 / requests_a_minute if requests_a_minute else 0.0
        self._tokens_a_s = tokens_a_minute / 60.0 if tokens_a_minute else None
        self._most = tokens_a_minute or 0.0
        self._tokens = self._most  # what may be spent now; below 0 after answers that were longer than reserved
        self._then = time.monotonic()  # when it was worked out
        self._next = 0.0  # when the next request may start
        self._held = 0.0  # until when none may
        self._turn = asyncio.Lock()  # so that they start in the order in which they came
        self._spent, self._num_settled = 0, 0

    def hold(self, seconds: float) -> None:
        """Send nothing for a while: the server asked for it."""
        self._held = max(self._held, time.monotonic() + seconds)

    async def enter(self, prompt_tokens: int, most_tokens: int) -> float:
        """Wait for a turn; return the tokens reserved, to be handed to ``settle``."""
        async with self._turn:
            while True:  # asked again after each pause: a server may have asked for another meanwhile
                reserved = prompt_tokens + (self._spent / self._num_settled if self._num_settled else most_tokens)
                wait_s = max(max(self._held, self._next) - time.monotonic(), self._wait_for_tokens(reserved))
                if wait_s <= 0:
                    break
                await asyncio.sleep(wait_s)
            self._tokens -= reserved
            self._next = time.monotonic() + self._interval_s
            return reserved

    def settle(self, reserved: float, prompt_tokens: int, used: int | None) -> None:
        """Give back what was reserved and not used: all but the prompt of an attempt that failed (``None``)."""
        self._tokens += reserved - (prompt_tokens if used is None else used)
        if used is not None:
            self._spent += max(0, used - prompt_tokens)
            self._num_settled += 1

    def _wait_for_tokens(self, reserved: float) -> float:
        if self._tokens_a_s is None:
            return 0.0
        now = time.monotonic()
        self._tokens = min(self._most, self._tokens + (now - self._then) * self._tokens_a_s)
        self._then = now
        # One that is larger than a minute's allowance starts when the allowance is full.
        return max(0.0, min(reserved, self._most) - self._tokens) / self._tokens_a_s
