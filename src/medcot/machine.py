"""What a run was made on and with: the ``machine`` and ``versions`` of run.json."""

from __future__ import annotations

import contextlib
import platform
import sys
from importlib import metadata
from pathlib import Path

LIBRARIES = ("medcot", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets")


def describe_machine() -> str:
    """Return the machine in one line: GPU if there is one, processor, cores, memory, system."""
    import psutil
    import torch

    parts = []
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        parts.append(f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    memory_gb = psutil.virtual_memory().total / 2**30
    parts.append(f"{_processor()}, {psutil.cpu_count() or 1} cores, {memory_gb:.0f} GiB")
    parts.append(platform.system())
    return "; ".join(parts)


def list_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries a result depends on; absent ones are left out."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
