"""The engine on CUDA: each kernel against its twin, quantised weights, whole models, memory. Run with ``-m gpu``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcot.data.packing import collate
from medcot.engine import accelerate, engine_of, hold_in_fp8, reference
from medcot.engine import attention as attention_module
from medcot.engine.attention import build_layout
from medcot.engine.devices import has_fp8, has_triton
from medcot.engine.frozen import Fp8Linear, Fp8Weight
from medcot.engine.layers import GROUPS
from medcot.engine.lora import Projection, base_of
from medcot.engine.loss import token_loss
from medcot.engine.memory import FASTEST, SMALLEST, Keep, Memory
from medcot.engine.stack import HostStore
from medcot.train.splitting import Budget
from tiny_models import MIXED_WINDOWS, attach, build_base, distance, flatten, gradients, make_rows, plain_loss
from twins import (
    add_norm_pair,
    add_norm_twin,
    assert_twins,
    attention_pair,
    largest,
    mlp_pair,
    mlp_twin,
    norm_then_lora_pair,
    norm_then_lora_twin,
    projection_pair,
    randn,
    rotation_pair,
    rotation_twin,
    swiglu_pair,
    swiglu_twin,
    typical,
)

CUDA = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_triton = pytest.mark.skipif(not torch.cuda.is_available() or not has_triton(CUDA), reason="needs Triton")
needs_fp8 = pytest.mark.skipif(not torch.cuda.is_available() or not has_fp8(CUDA), reason="needs FP8 products")
BF16 = 1.5  # times what plain bfloat16 is off float32 on the same weights
DTYPES = [torch.float32, torch.bfloat16]
THREE = [*DTYPES, torch.float16]
# The flash kernel wants channels in eights.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),
    ("qwen2", MIXED_WINDOWS),
    ("qwen3", {"head_dim": 16}),
]
families = pytest.mark.parametrize(("family", "sizes"), CASES, ids=[family for family, _ in CASES])
LENGTHS = [23, 1, 140, 9, 2, 64]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 is float32 here, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory handed out uninitialised holds NaN, so that a value never written shows in every comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # what makes torch fill it
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device=CUDA).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launch(poisoned: None) -> ModuleType:
    """The kernels; imported here, because a CPU's torch may lack Triton."""
    from medcot.engine import launch

    return launch


def exact16(tensor: Tensor) -> Tensor:
    """Float32 with values that both 16-bit types have too, so that the judge is given the same."""
    return tensor.bfloat16().half().float().cuda()


# --- every kernel against its twin ------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype", THREE)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 70), (37, 300)])  # in one tile, and in two
@pytest.mark.parametrize("with_sum", [True, False], ids=["sum", "last"])
@pytest.mark.parametrize("given", [1, 2, 4], ids=["x", "x y", "x y low"])
def test_add_norm(
    launch: ModuleType, given: int, with_sum: bool, num_rows: int, width: int, dtype: torch.dtype
) -> None:
    weight = exact16(1 + 0.5 * randn(width, seed=1))
    tensors = [randn(num_rows, width), randn(num_rows, width, seed=2), randn(num_rows, 5, seed=3), randn(width, 5)]
    fast = add_norm_pair(launch, weight, 1e-6, with_sum=with_sum)
    twin = add_norm_twin(weight, 1e-6, with_sum=with_sum)
    assert_twins(fast, twin, tensors[:given], dtype, device="cuda")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [16, 20, 64])
def test_add_norm_of_a_real_width_and_rank(launch: ModuleType, rank: int, dtype: torch.dtype) -> None:
    num_rows, width = 1025, 4096
    weight = exact16(1 + 0.5 * randn(width, seed=1))
    tensors = [randn(num_rows, width), randn(num_rows, width, seed=2)]
    tensors += [randn(num_rows, rank, seed=3), 0.2 * randn(width, rank, seed=4)]
    assert_twins(add_norm_pair(launch, weight, 1e-6), add_norm_twin(weight, 1e-6), tensors, dtype, device="cuda")


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [30.0, 1e-3])  # at 1e-3 epsilon is as large as the mean square
def test_the_norms_gradient_takes_a_low_rank_part(launch: ModuleType, size: float, dtype: torch.dtype) -> None:
    weight, width = exact16(1 + 0.5 * randn(70, seed=1)), 70
    tensors = [randn(37, width) * size, randn(40, width, seed=2), randn(5, width, seed=3), randn(40, 5, seed=4)]
    fast, twin = norm_then_lora_pair(launch, weight, 1e-6), norm_then_lora_twin(weight, 1e-6)
    assert_twins(fast, twin, tensors, dtype, device="cuda")


