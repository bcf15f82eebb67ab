"""A row turns tokens into text: stop strings in pieces, thinking closed with the ids of training, halves of a tag."""

from __future__ import annotations

from typing import Any

import pytest

from medcot.generate import Sampling
from medcot.model import LoadedModel
from medcot.prompt import THINK_CLOSE, Style, encode_prompt
from medcot.prompt.frames import frame_of, tokenise
from medcot.serve.jobs import End, Ending, Job, Text
from medcot.serve.rows import Row, StopMatcher


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one two three", (), "one two three"),
        ("one two three", ("two",), "one "),
        ("one twice two three", ("two three", "four"), "one twice "),
        ("aab", ("aaab",), "aab"),
        ("aaab", ("aab",), "a"),
        ("a STOP b END", ("END", "STOP"), "a "),
    ],
)
def test_stop_strings_are_found_however_the_text_is_cut(
    text: str, stops: tuple[str, ...], wanted: str, size: int
) -> None:
    matcher = StopMatcher(stops)
    got = "".join(matcher.feed(text[start : start + size]) for start in range(0, len(text), size))
    assert got + matcher.finish() == wanted and matcher.found == (wanted != text)


def make_row(embedded: LoadedModel, **settings: Any) -> tuple[Row, list[Text | End]]:
    told: list[Text | End] = []
    style = Style.SHORT
    asked = {"max_tokens": 60, "sampling": Sampling(0, 1), "seed": 0, "splits": True, "tell": told.append} | settings
    job = Job("tuned", encode_prompt("Why?", style, embedded.tokenizer), **asked)
    return Row(job, embedded.tokenizer, frame_of(style, embedded.tokenizer), {embedded.tokenizer.eos_token_id}), told


def write(row: Row, text: str, embedded: LoadedModel) -> None:
    for token in tokenise(text, embedded.tokenizer)[0]:
        row.take(token)


def said(told: list[Text | End], *, in_think: bool) -> str:
    return "".join(event.text for event in told if isinstance(event, Text) and event.in_think is in_think)


def test_thinking_is_told_apart_and_counted(embedded: LoadedModel) -> None:
    row, told = make_row(embedded)
    write(row, "first this</think>then that", embedded)
    row.take(embedded.tokenizer.eos_token_id)
    assert (said(told, in_think=True), said(told, in_think=False)) == ("first this", "then that")
    end = told[-1]
    assert isinstance(end, End) and end.ending is Ending.STOP
    assert end.num_tokens == len(row.written) and 0 < end.num_think_tokens < end.num_tokens


def test_at_the_cap_the_thinking_is_closed_as_training_closes_it(embedded: LoadedModel) -> None:
    row, told = make_row(embedded, think_tokens=3)
    write(row, "one two three", embedded)
    assert row.must_close
    before = len(row.written)
    row.close()
    frame = frame_of(Style.SHORT, embedded.tokenizer)
    assert row.written[before:] == [
        *tokenise(frame.after_think, embedded.tokenizer)[0],
        *frame.close_ids,
        *tokenise(frame.before_answer, embedded.tokenizer)[0],
    ]
    assert not row.must_close and not row.in_think and said(told, in_think=True).strip() == "one two three"


def test_a_tag_that_the_cap_cuts_in_two_is_finished(embedded: LoadedModel) -> None:
    frame = frame_of(Style.SHORT, embedded.tokenizer)
    assert len(frame.close_ids) > 2, "else there is nothing to cut"
    row, told = make_row(embedded, think_tokens=1)
    for token in [*tokenise("so", embedded.tokenizer)[0], *frame.close_ids[:2]]:
        row.take(token)
    row.close()
    assert row.written.count(frame.close_ids[-1]) == 1
    assert not row.in_think and said(told, in_think=True) == "so"
    assert THINK_CLOSE not in said(told, in_think=False)


def test_stop_strings_end_the_answer_and_not_the_thinking(embedded: LoadedModel) -> None:
    row, told = make_row(embedded, stop=("stop here",))
    write(row, "I will not stop here</think>but now I stop here", embedded)
    assert row.ending is Ending.STOP and said(told, in_think=False) == "but now I "
    assert "stop here" in said(told, in_think=True)


def test_a_row_ends_once(embedded: LoadedModel) -> None:
    row, told = make_row(embedded, max_tokens=2)
    write(row, "one two", embedded)
    row.end(Ending.CANCELLED)
    assert [event.ending for event in told if isinstance(event, End)] == [Ending.LENGTH]


def test_no_piece_holds_half_a_character(embedded: LoadedModel) -> None:
    text = "so é 漢字 😀 and 👩‍⚕️</think>Größe: 5 µg 🩺"
    tokens = tokenise(text, embedded.tokenizer)[0]
    assert len(tokens) > len(text.split()) + 8, "characters of several tokens"
    row, told = make_row(embedded)
    for token in tokens:
        row.take(token)
    row.take(embedded.tokenizer.eos_token_id)
    think, _, answer = text.partition("</think>")
    assert (said(told, in_think=True), said(told, in_think=False)) == (think, answer)
    assert all("\N{REPLACEMENT CHARACTER}" not in event.text for event in told if isinstance(event, Text))


def test_a_stop_string_in_what_is_held_back_still_stops(embedded: LoadedModel) -> None:
    row, told = make_row(embedded, splits=False, stop=("\N{REPLACEMENT CHARACTER}",), max_tokens=2)
    first = tokenise("😀", embedded.tokenizer)[0][0]  # a quarter of a character, shown as such at the end
    row.take(tokenise("a", embedded.tokenizer)[0][0])
    row.take(first)
    assert row.ending is Ending.STOP and told[-1].ending is Ending.STOP
