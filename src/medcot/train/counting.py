"""What is counted while training, and what a logging step reports of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Metrics:
    """What one logging step reports; token rates are over the time since the last one."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    trained_tokens_per_s: float
    memory_gb: float
    tokens: int  # since the start of the run
    trained_tokens: int
    elapsed_s: float


@dataclass
class Counter:
    """Tokens that went through the model, counted where a batch is taken."""

    tokens: int = 0
    trained_tokens: int = 0
    history: list[Metrics] = field(default_factory=list)
