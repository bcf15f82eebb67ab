"""The data doctor for a source by itself, and for a run: it shows findings, keeps them, and stops on a red one.

In a run the doctor speaks twice. Texts are looked at before gigabytes of weights are loaded; rows of tokens after, when
there are rows. Both times the report is written first, so that what stopped a run can be read: data/report.html, for a
person, data/report.json for machines, and the findings themselves in run.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medcot import __version__, prompt
from medcot import folder as folders
from medcot.data.scan import Progress
from medcot.diagnosis import Diagnosis, Tools, known_ids, load_items, unreadable
from medcot.embedded import default_cache_dir
from medcot.errors import DataError, ModelError, NetworkError, UnfitDataError
from medcot.examination import examine_source
from medcot.job import Job
from medcot.model import load_tokenizer
from medcot.planning import list_problems, load_tasks
from medcot.recipe import Recipe, load_recipe
from medcot.records import Example
from medcot.report.data_page import render_data_page
from medcot.rows import CLINIC, RawData, TrainingData, check_accepted, encode_examples, read_examples
from medcot.treatment import check_left, examine_rows, examine_texts, run_items, treat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPORT, PAGE = "report.json", "report.html"  # in the run's data folder


def build_tools(recipe: Recipe, items: Sequence[tuple[str, Example]]) -> Tools:
    """Return what the doctor needs for a recipe, the tokenizer without the weights.

    Raises:
        ModelError: the recipe's model is not to be had.
        NetworkError: it is on the Hub, and there is no network.
    """
    stage = recipe.model
    tokenizer = load_tokenizer(
        stage.source,
        precision=stage.precision.value,
        revision=stage.revision,
        allow_pickle=stage.allow_pickle,
        trust_remote_code=stage.trust_remote_code,
    )
    return Tools(tokenizer, prompt.Style(recipe.prompt.style), tuple(items))


def diagnose(
    source: str,
    recipe: str = "default",
    against: Sequence[str] | None = None,
    *,
    workers: int = 0,
    keep_cache: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Diagnosis:
    """Look at a source by itself; one that cannot be read has a finding that says so.

    Args:
        source: a path or a Hub id.
        recipe: whose model, style and limits to look with.
        against: benchmarks whose questions must not be there; ``None`` for the recipe's.
        workers: processes; 0 for one a core.
        keep_cache: remember what was looked at, in medcot's cache folder.
        on_progress: told after each chunk of rows.

    Raises:
        RecipeError: no such recipe, or one that accepts what is no finding.
    """
    resolved = load_recipe(recipe, [f"data.source={source}"])
    check_accepted(resolved.data.accept, known_ids())
    problems = list_problems(load_tasks(resolved.evaluate))
    try:
        items = run_items(resolved, problems) if against is None else load_items(against)
        try:
            tools = build_tools(resolved, items)
        except (ModelError, NetworkError) as error:
            tools = Tools(None, prompt.Style(resolved.prompt.style), items, str(error.value))
        if source.startswith(CLINIC):
            return _diagnose_built_in(resolved, tools)
        cache = default_cache_dir() / "tallies" if keep_cache else None
        return examine_source(
            resolved, tools, workers=workers or os.cpu_count() or 1, cache=cache, on_progress=on_progress
        )
    except (DataError, NetworkError) as error:
        return unreadable(error)


def _diagnose_built_in(recipe: Recipe, tools: Tools) -> Diagnosis:
    """Look at problems that are generated, as a run does: there is no file to stream."""
    raw = read_examples(recipe)
    treated = treat(raw, recipe, tools.items)
    texts = examine_texts(raw, treated, recipe, tools)
    if tools.tokenizer is None:
        return texts
    return texts.joined(examine_rows(encode_examples(treated.raw, recipe, tools.tokenizer), recipe, tools.tokenizer))


def save_report(diagnosis: Diagnosis, folder: Path) -> None:
    """Write report.json and report.html into a folder, which is made where there is none.

    Raises:
        OutputError: it cannot be written.
    """
    report = diagnosis.report(__version__)
    folder.mkdir(parents=True, exist_ok=True)
    folders.write_json(folder / REPORT, report)
    folders.write_text(folder / PAGE, render_data_page(report))


@dataclass
class Admission:
    """The data of a run, and what the doctor says of it so far."""

    raw: RawData
    diagnosis: Diagnosis

    @classmethod
    def of(cls, job: Job, raw: RawData, problems: Sequence[tuple[str, Example]]) -> Admission:
        """Look at the texts, and take out what must not be trained on.

        Raises:
            UnfitDataError: a red finding.
        """
        items = run_items(job.recipe, problems)
        treated = treat(raw, job.recipe, items)
        admission = cls(treated.raw, examine_texts(raw, treated, job.recipe, build_tools(job.recipe, items)))
        admission._decide(job)
        check_left(raw, treated)
        return admission

    def pass_gate(self, job: Job, data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put the rows of tokens before the gate.

        Raises:
            UnfitDataError: a red finding.
        """
        self.diagnosis = self.diagnosis.joined(examine_rows(data, job.recipe, tokenizer))
        self._decide(job)
        for finding in self.diagnosis.findings:
            if finding.severity != "info":
                job.console.warn(f"{finding.id}: {finding.says}")

    def _decide(self, job: Job) -> None:
        save_report(self.diagnosis, job.run.data)
        job.record(data={**job.facts["data"], "doctor": self.diagnosis.summary()})
        stops = self.diagnosis.stops
        if not stops:
            return
        worst, others = stops[0], "".join(f", {finding.id}" for finding in stops[1:])
        accepted = "".join(f", {name}" for name in job.recipe.data.accept)
        raise UnfitDataError(
            f"{worst.id}: {worst.says}",
            "A red finding stops a run before its first step" + (f"; so do{others[1:]}" if others else ""),
            f"{worst.fix.rstrip('.')}. {job.run.data / PAGE} shows the rows;"
            f" data.accept=[{worst.id}{others}{accepted}] trains all the same",
        )
