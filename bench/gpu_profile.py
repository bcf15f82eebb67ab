"""Where a training step's GPU time goes, by kind of kernel: three steady steps of a case of gpu_sft.py.

Only the GPU's own activity is recorded by default: recording the CPU side too would slow the launches down and change
the very thing looked at. A kernel's kind is read from its name by the first expression that matches; names that none
matches are listed, so that the table can be trusted. "Busy" is the time in which at least one kernel ran, over the wall
time of the steps; what is missing is the GPU waiting for the CPU. Thin products (LoRA's, of rank 16 to 48) are told
from the layers' by cuBLAS' tile, which has a side below 100 for them; ``--shapes`` records the CPU side as well and
lists operations by the shapes of their inputs, which is exact.

    python bench/gpu_profile.py MODEL_FOLDER ROWS.jsonl --case tutorial-nf4 --top 40
    python bench/gpu_profile.py MODEL_FOLDER ROWS.jsonl --case fp8-8 --shapes 30
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from gpu_common import synchronise, write_line
from gpu_sft import CASES, build_recipe, hold, train_held
from gpu_table import WHOLE
from medcot.train import sft
from results import format_table

WARMUP, STEPS = 6, 3
UNMATCHED = "other"
# The first that matches a kernel's name. nvjet_ is cuBLAS on Hopper, with a letter an operand: q is FP8, t is bf16.
CLASSES = {
    "memory copies and fills": r"^mem(cpy|set)",
    "attention, backward": r"(flash|fmha|mha).*bwd|attention_backward|^(query|key)_grad_kernel",
    "attention, forward": r"flash|fmha|mha_fwd|attention|^attend_kernel",
    "NF4 unpacking": r"unpack_nf4|dequantize",
    "FP8 quantising": r"quantise_rows|quantize_rows|quantise.*fp8",
    "loss": r"cross_entropy|softmax|nll_loss",
    "norm": r"norm_kernel|norm_grad|rms_?norm|layer_norm",
    "rotary": r"rotat|rope|rotary",
    "SwiGLU": r"swiglu|silu",
    "optimizer, clipping": r"koptimizer|kprecondition|multi_tensor|adam|lpnorm",
    "products, FP8": r"e4m3|e5m2|float8|nvjet_(sm\d+_)?q|scaled_mm",
    "products, thin (LoRA)": (
        r"^thin_|nvjet_(sm\d+_)?[a-z]+_(\d{1,2}x\d+|\d+x\d{1,2})_|splitk|gemv|tilesize(\d{1,2}x\d+|\d+x\d{1,2})(x|_)"
        r"|gemm_\w*?bf16_(\d{1,2}x\d+|\d+x\d{1,2})_"
    ),
    "products, 16-bit": r"nvjet|gemm|cutlass|xmma|aten::(mm|addmm|bmm|matmul|linear)",
    "gathers, embedding": r"index|gather|scatter|embedding",
    "casts, sums, elementwise": r"elementwise|reduce|catarray|copy_|aten::(add|mul|sum|fill|zero|div|cat)",
}
_PATTERNS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in CLASSES.items()}


@dataclass(frozen=True)
class Kernel:
    """One execution on the device, in microseconds."""

    name: str
    start_us: float
    end_us: float

    @property
    def microseconds(self) -> float:
        """How long it ran."""
        return self.end_us - self.start_us


@dataclass
class Window:
    """Records the last steps of a run; give it to ``train`` as ``on_step``."""

    device: torch.device
    shapes: bool
    seconds: float = 0.0
    started_s: float = 0.0
    recorder: profile = field(init=False)

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        sides = [ProfilerActivity.CUDA] if on_gpu else []
        sides += [ProfilerActivity.CPU] if self.shapes or not on_gpu else []
        self.recorder = profile(
            activities=sides,
            schedule=schedule(wait=0, warmup=1, active=STEPS, repeat=1),
            record_shapes=self.shapes,
            acc_events=True,
        )

    def __call__(self, step: int, metrics: sft.Metrics | None) -> None:
        """Start one step early, which the recorder needs to get ready, and stop behind the last."""
        if metrics is not None or step < WARMUP:
            return
        if step == WARMUP:
            self.recorder.start()
            return
        if step == WARMUP + 1:
            synchronise(self.device)
            self.recorder.step()
            self.started_s = time.perf_counter()
        elif step == WARMUP + 1 + STEPS:
            synchronise(self.device)
            self.seconds = time.perf_counter() - self.started_s
            self.recorder.step()
            self.recorder.stop()
        else:
            self.recorder.step()

    def kernels(self) -> list[Kernel]:
        """What ran on the GPU; without one, the CPU's operations that call no other."""
        wanted = DeviceType.CUDA if self.device.type == "cuda" else DeviceType.CPU
        found = []
        for event in self.recorder.events() or []:
            is_step = event.name.startswith("ProfilerStep") or bool(event.is_user_annotation)
            if event.device_type == wanted and not is_step and not event.cpu_children:
                found.append(Kernel(event.name, event.time_range.start, event.time_range.end))
        return found


