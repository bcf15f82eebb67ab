"""Supervised fine-tuning: TRL's trainer, with our batches, our loss and checkpoints that are whole or absent.

What differs from a bare ``SFTTrainer``:

- Batches are rows end to end without padding (``data/packing.py``).
- The loss of a step is the summed cross-entropy of its trained tokens over their number, counted over the *whole* step.
  However a step is split into forwards (2×4, 4×2, 8×1), the gradient is the same. Averaging each forward's mean, as
  gradient accumulation is often done, weights short rows more.
- An accelerated model runs the engine's forward; any other runs its own, on the same batches.
- Adapter weights stay in float32. TRL casts them to bf16 on a quantised base, where an update smaller than 1/256 of a
  weight is lost.
- Several processes (``ranks.py``) share the rows of each step and add up their gradients once, after the last forward
  of the step. DistributedDataParallel would hook into the model's own forward, which the engine does not run, and
  would average where a step's loss is a sum over its tokens; and the processes may split their rows as they like.
- Held-out rows are measured by the same forward, summed over their tokens, without a trace in what is trained
  (``validation.py``).
- A checkpoint is written beside its place and renamed when complete, so that a kill at any moment leaves only whole
  ones, and a run that resumes from one ends with the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from medcot import ranks
from medcot.data.packing import build_dataset, collate
from medcot.engine import engine_of
from medcot.engine.memory import Keep
from medcot.errors import MedcotError
from medcot.quiet import quiet_libraries
from medcot.records import Row
from medcot.train.counting import Counter, Metrics, Validated
from medcot.train.plan import Plan, choose_optimizer, choose_validate_steps, count_steps, count_warmup
from medcot.train.trainer import STAGING, ReasoningTrainer, list_checkpoints, step_of
from medcot.train.validation import Validation, ValidationSteps

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "STAGING",
    "DivergedError",
    "Metrics",
    "Plan",
    "ReasoningTrainer",
    "TrainResult",
    "Validated",
    "choose_optimizer",
    "choose_validate_steps",
    "count_steps",
    "count_warmup",
    "list_checkpoints",
    "peak_memory_gb",
    "process_peak_gb",
    "train",
]


class DivergedError(MedcotError, ArithmeticError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class TrainResult:
    """What training came to; ``seconds`` counts this process's steps only, and no validation."""

    steps: int
    loss_first: float
    loss_last: float
    seconds: float
    tokens_per_s: float
    trained_tokens_per_s: float
    peak_memory_gb: float
    validation_loss_first: float | None = None  # None: nothing was held out
    validation_loss_last: float | None = None
    validation_s: float = 0.0


