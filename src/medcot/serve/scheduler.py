"""The one thread that touches the model: jobs come at any time, are given slots, are written, and leave.

Continuous batching (Yu et al. 2022, "Orca", OSDI), as ``engine/slots.py`` has it for a list that is known: between two
steps, waiting jobs take free slots, and rows that have ended, are nobody's any more or are late give theirs back. A
turn reads at most ``READ_TOKENS`` of new prompts, so that a crowd at the door does not stop those who are served.

What is waiting is bounded, and who comes to a full queue is turned away at once: a queue that only grows answers
nobody. An error while a lane is being written ends its rows and the lane; the next job opens it anew.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from medcot.engine.slots import READ_TOKENS
from medcot.serve.jobs import End, Ending, Job
from medcot.serve.rows import Row

if TYPE_CHECKING:
    from medcot.serve.lanes import Lane

IDLE_S = 0.2  # how often an idle scheduler looks whether those who wait are still there
_log = logging.getLogger("medcot.serve")

MakeRow = Callable[[Job], Row]
OnEnd = Callable[[Row], None]


class Overloaded(Exception):
    """As many jobs wait as may."""


class Draining(Exception):
    """No more jobs are taken."""


class Scheduler:
    """Writes jobs in turn.

    Args:
        lanes: what opens the lane of each model; called in the scheduler's thread when it is first asked for.
        make_row: makes a row of a job.
        most_waiting: jobs that may wait for a slot, over all lanes.
        on_end: called with each row that had a slot, when it has ended.
    """

    def __init__(
        self,
        lanes: Mapping[str, Callable[[], Lane]],
        make_row: MakeRow,
        *,
        most_waiting: int,
        on_end: OnEnd = lambda _: None,
    ) -> None:
        self._openers, self._make_row, self._on_end = lanes, make_row, on_end
        self._most_waiting = most_waiting
        self._lanes: dict[str, Lane] = {}
        self._waiting: dict[str, deque[Job]] = {name: deque() for name in lanes}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="medcot-serve", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job; what becomes of it is told by ``job.tell``.

        Raises:
            Overloaded: too many wait.
            Draining: it is stopping.
        """
        with self._changed:
            if self._stopping:
                raise Draining
            if self.num_waiting >= self._most_waiting:
                raise Overloaded
            self._waiting[job.model].append(job)
            self._changed.notify()

    def drain(self) -> None:
        """Take no more jobs; those that were taken are written to their ends."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def cancel_all(self) -> None:
        """End what waits and what is being written, at its next token."""
        with self._changed:
            for job in [job for jobs in self._waiting.values() for job in jobs]:
                job.cancelled.set()
            for row in [row for lane in list(self._lanes.values()) for row in list(lane.rows.values())]:
                row.job.cancelled.set()

    def join(self, seconds: float) -> bool:
        """Wait for the end after ``drain``; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Jobs without a slot."""
        return sum(map(len, self._waiting.values()))

    @property
    def num_running(self) -> int:
        """Jobs with one."""
        return sum(len(lane.rows) for lane in list(self._lanes.values()))

    @property
    def num_slots(self) -> int:
        """Jobs that may have one, over the lanes that are open."""
        return sum(len(lane.rows) + lane.num_free for lane in list(self._lanes.values()))

    @property
    def is_alive(self) -> bool:
        """Whether jobs that were taken are being written."""
        return self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        """Whether no more jobs are taken."""
        return self._stopping

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._busy():
                    if self._stopping and not self.num_waiting:
                        return
                    self._changed.wait(IDLE_S)
            for name in self._openers:
                try:
                    self._serve(name)
                except Exception:  # whatever it is, others must still be served
                    _log.exception("writing for '%s' failed", name)
                    self._give_up(name)

    def _busy(self) -> bool:
        return bool(self.num_waiting or any(lane.rows for lane in self._lanes.values()))

    def _serve(self, name: str) -> None:
        """One turn of a lane: who left goes, who waits comes in, everybody is written one token."""
        self._forget(name)
        if not self._waiting[name] and not (name in self._lanes and self._lanes[name].rows):
            return
        if name not in self._lanes:
            self._lanes[name] = self._openers[name]()
        lane = self._lanes[name]
        for row in list(lane.rows.values()):
            if row.job.cancelled.is_set():
                row.end(Ending.CANCELLED)
            elif row.job.is_late:
                row.end(Ending.LENGTH, timed_out=True)
        coming = self._next_rows(name, lane.num_free)
        served = [*lane.rows.values(), *coming]
        try:
            if coming:
                lane.admit(coming)
            lane.turn()
        except Exception:
            for row in served:
                row.end(Ending.ERROR)
            raise
        finally:
            for row in served:
                if row.ended:
                    self._on_end(row)

    def _next_rows(self, name: str, num_free: int) -> list[Row]:
        """Rows of those who wait, as many as there is room for; who cannot be begun is told so."""
        rows: list[Row] = []
        refused: list[Job] = []
        num_tokens = 0
        with self._changed:
            waiting = self._waiting[name]
            while waiting and len(rows) < num_free:
                num_tokens += len(waiting[0].prompt_ids)
                if rows and num_tokens > READ_TOKENS:
                    break
                job = waiting.popleft()
                try:
                    rows.append(self._make_row(job))
                except Exception:  # nothing of the others' work is lost by it
                    _log.exception("a request for '%s' could not be begun", name)
                    refused.append(job)
        for job in refused:
            job.tell(End(Ending.ERROR, len(job.prompt_ids), 0, 0))
        return rows

    def _forget(self, name: str) -> None:
        """Let go of those who wait and whom nobody waits for, or whose time is up."""
        gone: list[tuple[Job, End]] = []
        with self._changed:
            kept: deque[Job] = deque()
            for job in self._waiting[name]:
                if job.cancelled.is_set():
                    gone.append((job, End(Ending.CANCELLED, len(job.prompt_ids), 0, 0)))
                elif job.is_late:
                    gone.append((job, End(Ending.LENGTH, len(job.prompt_ids), 0, 0, timed_out=True)))
                else:
                    kept.append(job)
            self._waiting[name] = kept
        for job, end in gone:
            job.tell(end)

    def _give_up(self, name: str) -> None:
        """End what a lane was doing, and forget the lane; where it cannot be opened, who waits for it goes too."""
        lane = self._lanes.pop(name, None)
        if lane is not None:
            for row in lane.rows.values():
                row.end(Ending.ERROR)  # who has been told already is not told again
            return
        with self._changed:
            jobs, self._waiting[name] = list(self._waiting[name]), deque()
        for job in jobs:
            job.tell(End(Ending.ERROR, len(job.prompt_ids), 0, 0))
