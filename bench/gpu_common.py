"""What the GPU benches share: waiting for the device, the process's age, and one line of JSON a figure.

A line has ``figure`` (the row of the table it speaks for), ``system``, ``value`` (``null`` where there is none, with
``error`` saying why) and ``unit``; then the settings; then versions, machine and date. ``gpu_table.py`` reads them.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from medcot.machine import describe_machine, list_versions

GIB = 2**30


def synchronise(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_since_start() -> float:
    """Seconds since this process was started, the interpreter's own start and all imports included.

    Linux counts a process's start in ticks since the machine's boot: proc(5), field 22 of /proc/self/stat.
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def provenance() -> dict[str, Any]:
    """Machine, versions and date: without them a figure is a rumour."""
    versions = list_versions()
    for name in ("triton", "liger-kernel"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # as list_versions: what is absent is left out
    return {
        "versions": versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        "machine": describe_machine(),
        "date": datetime.date.today().isoformat(),
    }


def write_line(line: dict[str, Any], path: Path | None) -> None:
    """Append a figure to the file, with its provenance."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | provenance(), ensure_ascii=False) + "\n")


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is, or was raised because of, the device running out of memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
