"""Groups of LoRA projections over a frozen base, through ``Projection``, against ``reference.lora_linear``."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medcot.engine import reference
from medcot.engine.frozen import Fp8Linear
from medcot.engine.layers import LayerPairs
from medcot.engine.lora import Adapter, Projection, cast_adapters, plain_reason
from medcot.engine.stack import GradientBlock
from medcot.train.optimizer import as_one
from twins import assert_twins, largest, projection_pair, randn

INPUTS = 24
CPU = torch.device("cpu")
BF16 = torch.bfloat16
# The second projection's rank is 8, the others' 4; the scale is one.
UNEQUAL_RANKS: dict[str, Any] = {"rank_pattern": {"p1": 8}, "alpha_pattern": {"p1": 12}}
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

    def twin(x: Tensor, *pairs: Tensor) -> Tensor:
        base, offset = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return reference.lora_linear(x, base, offset, pairs[0::2], pairs[1::2], scale)

    tensors = [randn(num_tokens, INPUTS), *(adapter.detach().clone() for adapter in adapters)]
    assert_twins(projection_pair(projection, scale), twin, tensors, dtype, masters=len(adapters))


def project(projection: Projection, x: Tensor) -> Tensor:
    """The group's outputs with the adapters that PEFT has switched on now, through the term."""
    (pairs,) = cast_adapters([projection.adapters()], x.dtype, x.device)
    y, u, term = projection.project(x, pairs, projection.weight.open())
    assert (u is None) == (pairs is None) and (term is None or pairs is not None)
    if term is not None:
        term.add_to(y)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize("outputs", GROUPS)
