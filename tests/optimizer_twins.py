"""What the flat 8-bit AdamW is held against, on a CPU and on CUDA alike: bitsandbytes' own, tensor by tensor."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medcot.quiet import quiet_libraries
from medcot.train.optimizer import FlatAdamW8bit
from twins import randn

# Multiples of 256: then no block of a scale has weights of two tensors.
SHAPES = [(16, 32), (64, 16), (16, 16), (48, 16)]


def make_parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, device: str = "cpu") -> list[Tensor]:
    return [torch.nn.Parameter(randn(*shape, seed=i).to(device)) for i, shape in enumerate(shapes)]


def give_gradients(parameters: Sequence[Tensor], step: int) -> None:
    """Gradients of very different sizes, some of them zero, anew for each step."""
    for index, parameter in enumerate(parameters):
        gradient = randn(*parameter.shape, seed=100 * step + index) * 10.0 ** (index - 2)
        gradient[: 1 + step % 2] = 0
        parameter.grad = gradient.to(parameter.device)


def build_bitsandbytes(parameters: Sequence[Tensor], **settings: Any) -> Any:
    with quiet_libraries():
        from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, min_8bit_size=256, **settings)  # it keeps smaller tensors' moments in 32 bit


def assert_equals_bitsandbytes(device: str, steps: int = 5, **settings: Any) -> None:
    """Bit for bit, step by step; the learning rate falls on the way, as a schedule has it."""
    ours, theirs = make_parameters(device=device), make_parameters(device=device)
    before = [p.detach().clone() for p in ours]
    optimizers = FlatAdamW8bit(ours, **settings), build_bitsandbytes(theirs, **settings)
    for step in range(1, steps + 1):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(parameters, step)
            for group in optimizer.param_groups:
                group["lr"] = settings["lr"] / step
            optimizer.step()
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)), step
    assert all(not torch.equal(one, other) for one, other in zip(ours, before, strict=True))


def assert_a_loaded_state_goes_on(device: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
    """Three steps, the state through torch's own file format, three more: the bits of six steps."""
    import io

    settings: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01}
    whole, cut = make_parameters(shapes, device), make_parameters(shapes, device)
    first, second = FlatAdamW8bit(whole, **settings), FlatAdamW8bit(cut, **settings)
    for step in (1, 2, 3):
        for parameters, optimizer in ((whole, first), (cut, second)):
            give_gradients(parameters, step)
            optimizer.step()
    file = io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in cut]
    third = FlatAdamW8bit(resumed, lr=1.0)
    third.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    kinds = {name: value.dtype for name, value in _tensors(first).items()}
    assert {name: value.dtype for name, value in _tensors(third).items()} == kinds
    assert {value.device.type for value in _tensors(third).values()} == {device}
    assert third.param_groups[0]["lr"] == 1e-2
    kept = copy.deepcopy(second.state_dict()["state"])
    for step in (4, 5, 6):
        for parameters, optimizer in ((whole, first), (resumed, third)):
            give_gradients(parameters, step)
            optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(resumed, whole, strict=True))
    ends, wanted = _tensors(third), _tensors(first)
    assert all(torch.equal(ends[name], wanted[name]) for name in wanted)
    assert all(torch.equal(value, kept[0][name]) for name, value in _tensors(second).items())  # the saved one's own


def _tensors(optimizer: FlatAdamW8bit) -> dict[str, Tensor]:
    (state,) = optimizer.state.values()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
