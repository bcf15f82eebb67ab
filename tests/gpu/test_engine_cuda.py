"""The engine on CUDA: operations against their twins, whole models, NF4, decoding. Run with ``-m gpu``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcot.engine import accelerate, engine_of, reference
from medcot.engine import attention as attention_module
from medcot.engine.attention import attend, build_layout
from medcot.engine.loss import token_loss
from medcot.engine.memory import FASTEST, Keep, Memory
from tiny_models import MIXED_WINDOWS, attach, build_base, distance, flatten, gradients, make_rows, plain_loss
from twins import assert_twins, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16 = 1.5  # times what plain bfloat16 is off float32 on the same weights
DTYPES = [torch.float32, torch.bfloat16]
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_operations(dtype: torch.dtype) -> None:
    weight = (1 + 0.5 * randn(64, seed=1)).to("cuda", dtype)
    angles = torch.arange(37)[:, None] * 100 ** -(torch.arange(8) / 8)
    cos, sin = (torch.cat((x, x), -1).to("cuda", dtype) for x in (angles.cos(), angles.sin()))
    assert_twins(
        lambda x: rms_norm(x, weight, 1e-6),
        lambda x: reference.rms_norm(x, weight.to(x.dtype), 1e-6),
        [randn(37, 64)],
        dtype,
        device="cuda",
    )
    assert_twins(swiglu, reference.swiglu, [randn(37, 66)], dtype, device="cuda")
    assert_twins(
        lambda x: rotary_(x * 1, cos, sin, 5),
        lambda x: torch.cat((reference.rotary(x[:, :5], cos.to(x.dtype), sin.to(x.dtype)), x[:, 5:]), 1),
        [randn(37, 6, 16)],
        dtype,
        device="cuda",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 1023, 1024, 1025])
def test_loss(num_tokens: int, dtype: torch.dtype) -> None:
    head = randn(89, 24, seed=1).to("cuda", dtype)
    targets = torch.randint(89, (num_tokens,), generator=torch.Generator().manual_seed(5)).cuda()
    assert_twins(
        lambda x: token_loss(x, head, targets) / 640,
        lambda x: reference.token_loss(x, head.to(x.dtype), targets) / 640,
        [randn(num_tokens, 24)],
        dtype,
        device="cuda",
    )


@pytest.mark.parametrize("dtype", DTYPES)  # float32 takes the portable path
@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize(("num_heads", "num_kv"), [(2, 2), (6, 2), (4, 1)])
def test_attention(num_heads: int, num_kv: int, window: int | None, dtype: torch.dtype) -> None:
    layout = build_layout(LENGTHS, torch.device("cuda"))

    def twin(fused: Tensor) -> Tensor:
        return reference.attention(*fused.split([num_heads, num_kv, num_kv], 1), LENGTHS, window)

    def fast(fused: Tensor) -> Tensor:
        return attention(fused, layout, num_kv, window)

    def sdpa(fused: Tensor) -> Tensor:
        rows = []
        for row in fused.split(LENGTHS):
            seen = torch.ones(len(row), len(row), dtype=torch.bool, device="cuda").tril()
            seen = seen if window is None else seen.triu(1 - window)
            q, k, v = (part.transpose(0, 1)[None] for part in row.split([num_heads, num_kv, num_kv], 1))
            rows.append(F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(rows)

    fused = randn(sum(LENGTHS), num_heads + 2 * num_kv, 64)
    assert_twins(fast, twin, [fused], dtype, device="cuda", yardstick=sdpa)


def compare(fast: Any, plain: Any, dtype: torch.dtype) -> None:
    """Loss and gradients of an accelerated model against the plain one, row by row."""
    rows = [(ids.cuda(), labels.cuda()) for ids, labels in make_rows(LENGTHS)]
    exact = copy.deepcopy(plain).float()
    engine = engine_of(fast)
    assert engine is not None
    for memory in (FASTEST, Memory(Keep.LEAN), Memory(Keep.INPUT, tile_tokens=32, chunk_tokens=50), Memory(Keep.HOST)):
        loss, _ = engine.summed_loss(*flatten(rows), memory=memory)
        loss.backward()
        got = gradients(fast)
        true, usual = plain_loss(exact, rows), plain_loss(plain, rows)
        true.backward()
        usual.backward()
        off = distance(got, wanted := gradients(exact))
        allowed = 1e-5 if dtype == torch.float32 else BF16 * distance(gradients(plain), wanted)
        plain.zero_grad()
        assert off < allowed, (off, allowed)
        assert float(loss) == pytest.approx(float(true), rel=1e-5 if dtype == torch.float32 else 1e-2)


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


def test_nf4_equals_its_own_dequantised_weights(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    build_base("qwen2", torch.bfloat16).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}}
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, **options)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    num_packed = 0
    for name, module in packed.named_modules():
        if type(module).__name__ == "Linear4bit":
            num_packed += 1
            twin = dense.get_submodule(name)
            assert isinstance(twin, nn.Linear)
            twin.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).to(torch.bfloat16)
    assert num_packed == 14
    fast, plain = attach(packed.requires_grad_(False)), attach(dense.requires_grad_(False))
    adapter = {name: tensor for name, tensor in plain.state_dict().items() if "lora_" in name}
    assert not fast.load_state_dict(adapter, strict=False).unexpected_keys
    assert accelerate(fast).fast
    compare(fast, plain, torch.bfloat16)


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
