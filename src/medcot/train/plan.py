"""The settings of a training run, every number final, and how they follow from a recipe's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from medcot.engine.memory import FASTEST, SMALLEST, Memory

NUM_VALIDATIONS = 10


@dataclass(frozen=True)
class Plan:
    """The optimizer's settings, resolved: every number is final."""

    num_steps: int
    batch_size: int  # sequences a step, over all processes
    micro_batch_size: int  # sequences a forward, in one process
    warmup_steps: int
    learning_rate: float = 2e-4
    schedule: str = "linear"
    optimizer: str = "adamw_torch_fused"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    logging_steps: int = 10
    validate_steps: int | None = None  # steps from one validation to the next; None: only at the start and the end
    forward_tokens: int | None = None  # of the largest forward that memory was planned for; None: not known
    save_steps: int | None = None
    keep_checkpoints: int = 2
    memory: Memory = FASTEST
    small: Memory = SMALLEST  # what a row that is too long for ``memory`` falls back on
    seed: int = 3407


def count_steps(num_rows: int, batch_size: int, *, max_steps: int | None, epochs: float | None) -> int:
    """Optimizer steps of a run: ``max_steps`` if given, else as many as the epochs need (one if neither is given)."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil((epochs or 1) * math.ceil(num_rows / batch_size)))


def choose_validate_steps(num_steps: int, logging_steps: int) -> int:
    """Steps from one validation to the next, so that a run has about ten, each together with a logging step."""
    return logging_steps * max(1, round(num_steps / NUM_VALIDATIONS / logging_steps))


def count_warmup(warmup: float, num_steps: int) -> int:
    """Warm-up steps: a number of steps, or below 1 a share of all; the last step is never one of them.

    The first step of a warm-up has a learning rate of 0, so a run of warm-up alone could learn nothing.
    """
    return min(math.ceil(warmup * num_steps) if warmup < 1 else int(warmup), num_steps - 1)


def choose_optimizer(name: str, device: torch.device) -> str:
    """Resolve ``auto``: 8-bit AdamW where bitsandbytes runs it (CUDA), torch's fused AdamW elsewhere."""
    if name == "auto":
        name = "adamw_8bit" if device.type == "cuda" else "adamw_torch"
    return "adamw_torch_fused" if name == "adamw_torch" else name
