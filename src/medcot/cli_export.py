"""The commands ``export`` and ``verify``: they read words, call ``exporting``, and let it print what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medcot.terminal import LATEST, open_console, reporting

_PROMPTS, _TOKENS = 16, 64  # exporting's own, which a help page does not wait for


def export(
    folder: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN")] = LATEST,
    to: Annotated[
        str,
        typer.Option(
            help="Kinds: adapter, merged-16bit, merged-32bit, merged-4bit, gguf[:q8_0,f16,bf16,f32,q4_k_m,…], ollama.",
        ),
    ] = "merged-16bit,gguf",
    out: Annotated[
        Path | None, typer.Option(help="Where artefacts go; by default the run folder.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="16-bit original to merge into, where the run's base is in 4 bit.", show_default=False),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Questions that the proof asks.")] = _PROMPTS,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens compared of each answer.")] = _TOKENS,
) -> None:
    """Make artefacts of a run, each proven equal to the tuned model. Exit code 1 if one is not."""
    with reporting(hint="What was under way is gone, what stood before still stands"):
        from medcot import exporting
        from medcot.export.kinds import parse_kinds

        kinds = parse_kinds(to)
        exporting.export(
            folder, kinds, out=out, original=base, num_prompts=prompts, num_tokens=tokens, console=open_console()
        )


def verify(
    path: Annotated[Path, typer.Argument(help="Artefact: a folder, or a GGUF file.")],
    run: Annotated[Path, typer.Option(help="Run folder whose model it should be.")] = LATEST,
    prompts: Annotated[int, typer.Option(min=1, help="Questions that the proof asks.")] = _PROMPTS,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens compared of each answer.")] = _TOKENS,
) -> None:
    """Prove again that an artefact is a run's tuned model, and its files those exported. Exit code 1 if not."""
    with reporting():
        from medcot import exporting

        exporting.verify(path, run, num_prompts=prompts, num_tokens=tokens, console=open_console())
