"""The child process in which a tracking library lives; ``tracking.py`` starts it and explains why.

Started as ``python -m medcot.tracking_worker``. The first line on stdin is the request, the first line on stdout the
reply (``{"where", "notes"}``, or ``{"error"}`` for a name that the service refuses); after that each line on stdin is
one call, and the end of stdin means finish. Whatever the library prints goes to stderr, which is a log file. Nothing is
caught on purpose except what has a remedy: an uncaught exception ends this process with its traceback in the log and
one line that begins with ``COMPLAINT``, which the parent announces.

References: https://huggingface.co/docs/trackio, https://docs.wandb.ai/ref/python, ``torch.utils.tensorboard``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

COMPLAINT = "medcot tracker: "  # libraries still print when the interpreter ends, so the last line is not the reason
WANDB_INIT_TIMEOUT_S = 20.0  # wandb waits 90 s for a server that does not answer; nobody wants to watch that

Rows = list[list[Any]]


class RefusedError(Exception):
    """The service does not accept a name the user chose."""


class Backend(Protocol):
    """One library, spoken to in four calls."""

    where: str
    notes: list[str]

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers at a step."""

    def log_table(self, name: str, columns: list[str], rows: Rows) -> None:
        """Log a table."""

    def log_file(self, path: Path) -> None:
        """Log a file."""

    def finish(self) -> None:
        """Write out what is left."""


class TrackioBackend:
    """trackio, on the local disk; ``TRACKIO_DIR`` was set by whoever started this process."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        self.notes: list[str] = []
        try:
            self._run = trackio.init(
                project=request["project"],
                name=request["run_name"],
                group=request["job_type"],
                config=request["config"],
                resume="allow",
                embed=False,
                auto_log_cpu=False,  # its sampling thread would take time from a two-core machine
                auto_log_gpu=False,
            )
        except ValueError as error:  # a reserved project name
            raise RefusedError(str(error)) from None
        folder = os.environ["TRACKIO_DIR"]
        self.where = f"trackio in {folder} (TRACKIO_DIR='{folder}' trackio show --project '{request['project']}')"

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers at a step."""
        self._run.log(metrics, step=step)

    def log_table(self, name: str, columns: list[str], rows: Rows) -> None:
        """Log a table; it becomes a step of its own."""
        self._run.log({name: self._trackio.Table(columns=columns, data=rows)})

    def log_file(self, path: Path) -> None:
        """Keep the file as an artifact of the run, stored by its content."""
        self._run.log_artifact(path, name=path.stem, type="file")

    def finish(self) -> None:
        """Write out what is left."""
        self._run.finish()


class WandbBackend:
    """Weights & Biases; offline where there is no key or no network."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import wandb
        from wandb.errors import CommError, UsageError

        self._wandb: Any = wandb
        self.notes: list[str] = []
        mode = self._choose_mode(request)
        try:
            self._run = self._init(request, mode)
        except UsageError as error:
            raise RefusedError(str(error)) from None
        except CommError as error:  # no network, or a key that the server refuses
            reason = str(error).splitlines()[0]
            self.notes.append(f"W&B cannot be reached or refuses the key ({reason}); recording offline")
            mode = "offline"
            wandb.teardown()  # the service still holds the failed attempt under this run's id
            self._run = self._init(request, mode)
        if mode == "offline":
            self.where = f"wandb, offline, in {self._run.dir} (send it with: wandb sync {Path(self._run.dir).parent})"
        else:
            self.where = f"wandb at {self._run.url or self._run.dir}"

    def _choose_mode(self, request: Mapping[str, Any]) -> str | None:
        if request["anonymous"] in {"allow", "must"} and not request["key"]:
            self.notes.append("W&B has retired its anonymous mode; recording offline ('wandb sync' sends it later)")
            return "offline"
        if request["mode"] is not None:
            return str(request["mode"])
        if not os.environ.get("WANDB_MODE") and not request["key"]:
            self.notes.append("no W&B key was found; recording offline ('wandb login', then 'wandb sync' sends it)")
            return "offline"
        return os.environ.get("WANDB_MODE")

    def _init(self, request: Mapping[str, Any], mode: str | None) -> Any:
        settings = self._wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,  # the diff of whatever repository the user stands in is not ours to upload
            disable_code=True,
            init_timeout=WANDB_INIT_TIMEOUT_S,
            api_key=request["key"],
        )
        self._wandb.setup(settings)
        return self._wandb.init(
            project=request["project"],
            job_type=request["job_type"],
            name=request["run_name"],
            id=request["run_id"],
            resume="allow",
            config=request["config"],
            # wandb makes a folder "wandb" inside this one, so the parent is what puts it at RUN/wandb.
            dir=str(Path(request["folder"]).parent),
            mode=mode,
            settings=settings,
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers at a step."""
        self._run.log(metrics, step=step)

    def log_table(self, name: str, columns: list[str], rows: Rows) -> None:
        """Log a table; columns of mixed types are allowed, since a number may be missing in a row."""
        self._run.log({name: self._wandb.Table(columns=columns, data=rows, allow_mixed_types=True)})

    def log_file(self, path: Path) -> None:
        """Keep the file as an artifact, and show it among the charts where it is a page."""
        artifact = self._wandb.Artifact(path.stem, type="file")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)
        if path.suffix == ".html":
            self._run.log({path.stem: self._wandb.Html(str(path), inject=False)})

    def finish(self) -> None:
        """Upload, or write out, what is left."""
        self._run.finish()


class TensorBoardBackend:
    """TensorBoard event files; it has no tables and no files, so those become text."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.notes: list[str] = []
        self._writer = SummaryWriter(log_dir=request["folder"])
        self.where = f"tensorboard in {request['folder']} (tensorboard --logdir '{request['folder']}')"
        self._step = 0
        title = {key: request[key] for key in ("project", "job_type", "run_name")}
        text = json.dumps({**title, **request["config"]}, indent=2, ensure_ascii=False)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))
        hparams = dict(_flatten(request["config"]))
        if hparams:
            self._writer.add_hparams(hparams, {}, run_name=".")

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log numbers at a step."""
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_table(self, name: str, columns: list[str], rows: Rows) -> None:
        """Log a table as Markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), self._step)

    def log_file(self, path: Path) -> None:
        """Log where the file is."""
        self._writer.add_text(path.stem, f"{path.name}, {path.stat().st_size / 1000:.0f} kB: `{path}`", self._step)

    def finish(self) -> None:
        """Write out what is left."""
        self._writer.close()


BACKENDS: dict[str, type[Any]] = {"trackio": TrackioBackend, "wandb": WandbBackend, "tensorboard": TensorBoardBackend}


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _complain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    print(f"{COMPLAINT}{kind.__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def serve() -> None:
    """Answer the request on stdin, then carry out calls until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _complain
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print, from C too, goes to the log
    request = json.loads(sys.stdin.readline())
    try:
        backend: Backend = BACKENDS[request["tracker"]](request)
    except RefusedError as error:
        reply: dict[str, Any] = {"error": str(error)}
    else:
        reply = {"where": backend.where, "notes": backend.notes}
    replies.write(json.dumps(reply) + "\n")
    replies.close()
    if "error" in reply:
        return
    for line in sys.stdin:
        call = json.loads(line)
        operation = call.pop("op")
        if operation == "log":
            backend.log(call["metrics"], call["step"])
        elif operation == "log_table":
            backend.log_table(call["name"], call["columns"], call["rows"])
        elif operation == "log_file":
            backend.log_file(Path(call["path"]))
    backend.finish()


if __name__ == "__main__":
    serve()