def classify(name: str) -> str:
    """Return the kind of a kernel."""
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(name)), UNMATCHED)


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start_us):
        total += max(0.0, kernel.end_us - max(kernel.start_us, reached))
        reached = max(reached, kernel.end_us)
    return total


def sum_by(kernels: Sequence[Kernel], keys: Sequence[str]) -> list[tuple[str, float, float]]:
    """Return milliseconds and launches a step by key, largest first; ``keys`` has one for each kernel."""
    times: dict[str, float] = defaultdict(float)
    for kernel, key in zip(kernels, keys, strict=True):
        times[key] += kernel.microseconds / 1000 / STEPS
    counts = Counter(keys)
    return sorted(((key, ms, counts[key] / STEPS) for key, ms in times.items()), key=lambda row: -row[1])


def shorten(name: str, width: int = 110) -> str:
    """Cut a C++ name to fit a line."""
    return name if len(name) <= width else f"{name[: width - 1]}…"


def describe(kernels: Sequence[Kernel], seconds: float, top: int) -> tuple[str, dict[str, Any]]:
    """Return the tables as Markdown, and the figures for a line of JSON."""
    kinds = sum_by(kernels, [classify(kernel.name) for kernel in kernels])
    summed_ms, busy = sum(ms for _, ms, _ in kinds), busy_us(kernels) / 1e6 / seconds
    launches = len(kernels) / STEPS
    rows = [[kind, f"{ms:.2f}", f"{ms / summed_ms:.1%}", f"{count:,.0f}"] for kind, ms, count in kinds]
    rows.append(["**all**", f"{summed_ms:.2f}", "100.0%", f"{launches:,.0f}"])
    text = [
        f"A step takes {seconds / STEPS * 1000:.1f} ms while recorded; the GPU is busy {busy:.1%} of it;"
        f" {launches:,.0f} launches a step.",
        format_table(["kind", "ms a step", "share", "launches"], rows),
    ]
    unmatched = [kernel for kernel in kernels if classify(kernel.name) == UNMATCHED]
    for title, some, number in (("no kind", unmatched, 12), ("all kernels", kernels, top)):
        names = sum_by(some, [kernel.name for kernel in some])[:number]
        if names:
            listed = [[shorten(n), f"{ms:.3f}", f"{count:,.1f}", f"{ms / count * 1000:.1f}"] for n, ms, count in names]
            text.append(format_table([f"kernel ({title})", "ms a step", "launches", "µs each"], listed))
    figures = {
        "value": round(seconds / STEPS * 1000, 2),
        "unit": "ms a step, recorded",
        "busy": round(busy, 4),
        "launches": round(launches),
        "kinds_ms": {kind: round(ms, 3) for kind, ms, _ in kinds},
    }
    return "\n\n".join(text), figures


def build_shapes_table(window: Window, number: int) -> str:
    """Return operations by the shapes of their inputs, with the time of the kernels that they launched themselves."""
    averages = window.recorder.key_averages(group_by_input_shape=True)
    on_gpu = window.device.type == "cuda"
    times = [(e, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000 / STEPS) for e in averages]
    rows = [
        [shorten(e.key, 50), shorten(str(e.input_shapes), 80), f"{ms:.3f}", f"{e.count / STEPS:,.1f}"]
        for e, ms in sorted(times, key=lambda pair: -pair[1])[:number]
        if ms > 0
    ]
    return format_table(["operation", "shapes", "ms a step", "calls"], rows)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("rows", help="file of rows with question, reasoning and response")
    parser.add_argument("--case", required=True, choices=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--batch-size", type=int, help="rows a step, where the case has several (default: its first)")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="list the N longest kernels by name")
    parser.add_argument("--shapes", type=int, default=0, metavar="N", help="list the N longest operations by shapes")
    parser.add_argument("--json", type=Path, help="file that one line is added to")
    return parser.parse_args()


def main() -> None:
    """Record a case and print its tables."""
    options = parse_options()
    case = CASES[options.case]
    num_rows = options.batch_size or case.rows[0]
    recipe = build_recipe(options.model, options.rows, case, num_rows, WARMUP + 1 + STEPS, WARMUP, WHOLE)
    held = hold(recipe, [WHOLE])
    window = Window(held.device, shapes=options.shapes > 0)
    train_held(held, recipe, WHOLE, window)
    text, figures = describe(window.kernels(), window.seconds, options.top)
    print(f"\n{options.case}, {num_rows} rows a step. {text}")
    if options.shapes:
        print(f"\n{build_shapes_table(window, options.shapes)}")
    line = {"figure": f"profile-{options.case}", "system": "medcot", "case": options.case, "rows": num_rows}
    write_line(line | figures, options.json)


if __name__ == "__main__":
    main()
