"""``SFTTrainer`` as the tutorial calls it, around medcot's own training.

It is no subclass of TRL's trainer. TRL's would bring its loop: forwards of ``per_device_train_batch_size`` padded rows,
whose micro-batches it adds up, logits and all. ``train.sft.train`` lays the rows of a whole step end to end and runs
the engine's layers and loss over them, in one forward where memory allows, with the same gradient; it is what
``medcot run`` does, and so the notebook's losses are the command line's, bit for bit (tested). What the
notebook sees of a trainer is kept: ``train()`` and its statistics, the log history, callbacks, checkpoints, W&B.

Statistics say what happened: the loss is the mean over all steps, rows a second count rows that were seen, the time is
that of the steps. ``logging_first_step`` is honoured, though medcot itself always logs the first step: the numbers at
step 10 are the mean of ten steps, as in the tutorial's table.

Callbacks are told of the beginning and the end, of each step and each log; one may stop the training. W&B's is
transformers' own, in this process, since the run that ``wandb.init`` opened in the notebook is this process's. Where
such a run is open, it gets the numbers even if ``report_to`` says nothing: that was the default when the tutorial was
written.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medcot import engine
from medcot.compat import saving
from medcot.compat.arguments import check_arguments, plain, plan_training
from medcot.compat.notes import ArgumentError, NotCoveredError, join_words, pass_over, say_once
from medcot.compat.session import session_of
from medcot.compat.texts import Texts, find_style, mask_outside_responses, read_rows
from medcot.data.packing import build_dataset
from medcot.errors import OutputError
from medcot.quiet import quiet_libraries
from medcot.train import sft
from medcot.train.progress import RunConsole

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerState, TrainingArguments
    from transformers.trainer_utils import TrainOutput

    from medcot.train.counting import Metrics, Validated

DEFAULT_FOLDER = "trainer_output"
TOLD = {"on_init_end", "on_train_begin", "on_train_end", "on_step_end", "on_log", "on_evaluate"}
_END_TO_END = "is not needed: rows are laid end to end without padding"
IDLE = {
    "dataset_num_proc": "is not needed: the tokenizer works in threads",
    "packing": f"{_END_TO_END}, as many as a step has",
    "data_collator": _END_TO_END,
    "dataset_kwargs": "is not needed: texts are tokenised as they are",
    "dataset_batch_size": "is not needed: texts are tokenised at once",
    "num_of_sequences": _END_TO_END,
    "infinite": _END_TO_END,
    "neftune_noise_alpha": "is taken from args",
    "compute_metrics": "is not needed: 'medcot eval' grades answers",
    "preprocess_logits_for_metrics": "is not needed: no logits are kept",
    "model_init_kwargs": "is taken from from_pretrained",
}
KNOWN = ("model", "args", "train_dataset", "eval_dataset", "tokenizer", "dataset_text_field", "max_seq_length")


class _Stop(Exception):
    """A callback has asked for the end; it does not leave this file."""


class SFTTrainer:
    """Trains a notebook's model on texts.

    Args:
        model: from ``FastLanguageModel.get_peft_model``.
        args: transformers' ``TrainingArguments`` or TRL's ``SFTConfig``.
        train_dataset: rows with a text each, or with ``input_ids`` (and ``labels``).
        eval_dataset: rows whose loss is computed as ``args.eval_strategy`` says.
        tokenizer: the model's own if ``None``.
        processing_class: TRL's newer name for it.
        dataset_text_field: the column that holds the text.
        max_seq_length: longer rows are left out and counted.
        formatting_func: makes a row's text, in place of a column.
        callbacks: transformers' ``TrainerCallback``s.
        **others: accepted where they have no meaning here, and said once.

    Raises:
        MedcotError: a data set, setting or argument that cannot be used.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        processing_class: Any = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        callbacks: list[Any] | None = None,
        **others: Any,
    ) -> None:
        from transformers import TrainerState, TrainingArguments

        for name in ("peft_config", "optimizers", "compute_loss_func", "model_init", "optimizer_cls_and_kwargs"):
            if others.pop(name, None):
                raise NotCoveredError(f"SFTTrainer was given {name}", "medcot's own is used", "Leave it out")
        pass_over(others, IDLE, "SFTTrainer", KNOWN)
        self._session = session_of(model, "SFTTrainer")
        saving.tuned_session(model)
        self.model = model
        self.tokenizer = self.processing_class = tokenizer or processing_class or self._session.loaded.tokenizer
        self.args = args if args is not None else TrainingArguments(DEFAULT_FOLDER, report_to="none")
        check_arguments(self.args, self._session)
        self.state: TrainerState = TrainerState()
        self._callbacks: list[Any] = []
        for callback in callbacks or ():
            self.add_callback(callback)
        settings: dict[str, Any] = {
            "field": dataset_text_field or _setting(self.args, "dataset_text_field") or "text",
            "max_tokens": self._max_tokens(max_seq_length),
            "formatting_func": formatting_func,
        }
        if train_dataset is None:
            raise ArgumentError("SFTTrainer has no train_dataset", "It trains on its rows", "Pass train_dataset=")
        self._train = read_rows(train_dataset, self.tokenizer, **settings)
        self._session.settle("prompt", "SFTTrainer", style=find_style(self._train.texts, self.tokenizer))
        self._held_out = None if eval_dataset is None else read_rows(eval_dataset, self.tokenizer, **settings)
        for found in (self._train, self._held_out):
            for sentence in found.sentences if found else ():
                RunConsole().note(sentence)

    @property
    def train_dataset(self) -> Dataset:
        """The rows as they are trained on: ``input_ids`` and ``labels``."""
        return build_dataset(self._train.rows)

    def add_callback(self, callback: Any) -> None:
        """Have a callback told of what happens; it is said what it will not be told of."""
        from transformers import TrainerCallback

        made = callback() if isinstance(callback, type) else callback
        wanted = {name for name in dir(made) if name.startswith("on_")}
        unheard = {n for n in wanted if getattr(type(made), n, None) is not getattr(TrainerCallback, n, None)} - TOLD
        if unheard:
            say_once(f"SFTTrainer: {type(made).__name__} is not told of {join_words(unheard)}")
        self._callbacks.append(made)

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Run the optimizer steps and return their number, their mean loss and statistics.

        Args:
            resume_from_checkpoint: a checkpoint folder, or true for the last one in ``args.output_dir``.

        Raises:
            DivergedError: the loss is no longer a finite number.
            OutputError: there is no such checkpoint.
        """
        folder = Path(self.args.output_dir or DEFAULT_FOLDER)
        checkpoint = _checkpoint(folder, resume_from_checkpoint or self.args.resume_from_checkpoint)
        validates = self._held_out is not None and plain(self.args.eval_strategy) != "no"
        fast = engine.engine_of(self.model) is not None
        plan, _ = plan_training(self.args, self._session, self._train.rows, fast=fast, validates=validates)
        watch = _Watch(self, plan, sft.step_of(checkpoint) if checkpoint else 0)
        console = RunConsole()
        console.note(_describe(plan, len(self._train.rows), fast=fast))
        watch.begin()
        with console.training(plan.num_steps) as bar:
            watch.bar = bar
            try:
                result = sft.train(
                    self.model,
                    self.tokenizer,
                    self._train.rows,
                    plan,
                    folder,
                    validation=self._held_out.rows if validates and self._held_out else (),
                    resume_from=checkpoint,
                    on_step=watch.on_step,
                    on_validation=watch.on_validation,
                    announce=console.warn,
                )
            except _Stop:
                result = None
        return watch.end(result, len(self._train.rows))

    def replace_rows(self, change: Callable[[Texts], Texts]) -> None:
        """Change the rows, of training and of those held out."""
        num_said = len(self._train.sentences)
        self._train = change(self._train)
        self._held_out = None if self._held_out is None else change(self._held_out)
        for sentence in self._train.sentences[num_said:]:
            RunConsole().note(sentence)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the adapter and its tokenizer."""
        saving.save_adapter(self.model, Path(output_dir or self.args.output_dir or DEFAULT_FOLDER), self.tokenizer)

    def __getattr__(self, name: str) -> Any:
        from trl import SFTTrainer as Trl

        if name.startswith("_") or getattr(Trl, name, None) is None:
            raise AttributeError(f"'SFTTrainer' object has no attribute '{name}'")
        raise _no_counterpart(name)

    def _max_tokens(self, asked: int | None) -> int:
        """The longest row: as the call says, else TRL's argument where it was set, else as the model was loaded."""
        loaded = self._session.recipe.model.max_seq_length
        own = _setting(self.args, "max_length")
        usual = {field.name: field.default for field in dataclasses.fields(self.args)}.get("max_length")
        wanted = int(asked or (own if own != usual else 0) or loaded)
        if wanted > loaded:
            raise ArgumentError(
                f"max_seq_length={wanted} for a model loaded with max_seq_length={loaded}",
                "A row is at most as long as the model was loaded for",
                f"Load it with FastLanguageModel.from_pretrained(max_seq_length={wanted})",
            )
        return wanted


