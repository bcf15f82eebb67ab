"""The flash attention kernels, through Triton's interpreter on the CPU, against the plain definition and autograd.

Where a CUDA device is, ``tests/gpu/test_flash_cuda.py`` runs them for real. Triton decides when it is first imported
whether it interprets, so these run in a process of their own: ``test_kernels.py`` starts it, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from medcot.engine import flash, reference
from medcot.engine.attention import build_layout
from medcot.engine.flash import Longest, Tiling, Tilings, TritonAttended, build_tiles
from twins import FP32, randn

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="needs a process of its own: test_kernels.py"
)
CPU = torch.device("cpu")
MIXED = [23, 1, 77, 2, 16]
CHANNELS = 64
# Tiles so small that rows of a hundred tokens have all kinds of them; how the work is cut changes no result.
SMALL = Tiling(32, 16, 4, 2, split=True)


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter turns a loop's bounds into numbers in a way that NumPy 2.4 no longer allows."""
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture(params=[True, False], ids=["split", "one loop"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    tiling = dataclasses.replace(SMALL, split=request.param)
    for key in flash.TILINGS:
        monkeypatch.setitem(flash.TILINGS, key, Tilings(tiling, tiling, tiling))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory handed out uninitialised holds NaN, so that a value never written shows in every comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def run(heads: Tensor, d_out: Tensor, lengths: list[int], num_kv: int, window: int | None) -> list[Tensor]:
    """Output, and gradients of q, k and v, by the kernels."""
    out, state = TritonAttended.attend(heads, build_layout(lengths, CPU), num_kv, window)
    return [out, *state.gradients(d_out)]


def run_twin(heads: Tensor, d_out: Tensor, lengths: list[int], num_kv: int, window: int | None) -> list[Tensor]:
    """The same by the definition and autograd."""
    parts = [part.clone().requires_grad_() for part in heads.split([heads.shape[1] - 2 * num_kv, num_kv, num_kv], 1)]
    out = reference.attention(*parts, lengths, window)
    return [out.detach(), *torch.autograd.grad(out, parts, d_out)]


def make(lengths: list[int], num_heads: int, num_kv: int, channels: int = CHANNELS) -> tuple[Tensor, Tensor]:
    heads = randn(sum(lengths), num_heads + 2 * num_kv, channels)
    return heads, randn(sum(lengths), num_heads, channels, seed=1)


def assert_same(got: list[Tensor], wanted: list[Tensor], limit: float = FP32) -> None:
    assert [one.shape for one in got] == [other.shape for other in wanted]
    # Where a query sees one key alone, dQ and dK are zero, of terms of the size of 1.
    errors = [
        float((one - other).abs().amax() / other.abs().amax().clamp_min(1))
        for one, other in zip(got, wanted, strict=True)
    ]
    assert all(error < limit for error in errors), errors  # NaN is not


@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(("num_heads", "num_kv"), [(2, 2), (3, 1), (8, 2), (14, 2)])
@pytest.mark.usefixtures("small_tiles")
def test_rows_of_mixed_lengths(num_heads: int, num_kv: int, window: int | None) -> None:
    heads, d_out = make(MIXED, num_heads, num_kv)
    assert_same(run(heads, d_out, MIXED, num_kv, window), run_twin(heads, d_out, MIXED, num_kv, window))


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [16], [32, 8, 64], [33, 31]], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_rows_of_one_token_and_of_whole_tiles(lengths: list[int]) -> None:
    heads, d_out = make(lengths, 4, 1)
    assert_same(run(heads, d_out, lengths, 1, None), run_twin(heads, d_out, lengths, 1, None))


@pytest.mark.parametrize("window", [5, 17, 40])
@pytest.mark.usefixtures("small_tiles")
def test_windows_narrower_and_wider_than_tiles(window: int) -> None:
    heads, d_out = make([100, 47], 2, 1)
    assert_same(run(heads, d_out, [100, 47], 1, window), run_twin(heads, d_out, [100, 47], 1, window))


@pytest.mark.parametrize(("channels", "boxes"), sorted(flash.TILINGS))
@pytest.mark.parametrize("window", [None, 150])
def test_the_tiles_of_the_gpu(channels: int, boxes: bool, window: int | None) -> None:
    lengths = [3, 290, 130]
    heads, d_out = make(lengths, 4 if boxes else 3, 1, channels)
    assert_same(run(heads, d_out, lengths, 1, window), run_twin(heads, d_out, lengths, 1, window))


@pytest.mark.parametrize(("num_heads", "channels"), [(8, 64), (6, 64), (8, 96)])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.usefixtures("small_tiles")
def test_no_row_sees_a_neighbours_nan(num_heads: int, channels: int, window: int | None) -> None:
    lengths = [19, 50, 21]
    heads, d_out = make(lengths, num_heads, 2, channels)
    middle = slice(19, 69)
    wanted = run_twin(heads[middle], d_out[middle], [50], 2, window)
    heads[:19], heads[69:], d_out[:19], d_out[69:] = (float("nan") for _ in range(4))
    got = [part[middle] for part in run(heads, d_out, lengths, 2, window)]
    assert_same(got, wanted)


@pytest.mark.usefixtures("small_tiles")
def test_scores_far_beyond_the_range_of_exp() -> None:
    heads, d_out = make(MIXED, 4, 2)
    heads[:, :6] *= 30
    # Scores of some thousands are themselves rounded to 1e-4 or so, and exp makes that a share of the result.
    assert_same(run(heads, d_out, MIXED, 2, None), run_twin(heads, d_out, MIXED, 2, None), limit=5e-3)


def test_every_token_is_in_one_tile_and_the_longest_come_first() -> None:
    for longest in Longest:
        tiles = build_tiles(tuple(MIXED), 8, longest, CPU).tolist()
        work = [length - first if longest is Longest.FIRST else min(first + 8, length) for _, length, first in tiles]
        assert work == sorted(work, reverse=True)
        tokens = [start + t for start, length, first in tiles for t in range(first, min(first + 8, length))]
        assert sorted(tokens) == list(range(sum(MIXED)))
