"""Worker processes: a function applied to items that stream through, answers in order, a bounded number under way.

The workers are plain ``python -c`` children that talk pickle over their pipes, not a ``multiprocessing`` pool: forking
a process in which tokenizer and BLAS threads live can deadlock, and ``spawn`` imports the caller's main script again,
so that a script of three lines without an ``if __name__`` guard would load its model once more in every worker. A child
here imports only what the callable needs, and its printing cannot reach the terminal. The callable must therefore come
from an importable module (``functools.partial`` of a module function, or an instance of a module's class).

Nothing outlives the parent. Children are killed where the parent leaves the loop early (an error, Ctrl-C); where the
parent itself is killed, a child finds its pipe closed at the next item and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, Generic, TypeVar

from medcot.errors import MedcotError

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from medcot.data.children import serve; serve()"
_LAST_WORDS_BYTES = 4000
_WAITING_PER_CHILD = 2  # items taken from the iterable ahead of the answers; the one after next is ready, no more


def map_in_children(
    work: Callable[[Item], Answer], items: Iterable[Item], num_proc: int
) -> Generator[Answer, None, None]:
    """Yield ``work(item)`` for all items, in their order; a child is started only when the others are busy.

    Args:
        work: picklable; sent to each child once.
        items: taken as answers come, never more than two a child ahead of what has been yielded.
        num_proc: the most children at a time.

    A caller that may stop early holds the generator in ``contextlib.closing``, so that the children go at once.

    Raises:
        MedcotError: ``work`` raised it in a child; that of the earliest item comes first.
        ChildProcessError: anything else went wrong in a child; its last words are quoted.
    """
    crew = _Crew(work, num_proc)
    waiting: deque[Future[Answer]] = deque()
    try:
        for item in items:
            if len(waiting) >= _WAITING_PER_CHILD * num_proc:
                yield waiting.popleft().result()
            waiting.append(crew.submit(item))
        while waiting:
            yield waiting.popleft().result()
    except BaseException:
        crew.kill()
        raise
    finally:
        crew.close()


@dataclass(frozen=True, slots=True)
class Raised:
    """An error of the user's data, on its way from a child to the parent."""

    error: MedcotError


class _Child:
    """One worker process, spoken to by one thread."""

    def __init__(self, work: bytes) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe would block a talkative child; closed in end()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
        )
        assert self.process.stdin is not None and self.process.stdout is not None, "both are pipes"
        self._to: BinaryIO = self.process.stdin  # type: ignore[assignment]
        self._from: BinaryIO = self.process.stdout  # type: ignore[assignment]
        self._work: bytes | None = work  # sent with the first item, inside its handling of errors

    def ask(self, item: bytes) -> Any:
        """Return the answer to one pickled item."""
        try:
            if self._work is not None:
                self._to.write(self._work)
                self._work = None
            self._to.write(item)
            self._to.flush()
            answer = pickle.load(self._from)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            status = self.process.wait()  # nothing but its end closes the pipe or cuts an answer short
            raise ChildProcessError(f"A worker ended with status {status}:\n{self._last_words()}") from error
        if isinstance(answer, Raised):
            raise answer.error
        return answer

    def _last_words(self) -> str:
        size = self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, size - _LAST_WORDS_BYTES))
        return self._words.read().decode("utf-8", "replace").strip()

    def end(self) -> None:
        """Let the process end and wait for it."""
        with contextlib.suppress(BrokenPipeError):  # it is dead already, and what was unsent no longer matters
            self._to.close()
        self._from.close()
        self.process.wait()
        self._words.close()


class _Crew(Generic[Item, Answer]):
    """The children, and a thread for each that feeds its pipe and waits for the answer."""

    def __init__(self, work: Callable[[Item], Answer], num_proc: int) -> None:
        self._work = pickle.dumps(work)
        self._threads = ThreadPoolExecutor(num_proc)  # starts a thread only when all others are busy
        self._own = threading.local()
        self._children: list[_Child] = []
        self._lock = threading.Lock()
        self._killed = False

    def submit(self, item: Item) -> Future[Answer]:
        return self._threads.submit(self._ask, item)

    def _ask(self, item: Item) -> Answer:
        child: _Child | None = getattr(self._own, "child", None)
        if child is None:
            with self._lock:
                if self._killed:
                    raise ChildProcessError("The work was called off")
                child = self._own.child = _Child(self._work)
                self._children.append(child)
        answer: Answer = child.ask(pickle.dumps(item))
        return answer

    def kill(self) -> None:
        """Kill the children, which also frees the threads that wait for their answers."""
        with self._lock:
            self._killed = True
            for child in self._children:
                child.process.kill()

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            child.end()


def serve() -> None:
    """Answer items until standard input closes. Runs in the child.

    The answers leave by a copy of standard output; whatever else writes there, Python or C, goes to standard error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides, and kills
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    items = sys.stdin.buffer
    work = pickle.load(items)
    while True:
        try:
            item = pickle.load(items)
        except EOFError:
            return
        try:
            answer = work(item)
        except MedcotError as error:
            answer = Raised(error)
        pickle.dump(answer, answers)
        answers.flush()
