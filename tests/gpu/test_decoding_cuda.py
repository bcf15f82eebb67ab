"""Decoding on CUDA: the kernels against their twins, recorded steps against a float32 forward. Run with ``-m gpu``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import decoding_twins as twin
from medcot.engine import accelerate, engine_of
from medcot.generate import Sampling, generate
from medcot.records import Finish
from tiny_models import MIXED_WINDOWS, attach, build_base, make_rows
from twins import largest, randn, typical

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY, WARM = Sampling(0.0, 1.0), Sampling(0.8, 0.9)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),
    ("qwen2", MIXED_WINDOWS),
    ("qwen3", {"head_dim": 16}),
]
families = pytest.mark.parametrize(("family", "sizes"), CASES, ids=[family for family, _ in CASES])
PROMPTS = [ids.tolist() for ids, _ in make_rows([5, 1, 230, 12, 40])]
NEW_TOKENS = 70
# Short of the likeliest logit by this share of the logits' spread is bfloat16's rounding.
CLOSE = 0.1


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 is float32 here, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def write(model: Any, prompts: list[list[int]] = PROMPTS, *, eos: int | None = None, **options: Any) -> list[Any]:
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "sampling": GREEDY, "seed": 0, "batch_size": 8}
    tokenizer: Any = SimpleNamespace(eos_token_id=eos)
    return generate(model, tokenizer, prompts, **settings | options)


def assert_follows(exact: Any, answers: list[Any], prompts: list[list[int]] = PROMPTS) -> None:
    """Each greedy token is the likeliest of a float32 forward, or within bfloat16's rounding of it."""
    for prompt, (tokens, _) in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([[*prompt, *tokens]], device="cuda")).logits[0]
        steps = logits[len(prompt) - 1 : -1]
        short = steps.amax(-1) - steps.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        assert float((short / steps.std(-1)).max()) < CLOSE


@pytest.fixture(scope="module")
def llama() -> Any:
    model = attach(build_base("llama", torch.bfloat16).cuda())
    assert accelerate(model).fast
    return model


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffles", [True, False])
@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize(
    ("widths", "num_inputs", "splits"),
    [
        ([4096, 1024, 1024], 4096, None),
        ([14336, 14336], 4096, None),
        ([4096], 14336, 7),
        ([20, 6, 7], 192, None),
        ([9], 1088, 2),
    ],
)
def test_gemv(widths: list[int], num_inputs: int, splits: int | None, rank: int | None, shuffles: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    from medcot.engine.step_ops import nf4_gemv

    parameters = [twin.quantise(randn(width, num_inputs, seed=width).cuda()) for width in widths]
    dense = torch.cat([dequantize_4bit(p.data, p.quant_state) for p in parameters])
    x, bias = randn(2, num_inputs, seed=1).cuda(), randn(sum(widths), seed=2).cuda()
    wanted = x @ dense.T + bias
    lora = None
    if rank is not None:
        u, B = randn(2, 3, len(widths) * rank, seed=3).cuda(), randn(sum(widths), rank, seed=4).cuda()
        lora = u, B
        parts = zip(u.sum(1).split(rank, -1), B.split(widths), strict=True)
        wanted = wanted + torch.cat([part @ b.T for part, b in parts], -1)
    packed = twin.pack(parameters)
    got = nf4_gemv(twin.interleave(x), packed[0], widths, *packed[1:], lora, bias, shuffles=shuffles, splits=splits)
    assert largest(got.sum(0), wanted) < 1e-5


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_kv", "channels", "norms"),
    [(32, 8, 128, False), (7, 1, 64, True), (3, 1, 80, False), (2, 2, 256, True), (12, 2, 96, False)],
)
def test_attention(
    num_queries: int, num_kv: int, channels: int, norms: bool, interleaved: bool, window: int | None
) -> None:
    from medcot.engine import step_ops

    lengths, slots = [1, 0, 1999, 64, 513], 2048
    cache = [t.cuda().bfloat16() for t in twin.make_cache(len(lengths), num_kv, slots, channels, lengths)]
    angles = tuple(angle.cuda().bfloat16() for angle in twin.make_angles(slots, channels))
    fused = randn(1, len(lengths), num_queries + 2 * num_kv, channels).cuda().bfloat16()
    weights = tuple((1 + randn(channels, seed=s)).cuda().bfloat16() for s in (5, 6)) if norms else None
    A = randn(16, num_queries * channels, seed=7).cuda().bfloat16() if interleaved else None
    rows = step_ops.Rows(*(torch.tensor(lengths, dtype=torch.int32, device="cuda") for _ in range(3)))
    to = step_ops.attend(
        fused.flatten(2),
        rows,
        (angles[0], angles[1]),
        step_ops.Cache(cache[0].clone(), cache[1].clone()),
        window,
        None if weights is None else (weights[0], weights[1], 1e-6),
        SimpleNamespace(interleaved=interleaved, A_RD=A),  # type: ignore[arg-type]
    )
    exact_norms = None if weights is None else (weights[0].float(), weights[1].float(), 1e-6)
    exact_angles = angles[0].float(), angles[1].float()
    wanted = twin.attend(
        fused[0].float(), cache[0].float(), cache[1].float(), lengths, exact_angles, window, exact_norms
    )
    x = to.x_BD.unflatten(-1, (8, -1)).transpose(-1, -2).flatten(-2) if interleaved else to.x_BD
    assert typical(x.float(), wanted.flatten(1)) < 6e-3  # bfloat16 queries, keys and probabilities
    if A is not None:
        assert to.u_BPR is not None
        assert typical(to.u_BPR.sum(1), x.float() @ A.float().T) < 1e-3


