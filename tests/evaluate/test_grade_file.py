"""Outputs made anywhere: every line comes back with its verdict, and a line that cannot be graded is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from nasty_answers import NASTY
from nasty_rows import DRUGS

from medcot.errors import DataError
from medcot.evaluate.grade_file import Thinking, grade_file, grade_line
from medcot.evaluate.phrases import is_same_phrase
from medcot.records import AnswerKind

SHARED = Path(__file__).parents[2] / "../shared/data"
LINE = {"output": "Final answer: B", "kind": "letter", "gold": "B"}
NUMBER = {"output": "Final answer: 85 mL/h", "kind": "number", "gold": "85 mL/h"}


def _write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _grade(row: dict[str, Any], **changes: Any) -> tuple[str, str | None, str]:
    graded = grade_line({**row, **changes}, "Line 1")
    return graded["outcome"], graded["parsed"], graded["lenient_outcome"]


def test_the_nasty_table_comes_through_a_file(tmp_path: Path) -> None:
    rows = []
    for number, row in enumerate(NASTY):
        allowance = row.allowance
        line: dict[str, Any] = {"id": number, "output": row.output, "kind": row.kind.value, "gold": row.gold}
        line["finish_reason"] = "length" if row.cut else "stop"
        line["options"] = row.options
        if allowance and row.kind is AnswerKind.NUMBER:
            line |= {"tolerance": list(allowance.limits or ()), "unit": "any" if allowance.any_unit else None}
        if allowance and row.kind is AnswerKind.TEXT:
            line["aliases"] = list(allowance.aliases)
        rows.append(line)
    graded = list(grade_file(_write(tmp_path / "x.jsonl", *rows)))
    assert [(line["outcome"], line["parsed"], line["lenient_outcome"]) for line in graded] == [
        (row.strict.value, row.parsed, row.lenient.value) for row in NASTY
    ]
    added = {"outcome", "parsed", "lenient_outcome"}
    assert [{key: line[key] for key in line if key not in added} for line in graded] == rows


def test_lines_come_one_by_one_and_packed_files_too(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(("\ufeff" + json.dumps(LINE) + "\n\n" + json.dumps({**LINE, "kind": "x"})).encode()))
    lines = grade_file(str(path))
    assert next(lines) == {**LINE, "outcome": "correct", "parsed": "B", "lenient_outcome": "correct"}
    with pytest.raises(DataError, match=r"Line 3 of '.*' has 'kind' 'x'"):
        next(lines)
    graded = next(grade_file(_write(tmp_path / "again.jsonl", {**LINE, "outcome": "wrong", "own": [1, None]})))
    assert (graded["outcome"], graded["own"]) == ("correct", [1, None])


def test_thinking_is_read_from_the_tags_unless_the_prompt_opened_it() -> None:
    untagged, closed = {**LINE, "output": "Final answer: B"}, {**LINE, "output": "Hm.</think>Final answer: B"}
    assert grade_line(untagged, "x")["outcome"] == "correct"
    assert grade_line(untagged, "x", thinking=Thinking.FORCED)["outcome"] == "unfinished"
    assert grade_line({**LINE, "output": ""}, "x", thinking=Thinking.FORCED)["outcome"] == "unfinished"
    assert all(grade_line(closed, "x", thinking=thinking)["outcome"] == "correct" for thinking in Thinking)
    assert _grade(LINE, output="<think>Final answer: B") == ("unfinished", None, "correct")
    assert _grade(LINE, output=None) == ("failed", None, "failed")
    for field in ("finish", "finish_reason"):
        assert _grade(LINE, **{field: "length"}) == ("unparsed", None, "correct")


def test_options_may_be_a_list() -> None:
    for options in (DRUGS, list(DRUGS.values())):
        assert _grade(LINE, output="Final answer: B. Metformin", options=options)[:2] == ("correct", "B")
    assert _grade(LINE, output="Final answer: B. Metformin", options=None)[0] == "unparsed"


@pytest.mark.parametrize(
    ("changes", "right", "wrong"),
    [
        ({"gold": 85, "unit": "mL/h"}, "85.0 ml/hr", "85"),
        ({"gold": "85", "unit": "mL/h"}, "85 mL per hour", "85 mL/min"),
        ({"unit": "ml/hr"}, "85 mL/h", "85"),
        ({"gold": 85.5}, "85.50", "85.5 mL/h"),
        ({"gold": 85, "unit": "any"}, "85 mL/h", "86"),
        ({"gold": 85, "unit": "any"}, "85", "84 mL/h"),
        ({"gold": 1e-05}, "0.00001", "0.0001"),
        ({"gold": 0.15, "unit": "%"}, "0.15 %", "0.15"),
        ({"tolerance": 5}, "90 mL/h", "90.01 mL/h"),
        ({"tolerance": 5}, "80 mL/h", "80"),
        ({"tolerance": 0}, "85.0 mL/h", "85.0001 mL/h"),
        ({"tolerance": "0.1"}, "85.1 mL/h", "85.2 mL/h"),
        ({"tolerance": "5%"}, "89.25 mL/h", "89.26 mL/h"),
        ({"tolerance": "5 %", "gold": -20, "unit": "mmol/L"}, "-21 mmol/L", "-21.1 mmol/L"),
        ({"tolerance": [80, "86.5"]}, "86.5 mL/h", "86.6 mL/h"),
        ({"tolerance": 0.1, "gold": 0.3}, "0.2", "0.19999"),  # as floats 0.3 - 0.1 is below 0.2
        ({"gold": "1e-40", "tolerance": "1%"}, "1.01e-40", "1.02e-40"),
    ],
)
def test_units_and_tolerances(changes: dict[str, Any], right: str, wrong: str) -> None:
    assert _grade(NUMBER, **changes, output=f"Final answer: {right}")[0] == "correct"
    assert _grade(NUMBER, **changes, output=f"Final answer: {wrong}")[0] == "wrong"


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (LINE, {"kind": "choice"}, "'kind' is one of letter, yesno, number, text"),
        (LINE, {"kind": ["letter"]}, "'kind' is one of"),
        (LINE, {"gold": "E", "options": DRUGS}, "is one letter, one of A, B, C, D"),
        (LINE, {"gold": 1}, "'gold' is a text"),
        (LINE, {"gold": None}, "'gold' is a text"),
        (LINE, {"output": ["x"]}, "'output' is a text, or null"),
        (LINE, {"options": {"A": "x", "C": "y"}}, "Options are letter → text, or a list"),
        (LINE, {"tolerance": 3}, "'tolerance' applies to kind number, not letter"),
        (LINE, {"aliases": ["x"]}, "'aliases' applies to kind text"),
        (LINE, {"kind": "yesno", "gold": "true"}, "is yes, no or maybe"),
        (LINE, {"kind": "yesno", "gold": True}, "'gold' is a text"),
        (LINE, {"kind": "text", "gold": " "}, "is not empty"),
        (LINE, {"kind": "text", "aliases": "x"}, "'aliases' is a list of texts"),
        (LINE, {"kind": "text", "aliases": ["x", ""]}, "'aliases' is a list of texts"),
        (NUMBER, {"gold": "about 3"}, "a decimal number, with its unit or without"),
        (NUMBER, {"gold": True}, "'gold' is a text"),
        (NUMBER, {"gold": float("nan")}, "a decimal number, with its unit or without"),
        (NUMBER, {"unit": "mg"}, "has a unit of its own"),
        (NUMBER, {"gold": 3, "unit": "12"}, "A unit begins with a letter"),
        (NUMBER, {"unit": 5}, "'unit' is a text"),
        (NUMBER, {"tolerance": -1}, "A tolerance is a number of 0 or more"),
        (NUMBER, {"tolerance": "5 mL"}, "A tolerance is"),
        (NUMBER, {"tolerance": True}, "A tolerance is"),
        (NUMBER, {"tolerance": {"relative": 0.05}}, "A tolerance is"),
        (NUMBER, {"tolerance": [1, 2, 3]}, "A tolerance is"),
        (NUMBER, {"tolerance": [90, 95]}, "Limits are two numbers with gold between them"),
    ],
)
def test_a_bad_line_is_named_with_value_rule_and_remedy(
    tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = _write(tmp_path / "x.jsonl", LINE, {**row, **changes})
    with pytest.raises(DataError) as caught:
        list(grade_file(path))
    assert caught.value.value.startswith(f"Line 2 of '{path}' has ") and caught.value.remedy
    assert message in caught.value.rule


@pytest.mark.parametrize("field", ["output", "kind", "gold"])
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    path = _write(tmp_path / "x.jsonl", {key: value for key, value in LINE.items() if key != field})
    with pytest.raises(DataError, match=f"Line 1 of .* has no field '{field}'"):
        list(grade_file(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no lines"),
        (b"\n \n", "holds no lines"),
        (b'{"output": "x"', "Line 1 of .* is not JSON"),
        (b"\n[1]\n", "Line 2 of .* is a list"),
        (b'{"output": "\xff"}', "is not UTF-8 in line 1"),
    ],
)
def test_a_broken_file_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(grade_file(path))
    for unread, remedy in ((tmp_path / "none.jsonl", "nothing is there"), (tmp_path, "Name a file in this folder")):
        with pytest.raises(DataError, match=f"cannot be read .*{remedy}"):
            list(grade_file(unread))


def test_a_line_that_cannot_be_graded_is_given_back_and_the_others_are_graded(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    old = {**LINE, "kind": "yes/no", "outcome": "correct", "own": 1}
    path.write_text("\n".join([json.dumps(LINE), "nonsense", "", json.dumps(old), json.dumps(LINE)]), encoding="utf-8")
    bad: list[DataError] = []
    lines = list(grade_file(path, on_bad_line=bad.append))
    assert ["outcome" in line for line in lines] == [True, False, False, True]
    assert lines[1]["line"] == 2 and lines[2]["own"] == 1 and lines[0] == lines[3]
    assert [line["error"] for line in lines[1:3]] == [str(error) for error in bad]
    assert bad[1].value == f"Line 4 of '{path}' has 'kind' 'yes/no'" and bad[1].remedy == "Did you mean 'yesno'?"


def test_real_questions_grade(tmp_path: Path) -> None:
    """Every MedQA item passes with its letter, and with letter and text, but not with its letter and another text."""
    path = SHARED / "MedQA-USMLE-4-options/test.jsonl"
    if not path.exists():
        pytest.skip(f"the real set is not here ({path})")
    lines = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        letter, options = row["answer_idx"], row["options"]
        texts = {key: text.split('\n"')[0] for key, text in options.items()}  # five items have a stray end
        other = next(key for key in options if options[key] != options[letter])
        asked = {"kind": "letter", "gold": letter, "options": options}
        for text in (letter, f"{letter}. {texts[letter]}", f"{letter}. {texts[other]}", other):
            lines.append({**asked, "output": f"<think>…</think>\n\nFinal answer: {text}"})
    outcomes = [line["outcome"] for line in grade_file(_write(tmp_path / "x.jsonl", *lines))]
    assert [set(outcomes[start::4]) for start in range(4)] == [{"correct"}, {"correct"}, {"unparsed"}, {"wrong"}]
    assert len(outcomes) == 4 * 1273


def test_real_short_answers_are_the_same_as_themselves_only(tmp_path: Path) -> None:
    path = SHARED / "medical-o1-verifiable-problem/train.jsonl"
    if not path.exists():
        pytest.skip(f"the real set is not here ({path})")
    golds = sorted({json.loads(line)["Ground-True Answer"].strip() for line in path.open(encoding="utf-8")})
    for gold in golds:
        assert _grade(LINE, kind="text", gold=gold, output=f"Final answer: {gold.upper()}")[0] == "correct"
        assert [other for other in golds if is_same_phrase(other, [gold])] == [gold]
