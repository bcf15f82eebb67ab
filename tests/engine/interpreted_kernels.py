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
from tiny_models import attach, build_base, build_model, flatten, gradients, make_rows, pair, relative
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


@pytest.mark.parametrize("heights", [(96,), (64, 8), (128, 24, 40)])
@pytest.mark.parametrize("nested", [False, True])
def test_unpacking_is_bitsandbytes_own(launch: Any, nested: bool, heights: tuple[int, ...]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    # bitsandbytes on a CPU gets widths wrong that are no multiple of its blocks.
    weights = [randn(height, 192, seed=height) * height for height in heights]
    packed, states = zip(
        *(
            functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
            for weight in weights
        ),
        strict=True,
    )
    out = torch.full((sum(heights), 192), float("nan"))
    launch.unpack_nf4(packed, states, out)
    parts = [functional.dequantize_4bit(one, state) for one, state in zip(packed, states, strict=True)]
    assert largest(out, torch.cat(parts)) < TIGHT


WIDE = 10_000.0  # sizes of a row from 1e-4 to this: every row's scale is its own


def make_uneven(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, one of them zero where there are several."""
    x = randn(num_rows, width) * WIDE ** randn(num_rows, 1, seed=1).clamp(-1, 1)
    if num_rows > 2:
        x[2] = 0
    return x.to(dtype)


def assert_same_codes(got: Any, wanted: Any) -> None:
    """The same scales and the same bytes."""
    assert torch.equal(got.scale_T1, wanted.scale_T1)
    assert torch.equal(got.codes_TN.view(torch.uint8), wanted.codes_TN.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("num_rows", [0, *ROWS])
def test_rows_are_rounded_as_the_twin_rounds_them(launch: Any, num_rows: int, scaled: bool, dtype: torch.dtype) -> None:
    x = make_uneven(num_rows, HIDDEN, dtype)
    factors = 0.01 + randn(HIDDEN, seed=2).abs() if scaled else None
    got, wanted = launch.quantise_rows(x, factors), pointwise.quantise_rows(x, factors)
    assert_same_codes(got, wanted)
    if num_rows > 2:
        assert float(got.scale_T1[2]) == 1 and not got.codes_TN[2].float().any()
        assert float(got.codes_TN.float().abs().amax()) == 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_sum", [False, True])
@pytest.mark.parametrize("num_rows", ROWS)
def test_norms_gradients_are_rounded_as_they_are_written(
    launch: Any, num_rows: int, has_sum: bool, dtype: torch.dtype
) -> None:
    """The codes are those that rounding what was written would give, and what was written is what it was."""
    x, dn = (make_uneven(num_rows, HIDDEN, dtype) for _ in range(2))
    weight = (1 + 0.3 * randn(HIDDEN, seed=2)).to(dtype)
    r = launch.add_norm(x, None, None, weight, 1e-6)[2]
    factors = 0.01 + randn(HIDDEN, seed=3).abs()
    arguments = (dn, None, x, weight, r, randn(num_rows, HIDDEN, seed=1).to(dtype) if has_sum else None)
    dx, rounded = launch.norm_grad_rounded(*arguments, factors)
    assert_close([dx], [launch.norm_grad(*arguments)])
    assert_same_codes(rounded, launch.quantise_rows(dx, factors))


@pytest.mark.parametrize(
    ("family", "memory"), [("llama", FASTEST), ("qwen3", Memory(Keep.INPUT, tile_tokens=16))], ids=["all", "tiles"]
)
def test_a_whole_model_in_eight_bits(launch: Any, family: str, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As below, over a base in FP8: kernels round what they write, plain torch what was written."""
    import medcot.engine

    monkeypatch.setattr(medcot.engine, "check_fp8", lambda model_type, device: None)
    sizes: dict[str, Any] = {"vocab_size": 112, "num_hidden_layers": 1} | (
        {"head_dim": 16} if family == "qwen3" else {}
    )
    base = build_base(family, **sizes)
    medcot.engine.hold_in_fp8(base)
    model = attach(base)
    assert medcot.engine.accelerate(model).fast
    engine = engine_of(model)
    assert engine is not None
    results = []
    for ops in (launch, pointwise):
        engine.ops = ops
        loss, _ = engine.summed_loss(*flatten(make_rows([9, 1, 10])), memory=memory)
        loss.backward()
        results.append((float(loss.detach()), gradients(model)))
    (loss_fast, got), (loss_plain, wanted) = results
    # A number that another order of summation moves across the middle of two codes makes a difference of 2^-4 of it.
    assert loss_fast == pytest.approx(loss_plain, rel=1e-4)
    assert max(relative(got[name], wanted[name]) for name in wanted) < 0.03


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
