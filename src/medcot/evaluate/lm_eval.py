"""An evaluation in the files of EleutherAI's lm-evaluation-harness, for the tools that read those.

Leaderboards, notebooks and viewers read what ``lm_eval run --output_path FOLDER --log_samples`` writes: for each model
a folder with ``results_<time>.json`` (figures by task as ``metric,filter``) and ``samples_<task>_<time>.jsonl`` (one
line a question and filter). We write the same files from our lines. The harness itself cannot be asked to: it grades
by its own tasks, and "closed its thinking" or "no answer could be read" have no word there.

How ours becomes theirs:

- Strict and lenient grading are two *filters*, ``exact_match,strict`` and ``exact_match,lenient``, as gsm8k has
  ``strict-match`` and ``flexible-extract``. ``unparsed``, ``unfinished`` and ``failed`` are metrics beside it, and a
  table made of the file shows them too.
- Several seeds are ``repeats``: a question's metric is the mean over its answers. The standard error is the harness's
  (sample deviation of the questions by the root of their number), which for repeats is the one clustered by question.
- An answer that cannot be read is ``[invalid]``, as the harness's regex filter has it. Which answer the lenient reading
  took is not in a line, so its ``filtered_resps`` is all that stood behind the thinking.
- All is ``generate_until``, the harness's word for text. How many answers had their thinking closed for the model, and
  how many are the likeliest of the choices instead of written, is in the task's ``metadata``.
- A task is ``medcot_medqa``, and its alias ``medqa``: the harness has tasks of the same names that are asked otherwise
  and scored by likelihood, and a file must not pass for one of theirs. A control is a task of its own.

What we do not know is null and not made up: nothing ran at a git commit of the harness, or under its version, and a
task has no version but the checksum of its source, which is in its config.

Sources: ``result_schema.py``, ``evaluator.py``, ``loggers/evaluation_tracker.py`` and ``utils.make_table`` of lm_eval
0.4.13, the files that it writes, and ``scripts/zeno_visualize.py`` of its repository, which reads them
(https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from medcot import __version__
from medcot.errors import DataError, OutputError
from medcot.evaluate.lines import Identity, Line, group_by_question, group_by_task, identify
from medcot.evaluate.results import Respondent, slug
from medcot.records import Outcome

PREFIX = "medcot_"
FILTERS = {"strict": "outcome", "lenient": "lenient_outcome"}  # filter to the line's field that it reads
METRICS = {  # the outcome that each counts, and whether more of it is better
    "exact_match": (Outcome.CORRECT, True),
    "unparsed": (Outcome.UNPARSED, False),
    "unfinished": (Outcome.UNFINISHED, False),
    "failed": (Outcome.FAILED, False),
}
INVALID = "[invalid]"
_ARGS = {"source": "pretrained", "adapter": "peft", "precision": "dtype"}  # the harness's words for what a model is

_UNKNOWN_SETTINGS = (
    *("batch_size", "use_cache", "limit", "bootstrap_iters"),
    *("random_seed", "numpy_seed", "torch_seed", "fewshot_seed"),
)
_UNKNOWN = (
    *("git_hash", "pretty_env_info", "lm_eval_version", "upper_git_hash", "fewshot_as_multiturn"),
    *("system_instruction", "system_instruction_sha", "chat_template", "chat_template_sha"),
)

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Group:
    """One model's answers to one task, or to one control of it."""

    task: str
    control: str | None
    lines: list[Line]

    @property
    def name(self) -> str:
        """The task's name for the harness."""
        return PREFIX + slug(self.task) + ("" if self.control is None else f"_{slug(self.control)}")

    @property
    def alias(self) -> str:
        """The task's name for people."""
        return self.task if self.control is None else f"{self.task} {self.control}"


