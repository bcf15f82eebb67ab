"""vLLM behind the same door, where it is installed: it batches by itself, so there are no lanes here.

Its ``AsyncLLM`` runs on an event loop of its own thread. A job becomes a request of ids, and what comes back is ids
again: the prompt style, the split of thinking from answer, the budget and the stop strings stay ours (``rows.py``), so
a client cannot tell which engine answered. At a budget's end the request is aborted, the thinking closed with the ids
of training, and the row asked for again; vLLM's prefix cache makes that cheap.

The module is handed in rather than imported, as in ``evaluate/vllm_writer.py``. It was never run here: the tests hand
in a stand-in with vLLM's names.

Sources: vllm.v1.engine.async_llm.AsyncLLM, vllm.SamplingParams, vllm.sampling_params.RequestOutputKind.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medcot.serve.jobs import Ending, Job
from medcot.serve.rows import Row
from medcot.serve.scheduler import Draining, MakeRow, OnEnd, Overloaded

SEED_MASK = 2**63 - 1
_log = logging.getLogger("medcot.serve")


class VllmScheduler:
    """A ``Scheduler`` that leaves the writing to vLLM.

    Args:
        vllm: its module, with ``v1.engine.async_llm``, ``lora.request`` and ``sampling_params`` loaded.
        model: Hub id or folder.
        adapters: the folder of each model's adapter, ``None`` for the plain base.
        make_row: makes a row of a job.
        most_running: jobs handed to vLLM at once.
        most_waiting: jobs beyond these that may wait.
        on_end: called with each row when it has ended.
        settings: further ones of vLLM's engine.
    """

    def __init__(
        self,
        vllm: Any,
        model: str,
        adapters: Mapping[str, Path | None],
        make_row: MakeRow,
        *,
        most_running: int,
        most_waiting: int,
        on_end: OnEnd = lambda _: None,
        **settings: Any,
    ) -> None:
        self._vllm, self._model, self._settings = vllm, model, settings
        lora = vllm.lora.request.LoRARequest
        self._loras = {
            name: None if folder is None else lora(name, number, str(folder))
            for number, (name, folder) in enumerate(adapters.items(), 1)
        }
        self._make_row, self._on_end = make_row, on_end
        self.num_slots, self._most_waiting = most_running, most_waiting
        self._jobs: dict[str, Job] = {}
        self._running: set[str] = set()
        self._lock = threading.Lock()
        self._draining = False
        self._started = threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="medcot-vllm", daemon=True)

    def start(self) -> None:
        """Load the model.

        Raises:
            Exception: whatever vLLM raises.
        """
        self._thread.start()
        self._started.wait()
        if self._failed is not None:
            raise self._failed

    @property
    def num_waiting(self) -> int:
        """Jobs without a slot."""
        return max(0, len(self._jobs) - len(self._running))

    @property
    def num_running(self) -> int:
        """Jobs with one."""
        return len(self._running)

    @property
    def is_alive(self) -> bool:
        """Whether jobs that were taken are being written."""
        return self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        """Whether no more jobs are taken."""
        return self._draining

    def submit(self, job: Job) -> None:
        """Take a job; what becomes of it is told by ``job.tell``.

        Raises:
            Overloaded: too many wait.
            Draining: it is stopping.
        """
        with self._lock:
            if self._draining:
                raise Draining
            if len(self._jobs) >= self.num_slots + self._most_waiting:
                raise Overloaded
            key = uuid.uuid4().hex
            self._jobs[key] = job
        asyncio.run_coroutine_threadsafe(self._write(key, job), self._loop)

    def drain(self) -> None:
        """Take no more jobs; those that were taken are written to their ends."""
        with self._lock:
            self._draining = True

    def cancel_all(self) -> None:
        """End everything at its next token."""
        for job in list(self._jobs.values()):
            job.cancelled.set()

    def join(self, seconds: float) -> bool:
        """Wait for the end after ``drain``; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(self.num_slots)
        try:
            arguments = self._vllm.AsyncEngineArgs(model=self._model, **self._settings)
            self._engine = self._vllm.v1.engine.async_llm.AsyncLLM.from_engine_args(arguments)
        except Exception as error:
            self._failed = error
            return
        finally:
            self._started.set()
        while not (self._draining and not self._jobs):
            await asyncio.sleep(0.1)
        self._engine.shutdown()

    async def _write(self, key: str, job: Job) -> None:
        row = self._make_row(job)
        try:
            async with self._slots:
                self._running.add(key)
                while not row.ended:
                    if row.must_close:
                        row.close()
                    else:
                        await self._go_on(f"{key}-{len(row.written)}", row)
        except Exception:
            _log.exception("writing for '%s' failed", job.model)
            row.end(Ending.ERROR)
        finally:
            self._running.discard(key)
            del self._jobs[key]
            self._on_end(row)

    async def _go_on(self, key: str, row: Row) -> None:
        """Write until the row ends, or its thinking must be closed."""
        job = row.job
        output: Any = None
        async for output in self._engine.generate(
            {"prompt_token_ids": row.ids}, self._params(row), key, lora_request=self._loras[job.model]
        ):
            if job.cancelled.is_set():
                row.end(Ending.CANCELLED)
            elif job.is_late:
                row.end(Ending.LENGTH, timed_out=True)
            for token in output.outputs[0].token_ids:
                if not (row.ended or row.must_close):
                    row.take(token)
            if row.ended or row.must_close:
                await self._engine.abort(key)
                return
        stopped = (
            output is not None and output.outputs[0].finish_reason == "stop"
        )  # a token that only vLLM knows ends it
        row.end(Ending.STOP if stopped else Ending.LENGTH)

    def _params(self, row: Row) -> Any:
        job = row.job
        return self._vllm.SamplingParams(
            temperature=job.sampling.temperature,
            top_p=job.sampling.top_p,
            max_tokens=job.max_tokens - len(row.written),
            seed=(job.seed + len(row.written)) & SEED_MASK,  # as in PlainLane: each go has draws of its own
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )
