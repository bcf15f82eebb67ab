"""``medcot doctor``: what this machine is, what is missing, and which recipe suits it.

Most failures of a fine-tuning job are decided before it starts: a CPU build of PyTorch beside an idle GPU, a full disk,
a library two versions off. Each is cheap to see. ``examine`` looks at one area after the other, takes seconds (nearly
all of them imports), fetches nothing, and probes no network. Each area is its own small function that returns findings;
one that cannot be examined becomes a finding itself, so the doctor always answers. Where a secret was found is said,
what it is never.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from medcot.recipe import Precision, Recipe, list_recipes, load_recipe
from medcot.secrets import ENDPOINT_KEYS, SecretName, find_endpoint_key, find_secret, redact


class Status(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # worth knowing; nothing is broken
    PROBLEM = "problem"  # a run, or a part of it, will fail or be needlessly slow


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing seen, in one sentence."""

    area: str
    status: Status
    text: str


# The versions the tests ran with, the same as in constraints.txt; others in the range of pyproject.toml should work.
TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "trl": "1.15.0",
    "accelerate": "1.15.0",
    "datasets": "4.8.5",
    "bitsandbytes": "0.50.2",
    "huggingface_hub": "1.33.0",
}
LOW_DISK_GB, SMALL_DISK_GB = 2.0, 20.0  # the 16-bit weights of an 8B model are 16 GB
LOW_MEMORY_GB = 4.0

# GPU memory of a run in GB per billion parameters, and beside the weights. Rough on purpose, and high rather than low,
# since a recommendation that does not fit is worse than none; 'medcot run --dry-run' estimates one recipe closely.
GB_PER_BILLION = {Precision.NF4: 0.8, Precision.INT8: 1.3}
GB_PER_BILLION_16BIT, GB_BESIDES, USABLE_SHARE = 2.3, 3.5, 0.85


def examine() -> list[Finding]:
    """Return every finding, in the order a person would ask; never raises for what it finds."""
    findings = []
    for area, look in AREAS.items():
        try:
            findings.extend(look())
        except (OSError, RuntimeError, ImportError, ValueError) as error:
            reason = redact(f"{type(error).__name__}: {error}".splitlines()[0])
            findings.append(Finding(area, Status.PROBLEM, f"could not be examined ({reason})"))
    return findings


def _look_at_python() -> list[Finding]:
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("python", Status.OK, text)]
    return [Finding("python", Status.PROBLEM, f"{text}; medcot is tested on 3.11 to 3.13")]


def _look_at_torch() -> list[Finding]:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    text = f"PyTorch {torch.__version__} ({build}), {torch.get_num_threads()} threads"
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        remedy = "install the CUDA build as https://pytorch.org says"
        return [Finding("torch", Status.PROBLEM, f"{text}, but there is an NVIDIA driver: the GPU lies idle; {remedy}")]
    return [Finding("torch", Status.OK, text)]


def _look_at_devices() -> list[Finding]:
    import torch

    from medcot.precision import choose_device, choose_precision

    name, _, reason = choose_precision("auto", choose_device())
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"cuda:{index} {properties.name}, {total / 1e9:.0f} GB ({free / 1e9:.0f} free),"
            f" compute capability {properties.major}.{properties.minor}"
        )
        # A desktop holds a little; half of it gone means another job is there.
        busy = free < total / 2
        findings.append(
            Finding("gpu", Status.NOTE if busy else Status.OK, text + ("; another process uses it" if busy else ""))
        )
    if not findings:
        text = "no CUDA GPU; small models train on the CPU"
        if torch.backends.mps.is_available():
            text += " (Apple's GPU is not used)"
        findings.append(Finding("gpu", Status.NOTE, text))
    return [*findings, Finding("precision", Status.OK, (reason or name).removeprefix("precision "))]


