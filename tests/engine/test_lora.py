"""Groups of LoRA projections over a frozen base, through ``Projection``, against ``reference.lora_linear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medcot.engine import reference
from medcot.engine.lora import Projection
from twins import assert_twins, largest, randn

INPUTS = 24
# Outputs of the projections that share an input.
GROUPS = [[16], [32, 16, 16], [40, 40], [33, 7]]


def build_group(
    outputs: Sequence[int], *, bias: bool, dtype: torch.dtype = torch.float32, adapted: bool = True, **lora: Any
) -> list[nn.Module]:
    """PEFT's own layers, with a B that is not zero."""
    from peft import LoraConfig, inject_adapter_in_model

    with torch.random.fork_rng():
        torch.manual_seed(3)
        holder: nn.Module = nn.ModuleDict({f"p{i}": nn.Linear(INPUTS, n, bias=bias) for i, n in enumerate(outputs)})
        holder.to(dtype).requires_grad_(False)
        if adapted:
            config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [f"p{i}" for i in range(3)]} | lora)
            holder = inject_adapter_in_model(config, holder)
            for name, parameter in holder.named_parameters():
                if "lora_" in name:  # an adapter is trained in float32 over any base
                    parameter.data = torch.randn(parameter.shape) * 0.3
    return [holder.get_submodule(f"p{i}") for i in range(len(outputs))]


def weights_of(parts: Sequence[Any]) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The fused base and its bias, copied, and ``A₁, B₁, A₂, …``."""
    bases = [part.base_layer for part in parts]
    bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases]).clone()
    adapters = [getattr(part, name)["default"].weight for part in parts for name in ("lora_A", "lora_B")]
    return torch.cat([base.weight for base in bases]).clone(), bias, adapters


def compare(parts: Sequence[Any], dtype: torch.dtype, num_tokens: int) -> None:
    weight, bias, adapters = weights_of(parts)
    projection, scale = Projection(parts, dtype), parts[0].scaling["default"]
    slots = [(part, name) for part in parts for name in ("lora_A", "lora_B")]

    def fast(x: Tensor, *pairs: Tensor) -> Tensor:
        for (part, name), tensor in zip(slots, pairs, strict=True):
            pair = getattr(part, name)["default"]
            del pair.weight
            pair.weight = tensor  # a plain tensor, so that the gradient is seen where the comparison looks
        return projection(x)

    def twin(x: Tensor, *pairs: Tensor) -> Tensor:
        base, offset = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return reference.lora_linear(x, base, offset, pairs[0::2], pairs[1::2], scale)

    tensors = [randn(num_tokens, INPUTS), *(adapter.detach().clone() for adapter in adapters)]
    assert_twins(fast, twin, tensors, dtype, masters=len(adapters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize("outputs", GROUPS)
def test_against_the_twin(outputs: list[int], num_tokens: int, bias: bool, dtype: torch.dtype) -> None:
    compare(build_group(outputs, bias=bias, dtype=dtype), dtype, num_tokens)


def test_ranks_may_differ_where_the_scale_does_not() -> None:
    parts = build_group([32, 16, 16], bias=False, rank_pattern={"p1": 8}, alpha_pattern={"p1": 12})
    assert parts[1].lora_A["default"].weight.shape[0] == 8 and parts[1].scaling == parts[0].scaling
    compare(parts, torch.float32, 19)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_equals_pefts_own_forward(bias: bool) -> None:
    parts = build_group([32, 16, 16], bias=bias)
    x = randn(11, INPUTS)
    wanted = torch.cat([part(x) for part in parts], -1)
    projection = Projection(parts, torch.float32)
    assert largest(projection(x), wanted) < 1e-6
    assert largest(projection.bind(torch.float32)(x), wanted) < 1e-6
    assert largest(torch.cat([part(x) for part in parts], -1), wanted) < 1e-6  # PEFT sees the same weights as before


def test_adapters_switched_off_leave_the_base() -> None:
    parts: list[Any] = build_group([32, 16, 16], bias=True)
    weight, bias, _ = weights_of(parts)
    projection = Projection(parts, torch.float32)
    for part in parts:
        part.enable_adapters(False)
    assert_twins(projection, lambda x: nn.functional.linear(x, weight, bias), [randn(9, INPUTS)], torch.float32)
    x = randn(9, INPUTS)
    with torch.no_grad():
        assert torch.equal(projection.bind(torch.float32)(x), projection(x))
    for part in parts:
        part.enable_adapters(True)
    assert not torch.equal(projection(x), nn.functional.linear(x, weight, bias))


def test_a_bare_base_passes_gradients_through() -> None:
    parts: list[Any] = build_group([16, 8], bias=False, adapted=False)
    weight = torch.cat([part.weight for part in parts]).clone()
    projection = Projection(parts, torch.float32)
    assert_twins(projection, lambda x: x @ weight.T, [randn(9, INPUTS)], torch.float32)


def test_parameters_become_views_of_one_matrix_with_the_same_values() -> None:
    parts: list[Any] = build_group([32, 16, 16], bias=True)
    before = [(part.base_layer.weight.clone(), part.base_layer.bias.clone()) for part in parts]
    Projection(parts, torch.float32)
    assert len({part.base_layer.weight.untyped_storage().data_ptr() for part in parts}) == 1
    for part, (weight, bias) in zip(parts, before, strict=True):
        assert torch.equal(part.base_layer.weight, weight) and torch.equal(part.base_layer.bias, bias)
        assert isinstance(part.base_layer.weight, nn.Parameter)
