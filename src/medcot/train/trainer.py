"""TRL's trainer with our batches, our loss, forwards that fit the memory, and checkpoints that are whole or absent.

What it overrides, and why, stands at each method; ``sft.py`` says what comes of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from transformers import Trainer
from trl import SFTTrainer

from medcot import ranks
from medcot.engine import engine_of
from medcot.engine.memory import Keep, Memory
from medcot.train.counting import Counter, Validated
from medcot.train.optimizer import FlatAdamW8bit
from medcot.train.plan import Plan
from medcot.train.shares import ShareLoader, StepShares
from medcot.train.splitting import Budget
from medcot.train.validation import Validation

STAGING = ".writing"  # a checkpoint is put together under this name


class ReasoningTrainer(SFTTrainer):
    """SFTTrainer with the loss of the whole step, the engine's forward and atomic checkpoints."""

    model: torch.nn.Module  # transformers' is optional until it is built

    def __init__(
        self,
        *args: Any,
        plan: Plan,
        counter: Counter,
        announce: Callable[[str], None],
        **kwargs: Any,
    ) -> None:
        self._plan, self._counter = plan, counter
        self._validation: Validation | None = None
        self._on_validation: Callable[[Validated], None] = lambda validated: None
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
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        # Biases may be trained in the base's own 16 bit; bitsandbytes' optimizer takes them one by one.
        in_float32 = all(p.dtype == torch.float32 for p in trained.values())
        if self.optimizer is None and self._plan.optimizer == "adamw_8bit" and in_float32:
            biases = [p for name, p in trained.items() if name.endswith("bias")]
            weights = [p for name, p in trained.items() if not name.endswith("bias")]
            groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
            decay = self._plan.weight_decay
            self.optimizer = FlatAdamW8bit(groups, self._plan.learning_rate, weight_decay=decay)
            return self.optimizer
        if self._plan.optimizer == "adamw_8bit" and not in_float32:
            self._budget.announce("biases train in 16 bit: 8-bit AdamW takes the weights one by one, which is slower")
        return super().create_optimizer(model)

    def forget(self) -> None:
        """Let go of the gradients and of the optimizer's state."""
        self.model.zero_grad(set_to_none=True)
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the trained tokens of a whole step, of all processes, on the host: nothing waits for the GPU.

        transformers' own gathers them over the GPUs' group, which takes no tensor of the host.
        """
        return ranks.add_up([sum(int((batch["labels"][..., 1:] != -100).sum()) for batch in batch_samples)])[0]

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

    def _summed_loss(
        self, model: Any, inputs: dict[str, Any], labels_T: Tensor, memory: Memory | None = None
    ) -> tuple[Tensor, int]:
        engine = engine_of(model)
        if engine is not None:
            memory = memory or self._budget.memory
            return engine.summed_loss(inputs["input_ids"][0], labels_T, inputs["lengths"], memory=memory)
        logits_TV = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits[
            0, :-1
        ]
        targets = (labels_T[1:] != -100).nonzero().flatten()
        loss = F.cross_entropy(logits_TV[targets].float(), labels_T[1:][targets], reduction="sum")
        return loss, len(targets)

    def watch(self, validation: Validation, on_validation: Callable[[Validated], None]) -> None:
        """Have ``evaluate`` compute the loss of these rows, and hand it on."""
        self._validation, self._on_validation = validation, on_validation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the loss of the held-out rows in place of transformers' evaluation, and leave no trace in training.

        Neither dropout nor its random numbers, no gradients, no time on the training's clock; and where memory runs
        out, what is learned of it is forgotten, since it would split the training's forwards otherwise.
        """
        assert self._validation is not None, "it is asked for only where there are rows"
        self.control.should_evaluate = False
        model, device = self.model, self.args.device
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(device)  # the work that waits there is the training's
        started_s = time.monotonic()
        budget, was_training = replace(self._budget), model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if on_cuda else []):
                loss = self._validation.compute_loss(lambda inputs: self._validation_loss(inputs, budget))
        finally:
            model.train(was_training)
        validated = Validated(self.state.global_step, loss, time.monotonic() - started_s)
        self._counter.validations.append(validated)
        self._on_validation(validated)
        return {"eval_loss": loss}

    def _validation_loss(self, inputs: dict[str, Any], budget: Budget) -> Any:
        def summed(piece: dict[str, Any], memory: Memory) -> Tensor:
            with self.compute_loss_context_manager():  # type: ignore[no-untyped-call]
                return self._summed_loss(self.model, piece, piece["labels"][0], memory)[0]

        prepared = self._prepare_inputs(inputs)
        if engine_of(self.model) is not None:
            return budget.run(prepared, summed)
        return summed(prepared, budget.memory)

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


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
