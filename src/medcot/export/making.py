"""An artefact of any kind made in an empty folder, and any artefact proven: one function each, for every kind."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medcot.errors import MedcotError, UnequalError
from medcot.export import equality, llama_cpp
from medcot.export.gguf import WRITTEN, write_gguf
from medcot.export.kinds import quant_of
from medcot.export.merged import Base, merge, open_merged
from medcot.export.nf4 import save_nf4
from medcot.export.ollama import FEWEST_CONTEXT, build_modelfile, read_template
from medcot.export.turns import Turns, build_go, build_jinja
from medcot.quiet import quiet_libraries

if TYPE_CHECKING:
    from medcot.model import LoadedModel


@dataclass(frozen=True, slots=True)
class Tuned:
    """A tuned model as the makers of artefacts need it, with no weights in memory.

    Attributes:
        name: for files, without spaces.
        title: one line.
        adapter: the run's.
        base: what is merged into.
        base_files: the base as training read it, a folder or a GGUF file.
        base_name: by which plain libraries find it.
        held: how training held it; its ``model`` is a shell without weights.
        turns: the prompt style, for templates.
        stops: texts of the tokens that end an answer.
        temperature: of the sampling.
        top_p: of the sampling.
        max_tokens: of the rows it was trained on.
        reference: its greedy answers and predictions.
    """

    name: str
    title: str
    adapter: Path
    base: Base
    base_files: Path
    base_name: str
    held: LoadedModel
    turns: Turns
    stops: tuple[str, ...]
    temperature: float
    top_p: float
    max_tokens: int
    reference: equality.Reference

    @property
    def context(self) -> int:
        """Longest context to serve, in tokens: what it was trained for, and room to think."""
        longest = getattr(self.held.model.config, "max_position_embeddings", FEWEST_CONTEXT)
        return min(longest, max(self.max_tokens, FEWEST_CONTEXT))


def make(tuned: Tuned, kind: str, work: Path) -> str:
    """Write an artefact's files to an empty folder; return which weights the adapter was merged into.

    Raises:
        ModelError: a kind that this model cannot be made into.
        OutputError: the disk is full.
        MissingExtraError: a library that the kind needs is absent.
    """
    device = str(tuned.held.device)
    if kind == "adapter":
        shutil.copytree(tuned.adapter, work, dirs_exist_ok=True)
        words = f"for {tuned.base_name}"
    elif kind == "merged-4bit":
        words = save_nf4(tuned.base, tuned.adapter, work, device=device).base
    elif kind.startswith("merged"):
        dtype = torch.float32 if kind == "merged-32bit" else tuned.base.dtype
        words = merge(tuned.base, tuned.adapter, work, dtype=dtype, device=device).base
    else:
        words = _make_gguf(tuned, quant_of(kind), work)
        if kind.startswith("ollama"):
            _write_modelfile(tuned, work)
    let_go()
    return words


def _make_gguf(tuned: Tuned, quant: str, work: Path) -> str:
    path = work / f"{tuned.name}-{quant}.gguf"
    tensors = open_merged(tuned.base, tuned.adapter, device=str(tuned.held.device))
    written = quant in WRITTEN
    first = path if written else work / "first.gguf"
    write_gguf(
        tensors,
        tuned.base.tokenizer,
        first,
        quant=quant if written else "f16",
        name=tuned.title,
        add_bos=tuned.turns.added,
        chat_template=build_jinja(tuned.turns),
    )
    if written:
        return f"{tensors.base}, and written in {quant}"
    llama_cpp.quantise(first, path, quant)
    first.unlink()
    return f"{tensors.base}, written in f16 and made {quant} by llama.cpp"


def _write_modelfile(tuned: Tuned, work: Path) -> None:
    text = build_modelfile(
        next(work.glob("*.gguf")).name,
        tuned.turns,
        temperature=tuned.temperature,
        top_p=tuned.top_p,
        context=tuned.context,
        stops=tuned.stops,
        title=tuned.title,
    )
    (work / "Modelfile").write_text(text, encoding="utf-8")


def prove(tuned: Tuned, kind: str, files: Path, name: str | None = None) -> equality.Proof:
    """Read an artefact back and compare it with the tuned model.

    Args:
        tuned: the tuned model.
        kind: what the artefact is.
        files: its folder.
        name: of the GGUF file in it; ``None`` for the only one.

    Raises:
        UnequalError: it does not even open.
    """
    try:
        logits, reader, faults = _read(tuned, kind, files, name)
    except MedcotError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, AttributeError, AssertionError) as error:
        raise UnequalError(
            f"'{files}' does not open: {type(error).__name__}: {error}",
            "An artefact opens in the library that will use it",
            "Export it again, or copy it whole",
        ) from error
    proof = equality.compare(tuned.reference, logits, kind, reader, faults)
    let_go()
    return proof


def _read(tuned: Tuned, kind: str, files: Path, name: str | None) -> tuple[list[torch.Tensor], str, list[str]]:
    reference = tuned.reference
    if kind == "adapter":
        logits, reader = equality.read_adapter(files, tuned.base_files, reference, tuned.held)
        return logits, reader, equality.check_tokens(_open_tokenizer(files), reference)
    if kind.startswith("merged"):
        logits, reader = equality.read_merged(files, reference, tuned.held.device)
        return logits, reader, equality.check_tokens(_open_tokenizer(files), reference)
    path = files / name if name is not None else next(files.glob("*.gguf"))
    logits, reader, faults = equality.read_gguf(path, reference, tuned.held.model.config)
    if kind.startswith("ollama") and name is None and read_template(files / "Modelfile") != build_go(tuned.turns):
        faults.append("the Modelfile's TEMPLATE is not the run's prompt style")
    return logits, reader, faults


def _open_tokenizer(files: Path) -> Any:
    from transformers import AutoTokenizer

    with quiet_libraries():
        return AutoTokenizer.from_pretrained(files)


def let_go() -> None:
    """Give back the memory of models that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