def export_lm_eval(results: Mapping[str, Any], respondents: Sequence[Respondent], folder: Path) -> list[Path]:
    """Write the result files of lm-evaluation-harness, and return their paths.

    Args:
        results: what ``build_results`` returned; of an evaluation's results.json also ``settings``, ``created``,
            ``timing`` and ``versions`` are used.
        respondents: what it was built from.
        folder: where each model gets a folder of its own; files of an earlier export stay, as the harness's do.

    Raises:
        DataError: two models, or two tasks, whose names are the same in a file system.
        OutputError: the folder cannot be written.
    """
    time = datetime.now().isoformat().replace(":", "-")
    _check_apart({one.name: _name_folder(one.name) for one in respondents})
    numbers = _number_questions(respondents)
    settings = results.get("settings") or {}
    written: list[Path] = []
    for one in respondents:
        groups = [_Group(task, control, lines) for task, found in group_by_task(one.lines).items()
                  for control, lines in found.items()]  # fmt: skip
        _check_apart({group.alias: group.name for group in groups})
        place = folder / _name_folder(one.name)
        samples = {group.name: _build_samples(group, numbers, settings) for group in groups}
        figures = _build_figures(one, groups, samples, results)
        path = place / f"results_{time}.json"
        _write(path, [json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False)])
        written.append(path)
        for name, rows in samples.items():
            path = place / f"samples_{name}_{time}.jsonl"
            _write(path, [json.dumps(row, ensure_ascii=False) for row in rows])
            written.append(path)
    return written


def _find_kwargs(settings: Mapping[str, Any], control: str | None) -> dict[str, Any]:
    """Return how text was generated, as far as known; a control has limits of its own."""
    keys = ("temperature", "top_p") + (("think_tokens", "answer_tokens") if control is None else ())
    return {key: settings[key] for key in keys if key in settings}


def _name_folder(model: str) -> str:
    """Return a model's folder by the harness's rule; a name of dots alone would leave the folder."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model).strip(". ") or "model"


def _check_apart(files: Mapping[str, str]) -> None:
    """Refuse names whose files would be one; ``files`` is name to file."""
    seen: dict[str, str] = {}
    for name, file in files.items():
        other = seen.setdefault(file.casefold(), name)
        if other != name:
            raise DataError(
                f"'{other}' and '{name}' would both be written to '{file}'",
                "Each model and each task has a file name of its own",
                "Give one of them another name",
            )


def _number_questions(respondents: Sequence[Respondent]) -> dict[Identity, int]:
    """Return each question's number within its task, the same for every model that was asked it."""
    numbers: dict[Identity, int] = {}
    counts: dict[tuple[str, str | None], int] = {}
    for one in respondents:
        for line in one.lines:
            if line["kind"] == "eval" and identify(line) not in numbers:
                place = line["task"], line["control"]
                numbers[identify(line)] = counts[place] = counts.get(place, -1) + 1
    return numbers


# Samples --------------------------------------------------------------------------------------------------------------


def _build_samples(group: _Group, numbers: Mapping[Identity, int], settings: Mapping[str, Any]) -> list[Sample]:
    """Return a task's samples, filter after filter."""
    questions = group_by_question(group.lines)
    kwargs = _find_kwargs(settings, group.control)
    return [
        _build_sample(filter_name, answers, numbers[identity], kwargs)
        for filter_name in FILTERS
        for identity, answers in questions.items()
    ]


