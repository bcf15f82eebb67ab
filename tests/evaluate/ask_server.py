"""Put general questions to a server, keeping answers in a file: in a test's process, or in one that a test kills.

``python ask_server.py URL MODEL FILE NUM_ITEMS whole|stream`` prints what it did as one line of JSON.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medcot.evaluate.backends import Limits, Request
from medcot.evaluate.endpoint import EndpointBackend
from medcot.evaluate.general import make_general
from medcot.evaluate.replies import Thinks
from medcot.evaluate.servers import build_endpoint
from medcot.evaluate.store import Answered, AnswerStore, Subject, answer_all

SEEDS = (1, 2)
LIMITS = Limits(40, 8)


@dataclass(frozen=True)
class R1:
    """``generate.R1``'s draws, without the seconds that loading torch takes."""

    temperature: float = 0.6
    top_p: float = 0.95


def make_questions(num_items: int) -> list[Request]:
    items = make_general(num_items)
    return [Request(item.id, item.question, R1(), seed, LIMITS) for seed in SEEDS for item in items]


def ask(
    url: str, model: str, path: Path, num_items: int, *, stream: bool, timeout_s: float = 4.0
) -> tuple[Answered, dict[str, Any]]:
    """Answer all of it, and say what it took."""
    endpoint = build_endpoint(
        model, url, concurrency=6, timeout_s=timeout_s, stream=stream, thinks=Thinks.TAGS, price=(1.0, 2.0)
    )
    backend = EndpointBackend(replace(endpoint, pause_s=0.1, longest_pause_s=2.0, max_attempts=60))
    start = time.monotonic()
    with AnswerStore(path) as store:
        answered = answer_all(backend, make_questions(num_items), store, Subject(model, None, "general"))
    took: dict[str, Any] = {"wall_s": round(time.monotonic() - start, 2), "newly_asked": answered.num_asked}
    took["num_failed"] = sum(answer.error is not None for answer in answered.answers)
    took["attempts"] = sum(answer.num_attempts for answer in answered.answers)
    took["prompt_tokens"] = sum(answer.num_prompt_tokens for answer in answered.answers)
    took["written_tokens"] = sum(answer.num_think_tokens + answer.num_answer_tokens for answer in answered.answers)
    took["cost"] = math.fsum(answer.cost or 0.0 for answer in answered.answers)
    return answered, took


if __name__ == "__main__":
    url, model, path, num_items, how = sys.argv[1:]
    print(json.dumps(ask(url, model, Path(path), int(num_items), stream=how == "stream")[1]))
