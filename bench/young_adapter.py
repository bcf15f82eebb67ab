"""How much of a young adapter's effect survives 16-bit arithmetic: plain PEFT, and the engine, against float32.

A LoRA adapter starts at zero, and its first steps add very little to outputs that are 16-bit numbers already. Adding
less than half a unit in the last place to such a number gives the number back, so the contribution is lost, not
rounded; unless the sum goes on in float32, as in the engine's GPU kernels.

The gradient of the loss is taken once, in float32, on the weights as bf16 holds them. All B are then moved against its
sign by a learning rate, which is what Adam's first steps do, and the change of the summed loss of two real rows is
taken three ways. The first order predicts the float32 column.

    python bench/young_adapter.py ROWS.jsonl --save
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F

from medcot import engine, model, planning
from medcot.data.packing import flatten_rows
from medcot.machine import describe_machine
from medcot.recipe import load_recipe
from medcot.records import Row
from results import format_table, save_result

RATES = (4e-5, 2e-4, 1e-3)
NUM_ROWS = 2


def plain_loss(tuned: Any, rows: list[Row]) -> torch.Tensor:
    """Summed cross-entropy by transformers and PEFT, one forward a row, under autocast where the base is in bf16."""
    total = torch.zeros((), device=tuned.device)
    half = tuned.get_base_model().dtype == torch.bfloat16
    with torch.autocast(tuned.device.type, torch.bfloat16, enabled=half):
        for row in rows:
            ids = torch.tensor([row.input_ids], device=tuned.device)
            targets = torch.tensor(row.labels, device=tuned.device)[1:]
            total = total + F.cross_entropy(tuned(input_ids=ids).logits[0, :-1].float(), targets, reduction="sum")
    return total


def engine_loss(tuned: Any, rows: list[Row]) -> torch.Tensor:
    """The same by the engine."""
    fast = engine.engine_of(tuned)
    assert fast is not None
    batch = flatten_rows(rows)
    return fast.summed_loss(batch["input_ids"][0], batch["labels"][0], batch["lengths"])[0]


def move(tuned: Any, signs: dict[str, torch.Tensor], rate: float) -> None:
    """Set every B to one signed step from zero."""
    for name, parameter in tuned.named_parameters():
        if name in signs:
            parameter.data.copy_(signs[name] * -rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="file of rows with question, reasoning and response")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    options = parser.parse_args()
    recipe = load_recipe("tutorial-8b", ["model=embedded", f"data.source={options.rows}", "data.config=null"])
    loaded = model.load("embedded", precision="bf16")
    rows = planning.encode_examples(planning.read_examples(recipe), recipe, loaded.tokenizer).rows[:NUM_ROWS]
    plain = model.attach_lora(loaded).eval()
    exact, fast = copy.deepcopy(plain).float(), copy.deepcopy(plain)
    assert engine.accelerate(fast).fast
    plain_loss(exact, rows).backward()
    signs = {n: p.grad.sign() for n, p in exact.named_parameters() if "lora_B" in n and p.grad is not None}
    ways = {"float32": (exact, plain_loss), "plain bf16": (plain, plain_loss), "engine bf16": (fast, engine_loss)}
    table = []
    with torch.no_grad():
        before = {name: float(loss(tuned, rows)) for name, (tuned, loss) in ways.items()}
        for rate in RATES:
            changes = []
            for name, (tuned, loss) in ways.items():
                move(tuned, signs, rate)
                changes.append(float(loss(tuned, rows)) - before[name])
            table.append([f"{rate:g}", *(f"{change:+.1f}" for change in changes)])
    text = format_table(["one step of", *ways], table)
    print(f"{describe_machine()}\n\n{text}")
    if options.save:
        shares = ", ".join(f"{name} {value}" for name, value in zip(ways, table[1][1:], strict=True))
        save_result("young_adapter", describe_machine(), f"loss after one step of {table[1][0]}: {shares}", text)


if __name__ == "__main__":
    main()
