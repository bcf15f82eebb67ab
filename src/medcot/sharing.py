"""What every process of a job does, and what the helpers among them do.

A job of one process does all of ``pipeline.py``. Started by ``torchrun``, each further process prepares the same model
and the same rows as the first, waits for its word, and takes its share of every training step (``ranks.py``,
``train/shares.py``). Both sides load, attach and plan through the functions here, so that they cannot differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medcot import ranks
from medcot.errors import DataError, RecipeError
from medcot.recipe import Recipe
from medcot.records import Row, Run
from medcot.shapes import compute_shape

if TYPE_CHECKING:
    from peft import PeftModel

    from medcot.model import LoadedModel
    from medcot.train.sft import Plan


def load_base(recipe: Recipe) -> LoadedModel:
    """Load the recipe's base model; errors as for ``model.load``."""
    from medcot.model import load

    stage = recipe.model
    return load(
        stage.source,
        precision=stage.precision.value,
        revision=stage.revision,
        max_seq_length=stage.max_seq_length,
        allow_pickle=stage.allow_pickle,
        trust_remote_code=stage.trust_remote_code,
    )


def attach_fresh(recipe: Recipe, loaded: LoadedModel) -> PeftModel:
    """Put the recipe's adapter on a loaded base, and make it fast unless the recipe says otherwise."""
    from medcot import engine
    from medcot.model import attach_lora

    engine.release(loaded.model)
    lora = recipe.lora
    model = attach_lora(
        loaded,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        bias=lora.bias,
        targets=lora.targets,
        rslora=lora.rslora,
        dora=lora.dora,
        init=lora.init,
        seed=lora.seed,
    )
    if recipe.train.accelerate:
        engine.accelerate(model)
    return model


def build_share(recipe: Recipe, rows: Sequence[Row], loaded: LoadedModel, *, fast: bool) -> tuple[Plan, float]:
    """Resolve the optimizer's settings for one process's share of each step, and predict its peak memory in GiB."""
    from medcot import planning
    from medcot.train import sft

    num_processes = ranks.current().size
    shape = compute_shape(loaded.model.config, trust_remote_code=recipe.model.trust_remote_code)
    stage = recipe.train
    if num_processes > 1:
        steps = sft.count_steps(len(rows), stage.batch_size, max_steps=stage.max_steps, epochs=stage.epochs)
        share = {"batch_size": stage.batch_size // num_processes, "max_steps": steps}
        recipe = recipe.model_copy(update={"train": stage.model_copy(update=share)})
    plan, predicted_gb = planning.build_plan(recipe, rows, shape, loaded.precision, loaded.device, fast=fast)
    return dataclasses.replace(plan, batch_size=stage.batch_size), predicted_gb


def check_shares(recipe: Recipe, num_processes: int) -> None:
    """Refuse a batch that the processes cannot share evenly."""
    stage = recipe.train
    share, rest = divmod(stage.batch_size, num_processes)
    if rest:
        raise RecipeError(
            f"train.batch_size={stage.batch_size} for {num_processes} processes",
            "A step's rows are divided evenly among the processes, so that more of them change only the speed",
            f"Set train.batch_size={(share + 1) * num_processes}, or start another number of processes",
        )
    if num_processes > 1 and stage.micro_batch_size is not None and share % stage.micro_batch_size:
        raise RecipeError(
            f"train.micro_batch_size={stage.micro_batch_size} and {share} rows a step for each of {num_processes}"
            " processes",
            "micro_batch_size is the rows of one forward in one process, and divides that process's rows of a step",
            f"Set train.micro_batch_size={share} or a divisor of it",
        )


def help_train() -> None:
    """Take this process's share of a job's training; the first process does the rest."""
    from medcot.startup import Startup

    values, folder = ranks.share(None)
    recipe = Recipe.model_validate(values)
    Startup(recipe.model.source).wait()
    from medcot import planning
    from medcot.train import sft
    from medcot.treatment import check_left, run_items, treat

    problems = planning.list_problems(planning.load_tasks(recipe.evaluate))
    raw = planning.read_examples(recipe)
    loaded = load_base(recipe)
    treated = treat(raw, recipe, run_items(recipe, problems))
    check_left(raw, treated)
    data = planning.encode_examples(treated.raw, recipe, loaded.tokenizer)
    model = attach_fresh(recipe, loaded)
    order = ranks.share(None)  # the first process may be asking questions for an hour
    if order is None:
        return
    plan, resume_from, digest = order
    if data.digest != digest:
        raise DataError(
            f"process {ranks.current().rank} read other rows than the first one from '{recipe.data.named}'",
            "The processes of a job divide the same rows among them",
            "See that the file is the same for all, and does not change; then go on with --resume",
        )
    folder = Run(folder).checkpoints
    sft.train(model, loaded.tokenizer, data.rows, plan, folder, validation=data.validation, resume_from=resume_from)
