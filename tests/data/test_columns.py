"""Columns: the three names known, everything else named by the user, and no row lost without a reason."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from medcot.data.columns import (
    Built,
    Purpose,
    build_examples,
    choose_layout,
    find_row_number,
    locate,
    make_id,
)
from medcot.data.files import Part
from medcot.data.sources import Table, load_rows, stream_rows
from medcot.errors import DataError

REAL = Path(__file__).parents[2] / "../shared/data/medical-o1-reasoning-SFT/train.jsonl"
GOOD = {"Question": "Why?", "Complex_CoT": "Because.", "Response": "So."}


def _table(*rows: dict[str, object], parts: tuple[Part, ...] = (), notes: tuple[str, ...] = ()) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table(list(rows), columns, "dir/my.jsonl", "0", None, parts or (Part("my.jsonl", len(rows)),), notes)


def _build(*rows: dict[str, object], columns: Mapping[str, str] | None = None) -> Built:
    return build_examples(_table(*rows), columns)


def test_real_rows_need_no_telling() -> None:
    if not REAL.exists():
        pytest.skip(f"the 198 real rows are not here ({REAL})")
    table = load_rows(str(REAL))
    built = build_examples(table)
    assert len(built.examples) == 198 and built.quarantined == []
    assert built.examples[0].question == table.rows[0]["Question"]
    assert built.examples[197].reasoning == table.rows[197]["Complex_CoT"]
    assert (built.examples[197].id, built.examples[197].source) == ("train:198", "train.jsonl")


def test_sentences_say_what_each_column_became() -> None:
    built = build_examples(_table({"note": "x", **GOOD}, notes=("One thing",)), {"response": "Response"})
    assert built.sentences == [
        "One thing.",
        "Column 'Question' is the question (a name medcot knows).",
        "Column 'Complex_CoT' is the reasoning (a name medcot knows).",
        "Column 'Response' is the response (as data.columns.response says).",
        "Not used: 'note'.",
    ]


def test_case_does_not_matter_but_the_exact_name_wins() -> None:
    built = _build({"QUESTION": "a", "complex_cot": "b", "response": "c"})
    assert (built.examples[0].question, built.examples[0].reasoning, built.examples[0].response) == ("a", "b", "c")
    assert _build({"question": "no", **GOOD}).examples[0].question == "Why?"
    with pytest.raises(DataError, match="differ in case only"):
        _build({"QUESTION": "a", "question": "b", "Complex_CoT": "c", "Response": "d"})


def test_mapping_wins_over_native_names() -> None:
    built = _build({**GOOD, "short": "s"}, columns={"reasoning": "short"})
    assert built.examples[0].reasoning == "s"


def test_missing_column_lists_what_there_is_and_suggests() -> None:
    with pytest.raises(DataError) as caught:
        _build({"Question": "a", "chain_of_thoughts": "b", "Answers": "c"})
    text = str(caught.value)
    assert "'Question', 'chain_of_thoughts', 'Answers'" in text
    assert "data.columns.reasoning=chain_of_thoughts data.columns.response=Answers" in text
    with pytest.raises(DataError, match=r"data\.columns\.reasoning=…"):
        _build({"Question": "a", "Response": "b"})


def test_wrong_mappings() -> None:
    with pytest.raises(DataError, match="Did you mean 'Complex_CoT'"):
        _build(GOOD, columns={"reasoning": "ComplexCot"})
    with pytest.raises(DataError, match="Did you mean 'reasoning'"):
        _build(GOOD, columns={"reasonin": "Complex_CoT"})
    with pytest.raises(DataError, match="named as reasoning and response"):
        _build(GOOD, columns={"reasoning": "Response"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Response": ""}, "the response ('Response') is empty"),
        ({"Response": " \n\u3000"}, "the response ('Response') is empty"),
        ({"Question": None}, "the question ('Question') is null"),
        ({"Complex_CoT": 7}, "the reasoning ('Complex_CoT') is not text but int"),
        ({"Complex_CoT": ["a"]}, "the reasoning ('Complex_CoT') is not text but list"),
        ({"Question": "\ud83d"}, "lone surrogate"),
        ({"Complex_CoT": "<think> \n</think>"}, "is empty between its <think> tags"),
        ({"Complex_CoT": "a</think>"}, "stray </think>"),
        ({"Complex_CoT": "<think>a</think>b"}, "stray <think>"),
        ({"Complex_CoT": "<think>a<think>b</think>"}, "stray <think>"),
        ({"Response": "x </think> y"}, "the response ('Response') holds a stray </think>"),
        ({"Question": "what is <think>?"}, "the question ('Question') holds a stray <think>"),
    ],
)
def test_unusable_rows_are_set_aside_with_a_reason(change: dict[str, object], reason: str) -> None:
    built = _build(GOOD, {**GOOD, **change}, GOOD)
    assert [example.id for example in built.examples] == ["my:1", "my:3"]
    (item,) = built.quarantined
    assert item.row_number == 2 and item.row == {**GOOD, **change}
    assert reason in item.reason
    assert built.sentences[-1].startswith("1 row of 3 set aside: 1 because the ")


def test_a_key_that_one_row_lacks() -> None:
    built = _build(GOOD, {"Question": "a", "Response": "b"})
    assert built.quarantined[0].reason == "the reasoning ('Complex_CoT') is missing"


def test_texts_are_kept_as_written() -> None:
    assert _build({**GOOD, "Response": "  a\n"}).examples[0].response == "  a\n"


def test_clean_think_tags_are_taken_off_and_counted() -> None:
    built = _build({**GOOD, "Complex_CoT": "\n<think>\nHm.\nYes.\n</think>\n"}, GOOD)
    assert built.examples[0].reasoning == "Hm.\nYes."
    assert "1 row had <think> tags around the reasoning; they were taken off." in built.sentences


def test_all_rows_unusable() -> None:
    with pytest.raises(DataError, match=r"None of the 2 rows .* row 1: the response \('Response'\) is empty"):
        _build({**GOOD, "Response": ""}, {**GOOD, "Response": ""})


def test_rows_of_a_folder_name_their_file() -> None:
    table = _table(GOOD, GOOD, {**GOOD, "Response": ""}, GOOD, parts=(Part("a.jsonl", 2), Part("b.jsonl", 2)))
    built = build_examples(table)
    assert built.quarantined[0].row_number == 3
    assert built.quarantined[0].reason.endswith("is empty (b.jsonl, row 1)")
    assert built.examples[-1].source == "b.jsonl" and locate(table, 4) == ("b.jsonl", 2)
    assert built.sentences[-1] == "1 row of 4 set aside: 1 because the response ('Response') is empty."


def test_ids_carry_row_numbers() -> None:
    assert make_id("/x/train.jsonl.gz", 12) == "train:12"
    assert make_id("owner/medical-o1", 3) == "medical-o1:3"
    assert find_row_number("train:12") == 12
    assert find_row_number("clinic-anion-gap") is None and find_row_number("a:b") is None


def test_reasoning_in_the_response_is_split_off_and_said() -> None:
    row = {"Question": "Why?", "Response": "<think>Hm.</think>So."}
    built = _build(row, {**row, "Response": "So."})
    assert (built.examples[0].reasoning, built.examples[0].response) == ("Hm.", "So.")
    assert "Column 'Response' holds the reasoning too, up to </think>." in built.sentences
    assert "1 row had reasoning and answer in one text; it was split at </think>." in built.sentences
    assert built.quarantined[0].reason == "the response ('Response') holds no </think>, so no reasoning"
    named = {"question": "a", "response": "b"}
    assert _build({"a": "Why?", "b": "Hm.</think>So.", "c": "x"}, columns=named).examples[0].reasoning == "Hm."


@pytest.mark.parametrize("value", [None, "", " \n", "<think> </think>"])
def test_a_row_without_reasoning_can_be_inspected(value: object) -> None:
    table = _table(GOOD, {**GOOD, "Complex_CoT": value}, {**GOOD, "Complex_CoT": 7})
    built = build_examples(table, purpose=Purpose.INSPECT)
    assert [example.reasoning for example in built.examples] == ["Because.", None]
    assert "1 row came without a reasoning." in built.sentences and len(built.quarantined) == 1
    assert len(build_examples(table).quarantined) == 2


def test_layouts_do_not_overrule_what_the_user_names() -> None:
    row = {"instruction": "Why?", "output": "<think>Hm.</think>So.", "note": "n"}
    named = {"question": "note", "reasoning": "instruction", "response": "output"}
    with pytest.raises(DataError, match=r"None of the 1 row .* stray <think>"):
        _build(row, columns=named)
    assert _build(row).examples[0].question == "Why?"


def test_a_stream_is_built_a_chunk_at_a_time(tmp_path: Path) -> None:
    for name, num_rows in (("a.csv", 3), ("b.csv", 4)):
        lines = [f"q{number},{'' if number == 2 else 'c'},r" for number in range(num_rows)]
        (tmp_path / name).write_text("Question,Complex_CoT,Response\n" + "\n".join(lines) + "\n")
    whole = build_examples(load_rows(str(tmp_path)))
    stream = stream_rows(str(tmp_path))
    rows = [row for row, _ in stream]
    plan = choose_layout(list(rows[0]), rows, source=stream.source)
    parts = [plan.build(rows[start : start + 2], start + 1, stream.places) for start in range(0, len(rows), 2)]
    assert [example for part in parts for example in part.examples] == whole.examples
    assert [item for part in parts for item in part.quarantined] == whole.quarantined
    assert whole.quarantined[1].reason.endswith("is empty (b.csv, row 3)")
    counts = parts[0].counts + parts[1].counts + parts[2].counts + parts[3].counts
    assert plan.say(counts) == whole.sentences
    assert plan.settings != choose_layout(list(rows[0]), rows, source="y").settings