@needs_triton
@pytest.mark.parametrize("dtype", THREE)
@pytest.mark.parametrize("rank", [None, 5, 16])
@pytest.mark.parametrize(
    ("num_rows", "num_heads", "num_kv", "channels"), [(1, 1, 1, 24), (37, 6, 2, 16), (65, 4, 4, 64), (33, 8, 2, 128)]
)
def test_rotation(
    launch: ModuleType, num_rows: int, num_heads: int, num_kv: int, channels: int, rank: int | None, dtype: torch.dtype
) -> None:
    angle = torch.arange(num_rows)[:, None] * 100 ** -(torch.arange(channels // 2) / channels)
    cos, sin = (exact16(torch.cat((x, x), -1)) for x in (1.25 * angle.cos(), 1.25 * angle.sin()))
    width = num_heads + 2 * num_kv
    tensors = [randn(num_rows, width, channels)]
    if rank is not None:
        tensors += [randn(num_rows, 3 * rank, seed=3), randn(width * channels, rank, seed=4)]
    fast, twin = rotation_pair(launch, cos, sin, num_kv), rotation_twin(cos, sin, num_kv)
    assert_twins(fast, twin, tensors, dtype, device="cuda")


@needs_triton
@pytest.mark.parametrize("dtype", THREE)
@pytest.mark.parametrize("rank", [None, 5, 20])
@pytest.mark.parametrize(("num_rows", "wide", "size"), [(1, 2, 1.0), (37, 66, 40.0), (65, 600, 1.0)])
def test_swiglu(
    launch: ModuleType, num_rows: int, wide: int, size: float, rank: int | None, dtype: torch.dtype
) -> None:
    tensors = [randn(num_rows, wide) * size]
    if rank is not None:
        tensors += [randn(num_rows, 2 * rank, seed=3), randn(wide, rank, seed=4)]
    assert_twins(swiglu_pair(launch), swiglu_twin, tensors, dtype, device="cuda")


@needs_triton
@pytest.mark.parametrize(("rank", "down_rank"), [(5, 3), (16, 16), (16, 40)])
@pytest.mark.parametrize(("num_rows", "dtype"), [(1, torch.float32), (37, torch.float32), (37, torch.bfloat16)])
def test_swiglu_between_adapted_projections(
    launch: ModuleType, num_rows: int, rank: int, down_rank: int, dtype: torch.dtype
) -> None:
    width, out = 133, 20
    tensors = [randn(num_rows, 2 * width), randn(num_rows, 2 * rank, seed=2), 0.5 * randn(2 * width, rank, seed=3)]
    tensors += [randn(out, width, seed=4), randn(down_rank, width, seed=5), randn(out, down_rank, seed=6)]
    assert_twins(mlp_pair(launch), mlp_twin, tensors, dtype, device="cuda")


@needs_triton
def test_offsets_beyond_what_32_bits_count(launch: ModuleType) -> None:
    """A row of 90,000 tokens has 2.6 billion values in gate and up of Llama 8B."""
    num_rows, wide = 90_000, 28_672
    gate_up = torch.ones(num_rows, wide, dtype=torch.bfloat16, device=CUDA)
    last = randn(40, wide).to(CUDA, torch.bfloat16)
    gate_up[-40:] = last
    product = launch.swiglu(gate_up)
    assert torch.equal(product[-40:], launch.swiglu(last)) and torch.equal(product[:40], launch.swiglu(gate_up[:40]))
    wanted, _ = launch.swiglu_grad(product[-40:].clone(), None, last.clone(), None)
    d, _ = launch.swiglu_grad(product, None, gate_up, None)
    assert torch.equal(d[-40:], wanted)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 97, 9000, 128_256])
