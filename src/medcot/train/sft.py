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
- A checkpoint is written beside its place and renamed when complete, so that a kill at any moment leaves only whole
  ones, and a run that resumes from one ends with the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from medcot import ranks
from medcot.data.packing import build_dataset, collate
from medcot.engine import engine_of
from medcot.engine.memory import FASTEST, SMALLEST, Keep, Memory
from medcot.errors import MedcotError
from medcot.quiet import quiet_libraries
from medcot.records import Row
from medcot.train.optimizer import FlatAdamW8bit
from medcot.train.shares import ShareLoader, StepShares
from medcot.train.splitting import Budget

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

STAGING = ".writing"  # a checkpoint is put together under this name


class DivergedError(MedcotError, ArithmeticError):
    """The loss is no longer a finite number."""


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
class TrainResult:
    """What training came to; ``seconds`` counts this process's steps only."""

    steps: int
    loss_first: float
    loss_last: float
    seconds: float
    tokens_per_s: float
    trained_tokens_per_s: float
    peak_memory_gb: float


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
    save_steps: int | None = None
    keep_checkpoints: int = 2
    memory: Memory = FASTEST
    small: Memory = SMALLEST  # what a row that is too long for ``memory`` falls back on
    seed: int = 3407


@dataclass
class _Counter:
    """Tokens that went through the model, counted where the loss is computed."""

    tokens: int = 0
    trained_tokens: int = 0
    history: list[Metrics] = field(default_factory=list)