def _look_at_cpu() -> list[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    text = (
        f"{os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}, {memory.total / 1e9:.0f} GB memory"
        f" ({memory.available / 1e9:.0f} available)"
    )
    if memory.available / 1e9 < LOW_MEMORY_GB:
        return [Finding("cpu", Status.NOTE, f"{text}; with less than {LOW_MEMORY_GB:.0f} GB a run may be stopped")]
    return [Finding("cpu", Status.OK, text)]


def _look_at_disk() -> list[Finding]:
    from huggingface_hub import constants

    findings = []
    for what, path in (("here", Path.cwd()), ("for the Hub's cache", Path(constants.HF_HUB_CACHE))):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        free_gb = shutil.disk_usage(existing).free / 1e9
        text = f"{free_gb:.0f} GB free {what} ({existing})"
        if free_gb < LOW_DISK_GB:
            findings.append(Finding("disk", Status.PROBLEM, f"{text}; a run may not be able to save its work"))
        elif free_gb < SMALL_DISK_GB:
            findings.append(Finding("disk", Status.NOTE, f"{text}; the weights of an 8B model are 16 GB"))
        else:
            findings.append(Finding("disk", Status.OK, text))
    return findings


def _look_at_libraries() -> list[Finding]:
    findings, tested = [], []
    for requirement, installed in _requirements():
        name = requirement.name.replace("-", "_")  # a wheel's metadata may spell huggingface_hub with a hyphen
        if installed is None:
            findings.append(
                Finding("libraries", Status.PROBLEM, f"{name} is not installed; pip install '{requirement}'")
            )
        elif not requirement.specifier.contains(installed, prereleases=True):
            text = f"{name} {installed} is outside {requirement.specifier}; pip install '{requirement}'"
            findings.append(Finding("libraries", Status.PROBLEM, text))
        elif name in TESTED and installed.partition("+")[0] != TESTED[name]:
            findings.append(Finding("libraries", Status.NOTE, f"{name} {installed}; tested with {TESTED[name]}"))
        elif name in TESTED:
            tested.append(f"{name} {installed}")
    if tested:
        findings.append(Finding("libraries", Status.OK, f"as tested: {', '.join(tested)}"))
    return findings


def _requirements() -> list[tuple[Requirement, str | None]]:
    """Return medcot's own requirements on this platform, each with the version installed or ``None``."""
    pairs = []
    for line in metadata.requires("medcot") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed: str | None = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = None
        pairs.append((requirement, installed))
    return pairs


def _look_at_bitsandbytes() -> list[Finding]:
    """Quantise one small matrix on the device that a run would use: an import alone proves nothing."""
    import torch

    from medcot.precision import choose_device

    device = choose_device()
    chatter = logging.getLogger("bitsandbytes")
    level = chatter.level
    chatter.setLevel(logging.ERROR)  # it advises about optional CPU kernels while it is imported
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = float((functional.dequantize_4bit(packed, state) - weight).abs().max())
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError) as failure:
        reason = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
        text = f"does not work here ({reason}); nf4, int8 and 8-bit AdamW need it, bf16, fp16 and fp32 do not"
        return [Finding("bitsandbytes", Status.NOTE, text)]
    finally:
        chatter.setLevel(level)
    # The widest gap between NF4's 16 levels is 0.30 (from -1.0 to -0.70), so rounding is off by 0.15 at most.
    if error > 0.2:
        return [Finding("bitsandbytes", Status.PROBLEM, f"NF4 on {device} is wrong by {error:.2f}, expected below 0.2")]
    return [Finding("bitsandbytes", Status.OK, f"{metadata.version('bitsandbytes')} packs NF4 on {device.type}")]


def _look_at_network() -> list[Finding]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return [Finding("network", Status.NOTE, "offline by HF_HUB_OFFLINE: only cached models and data are used")]
    endpoint = "" if constants.ENDPOINT == "https://huggingface.co" else f", at {redact(constants.ENDPOINT)}"
    return [Finding("network", Status.OK, f"the Hub is used when a recipe names it{endpoint} (not probed)")]