def test_against_the_twin(outputs: list[int], num_tokens: int, bias: bool, dtype: torch.dtype) -> None:
    compare(build_group(outputs, bias=bias, dtype=dtype), dtype, num_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_ranks_may_differ_where_the_scale_does_not(num_tokens: int, bias: bool, dtype: torch.dtype) -> None:
    parts: list[Any] = build_group([32, 16, 16], bias=bias, dtype=dtype, **UNEQUAL_RANKS)
    assert parts[1].lora_A["default"].weight.shape[0] == 8 and parts[1].scaling == parts[0].scaling
    compare(parts, dtype, num_tokens)


@pytest.mark.parametrize("scale", [1.0, 0.25, 2.0])
def test_a_rank_of_sixteen_and_scales_of_either_side_of_one(scale: float) -> None:
    parts: list[Any] = build_group([32, 16, 16], bias=False, r=16, lora_alpha=16 * scale)
    assert parts[0].scaling["default"] == scale
    compare(parts, torch.float32, 19)
    compare(build_group([32, 16, 16], bias=False, dtype=torch.bfloat16, r=16, lora_alpha=16 * scale), BF16, 19)


@pytest.mark.parametrize("lora", [{}, UNEQUAL_RANKS], ids=["equal ranks", "unequal ranks"])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_equals_pefts_own_forward(bias: bool, lora: dict[str, Any]) -> None:
    parts = build_group([32, 16, 16], bias=bias, **lora)
    x = randn(11, INPUTS)
    wanted = torch.cat([part(x) for part in parts], -1)
    assert largest(project(Projection(parts, torch.float32), x), wanted) < 1e-6
    assert largest(torch.cat([part(x) for part in parts], -1), wanted) < 1e-6  # PEFT sees the same weights as before


def test_adapters_switched_off_leave_the_base() -> None:
    parts: list[Any] = build_group([32, 16, 16], bias=True)
    weight, bias, _ = weights_of(parts)
    projection = Projection(parts, torch.float32)
    for part in parts:
        part.enable_adapters(False)
    assert projection.adapters() == []
    off = projection_pair(projection, 1.5, adapted=False)
    assert_twins(off, lambda x: nn.functional.linear(x, weight, bias), [randn(9, INPUTS)], torch.float32)
    x = randn(9, INPUTS)
    assert torch.equal(project(projection, x), nn.functional.linear(x, weight, bias))
    for part in parts:
        part.enable_adapters(True)
    assert largest(project(projection, x).detach(), nn.functional.linear(x, weight, bias)) > 0.1


def test_a_bare_base_passes_gradients_through() -> None:
    parts: list[Any] = build_group([16, 8], bias=False, adapted=False)
    weight = torch.cat([part.weight for part in parts]).clone()
    bare = projection_pair(Projection(parts, torch.float32), 1.5, adapted=False)
    assert_twins(bare, lambda x: x @ weight.T, [randn(9, INPUTS)], torch.float32)


def test_the_adapters_are_pefts_own_tensors() -> None:
    parts: list[Any] = build_group([32, 16, 16], bias=False)
    adapters = Projection(parts, torch.float32).adapters()
    for part, adapter in zip(parts, adapters, strict=True):
        assert adapter.A is part.lora_A["default"].weight and adapter.B is part.lora_B["default"].weight
        assert adapter.scale == 1.5


# --- the cast of all adapters at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_every_adapter_is_cast_into_one_block(scale: float, dtype: torch.dtype) -> None:
    def adapter(inputs: int, outputs: int, rank: int, seed: int) -> Adapter:
        return Adapter(randn(rank, inputs, seed=seed), randn(outputs, rank, seed=seed + 1), scale)

    groups = [
        [adapter(8, 6, 4, 0), adapter(8, 10, 4, 2)],
        [],  # switched off
        [adapter(16, 5, 3, 4), adapter(16, 7, 2, 6)],  # ranks differ
        [adapter(5, 9, 4, 8)],
    ]
    before = [(a.A.clone(), a.B.clone()) for group in groups for a in group]
    cast = cast_adapters(groups, dtype, torch.device("cpu"))
    assert [pairs is None for pairs in cast] == [False, True, False, False]
    for group, pairs in zip(groups, cast, strict=True):
        if pairs is None:
            continue
        assert pairs.scale == scale and pairs.A_RD.dtype == dtype
        assert torch.equal(pairs.A_RD, torch.cat([a.A for a in group]).to(dtype))
        for B, own in zip(pairs.Bs, group, strict=True):
            assert torch.equal(B, (own.B * scale).to(dtype))  # scaled first, rounded once
        equal_ranks = len({a.B.shape[1] for a in group}) == 1
        assert (pairs.stacked_Nr is not None) is equal_ranks
        if pairs.stacked_Nr is not None:
            assert torch.equal(pairs.stacked_Nr, torch.cat(list(pairs.Bs)))
    whole = [pairs for pairs in cast if pairs is not None]
    assert len({tensor.untyped_storage().data_ptr() for pairs in whole for tensor in (pairs.A_RD, *pairs.Bs)}) == 1
    after = [(a.A, a.B) for group in groups for a in group]
    assert all(
        torch.equal(x, y) for one, other in zip(before, after, strict=True) for x, y in zip(one, other, strict=True)
    )


def test_no_adapter_at_all_is_cast_to_nothing() -> None:
    assert cast_adapters([[], []], torch.float32, torch.device("cpu")) == [None, None]


def test_gradients_come_in_one_block_filled_from_its_end() -> None:
    adapters = [randn(4, 6), randn(5, 4), randn(4, 5), randn(3, 4), randn(2, 6), randn(7, 2)]
    block = GradientBlock(adapters)
    pairs = cast_adapters([[Adapter(adapters[i], adapters[i + 1], 3.0)] for i in (0, 2, 4)], torch.float32, CPU)
    given = [randn(*adapter.shape, seed=50 + i) for i, adapter in enumerate(adapters)]
    block.put(given[2:], LayerPairs(pairs[1], None, pairs[2], None))  # the last layer comes first
    block.put([], LayerPairs(None, None, None, None))  # a layer without adapters
    block.put(given[:2], LayerPairs(None, pairs[0], None, None))
    for i, (part, gradient) in enumerate(zip(block.parts, given, strict=True)):
        assert largest(part, gradient * (3.0 if i % 2 else 1.0)) < 1e-6
    assert as_one(block.parts).data_ptr() == block.parts[0].data_ptr()


# --- the base ---------------------------------------------------------------------------------------------------------


def test_parameters_become_views_of_one_matrix_with_the_same_values() -> None:
    parts: list[Any] = build_group([32, 16, 16], bias=True)
    before = [(part.base_layer.weight.clone(), part.base_layer.bias.clone()) for part in parts]
    Projection(parts, torch.float32)
    assert len({part.base_layer.weight.untyped_storage().data_ptr() for part in parts}) == 1
    for part, (weight, bias) in zip(parts, before, strict=True):
        assert torch.equal(part.base_layer.weight, weight) and torch.equal(part.base_layer.bias, bias)
        assert isinstance(part.base_layer.weight, nn.Parameter)


def test_a_parameter_given_new_storage_is_fused_anew() -> None:
    """As a safe merge of PEFT's does."""
    parts: list[Any] = build_group([32, 16], bias=False)
    projection = Projection(parts, torch.float32)
    parts[1].base_layer.weight.data = parts[1].base_layer.weight.data + 1
    wanted = torch.cat([part.base_layer.weight for part in parts])
    assert torch.equal(projection.weight.dense(), wanted)
    assert projection.weight.dense().data_ptr() == parts[0].base_layer.weight.data_ptr()


def build_fp8(bias: bool) -> tuple[nn.ModuleDict, Tensor]:
    """Two 8-bit layers of one group without what it takes to build a group: a GPU; and the weights they stand for."""
    rows = randn(24, INPUTS).mul(100).to(torch.float8_e4m3fn)
    scale = 0.01 + randn(24, seed=1).abs()
    group: Any = SimpleNamespace(rows_ND=rows, scale_N=scale, in_features=INPUTS, out_features=[16, 8])
    biases = [nn.Parameter(randn(n, seed=2), requires_grad=False) if bias else None for n in (16, 8)]
    layers = {f"p{i}": Fp8Linear(group, i, own) for i, own in enumerate(biases)}
    return nn.ModuleDict(layers), rows.float() * scale[:, None]


@pytest.mark.parametrize("bias", [False, True])
def test_the_plain_model_runs_on_eight_bits(bias: bool) -> None:
    holder, dense = build_fp8(bias)
    x = randn(9, INPUTS)
    for (_, layer), weight in zip(holder.items(), dense.split([16, 8]), strict=True):
        assert largest(layer(x), nn.functional.linear(x, weight, layer.bias)) < 1e-6
        assert layer.weight.untyped_storage().data_ptr() == layer.group.rows_ND.untyped_storage().data_ptr()
    assert sorted(holder.state_dict()) == sorted(name for i in range(2) for name in names_of(i, bias))


def names_of(index: int, bias: bool) -> list[str]:
    return [f"p{index}.weight", f"p{index}.bias"] if bias else [f"p{index}.weight"]


def test_an_adapter_over_eight_bits_starts_as_over_float32_and_cannot_be_merged() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    starts = []
    for holder in (build_fp8(False)[0], nn.ModuleDict({f"p{i}": nn.Linear(INPUTS, n) for i, n in enumerate((16, 8))})):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            inject_adapter_in_model(LoraConfig(r=4, target_modules=["p0", "p1"]), holder)
        starts.append([holder.get_submodule(f"p{i}.lora_A.default").weight for i in range(2)])
        assert plain_reason([holder["p0"], holder["p1"]]) in (None, "its base weights are being trained")
    assert all(torch.equal(one, other) for one, other in zip(*starts, strict=True))
    holder, _ = build_fp8(False)
    layer: Any = inject_adapter_in_model(LoraConfig(r=4, target_modules=["p0"], init_lora_weights=False), holder).p0
    before = layer.base_layer.weight.clone()
    with pytest.raises(RuntimeError):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, before)
