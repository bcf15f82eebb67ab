"""The scheduler with lanes that write a letter a turn: who comes in when, who is let go, what an error costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from medcot.generate import Sampling
from medcot.serve.jobs import End, Ending, Job, Text
from medcot.serve.scheduler import Draining, Overloaded, Scheduler


class Letters:
    """A row that is written a letter at a time."""

    def __init__(self, job: Job) -> None:
        self.job, self.written = job, list[str]()
        self.ending: Ending | None = None

    @property
    def ended(self) -> bool:
        return self.ending is not None

    def end(self, ending: Ending, *, timed_out: bool = False) -> None:
        if not self.ended:
            self.ending = ending
            self.job.tell(End(ending, 1, len(self.written), 0, timed_out))


class Slow:
    """A lane of two slots; a turn waits for its permission."""

    def __init__(self, turns: threading.Semaphore, fails: Callable[[], bool] = lambda: False) -> None:
        self.rows: dict[int, Any] = {}
        self.turns, self.fails, self.most = turns, fails, 0

    @property
    def num_free(self) -> int:
        return 2 - len(self.rows)

    def admit(self, rows: Sequence[Any]) -> None:
        free = [place for place in range(2) if place not in self.rows]
        self.rows |= dict(zip(free, rows, strict=False))
        self.most = max(self.most, len(self.rows))

    def turn(self) -> None:
        self.turns.acquire()
        if self.fails():
            raise RuntimeError("broken")
        for row in self.rows.values():
            if not row.ended:
                row.written.append("x")
                row.job.tell(Text("x", False))
                if len(row.written) >= row.job.max_tokens:
                    row.end(Ending.LENGTH)
        self.rows = {place: row for place, row in self.rows.items() if not row.ended}


def make_letters(job: Job) -> Letters:
    """A row of a job; one that wants none cannot be begun."""
    if job.max_tokens == 0:
        raise ValueError("a job of no tokens")
    return Letters(job)


def make(**settings: Any) -> SimpleNamespace:
    turns = threading.Semaphore(0)
    lane = Slow(turns, settings.pop("fails", lambda: False))
    opened: list[str] = []

    def open_lane() -> Slow:
        opened.append("base")
        lane.rows = {}
        return lane

    ended: list[Any] = []
    made: Any = make_letters
    scheduler = Scheduler({"base": open_lane}, made, **{"most_waiting": 4, "on_end": ended.append} | settings)
    return SimpleNamespace(scheduler=scheduler, lane=lane, turns=turns, opened=opened, ended=ended)


def job(num: int = 3, **more: Any) -> tuple[Job, list[Any], threading.Event]:
    told: list[Any] = []
    over = threading.Event()

    def tell(event: Text | End) -> None:
        told.append(event)
        if isinstance(event, End):
            over.set()

    asked = Job("base", [1], num, Sampling(0, 1), 0, False, tell, **more)
    return asked, told, over


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_who_waits_takes_the_slot_of_who_ends() -> None:
    it = make()
    it.scheduler.start()
    jobs = [job(num) for num in (1, 3, 2, 2)]
    for one, _, _ in jobs:
        it.scheduler.submit(one)
    it.turns.release(100)
    for one, told, over in jobs:
        assert over.wait(5)
        end = told[-1]
        assert isinstance(end, End) and end.ending is Ending.LENGTH and end.num_tokens == one.max_tokens
    assert it.lane.most == 2 and len(it.ended) == 4
    it.scheduler.drain()
    assert it.scheduler.join(5)


def test_a_full_queue_turns_away_and_a_draining_one_too() -> None:
    it = make(most_waiting=2)
    for _ in range(2):
        it.scheduler.submit(job()[0])
    with pytest.raises(Overloaded):
        it.scheduler.submit(job()[0])
    it.scheduler.drain()
    with pytest.raises(Draining):
        it.scheduler.submit(job()[0])
    it.turns.release(100)
    it.scheduler.start()
    assert it.scheduler.join(5) and len(it.ended) == 2, "what was taken is written"


def test_who_left_or_is_late_is_let_go_waiting_or_written() -> None:
    it = make()
    it.scheduler.start()
    running, late = job(1000), job(1000, seconds=0.2)
    for one, _, _ in (running, late):
        it.scheduler.submit(one)
    wait_for(lambda: it.scheduler.num_running == 2)
    waiting, tardy = job(), job(seconds=0.05)
    for one, _, _ in (waiting, tardy):
        it.scheduler.submit(one)
    running[0].cancelled.set()
    waiting[0].cancelled.set()
    time.sleep(0.25)
    it.turns.release(1000)
    for _, _, over in (running, late, waiting, tardy):
        assert over.wait(5)
    ends = [told[-1] for _, told, _ in (running, late, waiting, tardy)]
    assert [end.ending for end in ends] == [Ending.CANCELLED, Ending.LENGTH, Ending.CANCELLED, Ending.LENGTH]
    assert [end.timed_out for end in ends] == [False, True, False, True]
    assert ends[3].num_tokens == 0 and it.scheduler.num_waiting == it.scheduler.num_running == 0
    it.scheduler.drain()
    assert it.scheduler.join(5)


def test_an_error_ends_those_it_met_and_the_lane_is_opened_anew() -> None:
    broken = [True]
    it = make(fails=lambda: bool(broken and broken.pop()))
    it.scheduler.start()
    first, second = job(), job()
    it.scheduler.submit(first[0])
    it.turns.release(100)
    assert first[2].wait(5) and first[1][-1].ending is Ending.ERROR
    it.scheduler.submit(second[0])
    assert second[2].wait(5) and second[1][-1].ending is Ending.LENGTH
    assert it.opened == ["base", "base"] and it.scheduler.is_alive
    it.scheduler.cancel_all()
    it.scheduler.drain()
    assert it.scheduler.join(5)


def test_a_job_that_cannot_be_begun_is_told_so_and_costs_nobody_else_anything() -> None:
    it = make()
    jobs = [job(2), job(0), job(2)]
    for one, _, _ in jobs:
        it.scheduler.submit(one)
    it.turns.release(100)
    it.scheduler.start()
    for _, _, over in jobs:
        assert over.wait(5)
    assert [told[-1].ending for _, told, _ in jobs] == [Ending.LENGTH, Ending.ERROR, Ending.LENGTH]
    assert it.opened == ["base"] and it.scheduler.is_alive
    it.scheduler.drain()
    assert it.scheduler.join(5)
