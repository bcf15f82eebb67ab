"""Our flash attention on a Hopper GPU, against the plain definition in float32. Run with ``-m gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from medcot.engine import flash, reference
from medcot.engine.attention import FlashAttended, build_layout
from medcot.engine.flash import TILINGS, TritonAttended
from twins import BF16, FLOOR, randn, typical

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]
LENGTHS = [23, 1, 700, 9, 2, 64, 129]
TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory handed out uninitialised holds NaN, so that a value never written shows in every comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # what makes torch fill it
    assert torch.empty(3, device=CUDA).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 is float32 here, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make(lengths: list[int], num_heads: int, num_kv: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    heads = randn(sum(lengths), num_heads + 2 * num_kv, channels).to(CUDA, dtype)
    return heads, randn(sum(lengths), num_heads, channels, seed=1).to(CUDA, dtype)


def run(path: Any, heads: Tensor, d_out: Tensor, lengths: list[int], num_kv: int, window: int | None) -> list[Tensor]:
    """Output, and gradients of q, k and v."""
    out, state = path.attend(heads, build_layout(lengths, CUDA), num_kv, window)
    return [part.float() for part in (out, *state.gradients(d_out))]


def run_twin(heads: Tensor, d_out: Tensor, lengths: list[int], num_kv: int, window: int | None) -> list[Tensor]:
    """The same by the definition and autograd, in float32."""
    split = heads.float().split([heads.shape[1] - 2 * num_kv, num_kv, num_kv], 1)
    parts = [part.clone().requires_grad_() for part in split]
    out = reference.attention(*parts, lengths, window)
    return [out.detach(), *torch.autograd.grad(out, parts, d_out.float())]


def assert_as_close_as_torch(
    heads: Tensor, d_out: Tensor, lengths: list[int], num_kv: int, window: int | None = None
) -> None:
    """No further from float32 than PyTorch's own flash kernel is, up to a factor."""
    assert flash.fits(heads, num_kv)
    exact = run_twin(heads, d_out, lengths, num_kv, window)
    got, torchs = (run(path, heads, d_out, lengths, num_kv, window) for path in (TritonAttended, FlashAttended))
    for name, mine, theirs, true in zip(("out", "dq", "dk", "dv"), got, torchs, exact, strict=True):
        assert mine.shape == true.shape
        if window == 1 and name in ("dq", "dk"):  # zero, of terms of the size of 1
            assert mine.abs().amax() < 0.1
        else:
            assert typical(mine, true) <= BF16 * typical(theirs, true) + FLOOR, name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(("num_heads", "num_kv"), [(2, 2), (6, 2), (32, 8), (28, 4), (16, 1)])
def test_groups_and_windows(num_heads: int, num_kv: int, window: int | None, dtype: torch.dtype) -> None:
    assert_as_close_as_torch(*make(LENGTHS, num_heads, num_kv, 128, dtype), LENGTHS, num_kv, window)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("channels", "boxes"), sorted(TILINGS))
def test_channels(channels: int, boxes: bool, window: int | None, dtype: torch.dtype) -> None:
    num_heads = 8 if boxes else 6
    assert_as_close_as_torch(*make(LENGTHS, num_heads, 2, channels, dtype), LENGTHS, 2, window)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [128], [64, 256], [4097]], ids=str)
def test_other_lengths(lengths: list[int]) -> None:
    assert_as_close_as_torch(*make(lengths, 8, 2, 128, torch.bfloat16), lengths, 2)


@pytest.mark.parametrize("channels", [96, 128])
def test_no_row_sees_a_neighbours_nan(channels: int) -> None:
    lengths = [190, 501, 77]
    heads, d_out = make(lengths, 8, 2, channels, torch.bfloat16)
    middle = slice(190, 691)
    alone = run(TritonAttended, heads[middle], d_out[middle], [501], 2, None)
    heads[:190], heads[691:], d_out[:190], d_out[691:] = (float("nan") for _ in range(4))
    got = run(TritonAttended, heads, d_out, lengths, 2, None)
    assert all(torch.equal(one[middle], other) for one, other in zip(got, alone, strict=True))


def test_the_same_bits_every_time() -> None:
    heads, d_out = make(LENGTHS * 4, 32, 8, 128, torch.bfloat16)
    runs = [run(TritonAttended, heads, d_out, LENGTHS * 4, 8, None) for _ in range(3)]
    assert all(torch.equal(one, other) for again in runs[1:] for one, other in zip(again, runs[0], strict=True))


def test_more_than_two_to_the_31_elements() -> None:
    """Offsets in the fused buffer pass 32 bits; the last row must be what it is alone."""
    lengths, num_kv = [349_600, 400], 8  # 350,000 tokens of 48 heads of 128
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    heads = torch.zeros(sum(lengths), 48, 128, device=CUDA, dtype=torch.bfloat16)
    d_out = torch.zeros(sum(lengths), 32, 128, device=CUDA, dtype=torch.bfloat16)
    heads[-400:], d_out[-400:] = make([400], 32, 8, 128, torch.bfloat16)
    window = 300  # the long row's full triangle would take seconds
    alone = run(TritonAttended, heads[-400:], d_out[-400:], [400], num_kv, window)
    out, state = TritonAttended.attend(heads, build_layout(lengths, CUDA), num_kv, window)
    got = [part[-400:].float() for part in (out, *state.gradients(d_out))]
    assert all(torch.equal(one, other) for one, other in zip(got, alone, strict=True))


def test_few_registers_in_memory() -> None:
    """The tile sizes of the table leave every kernel its registers but a few, for groups of eight and of seven."""
    from medcot.engine import flash_kernels

    for kernel in (flash_kernels.attend_kernel, flash_kernels.query_grad_kernel, flash_kernels.key_grad_kernel):
        kernel.device_caches.clear()  # other tests' groups
    for channels, boxes in TILINGS:
        run(TritonAttended, *make([300], 32 if boxes else 28, 4, channels, torch.bfloat16), [300], 4, None)
    kernels = (flash_kernels.attend_kernel, flash_kernels.query_grad_kernel, flash_kernels.key_grad_kernel)
    compiled = [one for kernel in kernels for one in kernel.device_caches[torch.cuda.current_device()][0].values()]
    assert len(compiled) >= 3 * len(TILINGS)
    spilled = [(one.name, one.metadata.num_warps, one.n_spills) for one in compiled if one.n_spills > 8]
    assert not spilled