def test_cross_entropy(launch: ModuleType, vocabulary: int, dtype: torch.dtype) -> None:
    logits = (10 * randn(6, vocabulary)).to(CUDA, dtype)
    logits[2] = -300.0  # far below: its own maximum is what counts
    logits[3, : vocabulary // 2] = float("-inf")
    targets = torch.tensor([0, 1, vocabulary - 1, vocabulary - 2, 3, 4], device=CUDA)
    leaf = logits.float().requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none")
    losses.sum().backward()
    given = logits.clone()
    got = launch.cross_entropy_(given, targets)
    assert got.dtype == torch.float32 and largest(got, losses.detach()) < 1e-5
    assert leaf.grad is not None and largest(given.float(), leaf.grad) < (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "chunk_tokens"), [(1, None), (2047, None), (2048, None), (2049, None), (100, 33), (100, 1), (7, 100)]
)
def test_loss(num_tokens: int, chunk_tokens: int | None, dtype: torch.dtype) -> None:
    head = randn(89, 24, seed=1).to("cuda", dtype)
    targets = torch.randint(89, (num_tokens,), generator=torch.Generator().manual_seed(5)).cuda()
    assert_twins(
        lambda x: token_loss(x, head, targets, chunk_tokens) / 640,
        lambda x: reference.token_loss(x, head.to(x.dtype), targets) / 640,
        [randn(num_tokens, 24)],
        dtype,
        device="cuda",
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)  # float32 takes the portable path
@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(("num_heads", "num_kv"), [(2, 2), (6, 2), (4, 1)])
def test_attention(num_heads: int, num_kv: int, window: int | None, dtype: torch.dtype) -> None:
    layout = build_layout(LENGTHS, torch.device("cuda"))

    def twin(fused: Tensor) -> Tensor:
        return reference.attention(*fused.split([num_heads, num_kv, num_kv], 1), LENGTHS, window)

    def sdpa(fused: Tensor) -> Tensor:
        rows = []
        for row in fused.split(LENGTHS):
            seen = torch.ones(len(row), len(row), dtype=torch.bool, device="cuda").tril()
            seen = seen if window is None else seen.triu(1 - window)
            q, k, v = (part.transpose(0, 1)[None] for part in row.split([num_heads, num_kv, num_kv], 1))
            rows.append(F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(rows)

    fused = randn(sum(LENGTHS), num_heads + 2 * num_kv, 64)
    assert_twins(attention_pair(layout, num_kv, window), twin, [fused], dtype, device="cuda", yardstick=sdpa)


# --- projections ------------------------------------------------------------------------------------------------------


def groups_of(model: Any) -> list[list[Any]]:
    """The four groups of the first layer, PEFT's modules."""
    layer = model.get_base_model().model.layers[0]
    return [[layer.get_submodule(f"{owner}.{name}") for name in names] for owner, names in GROUPS]


def compare_group(parts: list[Any], weight: Tensor, dtype: torch.dtype, num_tokens: int) -> None:
    """Against the twin with the dense weight that the base stands for."""
    bases = [base_of(part) for part in parts]
    bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases]).clone()
    slots = [getattr(part, name)["default"].weight for part in parts for name in ("lora_A", "lora_B")]

    def twin(x: Tensor, *pairs: Tensor) -> Tensor:
        offset = None if bias is None else bias.to(x.dtype)
        return reference.lora_linear(x, weight.to(x.dtype), offset, pairs[0::2], pairs[1::2], 2.0)

    tensors = [randn(num_tokens, weight.shape[1]), *(slot.detach().cpu().clone() for slot in slots)]
    fast = projection_pair(Projection(parts, dtype), 2.0)
    assert_twins(fast, twin, tensors, dtype, masters=len(slots), device="cuda")


UNEQUAL_RANKS = {"rank_pattern": {"k_proj": 8, "up_proj": 2}, "alpha_pattern": {"k_proj": 16, "up_proj": 4}}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", THREE)
@pytest.mark.parametrize("lora", [{}, UNEQUAL_RANKS], ids=["equal ranks", "unequal ranks"])
@pytest.mark.parametrize("num_tokens", [1, 37])
def test_projections(num_tokens: int, lora: dict[str, Any], dtype: torch.dtype) -> None:
    for parts in groups_of(attach(build_base("qwen2", dtype).cuda(), **lora)):  # q, k and v have biases
        compare_group(parts, torch.cat([base_of(part).weight for part in parts]).clone(), dtype, num_tokens)


