"""The command line: it parses words, calls one function of the package, and prints what came back.

Three things are decided here and nowhere else. *Speed*: ``medcot --help`` answers in under 300 ms, so each command
imports what it needs inside itself, and neither torch nor pydantic is loaded to print a help page. *Errors*: a
``MedcotError`` becomes one message on standard error (what was met, the rule, the remedy) and exit code 2 without a
traceback; Ctrl-C becomes exit code 130 and the command that goes on; anything else is a defect of ours and keeps its
traceback, with secrets taken out. *Environment*: ``main`` is the only place in medcot that sets environment variables,
for its own process, because some libraries listen to nothing else when they are imported. A variable that the user has
set keeps its value.

Typer rather than argparse, for its help pages; Rich's tracebacks stay off, since they can print local variables.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medcot import __version__, cli_eval, cli_export, cli_push, cli_serve, cli_ui
from medcot.errors import OutputError
from medcot.terminal import LATEST, open_console, reporting

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from medcot.records import Run


# What libraries read at import, with the value that keeps them silent or out of each other's way.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns about every worker process of datasets
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

app = typer.Typer(
    name="medcot",
    help="Fine-tune open reasoning models on medical questions, and see what changed. For research and education;"
    " not for diagnosis or treatment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"medcot {__version__}")
        raise typer.Exit()


data_app = typer.Typer(help="Look at training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Let the libraries speak too.")] = False,
) -> None:
    if not verbose:
        warnings.filterwarnings("ignore")
        logging.getLogger().setLevel(logging.ERROR)


@app.command()
def run(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE|KEY.SUB=VALUE",
            help="A recipe file or a shipped recipe's name (default: default), and values that override its keys.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; by default runs/RECIPE-TIME.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show recipe, plan and one row; train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with --out, else with runs/latest.")] = False,
) -> None:
    """Ask, fine-tune, ask again, save and report: the whole job."""
    recipe, overrides = split_arguments(arguments or [])
    with reporting(hint=f"'{_resume_command(out)}' goes on with it"):
        from medcot import pipeline

        console = open_console()
        if dry_run:
            if resume or out is not None:
                raise typer.BadParameter("--dry-run starts nothing: leave out --resume and --out")
            pipeline.plan(recipe, overrides, console=console)
            return
        facts = pipeline.run(recipe, overrides=overrides, out=out, resume=resume, console=console)
        if facts:  # a process that only helped to train has none
            print_summary(facts, console)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    with reporting():
        from rich.table import Table
        from rich.text import Text

        from medcot.recipe import list_recipes

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        for name, description in list_recipes().items():
            table.add_row(name, Text(description))
        open_console().print(table)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Look at this machine: what is there, what is missing, which recipe suits it."""
    with reporting():
        from dataclasses import asdict

        from medcot.doctor import examine

        findings = examine()
        if as_json:
            import json

            typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
            return
        from rich.table import Table
        from rich.text import Text

        console = open_console()
        marks = {"ok": ("✓", "green"), "note": ("·", "yellow"), "problem": ("✗", "bold red")}
        if console.options.ascii_only:
            marks = {"ok": ("ok", "green"), "note": ("-", "yellow"), "problem": ("x", "bold red")}
        table = Table.grid(padding=(0, 1))
        seen = ""
        for finding in findings:
            table.add_row(
                Text(*marks[finding.status]), Text(finding.area * (finding.area != seen), "bold"), finding.text
            )
            seen = finding.area
        console.print(table, highlight=False, markup=False)


@data_app.command(name="doctor")
def data_doctor(
    source: Annotated[str, typer.Argument(help="File, folder or Hub id; '[:500]' behind it takes the first 500.")],
    recipe: Annotated[str, typer.Option(help="Whose model, style and limits to look with.")] = "default",
    against: Annotated[
        list[str] | None,
        typer.Option(help="Benchmark whose questions must not be there: medqa, medqa=FILE, FILE, Hub id. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and report.json.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings and verdict as JSON, nothing else.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 for one a core.")] = 0,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Remember nothing of what was looked at.")] = False,
) -> None:
    """Prove what the data is before the first step. Exit code 1 if a finding is red, 2 if the source cannot be read."""
    with reporting():
        from medcot.admission import diagnose, save_report
        from medcot.report.data_screen import print_diagnosis, watch_scan

        console = open_console()
        with watch_scan(console, shown=not as_json) as on_progress:
            diagnosis = diagnose(
                source, recipe, against, workers=workers, keep_cache=not no_cache, on_progress=on_progress
            )
        if out is not None:
            save_report(diagnosis, out)
        if as_json:
            import json

            typer.echo(json.dumps(diagnosis.summary(), indent=2, ensure_ascii=False))
        else:
            print_diagnosis(diagnosis, console)
            if out is not None:
                console.print(f"report: {out / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(diagnosis.exit_code)


app.command()(cli_eval.tasks)
app.command(name="eval")(cli_eval.evaluate)
app.command()(cli_eval.compare)
app.command()(cli_eval.grade)
app.command()(cli_export.export)
app.command()(cli_export.verify)
app.command()(cli_push.push)
app.command()(cli_serve.serve)
app.command()(cli_ui.ui)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    run_dir: Annotated[Path, typer.Option("--run", help="Run folder whose model answers.")] = LATEST,
    base: Annotated[bool, typer.Option("--base", help="Ask the model as it was before training.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, thinking included.")] = 1200,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 3407,
) -> None:
    """Ask a tuned model one question; its thinking is dimmed."""
    with reporting():
        folder = find_run(run_dir).folder
        from medcot import pipeline

        with _streaming(open_console()) as on_text:
            pipeline.ask(question, folder, base=base, max_new_tokens=max_new_tokens, seed=seed, on_text=on_text)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Run folder.")] = LATEST) -> None:
    """Draw report.html again from the files of a run."""
    with reporting():
        found = find_run(folder)
        from medcot.report import render_report

        typer.echo(render_report(found))


