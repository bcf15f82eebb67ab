"""An 8-bit base on the CPU: PyTorch multiplies float8 there too, slowly, and the rounding is plain torch's.

``interpreted_kernels.py`` holds the kernels' rounding to this one, ``tests/gpu`` the whole on a GPU.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from medcot import engine as engine_package
from medcot.engine import accelerate, engine_of, hold_in_fp8, pointwise
from medcot.engine.frozen import Fp8, Fp8Head, Fp8Weight, choose_fp8
from medcot.engine.memory import FASTEST, SMALLEST, Keep, Memory
from medcot.engine.rounding import multiply_back
from medcot.engine.terms import Rounded
from tiny_models import attach, build_base, flatten, gradients, make_rows, relative
from twins import randn, typical

# A row's own scale, 3 bits of fraction: one rounded operand is off by 0.026, two by 0.037.
FP8_BOUND = 0.05
SIZES: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}}
PIECES = [Memory(Keep.INPUT, tile_tokens=9), Memory(Keep.HOST, tile_tokens=9, one_weight=True), SMALLEST]
MEMORIES = [FASTEST, Memory(Keep.LEAN), Memory(Keep.INPUT), *PIECES]


def hold(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Hold a model in FP8 on the device where it is: the check is of speed, not of what can be computed."""
    monkeypatch.setattr(engine_package, "check_fp8", lambda model_type, device: None)
    hold_in_fp8(model)
    return model


def build_pair(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A model over a base in eight bits and its twin in float32, the same adapter on both, both accelerated."""
    dense = build_base(family, vocab_size=112, **SIZES[family])
    models = attach(hold(copy.deepcopy(dense), monkeypatch)), attach(dense)
    adapter = {name: tensor for name, tensor in models[1].state_dict().items() if "lora_" in name}
    assert not models[0].load_state_dict(adapter, strict=False).unexpected_keys
    assert all(accelerate(model).fast for model in models)
    return models


def run(model: Any, memory: Memory) -> tuple[float, dict[str, torch.Tensor]]:
    fast = engine_of(model)
    assert fast is not None
    loss, _ = fast.summed_loss(*flatten(make_rows([9, 1, 14])), memory=memory)
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("family", SIZES)
def test_a_whole_model_in_eight_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eight, dense = build_pair(family, monkeypatch)
    loss, wanted = run(dense, FASTEST)
    first_loss, first = run(eight, FASTEST)
    assert first_loss == pytest.approx(loss, rel=0.02)
    one, other = (torch.cat([gradient.flatten() for gradient in named.values()]) for named in (first, wanted))
    assert 0.01 < relative(one, other) < 0.25
    for memory in MEMORIES[1:]:  # the same codes, whoever rounds them and when
        again_loss, again = run(eight, memory)
        assert again_loss == pytest.approx(first_loss, rel=1e-6)
        assert max(relative(again[name], first[name]) for name in first) < 2e-3, memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_near_the_dense_ones_and_of_rounded_gradients_the_same(dtype: torch.dtype) -> None:
    weight = Fp8Weight([randn(64, 48), randn(32, 48, seed=1)], dtype)
    x, dy = randn(21, 48, seed=2).to(dtype), randn(21, 96, seed=3).to(dtype)
    bias = randn(96, seed=4).to(dtype)
    for rounded in (None, pointwise.quantise_rows(dy, weight.scale_N)):
        assert torch.equal(multiply_back(weight, dy, rounded), weight.multiply_back(dy))
    dense = torch.cat([randn(64, 48), randn(32, 48, seed=1)])
    assert typical(weight.multiply(x, bias).float(), x.float() @ dense.T + bias.float()) < FP8_BOUND
    assert typical(weight.multiply_back(dy).float(), dy.float() @ dense) < FP8_BOUND


def test_backward_products_in_sixteen_bits() -> None:
    dense, dy = randn(64, 48), randn(21, 64, seed=3)
    weight = Fp8Weight([dense], torch.float32)
    weight.choice = Fp8(backward=False)
    assert torch.equal(weight.multiply_back(dy), dy @ weight.dense())
    with pytest.raises(AssertionError, match="rounds nothing"):
        weight.multiply_back_rounded(pointwise.quantise_rows(dy, weight.scale_N))


def test_forward_products_in_sixteen_bits() -> None:
    x, bias = randn(21, 48, seed=2), randn(64, seed=4)
    weight = Fp8Weight([randn(64, 48)], torch.float32)
    weight.choice = Fp8(forward=False)
    assert torch.equal(weight.multiply(x, bias), torch.nn.functional.linear(x, weight.dense(), bias))


def test_scales_that_begin_anywhere() -> None:
    dy = randn(40, 64, seed=3)
    weight = Fp8Weight([randn(64, 48)], torch.float32)
    codes, scale = pointwise.quantise_rows(dy, weight.scale_N)
    wanted = weight.multiply_back(dy)
    for start in range(5):  # 4 bytes a scale: cuBLAS would refuse all but the first and the last of these
        part = Rounded(codes[start:].contiguous(), scale[start:])
        assert torch.equal(weight.multiply_back_rounded(part), wanted[start:])


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_a_heads_products_are_in_eight_bits_as_chosen(forward: bool, backward: bool) -> None:
    dense, x, dy = randn(64, 48), randn(21, 48, seed=2), randn(21, 64, seed=3)
    head = Fp8Head(dense, torch.float32, Fp8(head_forward=forward, head_backward=backward))
    for exact, got, wanted in (
        (not forward, head.multiply(x, None), x @ dense.T),
        (not backward, head.multiply_back(dy), dy @ dense),
    ):
        assert typical(got, wanted) < (1e-6 if exact else FP8_BOUND)
        assert torch.equal(got, wanted) is exact


def test_a_choice_reaches_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward products in 16 bit bring the gradient nearer to the float32 base's; the loss stays as it was."""
    eight, dense = build_pair("llama", monkeypatch)
    _, wanted = run(dense, FASTEST)
    loss, before = run(eight, FASTEST)
    choose_fp8(eight, Fp8(backward=False))
    again, after = run(eight, FASTEST)
    assert again == pytest.approx(loss, rel=1e-6)
    off = [relative(torch.cat([g.flatten() for g in got.values()]), torch.cat([g.flatten() for g in wanted.values()]))
           for got in (before, after)]  # fmt: skip
    assert off[1] < off[0]


@pytest.mark.parametrize("largest", [0.0, 1e-31, 3.0, 60_000.0])
def test_a_rows_largest_number_becomes_the_largest_code(largest: float) -> None:
    x = torch.linspace(-largest, largest, 33)[None]
    codes, scale = pointwise.quantise_rows(x)
    assert codes.float().isfinite().all()
    if largest < 1e-30:
        assert float(scale) == 1 and not codes.float().any()
    else:
        assert float(codes.float().abs().amax()) == 448
        assert typical(codes.float() * scale, x) < FP8_BOUND


def test_the_loss_goes_through_the_head_as_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    eight, _ = build_pair("llama", monkeypatch)
    fast = engine_of(eight)
    assert fast is not None
    assert isinstance(fast.head, Fp8Head) and fast.head is fast.head
    first, default = run(eight, FASTEST)[0], fast.head
    choose_fp8(eight, Fp8(head_forward=False))
    assert fast.head is not default
    second = run(eight, FASTEST)[0]
    choose_fp8(eight, Fp8(head_forward=False, head_backward=False))
    assert torch.equal(fast.head, eight.get_base_model().lm_head.weight)
    assert run(eight, FASTEST)[0] == pytest.approx(second, rel=1e-6) != first