def _look_at_secrets() -> list[Finding]:
    findings = []
    uses = {
        SecretName.HUGGING_FACE: "needed only for gated models and for pushing",
        SecretName.WANDB: "metrics go to trackio on this disk",
    }
    for name, use in uses.items():
        secret = find_secret(name)
        text = f"{name}: {secret.where}" if secret is not None else f"{name}: none found; {use}"
        findings.append(Finding("secrets", Status.OK, text))
    hosts = {**{host: host for host in ENDPOINT_KEYS}, "": "any other server"}
    keys = {whose: find_endpoint_key(host) for host, whose in hosts.items()}
    found = [f"{secret.where}, for {whose}" for whose, secret in keys.items() if secret is not None]
    text = "; ".join(found) or "none found; needed only to evaluate a model behind somebody's API"
    return [*findings, Finding("secrets", Status.OK, f"{SecretName.ENDPOINT}: {text}")]


def _look_at_embedded_model() -> list[Finding]:
    from medcot.embedded import GGUF_BYTES, GGUF_NAME, default_cache_dir

    path = default_cache_dir() / GGUF_NAME
    if path.is_file() and path.stat().st_size == GGUF_BYTES:
        return [Finding("embedded model", Status.OK, f"cached in {path.parent}")]
    return [Finding("embedded model", Status.NOTE, "not cached yet; the first default run fetches 98 MB from PyPI")]


def _recommend() -> list[Finding]:
    import torch

    from medcot.engine.devices import has_fp8

    memory_gb = max(
        (torch.cuda.get_device_properties(index).total_memory / 1e9 for index in range(torch.cuda.device_count())),
        default=0.0,
    )
    recipes = {name: load_recipe(name) for name in list_recipes()}
    in_fp8 = any(has_fp8(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    return [Finding("recommendation", Status.OK, recommend(memory_gb, recipes, multiplies_fp8=in_fp8))]


def recommend(gpu_memory_gb: float, recipes: dict[str, Recipe], *, multiplies_fp8: bool = False) -> str:
    """Return which recipe suits a GPU of that size (0: no GPU), as a sentence with the command.

    The largest model that fits is named; among recipes of one size, the tutorial's own comes first. On a GPU that
    multiplies in 8 bit, the largest that fits in FP8 is named too: it needs the memory of 16 bit.
    """
    if gpu_memory_gb == 0:
        return "no GPU: 'medcot run' trains the embedded model on the CPU in minutes"
    fitting = []
    for name, recipe in recipes.items():
        billions = _size(recipe)
        needed_gb = _needed_gb(billions, recipe.model.precision)
        if billions > 0 and needed_gb <= USABLE_SHARE * gpu_memory_gb:
            fitting.append((billions, name.startswith("tutorial"), -len(name), name, needed_gb))
    if not fitting:
        return f"a GPU of {gpu_memory_gb:.0f} GB: 'medcot run' trains the embedded model on it"
    *_, name, needed_gb = max(fitting)
    advice = f"a GPU of {gpu_memory_gb:.0f} GB: 'medcot run {name}' fits (about {needed_gb:.0f} GB)"
    in_fp8 = [
        size for size in map(_size, recipes.values()) if _needed_gb(size, Precision.FP8) <= USABLE_SHARE * gpu_memory_gb
    ]
    if not multiplies_fp8 or not any(in_fp8):
        return advice
    return f"{advice}; models of up to {max(in_fp8):g} B train faster in model.precision=fp8 (8B: 1.4 times)"


def _size(recipe: Recipe) -> float:
    return _billions(recipe.model.source)


def _billions(source: str) -> float:
    """Return the billions of parameters that a model's name states, 0 where it states none."""
    stated = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z0-9])", source.rpartition("/")[2])
    return float(stated[-1]) if stated else 0.0


def _needed_gb(billions: float, precision: Precision) -> float:
    per_billion = GB_PER_BILLION.get(precision, GB_PER_BILLION_16BIT * (2 if precision is Precision.FP32 else 1))
    return per_billion * billions + GB_BESIDES


AREAS: dict[str, Callable[[], list[Finding]]] = {
    "python": _look_at_python,
    "torch": _look_at_torch,
    "gpu": _look_at_devices,
    "cpu": _look_at_cpu,
    "disk": _look_at_disk,
    "libraries": _look_at_libraries,
    "bitsandbytes": _look_at_bitsandbytes,
    "network": _look_at_network,
    "secrets": _look_at_secrets,
    "embedded model": _look_at_embedded_model,
    "recommendation": _recommend,
}