def load_nf4(folder: Path, *, nested: bool = True, **sizes: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build_base("qwen2", torch.bfloat16, **sizes).save_pretrained(folder)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16, device_map={"": 0}
    )


def dequantise(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("nested", [True, False])
def test_nf4_projections(nested: bool, tmp_path: Path) -> None:
    model = attach(load_nf4(tmp_path, nested=nested).requires_grad_(False))
    for parts in groups_of(model):
        bases = [base_of(part) for part in parts]
        assert {type(base).__name__ for base in bases} == {"Linear4bit"}
        weight = torch.cat([dequantise(base.weight) for base in bases])
        assert torch.equal(Projection(parts, torch.bfloat16).weight.dense(), weight.bfloat16())
        compare_group(parts, weight.bfloat16(), torch.bfloat16, 37)


@needs_triton
@pytest.mark.parametrize("dtype", THREE)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (33, 192), (7, 320), (129, 448), (515, 4096)])
def test_unpacking_is_bitsandbytes_own_to_the_bit(
    launch: ModuleType, shape: tuple[int, int], blocksize: int, nested: bool, dtype: torch.dtype
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = randn(*shape) * 10 ** randn(shape[0], 1, seed=1)  # scales of all sizes
    weight[0, :32] = 0
    weights = [weight, 3 * randn(2 * shape[0], shape[1], seed=2), weight.flip(0)]
    packed, states = zip(
        *(
            quantize_4bit(one.to(CUDA, dtype), blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
            for one in weights
        ),
        strict=True,
    )
    assert all(state.nested is nested for state in states)
    for count in (1, 2, 3):  # as many as share an input
        parts = [dequantize_4bit(one, state) for one, state in zip(packed[:count], states[:count], strict=True)]
        out = torch.full((sum(map(len, parts)), shape[1]), float("nan"), dtype=dtype, device=CUDA)
        launch.unpack_nf4(packed[:count], states[:count], out)
        assert torch.equal(out, torch.cat(parts))


# --- FP8 --------------------------------------------------------------------------------------------------------------


@needs_fp8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("width", [16, 112, 4096, 14336, 32768, 33_000, 128_256])  # the last two are read twice
def test_rows_are_rounded_as_defined(launch: ModuleType, width: int, scaled: bool, dtype: torch.dtype) -> None:
    x = (randn(13, width) * 10 ** (3 * randn(13, 1, seed=1))).to(CUDA, dtype)
    x[3] = 0
    x[7, 1:] = 0
    factors = (0.01 + randn(width, seed=2).abs()).cuda() if scaled else None
    got, scale = launch.quantise_rows(x, factors)
    assert got.dtype == torch.float8_e4m3fn and got.shape == x.shape and scale.shape == (13, 1)
    value = x.float() if factors is None else x.float() * factors
    largest_T1 = value.abs().amax(1, keepdim=True)
    wanted = torch.where(largest_T1 > 0, largest_T1 / 448, 1.0)
    assert scale.dtype == torch.float32 and float((scale / wanted - 1).abs().max()) < 1e-6
    assert float(scale[3]) == 1 and not got[3].float().any()
    share, eight = value / scale, got.float()
    assert eight.isfinite().all() and float(eight.abs().amax()) == 448
    # Half a step: 2^-4 of the value, or 2^-10 below the smallest normal number.
    assert ((eight - share).abs() <= (share.abs() * 2**-4).clamp_min(2**-10) * (1 + 1e-5)).all()
    same = eight == share.to(torch.float8_e4m3fn).float()
    assert float(same.float().mean()) > 0.999  # a division that is off by a bit turns a tie the other way


FP8_BOUND = 0.05  # root-mean-square error of a product; one operand rounded to 3 bits is 0.026, two are 0.037


@needs_fp8
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 37, 128, 1000])  # not multiples of 16, and one alone
@pytest.mark.parametrize("outputs", [[64], [96, 32, 32], [112, 112], [4096, 1024, 1024]])
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_eight_bits(outputs: list[int], num_tokens: int, bias: bool) -> None:
    inputs, total = 512, sum(outputs)
    # Outputs and tokens of different sizes: each has a scale of its own.
    dense = (randn(total, inputs, seed=1) * (0.5 * randn(total, 1, seed=2)).exp()).to(CUDA, torch.bfloat16)
    weight = Fp8Weight(list(dense.split(outputs)), torch.bfloat16)
    assert weight.out_features == outputs and weight.in_features == inputs
    assert typical(weight.dense().float(), dense.float()) < 0.03
    sizes_T1 = 10 ** randn(num_tokens, 1, seed=3)
    x = (randn(num_tokens, inputs) * sizes_T1).to(CUDA, torch.bfloat16)
    dy = (randn(num_tokens, total, seed=4) * sizes_T1).to(CUDA, torch.bfloat16)
    bias_N = (10 * randn(total, seed=5)).to(CUDA, torch.bfloat16) if bias else None
    y, dx = weight.open().multiply(x, bias_N), weight.open().multiply_back(dy)
    assert y.dtype == dx.dtype == torch.bfloat16 and y.shape == (num_tokens, total) and dx.shape == x.shape
    rounded = weight.rows_ND.float() * weight.scale_N[:, None]
    offset = 0 if bias_N is None else bias_N.float()
    sizes_T1 = sizes_T1.cuda()
    for matrix in (rounded, dense.float()):
        # A token's size is taken out again: a small one must come out as exact as a large one.
        assert typical(y.float() / sizes_T1, (x.float() @ matrix.T + offset) / sizes_T1) < FP8_BOUND
        assert typical(dx.float() / sizes_T1, dy.float() @ matrix / sizes_T1) < FP8_BOUND