class _NoCounterpart(ArgumentError, AttributeError):
    """So that ``hasattr`` says no."""


def _no_counterpart(name: str) -> _NoCounterpart:
    return _NoCounterpart(
        f"SFTTrainer.{name} has no counterpart in medcot.compat",
        "Covered are train, state.log_history, add_callback, save_model and train_dataset",
        "Losses of held-out rows come with eval_dataset and eval_strategy; for more, use trl.SFTTrainer itself",
    )


def train_on_responses_only(
    trainer: SFTTrainer, instruction_part: str, response_part: str, **others: Any
) -> SFTTrainer:
    """Take the loss off everything but the responses: what follows ``response_part``, up to ``instruction_part``.

    Raises:
        DataError: no text holds ``response_part``.
    """
    idle = dict.fromkeys(
        ("num_proc", "force_match", "last_response_only"), "is not needed: the text itself is searched"
    )
    pass_over(others, idle, "train_on_responses_only", ("instruction_part", "response_part"))
    trainer.replace_rows(lambda found: mask_outside_responses(found, instruction_part, response_part))
    return trainer


class _Watch:
    """What is told of a training as it goes, and its statistics."""

    def __init__(self, trainer: SFTTrainer, plan: sft.Plan, first_step: int) -> None:
        from transformers import DefaultFlowCallback, TrainerControl
        from transformers.trainer_callback import CallbackHandler

        self.args, self.state, self.plan = trainer.args, trainer.state, plan
        self.control = TrainerControl()
        self.bar: Any = None
        self._last_logged = self._first_step = first_step
        self._held: Metrics | None = None
        self._summed_loss = 0.0
        self._metrics: Metrics | None = None
        callbacks = [DefaultFlowCallback(), *trainer._callbacks, *_reporters(trainer.args)]
        with quiet_libraries():
            self._handler = CallbackHandler(callbacks, trainer.model, trainer.tokenizer, None, None)

    def begin(self) -> None:
        state = self.state
        state.max_steps, state.global_step, state.log_history = self.plan.num_steps, self._first_step, []
        state.num_train_epochs = 1
        state.train_batch_size = self.plan.micro_batch_size
        self._handler.on_train_begin(self.args, state, self.control)

    def on_step(self, step: int, metrics: Metrics | None) -> None:
        self.state.global_step = step
        if metrics is not None:
            self._log(metrics)
            return
        self.bar.update(step)
        self.control.should_training_stop = False
        self.control = self._handler.on_step_end(self.args, self.state, self.control)
        if self.control.should_training_stop and step < self.plan.num_steps:
            raise _Stop

    def _log(self, metrics: Metrics) -> None:
        num_steps = metrics.step - self._last_logged
        self._summed_loss += metrics.loss * num_steps
        self._last_logged, self._metrics = metrics.step, metrics
        is_due = metrics.step % self.plan.logging_steps == 0 or metrics.step == self.plan.num_steps
        if not is_due and not self.args.logging_first_step:
            self._held = metrics
            return
        loss = metrics.loss
        if self._held is not None:
            loss, self._held = (self._held.loss + loss * num_steps) / (1 + num_steps), None
        self.state.epoch = metrics.epoch
        self._tell({"loss": loss, "grad_norm": metrics.grad_norm, "learning_rate": metrics.learning_rate})
        self.bar.update(
            metrics.step,
            loss=loss,
            learning_rate=metrics.learning_rate,
            tokens_per_s=metrics.tokens_per_s,
            memory_gb=metrics.memory_gb,
        )

    def on_validation(self, validated: Validated) -> None:
        self._tell({"eval_loss": validated.validation_loss, "eval_runtime": validated.validation_s})
        self.bar.validated(validated.step, validated.validation_loss)

    def end(self, result: sft.TrainResult | None, num_rows: int) -> TrainOutput:
        """Tell the end, and return the statistics; ``result`` is ``None`` where a callback stopped it."""
        from transformers.trainer_utils import TrainOutput

        state, last = self.state, self._metrics
        num_steps = self._last_logged - self._first_step
        loss = self._summed_loss / num_steps if num_steps else float("nan")
        seconds = result.seconds if result else last.elapsed_s if last else 0.0
        seen = _count_rows(num_rows, self.plan.batch_size, self._first_step, state.global_step)
        figures = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(seen / seconds, 3) if seconds else 0.0,
            "train_steps_per_second": round((state.global_step - self._first_step) / seconds, 3) if seconds else 0.0,
            "train_tokens_per_second": round(result.tokens_per_s, 1) if result else last.tokens_per_s if last else 0.0,
            "train_loss": loss,
        }
        self._tell(figures)
        self._handler.on_train_end(self.args, state, self.control)
        memory = {"peak_memory_gb": result.peak_memory_gb} if result else {}
        return TrainOutput(state.global_step, loss, {**figures, **memory, "epoch": state.epoch})

    def _tell(self, logs: dict[str, Any]) -> None:
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self._handler.on_log(self.args, self.state, self.control, logs)