@pytest.mark.parametrize("width", [1, 16, 21])  # Triton compiles each of these sizes apart
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_p", [1e-6, 0.6, 0.95, 1.0])
def test_draws_follow_the_nucleus(top_p: float, dtype: torch.dtype, width: int) -> None:
    from medcot.engine import step_ops

    num, vocabulary = 64, 128256
    logits = (3 * randn(num, vocabulary)).to("cuda", dtype)
    chances = torch.rand(num, width, generator=torch.Generator().manual_seed(3)).cuda()
    zeros = torch.zeros(num, dtype=torch.int32, device="cuda")
    state = step_ops.Rows(torch.zeros(num, dtype=torch.long, device="cuda"), zeros.clone(), zeros.clone())
    step_ops.sample(logits, state, chances, 63, 0.6, top_p)
    for row in range(num):
        shares = twin.nucleus(logits[row].float(), 0.6, top_p)
        token, chance = int(state.ids_B[row]), float(chances[row, 0])
        edge = float(shares[: token + 1].sum())
        assert shares[token] > 0
        assert edge - float(shares[token]) - 1e-4 <= chance <= edge + 1e-4
    step_ops.sample(logits, state, chances, 63, 0.0, 1.0)
    assert torch.equal(logits.gather(1, state.ids_B[:, None])[:, 0], logits.amax(-1))


def test_a_row_that_has_ended_stays_in_its_cache() -> None:
    from medcot.engine import step_ops

    places, steps = (torch.tensor(values, dtype=torch.int32, device="cuda") for values in ([62, 63], [1, 9]))
    state = step_ops.Rows(torch.zeros(2, dtype=torch.long, device="cuda"), places, steps)
    chances = torch.tensor([[0.1, 0.5], [0.1, 0.9]], device="cuda")
    step_ops.sample(torch.zeros(2, 5, dtype=torch.bfloat16, device="cuda"), state, chances, 63, 1.0, 1.0)
    assert state.lengths_B.tolist() == [63, 63] and state.steps_B.tolist() == [2, 10]
    assert state.ids_B.tolist() == [2, 4]


# --- whole answers ----------------------------------------------------------------------------------------------------


@families
def test_answers_follow_the_forward(family: str, sizes: dict[str, Any]) -> None:
    fast = attach(build_base(family, torch.bfloat16, **sizes).cuda())
    exact = copy.deepcopy(fast).float()
    assert accelerate(fast).fast
    assert_follows(exact, write(fast))
    assert_follows(exact, write(fast, batch_size=1))
    with fast.disable_adapter(), exact.disable_adapter():
        assert_follows(exact, write(fast))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("memory", [True, False], ids=["kept dense", "no memory"])
def test_nf4_answers_follow_their_dequantised_weights(
    batch_size: int, memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from medcot.engine import graph_decoding

    if not memory:
        monkeypatch.setattr(graph_decoding, "keep_what_fits", lambda *_: None)
        monkeypatch.setattr(graph_decoding, "THIN_ROWS_WITHOUT_MEMORY", 2)
    build_base("qwen2", torch.bfloat16, intermediate_size=128).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0}}
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, **options)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    for name, module in packed.named_modules():
        if type(module).__name__ == "Linear4bit":
            other = dense.get_submodule(name)
            assert isinstance(other, nn.Linear)
            other.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).to(torch.bfloat16)
    fast, exact = attach(packed.requires_grad_(False)), attach(dense.requires_grad_(False))
    adapter = {name: tensor for name, tensor in exact.state_dict().items() if "lora_" in name}
    assert not fast.load_state_dict(adapter, strict=False).unexpected_keys
    assert accelerate(fast).fast
    assert_follows(exact.float(), write(fast, batch_size=batch_size))