def split_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """Return the recipe and the overrides: whatever holds a ``=`` is an override, what is left is the recipe.

    Raises:
        typer.BadParameter: two recipes.
    """
    overrides = [argument for argument in arguments if "=" in argument]
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise typer.BadParameter(f"one recipe at a time, but there are {len(names)}: {', '.join(names)}")
    return names[0] if names else "default", overrides


def find_run(folder: Path) -> Run:
    """Return the run in a folder.

    Raises:
        OutputError: there is none.
    """
    from medcot.records import Run

    found = Run(folder)
    if not found.facts.is_file():
        raise OutputError(
            f"'{folder}' holds no run.json",
            "A run folder is what 'medcot run' fills",
            "Name one, such as runs/latest, or make one with 'medcot run'",
        )
    return found


def print_summary(facts: Mapping[str, Any], console: Console) -> None:
    """Print what a run came to, from the facts in its run.json; what a run did not do is left out."""
    from rich.table import Table
    from rich.text import Text

    console.print()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, line in _summary_lines(facts, "->" if console.options.ascii_only else "→"):
        if console.is_terminal:
            table.add_row(label, line)
        else:  # in a file, a path stays on one line however long it is
            console.print(Text(f"{label:<10}") + line, soft_wrap=True, highlight=False)
    if console.is_terminal:
        console.print(table)


def _summary_lines(facts: Mapping[str, Any], arrow: str) -> Iterator[tuple[str, Text]]:
    from rich.text import Text

    from medcot.train.progress import format_seconds

    evaluation = facts.get("eval") or {}
    before, after = evaluation.get("before"), evaluation.get("after")
    if before and after:
        style = "bold green" if after["accuracy"] > before["accuracy"] else "bold"
        change = Text.assemble(f"{_percent(before)} {arrow} ", (_percent(after), style))
        yield "accuracy", change + Text(f"  {_significance(evaluation, before, after)}", style="dim")
    training = facts.get("train") or {}
    if training.get("loss_first") is not None:
        yield (
            "loss",
            Text(f"{training['loss_first']:.3f} {arrow} {training['loss_last']:.3f} in {training['steps']:,} steps"),
        )
        speed = f"{training['tokens_per_s']:,.0f} tok/s ({training['trained_tokens_per_s']:,.0f} trained)"
        memory = training.get("peak_memory_gb")
        yield "speed", Text(speed + (f", peak memory {memory:.1f} GB" if memory is not None else ""))
    seconds = sum((facts.get("timing") or {}).values())
    if seconds:
        yield "time", Text(format_seconds(seconds))
    for name, path in (facts.get("artifacts") or {}).items():
        if path:
            yield name, Text(str(Path(facts.get("folder", "")) / path), style="cyan")


def _percent(part: Mapping[str, Any]) -> str:
    return f"{100 * part['accuracy']:.1f} %"


def _significance(evaluation: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    intervals = [f"{100 * low:.1f} to {100 * high:.1f}" for low, high in (before["ci95"], after["ci95"])]
    p_value = evaluation.get("p_value")
    p_text = "" if p_value is None else f", p {'< 0.0001' if p_value < 1e-4 else f'= {p_value:.4f}'}"
    return f"95 % intervals {intervals[0]} and {intervals[1]}{p_text}, n = {after['n']}"


@contextlib.contextmanager
def _streaming(console: Console) -> Iterator[Any]:
    """Yield ``on_text(piece, in_think)``, which prints pieces as they come; where nothing can be dimmed, tags tell."""
    from rich.text import Text

    from medcot.report.evidence import make_visible

    tags = not console.is_terminal or console.no_color
    was_thinking = False

    def write(text: str, style: str = "") -> None:
        # soft_wrap: the terminal breaks the line, since a piece does not know in which column it begins.
        # A model can write escape codes: on a terminal they would move the cursor, or worse.
        console.print(Text(make_visible(text), style=style), end="", soft_wrap=True, highlight=False)

    def on_text(piece: str, in_think: bool) -> None:
        nonlocal was_thinking
        if in_think and not was_thinking and tags:
            write("<think>\n")
        if was_thinking and not in_think:
            write("\n</think>\n\n" if tags else "\n\n")
            piece = piece.lstrip("\n")
        was_thinking = in_think
        write(piece, "dim" if in_think else "")

    try:
        yield on_text
    finally:
        console.print()


def _resume_command(out: Path | None) -> str:
    return "medcot run --resume" + (f" --out {out}" if out is not None else "")


def _redacted_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from medcot.secrets import redact

    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def main() -> None:
    """Run the command line as this process."""
    for stream in (sys.stdout, sys.stderr):
        # A model may write any character, a Windows pipe may not take it; a question mark is better than a crash.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if "--verbose" not in sys.argv:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    sys.excepthook = _redacted_traceback
    app()
