"""Runs of the whole job in a second: a few short rows, and what is read from the folder they leave."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from medcot import folder, pipeline

NUM_ROWS = 18  # steps of 4: the last of an epoch has two rows


def make_rows(count: int = NUM_ROWS) -> list[dict[str, Any]]:
    return [
        {
            "Question": f"A patient drinks {i} cups and then {i % 5} more.{' Please add.' * (i % 4)} How many?",
            "Complex_CoT": f"I add {i} and {i % 5}. " * (1 + i % 3) + f"That is {i + i % 5}.",
            "Response": f"Final answer: {i + i % 5} cups",
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run_job(recipe: Path, out: Path | None, *overrides: str, **more: Any) -> tuple[dict[str, Any], str]:
    stream = io.StringIO()
    console = Console(file=stream, width=300)
    try:
        return pipeline.run(recipe, overrides=overrides, out=out, console=console, **more), stream.getvalue()
    finally:
        print(stream.getvalue())


def read_facts(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def read_losses(out: Path) -> list[float]:
    return [line["loss"] for line in folder.read_lines(out / "metrics.jsonl") if "loss" in line]


def read_validation(out: Path) -> list[tuple[int, float]]:
    lines = folder.read_lines(out / "metrics.jsonl")
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