@needs_fp8
@pytest.mark.parametrize("num_tokens", [1, 37, 300])
def test_loss_under_a_head_in_eight_bits(num_tokens: int) -> None:
    dense = (0.2 * randn(512, 64, seed=1)).to(CUDA, torch.bfloat16)
    head, targets = Fp8Weight([dense], torch.bfloat16), torch.arange(num_tokens, device=CUDA)
    results = []
    for matrix in (head, dense):
        hidden = randn(num_tokens, 64).to(CUDA, torch.bfloat16).requires_grad_()
        loss = token_loss(hidden, matrix, targets, 101)
        loss.backward()
        assert hidden.grad is not None
        results.append((loss.item(), hidden.grad.float()))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.02)
    assert typical(results[0][1], results[1][1]) < 2 * FP8_BOUND


FP8_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 112},
    "qwen2": {"vocab_size": 112},
    "qwen3": {"vocab_size": 112, "head_dim": 16},
}


def build_fp8_pair(family: str) -> tuple[Any, Any]:
    """A model over a base in eight bits and its twin in bfloat16, the same adapter on both, both accelerated."""
    dense = build_base(family, torch.bfloat16, **FP8_SIZES[family]).cuda()
    eight = copy.deepcopy(dense)
    hold_in_fp8(eight)
    assert sum(isinstance(module, Fp8Linear) for module in eight.modules()) == 14
    models = attach(eight), attach(dense)
    adapter = {name: tensor for name, tensor in models[1].state_dict().items() if "lora_" in name}
    assert not models[0].load_state_dict(adapter, strict=False).unexpected_keys
    assert all(accelerate(model).fast for model in models)
    return models


@needs_fp8
@pytest.mark.parametrize("family", FP8_SIZES)
def test_a_whole_model_in_eight_bits(family: str) -> None:
    eight, dense = build_fp8_pair(family)
    assert "FP8" in str(accelerate(eight))
    rows = make_rows(LENGTHS)
    results = []
    for model, memories in ((dense, [FASTEST]), (eight, [FASTEST, Memory(Keep.INPUT, tile_tokens=32), SMALLEST])):
        engine = engine_of(model)
        assert engine is not None
        for memory in memories:
            loss, _ = engine.summed_loss(*flatten(rows), memory=memory)
            loss.backward()
            results.append((loss.item(), gradients(model)))
    loss, wanted = results[0]
    for got_loss, got in results[1:]:
        assert got_loss == pytest.approx(loss, rel=0.02)
        one, other = (torch.cat([gradient.flatten() for gradient in named.values()]) for named in (got, wanted))
        assert float(F.cosine_similarity(one, other, 0)) > 0.98
        assert 0.9 < float(one.norm() / other.norm()) < 1.1


