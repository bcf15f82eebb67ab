"""The commands of evaluation: ``tasks``, ``eval``, ``grade`` and ``compare``.

Each reads words, calls one function, and prints what came back, as everywhere in ``cli.py``, where they are put into
the program. They stand apart because ``eval`` alone has more settings than all other commands together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from medcot.errors import DataError, RecipeError
from medcot.terminal import open_console, read_choice, reporting

if TYPE_CHECKING:
    from medcot.answering import Choice
    from medcot.evaluate.endpoint import Endpoint

_Numbers = TypeVar("_Numbers", int, float)

MODEL, ASKING, SERVER = "Who is asked", "How it is asked", "A server (--endpoint)"


def tasks() -> None:
    """List the tasks and suites that a model can be evaluated on."""
    with reporting():
        from medcot.report.eval_screen import print_tasks

        print_tasks(open_console())


def grade(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON Lines with output, kind (letter, yesno, number, text) and gold; - for standard input."
        ),
    ],
    forced: Annotated[
        bool, typer.Option("--forced-thinking", help="The prompt opened the thinking: text without a tag is thinking.")
    ] = False,
    summary: Annotated[bool, typer.Option("--summary", help="A table on standard error, also into a pipe.")] = False,
) -> None:
    """Grade outputs made anywhere: each line back, with outcome and parsed put in. Exit code 2 if one cannot be."""
    with reporting():
        from medcot.evaluate.grade_file import Thinking, grade_file
        from medcot.report.eval_screen import print_grades

        file = Path("/dev/stdin") if file == Path("-") else file
        thinking = Thinking.FORCED if forced else Thinking.TAGGED
        bad: list[DataError] = []
        print_grades(grade_file(file, thinking=thinking, on_bad_line=bad.append), summary=summary)
        if bad:
            raise DataError(
                f"{len(bad):,} of the lines cannot be graded. {bad[0].value}",
                bad[0].rule,
                f"{bad[0].remedy}; lines that cannot be graded came back with 'error' and without outcome",
            )


def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of runs and evaluations; the first model is the base.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and results.json.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, nothing else.")] = False,
) -> None:
    """Compare what models answered: better, worse, or no detectable change, task by task."""
    with reporting():
        import io

        from rich.console import Console

        from medcot import evaluation

        console = Console(file=io.StringIO()) if as_json else open_console()
        results = evaluation.compare(folders, out=out, console=console)
        if as_json:
            from medcot.folder import to_json

            typer.echo(to_json(results, indent=2))


def evaluate(
    suite: Annotated[
        str, typer.Argument(help="Tasks and suites, separated by commas: quick, medqa:200, pubmedqa=FILE.")
    ],
    run: Annotated[
        Path | None, typer.Option(help="Run folder: its model, in its prompt style.", rich_help_panel=MODEL)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, GGUF, embedded; a server's name.", rich_help_panel=MODEL)
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or Hub id; the plain base is asked too.", rich_help_panel=MODEL)
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="Prompt: chat, tutorial or short.", rich_help_panel=MODEL, show_default="chat")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Hub commit of the model.", rich_help_panel=MODEL)] = None,
    precision: Annotated[
        str | None, typer.Option(help="How weights are held.", rich_help_panel=MODEL, show_default="auto")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="What writes: local or vllm.", rich_help_panel=MODEL, show_default="local")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Answers written together.", rich_help_panel=MODEL, show_default="fits")
    ] = None,
    think_tokens: Annotated[int, typer.Option(min=0, help="Longest thinking.", rich_help_panel=ASKING)] = 2048,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.", rich_help_panel=ASKING)] = 512,
    ending: Annotated[
        str,
        typer.Option(
            help="At the cap on thinking: written (cut), forced (ask for the answer), likelihood (of the choices).",
            rich_help_panel=ASKING,
        ),
    ] = "written",
    seeds: Annotated[int, typer.Option(min=1, help="Answers a question.", rich_help_panel=ASKING)] = 1,
    seed: Annotated[int, typer.Option(help="The first of them.", rich_help_panel=ASKING)] = 3407,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Instead of temperature 0.6, top_p 0.95.", rich_help_panel=ASKING)
    ] = False,
    controls: Annotated[
        str, typer.Option(help="Of 50 items: rotate, blank, no-thinking, or all.", rich_help_panel=ASKING)
    ] = "",
    budgets: Annotated[
        str, typer.Option(help="Accuracy against thinking: 256,512,1024,2048.", rich_help_panel=ASKING)
    ] = "",
    flip_rate: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share assumed to change, for the plan.", rich_help_panel=ASKING)
    ] = 0.2,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; by default evals/SUITE-TIME.", show_default=False)
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep answers in the folder alone, and find none elsewhere.")
    ] = False,
    endpoint: Annotated[str | None, typer.Option(help="Address, up to and with /v1.", rich_help_panel=SERVER)] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Name of the secret to send.", rich_help_panel=SERVER, show_default="by host")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests under way.", rich_help_panel=SERVER, show_default="8")
    ] = None,
    rpm: Annotated[float | None, typer.Option(help="Requests a minute.", rich_help_panel=SERVER)] = None,
    tpm: Annotated[float | None, typer.Option(help="Tokens a minute.", rich_help_panel=SERVER)] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds without a sign of life.", rich_help_panel=SERVER, show_default="600")
    ] = None,
    price: Annotated[
        str | None, typer.Option(help="Of a million tokens, prompt,completion: 1.1,4.4", rich_help_panel=SERVER)
    ] = None,
    stream: Annotated[
        bool | None, typer.Option("--stream", help="Take replies in pieces.", rich_help_panel=SERVER)
    ] = None,
    thinks: Annotated[
        str | None,
        typer.Option(help="auto; tags where it may not close.", rich_help_panel=SERVER, show_default="auto"),
    ] = None,
    no_thinking: Annotated[
        str | None, typer.Option(help="JSON fields that keep it from thinking.", rich_help_panel=SERVER)
    ] = None,
    extra: Annotated[str | None, typer.Option(help="JSON fields of every request.", rich_help_panel=SERVER)] = None,
) -> None:
    """Evaluate a model on medical benchmarks, strictly graded; with an adapter, against its plain base."""
    with reporting(hint="The same command goes on with it"):
        from medcot import evaluation
        from medcot.evaluate.backends import Ending, Limits

        who: Choice | Endpoint
        serving = {"--api-key-env": api_key_env, "--concurrency": concurrency, "--rpm": rpm, "--tpm": tpm,
                   "--timeout": timeout, "--price": price, "--stream": stream, "--thinks": thinks,
                   "--no-thinking": no_thinking, "--extra": extra}  # fmt: skip
        holding = {"--precision": precision, "--engine": engine, "--batch-size": batch_size, "--style": style}
        if endpoint is not None:
            _refuse_together("--endpoint", {"--run": run, "--adapter": adapter, "--revision": revision, **holding})
            who = _find_endpoint(
                model, endpoint, price, thinks or "auto", api_key_env=api_key_env, concurrency=concurrency or 8,
                requests_a_minute=rpm, tokens_a_minute=tpm, timeout_s=timeout or 600.0, stream=bool(stream),
                no_thinking=no_thinking, extra=extra,
            )  # fmt: skip
        else:
            _refuse_together("no --endpoint", serving)
            who = _find_model(run, model, adapter, style, revision, precision, engine, batch_size)
        settings = evaluation.Settings(
            limits=Limits(think_tokens, answer_tokens, read_choice(ending, Ending, "--ending")),
            temperature=0.0 if greedy else evaluation.DEFAULT_TEMPERATURE,
            top_p=1.0 if greedy else evaluation.DEFAULT_TOP_P,
            seeds=tuple(range(seed, seed + seeds)),
            controls=evaluation.CONTROLS if controls == "all" else tuple(_split(controls)),
            budgets=tuple(_read_number(text, "--budgets", int) for text in _split(budgets)),
            flip_rate=flip_rate,
        )
        evaluation.evaluate(suite, who, settings, out=out, keep_answers=not no_cache, console=open_console())


def _find_model(
    run: Path | None,
    model: str | None,
    adapter: str | None,
    style: str | None,
    revision: str | None,
    precision: str | None,
    engine: str | None,
    batch_size: int | None,
) -> Choice:
    """Return the model that the options name: a run's, or one by itself."""
    from dataclasses import replace

    from medcot.answering import Choice, Engine, choose_run
    from medcot.prompt import Style
    from medcot.stages import Precision

    if run is not None:
        _refuse_together("--run", {"--model": model, "--adapter": adapter, "--revision": revision})
        who = choose_run(run)
    elif model is not None:
        who = Choice(model, adapter, revision=revision)
    else:
        raise RecipeError(
            "nobody is named to be asked",
            "An evaluation is of a run, a model, or a model with an adapter",
            "Add --run runs/latest, or --model with a Hub id or a folder",
        )
    told: dict[str, Any] = {
        "engine": None if engine is None else read_choice(engine, Engine, "--engine"),
        "style": None if style is None else read_choice(style, Style, "--style"),
        "precision": None if precision is None else read_choice(precision, Precision, "--precision").value,
        "batch_size": batch_size,
    }
    return replace(who, **{key: value for key, value in told.items() if value is not None})


def _find_endpoint(model: str | None, base_url: str, price: str | None, thinks: str, **settings: Any) -> Endpoint:
    from medcot.evaluate.replies import Thinks
    from medcot.evaluate.servers import build_endpoint

    if model is None:
        raise RecipeError("--endpoint without --model", "A server is asked for a model by name", "Add --model NAME")
    costs = None if price is None else [_read_number(text, "--price", float) for text in _split(price)]
    if costs is not None and len(costs) != 2:
        raise RecipeError(f"--price {price}", "It is two numbers, of prompt and completion", "Write it like 1.1,4.4")
    both = None if costs is None else (costs[0], costs[1])
    return build_endpoint(model, base_url, price=both, thinks=read_choice(thinks, Thinks, "--thinks"), **settings)


def _refuse_together(option: str, others: Mapping[str, object]) -> None:
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise RecipeError(f"{option} together with {given[0]}", f"{option} says who is asked", "Leave one of them out")


def _read_number(text: str, option: str, kind: type[_Numbers]) -> _Numbers:
    try:
        return kind(text)
    except ValueError:
        words = "whole numbers" if kind is int else "numbers"
        raise RecipeError(f"{option} holds '{text}'", f"It is a list of {words}", "Write it like 256,512") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
