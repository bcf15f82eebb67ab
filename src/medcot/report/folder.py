"""What a run folder holds, read for the report.

A report is wanted most when something went wrong, so every file but ``run.json`` may be missing, and a line that a kill
cut in half is skipped; both are said in ``notes``, which the page prints. A key of ``run.json`` that is absent reads as
"not known", never as zero.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from medcot.errors import DataError
from medcot.records import Completion, Finish, Outcome, Run


@dataclass(frozen=True, slots=True)
class Sample:
    """One question asked of one model, a line of ``samples/*.jsonl``; ``outcome`` is ``None`` where none is given."""

    kind: str  # "ask" or "eval"
    id: str
    topic: str | None
    question: str
    gold: str | None
    prompt: str
    outcome: str | None
    parsed: str | None
    completion: Completion | None  # None where nothing was written, because it failed
    task: str | None = None
    control: str | None = None
    seed: int | None = None
    lenient_outcome: str | None = None
    forced: bool = False  # thinking was closed for the model
    error: str | None = None  # why it failed

    @property
    def key(self) -> tuple[str | None, str | None, str, int | None]:
        """By what the same question is known before and after: several tasks and seeds may share an id."""
        return self.task, self.control, self.id, self.seed

    @property
    def correct(self) -> bool:
        """Whether it was graded and right."""
        return self.outcome == Outcome.CORRECT


@dataclass(frozen=True, slots=True)
class Pair:
    """The same question before and after; either side may be missing."""

    before: Sample | None
    after: Sample | None

    @property
    def either(self) -> Sample:
        """A side that is there, for what both share: question, gold, topic."""
        sample = self.before or self.after
        assert sample is not None, "a pair is made of at least one sample"
        return sample


@dataclass(frozen=True, slots=True)
class Folder:
    """Everything the report draws from."""

    facts: dict[str, Any]
    recipe_text: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    before: list[Sample]
    after: list[Sample]
    quarantine_reasons: list[tuple[str, int]]  # reason, rows; most frequent first
    doctor: dict[str, Any] = field(default_factory=dict)  # data/report.json, or what run.json keeps of it
    data_page: str | None = None  # data/report.html as seen from the run folder, if there
    notes: list[str] = field(default_factory=list)

    @property
    def sources(self) -> list[dict[str, Any]]:
        """Lineage of each training source, from the data report, else from run.json."""
        train = (self.facts.get("data") or {}).get("train") or {}
        sources = self.doctor.get("sources") or train.get("sources") or []
        return [source for source in sources if isinstance(source, dict)]

    def pairs(self, kind: str) -> list[Pair]:
        """Return the questions of one kind, before and after side by side, in the order they were asked."""
        before = {sample.key: sample for sample in self.before if sample.kind == kind}
        after = {sample.key: sample for sample in self.after if sample.kind == kind}
        return [Pair(before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])]


def read_folder(run: Run) -> Folder:
    """Read a run folder.

    Raises:
        DataError: no ``run.json``, or one that is not a JSON object.
    """
    notes: list[str] = []
    facts = _read_facts(run.facts)
    recipe_text, recipe = _read_recipe(run.recipe, notes)
    if not recipe and isinstance(facts.get("recipe"), dict):
        recipe = facts["recipe"]
        recipe_text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    reasons = Counter(str(row.get("reason", "")) for row in _read_lines(run.data / "quarantine.jsonl", notes))
    return Folder(
        facts=facts,
        recipe_text=recipe_text,
        recipe=recipe,
        metrics=_read_lines(run.metrics, notes),
        before=[build_sample(line) for line in _read_lines(run.samples / "before.jsonl", notes)],
        after=[build_sample(line) for line in _read_lines(run.samples / "after.jsonl", notes)],
        quarantine_reasons=reasons.most_common(),
        doctor=_read_doctor(run, facts, recipe, notes),
        data_page=f"{run.data.name}/report.html" if (run.data / "report.html").is_file() else None,
        notes=notes,
    )


def _read_doctor(run: Run, facts: dict[str, Any], recipe: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    path = run.data / "report.json"
    if path.is_file():
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            notes.append(f"data/{path.name} is not JSON: {error}")
        else:
            if isinstance(report, dict):
                return report
            notes.append(f"data/{path.name} holds a {type(report).__name__}, no report.")
    kept = (facts.get("data") or {}).get("doctor")
    accepted = (recipe.get("data") or {}).get("accept") or []
    return {"accepted": accepted, **kept} if isinstance(kept, dict) else {}


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        facts = None
        met = f"'{path}' does not exist"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        facts = None
        met = f"'{path}' is not JSON: {error}"
    else:
        met = f"'{path}' holds a {type(facts).__name__}"
    if not isinstance(facts, dict):
        raise DataError(
            met,
            "A run folder holds a run.json",
            "Name the folder of a run, such as runs/latest",
        )
    return facts


def _read_recipe(path: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        notes.append(f"{path.name} is not YAML: {error}")
        return text, {}
    return text, values if isinstance(values, dict) else {}


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines, skipped = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        else:
            skipped += 1
    if skipped:
        notes.append(f"{skipped} unreadable line{'s' if skipped > 1 else ''} of {path.name} skipped.")
    return lines


def build_sample(line: Mapping[str, Any]) -> Sample:
    """Return a line of ``samples/*.jsonl`` or of an evaluation's ``items/`` as a sample; what it lacks stays empty."""
    names = ("topic", "gold", "outcome", "parsed", "task", "control", "lenient_outcome", "error")
    texts = {key: None if line.get(key) is None else str(line[key]) for key in names}
    return Sample(
        kind=str(line.get("kind") or "ask"),
        id=str(line.get("id") or line.get("question") or ""),
        question=str(line.get("question") or ""),
        prompt=str(line.get("prompt") or ""),
        completion=_build_completion(line),
        seed=line["seed"] if isinstance(line.get("seed"), int) else None,
        forced=bool(line.get("forced", False)),
        **texts,
    )


def _build_completion(line: Mapping[str, Any]) -> Completion | None:
    if line.get("finish") is None and not line.get("text"):
        return None
    return Completion(
        text=str(line.get("text") or ""),
        think=str(line.get("think") or ""),
        answer=str(line.get("answer") or ""),
        closed=bool(line.get("closed", False)),
        finish=Finish.LENGTH if line.get("finish") == Finish.LENGTH else Finish.EOS,
        num_prompt_tokens=int(line.get("num_prompt_tokens") or 0),
        num_think_tokens=int(line.get("num_think_tokens") or 0),
        num_answer_tokens=int(line.get("num_answer_tokens") or 0),
    )