class _Reporter(TrainerCallback):
    """Turns the trainer's logs into ``Metrics``."""

    def __init__(self, counter: Counter, device: torch.device, on_step: Callable[[int, Metrics | None], None]) -> None:
        self._counter, self._device, self._on_step = counter, device, on_step
        self._started_s = self._last_s = counter.clock_s()
        self._last_tokens = self._last_trained = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock at the first step, not when the trainer is built."""
        self._started_s = self._last_s = self._counter.clock_s()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar; the last step is always a logging step, so that the last loss is the run's."""
        self._on_step(state.global_step, None)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Report a logging step; the trainer's closing summary has no loss and is not one."""
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise DivergedError(
                f"the loss is {logs['loss']} at step {state.global_step}",
                "Training goes on only while the loss is a finite number",
                "Start a new run with a lower train.learning_rate or a longer train.warmup",
            )
        counter = self._counter
        now_s = counter.clock_s()
        passed_s = max(now_s - self._last_s, 1e-9)
        tokens, trained_tokens = ranks.add_up([counter.tokens, counter.trained_tokens])
        metrics = Metrics(
            step=state.global_step,
            epoch=round(float(state.epoch or 0), 4),
            loss=float(logs["loss"]),
            learning_rate=float(logs["learning_rate"]),
            grad_norm=float(logs["grad_norm"]),
            tokens_per_s=(tokens - self._last_tokens) / passed_s,
            trained_tokens_per_s=(trained_tokens - self._last_trained) / passed_s,
            memory_gb=peak_memory_gb(self._device),
            tokens=tokens,
            trained_tokens=trained_tokens,
            elapsed_s=now_s - self._started_s,
        )
        self._last_s, self._last_tokens, self._last_trained = now_s, tokens, trained_tokens
        counter.history.append(metrics)
        self._on_step(state.global_step, metrics)


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    plan: Plan,
    folder: Path,
    *,
    validation: Sequence[Row] = (),
    resume_from: Path | None = None,
    on_step: Callable[[int, Metrics | None], None] = lambda step, metrics: None,
    on_validation: Callable[[Validated], None] = lambda validated: None,
    announce: Callable[[str], None] = warnings.warn,
) -> TrainResult:
    """Run the optimizer steps of a plan.

    Args:
        model: the PEFT model, accelerated or not; trained in place.
        tokenizer: saved with each checkpoint.
        rows: the training rows; their order is shuffled by the plan's seed.
        plan: every setting, resolved.
        folder: where checkpoints go.
        validation: rows that are not trained on, whose loss is computed before the first step, every
            ``plan.validate_steps`` and after the last; what is trained is the same with and without them.
        resume_from: a checkpoint of the same plan to go on from.
        on_step: called after each step, with metrics at logging steps.
        on_validation: called with each loss of the validation rows.
        announce: told when memory runs out and the rest of the run takes less of it at a time.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    device, engine = model.device, engine_of(model)
    on_host = plan.memory.keep is Keep.HOST and engine is not None
    counter = Counter()
    started_s = counter.clock_s()
    with quiet_libraries(), contextlib.ExitStack() as training:
        if engine is not None:
            training.enter_context(engine.table_on_host() if on_host else contextlib.nullcontext())
            training.callback(engine.give_back)  # first, so that there is room for the table
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what was asked before is not training's memory
        if resume_from is not None and step_of(resume_from) >= plan.num_steps:
            _load_adapter(model, resume_from)  # the trainer would take one step too many before it looks at the number
        else:
            trainer = _build_trainer(model, tokenizer, rows, plan, counter, folder, announce, device)
            training.callback(trainer.forget)  # before the table comes back, which needs the room
            trainer.add_callback(_Reporter(counter, device, on_step))
            if validation:
                _watch(trainer, validation, plan, on_validation, from_start=resume_from is None)
            started_s = counter.clock_s()
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    seconds = counter.clock_s() - started_s
    history, validations = counter.history, counter.validations
    tokens, trained_tokens = ranks.add_up([counter.tokens, counter.trained_tokens])
    return TrainResult(
        steps=plan.num_steps,
        loss_first=history[0].loss if history else math.nan,
        loss_last=history[-1].loss if history else math.nan,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        trained_tokens_per_s=trained_tokens / seconds,
        peak_memory_gb=peak_memory_gb(device),
        validation_loss_first=validations[0].validation_loss if validations else None,
        validation_loss_last=validations[-1].validation_loss if validations else None,
        validation_s=counter.validation_s,
    )


def _load_adapter(model: PeftModel, checkpoint: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))


def _build_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    plan: Plan,
    counter: Counter,
    folder: Path,
    announce: Callable[[str], None],
    device: torch.device,
) -> ReasoningTrainer:
    fast = engine_of(model) is not None
    dtype = model.get_base_model().dtype
    on_cuda = device.type == "cuda"
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.batch_size // (plan.micro_batch_size * ranks.current().size),
        max_steps=plan.num_steps,
        warmup_steps=plan.warmup_steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=plan.schedule,
        optim=plan.optimizer,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        logging_steps=plan.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN is to be seen, not averaged away
        save_strategy="steps" if plan.save_steps else "no",
        save_steps=plan.save_steps or 1,
        seed=plan.seed,
        use_cpu=not on_cuda,
        # The engine computes in the model's own dtype; the plain path needs autocast between float32 adapters and a
        # 16-bit base. float16 needs the trainer's loss scaling either way.
        bf16=on_cuda and not fast and dtype == torch.bfloat16,
        fp16=on_cuda and dtype == torch.float16,
        gradient_checkpointing=plan.memory.keep.recomputes and not fast,
        gradient_checkpointing_kwargs={"use_reentrant": False} if plan.memory.keep.recomputes and not fast else None,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        remove_unused_columns=False,
        dataloader_pin_memory=on_cuda,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    assert config.device.type == device.type  # reading it settles the devices, so that the next line stays
    config._n_gpu = 1  # one process, one GPU: transformers would multiply the batch by the GPUs it sees
    masters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = ReasoningTrainer(
        model=model,
        args=config,
        data_collator=collate,
        train_dataset=build_dataset(rows),
        processing_class=tokenizer,
        plan=plan,
        counter=counter,
        announce=announce,
    )
    for name, parameter in model.named_parameters():
        if name in masters:
            parameter.data = masters[name]  # undo TRL's cast of adapters on a quantised base
    ranks.copy_from_first([parameter for parameter in model.parameters() if parameter.requires_grad])
    trainer.remove_callback(PrinterCallback)  # the console is the caller's
    return trainer


def _watch(
    trainer: ReasoningTrainer,
    rows: Sequence[Row],
    plan: Plan,
    on_validation: Callable[[Validated], None],
    *,
    from_start: bool,
) -> None:
    """Have the trainer compute the rows' loss as it goes; a run that goes on from a checkpoint has its first."""
    max_tokens = plan.forward_tokens or plan.micro_batch_size * max(row.num_tokens for row in rows)
    trainer.watch(Validation(rows, max_tokens), on_validation)
    trainer.add_callback(ValidationSteps(plan.validate_steps))
    trainer.args.eval_on_start = from_start


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far, GiB: allocated by torch on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return process_peak_gb()


def process_peak_gb() -> float:
    """Peak resident memory of this process, GiB."""
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
