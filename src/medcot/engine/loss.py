"""Cross-entropy over the trained tokens only, a chunk at a time, without ever holding all logits.

With a vocabulary of 49k to 152k the logits of a batch are its largest tensor, and the plain path makes three copies of
them in float32, for prompt tokens too. Here the hidden states of the tokens that carry loss are gathered first; then
each chunk's logits are made, turned into loss and gradient while they are in cache, and thrown away. The head is
frozen, so the only gradient is that of the hidden states; it is computed in the forward pass, as Liger and Cut
Cross-Entropy do (Hsu et al. 2024, arXiv:2410.10989; Wijmans et al. 2024, arXiv:2411.09009), and scaled in the backward.

With ``p = softmax(h Wᵀ)``: ``loss = Σ (logsumexp - logit of target)`` and ``dh = (p - onehot(target)) W``.

Axes: T trained tokens, B tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medcot.engine.devices import has_triton
from medcot.engine.frozen import DenseMatrix, Matrix

# 160 rows of a 49k vocabulary are 31 MB in float32, which a last-level cache of 32 MB still holds between the passes;
# with 64 rows the products are too thin (337 ms against 297 for 640 tokens on two Zen 4 cores; bench/cpu_ops.py).
CHUNK_TOKENS_CPU = 160
# A GPU wants large products; 2,048 rows of a 128k vocabulary are 0.53 GB of 16-bit logits.
CHUNK_TOKENS_GPU = 2048
# Without Triton the loss works in float32 and makes copies: 10 bytes more a logit.
CHUNK_TOKENS_PORTABLE = 512


class TokenLoss(torch.autograd.Function):
    """Summed cross-entropy of every given token under a frozen head."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head: Matrix, targets_T: Tensor, chunk_tokens: int) -> Tensor:
        """Return the float32 sum; keeps the finished gradient, (T, D)."""
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        d_hidden_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        num_tokens = hidden_TD.shape[0]
        num_chunks = -(-num_tokens // chunk_tokens)
        even = -(-num_tokens // max(num_chunks, 1))  # no thin last chunk: thin products are slow ones
        for start in range(0, num_tokens, max(even, 1)):
            rows = slice(start, start + even)
            loss, gradient_BV = _loss_and_gradient(head.multiply(hidden_TD[rows], None), targets_T[rows])
            total += loss
            if d_hidden_TD is not None:
                d_hidden_TD[rows] = head.multiply_back(gradient_BV.to(hidden_TD.dtype))
        ctx.save_for_backward(d_hidden_TD)
        return total

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Return dh times the gradient of the sum."""
        (d_hidden_TD,) = ctx.saved_tensors
        return d_hidden_TD * d_loss.to(d_hidden_TD.dtype), None, None, None


def _loss_and_gradient(logits_BV: Tensor, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chunk's summed loss and the gradient of its logits, ``softmax - onehot(target)``."""
    if has_triton(logits_BV.device):
        from medcot.engine.launch import cross_entropy_

        return cross_entropy_(logits_BV, targets_B).sum(), logits_BV
    p_BV = logits_BV.float().softmax(-1)
    # logsumexp = logit - log p of any token; the likeliest one's p is at least 1/V, so its logarithm is exact.
    logsumexp_B = logits_BV.amax(-1).float() - p_BV.amax(-1).log()
    loss = (logsumexp_B - logits_BV.gather(1, targets_B[:, None])[:, 0]).sum()
    p_BV[torch.arange(len(p_BV), device=p_BV.device), targets_B] -= 1
    return loss, p_BV


def token_loss(hidden_TD: Tensor, head: Tensor | Matrix, targets_T: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Summed float32 cross-entropy of hidden states against targets, all of which carry loss.

    Args:
        hidden_TD: final hidden states that predict each target, already gathered.
        head: the frozen output embedding, (V, D), or a matrix of ``frozen.py``.
        targets_T: token ids, none of them -100.
        chunk_tokens: tokens whose logits are in memory at a time; ``None`` for what is fast.
    """
    default = CHUNK_TOKENS_CPU if hidden_TD.device.type == "cpu" else CHUNK_TOKENS_GPU
    if hidden_TD.device.type == "cuda" and not has_triton(hidden_TD.device):
        default = CHUNK_TOKENS_PORTABLE
    matrix = DenseMatrix(head) if isinstance(head, Tensor) else head
    return TokenLoss.apply(hidden_TD, matrix, targets_T, chunk_tokens or default)
