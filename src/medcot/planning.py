"""What a recipe will do on this machine, worked out before it is done: rows, steps, memory and time.

``read_examples`` and ``encode_examples`` (``rows.py``) are the whole way from sources to rows of tokens, with
everything that was set aside. ``build_plan`` turns a recipe and those rows into final numbers. ``pipeline.run`` and
``--dry-run`` both stand on them, so what a dry run prints is what a run does.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from medcot.engine.attention import round_up
from medcot.engine.decoding import CACHE_STEP, DRAW_BYTES
from medcot.engine.devices import has_flash, has_triton
from medcot.engine.memory import (
    FASTEST,
    SMALLEST,
    Keep,
    Memory,
    adapter_params,
    predict_peak_gb,
    small_pieces,
    weight_gb,
)
from medcot.errors import DataError, RecipeError
from medcot.evaluate.tasks import Task, load_suite, parse_suite, without_form
from medcot.recipe import Checkpointing, Recipe, TrainStage
from medcot.records import Example, Row
from medcot.rows import CLINIC, CLINIC_ROWS, RawData, TrainingData, encode_examples, read_examples
from medcot.secrets import SecretName, find_secret
from medcot.stages import EvaluateStage
from medcot.train import sft

if TYPE_CHECKING:
    from medcot.shapes import Shape

__all__ = [
    "CLINIC",
    "CLINIC_ROWS",
    "RawData",
    "TrainingData",
    "build_plan",
    "encode_examples",
    "estimate_disk_bytes",
    "estimate_tokens",
    "fit_answers",
    "free_memory_gb",
    "list_problems",
    "load_tasks",
    "read_examples",
    "tokens_of_run",
]

# Share of free memory a step may take before activations are recomputed: the rest is for fragmentation and the system.
MEMORY_SHARE = 0.85
# What a recipe's word allows.
MEMORIES: dict[Checkpointing, tuple[Memory, ...]] = {
    Checkpointing.OFF: (Memory(Keep.ALL),),
    Checkpointing.ON: (Memory(Keep.INPUT),),
    Checkpointing.OFFLOAD: (SMALLEST,),
    Checkpointing.AUTO: (Memory(Keep.ALL), Memory(Keep.LEAN), Memory(Keep.INPUT), SMALLEST),
}
# Where the base is in 4 bit and the card has room for it in 16 bit too.
UNPACKED = Memory(Keep.ALL, unpacked=True)
# Time of a step against one that keeps everything, and the tokens that a forward's fixed cost (launches, unpacking NF4)
# is worth, for Llama 8B's shape on an H200: INPUT as bench/gpu_sft.py measured it, the others reckoned from it.
RELATIVE_TIME = {Keep.ALL: 1.0, Keep.LEAN: 1.03, Keep.INPUT: 1.3, Keep.HOST: 1.35}
OVERHEAD_TOKENS = 400


def load_tasks(stage: EvaluateStage) -> list[Task]:
    """Load the graded questions of a recipe, worded as it says; none where it names none.

    Raises:
        RecipeError: it names what is no task.
        DataError, NetworkError: a task cannot be read.
    """
    if stage.source is None:
        return []
    try:
        parse_suite(stage.source)
    except DataError as error:
        raise RecipeError(f"evaluate.source: {error.value}", error.rule, error.remedy) from error
    token = find_secret(SecretName.HUGGING_FACE)
    found = load_suite(stage.source, token=token.value if token else None)
    return found if stage.ask_form else [without_form(task) for task in found]


def list_problems(tasks: Sequence[Task]) -> list[tuple[str, Example]]:
    """Return every graded question with the name of its task."""
    return [(task.base, item.example) for task in tasks for item in task.items]


def build_plan(
    recipe: Recipe, rows: Sequence[Row], shape: Shape, precision: str, device: torch.device, *, fast: bool
) -> tuple[sft.Plan, float]:
    """Resolve the optimizer's settings, and predict the peak memory of a step in GiB.

    Raises:
        RecipeError: a batch that cannot be split as asked.
    """
    stage = recipe.train
    num_steps = sft.count_steps(len(rows), stage.batch_size, max_steps=stage.max_steps, epochs=stage.epochs)
    lengths = [row.num_tokens for row in rows]
    padded = not has_flash(device, torch.float32 if precision == "fp32" else torch.float16)

    def predict(micro_batch: int, memory: Memory) -> float:
        return predict_peak_gb(
            shape,
            precision,
            tokens=estimate_tokens(lengths, micro_batch),
            rank=recipe.lora.r,
            memory=memory,
            fast=fast,
            on_cpu=device.type == "cpu",
            kernels=has_triton(device),
            longest=max(lengths) if padded else 0,
        )

    mean_tokens = sum(lengths) / len(lengths)
    budget_gb = free_memory_gb(device) * MEMORY_SHARE
    micro_batch, memory = choose_split(stage, predict, mean_tokens, budget_gb, precision=precision, fast=fast)
    if memory.keep is Keep.HOST:
        memory = small_pieces(estimate_tokens(lengths, micro_batch))
    plan = sft.Plan(
        num_steps=num_steps,
        batch_size=stage.batch_size,
        micro_batch_size=micro_batch,
        warmup_steps=sft.count_warmup(stage.warmup, num_steps),
        learning_rate=stage.learning_rate,
        schedule=stage.schedule,
        optimizer=sft.choose_optimizer(stage.optimizer, device),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        logging_steps=stage.logging_steps,
        validate_steps=stage.validate_steps or sft.choose_validate_steps(num_steps, stage.logging_steps),
        forward_tokens=estimate_tokens(lengths, micro_batch),
        save_steps=stage.save_steps,
        keep_checkpoints=stage.keep_checkpoints,
        memory=memory,
        small=small_pieces(max(lengths)),
        seed=stage.seed,
    )
    return plan, predict(micro_batch, memory)


def estimate_tokens(lengths: Sequence[int], num_rows: int) -> int:
    """Tokens of the largest forward that a run is likely to meet: mean and two and a half deviations of random rows."""
    mean, deviation = statistics.fmean(lengths), statistics.pstdev(lengths)
    likely = round(num_rows * mean + 2.5 * deviation * num_rows**0.5)
    return min(likely, sum(sorted(lengths, reverse=True)[:num_rows]))


def choose_split(
    stage: TrainStage,
    predict: Callable[[int, Memory], float],
    mean_tokens: float,
    budget_gb: float,
    *,
    precision: str,
    fast: bool,
) -> tuple[int, Memory]:
    """Rows a forward, and what layers keep: the fastest that fits the memory and the recipe's word.

    Splitting a step costs little as long as a forward has a thousand tokens, computing layers again a third; so rows
    are split before anything is forgotten.
    """
    divisors = [n for n in range(1, stage.batch_size + 1) if stage.batch_size % n == 0]
    if (stage.micro_batch_size or stage.batch_size) not in divisors:
        raise RecipeError(
            f"train.micro_batch_size={stage.micro_batch_size} does not divide train.batch_size={stage.batch_size}",
            "A step is split into forwards of equal numbers of rows",
            f"Use one of {divisors}",
        )
    splits = [stage.micro_batch_size] if stage.micro_batch_size else divisors
    memories = MEMORIES[stage.gradient_checkpointing]
    if not fast:  # the plain path keeps all or the layers' inputs, and knows no pieces
        memories = tuple(Memory(memory.keep) for memory in memories if memory.keep is not Keep.LEAN)
    elif precision == "nf4" and FASTEST in memories:
        memories = (UNPACKED, *memories)
    choices = [(rows, memory) for rows in splits for memory in memories]

    def cost(choice: tuple[int, Memory]) -> tuple[float, int]:
        rows, memory = choice
        overhead = OVERHEAD_TOKENS / 2 if memory.unpacked else OVERHEAD_TOKENS
        return round(RELATIVE_TIME[memory.keep] * (1 + overhead / (rows * mean_tokens)), 6), -rows

    fitting = [choice for choice in choices if predict(*choice) <= budget_gb]
    if fitting:
        return min(fitting, key=cost)
    return min(choices, key=lambda choice: predict(*choice))  # it may fit yet; if not, the trainer splits further


def fit_answers(wanted: int, shape: Shape, precision: str, row_tokens: int, device: torch.device) -> int:
    """How many questions can be answered together: ``wanted``, or what the key/value cache has room for.

    A guess from the model's sizes, before anything is in memory; on a GPU, decoding measures again what is free
    (``engine.decoding.fit_slots``).

    Args:
        wanted: the recipe's number.
        shape: the model's sizes.
        precision: how the weights are held.
        row_tokens: longest prompt and answer together.
        device: where the cache lies.
    """
    bytes_per_value = 4 if precision == "fp32" else 2
    slots = round_up(row_tokens, CACHE_STEP)
    row_bytes = 2 * shape.num_layers * shape.kv_heads * shape.head_dim * bytes_per_value * slots
    row_bytes += shape.vocab * DRAW_BYTES
    # The weights are in memory by now: on a GPU among what this process holds, elsewhere no longer free.
    held_gb = weight_gb(shape, precision) if device.type == "cuda" else 0.0
    room_gb = free_memory_gb(device) * MEMORY_SHARE - held_gb
    return max(1, min(wanted, int(room_gb * 2**30 // row_bytes)))


def free_memory_gb(device: torch.device) -> float:
    """Memory that this process may use, GiB: on a GPU what it holds and what is free, else what the machine has."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return (free_bytes + torch.cuda.memory_reserved(device)) / 2**30
    import psutil

    return psutil.virtual_memory().available / 2**30


def estimate_disk_bytes(recipe: Recipe, shape: Shape) -> int:
    """Bytes that checkpoints (weights and two moments in float32), adapter and merged weights may take."""
    adapter = 4 * adapter_params(shape, recipe.lora.r)
    checkpoints = (recipe.train.keep_checkpoints + 1) * 3 * adapter if recipe.train.save_steps else 0
    return adapter + checkpoints + (2 * shape.num_params if recipe.save.merged else 0)


def tokens_of_run(rows: Sequence[Row], plan: sft.Plan) -> int:
    """Real tokens that a run will go through, rows repeated as its steps need."""
    mean = sum(row.num_tokens for row in rows) / len(rows)
    return round(mean * min(plan.num_steps * plan.batch_size, _rows_of_steps(len(rows), plan)))


def _rows_of_steps(num_rows: int, plan: sft.Plan) -> int:
    """The last step of an epoch takes what is left, so an epoch is never more than its rows."""
    steps_an_epoch = -(-num_rows // plan.batch_size)
    whole, rest = divmod(plan.num_steps, steps_an_epoch)
    return whole * num_rows + min(rest * plan.batch_size, num_rows)
