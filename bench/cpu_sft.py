"""Training throughput on the CPU: medcot against plain transformers + PEFT + TRL, real tokens per second.

Same rows in the same order, same LoRA, same optimizer, same labels (reasoning, answer and EOS), same rows a forward,
same process. What is plain is what someone would write with those libraries' documentation and no tricks: TRL's
SFTTrainer with its own padding collator. TRL 1.15's own loss is a Triton kernel and does not run on a CPU, so
``compute_loss`` is transformers' own: the model's loss over its logits. The plain side may choose how it is set up.
Each way is tried first and the fastest is the baseline (``--variants`` names the ways to try):

- ``TRL's defaults``: 16-bit weights under TRL's own bf16 autocast, activations recomputed, as SFTConfig sets it; the
  other three have recomputation switched off by hand;
- ``bf16 weights``: 16-bit weights under TRL's own bf16 autocast, which is what TRL does unless told otherwise;
- ``autocast``: float32 weights under bf16 autocast;
- ``all bf16``: weights and adapters in bf16 without autocast; an update below 1/256 of a weight is lost.

``head on trained`` is the fastest of the three with five more lines, which give the output head the trained tokens
only, as TRL's kernel does on a GPU. It is no longer plain, so it is never the baseline, but it shows what the loss
alone is worth.

The two sides take turns, each time from freshly loaded weights, because a machine's speed drifts more within ten
minutes than the figure should; the result is the median of the rounds' ratios. The first steps of each turn are warm-up
and are not counted. Padding is not counted either: each side counts the tokens of its rows itself, and the counts must
be equal at every step. The last column is the mean loss of the counted steps: equal but for rounding, or the two sides
did not do the same work.

    python bench/cpu_sft.py --save
    python bench/cpu_sft.py --rows my.jsonl --save        # real rows, in the tutorial's style
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from medcot import clinic, engine, model
from medcot.data import columns, sources
from medcot.data.packing import build_dataset
from medcot.embedded import convert_embedded
from medcot.machine import describe_machine, list_versions
from medcot.prompt import Style, encode_row
from medcot.quiet import quiet_libraries
from medcot.records import Row
from medcot.train import sft
from results import format_table, save_result

SEED = 3407
LEARNING_RATE = 2e-4
RANK = 16
WARMUP_STEPS = 2  # not counted: allocators grow, kernels are chosen
LIBRARIES = ("torch", "transformers", "peft", "trl")
AS_IT_COMES = "TRL's defaults"
VARIANTS = {
    AS_IT_COMES: torch.bfloat16,
    "bf16 weights": torch.bfloat16,
    "autocast": torch.float32,
    "all bf16": torch.bfloat16,
}
OURS = "medcot"
TRAINED_ONLY = "head on trained"


@dataclass(frozen=True)
class Turn:
    """One side's turn: when each step ended (s), and what each side's own log said of it."""

    ends_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # since the start, without padding

    @property
    def rate(self) -> float:
        """Real tokens per second over the counted steps."""
        before = WARMUP_STEPS - 1
        return (self.tokens[-1] - self.tokens[before]) / (self.ends_s[-1] - self.ends_s[before])

    @property
    def loss(self) -> float:
        """Mean loss of the counted steps."""
        return statistics.mean(self.losses[WARMUP_STEPS:])


class PlainTrainer(SFTTrainer):
    """TRL's trainer with a loss that a CPU can compute."""

    def __init__(self, *args: Any, trained_only: bool, **kwargs: Any) -> None:
        self.trained_only = trained_only
        self.num_tokens = 0
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Count the tokens that are not padding, and return the model's own loss, or that of the trained tokens."""
        self.num_tokens += int(inputs["attention_mask"].sum())
        if not self.trained_only:
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        assert num_items_in_batch is not None
        causal_lm, labels = model.get_base_model(), inputs.pop("labels")[:, 1:]
        hidden = causal_lm.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        mask = labels != -100
        logits = causal_lm.lm_head(hidden[mask]).float()
        return F.cross_entropy(logits, labels[mask], reduction="sum") / num_items_in_batch


class _Clock(TrainerCallback):
    """Fills a turn from a plain trainer."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.trainer: PlainTrainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time and the tokens."""
        self.turn.ends_s.append(time.perf_counter())
        self.turn.tokens.append(self.trainer.num_tokens)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Note the loss; the closing summary has none."""
        if logs and "loss" in logs:
            self.turn.losses.append(float(logs["loss"]))


def run_plain(
    rows: Sequence[Row], variant: str, *, trained_only: bool, batch_size: int, num_steps: int, folder: Path
) -> Turn:
    """Train with plain transformers, PEFT and TRL."""
    from peft import LoraConfig, get_peft_model  # here, where bitsandbytes' advice at import is silenced

    dtype = VARIANTS[variant]
    pure = variant == "all bf16"
    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(convert_embedded(torch.bfloat16), dtype=dtype)
    adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(model.SEVEN_PROJECTIONS), task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, adapter, autocast_adapter_dtype=not pure)
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=num_steps,
        learning_rate=LEARNING_RATE,
        warmup_steps=1,
        weight_decay=0.01,
        seed=SEED,
        use_cpu=True,
        bf16=not pure,
        gradient_checkpointing=variant == AS_IT_COMES,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    clock = _Clock(Turn())
    trainer = PlainTrainer(
        trained_only=trained_only,
        model=peft_model,
        args=config,
        train_dataset=build_dataset(rows),
        processing_class=model.load_tokenizer("embedded", precision="bf16"),
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.turn


def run_medcot(rows: Sequence[Row], *, batch_size: int, num_steps: int, folder: Path) -> Turn:
    """Train with medcot's own step."""
    loaded = model.load("embedded", precision="bf16", device="cpu")
    tuned = model.attach_lora(loaded, r=RANK, alpha=RANK, seed=SEED)
    explanation = engine.accelerate(tuned)
    assert explanation.fast, explanation.reason
    plan = sft.Plan(
        num_steps=num_steps,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        warmup_steps=1,
        learning_rate=LEARNING_RATE,
        logging_steps=1,
        seed=SEED,
    )
    turn = Turn()

    def on_step(step: int, metrics: sft.Metrics | None) -> None:
        if metrics is None:
            turn.ends_s.append(time.perf_counter())
        else:
            turn.losses.append(metrics.loss)
            turn.tokens.append(metrics.tokens)

    sft.train(tuned, loaded.tokenizer, rows, plan, folder, on_step=on_step)
    return turn


