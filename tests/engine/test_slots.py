"""Slots: which prompt is where, when a free slot is given away, and when rows leave."""

from __future__ import annotations

import pytest

from medcot.engine import slots as module
from medcot.engine.slots import Piece, Slots, split_to_read


def test_prompts_take_slots_in_their_order() -> None:
    slots = Slots([4, 5, 6, 7], 2)
    assert slots.fill() == [Piece([0, 1], [0, 1])] and slots.fill() == []
    slots.end(1)
    assert slots.rows == [0, 1] and slots.busy  # it is known until its slot is given away
    assert slots.fill() == [Piece([1], [2])] and slots.rows == [0, 2]
    slots.end(0)
    slots.end(2)
    assert slots.fill() == [Piece([0], [3])] and slots.rows == [3, 2]
    slots.end(3)
    assert not slots.busy and slots.num_ended == 4 and slots.fill() == []


def test_more_slots_than_prompts_are_not_made() -> None:
    assert len(Slots([1, 2], 9).rows) == 2


def test_refilling_waits_for_a_share_of_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFILL_SHARE", 0.25)
    slots = Slots([1] * 12, 8)
    slots.fill()
    slots.end(5)
    assert slots.fill() == []
    slots.end(0)
    assert slots.fill() == [Piece([0, 5], [8, 9])]
    slots.end(1)
    slots.end(2)
    assert slots.fill() == [Piece([1, 2], [10, 11])]


def test_the_last_that_waits_need_no_more_slots_than_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFILL_SHARE", 0.5)
    slots = Slots([1] * 9, 8)
    slots.fill()
    slots.end(3)
    assert slots.fill() == [Piece([3], [8])]


def test_rows_leave_only_when_none_waits() -> None:
    slots = Slots([1] * 5, 4)
    slots.fill()
    for row in (0, 1, 3):
        slots.end(row)
    assert slots.drop(0.5) is None
    slots.fill()
    assert slots.rows == [4, 1, 2, 3] and slots.drop(0.6) is None
    assert slots.drop(0.5) == [0, 2] and slots.rows == [4, 2]
    slots.end(2)
    slots.end(4)
    assert slots.drop(0.5) is None


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([], []),
        ([50], [range(1)]),
        ([4, 4, 2], [range(3)]),
        ([4, 4, 3], [range(2), range(2, 3)]),
        ([2, 50, 2, 2], [range(1), range(1, 2), range(2, 4)]),
    ],
)
def test_pieces_hold_so_many_tokens_or_one_prompt(
    lengths: list[int], wanted: list[range], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_TOKENS", 10)
    assert list(split_to_read(lengths)) == wanted
