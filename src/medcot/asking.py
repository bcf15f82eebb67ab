"""Putting questions to a model: those that a person reads, and those that are graded.

The *asked* ones (the tutorial's and the recipe's) are sampled and shown. The *graded* ones are tasks; each goes through
a back end and the store of answers, so that what was answered once, by this run or another evaluation, is not paid for
again, and a killed one goes on where it was. ``medcot run`` asks both before and after training, ``medcot eval`` the
graded ones. Every answer is one line (``evaluate/lines.py``), complete enough that scores, comparisons and reports are
made from lines alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot import prompt
from medcot.embedded import default_cache_dir
from medcot.errors import DataError
from medcot.evaluate.backends import Answer, Backend, Draws, Limits, OnAnswer, Request
from medcot.evaluate.lines import Line, build_lines, describe_completion, group_by_task, read_completion
from medcot.evaluate.local import ModelWriter, TokenBackend
from medcot.evaluate.power import compute_plan
from medcot.evaluate.scores import compare, score
from medcot.evaluate.store import AnswerStore, Subject, answer_all
from medcot.evaluate.style import measure_style
from medcot.evaluate.tasks import Task, build_requests
from medcot.generate import Sampling, generate, sampling_defaults
from medcot.recipe import AskStage, Recipe
from medcot.records import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medcot.model import LoadedModel
    from medcot.train.progress import RunConsole

ASK_BATCH = 16
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
STAMPED = {".safetensors", ".gguf", ".bin", ".json", ".model", ".jinja"}
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
FLIP_RATE = 0.2  # share of questions assumed to change, for what can be shown
DECODING = 1  # to be raised when the same model would write other answers than before, so that old ones are not found


def choose_sampling(model: Any, ask: AskStage) -> Sampling:
    """Return the recipe's sampling, with the model's own or R1's where the recipe leaves it open."""
    own = sampling_defaults(model)
    return Sampling(
        temperature=own.temperature if ask.temperature is None else ask.temperature,
        top_p=own.top_p if ask.top_p is None else ask.top_p,
    )


# Questions that a person reads --------------------------------------------------------------------------------------


def ask_questions(
    model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, console: RunConsole
) -> list[dict[str, Any]]:
    """Put the tutorial's question and the recipe's to the model as it stands now; one line a question."""
    stage, style = recipe.ask, prompt.Style(recipe.prompt.style)
    questions = list(dict.fromkeys((prompt.TUTORIAL_QUESTION, *stage.questions)))
    prompts = [prompt.encode_prompt(question, style, tokenizer) for question in questions]
    with console.generating("questions", len(questions)) as on_progress:
        generated = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=stage.max_new_tokens,
            sampling=choose_sampling(model, stage),
            seed=stage.seed,
            batch_size=ASK_BATCH,
            stop_at_eos=not stage.ignore_eos,
            on_progress=on_progress,
        )
    lines = []
    for number, (question, ids, (tokens, finish)) in enumerate(zip(questions, prompts, generated, strict=True), 1):
        completion = prompt.split_completion(tokens, tokenizer, num_prompt_tokens=len(ids), finish=finish)
        text = prompt.render_prompt(question, style, tokenizer)
        lines.append(_line_of_asked(f"ask-{number}", question, text, completion, stage.seed))
    return lines


def _line_of_asked(name: str, question: str, prompt_text: str, completion: Completion, seed: int) -> dict[str, Any]:
    return {
        "kind": "ask",
        "id": name,
        "seed": seed,
        "topic": None,
        "question": question,
        "gold": None,
        "prompt": prompt_text,
        **describe_completion(completion),
        "outcome": None,
        "parsed": None,
    }


# Graded questions -----------------------------------------------------------------------------------------------------


def grade_task(
    backend: Backend,
    task: Task,
    *,
    sampling: Draws,
    seeds: Sequence[int],
    limits: Limits,
    store: AnswerStore,
    subject: Subject,
    console: RunConsole,
    label: str,
) -> tuple[list[Line], int]:
    """Put a task to a back end, and grade what came; one line an answer.

    Args:
        backend: whatever answers.
        task: its questions.
        sampling: how tokens are drawn.
        seeds: one answer a question each.
        limits: how long an answer may be.
        store: keeps answers as they come, and has those that were given before.
        subject: what the store knows them by.
        console: shows how far it is.
        label: what the bar is called.

    Returns:
        The lines, and how many answers the store did not have.

    Raises:
        MedcotError: the back end can answer nothing, or the disk takes nothing; what came before is kept.
    """
    requests = build_requests(task, sampling, seeds, limits)
    with console.generating(label, len(requests)) as on_progress:
        answered = answer_all(_Watched(backend, len(requests), on_progress), requests, store, subject)
    prompts = [backend.prompt_of(request) for request in requests]
    return build_lines(task, requests, answered.answers, prompts), answered.num_asked


class _Watched:
    """A back end that tells how many of all requests have their answer; those in the store count from the start."""

    def __init__(self, backend: Backend, total: int, on_progress: Callable[[int, int], None]) -> None:
        self._backend, self._total, self._on_progress = backend, total, on_progress

    def prompt_of(self, request: Request) -> str:
        return self._backend.prompt_of(request)

    def answer(self, requests: Sequence[Request], on_answer: OnAnswer) -> None:
        done = self._total - len(requests)

        def tell(answer: Answer) -> None:
            nonlocal done
            on_answer(answer)
            done += 1
            self._on_progress(done, self._total)

        self._backend.answer(requests, tell)