def take_turn(side: str, rows: Sequence[Row], *, batch_size: int, num_steps: int, trained_only: bool = False) -> Turn:
    """Run medcot or a plain variant from freshly loaded weights, and let go of them."""
    settings = {"batch_size": batch_size, "num_steps": num_steps}
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        if side == OURS:
            turn = run_medcot(rows, folder=Path(folder), **settings)
        else:
            turn = run_plain(rows, side, trained_only=trained_only, folder=Path(folder), **settings)
    gc.collect()
    return turn


def build_rows(path: Path | None, num_rows: int) -> tuple[list[Row], str]:
    """Return the rows of a file in the tutorial's style, or of builtin:clinic in style short, and their name."""
    tokenizer = model.load_tokenizer("embedded", precision="bf16")
    if path is None:
        examples = clinic.generate(num_rows, split="train", seed=SEED)
        style, name = Style.SHORT, "builtin:clinic, style short"
    else:
        examples = columns.build_examples(sources.load_rows(str(path)), {}).examples
        style, name = Style.TUTORIAL, f"{path.name}, style tutorial"
    # A short file is gone through again; both sides do.
    chosen = list(itertools.islice(itertools.cycle(examples), num_rows))
    return [encode_row(example, style, tokenizer, train_on_prompt=False) for example in chosen], name


def main() -> None:
    """Probe the plain variants, let the two sides take turns, and print the table."""
    options = parse_options()
    num_steps, batch_size = WARMUP_STEPS + options.steps, options.batch_size
    rows, name = build_rows(options.rows, num_steps * batch_size)
    settings = {"batch_size": batch_size, "num_steps": num_steps}
    probes = {}
    for variant in options.variants:
        probes[variant] = take_turn(variant, rows, **settings).rate
        print(f"probe  {variant:<16}{probes[variant]:8.0f} tok/s", flush=True)
    baseline = max(probes, key=probes.__getitem__)
    probes[TRAINED_ONLY] = take_turn(baseline, rows, trained_only=True, **settings).rate
    print(f"probe  {TRAINED_ONLY:<16}{probes[TRAINED_ONLY]:8.0f} tok/s", flush=True)
    turns: list[tuple[Turn, Turn]] = []
    for number in range(options.rounds):
        plain, ours = (take_turn(side, rows, **settings) for side in (baseline, OURS))
        assert plain.tokens == ours.tokens, "the two sides took different rows, or counted them differently"
        turns.append((plain, ours))
        ratio = ours.rate / plain.rate
        print(f"round {number + 1}  plain {plain.rate:.0f}, medcot {ours.rate:.0f}: {ratio:.2f}x", flush=True)
    details, result = describe(name, rows, probes, baseline, turns, options)
    print(f"\n{describe_machine()}\n\n{details}")
    if options.save:
        save_result("cpu_sft", describe_machine(), result, details)


def describe(
    name: str,
    rows: Sequence[Row],
    probes: dict[str, float],
    baseline: str,
    turns: Sequence[tuple[Turn, Turn]],
    options: argparse.Namespace,
) -> tuple[str, str]:
    """Return the printed text as Markdown, and the result in a few words."""
    plain, ours = ([turn.rate for turn in side] for side in zip(*turns, strict=True))
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    ratio = statistics.median(ratios)

    def row(label: str, rates: Sequence[float], side: int) -> list[str]:
        spread = f"{min(rates):.0f} to {max(rates):.0f}"
        return [label, f"{statistics.median(rates):.0f}", spread, f"{turns[0][side].loss:.4f}"]

    table = format_table(
        ["system", "tok/s", "range", "loss"],
        [row(f"transformers + PEFT + TRL ({baseline})", plain, 0), row("medcot", ours, 1)],
    )
    found = list_versions()
    versions = ", ".join(f"{library} {found[library]}" for library in LIBRARIES)
    lengths = [r.num_tokens for r in rows]
    trained = sum(r.num_trained_tokens for r in rows) / sum(lengths)
    text = (
        f"Rows: {name}; {min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}, {trained:.0%} of"
        f" them trained. SmolLM2-135M in bf16, LoRA r={RANK}, {options.batch_size} rows a step, {options.steps} counted"
        f" steps a turn, {len(turns)} rounds, {torch.get_num_threads()} threads.\n"
        f"Python {platform.python_version()}, {versions}.\n\n{table}\n\n"
        f"Ratio of each round: {', '.join(f'{r:.2f}' for r in ratios)}; median **{ratio:.2f}x**. Plain variants, probed"
        f" once: {', '.join(f'{variant} {rate:.0f} tok/s' for variant, rate in probes.items())}."
    )
    result = f"{ratio:.2f}x: {statistics.median(ours):.0f} against {statistics.median(plain):.0f} tok/s, on {name}"
    return text, result


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, help="file of real rows; style tutorial (default: builtin:clinic)")
    parser.add_argument("--steps", type=int, default=6, help="counted steps a turn, after 2 of warm-up")
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step, in one forward on both sides")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
