"""What a recipe will do on this machine, worked out before it is done: rows, steps, memory and time.

``read_examples`` and ``encode_examples`` are the whole way from a source to rows of tokens, with everything that was
set aside; they are two, so that a mistake in the data shows before gigabytes of weights are loaded. ``build_plan``
turns a recipe and those rows into final numbers. ``pipeline.run`` and ``--dry-run`` both stand on them, so what a dry
run prints is what a run does.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from medcot import clinic, prompt
from medcot.data import checks, columns, sources
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
from medcot.recipe import Checkpointing, Recipe, TrainStage
from medcot.records import Example, Quarantined, Row
from medcot.secrets import SecretName, find_secret
from medcot.train import sft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from medcot.shapes import Shape

CLINIC = "builtin:clinic"
CLINIC_ROWS = 2000  # what "builtin:clinic" means without a slice
CLINIC_SEED = 3407
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


@dataclass(frozen=True)
class RawData:
    """Examples as read, before a tokenizer is known."""

    source: str
    sha256: str
    revision: str | None
    examples: list[Example]
    quarantined: list[Quarantined]
    sentences: list[str] = field(default_factory=list)  # what each column became, and what was noticed


@dataclass(frozen=True)
class TrainingData:
    """Rows of tokens, and the account of how they came to be."""

    raw: RawData
    rows: list[Row]
    quarantined: list[Quarantined]
    sentences: list[str]

    def facts(self) -> dict[str, Any]:
        """The ``data.train`` part of run.json."""
        return {
            "source": self.raw.source,
            "revision": self.raw.revision,
            "rows": len(self.rows),
            "tokens": sum(row.num_tokens for row in self.rows),
            "trained_tokens": sum(row.num_trained_tokens for row in self.rows),
            "sha256": self.raw.sha256,
            "quarantined": len(self.quarantined),
        }


def read_examples(recipe: Recipe) -> RawData:
    """Read the recipe's rows.

    Raises:
        DataError: nothing that can be trained on.
        NetworkError: a Hub data set, and no network.
    """
    data = recipe.data
    name, count = sources.parse_slice(data.source)
    if name == CLINIC:
        examples = clinic.generate(CLINIC_ROWS if count is None else count, split="train", seed=CLINIC_SEED)
        return RawData(data.source, _digest(examples), None, examples, [])
    secret = find_secret(SecretName.HUGGING_FACE)
    table = sources.load_rows(
        data.source,
        config=data.config,
        split=data.split,
        revision=data.revision,
        token=secret.value if secret else None,
    )
    built = columns.build_examples(table, {str(name): column for name, column in data.columns.items()})
    return RawData(
        data.source, table.sha256, table.revision, built.examples, list(built.quarantined), list(built.sentences)
    )


def encode_examples(raw: RawData, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Turn examples into rows of tokens, by the recipe's style and its policy for long rows.

    Raises:
        DataError: no row is left.
    """
    options: dict[str, Any] = {
        "style": prompt.Style(recipe.prompt.style),
        "tokenizer": tokenizer,
        "train_on_prompt": recipe.train.train_on_prompt,
    }
    encoded = checks.encode_rows(
        raw.examples,
        functools.partial(_encode, **options),
        max_tokens=recipe.model.max_seq_length,
        over_length=recipe.data.over_length.value,
        truncate=functools.partial(_shorten, **options),
        num_proc=recipe.data.num_proc,
    )
    sentences = list(raw.sentences)
    if encoded.num_truncated:
        sentences.append(f"{encoded.num_truncated} rows had the middle of their reasoning taken out to fit.")
    return TrainingData(raw, encoded.rows, raw.quarantined + encoded.quarantined, sentences)


def load_test_problems(source: str) -> list[Example]:
    """Return the graded problems that an evaluation source names.

    Raises:
        RecipeError: not a set this version can grade.
    """
    name, count = sources.parse_slice(source)
    if name != CLINIC:
        raise RecipeError(
            f"evaluate.source is '{source}'",
            f"Graded evaluation knows '{CLINIC}', with a slice such as '{CLINIC}[:100]'",
            "Use it, or set evaluate.source=null for none",
        )
    return clinic.generate(count or 100, split="test", seed=CLINIC_SEED)


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
    micro_batch, memory = _choose_split(stage, predict, mean_tokens, budget_gb, precision=precision, fast=fast)
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


def _choose_split(
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

    Args:
        wanted: the recipe's number.
        shape: the model's sizes.
        precision: how the weights are held.
        row_tokens: longest prompt and answer together.
        device: where the cache lies.
    """
    bytes_per_value = 4 if precision == "fp32" else 2
    row_bytes = 2 * shape.num_layers * shape.kv_heads * shape.head_dim * bytes_per_value * row_tokens
    room_gb = free_memory_gb(device) * MEMORY_SHARE - weight_gb(shape, precision)
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


def _encode(example: Example, *, style: prompt.Style, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool) -> Row:
    return prompt.encode_row(example, style, tokenizer, train_on_prompt=train_on_prompt)


def _shorten(
    example: Example, max_tokens: int, *, style: prompt.Style, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool
) -> Row:
    return prompt.truncate_think(example, style, tokenizer, train_on_prompt=train_on_prompt, max_tokens=max_tokens)


def _digest(examples: Sequence[Example]) -> str:
    """sha256 of generated problems, as canonical JSON, so that two runs can be seen to have had the same."""
    if not examples:
        raise DataError("0 problems were asked for", "Training needs at least one", "Raise the slice in data.source")
    lines = (json.dumps([e.id, e.question, e.reasoning, e.response], ensure_ascii=False) for e in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
