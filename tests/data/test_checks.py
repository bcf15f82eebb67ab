"""Encoding: order, counts and the three policies; workers give what one process gives."""

import functools
import json
from pathlib import Path

import pytest

from medcot.data import checks
from medcot.data.checks import encode_rows, save_quarantine
from medcot.errors import DataError, OutputError
from medcot.records import Example, Problem, Quarantined, Row


def _example(number: int, num_words: int, reasoning: str | None = None) -> Example:
    return Example(f"x:{number}", "q", "x.jsonl", reasoning=reasoning or "w " * num_words, response="r")


def encode(example: Example, *, loud: bool = False) -> Row:
    """One token a word of reasoning, plus one each for question, answer and end."""
    if loud:
        print("chatter on standard output")
    if example.reasoning == "bad":
        raise DataError("It is bad", "It must be good", "Mend it")
    if example.reasoning == "bug":
        raise KeyError("a bug")
    num_words = len((example.reasoning or "").split())
    ids = list(range(num_words + 3))
    stop = num_words + 1
    return Row(example.id, ids, [-100, *ids[1:]], (0, 1), (1, stop), (stop, stop + 1), (stop + 1, stop + 2))


def truncate(example: Example, max_tokens: int) -> Row:
    if max_tokens < 4:
        raise DataError("Question and answer alone are too long", "They are kept", "Raise the limit")
    return encode(_example(int(example.id.partition(":")[2]), max_tokens - 3))


EXAMPLES = [_example(1, 2), _example(2, 97), _example(3, 4), _example(4, 1997)]


def _run(over_length: str, max_tokens: int = 10, examples: list[Example] = EXAMPLES) -> checks.Encoded:
    return encode_rows(examples, encode, max_tokens=max_tokens, over_length=over_length, truncate=truncate)


def test_drop_counts_and_lists() -> None:
    encoded = _run("drop")
    assert [row.id for row in encoded.rows] == ["x:1", "x:3"]
    assert [(item.row_number, item.reason) for item in encoded.quarantined] == [
        (2, "100 tokens; limit 10"),
        (4, "2,000 tokens; limit 10"),
    ]
    assert encoded.quarantined[0].row["id"] == "x:2" and encoded.quarantined[0].row["response"] == "r"
    assert (encoded.num_rows, encoded.num_over_length, encoded.num_dropped, encoded.num_truncated) == (2, 2, 2, 0)
    assert (encoded.num_tokens, encoded.num_trained_tokens) == (5 + 7, 4 + 6)


def test_limit_itself_is_allowed() -> None:
    assert _run("drop", max_tokens=2000).num_rows == 4
    assert _run("drop", max_tokens=1999).num_rows == 3


def test_truncate_keeps_order_and_count() -> None:
    encoded = _run("truncate_think")
    assert [(row.id, row.num_tokens) for row in encoded.rows] == [("x:1", 5), ("x:2", 10), ("x:3", 7), ("x:4", 10)]
    assert (encoded.num_over_length, encoded.num_dropped, encoded.num_truncated) == (2, 0, 2)


def test_what_cannot_be_truncated_is_set_aside() -> None:
    with pytest.raises(DataError, match="Question and answer alone are too long"):
        _run("truncate_think", max_tokens=3)
    encoded = _run("truncate_think", max_tokens=3, examples=[_example(1, 0, " "), _example(2, 9)])
    assert encoded.num_dropped == 1 and encoded.num_truncated == 0
    assert encoded.quarantined[0].reason.startswith("12 tokens; limit 3; Question and answer alone")


def test_error_names_rows_and_remedies() -> None:
    with pytest.raises(DataError) as caught:
        _run("error")
    assert "2 of 4 rows are over 10 tokens: x:2 (100), x:4 (2,000)" in str(caught.value)
    assert "model.max_seq_length=2000" in str(caught.value)
    assert _run("error", max_tokens=2000).num_rows == 4


def test_nothing_left() -> None:
    with pytest.raises(DataError, match="max_seq_length to at least 5"):
        _run("drop", max_tokens=4)
    with pytest.raises(DataError, match="No row is left of 0"):
        _run("drop", examples=[])


def test_rows_that_encode_refuses_are_set_aside_but_not_counted_as_long() -> None:
    encoded = _run("error", examples=[_example(1, 2), _example(2, 0, "bad")])
    assert (encoded.num_rows, encoded.num_over_length, encoded.num_dropped) == (1, 0, 0)
    assert "It is bad" in encoded.quarantined[0].reason


def test_ids_without_row_numbers_fall_back_to_position() -> None:
    examples = [_example(1, 2), Example("clinic-a", "q", "builtin", reasoning="w " * 50, response="r")]
    assert _run("drop", examples=examples).quarantined[0].row_number == 2


def test_unknown_policy() -> None:
    with pytest.raises(DataError, match="Did you mean 'truncate_think'"):
        _run("truncate")


def test_workers_give_what_one_process_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [_example(number, number % 13) for number in range(1, 201)] + [_example(201, 0, "bad")]
    alone = _run("truncate_think", examples=examples)
    monkeypatch.setattr(checks, "FEWEST_CHARACTERS_FOR_WORKERS", 10)
    loud = functools.partial(encode, loud=True)
    shared = encode_rows(examples, loud, max_tokens=10, over_length="truncate_think", truncate=truncate, num_proc=2)
    assert shared == alone
    with pytest.raises(ChildProcessError, match="a bug"):
        encode_rows(
            [*examples, _example(202, 0, "bug")],
            encode,
            max_tokens=10,
            over_length="drop",
            truncate=truncate,
            num_proc=2,
        )


def test_no_row_left_is_an_error_unless_that_is_fine() -> None:
    with pytest.raises(DataError, match="No row is left of 2"):
        encode_rows(EXAMPLES[:2], encode, max_tokens=1, over_length="drop", truncate=truncate)
    encoded = encode_rows(EXAMPLES[:2], encode, max_tokens=1, over_length="drop", truncate=truncate, may_be_empty=True)
    assert encoded.rows == [] and encoded.num_dropped == len(encoded.quarantined) == 2


def test_few_examples_start_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "map_in_children", None)
    encoded = encode_rows(EXAMPLES, encode, max_tokens=10, over_length="drop", truncate=truncate, num_proc=8)
    assert encoded.num_rows == 2


def test_quarantine_file_is_whole_sorted_and_lossless(tmp_path: Path) -> None:
    path = tmp_path / "data" / "quarantine.jsonl"
    row: dict[str, object] = {"Question": "尿\ud83d", "raw": b"\xff", "n": 1}
    save_quarantine(path, [Quarantined(7, "b", {}, "question", Problem.EMPTY), Quarantined(2, "a", row)])
    text = path.read_text("utf-8")
    first, second = (json.loads(line) for line in text.splitlines())
    assert "尿" in text
    assert first == {"row_number": 2, "reason": "a", "row": {"Question": "尿\ud83d", "raw": "ff", "n": 1}}
    assert second == {"row_number": 7, "reason": "b", "row": {}}
    save_quarantine(path, [])
    assert path.read_text() == ""
    assert [entry.name for entry in path.parent.iterdir()] == ["quarantine.jsonl"]


def test_quarantine_on_an_unusable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_quarantine(tmp_path / "file" / "quarantine.jsonl", [])