def test_draws_are_the_seeds_whatever_the_batch_drops(llama: Any) -> None:
    first = write(llama, sampling=WARM, seed=3)
    assert write(llama, sampling=WARM, seed=3) == first
    assert write(llama, sampling=WARM, seed=4) != first
    assert write(llama, sampling=Sampling(0.8, 1e-6)) == write(llama)
    state = torch.cuda.get_rng_state()
    write(llama, sampling=WARM)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def check_stop(model: Any, whole: list[list[int]], eos: int, sampling: Sampling) -> None:
    """What comes back, and what is told, ends at the first EOS."""
    told: list[list[int]] = [[] for _ in PROMPTS]
    progress: list[tuple[int, int]] = []
    got = write(
        model,
        eos=eos,
        sampling=sampling,
        batch_size=1,
        on_token=lambda row, token: told[row].append(token),
        on_progress=lambda done, total: progress.append((done, total)),
    )
    for tokens, (written, finish), heard in zip(whole, got, told, strict=True):
        assert written == heard == (tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)
        assert finish == (Finish.EOS if eos in tokens else Finish.LENGTH)
    assert progress[-1] == (len(PROMPTS), len(PROMPTS))


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_rows_end_at_eos_and_nothing_else_changes(llama: Any, sampling: Sampling) -> None:
    """The host sees an end late; what is told and returned must not show it."""
    whole = [tokens for tokens, _ in write(llama, sampling=sampling, batch_size=1)]
    for eos in sorted({tokens[i] for tokens in whole for i in (0, 3, 30)}):
        check_stop(llama, whole, eos, sampling)


def test_rows_are_dropped_together(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from medcot.engine.graph_decoding import GraphDecoder

    kept: list[int] = []
    keep = GraphDecoder.keep

    def spy(decoder: GraphDecoder, rows: Any) -> None:
        keep(decoder, rows)
        kept.append(len(rows))

    monkeypatch.setattr(GraphDecoder, "keep", spy)
    prompts = [ids.tolist() for ids, _ in make_rows(list(range(3, 19)), seed=8)]
    whole = write(llama, prompts, batch_size=16)
    eos = max({t for tokens, _ in whole for t in tokens}, key=lambda t: sum(t in tokens for tokens, _ in whole))
    got = write(llama, prompts, batch_size=16, eos=eos)
    assert kept and max(kept) <= 8
    assert sum(finish == Finish.EOS for _, finish in got) >= 8
    for tokens, finish in got:
        assert eos not in tokens[:-1] and (finish == Finish.EOS) == (tokens[-1] == eos)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4])
def test_few_tokens(llama: Any, new_tokens: int) -> None:
    got = write(llama, max_new_tokens=new_tokens)
    assert [tokens for tokens, _ in got] == [tokens[:new_tokens] for tokens, _ in write(llama)]


# --- slots that are filled again --------------------------------------------------------------------------------------

MANY = [ids.tolist() for ids, _ in make_rows([3 + 7 * number % 90 for number in range(40)], seed=9)]
ROOMS = [1 + 11 * number % 60 for number in range(40)]


@families
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_refilled_slots_follow_the_forward(family: str, sizes: dict[str, Any], batch_size: int) -> None:
    fast = attach(build_base(family, torch.bfloat16, **sizes).cuda())
    exact = copy.deepcopy(fast).float()
    assert accelerate(fast).fast
    got = write(fast, MANY, max_new_tokens=ROOMS, batch_size=batch_size)
    assert [len(tokens) for tokens, _ in got] == ROOMS
    assert_follows(exact, got, MANY)


def test_refilling_is_repeatable(llama: Any) -> None:
    """What is read between two replays is there for the second, and nothing of the first is lost: no race."""
    options: dict[str, Any] = {"max_new_tokens": ROOMS, "batch_size": 6, "sampling": WARM, "seed": 5}
    first = write(llama, MANY, **options)
    for _ in range(3):
        assert write(llama, MANY, **options) == first
    assert write(llama, MANY, **options | {"seed": 6}) != first


