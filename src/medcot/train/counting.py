"""What is counted while training, and what a logging step reports of it."""

from __future__ import annotations

import time
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


@dataclass(frozen=True)
class Validated:
    """What one validation reports; its time is no part of the training's."""

    step: int
    validation_loss: float  # mean over the trained tokens of the held-out rows
    validation_s: float


@dataclass
class Counter:
    """What went through the model, counted where a batch is taken; ``tokens`` are the training's alone."""

    tokens: int = 0
    trained_tokens: int = 0
    history: list[Metrics] = field(default_factory=list)
    validations: list[Validated] = field(default_factory=list)

    @property
    def validation_s(self) -> float:
        """Seconds spent on validation so far."""
        return sum(validated.validation_s for validated in self.validations)

    def clock_s(self) -> float:
        """A clock that stands still during validation; only differences mean something."""
        return time.monotonic() - self.validation_s