@needs_fp8
def test_the_plain_model_on_eight_bits_is_near_the_fast_one() -> None:
    eight, _ = build_fp8_pair("llama")
    rows = [(ids.cuda(), labels.cuda()) for ids, labels in make_rows(LENGTHS)]
    engine = engine_of(eight)
    assert engine is not None
    with torch.no_grad():
        loss, _ = engine.summed_loss(*flatten(rows))
        assert float(loss) == pytest.approx(float(plain_loss(eight, rows)), rel=0.02)


@needs_fp8
def test_one_token_rows_in_eight_bits() -> None:
    eight, dense = build_fp8_pair("llama")
    ids = torch.tensor([5, 9, 40])
    engines = [engine_of(model) for model in (eight, dense)]
    with torch.no_grad():
        for lengths in ([1, 1, 1], [3], [1]):
            one, other = (engine.hidden_states(ids[: sum(lengths)], lengths).float() for engine in engines if engine)
            assert typical(one, other) < 0.1


# --- whole models -----------------------------------------------------------------------------------------------------


def compare(fast: Any, plain: Any, dtype: torch.dtype) -> None:
    """Loss and gradients of an accelerated model against the plain one, row by row."""
    rows = [(ids.cuda(), labels.cuda()) for ids, labels in make_rows(LENGTHS)]
    exact = copy.deepcopy(plain).float()
    true, usual = plain_loss(exact, rows), plain_loss(plain, rows)
    true.backward()
    usual.backward()
    wanted = gradients(exact)
    allowed = 1e-5 if dtype == torch.float32 else BF16 * distance(gradients(plain), wanted)
    engine = engine_of(fast)
    assert engine is not None
    tiles = Memory(Keep.INPUT, tile_tokens=32, chunk_tokens=50)
    for memory in (FASTEST, Memory(Keep.LEAN), tiles, Memory(Keep.HOST), Memory(Keep.HOST, tile_tokens=100)):
        loss, _ = engine.summed_loss(*flatten(rows), memory=memory)
        loss.backward()
        off = distance(gradients(fast), wanted)
        assert off < allowed, (memory, off, allowed)
        assert loss.item() == pytest.approx(true.item(), rel=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
@families
def test_whole_model(
    family: str, sizes: dict[str, Any], dtype: torch.dtype, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flash:  # what a T4 runs
        monkeypatch.setattr(attention_module, "has_flash", lambda device, dtype: False)
    plain = attach(build_base(family, dtype, **sizes).cuda())
    fast = copy.deepcopy(plain)
    assert accelerate(fast).fast
    compare(fast, plain, dtype)


@pytest.mark.parametrize("lora", [{"r": 16, "lora_alpha": 16}, {"r": 32, "lora_alpha": 8}, UNEQUAL_RANKS])
def test_whole_model_at_other_ranks_and_scales(lora: dict[str, Any]) -> None:
    plain = attach(build_base("qwen3", torch.bfloat16, head_dim=16).cuda(), **lora)
    fast = copy.deepcopy(plain)
    assert accelerate(fast).fast
    compare(fast, plain, torch.bfloat16)


def test_nf4_equals_its_own_dequantised_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    packed = load_nf4(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": 0})
    num_packed = 0
    for name, module in packed.named_modules():
        if type(module).__name__ == "Linear4bit":
            num_packed += 1
            twin = dense.get_submodule(name)
            assert isinstance(twin, nn.Linear)
            twin.weight.data = dequantise(module.weight).to(torch.bfloat16)
    assert num_packed == 14
    fast, plain = attach(packed.requires_grad_(False)), attach(dense.requires_grad_(False))
    adapter = {name: tensor for name, tensor in plain.state_dict().items() if "lora_" in name}
    assert not fast.load_state_dict(adapter, strict=False).unexpected_keys
    assert accelerate(fast).fast
    compare(fast, plain, torch.bfloat16)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_is_put_on_the_host_comes_back() -> None:
    """To the bit, though each tensor is forgotten at once and its memory given to others while copies run."""
    store = HostStore(torch.device("cuda", torch.cuda.current_device()))
    for num_tokens in (1000, 5000, 300):  # buffers grow, and are used in part
        given = [randn(num_tokens, 512, seed=index).bfloat16() for index in range(6)]

        def spoil(num_tokens: int = num_tokens) -> None:
            torch.full((num_tokens, 512), float("nan"), dtype=torch.bfloat16, device=CUDA)

        forward = store.begin()
        for index, tensor in enumerate(given):
            handed = tensor.cuda()
            store.put(index, handed)
            del handed
            spoil()
        back = []
        for index in reversed(range(6)):
            taken = store.take(index, forward)
            back.append(taken.clone())
            del taken
            spoil()
        assert all(torch.equal(got.cpu(), wanted) for got, wanted in zip(reversed(back), given, strict=True))


@pytest.mark.parametrize(
    ("lengths", "share"), [([2000] * 12, 0.5), ([2000] * 12, 0.15), ([24_000], 0.3)], ids=["half", "rows", "one row"]
)
def test_out_of_memory(lengths: list[int], share: float) -> None:
    """Under an allocator's cap the rows are taken in pieces, or one row with less kept, and give the same gradient.

    The cap lies between what the smallest forward takes and what the whole batch does.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = attach(build_base("llama", torch.bfloat16, **sizes).cuda())
    assert accelerate(model).fast
    engine = engine_of(model)
    assert engine is not None

    def forward_backward(piece: dict[str, Any], memory: Memory) -> Tensor:
        loss, _ = engine.summed_loss(piece["input_ids"][0], piece["labels"][0], piece["lengths"], memory=memory)
        loss.backward()
        return loss.detach()

    def batch(lengths: list[int]) -> dict[str, Any]:
        return collate([{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in make_rows(lengths)])

    alone = len(lengths) == 1
    small = batch(lengths[:1]), SMALLEST if alone else FASTEST
    low, _, _ = _peak(lambda: forward_backward(*small), model)
    high, wanted_loss, wanted = _peak(lambda: forward_backward(batch(lengths), FASTEST), model)
    assert high > 1.2 * low
    said: list[str] = []
    budget = Budget(FASTEST, SMALLEST, announce=said.append)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((low + share * (high - low)) / total)
    try:
        loss = budget.run(batch(lengths), forward_backward)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said and budget.memory.keep.recomputes is alone and (budget.max_tokens is None) is alone
    assert float(loss) == pytest.approx(wanted_loss, rel=1e-3)
    assert distance(gradients(model), wanted) < 0.02  # other pieces round their sums to bfloat16 elsewhere


def _peak(work: Callable[[], Tensor], model: Any) -> tuple[int, float, dict[str, Tensor]]:
    """Bytes that the allocator held at most, the loss and the gradients; the second time, when all is compiled."""
    for _ in range(2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        loss = work().item()
        got = gradients(model)
    return torch.cuda.max_memory_reserved(), loss, got


# --- answering --------------------------------------------------------------------------------------------------------


@families
def test_decoding_follows_the_forward(family: str, sizes: dict[str, Any]) -> None:
    """Each greedy token is the likeliest of a float32 forward, or within bfloat16's rounding of it."""
    from types import SimpleNamespace

    from medcot.generate import Sampling, generate

    plain = attach(build_base(family, torch.bfloat16, **sizes).cuda())
    exact, fast = copy.deepcopy(plain).float(), copy.deepcopy(plain)
    assert accelerate(fast).fast
    prompts = [ids.tolist() for ids, _ in make_rows([5, 1, 23, 12])]
    tokenizer: Any = SimpleNamespace(eos_token_id=None)
    answers = generate(fast, tokenizer, prompts, max_new_tokens=40, sampling=Sampling(0.0, 1.0), seed=0, batch_size=4)
    for prompt, (tokens, _) in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([[*prompt, *tokens]], device="cuda")).logits[0]
        steps = logits[len(prompt) - 1 : -1]
        short = steps.amax(-1) - steps.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        assert float((short / steps.std(-1)).max()) < 0.1
