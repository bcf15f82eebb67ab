"""An evaluation on a terminal: every figure of the results is there, fits, and is said in words and signs too."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from made_lines import make_lines, make_respondent, make_task
from medcot.evaluate.general import SOURCE as GENERAL
from medcot.evaluate.grade_file import grade_line
from medcot.evaluate.lines import Line
from medcot.evaluate.power import compute_plan
from medcot.evaluate.results import Respondent, build_results
from medcot.evaluate.stats import wilson
from medcot.evaluate.tasks import CLINIC, SUITES, TASKS, Task, load_task
from medcot.records import AnswerKind
from medcot.report import words
from medcot.report.eval_screen import print_grades, print_plan, print_results, print_tasks
from medcot.report.plan_screen import kinds_of

REAL = Path(__file__).parents[2] / "../shared/data"
FILES = {
    "medqa": "MedQA-USMLE-4-options/test.jsonl",
    "pubmedqa": "PubMedQA/pqa_labeled.jsonl",
    "medmcqa": "medmcqa/validation_head.jsonl",
    "mmlu-medical": "mmlu-medical/test_head.jsonl",
    "medxpertqa": "MedXpertQA/text_head.jsonl",
    "medical-o1-verifiable-problem": "medical-o1-verifiable-problem/train.jsonl",
    CLINIC: None,
    GENERAL: None,
}
MEDQA, PUBMEDQA = make_task("medqa", 200), make_task("pubmedqa", 100, AnswerKind.YESNO)
CONTROLS = [replace(MEDQA, control=control) for control in ("rotate-1", "blank", "no-thinking")]
LONG = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def draw(show: Callable[[Console], None], *, width: int = 80, encoding: str = "utf-8", terminal: bool = True) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    show(Console(file=file, width=width, force_terminal=terminal, color_system=None))
    file.flush()
    text = raw.getvalue().decode(encoding)
    if terminal:
        assert max(map(cell_len, text.splitlines())) <= width
    return text


def show(results: dict[str, Any], **how: Any) -> str:
    return draw(lambda console: print_results(results, console), **how)


def make_results(**settings: Any) -> dict[str, Any]:
    base = make_respondent(LONG, 0.4, [MEDQA, PUBMEDQA, *CONTROLS], **settings)
    tuned = make_respondent("tuned", 0.7, [MEDQA, PUBMEDQA, *CONTROLS], **settings)
    lines: list[Line] = list(tuned.lines)
    for cap, chance in ((256, 0.3), (1024, 0.7)):
        lines += make_lines(replace(MEDQA, control=f"budget-{cap}"), chance, cap=cap)
    return build_results([base, replace(tuned, lines=lines)])


RESULTS = make_results()


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120, 160])
def test_results_fit_and_have_every_figure(width: int) -> None:
    text = show(RESULTS, width=width)
    assert text.startswith(words.judge_changes([(LONG, "tuned", RESULTS["comparisons"][0]["tasks"])]).headline)
    for tasks in RESULTS["scores"].values():
        for found in tasks.values():
            low, high = found["ci95"]
            row = (words.percent(found["accuracy"]), f"{100 * low:.1f}–{100 * high:.1f}",
                   words.percent(found["lenient"]["accuracy"]))  # fmt: skip
            lost = (str(found[key]) for key in ("unparsed", "unfinished", "failed", "cut"))
            assert " ".join((*row, *lost)).replace("\u202f", " ") in flat(text).replace("\u202f", " ")
    for change in RESULTS["comparisons"][0]["tasks"]:
        assert words.points(change["delta"]) in text and words.change_interval(change["interval"]) in text
        assert f"{change['gained']}/{change['lost']}" in text
    assert "options moved by 1" in text and "question left out" in text and "no thinking" in text
    assert RESULTS["budgets"]["tuned"]["medqa"]["sentence"] in flat(text)
    assert f"{RESULTS['usage']['tuned']['think_tokens']:,}" in text
    scores = text.partition("Scores")[2].partition("tuned against")[0]
    assert ("forced" in scores) == (width > 80) and "always the first" in scores


def test_a_verdict_has_a_sign_and_a_word() -> None:
    worse = build_results([make_respondent("one", 0.8, [MEDQA]), make_respondent("other", 0.3, [MEDQA])])
    same = build_results([make_respondent("one", 0.5, [MEDQA]), make_respondent("other", 0.5, [MEDQA])])
    assert "+ better" in show(RESULTS)
    assert "− worse" in show(worse) and "- worse" in show(worse, encoding="ascii")
    assert "= no detectable change" in show(same)


def test_the_p_value_is_holms() -> None:
    tasks = [MEDQA, PUBMEDQA]
    results = build_results([make_respondent("one", 0.5, tasks), make_respondent("other", 0.62, tasks)])
    comparison = results["comparisons"][0]
    for row, change in zip(("medqa", "pubmedqa"), comparison["tasks"], strict=True):
        (line,) = (line for line in show(results).splitlines() if line.startswith(f"{row} "))
        assert line.rstrip().endswith(f" {words.p_text(change['p_adjusted']).removeprefix('p = ')}")
    assert words.p_text(comparison["tasks"][0]["p_adjusted"]) != words.p_text(comparison["tasks"][0]["p_value"])


def test_floors_and_a_leaning_are_said() -> None:
    lines = [{**line, "parsed": line["parsed"] and "A"} for line in make_lines(MEDQA, 0.5)]
    results = build_results([Respondent("one", {}, lines)])
    letters = results["scores"]["one"]["medqa"]["letters"]
    text = show(results)
    assert f"always the first  {words.percent(letters['always_a'])}" in text
    assert f"always commonest  {words.percent(letters['always_commonest'])}" in text
    assert f"one on medqa chose A {letters['chosen']['A']}, B 0" in text
    assert "chose" not in show(build_results([make_respondent("one", 1.0, [MEDQA])]))
    free = make_task("bioasq", 20, AnswerKind.TEXT)
    assert "always" not in show(build_results([make_respondent("one", 0.5, [free])]))


def test_several_seeds_are_said() -> None:
    results = build_results([make_respondent("one", 0.5, [MEDQA], seeds=(0, 1, 2))])
    text = flat(show(results))
    assert "medqa: 200 questions × 3 seeds" in text and "the majority of 3 answers is right" in text


def test_in_a_file_every_row_names_its_task_and_model() -> None:
    lines = show(RESULTS, terminal=False).splitlines()
    rows = [line.split() for line in lines if line.startswith("medqa") and LONG in line]
    assert len(rows) == 1 and words.percent(RESULTS["scores"][LONG]["medqa"]["accuracy"]).split() == rows[0][2:4]
    assert any(line.startswith(f"{LONG} on medqa") and "question left out" in line for line in lines)
    assert any("unparsed  unfinished" in line and "gained/lost" not in line for line in lines)
    assert "gained/lost" in "\n".join(lines)


def test_a_stream_of_ascii_gets_ascii() -> None:
    text = show(RESULTS, encoding="ascii")
    assert "?" not in text and "+ better" in text


def test_what_is_not_known_or_not_there_is_left_out() -> None:
    lines = [{**line, "cost": 0.001, "num_attempts": 2, "counts": "apportioned"} for line in make_lines(MEDQA, 0.5)]
    facts = {"backend": "endpoint", "notes": ["It hides its thinking."]}
    text = flat(show(build_results([Respondent("served", facts, lines)])))
    assert "cost" in text and "400" in text and "by their characters" in text and "It hides its thinking." in text
    blind = [{**line, **dict.fromkeys(("num_prompt_tokens", "num_think_tokens", "num_answer_tokens"), 0)}
             for line in make_lines(MEDQA, 0.5)]  # fmt: skip
    usage = show(build_results([Respondent("blind", {}, blind)])).partition("Usage")[2]
    assert usage.split()[-6:] == ["blind", "200", *[words.UNKNOWN] * 4] and "cost" not in usage
    assert "Controls" not in text and "against" not in text


def test_questions_of_one_side_only_are_counted() -> None:
    base, tuned = (
        make_respondent("base", 0.4, [MEDQA, PUBMEDQA]),
        make_respondent("tuned", 0.6, [make_task("medqa", 150)]),
    )
    text = flat(show(build_results([base, tuned])))
    assert "50 questions left out" in text and "one side lacks them: pubmedqa" in text


def test_notes_stand_before_the_scores() -> None:
    noted = {**RESULTS, "notes": ["tuned thought longer than base.", "2 left out \x1b[2J"]}
    text = flat(show(noted))
    assert text.index("tuned thought longer than base.") < text.index("Scores") and "\x1b[2J" not in text
    raw = io.StringIO()
    print_results(noted, Console(file=raw, width=80, force_terminal=True, color_system="standard"))
    assert "\x1b[33mtuned thought longer than base." in raw.getvalue()


def test_a_rotation_says_what_could_not_be_read() -> None:
    plain, rotated = make_lines(MEDQA, 0.99), make_lines(CONTROLS[0], 0.99)
    blind = [{**line, "parsed": None} for line in rotated]
    some = build_results([Respondent("one", {}, [*plain, *rotated[:150], *blind[150:]])])
    agreement = some["controls"]["one"]["medqa"]["rotate-1"]["agreement"]
    said = flat(show(some, width=160)).replace("\u202f", " ")
    assert f"of {agreement['n']} did not follow, {agreement['num_unread']} not read" in said
    text = flat(show(build_results([Respondent("one", {}, [*plain, *blind])]), width=160))
    assert "Nothing can be told: none of 200 was read in both orders" in text and "did not follow" not in text


def test_no_name_moves_the_terminal() -> None:
    nasty = "a\x1b[2Jb\u202e[bold]"
    lines = [{**line, "task": nasty} for line in make_lines(MEDQA, 0.5)]
    text = show(build_results([Respondent(nasty, {"source": nasty}, lines), Respondent("other", {}, lines)]))
    assert not set(text) & {"\x1b", "\u202e"} and "[bold]" in text


# Before ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120, 160])
def test_all_tasks_and_suites_are_listed(width: int) -> None:
    text = flat(draw(print_tasks, width=width))
    assert all(name in text for name in (*TASKS, *SUITES)) and "medqa=FILE" in text and "medqa:200" in text
    assert "GBaker/MedQA-USMLE-4-options" in text and "bioasq-yesno=FILE" in text
    lines = draw(print_tasks, terminal=False).splitlines()
    (row,) = (line for line in lines if line.startswith("medqa-5 "))
    assert row.split()[1:4] == ["1,273", "5", "letter"] and row.endswith("med-qa-en-5options-source")


@pytest.mark.parametrize("name", FILES)
def test_the_table_says_the_kinds_that_tasks_have(name: str) -> None:
    path = FILES[name]
    if path is not None and not (REAL / path).exists():
        pytest.skip(f"no real data here ({REAL / path})")
    task = load_task(name if path is None else f"{name}={REAL / path}")
    assert {item.example.answer_kind for item in task.items} <= set(kinds_of(name))


def plan(tasks: Sequence[Task], **settings: Any) -> str:
    asked: dict[str, Any] = {"seeds": 1, "compared": True, "flip_rate": 0.2, "num_requests": 1200, **settings}
    return flat(draw(lambda console: print_plan(tasks, console=console, **asked)))


def test_a_plan_says_what_can_be_told() -> None:
    tasks = [replace(MEDQA, sentences=("Read.", "2 left out.")), PUBMEDQA]
    text = plan(tasks, seeds=4)
    assert compute_plan(200, 0.2, num_tasks=2, seeds=4).describe() in text
    assert compute_plan(100, 0.2, num_tasks=2, seeds=4).describe() in text
    assert text.count("assumed to flip") == 2 and text.count("medqa: Read.") == 1 and "medqa: 2 left out." in text
    assert "1,200 answers in all, 4 to each question." in text and MEDQA.sha256[:12] in text


def test_a_plan_for_one_model_says_the_interval() -> None:
    text = plan([MEDQA], compared=False, num_requests=1)
    low, high = wilson(100, 200)
    assert f"±{50 * (high - low):.1f} points" in text and "flip" not in text and "1 answer in all." in text
    assert "±" in plan([make_task("medqa", 1)], compared=False)


# Grades ---------------------------------------------------------------------------------------------------------------


class Stream(io.StringIO):
    def __init__(self, encoding: str = "utf-8", terminal: bool = False) -> None:
        super().__init__()
        self._name, self._terminal = encoding, terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._name

    def isatty(self) -> bool:
        return self._terminal


GRADED = [
    grade_line({"output": output, "kind": kind, "gold": gold}, "here")
    for output, kind, gold in (
        ("Final answer: B", "letter", "B"),
        ("Final answer: C", "letter", "B"),
        ("The answer is (B).", "letter", "B"),
        ("<think>hm", "letter", "B"),
        (None, "letter", "B"),
        ("Ja…\ud800 Final answer:\nFinal answer: 5 mL", "number", "5 mL"),
    )
]


def grades(stream: Stream, **settings: Any) -> str:
    return draw(lambda console: print_grades(iter(GRADED), stream, console, **settings))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_pipe_gets_json_lines_and_nothing_else(encoding: str) -> None:
    stream = Stream(encoding)
    with pytest.raises(ValueError, match="empty"):  # nothing was drawn, so there is no longest line
        grades(stream)
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == GRADED
    stream.getvalue().encode(encoding)


def test_a_terminal_gets_a_table_beside_them() -> None:
    text = grades(Stream(terminal=True)).replace("\u202f%", "%")
    head, *rows = (line.split() for line in text.replace("95 % CI", "CI").splitlines())
    low, high = wilson(1, 5)
    by_name = {name: cells for name, *cells in rows}
    assert head == ["letter", "number", "all"]
    for outcome, counts in (("correct", "112"), ("wrong", "101"), ("unparsed", "101"), ("unfinished", "101"),
                            ("failed", "101"), ("all", "516")):  # fmt: skip
        assert by_name[outcome] == [*counts]
    assert by_name["strict"] == ["20.0%", "100.0%", "33.3%"] and by_name["lenient"] == ["40.0%", "100.0%", "50.0%"]
    assert by_name["CI"][0] == f"{100 * low:.1f}–{100 * high:.1f}"
    assert grades(Stream(), summary=True).replace("\u202f%", "%") == text


def test_the_screen_loads_no_heavy_library() -> None:
    names = ("torch", "matplotlib", "jinja2", "scipy", "transformers", "datasets")
    code = f"import sys, medcot.report.eval_screen; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
