"""8-bit AdamW over all adapter weights as one array: bitsandbytes' own, to the bit.

bitsandbytes computes this on a CPU too; ``tests/gpu/test_training_cuda.py`` runs the same comparisons on CUDA.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medcot.quiet import quiet_libraries

with quiet_libraries():
    pytest.importorskip("bitsandbytes")

from medcot.train.optimizer import BLOCK, FlatAdamW8bit, as_one
from optimizer_twins import (
    SHAPES,
    assert_a_loaded_state_goes_on,
    assert_equals_bitsandbytes,
    give_gradients,
    make_parameters,
)
from twins import randn

# --- as_one -----------------------------------------------------------------------------------------------------------


def is_shared(tensors: list[Tensor]) -> bool:
    """Whether ``as_one`` found memory in common; its values are right either way."""
    one = as_one(tensors)
    assert torch.equal(one, torch.cat([tensor.flatten() for tensor in tensors])) and one.dim() == 1
    return one.data_ptr() == tensors[0].data_ptr()


def parts(flat: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]


def test_tensors_end_to_end_are_their_own_memory() -> None:
    flat = randn(40)
    tensors = parts(flat, (4, 5), (2, 4), (12,))
    assert is_shared(tensors)
    as_one(tensors).add_(1)
    assert torch.equal(torch.cat([tensor.flatten() for tensor in tensors]), flat)
    assert is_shared(tensors[1:]) and is_shared(tensors[:1])


def test_tensors_that_end_before_their_storage_does() -> None:
    assert is_shared(parts(randn(100)[7:], (3, 3), (5,)))


def test_a_gap_another_order_or_a_transposed_tensor_is_copied() -> None:
    a, b, c = parts(randn(40), (4, 5), (2, 4), (12,))
    assert not is_shared([a, c])
    assert not is_shared([b, a])
    assert not is_shared([a, a])
    assert not is_shared([b.T, c])
    assert not is_shared([a, b.T, c])
    assert not is_shared([a, b, c.clone()])


def test_neighbours_by_chance_are_copied() -> None:
    """Two storages, the second of which begins where the first one ends."""
    whole = torch.arange(24, dtype=torch.float32).numpy()
    first, second = torch.from_numpy(whole[:12]), torch.from_numpy(whole[12:])
    assert first.data_ptr() + 12 * 4 == second.data_ptr()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert not is_shared([first, second])
    assert not is_shared([first[4:], second])  # an offset into its storage does not hide its end


def test_parameters_need_no_graph() -> None:
    one = as_one([nn.Parameter(part) for part in parts(randn(9), (4,), (5,))])
    assert not one.requires_grad


# --- the optimizer ----------------------------------------------------------------------------------------------------


def build(parameters: Any, **settings: Any) -> FlatAdamW8bit:
    return FlatAdamW8bit(parameters, **{"lr": 1e-2, **settings})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_five_steps_are_those_of_bitsandbytes(weight_decay: float, betas: tuple[float, float]) -> None:
    assert_equals_bitsandbytes("cpu", lr=1e-2, weight_decay=weight_decay, betas=betas)


def test_parameters_become_views_of_one_array_with_the_same_values() -> None:
    parameters = make_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    build(parameters)
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))
    assert as_one(parameters).data_ptr() == parameters[0].data_ptr()
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize(
    "shapes", [SHAPES, [(5, 7), (3, 100), (1, 1), (64, 16)]], ids=["whole blocks", "shared blocks"]
)
def test_a_loaded_state_goes_on_as_if_never_saved(shapes: list[tuple[int, int]]) -> None:
    assert_a_loaded_state_goes_on("cpu", shapes)


def test_weight_decay_is_decoupled() -> None:
    """It shrinks a weight by lr times itself and leaves the moments alone."""
    plain, decayed = make_parameters(), make_parameters()
    optimizers = build(plain, weight_decay=0.0), build(decayed, weight_decay=0.1)
    start = [p.detach().clone() for p in plain]
    for parameters, optimizer in zip((plain, decayed), optimizers, strict=True):
        give_gradients(parameters, 1)
        optimizer.step()
    for one, other, weight in zip(plain, decayed, start, strict=True):
        # Before or after the moments' own step of at most lr, which is a matter of 1e-5.
        assert float((one - other - 0.1 * 1e-2 * weight).detach().abs().max()) < 1.1e-5
    states = [next(iter(optimizer.state.values())) for optimizer in optimizers]
    assert torch.equal(states[0]["moment1"], states[1]["moment1"])


@pytest.mark.parametrize(
    "shapes", [SHAPES, [(5, 7), (3, 100), (1, 1), (64, 16)]], ids=["whole blocks", "shared blocks"]
)
def test_it_is_adamw_up_to_eight_bits(shapes: list[tuple[int, int]]) -> None:
    """Against torch's AdamW in float32; tensors of odd sizes share blocks with their neighbours."""
    ours, exact = make_parameters(shapes), make_parameters(shapes)
    optimizers = build(ours, weight_decay=0.1), torch.optim.AdamW(exact, lr=1e-2, weight_decay=0.1)
    for step in range(1, 6):
        for parameters, optimizer in zip((ours, exact), optimizers, strict=True):
            for index, parameter in enumerate(parameters):
                parameter.grad = randn(*parameter.shape, seed=100 * step + index)
            optimizer.step()
    start = torch.cat([p.detach().flatten() for p in make_parameters(shapes)])
    moved, wanted = (torch.cat([p.detach().flatten() for p in group]) - start for group in (ours, exact))
    assert float((moved - wanted).norm() / wanted.norm()) < 0.1


def test_groups_have_settings_of_their_own_and_those_without_gradients_stay() -> None:
    one, two, three = make_parameters(SHAPES[:3])
    optimizer = build([{"params": [one], "lr": 0.0}, {"params": [two]}, {"params": [three]}])
    before = [p.detach().clone() for p in (one, two, three)]
    give_gradients([one, two], 1)
    optimizer.step()
    assert torch.equal(one, before[0]) and not torch.equal(two, before[1]) and torch.equal(three, before[2])
    assert [optimizer.state[p]["step"] for p in (one, two, three)] == [1, 1, 0]


def test_gradients_of_one_block_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = make_parameters()
    optimizer = build(parameters)
    block = randn(sum(p.numel() for p in parameters))
    for parameter, part in zip(parameters, block.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view(parameter.shape)
    monkeypatch.setattr(torch, "cat", pytest.fail)
    optimizer.step()


def test_a_parameter_with_new_storage_is_still_trained() -> None:
    """Whoever loads an adapter by assignment takes a parameter out of the array."""
    moved, twin = make_parameters(), make_parameters()
    optimizers = build(moved), build(twin)
    moved[1].data = moved[1].data.clone()
    for step in (1, 2):
        for parameters, optimizer in zip((moved, twin), optimizers, strict=True):
            give_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(moved, twin, strict=True))


def test_only_float32_adapters() -> None:
    with pytest.raises(AssertionError, match="float32"):
        build([nn.Parameter(randn(16, 16).bfloat16())])


def test_blocks_are_bitsandbytes_own() -> None:
    parameters = make_parameters([(16, 16), (3, 5)])
    (state,) = build(parameters).state.values()
    assert BLOCK == 256 and len(state["scale1"]) == len(state["scale2"]) == 2 and len(state["moment1"]) == 271
