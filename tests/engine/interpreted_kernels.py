"""The Triton kernels, through Triton's interpreter on the CPU, against the plain operations of the same names.

Where a CUDA device is, ``tests/gpu`` runs them for real. Triton decides when it is first imported whether it
interprets, so these run in a process of their own: ``test_kernels.py`` starts it, with TRITON_INTERPRET=1 set.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from medcot.engine import engine_of, pointwise
from medcot.engine.lora import Term
from medcot.engine.memory import FASTEST, Keep, Memory
from tiny_models import build_model, flatten, gradients, make_rows, pair, relative
from twins import largest, randn

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="needs a process of its own: test_kernels.py"
)
TIGHT = 2e-6  # float32; sums run in another order
HIDDEN = 70  # not a power of two, not a multiple of a tile
ROWS = [1, 16, 37]


@pytest.fixture(scope="module")
def launch() -> Any:
    from medcot.engine import launch

    return launch


def make_term(num_rows: int, widths: tuple[int, ...], rank: int, seed: int = 5) -> Term:
    """A forward term: every part has columns of its own."""
    u = randn(num_rows, rank * len(widths), seed=seed)
    return Term(u, randn(sum(widths), rank, seed=seed + 1), widths)


def make_back_term(num_rows: int, width: int, rank: int) -> Term:
    return Term(randn(num_rows, rank, seed=7), randn(rank, width, seed=8))


def angles(num_rows: int, channels: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(num_rows)[:, None] * 100 ** -(torch.arange(channels // 2) / channels)
    return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


def assert_close(got: Any, wanted: Any) -> None:
    for one, other in zip(got, wanted, strict=True):
        if other is None:
            assert one is None
        else:
            assert largest(one, other) < TIGHT


@pytest.mark.parametrize("rank", [None, 4, 20])
@pytest.mark.parametrize("has_y", [False, True])
@pytest.mark.parametrize("num_rows", ROWS)
def test_add_norm_and_its_gradient(launch: Any, num_rows: int, has_y: bool, rank: int | None) -> None:
    x, y = randn(num_rows, HIDDEN), randn(num_rows, HIDDEN, seed=1) if has_y else None
    weight = 1 + 0.3 * randn(HIDDEN, seed=2)
    term = make_term(num_rows, (HIDDEN,), rank) if rank and has_y else None
    got = launch.add_norm(x, y, term, weight, 1e-6)
    wanted = pointwise.add_norm(x, None if y is None else y.clone(), term, weight, 1e-6)
    assert_close(got, wanted)
    dn, d_sum = randn(num_rows, HIDDEN, seed=3), randn(num_rows, HIDDEN, seed=4) if has_y else None
    back = make_back_term(num_rows, HIDDEN, rank) if rank else None
    arguments = (wanted[0], weight, wanted[2], d_sum)
    plain = pointwise.norm_grad(dn.clone(), back, *arguments)
    assert_close([launch.norm_grad(dn, back, *arguments)], [plain])


@pytest.mark.parametrize("rank", [None, 4, 16])
@pytest.mark.parametrize(("num_queries", "num_kv", "channels"), [(2, 2, 32), (3, 1, 24), (8, 2, 64)])
@pytest.mark.parametrize("num_rows", ROWS)
def test_rotation_and_back(
    launch: Any, num_rows: int, num_queries: int, num_kv: int, channels: int, rank: int | None
) -> None:
    heads = randn(num_rows, num_queries + 2 * num_kv, channels)
    widths = (num_queries * channels, num_kv * channels, num_kv * channels)
    term = make_term(num_rows, widths, rank) if rank else None
    cos, sin = angles(num_rows, channels)
    wanted = pointwise.rotate_(heads.clone(), term, cos, sin, num_kv)
    assert_close([launch.rotate_(heads.clone(), term, cos, sin, num_kv)], [wanted])
    parts = [part.contiguous() for part in heads.split([num_queries, num_kv, num_kv], 1)]
    assert_close([launch.rotate_back(*parts, cos, sin)], [pointwise.rotate_back(*parts, cos, sin)])


@pytest.mark.parametrize("vocabulary", [5, 97, 9000])
def test_cross_entropy(launch: Any, vocabulary: int) -> None:
    logits = (10 * randn(6, vocabulary)).requires_grad_()
    targets = torch.tensor([0, 1, vocabulary - 1, 2, 3, 4])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    losses.sum().backward()
    given = logits.detach().clone()
    assert_close([launch.cross_entropy_(given, targets)], [losses.detach()])
    assert largest(given, logits.grad) < TIGHT


@pytest.mark.parametrize("nested", [False, True])
def test_unpacking_is_bitsandbytes_own(launch: Any, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = randn(96, 192) * 0.02  # bitsandbytes on a CPU gets widths wrong that are no multiple of its blocks
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    out = torch.full_like(weight, float("nan"))
    launch.unpack_nf4(packed, state, out)
    assert largest(out, functional.dequantize_4bit(packed, state)) < TIGHT


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "memory", [FASTEST, Memory(Keep.LEAN), Memory(Keep.INPUT, tile_tokens=16)], ids=["all", "lean", "tiles"]
)
def test_a_whole_model(launch: Any, family: str, memory: Memory) -> None:
    """Loss and every gradient, with the kernels in place of the plain operations."""
    fast, plain = pair(build_model(family, num_hidden_layers=2))
    from medcot.engine import accelerate

    accelerate(plain)
    ids, labels, lengths = flatten(make_rows([9, 1, 14]))
    results = []
    for model, ops in ((fast, launch), (plain, pointwise)):
        engine = engine_of(model)
        assert engine is not None
        engine.ops = ops
        loss, _ = engine.summed_loss(ids, labels, lengths, memory=memory)
        loss.backward()
        results.append((float(loss.detach()), gradients(model)))
    (loss_fast, got), (loss_plain, wanted) = results
    assert loss_fast == pytest.approx(loss_plain, rel=1e-6)
    assert max(relative(got[name], wanted[name]) for name in wanted) < 1e-5
