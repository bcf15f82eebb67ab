"""Experiment tracking: the same numbers the run folder holds, also where people compare runs.

Three services are spoken: trackio (a local SQLite file, no account), Weights & Biases, and TensorBoard. ``auto`` means
W&B where a key is found and trackio otherwise. A tracker is a convenience; the run folder is the record. So the rule of
this file is that *no tracker can hurt a run*, and the usual way, calling the library from the training process, breaks
it in several places: trackio reads its folder from an environment variable at import and prints to the terminal, wandb
starts threads, wraps the console, asks for a key on stdin and raises from a dozen exception families, and a slow
network blocks an optimizer step. Here each tracker lives in a child process (``tracking_worker.py``) that gets JSON
lines through a pipe: its environment, its chatter (kept in ``tracker.log``) and its crashes are its own. A thread
does the writing, so a full pipe never stops training. When the child dies or hangs, that is announced once, and the
run goes on without it.

Nothing here touches ``os.environ``, and every line sent has passed ``secrets.redact``. The key itself travels once,
through the pipe, never through a file, an argument list or the environment.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from medcot.errors import MissingExtraError, RecipeError
from medcot.secrets import Secret, SecretName, find_secret, redact
from medcot.tracking_worker import COMPLAINT

START_S = 90.0  # importing and opening; wandb gives up on the network after 20 s, a cold disk needs the rest
FINISH_S = 120.0  # uploading what is left

Announce = Callable[[str], None]
Mode = Literal["online", "offline"]

# An announcement is a sentence; the whole traceback stays in tracker.log.
_MAX_REASON_CHARS = 300


class Tracker(Protocol):
    """Where metrics go besides the run folder; every method returns at once and never raises."""

    where: str

    def log(self, metrics: Mapping[str, float | int | None], step: int) -> None:
        """Log numbers at an optimizer step; ``None`` values are left out."""

    def log_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Log a table, such as the answers before and after."""

    def log_file(self, path: Path) -> None:
        """Log a file, such as the report."""

    def finish(self) -> None:
        """Send what is left and stop; later calls do nothing."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class NoTracker:
    """The tracker of ``tracker: none``: metrics stay in the run folder alone."""

    where = "nowhere besides the run folder"

    def log(self, metrics: Mapping[str, float | int | None], step: int) -> None:
        """Do nothing."""

    def log_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Do nothing."""

    def log_file(self, path: Path) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


class WorkerTracker:
    """A tracker in a child process.

    Args:
        process: the child, with pipes for stdin and stdout, still waiting for its first line.
        log_path: where the child's own output goes; its last line is the reason given when it dies.
        announce: called once, with one sentence, when tracking is lost.
    """

    def __init__(self, process: subprocess.Popen[str], log_path: Path, announce: Announce) -> None:
        self.where = ""
        self._process = process
        self._log_path = log_path
        self._announce = announce
        self._outbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._finished = False
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="medcot-tracker", daemon=True)

    def open(self, request: Mapping[str, Any], timeout_s: float = START_S) -> dict[str, Any] | None:
        """Start the child's work and return its first reply, or ``None`` where it died or did not answer."""
        self._outbox.put(json.dumps(request, default=str))
        self._thread.start()
        try:
            reply = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            reply = {}
        return reply or None

    def log(self, metrics: Mapping[str, float | int | None], step: int) -> None:
        """Log numbers at an optimizer step; ``None`` values are left out."""
        values = {key: value for key, value in metrics.items() if value is not None}
        self._send({"op": "log", "metrics": values, "step": step})

    def log_table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Log a table; cells that are not text or numbers are logged as text."""
        self._send({"op": "log_table", "name": name, "columns": list(columns), "rows": [list(row) for row in rows]})

    def log_file(self, path: Path) -> None:
        """Log a file by its path; the child reads it."""
        self._send({"op": "log_file", "path": str(path.resolve())})

    def finish(self) -> None:
        """Send what is left and stop the child; it is ended by force after ``FINISH_S`` seconds."""
        if self._finished:
            return
        self._finished = True
        self._outbox.put(None)
        self._thread.join(timeout=FINISH_S)
        if self._thread.is_alive() or self._process.poll() is None:
            self.kill()
            self._lose(f"it did not finish within {FINISH_S:.0f} s")
        elif self._process.returncode != 0:
            self._lose(self.reason())

    def kill(self) -> None:
        """End the child at once."""
        self._finished = True
        self._process.kill()
        self._process.wait()

    def reason(self) -> str:
        """Return why the child died, in its own words: its last complaint, else the last line of its log."""
        try:
            lines = self._log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError as error:
            return f"its log cannot be read: {error.strerror}"
        complaints = [line.removeprefix(COMPLAINT) for line in lines if line.startswith(COMPLAINT)]
        if not complaints and not lines:
            return f"exit code {self._process.poll()}"
        return redact((complaints or lines)[-1].strip())[:_MAX_REASON_CHARS]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._finished or self._lost.is_set():
            return
        if self._process.poll() is not None:
            self._lose(self.reason())
            return
        self._outbox.put(redact(json.dumps(message, default=str, ensure_ascii=False)))

    def _lose(self, reason: str) -> None:
        if not self._lost.is_set():
            self._lost.set()
            self._announce(f"tracking stopped ({reason}); the run goes on, and its folder keeps every metric")

    def _pump(self) -> None:
        """Carry lines to the child until the outbox ends or the pipe breaks; runs in its own thread."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None, "the child is started with both pipes"
        try:
            with stdin:
                stdin.write(f"{self._outbox.get()}\n")
                stdin.flush()
                first = stdout.readline()
                self._replies.put(json.loads(first) if first.strip() else {})
                while (line := self._outbox.get()) is not None:
                    stdin.write(f"{line}\n")
                    stdin.flush()
        except OSError:  # the child is gone; whoever sends or finishes next sees its exit code and says so
            self._replies.put({})
        self._process.wait()
        stdout.close()


