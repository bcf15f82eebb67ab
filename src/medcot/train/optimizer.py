"""8-bit AdamW over all adapter weights as one array.

bitsandbytes keeps both moments in 8 bit, in blocks of 256 with a scale each (Dettmers et al. 2022, arXiv:2110.02861),
which for a LoRA adapter of 42M weights is 84 MB instead of 336. Its optimizer updates one tensor at a time: an adapter
of Llama 8B has 448 of them, whose launches keep a GPU waiting for some 20 ms a step. Here the weights are moved into
one block of memory of which the parameters become views, and a step is one launch of the same kernel. Nothing asks the
GPU for a number, so the host runs ahead.

Tensors whose size is no multiple of 256 share blocks with their neighbours; ranks of 16 and more have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # weights that share a scale: bitsandbytes' own


class FlatAdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments; every group's parameters are float32 on one CUDA device.

    Args:
        params: parameters, or groups of them; their storage is replaced.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second.
        weight_decay: decoupled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            if group["params"]:
                self._flatten(group["params"])

    def _flatten(self, parameters: list[Tensor]) -> None:
        """Move the parameters into one array, and make their moments; the first parameter's state holds them."""
        from bitsandbytes.functional import create_dynamic_map

        assert all(p.dtype == torch.float32 for p in parameters), "adapters are trained in float32"
        flat = torch.cat([p.detach().flatten() for p in parameters])
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view(parameter.shape)
        num_blocks = -(-len(flat) // BLOCK)
        self.state[parameters[0]] = {
            "step": 0,  # a number: accelerate would move a tensor to the GPU, and reading it would wait for all it does
            "moment1": torch.zeros_like(flat, dtype=torch.uint8),
            "moment2": torch.zeros_like(flat, dtype=torch.uint8),
            "scale1": torch.zeros(num_blocks, dtype=torch.float32, device=flat.device),
            "scale2": torch.zeros(num_blocks, dtype=torch.float32, device=flat.device),
            "map1": create_dynamic_map(signed=True).to(flat.device),
            "map2": create_dynamic_map(signed=False).to(flat.device),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, and undo the cast that torch makes to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("moment1", "moment2"):
                state[name] = state[name].to(torch.uint8)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every group that has gradients."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        assert closure is None, "the trainer gives none"
        for group in self.param_groups:
            parameters = group["params"]
            if not parameters or all(p.grad is None for p in parameters):
                continue
            state, (beta1, beta2) = self.state[parameters[0]], group["betas"]
            state["step"] += 1
            flat = as_one(parameters)
            optimizer_update_8bit_blockwise(
                "adam", as_one([p.grad for p in parameters]), flat, state["moment1"], state["moment2"],
                beta1, beta2, 0.0, 0.0, group["eps"], state["step"], group["lr"], state["map1"], state["map2"],
                state["scale1"], state["scale2"], group["weight_decay"],
            )  # fmt: skip
            if flat.data_ptr() != parameters[0].data_ptr():  # one has been given new storage: the update is in a copy
                for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                    parameter.copy_(part.view(parameter.shape))


def as_one(tensors: list[Any]) -> Tensor:
    """The tensors end to end: the memory that they already share where they lie so, else a copy."""
    first = tensors[0]
    place = first.data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != place or not tensor.is_contiguous():
            return torch.cat([t.flatten() for t in tensors])
        place += tensor.numel() * tensor.element_size()
    total = sum(tensor.numel() for tensor in tensors)
    if first.untyped_storage().nbytes() < (first.storage_offset() + total) * first.element_size():
        return torch.cat([t.flatten() for t in tensors])  # neighbours by chance, in storages of their own
    return first.detach().as_strided((total,), (1,))
