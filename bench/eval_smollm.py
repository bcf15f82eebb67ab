"""A model that cannot think aloud, evaluated: the embedded SmolLM2-135M on MedQA, in four ways of getting an answer.

Untuned it never closes its thinking, so its strict score is near 0 whatever it knows. Budget forcing closes the block
for it and asks for the answer; comparing the likelihood of the letters asks for no form at all, and must find what a
model of this size has of medicine, which is nothing: with four options the interval must hold 25 %. Thinking can only
be in its way, so the letters are compared behind an empty block and behind one of ``THINK`` tokens.

Greedy, in the chat style, through the same requests, store, grading and scores as ``medcot eval``. Each setting starts
from an empty store; seconds are of answering alone.

    python bench/eval_smollm.py --medqa test.jsonl --save         # MedQA's test set, 4 options, in the Hub's schema
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medcot import engine, model
from medcot.evaluate.backends import Ending, Limits
from medcot.evaluate.lines import build_lines
from medcot.evaluate.local import ModelWriter, TokenBackend
from medcot.evaluate.scores import score
from medcot.evaluate.store import AnswerStore, Subject, answer_all
from medcot.evaluate.tasks import Task, build_requests, load_task
from medcot.generate import Sampling
from medcot.machine import describe_machine, list_versions
from medcot.prompt import Style
from results import format_table, save_result

SOURCE = "embedded"
THINK, ANSWER = 256, 64
SETTINGS = {
    f"written, {THINK} + {ANSWER} tokens": Limits(THINK, ANSWER),
    f"forced at {THINK}": Limits(THINK, ANSWER, Ending.FORCED),
    "likelihood, no thinking": Limits(0, ANSWER, Ending.LIKELIHOOD),
    f"likelihood at {THINK}": Limits(THINK, ANSWER, Ending.LIKELIHOOD),
}
CHANCE = 0.25
COLUMNS = ["setting", "strict accuracy (95 % interval)", "lenient", "unparsed", "unfinished", "forced", "s", "tok/s"]


def measure(backend: TokenBackend, task: Task, limits: Limits, folder: Path) -> dict[str, Any]:
    """Return the figures of one setting, with ``seconds`` and ``tokens`` written."""
    requests = build_requests(task, Sampling(0.0, 1.0), [0], limits)
    with AnswerStore(folder / "answers.jsonl") as store:
        start = time.monotonic()
        answers = answer_all(backend, requests, store, Subject(SOURCE, None, task.sha256)).answers
        seconds = time.monotonic() - start
    lines = build_lines(task, requests, answers, [backend.prompt_of(request) for request in requests])
    tokens = sum(line["num_think_tokens"] + line["num_answer_tokens"] for line in lines)
    return {**score(lines), "seconds": seconds, "tokens": tokens}


def describe(found: Mapping[str, Mapping[str, Any]], task: Task, text: str) -> tuple[str, str]:
    """Return the printed text as Markdown, and the result in a few words."""
    rows = [
        [
            name,
            f"{figures['correct']} = {_share(figures)}",
            f"{figures['lenient']['accuracy']:.1%}",
            f"{figures['unparsed'] / figures['answers']:.1%}",
            f"{figures['unfinished'] / figures['answers']:.1%}",
            f"{figures['forced'] / figures['answers']:.1%}",
            f"{figures['seconds']:.0f}",
            f"{figures['tokens'] / figures['seconds']:,.0f}",
        ]
        for name, figures in found.items()
    ]
    letters = "; ".join(f"{name}: {_histogram(figures)}" for name, figures in found.items())
    facts = f"{len(task.items):,} of {task.num_available:,} items of {task.base}, sha256 {task.sha256[:12]}. {text}"
    written, _, likelihood, _ = found.values()
    holds = "holds" if likelihood["ci95"][0] <= CHANCE <= likelihood["ci95"][1] else "DOES NOT HOLD"
    result = (
        f"SmolLM2-135M on {len(task.items):,} MedQA items: strict {_share(written)}, unfinished"
        f" {written['unfinished'] / written['answers']:.0%}; likelihood of the letters {_share(likelihood)}, which"
        f" {holds} {CHANCE:.0%}"
    )
    return f"{facts}\n\n{format_table(COLUMNS, rows)}\n\nLetters read: {letters}.", result


def _share(figures: Mapping[str, Any]) -> str:
    low, high = figures["ci95"]
    return f"{figures['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def _histogram(figures: Mapping[str, Any]) -> str:
    return " ".join(f"{letter} {count}" for letter, count in figures["letters"]["chosen"].items())


def main() -> None:
    """Print the table, and keep it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", type=Path, required=True, help="MedQA's 4-option test set, JSON Lines")
    parser.add_argument("--items", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="answers written together (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_args()
    task = load_task(f"medqa={options.medqa}:{options.items}")
    loaded = model.load(SOURCE, precision="bf16", max_seq_length=2048)
    engine.accelerate(loaded.model)
    writer = ModelWriter(loaded.model, loaded.tokenizer)
    backend = TokenBackend(writer, loaded.tokenizer, Style.CHAT, batch_size=options.batch_size)
    found: dict[str, dict[str, Any]] = {}
    for name, limits in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(backend, task, limits, Path(folder))
        print(f"{name}: {_share(found[name])}, {found[name]['seconds']:.0f} s", flush=True)
    versions = ", ".join(f"{name} {version}" for name, version in list_versions().items())
    text = (
        f"{loaded.source} in {loaded.precision}, chat style, greedy, {options.batch_size} rows a batch,"
        f" {torch.get_num_threads()} threads; {versions}."
    )
    details, result = describe(found, task, text)
    machine = describe_machine()
    print(f"\n{machine}\n\n{details}\n\n{result}")
    if options.save:
        save_result("eval_smollm", machine, result, details)


if __name__ == "__main__":
    main()