def open_tracker(
    tracker: str = "auto",
    *,
    project: str,
    folder: Path,
    job_type: str = "training",
    run_name: str | None = None,
    anonymous: str | None = None,
    config: Mapping[str, Any] | None = None,
    mode: Mode | None = None,
    announce: Announce | None = None,
) -> Tracker:
    """Open the tracker that was asked for; a resumed run goes on in the same place.

    Args:
        tracker: ``auto`` (W&B where a key is found, else trackio), ``none``, ``trackio``, ``wandb`` or ``tensorboard``.
        project: the name runs are grouped under.
        folder: the run folder; local files go to ``trackio/``, ``wandb/`` or ``tensorboard/`` in it.
        job_type: W&B's kind of job.
        run_name: the run's name there; the folder's name if ``None``.
        anonymous: W&B's anonymous mode, ``allow``, ``must`` or ``never``. W&B itself has retired it, so a run without
            a key (or with ``must``) is recorded offline instead, to be sent later by ``wandb sync``.
        config: every hyper-parameter, nested as in the recipe.
        mode: W&B's ``online`` or ``offline``; ``None`` follows ``WANDB_MODE``, else online where a key is found.
        announce: called with one sentence about anything that is not as asked; by default a logged warning.

    Raises:
        MissingExtraError: the library that was asked for is not installed.
        RecipeError: the service refuses the project's name.
    """
    announce = announce or logging.getLogger("medcot").warning
    # Looked up only where W&B may be meant: a notebook's vault may ask the person for permission.
    key = find_secret(SecretName.WANDB) if tracker in {"auto", "wandb"} and anonymous != "must" else None
    kind = _choose(tracker, key, announce)
    if kind == "none":
        return NoTracker()
    target = folder / kind
    target.mkdir(parents=True, exist_ok=True)
    request = {
        "tracker": kind,
        "folder": str(target.resolve()),
        "project": project,
        "job_type": job_type,
        "run_name": run_name or folder.resolve().name,
        "run_id": _run_id(folder),
        "anonymous": anonymous,
        "mode": mode,
        "config": json.loads(redact(json.dumps(config or {}, default=str))),
        "key": key.value if key else None,
    }
    return _start(kind, target, request, announce)


def _choose(tracker: str, key: Secret | None, announce: Announce) -> str:
    if tracker == "none":
        return "none"
    if tracker == "auto":
        if key is None or os.environ.get("WANDB_MODE") == "disabled":
            tracker = "trackio"
        elif not is_installed("wandb"):
            announce(
                f'{key} was found, but wandb is not installed; tracking with trackio (pip install "medcot[wandb]")'
            )
            tracker = "trackio"
        else:
            tracker = "wandb"
    if not is_installed(tracker):
        package = "medcot" if tracker == "trackio" else f"medcot[{tracker}]"
        raise MissingExtraError(
            f"tracking.tracker is '{tracker}', but the library {tracker} is not installed",
            "A tracker needs its library",
            f'pip install "{package}", or set tracking.tracker=none',
        )
    return tracker


def is_installed(library: str) -> bool:
    """Say whether a library is really there; a folder of that name in the working directory does not count."""
    spec = importlib.util.find_spec(library)
    return spec is not None and spec.origin is not None  # wandb leaves a folder "wandb" wherever it has run


def _start(kind: str, target: Path, request: Mapping[str, Any], announce: Announce) -> Tracker:
    log_path = target / "tracker.log"
    # The one place where an environment is made: the child's. A TRACKIO_DIR of the user's own keeps its meaning.
    environment = {"TRACKIO_DIR": str(target.resolve()), **os.environ, "PYTHONIOENCODING": "utf-8"}
    with log_path.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "medcot.tracking_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the run; the child ends when its pipe does
        )
    worker = WorkerTracker(process, log_path, announce)
    reply = worker.open(request)
    if reply is None or "error" in reply:
        worker.kill()
        if reply is not None:
            raise RecipeError(
                f"tracking.project is '{request['project']}': {redact(reply['error'])}",
                f"{kind} must accept the project's name",
                "Set tracking.project to another name, or tracking.tracker=none",
            )
        announce(f"tracking with {kind} could not start ({worker.reason()}); metrics stay in the run folder")
        return NoTracker()
    for note in reply["notes"]:
        announce(redact(note))
    worker.where = reply["where"]
    return worker


def _run_id(folder: Path) -> str:
    """Return the id under which services know this run: made once, so that a resumed run goes on in its own line."""
    path = folder / "tracking.json"
    try:
        run_id = json.loads(path.read_text(encoding="utf-8"))["run_id"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        run_id = None
    if not isinstance(run_id, str) or not re.fullmatch(r"[0-9a-z]{8,64}", run_id):
        run_id = uuid.uuid4().hex[:12]
        path.write_text(json.dumps({"run_id": run_id}) + "\n", encoding="utf-8")
    return run_id
