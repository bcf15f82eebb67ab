"""Workers: answers in order, few items ahead, nothing printed, nobody left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

from medcot.data.children import map_in_children
from toy_checks import my_children


def triple(number: int) -> int:
    print("chatter on standard output")
    os.write(1, b"from C as well" * 1000)
    return 3 * number


def test_items_stream_through_children_in_order_and_few_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    answers = map_in_children(triple, items(), 2)
    for number in range(30):
        assert next(answers) == 3 * number
        assert len(taken) <= number + 6
    answers.close()
    assert not my_children()
    assert list(map_in_children(triple, [], 2)) == []


def test_an_interrupt_is_left_to_the_parent() -> None:
    answers = map_in_children(time.sleep, [0.0, 0.0, 1.0, 1.0, 0.0, 0.0], 2)
    assert next(answers) is None and next(answers) is None  # so they have begun, and now sleep
    children = my_children()
    assert children
    for child in children:
        child.send_signal(signal.SIGINT)  # Ctrl-C goes to all of a terminal's processes
    assert list(answers) == [None] * 4  # by the same children: of one that dies, an error comes


def test_who_stops_early_need_not_wait() -> None:
    sleepers = map_in_children(time.sleep, [0.0, 60.0, 60.0, 60.0], 2)
    next(sleepers)
    started = time.monotonic()
    sleepers.close()
    assert time.monotonic() - started < 20 and not my_children()
