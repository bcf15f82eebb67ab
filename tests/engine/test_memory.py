"""The memory prediction against counted weights and against the bytes that autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medcot.engine import attention, engine_of
from medcot.engine.memory import activation_bytes_per_token, adapter_params, predict_peak_gb, weight_gb
from medcot.shapes import DISTILLS, EMBEDDED_SHAPE, compute_shape
from tiny_models import build_base, build_model, flatten, make_rows, pair

SMALL, LARGE = EMBEDDED_SHAPE, DISTILLS["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
USUAL: dict[str, Any] = {"tokens": 4096, "rank": 16, "recompute": False}
# The embedded model's proportions at a quarter of its width.
QUARTER = {
    "hidden_size": 144,
    "intermediate_size": 384,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
}
GOOD_TO = 0.25  # what the formula promises


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"tokens": 2048}, {"tokens": 4096}),
        ({"rank": 8}, {"rank": 16}),
        ({"recompute": True}, {"recompute": False}),
        ({"fast": True}, {"fast": False}),
        ({"on_cpu": False}, {"on_cpu": True}),
        ({"tokens": 1, "rank": 1, "recompute": True}, {"tokens": 2, "rank": 1, "recompute": True}),
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


def kept_bytes(model: Any, lengths: list[int], *, recompute: bool) -> int:
    """Bytes of all tensors saved for the backward pass, each storage once, the model's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    engine = engine_of(model)
    assert engine is not None
    ids, labels, lengths = flatten(make_rows(lengths))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = engine.summed_loss(ids, labels, lengths, recompute=recompute)
        assert loss.requires_grad  # and so the graph, with every kept tensor, is alive while they are counted
        return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layers", "lengths", "recompute"), [(4, [16] * 40, False), (4, [96] * 8, False), (12, [96] * 8, True)]
)
def test_activations_are_those_that_autograd_keeps(
    layers: int, lengths: list[int], recompute: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if max(lengths) > 16:
        monkeypatch.setattr(attention, "KEEP_PROBABILITIES", 0)  # longer rows at this width would keep mostly those
    model, _ = pair(build_model("llama", dtype, num_hidden_layers=layers, **QUARTER))
    shape = compute_shape(model.get_base_model().config)
    predicted = sum(lengths) * activation_bytes_per_token(shape, dtype.itemsize, recompute=recompute)
    assert kept_bytes(model, lengths, recompute=recompute) == pytest.approx(predicted, rel=GOOD_TO)
