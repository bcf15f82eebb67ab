"""Asking before and after: the same questions, the same seeds, one list of answers each time.

Two kinds of question are put to the model: the *asked* ones (the tutorial's and the recipe's), sampled and shown to a
person, and the *graded* ones, decoded greedily and counted. Their answers are kept as ``samples/before.jsonl`` and
``samples/after.jsonl``, complete enough that summary, comparison and report are made from those files alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medcot import prompt
from medcot.evaluate.grading import grade
from medcot.evaluate.run import compare, summarise
from medcot.evaluate.style import measure_style
from medcot.generate import Sampling, generate, sampling_defaults
from medcot.recipe import AskStage, Recipe
from medcot.records import Completion, Example, Finish, Grade, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medcot.train.progress import RunConsole

GREEDY = Sampling(temperature=0.0, top_p=1.0)
ASK_BATCH = 16


def choose_sampling(model: Any, ask: AskStage) -> Sampling:
    """Return the recipe's sampling, with the model's own or R1's where the recipe leaves it open."""
    own = sampling_defaults(model)
    return Sampling(
        temperature=own.temperature if ask.temperature is None else ask.temperature,
        top_p=own.top_p if ask.top_p is None else ask.top_p,
    )


def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    problems: Sequence[Example],
    console: RunConsole,
    *,
    graded_batch: int,
) -> list[dict[str, Any]]:
    """Put every question to the model as it stands now; one sample line a question.

    Args:
        model: the model, adapter as it is switched now.
        tokenizer: its tokenizer.
        recipe: gives the asked questions, the prompt style, the sampling and the limits.
        problems: the graded questions.
        console: shows how far it is.
        graded_batch: graded questions answered together.
    """
    questions = list(dict.fromkeys((prompt.TUTORIAL_QUESTION, *recipe.ask.questions)))
    instruction = recipe.evaluate.instruction
    style = prompt.Style(recipe.prompt.style)
    asked = [
        Example(id=f"ask-{number}", question=question, source="ask") for number, question in enumerate(questions, 1)
    ]
    lines = []
    for kind, examples, sampling, limit, batch_size in (
        ("ask", asked, choose_sampling(model, recipe.ask), recipe.ask.max_new_tokens, ASK_BATCH),
        ("eval", problems, GREEDY, recipe.evaluate.max_new_tokens, graded_batch),
    ):
        if not examples:
            continue
        suffix = f" {instruction}" if kind == "eval" and instruction else ""
        worded = [example.question + suffix for example in examples]
        prompts = [prompt.encode_prompt(question, style, tokenizer) for question in worded]
        with console.generating("questions" if kind == "ask" else "graded problems", len(examples)) as on_progress:
            generated = generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=limit,
                sampling=sampling,
                seed=recipe.ask.seed,
                batch_size=batch_size,
                stop_at_eos=kind == "eval" or not recipe.ask.ignore_eos,
                on_progress=on_progress,
            )
        for example, question, ids, (tokens, finish) in zip(examples, worded, prompts, generated, strict=True):
            completion = prompt.split_completion(tokens, tokenizer, num_prompt_tokens=len(ids), finish=finish)
            text = prompt.render_prompt(question, style, tokenizer)
            lines.append(_sample(kind, example, text, completion))
    return lines


def _sample(kind: str, example: Example, prompt_text: str, completion: Completion) -> dict[str, Any]:
    verdict = grade(example, completion) if kind == "eval" else None
    return {
        "kind": kind,
        "id": example.id,
        "topic": example.topic,
        "question": example.question,
        "gold": example.gold,
        "prompt": prompt_text,
        "text": completion.text,
        "think": completion.think,
        "answer": completion.answer,
        "closed": completion.closed,
        "finish": completion.finish.value,
        "outcome": verdict.outcome.value if verdict else None,
        "parsed": verdict.parsed if verdict else None,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_think_tokens": completion.num_think_tokens,
        "num_answer_tokens": completion.num_answer_tokens,
    }


def summarise_samples(problems: Sequence[Example], lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The ``eval.before`` or ``eval.after`` part of run.json; ``None`` where nothing was graded."""
    graded = [line for line in lines if line["kind"] == "eval"]
    if not graded:
        return None
    summary = summarise(problems, [_completion(line) for line in graded], [_grade(line) for line in graded])
    return {**summary, "style": measure_style([_completion(line) for line in lines])}


def compare_samples(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What changed: ``delta``, ``p_value``, ``gained``, ``lost``."""
    pairs = [[_grade(line) for line in lines if line["kind"] == "eval"] for lines in (before, after)]
    return compare(*pairs)


def tabulate(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Before and after side by side, for trackers: columns and rows."""
    columns = ["kind", "topic", "question", "gold", "before", "after", "outcome before", "outcome after"]
    later = {(line["kind"], line["id"]): line for line in after}
    rows = []
    for line in before:
        other = later[line["kind"], line["id"]]
        rows.append([
            line["kind"], line["topic"], line["question"], line["gold"],
            line["text"], other["text"], line["outcome"], other["outcome"],
        ])  # fmt: skip
    return columns, rows


def _completion(line: dict[str, Any]) -> Completion:
    return Completion(
        text=line["text"],
        think=line["think"],
        answer=line["answer"],
        closed=line["closed"],
        finish=Finish(line["finish"]),
        num_prompt_tokens=line["num_prompt_tokens"],
        num_think_tokens=line["num_think_tokens"],
        num_answer_tokens=line["num_answer_tokens"],
    )


def _grade(line: dict[str, Any]) -> Grade:
    return Grade(Outcome(line["outcome"]), line["parsed"])
