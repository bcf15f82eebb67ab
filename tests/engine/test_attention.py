"""Attention over rows laid end to end: against its twin, and what a token may not see.

The twin computes in float32 whatever it is given. The measure of a bfloat16 error is therefore transformers' eager
attention, which rounds the scores to bfloat16 as plain matrix products do.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from medcot.engine import attention as module
from medcot.engine import reference
from twins import assert_twins, attention_pair, randn

CHANNELS = 8
LENGTHS = [[1], [1, 1, 1], [5, 1, 9], [16, 32], [47, 2, 1, 30], [100, 3]]
HEADS = [(2, 2), (6, 2), (4, 1)]  # query heads and key heads: ratios 1, 3 and 4


def fast(lengths: list[int], num_kv: int, window: int | None = None) -> Callable[[Tensor], Tensor]:
    return attention_pair(module.build_layout(lengths, torch.device("cpu")), num_kv, window)


def twin(lengths: list[int], num_kv: int, window: int | None = None) -> Callable[[Tensor], Tensor]:
    def run(fused: Tensor) -> Tensor:
        q, k, v = fused.split([fused.shape[1] - 2 * num_kv, num_kv, num_kv], 1)
        return reference.attention(q, k, v, lengths, window)

    return run


def eager(lengths: list[int], num_kv: int, window: int | None = None) -> Callable[[Tensor], Tensor]:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def run(fused: Tensor) -> Tensor:
        outputs = []
        for row in fused.split(lengths):
            heads = row.transpose(0, 1)[None]
            q, k, v = heads.split([heads.shape[1] - 2 * num_kv, num_kv, num_kv], 1)
            seen = torch.ones(len(row), len(row), dtype=torch.bool).tril()
            seen = seen if window is None else seen.triu(1 - window)
            mask = torch.zeros(seen.shape, dtype=row.dtype).masked_fill(~seen, torch.finfo(row.dtype).min)[None, None]
            llama = SimpleNamespace(num_key_value_groups=q.shape[1] // num_kv, training=False)
            outputs.append(eager_attention_forward(llama, q, k, v, mask, CHANNELS**-0.5)[0][0])
        return torch.cat(outputs)

    return run


def compare(lengths: list[int], heads: tuple[int, int], window: int | None, dtype: torch.dtype) -> None:
    num_heads, num_kv = heads
    fused = randn(sum(lengths), num_heads + 2 * num_kv, CHANNELS) * 1.5  # peaked enough that a wrong mask shows
    case = (lengths, num_kv, window)
    assert_twins(fast(*case), twin(*case), [fused], dtype, yardstick=eager(*case))


@pytest.fixture(params=["kept", "computed again"])
def probabilities(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to the backward pass, whatever the size."""
    monkeypatch.setattr(module, "KEEP_PROBABILITIES", 10**9 if request.param == "kept" else 0)


@pytest.mark.usefixtures("probabilities")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_rows_of_all_lengths(lengths: list[int], heads: tuple[int, int], dtype: torch.dtype) -> None:
    compare(lengths, heads, None, dtype)


@pytest.mark.usefixtures("probabilities")
@pytest.mark.parametrize("block", [16, 256])  # rows of several blocks of queries, and of one
@pytest.mark.parametrize("window", [1, 7, 16, 17, 100, None])
def test_windows_and_blocks(window: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERY_BLOCK", block)
    for dtype in (torch.float32, torch.bfloat16):
        compare([61, 1, 33], (6, 2), window, dtype)


@pytest.mark.usefixtures("probabilities")
@pytest.mark.parametrize("window", [None, 40])
def test_a_row_longer_than_a_block(window: int | None) -> None:
    compare([module.QUERY_BLOCK + 5, 9], (3, 1), window, torch.float32)


@pytest.mark.usefixtures("probabilities")
def test_a_token_sees_its_own_row_up_to_itself() -> None:
    lengths, window = [6, 9, 1], 4
    row = [0] * 6 + [1] * 9 + [2]
    fused = randn(16, 4, CHANNELS).requires_grad_()
    out = fast(lengths, 1, window)(fused)
    for query in range(16):
        (gradient,) = torch.autograd.grad(out[query].square().sum(), fused, retain_graph=True)
        seen = (gradient.abs().amax((1, 2)) > 0).tolist()
        wanted = [row[key] == row[query] and query - window < key <= query for key in range(16)]
        assert seen == wanted, query


@pytest.mark.usefixtures("probabilities")
def test_what_other_rows_hold_does_not_matter() -> None:
    """The first token stands in for padding, so it is made enormous here."""
    lengths = [2, 7, 30]
    fused = randn(39, 4, CHANNELS)
    alone = fast([7, 30], 1)(fused[2:])
    fused[:2] *= 1e4
    fused.requires_grad_()
    out = fast(lengths, 1)(fused)
    assert torch.allclose(out[2:], alone, rtol=1e-5, atol=1e-6)
    out[2:].sum().backward()
    assert fused.grad is not None and fused.grad.isfinite().all() and not fused.grad[:2].any()


def test_the_window_is_that_of_transformers() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    window, length = 3, 8
    sees = sliding_window_causal_mask_function(window)
    fused = randn(length, 3, CHANNELS).requires_grad_()
    out = fast([length], 1, window)(fused)
    for query in range(length):
        (gradient,) = torch.autograd.grad(out[query].sum(), fused, retain_graph=True)
        for key in range(length):
            assert bool(gradient[key, 2].any()) == bool(sees(0, 0, torch.tensor(query), torch.tensor(key)))


@pytest.mark.usefixtures("probabilities")
def test_reading_alone_gives_the_same() -> None:
    layout = module.build_layout([6, 9, 1], torch.device("cpu"))
    fused = randn(16, 4, CHANNELS)
    before = fused.clone()
    out, state = module.attend(fused, layout, 1, 4)
    assert torch.equal(module.attention(fused, layout, 1, 4), out)
    dq, dk, dv = state.gradients(torch.ones_like(out))
    assert dq.shape == (16, 2, CHANNELS) and dk.shape == dv.shape == (16, 1, CHANNELS)
    assert torch.equal(fused, before)


def test_layout_maps_there_and_back() -> None:
    lengths = [3, 1, 20]
    layout = module.build_layout(lengths, torch.device("cpu"))
    assert layout.longest == 20 and layout.cu_seqlens.tolist() == [0, 3, 4, 24]
    assert layout.to_padded[layout.to_flat].tolist() == list(range(24))
