"""The seconds between the command and the first weight: libraries, CUDA and the disk at the same time.

Importing transformers, PEFT, TRL and what they import in turn takes 5 to 10 s of one processor, whatever of them is
used; all of it is needed before the first step, so nothing is gained by importing later. But three other things can go
on meanwhile, since none of them computes in Python: a tracker's child process starts, the GPU makes its context, and
the disk reads ahead what will be loaded. So ``Startup`` imports in a thread, and ``wait`` waits for it. The garbage
collector rests meanwhile: it would look through a million new objects again and again and find every one in use, for a
quarter of the time (9.6 s with it, 7.1 s without, of one core of an AMD EPYC).

The main thread imports nothing heavy until ``wait`` has returned: two threads that import the same libraries from
different ends may meet in a module that is half there.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path


class Startup:
    """The imports of a job, under way from the moment this is made.

    Args:
        source: the base model; the files of a local folder are read ahead.
    """

    def __init__(self, source: str) -> None:
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="medcot-startup")
        device_index = 0
        if "torch" in sys.modules:  # else nobody has chosen a GPU yet
            import torch

            device_index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        self._pool.submit(_read_ahead, Path(source).expanduser())
        self._imported: Future[None] = self._pool.submit(self._import, device_index)

    def wait(self) -> None:
        """Return when everything is imported; raises what an import raised."""
        self._imported.result()
        self._pool.shutdown(wait=False)

    def _import(self, device_index: int) -> None:
        with _resting_collector():
            import torch
        if torch.cuda.is_available():
            self._pool.submit(_make_context, device_index)
        with _resting_collector():
            from medcot import asking, planning, proof
            from medcot.export import adapter, merged
        del adapter, asking, merged, planning, proof


@contextmanager
def _resting_collector() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _make_context(device_index: int) -> None:
    """Make the GPU's context, which the first tensor on it would else wait for."""
    import torch

    torch.zeros(1, device=torch.device("cuda", device_index))


def _read_ahead(folder: Path) -> None:
    """Ask the system to read a model folder's weights into its cache; advice, which costs nothing if they are there."""
    if sys.platform != "linux" or not folder.is_dir():
        return
    for path in sorted(folder.glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