def test_draws_follow_their_seed_into_any_slot(llama: Any) -> None:
    """Rounding differs with the batch's size, which moves a draw where its number falls on a border: rarely."""
    prompts, rooms = [MANY[7]] * 40, [4 + number % 9 for number in range(40)]
    same = write(llama, prompts, max_new_tokens=rooms, batch_size=8, sampling=WARM, seed=[3] * 40)
    longest = max((tokens for tokens, _ in same), key=len)
    assert sum(tokens == longest[: len(tokens)] for tokens, _ in same) >= 30
    other = write(llama, prompts, max_new_tokens=4, batch_size=8, sampling=WARM, seed=list(range(40)))
    assert len({tuple(tokens) for tokens, _ in other}) > 5


def test_a_graph_is_recorded_once_for_each_number_of_slots(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from medcot.engine.graph_decoding import GraphDecoder

    sizes: list[int] = []
    record = GraphDecoder._record

    def spy(decoder: GraphDecoder) -> Any:
        sizes.append(len(decoder.steps.state.ids_B))
        return record(decoder)

    monkeypatch.setattr(GraphDecoder, "_record", spy)
    ended: list[int] = []
    write(llama, MANY, max_new_tokens=ROOMS, batch_size=8, on_written=lambda row, _: ended.append(row))
    assert sizes[0] == 8 and len(sizes) == len(set(sizes)) <= 4
    assert sorted(ended) == list(range(40))


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_refilled_rows_end_at_eos(llama: Any, sampling: Sampling) -> None:
    """A slot at a time, so that the same products round alike: the surplus of the row before is in nobody's answer."""
    prompts = MANY[:12]
    whole = [tokens for tokens, _ in write(llama, prompts, sampling=sampling, batch_size=1, max_new_tokens=30)]
    eos = max({t for tokens in whole for t in tokens}, key=lambda t: sum(t in tokens for tokens in whole))
    told: list[list[int]] = [[] for _ in prompts]
    got = write(
        llama,
        prompts,
        eos=eos,
        sampling=sampling,
        batch_size=1,
        max_new_tokens=30,
        on_token=lambda row, token: told[row].append(token),
    )
    assert [tokens for tokens, _ in got] == told
    assert told == [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in whole]


def test_a_row_that_ran_on_harms_no_other() -> None:
    """The first ends at once and is stepped two hundred times more, far past the end of its cache."""
    prompts = [ids.tolist() for ids, _ in make_rows([230, 12, 40], seed=4)]
    fast = attach(build_base("llama", torch.bfloat16).cuda())
    exact = copy.deepcopy(fast).float()
    assert accelerate(fast).fast
    got = write(fast, prompts, max_new_tokens=[2, 200, 200], batch_size=3)
    assert [len(tokens) for tokens, _ in got] == [2, 200, 200]
    assert_follows(exact, got, prompts)


def test_slots_are_as_many_as_memory_holds(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from medcot.engine import decoding, graph_decoding

    engine = engine_of(llama)
    assert engine is not None
    lengths, row_tokens = [len(prompt) for prompt in MANY], max(map(len, MANY)) + 60
    assert decoding.fit_slots(engine, 40, row_tokens, lengths) == 40
    reserve = decoding.RESERVE_BYTES + decoding.reading_bytes(engine, decoding.tokens_read(lengths))
    row_bytes = decoding.cache_bytes(engine, 192) + decoding.reading_bytes(engine, 1) + 2 * 97
    found = []
    for num in (0, 1, 2.5, 7):
        monkeypatch.setattr(decoding, "free_bytes", lambda device, num=num: int(reserve + num * row_bytes))
        found.append(decoding.fit_slots(engine, 40, row_tokens, lengths))
    assert found == [1, 1, 2, 7]
    sizes: list[int] = []
    make = graph_decoding.Steps.__init__

    def spy(steps: Any, engine: Any, num_slots: int, *arguments: Any, **how: Any) -> None:
        sizes.append(num_slots)
        make(steps, engine, num_slots, *arguments, **how)

    monkeypatch.setattr(graph_decoding.Steps, "__init__", spy)
    got = write(llama, MANY, max_new_tokens=60, batch_size=40)
    assert sizes == [7] and all(len(tokens) == 60 for tokens, _ in got)


def test_memory_is_given_back(llama: Any) -> None:
    write(llama)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        write(llama, sampling=WARM)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_a_table_of_angles_is_the_models_own(llama: Any) -> None:
    from medcot.engine.graph_decoding import Steps

    engine = engine_of(llama)
    assert engine is not None
    with torch.no_grad():
        steps = Steps(engine, 1, 11, 1, temperature=0.0, top_p=1.0, read_tokens=3)
        positions: Tensor = torch.tensor([2, 9], device="cuda")
        _, cos, sin = engine.embed(positions, positions)
    assert torch.equal(steps.angles[0][positions], cos) and torch.equal(steps.angles[1][positions], sin)