def _build_sample(filter_name: str, answers: Sequence[Line], number: int, kwargs: Mapping[str, Any]) -> Sample:
    """Return one question's sample; ``answers`` has a line a seed."""
    first, field = answers[0], FILTERS[filter_name]
    target = str(first["gold"])
    doc = {key: first[key] for key in ("id", "question", "gold", "topic", "answer_kind", "choices")}
    read = [line["answer"] if filter_name == "lenient" else line["parsed"] or INVALID for line in answers]
    return {
        "doc_id": number,
        "doc": doc,
        "target": target,
        "arguments": {"gen_args_0": {"arg_0": first["prompt"], "arg_1": dict(kwargs)}},
        "resps": [[line["text"] for line in answers]],
        "filtered_resps": read if len(answers) == 1 else [read],
        "filter": filter_name,
        "metrics": list(METRICS),
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(first["prompt"]),
        "target_hash": _hash(target),
        **{
            metric: statistics.fmean(line[field] == outcome for line in answers)
            for metric, (outcome, _) in METRICS.items()
        },
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


# Figures --------------------------------------------------------------------------------------------------------------


def _build_figures(
    one: Respondent, groups: Sequence[_Group], samples: Mapping[str, Sequence[Sample]], results: Mapping[str, Any]
) -> dict[str, Any]:
    """Return results_<time>.json."""
    names = [group.name for group in groups]
    facts = {group.name: results["tasks"].get(group.task) or {} for group in groups}
    settings = results.get("settings") or {}
    created, seconds = results.get("created"), (results.get("timing") or {}).get("all")
    return {
        "results": {group.name: _score(group, samples[group.name]) for group in groups},
        "group_subtasks": {},
        "configs": {group.name: _configure(group, facts[group.name], settings) for group in groups},
        "versions": dict.fromkeys(names),
        "n-shot": dict.fromkeys(names, 0),
        "higher_is_better": {name: {metric: more for metric, (_, more) in METRICS.items()} for name in names},
        "n-samples": {
            name: {"original": facts[name].get("num_available"), "effective": len(samples[name]) // len(FILTERS)}
            for name in names
        },
        "config": {
            "model": one.facts.get("backend"),
            "model_args": {_ARGS.get(key, key): value for key, value in one.facts.items() if value is not None},
            **dict.fromkeys(_UNKNOWN_SETTINGS),
            "device": one.facts.get("device"),
            "batch_sizes": [],
            "gen_kwargs": {key: settings[key] for key in ("temperature", "top_p") if key in settings},
        },
        **dict.fromkeys(_UNKNOWN),
        "date": None if created is None else datetime.fromisoformat(created).timestamp(),
        "transformers_version": (results.get("versions") or {}).get("transformers"),
        "task_hashes": {name: _hash_task(samples[name]) for name in names},
        "model_source": one.facts.get("backend"),
        "model_name": one.name,
        "model_name_sanitized": _name_folder(one.name),
        "total_evaluation_time_seconds": None if seconds is None else str(seconds),
        "medcot_version": __version__,
    }


def _score(group: _Group, rows: Sequence[Sample]) -> dict[str, Any]:
    found: dict[str, Any] = {"name": group.name, "alias": group.alias, "sample_len": len(rows) // len(FILTERS)}
    for filter_name in FILTERS:
        for metric in METRICS:
            values = [row[metric] for row in rows if row["filter"] == filter_name]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else "N/A"
            found[f"{metric},{filter_name}"] = statistics.fmean(values)
            found[f"{metric}_stderr,{filter_name}"] = error
    return found


def _configure(group: _Group, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the task's YAML would say; of the facts, those of the source, which a control shares."""
    filters = [{"name": name, "filter": [{"function": f"medcot's {name} grading"}]} for name in FILTERS]
    return {
        "task": group.name,
        "output_type": "generate_until",
        "num_fewshot": 0,
        "repeats": len({line["seed"] for line in group.lines}),
        "generation_kwargs": _find_kwargs(settings, group.control),
        "filter_list": filters,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": more} for metric, (_, more) in METRICS.items()
        ],
        "metadata": {
            "medcot_task": group.task,
            "control": group.control,
            **{key: facts.get(key) for key in ("sha256", "revision", "num_available", "num_options")},
            "num_forced": sum(line["forced"] for line in group.lines),
            "num_likeliest": sum(line["log_probs"] is not None for line in group.lines),
        },
    }


def _hash_task(rows: Sequence[Sample]) -> str:
    return _hash("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))


def _write(path: Path, texts: Sequence[str]) -> None:
    """Write lines into a new file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Half a surrogate pair, which a model may write, has no UTF-8; its backslash form is JSON for it.
        with path.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(f"{text}\n" for text in texts)
    except OSError as error:
        raise OutputError(
            f"'{path}' cannot be written: {error.strerror or error}",
            "The export is a folder of files",
            "Free some space or mend the permissions",
        ) from error
