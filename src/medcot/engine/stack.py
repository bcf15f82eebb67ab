"""All decoder layers as one differentiable function, which decides what stays in memory between forward and backward.

Autograd sees a single node: hidden states and adapters in, normed hidden states out. Inside, the layers run one after
another (``layers.py``), each leaving a ``Trace``; backward takes the traces from the end, frees each as soon as its
layer is done, and returns all adapters' gradients together. Where the layers' inputs live on the host
(``Keep.HOST``), they are copied there on a stream of their own while the next layer computes, and fetched one layer
ahead of their use, so that the GPU holds two of them at a time.

A double backward is not defined, and a second backward through one forward finds its traces gone; both raise.

Axes: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medcot.engine.layers import FastLayer, LayerPairs, Step, Trace
from medcot.engine.rounding import Gradient, norm_grad_for


class DecoderStack(torch.autograd.Function):
    """Every layer and the last norm, (T, D) to (T, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        layers: Sequence[FastLayer],
        norm: Any,
        pairs: Sequence[LayerPairs],
        step: Step,
        host: HostStore | None,
        *adapters: Tensor,
    ) -> Tensor:
        """Run the layers.

        Args:
            ctx: autograd's.
            hidden_TD: embeddings.
            layers: the layers in order.
            norm: the decoder's last norm.
            pairs: each layer's adapters, cast.
            step: what the layers share.
            host: where ``Keep.HOST`` puts the layers' inputs.
            *adapters: the adapters' own tensors, layer by layer, in the order of their gradients.
        """
        x_TD, y_TD, term = hidden_TD, None, None
        traces: list[Trace] = []
        needed = any(ctx.needs_input_grad)
        ctx.forward_number = host.begin() if host is not None and needed else 0
        for index, (layer, own) in enumerate(zip(layers, pairs, strict=True)):
            x_TD, y_TD, term, trace = layer.forward(x_TD, y_TD, term, own, step)
            if needed:
                if host is not None:
                    host.put(index, trace.x_TD)
                    del trace.x_TD
                traces.append(trace)
            del trace
        sum_TD, normed_TD, r_T = step.ops.add_norm(x_TD, y_TD, term, norm.weight, norm.variance_epsilon)
        if needed:
            ctx.traces, ctx.last = traces, (sum_TD, r_T)
        ctx.layers, ctx.norm, ctx.pairs, ctx.step, ctx.host = layers, norm, pairs, step, host
        ctx.adapters = adapters
        return normed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of the embeddings and of every adapter."""
        if ctx.traces is None:
            raise RuntimeError("a second backward through one forward of an accelerated model: run the forward again")
        traces, (sum_TD, r_T) = ctx.traces, ctx.last
        ctx.traces = ctx.last = None
        step, host = ctx.step, ctx.host
        d: Gradient | None = norm_grad_for(
            ctx.layers[-1].down.weight, d_normed_TD.contiguous(), None, sum_TD, ctx.norm.weight, r_T, None, step.ops
        )
        del sum_TD, d_normed_TD
        gradients = GradientBlock(ctx.adapters)
        for index in reversed(range(len(ctx.layers))):
            trace = traces.pop()
            if host is not None:
                trace.x_TD = host.take(index, ctx.forward_number)
            assert d is not None
            wants_dx = index > 0 or ctx.needs_input_grad[0]
            below = ctx.layers[index - 1] if index > 0 else None
            d, own = ctx.layers[index].backward(trace, d, ctx.pairs[index], step, below, wants_dx=wants_dx)
            gradients.put([g for group in own for g in group], ctx.pairs[index])
        return None if d is None else d.d_TD, None, None, None, None, None, *gradients.parts


class GradientBlock:
    """All adapters' gradients in one block of memory, filled from its end; the adapters' own dtype.

    One block, because hundreds of casts would be hundreds of launches, and because an optimizer that works on all
    weights at once (``train/optimizer.py``) then finds their gradients as it wants them.
    """

    def __init__(self, adapters: Sequence[Tensor]) -> None:
        sizes = [adapter.numel() for adapter in adapters]
        kinds = {(adapter.dtype, adapter.device) for adapter in adapters}
        if len(kinds) == 1:
            parts = adapters[0].new_empty(sum(sizes)).split(sizes)
            self.parts = [part.view(a.shape) for part, a in zip(parts, adapters, strict=True)]
        else:
            self.parts = [torch.empty_like(adapter) for adapter in adapters]
        self._end = len(self.parts)

    def put(self, gradients: list[Tensor], pairs: LayerPairs) -> None:
        """Take a layer's gradients, B's still to be multiplied by their group's scale."""
        start = self._end - len(gradients)
        places = self.parts[start : self._end]
        self._end = start
        if not gradients:
            return
        torch._foreach_copy_(places, gradients)
        for own in pairs:
            if own is None:
                continue
            if own.scale != 1:
                torch._foreach_mul_(places[1 : 2 * len(own.Bs) : 2], own.scale)
            places = places[2 * len(own.Bs) :]


class HostStore:
    """The layers' inputs in pinned host memory.

    The buffers are kept from step to step, because pinning 2 GiB takes 0.9 s; they grow when a longer batch comes.
    Copies go both ways on one stream beside the computing one, 55 GB/s on an H200's host. On a machine without CUDA the
    store keeps plain copies, so that what uses it can be tested there.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[int, Tensor] = {}
        self._shapes: dict[int, torch.Size] = {}
        self._ahead: dict[int, tuple[Tensor, Any]] = {}
        self._forward = 0  # which forward the buffers belong to
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self) -> int:
        """Give the buffers to a new forward, whose number is to be shown when they are read."""
        self._ahead.clear()  # what a backward that failed had fetched
        self._forward += 1
        return self._forward

    def put(self, index: int, x_TD: Tensor) -> None:
        """Copy a layer's input to the host; the tensor may be forgotten at once."""
        buffer = self._buffer(index, x_TD)
        if self._stream is None:
            buffer.copy_(x_TD)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(x_TD, non_blocking=True)
        x_TD.record_stream(self._stream)

    def take(self, index: int, forward: int) -> Tensor:
        """Return a layer's input, back on the device, and start fetching the one before it.

        Raises:
            RuntimeError: another forward has begun since, and has taken the buffers.
        """
        if forward != self._forward:
            raise RuntimeError(
                "the backward of a forward whose layers' inputs on the host are gone: with Keep.HOST each forward's"
                " backward comes before the next forward"
            )
        if index not in self._ahead:
            self._fetch(index)
        x_TD, done = self._ahead.pop(index)
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
            x_TD.record_stream(torch.cuda.current_stream(self.device))
        if index > 0:
            self._fetch(index - 1)
        return x_TD

    def _fetch(self, index: int) -> None:
        shape = self._shapes[index]
        buffer = self._buffers[index][: shape.numel()].view(shape)
        if self._stream is None:
            self._ahead[index] = (buffer.clone(), None)
            return
        # What is freed now may be given to the new tensor: the copy must not begin before its last use has ended.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            x_TD = buffer.to(self.device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        self._ahead[index] = (x_TD, done)

    def _buffer(self, index: int, x_TD: Tensor) -> Tensor:
        known = self._buffers.get(index)
        if known is None or known.numel() < x_TD.numel() or known.dtype != x_TD.dtype:
            self._buffers[index] = torch.empty(x_TD.numel(), dtype=x_TD.dtype, pin_memory=self._stream is not None)
        self._shapes[index] = x_TD.shape
        return self._buffers[index][: x_TD.numel()].view(x_TD.shape)
