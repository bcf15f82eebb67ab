"""Where FP8's error comes from: each rounding alone, and all together, on the CPU, in emulation.

An FP8 step rounds four things: the layers' frozen weights, the inputs of their products, the gradients of their
outputs, and the same three at the head. Here the engine runs in float32 on the embedded model, its products' operands
rounded as one variant says and multiplied exactly, so that nothing but the named rounding differs from float32. The
sums' own rounding (``use_fast_accum``) is not emulated: it is the GPU's.

For each variant, on real rows:

- the loss of the untuned model, against float32's: what rounding costs before any training;
- how far the gradient of the adapters is off, as a share of its length, and the share of the loss's first-order fall
  that a signed step along it keeps, ``Σ sign(ĝ)·g / Σ|g|``: Adam's first steps are signed steps, so this says how much
  slower training becomes;
- the fall of the loss that such a step by the exact gradient makes, as the variant's own forward sees it.

``--train`` takes the first steps of a training run instead, of a few variants from the same adapter, and shows how far
each one's loss is from float32's, step by step.

    python bench/fp8_error.py ROWS.jsonl --save
    python bench/fp8_error.py ROWS.jsonl --train 12 --num-rows 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from medcot import engine, model, planning
from medcot.data.packing import flatten_rows
from medcot.engine.frozen import DenseMatrix, FrozenWeight
from medcot.engine.loss import token_loss
from medcot.machine import describe_machine
from medcot.recipe import load_recipe
from results import format_table, save_result

RATE = 2e-4
BLOCK = 128
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}

Rounding = Callable[[Tensor], Tensor]


def exact(x_RC: Tensor) -> Tensor:
    """As it is."""
    return x_RC


def _round(x: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.where(largest > 1e-30, largest / LARGEST[dtype], 1.0)
    return (x / scale).to(dtype).float() * scale


def by_row(x_RC: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """A scale for each row, as the engine has it."""
    return _round(x_RC, x_RC.abs().amax(1, keepdim=True), dtype)


def by_row_e5m2(x_RC: Tensor) -> Tensor:
    """The same in e5m2: two bits of fraction, more range."""
    return by_row(x_RC, torch.float8_e5m2)


def by_tensor(x_RC: Tensor) -> Tensor:
    """One scale."""
    return _round(x_RC, x_RC.abs().amax(), torch.float8_e4m3fn)


def by_block(x_RC: Tensor) -> Tensor:
    """A scale for each 128 numbers along the summed axis."""
    rows, columns = x_RC.shape
    blocks = F.pad(x_RC, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    return _round(blocks, blocks.abs().amax(2, keepdim=True), torch.float8_e4m3fn).view(rows, -1)[:, :columns]


@dataclass(frozen=True)
class Variant:
    """What is rounded, and how.

    Attributes:
        weight: of a layer's frozen weight, rows being its outputs.
        input: of a product's input, rows being tokens.
        gradient: of an output's gradient, the weight's scales folded in first.
        head: the head's three likewise; ``None`` leaves them exact.
        spares: places in a layer whose products stay exact, in the order of ``layers.GROUPS``.
        layers: only these layers are rounded; ``None`` for all.
    """

    weight: Rounding = exact
    input: Rounding = exact
    gradient: Rounding = exact
    head: tuple[Rounding, Rounding, Rounding] | None = None
    spares: tuple[int, ...] = ()
    layers: range | None = None


ROWS = (by_row, by_row, by_row)
BLOCKS = (by_block, by_block, by_block)
VARIANTS: dict[str, Variant] = {
    "weights, a scale a row": Variant(weight=by_row),
    "weights, a scale a tensor": Variant(weight=by_tensor),
    "weights, a scale a block": Variant(weight=by_block),
    "inputs, a scale a row": Variant(input=by_row),
    "inputs, a scale a tensor": Variant(input=by_tensor),
    "inputs, a scale a block": Variant(input=by_block),
    "weights and inputs": Variant(by_row, by_row),
    "weights and inputs, blocks": Variant(by_block, by_block),
    "gradients, a scale a row": Variant(gradient=by_row),
    "gradients, a scale a block": Variant(gradient=by_block),
    "gradients in e5m2": Variant(gradient=by_row_e5m2),
    "head": Variant(head=ROWS),
    "head, forward": Variant(head=(by_row, by_row, exact)),
    "head, weights": Variant(head=(by_row, exact, exact)),
    "head, inputs": Variant(head=(exact, by_row, exact)),
    "head, backward": Variant(head=(exact, exact, by_row)),
    "all (default)": Variant(*ROWS, head=ROWS),
    "all but the head (head16)": Variant(*ROWS),
    "all but the logits (head-forward16)": Variant(*ROWS, head=(exact, exact, by_row)),
    "all but gradients (backward16)": Variant(by_row, by_row, head=(by_row, by_row, exact)),
    "all in blocks": Variant(*BLOCKS, head=BLOCKS),
    "all but q/k/v": Variant(*ROWS, head=ROWS, spares=(0,)),
    "all but o": Variant(*ROWS, head=ROWS, spares=(1,)),
    "all but gate/up": Variant(*ROWS, head=ROWS, spares=(2,)),
    "all but down": Variant(*ROWS, head=ROWS, spares=(3,)),
    "all, first ten layers": Variant(*ROWS, layers=range(10)),
    "all, middle ten": Variant(*ROWS, layers=range(10, 20)),
    "all, last ten": Variant(*ROWS, layers=range(20, 30)),
}


class RoundedMatrix:
    """A dense matrix whose products see rounded operands; it is open and shut alike."""

    def __init__(self, weight_ND: Tensor, roundings: tuple[Rounding, Rounding, Rounding]) -> None:
        to_weight, self._to_input, self._to_gradient = roundings
        self.out_features = [len(weight_ND)]
        self._weight_ND = to_weight(weight_ND)
        # The forward's scales are factors of the outputs' gradients before those are rounded.
        self._scale_N = weight_ND.abs().amax(1).clamp_min(1e-30)

    def dense(self) -> Tensor:
        """What the rounded weights stand for."""
        return self._weight_ND

    def open(self) -> RoundedMatrix:
        """Itself."""
        return self

    def multiply(self, x_TD: Tensor, bias_N: Tensor | None) -> Tensor:
        """``x Wᵀ + b``."""
        return F.linear(self._to_input(x_TD), self._weight_ND, bias_N)

    def multiply_back(self, dy_TN: Tensor) -> Tensor:
        """``dy W``."""
        return (self._to_gradient(dy_TN * self._scale_N) / self._scale_N) @ self._weight_ND


class Job:
    """The embedded model in float32 under the engine, a few rows, and an adapter that starts at zero."""

    def __init__(self, rows_file: str, num_rows: int | None) -> None:
        recipe = load_recipe("tutorial-8b", ["model=embedded", f"data.source={rows_file}", "data.config=null"])
        loaded = model.load("embedded", precision="bf16")
        rows = planning.encode_examples(planning.read_examples(recipe), recipe, loaded.tokenizer).rows[:num_rows]
        self.rows = rows
        self.batch = flatten_rows(rows)
        self.tuned = cast(Any, model.attach_lora(loaded).eval().float())
        assert engine.accelerate(self.tuned).fast
        fast = engine.engine_of(self.tuned)
        assert fast is not None
        self.fast = fast
        self.head_VD: Tensor = self.tuned.get_base_model().lm_head.weight.detach()
        self.weights: list[list[FrozenWeight]] = [[p.weight for p in layer.projections] for layer in fast.layers]

    def use(self, variant: Variant) -> None:
        """Round as the variant says from now on."""
        roundings = variant.weight, variant.input, variant.gradient
        for index, (layer, weights) in enumerate(zip(self.fast.layers, self.weights, strict=True)):
            rounded = variant.layers is None or index in variant.layers
            for place, (projection, weight) in enumerate(zip(layer.projections, weights, strict=True)):
                spared = not rounded or place in variant.spares or set(roundings) == {exact}
                projection.weight = weight if spared else RoundedMatrix(weight.dense(), roundings)
        self.head: Any = DenseMatrix(self.head_VD)
        if variant.head is not None:
            self.head = RoundedMatrix(self.head_VD, variant.head)

    def loss(self) -> Tensor:
        """Mean over the trained tokens."""
        ids, labels = self.batch["input_ids"][0], self.batch["labels"][0]
        hidden_TD = self.fast.hidden_states(ids, self.batch["lengths"])
        targets = (labels[1:] != -100).nonzero().flatten()
        return token_loss(hidden_TD[targets], self.head, labels[1:][targets]) / len(targets)

    def gradient(self) -> tuple[float, Tensor]:
        """The loss, and the gradient of every adapter end to end."""
        self.tuned.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        gradients = [p.grad.flatten() for p in self.tuned.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(gradients)

    def step(self, signs: Tensor, rate: float) -> None:
        """Move every adapter weight by a signed step."""
        trained = [p for p in self.tuned.parameters() if p.requires_grad]
        for parameter, sign in zip(trained, signs.split([p.numel() for p in trained]), strict=True):
            parameter.data.add_(sign.view(parameter.shape), alpha=-rate)


def examine(job: Job, name: str, variant: Variant, wanted: tuple[float, float, Tensor, Tensor]) -> list[str]:
    """One line of the table; ``wanted``: float32's loss at zero, after a step, its gradient there, the step's signs."""
    start, stepped, gradient, signs = wanted
    job.use(variant)
    loss, own = job.gradient()
    off = float((own - gradient).norm() / gradient.norm())
    kept = float((own.sign() * gradient).sum() / gradient.abs().sum())
    with torch.no_grad():
        job.step(signs, -RATE)
        before = float(job.loss())
        job.step(signs, RATE)
    fall = (before - loss) / (start - stepped)
    line = [name, f"{before / start - 1:+.2%}", f"{off:.1%}", f"{kept:.1%}", f"{fall:.1%}"]
    print(" | ".join(line), flush=True)
    return line


TRAINED = [
    "float32",
    "all (default)",
    "all but the logits (head-forward16)",
    "all but the head (head16)",
    "all but gradients (backward16)",
]
WARMUP_STEPS, ALL_STEPS = 5, 60  # of the tutorial's learning rate


def train(job: Job, name: str, steps: int, num_rows: int) -> list[float]:
    """The losses of the first steps of the tutorial's training, from a fresh adapter."""
    job.use(VARIANTS.get(name, Variant()))
    trained = [p for p in job.tuned.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
    losses = []
    for step in range(steps):
        share = min((step + 1) / WARMUP_STEPS, (ALL_STEPS - step) / (ALL_STEPS - WARMUP_STEPS))
        optimizer.param_groups[0]["lr"] = RATE * share
        job.batch = flatten_rows(job.rows[step * num_rows : (step + 1) * num_rows])
        losses.append(job.gradient()[0])
        optimizer.step()
    for parameter, value in zip(trained, before, strict=True):
        parameter.data.copy_(value)
    print(f"{name}: {' '.join(f'{loss:.4f}' for loss in losses)}", flush=True)
    return losses


def train_all(job: Job, steps: int, num_rows: int) -> str:
    """A table of the variants' losses by step, relative to float32's."""
    curves = {name: train(job, name, steps, num_rows) for name in TRAINED}
    exact_losses = curves.pop("float32")
    table = []
    for name, losses in curves.items():
        off = [a / b - 1 for a, b in zip(losses, exact_losses, strict=True)]
        table.append([name, f"{off[0]:+.2%}", f"{sum(off) / steps:+.2%}", f"{off[-1]:+.2%}", f"{max(off):+.2%}"])
    return format_table(["rounded", "first step", "mean", "last step", "largest"], table)


def wants(name: str, only: str) -> bool:
    """Whether a variant was asked for."""
    return any(part in name for part in only.split(";"))


def main() -> None:
    """Take float32's figures, then each variant's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="file of rows with question, reasoning and response")
    parser.add_argument("--num-rows", type=int, default=3)
    parser.add_argument("--only", default="", help="variants whose name contains one of these, with semicolons")
    parser.add_argument("--save", action="store_true", help="add the result to bench/RESULTS.md")
    parser.add_argument("--train", type=int, metavar="STEPS", help="train instead, --num-rows a step")
    options = parser.parse_args()
    if options.train:
        job = Job(options.rows, options.train * options.num_rows)
        text = train_all(job, options.train, options.num_rows)
        print(f"\n{describe_machine()}\n\n{text}")
        if options.save:
            save_result("fp8_error", describe_machine(), f"{options.train} steps of {options.num_rows} rows", text)
        return
    job = Job(options.rows, options.num_rows)
    job.use(Variant())
    start, gradient = job.gradient()
    signs = gradient.sign()
    job.step(signs, RATE)
    stepped, gradient = job.gradient()
    wanted = start, stepped, gradient, signs
    print(f"float32: {start:.4f}, after a signed step {stepped:.4f}", flush=True)
    table = [examine(job, name, variant, wanted) for name, variant in VARIANTS.items() if wants(name, options.only)]
    columns = ["rounded", "loss before training", "gradient off by", "fall kept, first order", "fall of a step seen"]
    text = format_table(columns, table)
    print(f"\n{describe_machine()}\n\n{text}")
    if options.save:
        summary = "; ".join(
            f"{line[0]}: loss {line[1]}, gradient off by {line[2]}" for line in table if "all (" in line[0]
        )
        save_result("fp8_error", describe_machine(), summary, text)


if __name__ == "__main__":
    main()
