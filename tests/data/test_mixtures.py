"""Mixtures hold the proportions asked for, repeat nothing unasked, and come out the same every time."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medcot.data.mixtures import Share, draw_rows, plan_mixture
from medcot.errors import DataError

SEED = 3407


def plan(num_rows: list[int], weights: list[float | None], *, repeat: bool = False) -> list[Share]:
    return plan_mixture([f"s{number}" for number in range(len(num_rows))], num_rows, weights, repeat=repeat)


def drawn(num_rows: list[int], weights: list[float | None], *, repeat: bool = False) -> list[int]:
    return [share.num_drawn for share in plan(num_rows, weights, repeat=repeat)]


@pytest.mark.parametrize(
    ("num_rows", "weights", "once", "repeated"),
    [
        ([100, 1000], [1, 1], [100, 100], [1000, 1000]),
        ([100, 1000], [1, 3], [100, 300], [333, 1000]),
        ([100, 1000], [0.1, 0.9], [100, 900], [111, 1000]),
        ([1000, 100, 10], [7, 2, 1], [70, 20, 10], [1000, 286, 143]),
        ([5], [2], [5], [5]),
        ([30, 10], [0.3, 0.1], [30, 10], [30, 10]),  # 0.3 / 0.1 is not 3 in binary
    ],
)
def test_weights_are_proportions_of_the_rows_drawn(num_rows, weights, once, repeated):
    assert drawn(num_rows, weights) == once
    assert drawn(num_rows, weights, repeat=True) == repeated


def test_without_weights_every_row_comes_once():
    shares = plan([3, 5, 1], [None, None, None])
    assert shares == [Share(3, 3), Share(5, 5), Share(1, 1)]
    assert sorted(draw_rows(shares, SEED)) == [(s, row) for s, num in enumerate((3, 5, 1)) for row in range(num)]


@given(
    st.lists(st.tuples(st.integers(1, 400), st.floats(0.01, 100)), min_size=1, max_size=4),
    st.booleans(),
    st.integers(),
)
def test_what_is_drawn_is_what_was_planned(sources, repeat, seed):
    num_rows, weights = [list(part) for part in zip(*sources, strict=True)]
    try:
        shares = plan(num_rows, weights, repeat=repeat)
    except DataError:
        assert not repeat
        return
    total = sum(share.num_drawn for share in shares)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share.num_drawn - total * weight / sum(weights)) <= len(shares)
    if repeat:
        assert not any(share.num_left_out for share in shares) and any(s.num_repeats == 0 for s in shares)
    else:
        assert not any(share.num_repeats for share in shares) and any(s.num_left_out == 0 for s in shares)
    if total > 5_000:
        return
    rows = list(draw_rows(shares, seed))
    assert Counter(source for source, _ in rows) == {s: share.num_drawn for s, share in enumerate(shares)}
    for source, share in enumerate(shares):
        times = Counter(row for s, row in rows if s == source)
        assert max(times) < share.num_rows
        assert max(times.values()) - min(times[row] for row in range(share.num_rows)) <= 1
        assert share.num_left_out == sum(times[row] == 0 for row in range(share.num_rows))


def test_a_seed_always_draws_the_same_and_another_seed_other_rows():
    shares = plan([50, 500], [1, 1])
    assert list(draw_rows(shares, 1)) == list(draw_rows(shares, 1)) != list(draw_rows(shares, 2))
    assert list(draw_rows([Share(3, 2), Share(4, 4)], 7)) == [(1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (1, 3)]


def test_the_order_is_mixed_throughout():
    rows = [source for source, _ in draw_rows(plan([1000, 1000], [1, 1]), SEED)]
    for start in range(0, 2000, 200):
        assert 60 < sum(rows[start : start + 200]) < 140
    assert max(len(list(run)) for _, run in itertools.groupby(rows)) < 25


def test_each_row_of_a_source_has_the_same_chance():
    times = Counter(
        row for seed in range(2000) for source, row in draw_rows([Share(5, 5), Share(10, 3)], seed) if source
    )
    assert sum(times.values()) == 6000
    assert all(500 < times[row] < 700 for row in range(10))  # 600 expected, deviation 20


def test_a_source_is_read_forwards_once_a_pass():
    rows = [row for _, row in draw_rows([Share(10, 24)], SEED)]
    assert rows[:20] == [*range(10), *range(10)] and rows[20:] == sorted(set(rows[20:]))


def test_a_source_that_would_give_nothing_is_refused():
    with pytest.raises(DataError, match=r"'s1' would give none of 10 rows by its weight of 0\.01.*data\.repeat=true"):
        plan([10, 1000], [1, 0.01])
    with pytest.raises(DataError, match="'s0' has no row left"):
        plan([0, 10], [None, None])
