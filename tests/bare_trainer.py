"""A bare TRL ``SFTTrainer``, as a user of the engine would build it: nothing of medcot's trainer in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medcot.engine import engine_of
from medcot.engine.memory import Keep

NUM_STEPS = 3
# Settings of the trainer, and what the engine is to keep under them. TRL checkpoints gradients unless told otherwise.
SETTINGS: dict[str, tuple[dict[str, Any], Keep]] = {
    "as it comes": ({}, Keep.INPUT),
    "nothing recomputed": ({"gradient_checkpointing": False}, Keep.ALL),
    "padding-free": ({"gradient_checkpointing": False, "padding_free": True, "max_length": None}, Keep.ALL),
    "packed": ({"packing": True, "max_length": 96}, Keep.INPUT),
    "noise": ({"neftune_noise_alpha": 5.0}, Keep.INPUT),
}


def train_bare(model: Any, folder: Path, out: Path, **settings: Any) -> list[float]:
    """Three steps of 2x2 rows; the losses."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from medcot.quiet import quiet_libraries

    rows = [
        {"prompt": f"What is {i} and {i}?", "completion": f" It is {i + i}{' exactly' * (i % 3)}."} for i in range(12)
    ]
    config = SFTConfig(
        output_dir=str(out),
        max_steps=NUM_STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **settings,
    )
    with quiet_libraries():
        trainer = SFTTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def count(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Keep]:
    """What each call of the fast layers keeps, as they come."""
    engine = engine_of(model)
    assert engine is not None
    kept: list[Keep] = []
    run = engine.hidden_states

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        kept.append(kwargs["memory"].keep)
        return run(*args, **kwargs)

    monkeypatch.setattr(engine, "hidden_states", counted)
    return kept


class PlainLogProbs:
    """TRL's per-token log-probabilities in plain torch: its own are a Triton kernel, which a CPU cannot run."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: None, targets: Tensor, temperature: float, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        assert bias is None and temperature == 1 and rest[1:] == (None, 1.0, ("log_probs", "entropy", "is_top1"))
        log_p = F.log_softmax((hidden @ weight.T).float(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        top1: Tensor = log_p.argmax(-1) == targets
        return log_p.gather(-1, targets[:, None])[:, 0], entropy, None, None, top1


def build_on(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The tiny model of the fixtures, with an adapter."""
    from transformers import AutoModelForCausalLM

    from tiny_models import attach

    return attach(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False).to(device))
