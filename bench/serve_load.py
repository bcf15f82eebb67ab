"""Many people at once: ``medcot serve`` with the embedded model, a process of its own, asked by 64 streams for minutes.

What it must show is that nothing is lost and nothing grows. Each of the streams asks, reads its answer to the end, and
asks again; an answer counts as whole where it has one finish reason, its token counts, as many as were asked for where
it was cut by length, and the stream's ``[DONE]``. Some clients go away amid an answer, as people do: their slots must
be free at the end. The server's memory is sampled, and its slope over the last two thirds of the time is told; before,
caches are touched for the first time.

Tokens a second and the time to the first token are what a CPU gives, with the client on the same cores; ``--serve``
takes another server's command line, to be asked the same (``{port}`` stands for the port).

    python bench/serve_load.py --save
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from medcot.machine import describe_machine, list_versions
from results import format_table, save_result

CONTEXT, MOST_TOKENS = 512, 96
SERVE = (
    f"{sys.executable} -m medcot serve embedded --style short --port {{port}} --context {CONTEXT} --slots {{streams}} "
    "--queue 128"
)
QUESTIONS = (
    "Why does furosemide lower potassium?",
    "A 61-year-old woman loses urine when coughing. What would cystometry most likely reveal?",
    "What is the anion gap for Na 140, Cl 104, HCO3 14?",
    "Which nerve is at risk in a fracture of the shaft of the humerus?",
    "A child of 14 kg needs 15 mg/kg of paracetamol. How many mg is that?",
)
LEAVE_SHARE = 0.05  # of clients that go away amid an answer
SETTLED_FROM = 1 / 3  # of the time


@dataclass
class Tally:
    """What the streams met."""

    whole: int = 0
    left: int = 0  # by the client, on purpose
    tokens: int = 0
    lost: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, url: str, model: str, seed: int, tally: Tally) -> None:
    """One answer, or part of one."""
    draws = random.Random(seed)
    leaves_after = draws.randrange(1, MOST_TOKENS // 2) if draws.random() < LEAVE_SHARE else None
    most = draws.randrange(MOST_TOKENS // 2, MOST_TOKENS + 1)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": draws.choice(QUESTIONS)}],
        "max_tokens": most,
        "seed": seed,
        "temperature": 0.6,
        "top_p": 0.95,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, first, reasons, usage, done, pieces = time.monotonic(), None, [], None, False, 0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            tally.lost.append(f"status {reply.status_code}")
            return
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or []:
                reasons += [choice["finish_reason"]] if choice.get("finish_reason") else []
                if any(text for key, text in choice["delta"].items() if key != "role"):
                    pieces += 1
                    first = first or time.monotonic()
            if leaves_after is not None and pieces >= leaves_after:
                tally.left += 1
                return
    judge(reasons, usage, done, most, tally)
    tally.answer_s.append(time.monotonic() - start)
    if first is not None:
        tally.first_s.append(first - start)


def judge(reasons: list[str], usage: dict[str, Any] | None, done: bool, most: int, tally: Tally) -> None:
    """Whether an answer that was read to its end is whole."""
    if len(reasons) != 1 or usage is None or not done:
        tally.lost.append(f"reasons {reasons}, usage {usage}, done {done}")
    elif reasons == ["length"] and usage["completion_tokens"] != most:
        tally.lost.append(f"cut at {usage['completion_tokens']} of {most} tokens")
    else:
        tally.whole += 1
        tally.tokens += usage["completion_tokens"]


async def load(url: str, model: str, num_streams: int, seconds: float, process: psutil.Process) -> tuple[Tally, Any]:
    """Ask for so many seconds; return the tally and the memory as (seconds, bytes)."""
    tally, start = Tally(), time.monotonic()
    rss: list[tuple[float, int]] = []

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while time.monotonic() - start < seconds:
            try:
                await ask(client, url, model, number * 1_000_003 + turn, tally)
            except httpx.HTTPError as error:
                tally.lost.append(repr(error))
            turn += 1

    async def watch() -> None:
        while True:
            rss.append((time.monotonic() - start, process.memory_info().rss))
            await asyncio.sleep(1)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=httpx.Timeout(600), limits=limits) as client:
        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(stream(client, number) for number in range(num_streams)))
        watcher.cancel()
    return tally, rss


def slope_of(rss: list[tuple[float, int]]) -> float:
    """MB a minute, least squares, once it has settled."""
    settled = [(at / 60, held / 1e6) for at, held in rss if at >= SETTLED_FROM * rss[-1][0]]
    mean_at, mean_mb = (sum(column) / len(settled) for column in zip(*settled, strict=True))
    spread = sum((at - mean_at) ** 2 for at, _ in settled)
    return sum((at - mean_at) * (mb - mean_mb) for at, mb in settled) / spread


def percentile(values: list[float], share: float) -> float:
    """The value below which that share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def wait_until_ready(url: str, process: subprocess.Popen[bytes], model: str | None) -> str:
    """Wait until the server answers; return the name to ask for."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with exit code {process.returncode}")
        try:
            if model is not None:
                httpx.get(f"{url}/health", timeout=2)
                return model
            return str(httpx.get(f"{url}/v1/models", timeout=2).json()["data"][0]["id"])
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SystemExit("the server does not answer")


def is_idle(url: str) -> bool:
    """Whether every slot is free again; servers that do not tell are asked nothing."""
    text = httpx.get(f"{url}/metrics", timeout=10).text
    return "medcot_running 0.0" in text and "medcot_waiting 0.0" in text


def main() -> None:
    """Start, ask, stop, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--serve", default=SERVE, help="the server's command line")
    parser.add_argument("--model", help="name to ask for; by default the first that is listed")
    parser.add_argument("--save", action="store_true", help="keep the result in RESULTS.md")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = shlex.split(args.serve.format(port=port, streams=args.streams))
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(command)
    try:
        model = wait_until_ready(url, server, args.model)
        tally, rss = asyncio.run(load(url, model, args.streams, args.seconds, psutil.Process(server.pid)))
        ours = args.serve == SERVE
        time.sleep(2)
        idle = "all" if not ours or is_idle(url) else "NOT all"
        others = psutil.getloadavg()[0]
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    seconds, slope = rss[-1][0], slope_of(rss)
    held = [held / 1e6 for _, held in rss]
    first, whole = (" / ".join(f"{percentile(t, p):.2f}" for p in (0.5, 0.95)) for t in (tally.first_s, tally.answer_s))
    rows = [
        ["answers whole", f"{tally.whole:,}"],
        ["answers lost", f"{len(tally.lost):,}"],
        ["clients that went away", f"{tally.left:,}"],
        ["tokens written", f"{tally.tokens:,}"],
        ["tokens a second", f"{tally.tokens / seconds:,.0f}"],
        ["time to first token, p50 / p95, s", first],
        ["whole answer, p50 / p95, s", whole],
        ["memory at first / settled / last, MB", " / ".join(f"{held[i]:,.0f}" for i in (0, len(held) // 3, -1))],
        ["slope once settled, MB a minute", f"{slope:+.2f}"],
        ["slots free at the end", idle],
        ["exit code after SIGTERM", str(code)],
        ["load of the machine at the end", f"{others:.1f}"],
    ]
    table = format_table(["", f"{args.streams} streams, {seconds:.0f} s"], rows)
    told = "".join(f"\nLost: {words}" for words in tally.lost[:5])
    shown = "medcot serve embedded" if ours else shlex.join(command[-6:])
    if "OMP_NUM_THREADS" in os.environ:
        shown = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} {shown}"
    versions = ", ".join(f"{name} {version}" for name, version in list_versions().items())
    details = f"`{shown}`, answers of up to {MOST_TOKENS} tokens. {versions}\n\n{table}{told}"
    print(f"{describe_machine()}\n\n{details}")
    if args.save:
        result = (
            f"{args.streams} streams for {seconds:.0f} s: {tally.whole:,} answers whole, {len(tally.lost)} lost, "
            f"{tally.tokens / seconds:,.0f} tokens/s, memory {slope:+.2f} MB a minute"
        )
        save_result("serve_load", describe_machine(), result, details)
    if tally.lost:
        sys.exit(1)


if __name__ == "__main__":
    main()