def grade_recipe_tasks(
    model: Any,
    loaded: LoadedModel,
    recipe: Recipe,
    tasks: Sequence[Task],
    adapter: Path | None,
    console: RunConsole,
    *,
    batch_size: int,
    own_store: Path,
) -> tuple[list[Line], int]:
    """Put a recipe's graded questions to its model as it stands now.

    Args:
        model: the model, its adapter as it is switched now.
        loaded: its base.
        recipe: gives style, sampling and limits.
        tasks: what is asked.
        adapter: the folder of the adapter that is on; ``None`` without one.
        console: shows how far it is.
        batch_size: questions answered together.
        own_store: where answers are kept if the recipe wants none of other runs.

    Returns:
        The lines, and how many answers an earlier run or evaluation had already.
    """
    stage = recipe.evaluate
    backend = TokenBackend(
        ModelWriter(model, loaded.tokenizer),
        loaded.tokenizer,
        prompt.Style(recipe.prompt.style),
        batch_size=batch_size,
    )
    name = name_base(loaded, accelerated=recipe.train.accelerate)
    digest = None if adapter is None else hash_adapter(adapter)
    lines: list[Line] = []
    num_asked = 0
    with AnswerStore(store_path(name, digest) if stage.reuse else own_store) as store:
        for task in tasks:
            found, asked = grade_task(
                backend,
                task,
                sampling=Sampling(stage.temperature, stage.top_p),
                seeds=range(stage.seed, stage.seed + stage.seeds),
                limits=Limits(stage.max_new_tokens, 0),
                store=store,
                subject=Subject(name, digest, task.sha256),
                console=console,
                label=task.name,
            )
            lines += found
            num_asked += asked
    return lines, len(lines) - num_asked


def count_prompt_tokens(tasks: Sequence[Task], style: prompt.Style, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the tokens of the longest prompt; a question that cannot be put to the model, and will fail, has none."""
    longest = 0
    for text in (item.prompt for task in tasks for item in task.items):
        with contextlib.suppress(DataError):
            longest = max(longest, len(prompt.encode_prompt(text, style, tokenizer)))
    return longest


def plan_comparison(tasks: Sequence[Task], *, seeds: int, flip_rate: float = FLIP_RATE) -> list[dict[str, Any]]:
    """Return what each task can show of a change, with the others beside it: ``task``, ``sentence``, ``power.Plan``."""
    plans = [(task, compute_plan(len(task.items), flip_rate, num_tasks=len(tasks), seeds=seeds)) for task in tasks]
    return [{"task": task.base, "sentence": plan.describe(), **asdict(plan)} for task, plan in plans]


# Who answered ---------------------------------------------------------------------------------------------------------


def name_base(loaded: LoadedModel, *, accelerated: bool) -> str:
    """Return all that its answers depend on: weights, precision, and the path that computes them.

    A Hub model goes by its commit, weights on disk by ``stamp_weights``.
    """
    facts = {
        "weights": loaded.resolved if loaded.revision else stamp_weights(Path(loaded.resolved)),
        "precision": loaded.precision,
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "accelerated": accelerated,
        "decoding": DECODING,
    }
    return json.dumps(facts, sort_keys=True)


def stamp_weights(path: Path) -> str:
    """Return what tells weights on disk from others, without reading 16 GB: a hash of samples of every file.

    Of each file of weights, configuration or tokenizer: name, size, and ``SAMPLES`` pieces spread over it, which are
    all of a small one. Training changes nearly every byte, so that no pieces would be left alone by it; a file's time
    says nothing, since copying changes it and some systems set it to one value.
    """
    digest = hashlib.sha256()
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    for file in (file for file in files if file.suffix in STAMPED):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for piece in range(SAMPLES):
                opened.seek(piece * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def hash_adapter(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights and configuration."""
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def store_path(model: str, adapter_sha256: str | None) -> Path:
    """Return where a model's answers are kept for good: in medcot's cache, a file for each model and adapter."""
    name = hashlib.sha256(f"{model} {adapter_sha256}".encode()).hexdigest()[:24]
    return default_cache_dir() / "answers" / f"{name}.jsonl"


# What came of it ------------------------------------------------------------------------------------------------------


def summarise_samples(
    tasks: Sequence[Task], before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return the ``eval`` part of run.json but for its source; empty where nothing was graded.

    Returns:
        ``n``, ``before`` and ``after`` (``scores.score`` over the questions of all tasks, the style of the asked ones
        included), the pooled change (``scores.compare``), and ``tasks``: task to its facts, ``before``, ``after`` and
        ``change``.
    """
    graded = [[line for line in lines if line["kind"] == "eval"] for lines in (before, after)]
    if not all(graded):
        return {}
    was, now = ({task: found[None] for task, found in group_by_task(lines).items()} for lines in graded)
    change = compare(was, now)
    by_task = {found["task"]: found for found in change["tasks"]}
    sides = {
        name: {**score(answers), "style": _measure_style(lines)}
        for name, answers, lines in zip(("before", "after"), graded, (before, after), strict=True)
    }
    return {
        **change["pooled"],
        **sides,
        "tasks": {
            task.base: {
                **task.facts,
                "before": score(was[task.base]),
                "after": score(now[task.base]),
                "change": by_task[task.base],
            }
            for task in tasks
        },
    }


def _measure_style(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return measure_style([completion for line in lines if (completion := read_completion(line)) is not None])


def tabulate(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Before and after side by side, for trackers: columns and rows."""
    columns = ["kind", "topic", "question", "gold", "before", "after", "outcome before", "outcome after"]
    later = {_place(line): line for line in after}
    rows = []
    for line in before:
        other = later[_place(line)]
        rows.append([
            line["kind"], line["topic"], line["question"], line["gold"],
            line["text"], other["text"], line["outcome"], other["outcome"],
        ])  # fmt: skip
    return columns, rows


def _place(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["kind"], line.get("task"), line["id"], line["seed"]
