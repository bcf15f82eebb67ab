"""The tutorial's ``TrainingArguments`` as a recipe's training stage and a plan.

The object is the user's own, made by transformers (or TRL's ``SFTConfig``); only its values are read. Each of its
hundred fields belongs to one of three groups: those that are read; those that cannot change what is trained (loaders,
logs, other back ends), which are said once where they are set; and all others, which are refused where they are set,
since to pass over them would train another model than was asked for.

Rows a step are ``per_device_train_batch_size × gradient_accumulation_steps``. How they are split into forwards is
planned from the free memory, one forward where it allows: the loss is summed over the step's tokens and divided once,
so 2 × 4, 8 × 1 and 1 × 8 give one and the same gradient.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from medcot.compat.notes import NotCoveredError, say_once
from medcot.compat.session import Session
from medcot.quiet import quiet_libraries
from medcot.sharing import build_share
from medcot.train.plan import Plan, choose_optimizer, count_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import TrainingArguments

    from medcot.records import Row

WHERE = "TrainingArguments"
READ = {
    *("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("warmup_steps", "learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm", "seed"),
    *("logging_steps", "logging_strategy", "logging_first_step", "eval_strategy", "eval_steps", "save_strategy"),
    *("save_steps", "save_total_limit", "report_to", "run_name", "resume_from_checkpoint", "fp16", "bf16"),
    *("dataset_text_field", "max_length", "use_cpu", "per_device_eval_batch_size", "do_train", "do_eval"),
    *("disable_tqdm", "project", "do_predict", "logging_dir", "overwrite_output_dir", "full_determinism"),
}
_LOADER = "is not needed: batches are made in this process"
_SPEED = "is not needed: medcot's engine runs the forward"
_LOG = "is not needed: the console shows each logging step"
_ONE = "is not needed: one process trains; 'torchrun -m medcot run' takes several"
_MEMORY = "is planned from the free memory and get_peft_model's use_gradient_checkpointing"
_END_TO_END = "is not needed: rows are laid end to end without padding, as many as a step has"
_HUB = "is not needed: push with model.push_to_hub"
IDLE: dict[str, str] = {  # a name, or the beginning of names
    "dataloader_": _LOADER,
    "dataset_num_proc": "is not needed: the tokenizer works in threads",
    "dataset_kwargs": _LOADER,
    "remove_unused_columns": _LOADER,
    "accelerator_config": _ONE,
    "ddp_": _ONE,
    "average_tokens_across_devices": _ONE,
    "local_rank": _ONE,
    "log_": _LOG,
    "logging_nan_inf_filter": "is not needed: a loss that is no number stops the run",
    "skip_memory_metrics": _LOG,
    "include_": _LOG,
    "gradient_checkpointing": _MEMORY,
    "activation_": _MEMORY,
    "auto_find_batch_size": _MEMORY,
    "torch_empty_cache_steps": _MEMORY,
    "torch_compile": _SPEED,
    "tf32": _SPEED,
    "use_liger_kernel": _SPEED,
    "liger_kernel_config": _SPEED,
    "use_cache": _SPEED,
    "bf16_full_eval": _SPEED,
    "fp16_full_eval": _SPEED,
    "packing": _END_TO_END,
    "padding_free": _END_TO_END,
    "pad_": _END_TO_END,
    "eval_packing": _END_TO_END,
    "eval_": "is not needed: held-out rows are measured by the training's own forward",
    "prediction_loss_only": _LOG,
    "truncation_mode": "is not needed: rows that are too long are left out, not cut",
    "push_to_hub": _HUB,
    "hub_": _HUB,
    "trackio_": "is not needed: trackio keeps its own disk",
    "save_on_each_node": _ONE,
    "enable_jit_checkpoint": "is not needed: checkpoints are whole or absent",
    "restore_callback_states_from_checkpoint": "is not needed: callbacks keep their own state",
    "trust_remote_code": "is taken from from_pretrained",
    "use_dora": "is taken from get_peft_model",
}
EIGHT_BIT = {"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"}
PLAIN_ADAMW = {"adamw_torch", "adamw_torch_fused", "adamw_hf"}


def check_arguments(args: TrainingArguments, session: Session) -> None:
    """Say which settings have no meaning here, and refuse those that would train another model.

    Raises:
        NotCoveredError: such a setting.
    """
    for name, value in _set_apart(args).items():
        idle = next((why for start, why in IDLE.items() if name == start or _begins(name, start)), None)
        if idle is None:
            raise NotCoveredError(
                f"{WHERE} has {name}={value!r}",
                "medcot trains without it, and the result would be another than was asked for",
                f"Leave {name} at its default",
            )
        if value not in (False, None):
            say_once(f"{WHERE}: {name} {idle}")
    if args.world_size > 1:
        raise NotCoveredError(
            f"a notebook's trainer in {args.world_size} processes",
            "It trains in one",
            "Start 'torchrun --nproc-per-node N -m medcot run tutorial-8b'",
        )
    _say_precision(args, session)


def _begins(name: str, start: str) -> bool:
    return name.startswith(start) and (start.endswith("_") or start == "gradient_checkpointing")


def _set_apart(args: TrainingArguments) -> dict[str, Any]:
    """The settings that are not read and differ from those of an object that says nothing."""
    with quiet_libraries():
        blank = type(args)(output_dir=args.output_dir, bf16=False, fp16=False, use_cpu=args.use_cpu)
    found = {}
    for field in dataclasses.fields(args):
        value, usual = getattr(args, field.name), getattr(blank, field.name)
        if field.name not in READ and plain(value) != plain(usual):
            found[field.name] = value
    return found


def plain(value: Any) -> str:
    """Return a setting as it is written; of an enumeration its value."""
    return str(getattr(value, "value", value))


def _say_precision(args: TrainingArguments, session: Session) -> None:
    held, on_cpu = session.loaded.precision, session.loaded.device.type == "cpu"
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        if not getattr(args, name):
            continue
        if on_cpu:
            say_once(
                f"{name}=True is ignored: it is about a GPU, and this CPU computes in {_words(session.loaded.dtype)}"
                f" with weights in {held}, chosen when the model was loaded"
            )
        elif session.loaded.dtype != dtype:
            say_once(f"{name}=True is ignored: the model was loaded to compute in {_words(session.loaded.dtype)}")


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan_training(
    args: TrainingArguments, session: Session, rows: Sequence[Row], *, fast: bool, validates: bool
) -> tuple[Plan, float]:
    """Return the plan, and its peak memory as predicted, GiB; the session's recipe then says the same.

    Raises:
        RecipeError: a value that a recipe refuses too.
    """
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    max_steps = args.max_steps if args.max_steps > 0 else None
    epochs = None if max_steps else args.num_train_epochs
    num_steps = count_steps(len(rows), batch, max_steps=max_steps, epochs=epochs)
    an_epoch = math.ceil(len(rows) / batch)
    device = session.loaded.device
    session.settle(
        "train",
        WHERE,
        batch_size=batch,
        micro_batch_size=None,
        max_steps=max_steps,
        epochs=epochs,
        warmup=args.get_warmup_steps(num_steps),
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        logging_steps=_every(args.logging_strategy, args.logging_steps, num_steps, an_epoch) or num_steps,
        validate_steps=_every(args.eval_strategy, args.eval_steps or args.logging_steps, num_steps, an_epoch)
        if validates
        else None,
        save_steps=_every(args.save_strategy, args.save_steps, num_steps, an_epoch),
        seed=args.seed,
    )
    plan, predicted_gb = build_share(session.recipe, rows, session.loaded, fast=fast)
    return dataclasses.replace(
        plan,
        schedule=plain(args.lr_scheduler_type),
        optimizer=_optimizer(plain(args.optim), device),
        max_grad_norm=args.max_grad_norm,
        keep_checkpoints=args.save_total_limit or sys.maxsize,
    ), predicted_gb


def _every(strategy: Any, steps: float, num_steps: int, steps_an_epoch: int) -> int | None:
    """Steps from one to the next, by a strategy: a number, a share of all, every epoch, or never (``None``)."""
    known: Mapping[str, int | None] = {
        "no": None,
        "epoch": steps_an_epoch,
        "steps": int(steps) if steps >= 1 else math.ceil(steps * num_steps),
    }
    word = plain(strategy)
    if word not in known:
        raise NotCoveredError(
            f"the strategy '{word}'", "What is done is done every so many steps, or epochs", "Use 'steps'"
        )
    return known[word]


def _optimizer(name: str, device: torch.device) -> str:
    if name in PLAIN_ADAMW:
        return choose_optimizer("adamw_torch", device)
    if name not in EIGHT_BIT:
        return name  # transformers builds it
    if device.type == "cpu":
        say_once(f"optim={name} is PyTorch's fused AdamW here: 8-bit moments are for GPUs")
    elif name.startswith("paged"):
        say_once(f"optim={name} keeps its moments on the GPU, 84 MB for an 8B's adapter of rank 16")
    return choose_optimizer("auto", device)