def _count_rows(num_rows: int, batch_size: int, first_step: int, last_step: int) -> int:
    """Rows of some steps; the last step of an epoch has what is left of it."""
    an_epoch = -(-num_rows // batch_size)

    def until(step: int) -> int:
        epochs, rest = divmod(step, an_epoch)
        return epochs * num_rows + min(rest * batch_size, num_rows)

    return until(last_step) - until(first_step)


def _reporters(args: TrainingArguments) -> list[Any]:
    """Return transformers' own callbacks for the services that ``report_to`` names, and for a W&B run that is open."""
    from transformers.integrations import WandbCallback, get_reporting_integration_callbacks

    names = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or ())
    kinds = get_reporting_integration_callbacks([name for name in names if name != "none"])
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None and WandbCallback not in kinds:
        say_once("the W&B run that is open gets the training's numbers; wandb.finish() before train() keeps them out")
        kinds.append(WandbCallback)
    with quiet_libraries():
        return [kind() for kind in kinds]


def _checkpoint(folder: Path, wanted: str | bool | None) -> Path | None:
    if not wanted:
        return None
    if wanted is True:
        found = sft.list_checkpoints(folder)
        if not found:
            raise OutputError(
                f"'{folder}' holds no checkpoint",
                "Training goes on from one that was saved every args.save_steps",
                "Call train() without resume_from_checkpoint",
            )
        return found[-1]
    checkpoint = Path(str(wanted))
    if not (checkpoint / "trainer_state.json").is_file():
        raise OutputError(
            f"'{checkpoint}' is no checkpoint", "It is a folder such as outputs/checkpoint-60", "Correct the path"
        )
    return checkpoint


def _describe(plan: sft.Plan, num_rows: int, *, fast: bool) -> str:
    forwards = plan.batch_size // plan.micro_batch_size
    way = "in one forward" if forwards == 1 else f"in {forwards} forwards of {plan.micro_batch_size}"
    path = "medcot's engine" if fast else "the plain path"
    return f"{plan.num_steps:,} steps of {plan.batch_size} rows {way}, {num_rows:,} rows, on {path}"


def _setting(args: Any, name: str) -> Any:
    return vars(args).get(name)