def count_steps(num_rows: int, batch_size: int, *, max_steps: int | None, epochs: float | None) -> int:
    """Optimizer steps of a run: ``max_steps`` if given, else as many as the epochs need (one if neither is given)."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil((epochs or 1) * math.ceil(num_rows / batch_size)))


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


class ReasoningTrainer(SFTTrainer):
    """SFTTrainer with the loss of the whole step, the engine's forward and atomic checkpoints."""

    model: torch.nn.Module  # transformers' is optional until it is built

    def __init__(
        self, *args: Any, plan: Plan, counter: _Counter, announce: Callable[[str], None], **kwargs: Any
    ) -> None:
        self._plan, self._counter = plan, counter
        self._staging: str | None = None
        self._budget = Budget(plan.memory, plan.small, announce=announce)
        super().__init__(*args, **kwargs)
        # Whether or not the model's forward takes it: compute_loss takes the step's token count, and divides by it.
        self.model_accepts_loss_kwargs = True

    def create_accelerator_and_postprocess(self) -> None:
        """Keep accelerate from moving the model, and from wrapping it for several processes.

        ``training_step`` adds up the gradients.
        """
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        prepare, several = accelerator.prepare_model, accelerator.num_processes > 1

        def prepare_in_place(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
            # "Evaluation mode" is accelerate's word for autocast without DistributedDataParallel.
            return prepare(model, device_placement=False, evaluation_mode=several)

        accelerator.prepare_model = prepare_in_place  # type: ignore[method-assign]

    def get_train_dataloader(self) -> Any:
        """Return the batches of this process, in the order that one process alone would have."""
        here = ranks.current()
        if here.size == 1:
            loader = super().get_train_dataloader()
            if engine_of(self.model) is not None:
                # accelerate would copy each batch to the GPU, and counting its tokens would wait for the GPU.
                loader.device = None
            return loader
        dataset: Any = self.train_dataset
        shares = StepShares(
            SeedableRandomSampler(dataset),  # its seed is the process's, which the trainer set
            [len(ids) for ids in dataset["input_ids"]],
            batch_size=self._plan.batch_size,
            micro_batch_size=self._plan.micro_batch_size,
            rank=here.rank,
            size=here.size,
        )
        return ShareLoader(dataset, shares, pin_memory=self.args.dataloader_pin_memory)

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Leave the model where it was loaded: a part of it may be on the host."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer: 8-bit AdamW in one launch, or what transformers has by the plan's name."""
        if self.optimizer is None and self._plan.optimizer == "adamw_8bit":
            trained = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = FlatAdamW8bit(trained, self._plan.learning_rate, weight_decay=self._plan.weight_decay)
            return self.optimizer
        return super().create_optimizer(model)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the trained tokens of a whole step; one process alone counts on the host, which waits for nothing."""
        if ranks.current().size > 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        return sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in batch_samples)

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Leave a batch on the host for the engine, which sends what it needs."""
        return inputs if engine_of(self.model) is not None else super()._prepare_inputs(inputs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward; after a step's last forward, add up the gradients of all processes."""
        labels = inputs["labels"]
        num_trained = int((labels != -100).sum())
        if engine_of(self.model) is not None:
            loss = self._budget.run(inputs, lambda piece, _: self._step(model, piece, num_items_in_batch))
        else:
            loss = self._step(model, inputs, num_items_in_batch)
        self._counter.tokens += 0 if "filler" in inputs else labels.numel()
        self._counter.trained_tokens += num_trained
        if self.accelerator.sync_gradients:
            ranks.sum_gradients([p for p in model.parameters() if p.requires_grad])
        return loss * ranks.current().size  # each has a part of the loss, and the trainer logs their mean

    def _step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return this forward's summed loss over the trained tokens of the whole step."""
        assert not return_outputs, "training asks for the loss alone"
        labels_T = inputs["labels"][0]
        with self._activations():
            summed, num_trained = self._summed_loss(model, inputs, labels_T)
        return summed / (num_trained if num_items_in_batch is None else num_items_in_batch)

    def _summed_loss(self, model: Any, inputs: dict[str, Any], labels_T: Tensor) -> tuple[Tensor, int]:
        engine = engine_of(model)
        if engine is not None:
            return engine.summed_loss(inputs["input_ids"][0], labels_T, inputs["lengths"], memory=self._budget.memory)
        logits_TV = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits[
            0, :-1
        ]
        targets = (labels_T[1:] != -100).nonzero().flatten()
        loss = F.cross_entropy(logits_TV[targets].float(), labels_T[1:][targets], reduction="sum")
        return loss, len(targets)

    def _activations(self) -> contextlib.AbstractContextManager[Any]:
        if self._plan.memory.keep is not Keep.HOST or engine_of(self.model) is not None:
            return contextlib.nullcontext()  # the engine keeps its own activations
        return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, flush it to disk, then rename it: it is whole or absent."""
        assert self.args.output_dir is not None, "_build_trainer names it"
        folder = Path(self.args.output_dir)
        staging = folder / STAGING
        is_first = ranks.current().is_first
        if is_first:
            shutil.rmtree(staging, ignore_errors=True)
        ranks.wait()
        self._staging = str(staging)
        try:
            Trainer._save_checkpoint(self, model, trial)  # TRL's adds a model card to every checkpoint
        finally:
            self._staging = None
        ranks.wait()  # each process has written its random state
        if is_first:
            self._put_in_place(folder, staging, f"checkpoint-{self.state.global_step}")
        ranks.wait()

    def _put_in_place(self, folder: Path, staging: Path, name: str) -> None:
        _flush(staging / name)
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(staging / name, folder / name)
        shutil.rmtree(staging)
        for old in list_checkpoints(folder)[: -self._plan.keep_checkpoints]:
            shutil.rmtree(old)


class _Reporter(TrainerCallback):
    """Turns the trainer's logs into ``Metrics``."""

    def __init__(self, counter: _Counter, device: torch.device, on_step: Callable[[int, Metrics | None], None]) -> None:
        self._counter, self._device, self._on_step = counter, device, on_step
        self._started_s = self._last_s = time.monotonic()
        self._last_tokens = self._last_trained = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock at the first step, not when the trainer is built."""
        self._started_s = self._last_s = time.monotonic()

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
        now_s = time.monotonic()
        passed_s = max(now_s - self._last_s, 1e-9)
        counter = self._counter
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
    resume_from: Path | None = None,
    on_step: Callable[[int, Metrics | None], None] = lambda step, metrics: None,
    announce: Callable[[str], None] = warnings.warn,
) -> TrainResult:
    """Run the optimizer steps of a plan.

    Args:
        model: the PEFT model, accelerated or not; trained in place.
        tokenizer: saved with each checkpoint.
        rows: the training rows; their order is shuffled by the plan's seed.
        plan: every setting, resolved.
        folder: where checkpoints go.
        resume_from: a checkpoint of the same plan to go on from.
        on_step: called after each step, with metrics at logging steps.
        announce: told when memory runs out and the rest of the run takes less of it at a time.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    device, engine = model.device, engine_of(model)
    on_host = plan.memory.keep is Keep.HOST and engine is not None
    counter = _Counter()
    started_s = time.monotonic()
    with quiet_libraries(), engine.table_on_host() if engine and on_host else contextlib.nullcontext():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what was asked before is not training's memory
        if resume_from is not None and _step_of(resume_from) >= plan.num_steps:
            _load_adapter(model, resume_from)  # the trainer would take one step too many before it looks at the number
        else:
            trainer = _build_trainer(model, tokenizer, rows, plan, counter, folder, announce, device)
            trainer.add_callback(_Reporter(counter, device, on_step))
            started_s = time.monotonic()
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    if engine is not None:
        engine.give_back()
    seconds = time.monotonic() - started_s
    history = counter.history
    tokens, trained_tokens = ranks.add_up([counter.tokens, counter.trained_tokens])
    return TrainResult(
        steps=plan.num_steps,
        loss_first=history[0].loss if history else math.nan,
        loss_last=history[-1].loss if history else math.nan,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        trained_tokens_per_s=trained_tokens / seconds,
        peak_memory_gb=peak_memory_gb(device),
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
    counter: _Counter,
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


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


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
