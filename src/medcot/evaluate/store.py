"""Answers on disk as they come, so that a killed evaluation goes on and nothing is paid for twice.

An answer is found again by the hash of all that it depends on: model, adapter, task, item, the text that the model
reads, sampling, seed and limits. Nothing in a key says when or where it was asked, so a longer run (``medqa:400`` after
``medqa:200``), another machine, and the control that shares its questions all find what is there already. Answers that
failed are kept for the account, and asked again.

The file is JSON Lines that are only ever added to. One line is one write under a lock of its own, in a file opened for
appending: two processes may share a store, and each sees what the other has added before it adds. A process killed
inside a line leaves a torn one; the next writer ends it, and readers pass over it and count it. The usual way, writing
results at the end, costs hours when it fails; a database would do, but nobody can read one with a pager.

A line reaches the operating system at once, which survives a kill, and the disk every few lines, which survives a power
cut but for those.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from medcot.errors import OutputError
from medcot.evaluate.backends import Answer, Backend, Counts, Ending, Limits, Request
from medcot.records import Finish

SYNC_EVERY = 8  # lines between two fsyncs
# To be raised when the same tokens or the same reply would become another answer: closing, cutting, splitting.
READING = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """Who answers what: the part of a key that is the same for a whole task.

    Attributes:
        model: what tells one model from another: its source, revision and precision, or the server and its model.
        adapter_sha256: of the adapter's weights; ``None`` without one.
        task_sha256: of the task's source.
    """

    model: str
    adapter_sha256: str | None
    task_sha256: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What ``answer_all`` did.

    Attributes:
        answers: one for each request, in their order.
        num_asked: how many were put to the back end; the others were there already.
    """

    answers: list[Answer]
    num_asked: int


def compute_key(subject: Subject, request: Request, prompt_text: str) -> str:
    """Return the SHA-256 of all that an answer depends on.

    Args:
        subject: model, adapter and task.
        request: item, sampling, seed and limits.
        prompt_text: all the text that the model reads.
    """
    parts = {
        "reading": READING,
        **asdict(subject),
        "item": request.item_id,
        "prompt": prompt_text,
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
        "seed": request.seed,
        **_describe_limits(request.limits),
        "choices": request.choices,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _describe_limits(limits: Limits) -> dict[str, Any]:
    """What of the limits an answer depends on: where thinking and answer share one, how they share it is nothing."""
    if limits.ending is Ending.WRITTEN and limits.think_tokens:
        return {"max_tokens": limits.think_tokens + limits.answer_tokens}
    return asdict(limits)


class AnswerStore:
    """A JSON Lines file of answers by key; a context manager.

    Args:
        path: the file; it and its folder are made if they are not there.
        sync_every: lines between two fsyncs.

    Attributes:
        num_torn: lines that could not be read, most likely cut short by a kill.
    """

    def __init__(self, path: Path, *, sync_every: int = SYNC_EVERY) -> None:
        self.path = path
        self.num_torn = 0
        self._sync_every, self._unsynced = sync_every, 0
        self._answers: dict[str, Answer] = {}
        self._offset, self._tail = 0, b""  # all complete lines before the offset are read; the tail follows it
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        self.refresh()

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> Answer | None:
        """Return the answer kept under a key, as far as the file was read; ``None`` where there is none."""
        return self._answers.get(key)

    def refresh(self) -> None:
        """Read what was added since."""
        with self._explained(), self._lock:
            self._read_on()

    def add(self, key: str, answer: Answer) -> bool:
        """Keep an answer; return whether it was added: of two for one key, the first stays.

        Raises:
            OutputError: the disk does not take it.
        """
        line = json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._explained(), self._lock:
            self._read_on()
            if key in self._answers:
                return False
            if self._tail:  # whoever wrote it holds no lock any more, so it will not be finished
                self._write(b"\n")
            self._write(line)
            self._unsynced += 1
            if self._unsynced >= self._sync_every:
                os.fsync(self._file)
                self._unsynced = 0
            self._read_on()
        return True

    def close(self) -> None:
        """Bring everything to the disk and let go of the file."""
        with self._explained():
            os.fsync(self._file)
            os.close(self._file)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]

    def _read_on(self) -> None:
        """Read from the offset to the end of the file."""
        os.lseek(self._file, self._offset, os.SEEK_SET)
        pieces = [self._tail[:0]]
        while piece := os.read(self._file, 1 << 20):
            pieces.append(piece)
        lines = b"".join(pieces).split(b"\n")
        self._tail = lines.pop()
        for line in lines:
            self._offset += len(line) + 1
            if line:
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            key, answer = values.pop("key"), _read_answer(values)
        except (ValueError, TypeError, KeyError, AttributeError):  # torn, or no line of ours
            self.num_torn += 1
            return
        if answer.error is None:
            self._answers.setdefault(key, answer)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"'{self.path}' cannot be used: {error.strerror or error}",
                "Answers are kept in it as they come",
                "Free some space or mend the permissions; the same command then goes on from here",
            ) from error


def answer_all(backend: Backend, requests: Sequence[Request], store: AnswerStore, subject: Subject) -> Answered:
    """Answer every request from the store, and from the back end where it is not there, keeping each as it comes.

    Args:
        backend: whatever answers.
        requests: what is asked; the same request twice is asked once.
        store: where answers are kept.
        subject: what the store tells them apart by.

    Raises:
        MedcotError: the back end can answer nothing, or the disk takes nothing; what came before is kept.
    """
    store.refresh()
    keys = [compute_key(subject, request, backend.prompt_of(request)) for request in requests]
    wanted = {key: request for key, request in zip(keys, requests, strict=True) if store.get(key) is None}
    by_place: dict[tuple[str, int], list[str]] = {}
    for key, request in wanted.items():
        by_place.setdefault((request.item_id, request.seed), []).append(key)
    clash = next((place for place, found in by_place.items() if len(found) > 1), None)
    assert clash is None, f"two requests of one task go by item and seed {clash}"
    failed: dict[str, Answer] = {}

    def keep(answer: Answer) -> None:
        (key,) = by_place.pop((answer.item_id, answer.seed))  # a second answer to one request would raise here
        store.add(key, answer)
        if answer.error is not None:
            failed[key] = answer

    if wanted:
        backend.answer(list(wanted.values()), keep)
    assert not by_place, f"{len(by_place)} requests went without an answer"
    # Another process may have answered meanwhile what failed here.
    answers = [store.get(key) or failed[key] for key in keys]
    return Answered(answers, len(wanted))


def _read_answer(values: dict[str, Any]) -> Answer:
    finish = values["finish"]
    return Answer(**{**values, "finish": finish and Finish(finish), "counts": Counts(values["counts"])})
