"""llama.cpp at work: K-quants made by it, and its own logits of a GGUF file, each in a process of its own.

llama.cpp answers a file that it cannot use with ``abort()``. That must not take an export down that has other kinds to
write and a verdict to record, and it should read as what it is: the file was refused. So this file is also a program:
``python -P llama_cpp.py`` does the job on its standard input with the ``llama_cpp`` package (llama-cpp-python), and
imports neither torch nor the rest of medcot. (``-P`` keeps this folder off the path, where the program's own name would
hide the package's.)

K-quants can also be made by a ``llama-quantize`` on the PATH, as llama.cpp's own releases bring it.

Sources: include/llama.h in https://github.com/ggml-org/llama.cpp; https://llama-cpp-python.readthedocs.io.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from medcot.errors import MissingExtraError, ModelError

PROGRAM = "llama-quantize"


def is_installed() -> bool:
    """Whether llama-cpp-python is installed, which also reads GGUF files back."""
    return importlib.util.find_spec("llama_cpp") is not None


def describe_reader() -> str:
    """Name the reader and its version."""
    return f"llama.cpp (llama-cpp-python {metadata.version('llama-cpp-python')})"


def check_can_quantise(quant: str) -> None:
    """Raise ``MissingExtraError`` where nothing here makes K-quants."""
    if not is_installed() and shutil.which(PROGRAM) is None:
        raise MissingExtraError(
            f"gguf:{quant} without llama.cpp",
            "K-quants are made by llama.cpp, whose rules choose a format for each tensor",
            f"Run \"pip install -c constraints.txt '.[llama]'\", put {PROGRAM} on the PATH, or export gguf:q8_0",
        )


def quantise(source: Path, target: Path, quant: str) -> None:
    """Make a K-quant of a GGUF file in F16 or F32.

    Raises:
        MissingExtraError: no llama.cpp is at hand.
        ModelError: llama.cpp refuses the file.
    """
    check_can_quantise(quant)
    if is_installed():
        _run({"job": "quantise", "source": str(source), "target": str(target), "quant": quant})
        return
    command = [str(shutil.which(PROGRAM)), str(source), str(target), quant.upper()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise _refused(source, done.returncode, done.stderr or done.stdout)


def read_logits(
    gguf: Path, rows: Sequence[Sequence[int]], firsts: Sequence[int], texts: Sequence[str]
) -> tuple[list[np.ndarray[Any, Any]], list[list[int]]]:
    """Return llama.cpp's logits of token rows, and the tokens that it makes of texts.

    Args:
        gguf: the file.
        rows: token ids.
        firsts: for each row the first position whose prediction is wanted; those up to the last but one come.
        texts: prompts as text, control tokens written out; BOS is put before them where the file says so.

    Returns:
        For each row an array (positions, vocabulary) in float32; for each text its token ids.

    Raises:
        ModelError: llama.cpp refuses the file.
    """
    with tempfile.TemporaryDirectory(prefix="medcot-llama-") as folder:
        out = Path(folder)
        job = {"job": "read", "source": str(gguf), "rows": [list(row) for row in rows], "firsts": list(firsts)}
        _run({**job, "texts": list(texts), "out": folder})
        logits = [np.load(out / f"{number}.npy") for number in range(len(rows))]
        return logits, json.loads((out / "tokens.json").read_text(encoding="utf-8"))


def _run(job: dict[str, Any]) -> None:
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode != 0:
        raise _refused(Path(job["source"]), done.returncode, done.stderr)


def _refused(source: Path, code: int, said: str) -> ModelError:
    lines = [line.strip() for line in said.splitlines() if "error" in line.lower() or "assert" in line.lower()]
    reason = (lines or [line.strip() for line in said.splitlines() if line.strip()] or ["it gave no reason"])[-1]
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return ModelError(
        f"llama.cpp cannot use '{source.name}' ({ended}): {reason}",
        "A GGUF file must open in llama.cpp",
        "Export it again; if it stays so, please report it with the model's name and the version of llama.cpp",
    )


# The program ----------------------------------------------------------------------------------------------------------


def _quantise(job: dict[str, Any]) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['quant'].upper()}")
    code = llama_cpp.llama_model_quantize(job["source"].encode(), job["target"].encode(), settings)
    if code != 0:
        raise SystemExit(f"error: llama_model_quantize returned {code}")


def _read(job: dict[str, Any]) -> None:
    from llama_cpp import Llama

    longest = max((len(row) for row in job["rows"]), default=1)
    model = Llama(job["source"], n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True, verbose=True)
    out = Path(job["out"])
    for number, (row, first) in enumerate(zip(job["rows"], job["firsts"], strict=True)):
        model.reset()
        model.eval(row)
        np.save(out / f"{number}.npy", model.scores[first : len(row) - 1].astype(np.float32))
    add_bos = model.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    tokens = [model.tokenize(text.encode(), add_bos=add_bos, special=True) for text in job["texts"]]
    (out / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    {"quantise": _quantise, "read": _read}[asked["job"]](asked)
