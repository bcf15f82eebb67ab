"""What ``--dry-run`` prints: the resolved recipe, the plan in numbers, and one row as the model will see it.

The model's weights are not loaded: sizes come from its configuration, and only the tokenizer is read. The row's spans
are coloured by whether they carry loss, because that is the thing most often wrong in a fine-tune and hardest to see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from medcot import planning, prompt
from medcot.diagnosis import Tools
from medcot.engine.memory import Keep
from medcot.recipe import Recipe, dump_recipe
from medcot.treatment import check_left, examine_rows, examine_texts, run_items, treat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from medcot.records import Row
    from medcot.shapes import Shape
    from medcot.train.progress import RunConsole
    from medcot.train.sft import Plan

# Rates of matrix products, FLOP/s, to guess a duration from. The CPU's are those of Zen 4 cores; Hopper's is what a
# whole step of an 8B model reached on an H200; those of older GPUs are guesses by generation, and called so.
CPU_FLOPS_PER_CORE = {"bf16": 2.0e11, "fp32": 3.5e10}
GPU_FLOPS = {9: 4.0e14, 8: 7.0e13, 7: 2.0e13}  # by compute capability: Hopper, Ampere and Ada, Volta and Turing


def print_plan(recipe: Recipe, screen: RunConsole) -> None:
    """Print recipe, plan and one row.

    Raises:
        MedcotError: what would stop the run itself before its weights are loaded.
    """
    from medcot.model import load_tokenizer
    from medcot.precision import choose_device, choose_precision
    from medcot.weights import model_shape

    console = screen.console
    console.print(Syntax(dump_recipe(recipe).strip(), "yaml", background_color="default"))
    raw = planning.read_examples(recipe)
    problems = planning.list_problems(planning.load_tasks(recipe.evaluate))
    stage = recipe.model
    tokenizer = load_tokenizer(
        stage.source,
        precision=stage.precision.value,
        revision=stage.revision,
        allow_pickle=stage.allow_pickle,
        trust_remote_code=stage.trust_remote_code,
    )
    shape = model_shape(stage.source, revision=stage.revision, trust_remote_code=stage.trust_remote_code)
    device = choose_device()
    precision, _, note = choose_precision(stage.precision.value, device)
    tools = Tools(tokenizer, prompt.Style(recipe.prompt.style), run_items(recipe, problems))
    treated = treat(raw, recipe, tools.items)
    diagnosis = examine_texts(raw, treated, recipe, tools)
    check_left(raw, treated)
    data = planning.encode_examples(treated.raw, recipe, tokenizer)
    diagnosis = diagnosis.joined(examine_rows(data, recipe, tokenizer))
    plan, memory_gb = planning.build_plan(recipe, data.rows, shape, precision, device, fast=recipe.train.accelerate)
    console.print()
    for sentence in [*data.sentences, *([note] if note else [])]:
        screen.note(sentence)
    for finding in diagnosis.findings:
        if finding.severity != "info":
            screen.warn(f"{finding.severity} {finding.id}: {finding.says}")
    if data.quarantined:
        screen.warn(f"{len(data.quarantined)} rows would be set aside; row {data.quarantined[0].row_number}: "
                    f"{data.quarantined[0].reason}")  # fmt: skip
    console.print(_tabulate(data, plan, shape, precision, device, memory_gb))
    console.print()
    console.print(_colour_row(data.rows[0], tokenizer))


# What is forgotten to save memory, in words.
KEPT = {
    Keep.LEAN: "norms and products recomputed",
    Keep.INPUT: "activations recomputed",
    Keep.HOST: "activations recomputed from inputs in host memory",
}


def _tabulate(
    data: planning.TrainingData, plan: Plan, shape: Shape, precision: str, device: torch.device, memory_gb: float
) -> Table:
    facts = data.facts()
    tokens = planning.tokens_of_run(data.rows, plan)
    free_gb = planning.free_memory_gb(device)
    split = plan.batch_size // plan.micro_batch_size
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("rows", f"{facts['rows']:,} of {facts['tokens']:,} tokens, {facts['trained_tokens']:,} with loss")
    table.add_row("steps", f"{plan.num_steps:,} of {plan.batch_size} rows" + (f" in {split} forwards" * (split > 1)))
    table.add_row("tokens", f"{tokens:,} in all")
    table.add_row("model", f"{shape.num_params / 1e6:,.0f} M parameters in {precision} on {device.type}")
    table.add_row("memory", f"about {memory_gb:.1f} GiB at the peak, of {free_gb:.1f} GiB"
                  + (f", {KEPT[plan.memory.keep]}" if plan.memory.keep in KEPT else "")
                  + (", 4-bit weights kept unpacked" if plan.memory.unpacked else ""))  # fmt: skip
    table.add_row("training", f"roughly {guess_seconds(shape, tokens, precision, device) / 60:.1f} minutes")
    return table


def guess_seconds(shape: Shape, tokens: int, precision: str, device: torch.device) -> float:
    """A guess at the training time: 4 FLOP a weight and token (forward, and back to the inputs), at a known rate."""
    import torch

    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        rate = GPU_FLOPS[max(known for known in GPU_FLOPS if known <= max(major, 7))]
    else:
        rate = CPU_FLOPS_PER_CORE.get(precision, CPU_FLOPS_PER_CORE["fp32"]) * torch.get_num_threads()
    return 4 * shape.num_params * tokens / rate / 0.7  # 0.7: what is left to products of the whole step


def _colour_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> Text:
    text = Text.assemble(("one row ", "bold"), ("carries loss", "green"), " ", ("carries none", "dim"), "\n")
    for span in prompt.decode_spans(row, tokenizer):
        text.append(span.text, "green" if span.has_loss else "dim")
    return text
