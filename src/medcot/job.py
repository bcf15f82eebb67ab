"""One run being done: the folder that it fills, the facts so far, the screen and the tracker.

Everything a job learns goes to ``run.json`` at once, so that a run which fails or is killed says how far it came, and a
resumed run goes on with the same facts. A job ends in one of three states: complete, stopped (by its user) or failed,
with the error's words, from which secrets are taken out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from medcot import folder as folders
from medcot.errors import RecipeError
from medcot.recipe import Recipe, dump_recipe, load_recipe
from medcot.records import Run
from medcot.secrets import redact
from medcot.train.progress import RunConsole

if TYPE_CHECKING:
    from rich.console import Console

    from medcot.tracking import Tracker


class Job:
    """One run being done: its folder, its facts so far, its screen and its tracker."""

    def __init__(
        self, run: Run, recipe: Recipe, facts: dict[str, Any], console: RunConsole, *, before: Path | None = None
    ) -> None:
        self.run, self.recipe, self.facts, self.console = run, recipe, facts, console
        self.is_under_way = False  # whether model and data were taken; what is refused before leaves runs/latest alone
        self._before = before
        self.tracker: Tracker

    def __enter__(self) -> Job:
        from medcot.machine import list_versions
        from medcot.tracking import NoTracker

        self.tracker = NoTracker()
        self.record(status="running", error=None, versions=list_versions())
        return self

    def describe_machine(self) -> None:
        """Record what the run is made on; this imports torch."""
        from medcot.machine import describe_machine

        self.record(machine=describe_machine())

    def open_tracker(self) -> None:
        """Start tracking; from inside the job, so that a tracker that cannot start is recorded as a failed run."""
        from medcot.tracking import open_tracker

        tracking = self.recipe.tracking
        self.tracker = open_tracker(
            tracking.tracker,
            project=tracking.project,
            folder=self.run.folder,
            job_type=tracking.job_type,
            run_name=tracking.run_name,
            anonymous=tracking.anonymous,
            config=self.recipe.model_dump(mode="json"),
            announce=self.console.warn,
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is not None:
                stopped = issubclass(kind, KeyboardInterrupt)
                self.record(status="stopped" if stopped else "failed", error=redact(f"{kind.__name__}: {error}"))
                if not stopped and not self.is_under_way:
                    folders.point_back(self.run.folder, self._before)
        finally:
            self.tracker.finish()

    def record(self, **facts: Any) -> None:
        """Add facts to run.json, and write it."""
        self.facts.update(facts)
        folders.write_json(self.run.facts, self.facts)

    @contextmanager
    def stage(self, name: str) -> Iterator[Any]:
        """Show a stage and keep its seconds; a resumed run adds to what the stage took before."""
        started_s = time.monotonic()
        with self.console.stage(name) as line:
            try:
                yield line
            finally:
                timing = self.facts["timing"]
                timing[name] = round(timing.get(name, 0.0) + time.monotonic() - started_s, 3)
                self.record()


def open_job(
    recipe: str | Path | Recipe,
    overrides: list[str],
    stages: Mapping[str, Any],
    out: Path | None,
    resume: bool,
    console: Console | None,
) -> Job:
    """Make the folder of a new run, or find the one to go on with.

    Raises:
        RecipeError: a recipe that cannot be accepted, or a resumed run with overrides.
        OutputError: the folder cannot be used, or holds no run to go on with.
    """
    screen = RunConsole(console)
    given = [*([str(recipe)] if recipe != "default" else []), *overrides, *stages]
    if resume and given:
        raise RecipeError(
            f"--resume was given with {', '.join(given)}",
            "A resumed run keeps the recipe it was started with, else its two halves would not be one run",
            "Leave them out, and name the run with --out; or start a new run",
        )
    if not resume:
        resolved = load_recipe(recipe, overrides, stages)
        text = dump_recipe(resolved)
        if redact(text) != text:
            raise RecipeError(
                "the recipe holds the value of a secret",
                "A recipe is saved with the run, where others may read it",
                "Take the token out; medcot finds secrets by itself ('medcot doctor' says where)",
            )
        before = folders.find_latest()
        new = folders.create_run(resolved.name, out)
        folders.write_text(new.recipe, text)
        screen.note(f"recipe {resolved.name}; run folder {new.folder}")
        return Job(new, resolved, _first_facts(resolved), screen, before=before)
    old = folders.find_resumable(out)
    screen.note(f"going on with {old.folder}")
    saved = load_recipe(old.recipe)
    facts = json.loads(old.facts.read_text(encoding="utf-8")) if old.facts.exists() else _first_facts(saved)
    return Job(old, saved, facts, screen)


def _first_facts(recipe: Recipe) -> dict[str, Any]:
    return {
        "recipe": recipe.model_dump(mode="json"),
        "status": "running",
        "model": {},
        "data": {},
        "train": {},
        "eval": {},
        "artifacts": {"adapter": None, "merged": None, "report": None},
        "timing": {},
    }
