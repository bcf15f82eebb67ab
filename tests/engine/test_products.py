"""Products that decode with one base at once hold its weights dense once."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from medcot.engine.products import Product


class Packed:
    """A frozen weight that is not stored dense; counts how often it is unpacked."""

    out_features = (6,)

    def __init__(self) -> None:
        self.weight_ND, self.num_unpacked = torch.randn(6, 4), 0

    def dense(self) -> Tensor:
        self.num_unpacked += 1
        return self.weight_ND.clone()

    def open(self) -> object:
        raise NotImplementedError


class Group:
    """A projection without adapters."""

    def __init__(self, weight: Packed) -> None:
        self.weight, self.bias_N, self.parts = weight, None, [torch.nn.Linear(4, 6)]

    def adapters(self) -> list[object]:
        return []


def decode_twice(weight: Packed, group: Group) -> None:
    x_TD = torch.randn(3, 4)
    first = Product(group, torch.float32)
    assert first.dense_bytes == 6 * 4 * 4
    first.keep_dense()
    second, other = Product(group, torch.float32), Product(group, torch.float64)
    assert second.dense_bytes == 0
    assert other.dense_bytes == 6 * 4 * 8, "another dtype is another matrix"
    one_TN, other_TN = first(x_TD), second(x_TD)
    assert torch.equal(one_TN, other_TN)
    assert torch.allclose(one_TN, x_TD @ weight.weight_ND.T)
    assert weight.num_unpacked == 1


def test_weights_made_dense_are_shared_while_somebody_holds_them() -> None:
    # The first product of a process imports bitsandbytes, whose logged error keeps the frames that it came through.
    Product(Group(Packed()), torch.float32)
    weight = Packed()
    group = Group(weight)
    decode_twice(weight, group)
    gc.collect()
    assert Product(group, torch.float32).dense_bytes == 6 * 4 * 4, "nobody holds them any more"
