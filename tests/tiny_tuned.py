"""Tiny tuned runs of every family that GGUF is written for, each made once by the whole job."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import AutoTokenizer

from medcot import exporting
from tiny_models import build_base
from tiny_runs import make_rows, run_job, write_rows

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "num_key_value_heads": 2, "num_attention_heads": 4},
    "llama tied": {"tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 2, "vocab_size": 288},  # bitsandbytes' kernel for the CPU wants 32 rows a matrix
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "mistral": {"sliding_window": None, "num_attention_heads": 4, "head_dim": 32},
}
ROOM = {"num_prompts": 6, "num_tokens": 16}  # of a proof


def make_base(folder: Path, tokenizer: Path, name: str, *, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A base in several shards, with the tokenizer of another."""
    settings = {"vocab_size": 262, "bos_token_id": 0, "eos_token_id": 1, "intermediate_size": 128} | SIZES[name] | sizes
    build_base(name.split()[0], dtype, **settings).save_pretrained(folder, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def make_run(root: Path, base: Path, *overrides: str) -> Path:
    """The folder of a finished run, trained until its predictions have clear favourites, as a real one's have."""
    rows = write_rows(root / "rows.jsonl", make_rows())
    values = {
        "model": {"source": str(base), "precision": "fp32", "max_seq_length": 512},
        "prompt": "short",
        "data": str(rows),
        "lora": {"r": 8, "alpha": 16},
        "train": {"batch_size": 4, "max_steps": 30, "warmup": 2, "learning_rate": 0.02, "logging_steps": 10},
        "ask": {"max_new_tokens": 4},
        "evaluate": {"source": None},
        "tracking": "none",
    }
    recipe = root / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(values))
    run_job(recipe, root / "tuned-1", *overrides)
    return root / "tuned-1"


def export(run: Path, *kinds: str, **settings: Any) -> tuple[dict[str, Any], str]:
    """Export and return what came back and what was printed."""
    stream = io.StringIO()
    try:
        return exporting.export(
            run, kinds, console=Console(file=stream, width=250), **ROOM | settings
        ), stream.getvalue()
    finally:
        print(stream.getvalue())


def verify(path: Path, run: Path) -> Any:
    """Verify silently."""
    return exporting.verify(path, run, console=Console(file=io.StringIO()), **ROOM)
