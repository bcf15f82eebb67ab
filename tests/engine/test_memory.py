"""The memory prediction against counted weights, bytes that the layers really keep, and peaks that were measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from medcot.engine import attention, engine_of
from medcot.engine.memory import (
    SMALLEST,
    Keep,
    Memory,
    activation_bytes_per_token,
    adapter_params,
    predict_peak_gb,
    weight_gb,
)
from medcot.shapes import DISTILLS, EMBEDDED_SHAPE, compute_shape
from tiny_models import build_base, build_model, flatten, make_rows, pair

SMALL, LARGE = EMBEDDED_SHAPE, DISTILLS["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
USUAL: dict[str, Any] = {"tokens": 4096, "rank": 16}
# The embedded model's proportions at a quarter of its width.
QUARTER = {
    "hidden_size": 144,
    "intermediate_size": 384,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
}
GOOD_TO = 0.05  # the thin low-rank factors and the norms' scales are left out


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"tokens": 2048}, {"tokens": 4096}),
        ({"rank": 8}, {"rank": 16}),
        ({"memory": Memory(Keep.LEAN)}, {"memory": Memory(Keep.ALL)}),
        ({"memory": Memory(Keep.INPUT)}, {"memory": Memory(Keep.LEAN)}),
        ({"memory": Memory(Keep.HOST)}, {"memory": Memory(Keep.INPUT)}),
        ({"tokens": 65536, "memory": SMALLEST}, {"tokens": 65536, "memory": Memory(Keep.HOST, None, 512)}),
        ({"fast": True}, {"fast": False}),
        ({"on_cpu": False}, {"on_cpu": True}),
        ({"tokens": 1, "rank": 1}, {"tokens": 2, "rank": 1}),
    ],
)
@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16", "fp16", "fp32"])
def test_more_of_anything_needs_more(precision: str, less: dict[str, Any], more: dict[str, Any]) -> None:
    for shape in (SMALL, LARGE):
        assert predict_peak_gb(shape, precision, **USUAL | less) < predict_peak_gb(shape, precision, **USUAL | more)


def test_precisions_and_models_in_order() -> None:
    needs = [predict_peak_gb(LARGE, precision, **USUAL) for precision in ("nf4", "int8", "bf16", "fp32")]
    assert needs == sorted(needs)
    assert predict_peak_gb(LARGE, "bf16", **USUAL) == predict_peak_gb(LARGE, "fp16", **USUAL)
    assert predict_peak_gb(SMALL, "bf16", **USUAL) < predict_peak_gb(LARGE, "nf4", **USUAL)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_adapter_and_weights_are_counted_exactly(family: str) -> None:
    model = build_model(family)
    base = build_base(family)
    shape = compute_shape(base.config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_params(shape, 4) == trainable
    num_params = sum(p.numel() for p in base.parameters())
    assert weight_gb(shape, "fp32") * 2**30 == pytest.approx(4 * num_params)
    assert weight_gb(shape, "bf16") * 2**30 == pytest.approx(2 * num_params)


def tensors_in(thing: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a trace holds, whatever it is wrapped in; tables that all layers share are the layout's."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from tensors_in(part)
    elif hasattr(thing, "__dict__") and not isinstance(thing, attention.Layout):
        yield from tensors_in(list(vars(thing).values()))


def kept_bytes(model: Any, lengths: list[int], keep: Keep) -> int:
    """Bytes of all tensors that the layers keep for the backward pass, each storage once."""
    engine = engine_of(model)
    assert engine is not None
    ids, _, lengths = flatten(make_rows(lengths))
    final = engine.hidden_states(ids, lengths, memory=Memory(keep))
    node: Any = final.grad_fn
    while not hasattr(node, "traces"):
        (node,) = [parent for parent, _ in node.next_functions]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(node.traces)}
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [Keep.ALL, Keep.LEAN, Keep.INPUT])
@pytest.mark.parametrize("lengths", [[16] * 40, [96] * 8])
def test_activations_are_those_that_the_layers_keep(
    lengths: list[int], keep: Keep, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KEEP_PROBABILITIES", 0)  # the portable path's own, reckoned apart
    model, _ = pair(build_model("llama", dtype, num_hidden_layers=4, **QUARTER))
    shape = compute_shape(model.get_base_model().config)
    predicted = sum(lengths) * activation_bytes_per_token(shape, dtype.itemsize, keep)
    assert kept_bytes(model, lengths, keep) == pytest.approx(predicted, rel=GOOD_TO)


# GiB at the peak of training steps on an H200: Llama 8B's shape, rank 16, real rows of 790 tokens; bench/gpu_sft.py.
MEASURED = [
    ("nf4", 7000, Memory(Keep.ALL, unpacked=True), 42.54),
    ("nf4", 7000, Memory(Keep.INPUT), 9.19),
    ("nf4", 13_400, Memory(Keep.INPUT), 12.12),
    ("bf16", 7000, Memory(Keep.ALL), 39.19),
    ("bf16", 16_800, Memory(Keep.ALL), 74.31),
    ("fp8", 7000, Memory(Keep.ALL), 40.18),
    ("fp8", 26_500, Memory(Keep.ALL), 105.59),
]


@pytest.mark.parametrize(("precision", "tokens", "memory", "measured"), MEASURED)
def test_predictions_are_within_a_tenth_of_what_was_measured(
    precision: str, tokens: int, memory: Memory, measured: float
) -> None:
    assert predict_peak_gb(LARGE, precision, tokens=tokens, rank=16, memory=memory) == pytest.approx(measured, rel=0.1)
