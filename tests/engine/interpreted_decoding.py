"""The decoding kernels through Triton's interpreter, against plain torch; and whole steps without a graph.

Triton decides when it is first imported whether it interprets, so these run in a process of their own, which
``test_decoding.py`` starts. What the interpreter cannot show (shuffles, graphs, bfloat16) is in ``tests/gpu``.
"""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import decoding_twins as twin
from medcot.engine import engine_of, reference
from medcot.engine.frozen import Nf4Weight
from medcot.engine.lora import Projection, base_of
from medcot.engine.products import Product, ThinProduct
from tiny_models import MIXED_WINDOWS, build_model, make_rows, pair
from twins import largest, randn

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="needs a process of its own: test_decoding.py"
)
TIGHT = 5e-6  # float32; sums run in another order
HALF = 2e-3  # float16's step is 2^-11


@pytest.fixture(autouse=True)
def loops_over_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6's interpreter turns a loop's bounds into numbers in a way that NumPy 2.4 no longer allows."""
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture(scope="module")
def ops() -> Any:
    from medcot.engine import step_ops

    return step_ops


def reader(interleaved: bool, A_RD: Tensor | None) -> Any:
    return SimpleNamespace(interleaved=interleaved, A_RD=A_RD)


def as_plain(to: Any, interleaved: bool) -> Tensor:
    x = to.x_BD
    return x.unflatten(-1, (8, -1)).transpose(-1, -2).flatten(-2) if interleaved else x


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("widths", "num_inputs", "splits"),
    [([64], 64, 1), ([20, 6, 7], 192, 1), ([9, 9], 1088, 1), ([5], 2112, 2), ([8, 4, 4], 3136, 3)],
)
def test_gemv(ops: Any, widths: list[int], num_inputs: int, splits: int, nested: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    # bitsandbytes on a CPU wants rows in pairs of blocks; the kernel is given the first N of them
    parameters = [twin.quantise(randn(width, num_inputs, seed=width), nested=nested) for width in widths]
    dense = torch.cat([dequantize_4bit(p.data, p.quant_state) for p in parameters])
    x = randn(2, num_inputs, seed=1)
    words, scales, code = twin.pack(parameters)
    got = ops.nf4_gemv(twin.interleave(x), words, widths, scales, code, None, None, splits=splits)
    assert len(got) == splits
    assert largest(got.sum(0), x @ dense.T) < TIGHT


@pytest.mark.parametrize("rank", [1, 4, 20])
@pytest.mark.parametrize("partials", [1, 3])
def test_gemv_with_lora_and_bias(ops: Any, rank: int, partials: int) -> None:
    widths = [20, 6, 7]
    parameters = [twin.quantise(randn(width, 128, seed=width)) for width in widths]
    x, bias = randn(2, 128, seed=1), randn(33, seed=2)
    u, B = randn(2, partials, 3 * rank, seed=3), randn(33, rank, seed=4)
    packed = twin.pack(parameters)
    bare = ops.nf4_gemv(twin.interleave(x), packed[0], widths, *packed[1:], None, None)
    for splits in (1, 2):
        got = ops.nf4_gemv(twin.interleave(x), packed[0], widths, *packed[1:], (u, B), bias, splits=splits)
        parts = zip(u.sum(1).split(rank, -1), B.split(widths), strict=True)
        wanted = bare.sum(0) + torch.cat([part @ b.T for part, b in parts], -1) + bias
        assert largest(got.sum(0), wanted) < TIGHT


# --- between the products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rank", [None, 3, 20])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_add_norm(ops: Any, parts: int, rank: int | None, interleaved: bool) -> None:
    hidden, delta = randn(3, 72), randn(parts, 3, 72, seed=1) if parts else None
    weight, A = 1 + 0.3 * randn(72, seed=2), randn(rank, 72, seed=3) if rank else None
    total, to = ops.add_norm(hidden, delta, weight, 1e-6, reader(interleaved, A))
    wanted = hidden + (0 if delta is None else delta.sum(0))
    normed = reference.rms_norm(wanted, weight, 1e-6)
    assert largest(total, wanted) < TIGHT
    assert largest(as_plain(to, interleaved), normed) < TIGHT
    assert (to.u_BPR is None) == (A is None)
    if A is not None:
        assert largest(to.u_BPR.sum(1), normed @ A.T) < TIGHT


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rank", [None, 3, 20])
@pytest.mark.parametrize(("parts", "width"), [(1, 24), (2, 1112)])
def test_swiglu(ops: Any, parts: int, width: int, rank: int | None, interleaved: bool) -> None:
    gate_up, A = randn(parts, 2, 2 * width), randn(rank, width, seed=3) if rank else None
    to = ops.swiglu(gate_up, randn(2, 8), reader(interleaved, A))
    wanted = reference.swiglu(gate_up.sum(0))
    assert largest(as_plain(to, interleaved), wanted) < TIGHT
    if A is not None:
        assert largest(to.u_BPR.sum(1), wanted @ A.T) < TIGHT


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize(
    ("num_queries", "num_kv", "channels", "norms"),
    [(2, 2, 16, False), (6, 2, 12, True), (8, 2, 24, False), (7, 1, 64, True), (4, 1, 80, False)],
)
def test_attention(
    ops: Any, num_queries: int, num_kv: int, channels: int, norms: bool, window: int | None, interleaved: bool
) -> None:
    lengths, slots = [1, 0, 200, 64, 65], 256
    cache = twin.make_cache(len(lengths), num_kv, slots, channels, lengths)
    angles = twin.make_angles(slots, channels)
    fused = randn(2, len(lengths), num_queries + 2 * num_kv, channels)  # two parts to be added
    weights = (1 + randn(channels, seed=5), 1 + randn(channels, seed=6), 1e-6) if norms else None
    A = randn(5, num_queries * channels, seed=7) if interleaved else None
    rows = ops.Rows(*(torch.tensor(lengths, dtype=torch.int32) for _ in range(3)))
    keys, values = cache[0].clone(), cache[1].clone()
    to = ops.attend(fused.flatten(2), rows, angles, ops.Cache(keys, values), window, weights, reader(interleaved, A))
    wanted = twin.attend(fused.sum(0), *cache, lengths, angles, window, weights).flatten(1)
    assert largest(as_plain(to, interleaved), wanted) < TIGHT
    if A is not None:
        assert largest(to.u_BPR.sum(1), wanted @ A.T) < TIGHT
    for row, length in enumerate(lengths):  # the new slot is filled and nothing else is touched
        for got, before in ((keys, cache[0]), (values, cache[1])):
            assert not got[row, :, length].isnan().any()
            assert torch.equal(got[row, :, :length], before[row, :, :length])
            assert got[row, :, length + 1 :].isnan().all()
        assert largest(values[row, :, length], fused.sum(0)[row, -num_kv:]) < TIGHT


@pytest.mark.parametrize(("programs", "slots", "wanted"), [(8, 1472, 32), (8, 64, 1), (512, 4096, 1), (100, 4096, 4)])
def test_splits(ops: Any, programs: int, slots: int, wanted: int) -> None:
    assert ops.choose_splits(programs, slots) == wanted


# --- choosing a token -------------------------------------------------------------------------------------------------


def draw(ops: Any, logits: Tensor, chances: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token of one row of logits at each chance."""
    num = len(chances)
    state = ops.Rows(
        torch.full((num,), -1), torch.full((num,), 7, dtype=torch.int32), torch.full((num,), 2, dtype=torch.int32)
    )
    table = torch.full((num, 4), float("nan"))
    table[:, 2] = chances
    ops.sample(logits.expand(num, -1).contiguous(), state, table, 63, temperature, top_p)
    assert state.lengths_B.tolist() == [8] * num and state.steps_B.tolist() == [3] * num
    return state.ids_B


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(("vocabulary", "spread"), [(5, 1.0), (97, 4.0), (9000, 2.0)])
def test_draws_follow_the_nucleus(ops: Any, vocabulary: int, spread: float, top_p: float, dtype: torch.dtype) -> None:
    logits = (spread * randn(vocabulary)).to(dtype)
    shares = twin.nucleus(logits.float(), 0.7, top_p)
    edges = shares.cumsum(0)
    chances = torch.rand(12, generator=torch.Generator().manual_seed(3))
    got = draw(ops, logits, chances, 0.7, top_p)
    for chance, token in zip(chances.double(), got.tolist(), strict=True):
        assert shares[token] > 0
        # The token's stretch of the unit interval holds the chance, but for float32's rounding of a long sum.
        assert edges[token] - shares[token] - 1e-5 <= chance <= edges[token] + 1e-5


@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
def test_the_portable_draw_is_the_same(ops: Any, top_p: float) -> None:
    from medcot.generate import Sampling, make_chances
    from medcot.generate import draw as draw_portably

    for seed in range(3):
        logits, chances = (3 * randn(900, seed=seed)).half(), torch.from_numpy(make_chances(seed, 8))
        wanted = draw_portably(logits.expand(8, -1), Sampling(0.7, top_p), chances)
        assert torch.equal(draw(ops, logits, chances, 0.7, top_p), wanted)


def test_a_row_that_has_ended_stays_in_its_cache(ops: Any) -> None:
    state = ops.Rows(torch.tensor([0, 0]), torch.tensor([62, 63]).int(), torch.tensor([1, 9]).int())
    logits = torch.zeros(2, 5, dtype=torch.float16)
    ops.sample(logits, state, torch.tensor([[0.1, 0.5], [0.1, 0.9]]), 63, 1.0, 1.0)
    assert state.lengths_B.tolist() == [63, 63] and state.steps_B.tolist() == [2, 10]
    assert state.ids_B.tolist() == [2, 4]  # its last chance again, not what lies behind the table


def test_equal_tokens_share_the_nucleus_by_order(ops: Any) -> None:
    logits = torch.zeros(40, dtype=torch.float16)
    logits[7] = 1.0
    chances = torch.linspace(0, 0.9999, 60)
    got = set(draw(ops, logits, chances, 1.0, 0.5).tolist())
    wanted = set(twin.nucleus(logits, 1.0, 0.5).nonzero().flatten().tolist())
    assert got == wanted and 7 in wanted and 1 < len(wanted) < 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [5, 9000])
def test_greedy_takes_the_first_of_the_likeliest(ops: Any, vocabulary: int, dtype: torch.dtype) -> None:
    for offset in (0.0, -50.0):  # all negative too
        logits = (randn(vocabulary).clamp(-1, 1) + offset).to(dtype)
        wanted = int((logits == logits.max()).nonzero()[0])
        assert draw(ops, logits, torch.rand(1), 0.0, 1.0).tolist() == [wanted]


# --- whole steps ------------------------------------------------------------------------------------------------------

PROMPTS = [ids.tolist() for ids, _ in make_rows([5, 1, 23, 12])]
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),
    ("qwen2", MIXED_WINDOWS),
    ("qwen3", {}),
]


def write(
    fast: Any, new_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> list[list[int]]:
    """Tokens of each prompt; after three tokens the second and third row leave."""
    from medcot.engine.graph_decoding import Steps

    engine = engine_of(fast)
    assert engine is not None
    chances = torch.rand(len(PROMPTS), new_tokens, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        steps = Steps(
            engine, len(PROMPTS), 23 + new_tokens, new_tokens, temperature=temperature, top_p=top_p, read_tokens=41
        )
        # In two goes and crosswise, as slots are filled again; the second makes good what the first put there.
        steps.read([0, 2, 3], [PROMPTS[3], PROMPTS[2], PROMPTS[1]], chances[1:])
        steps.read([3, 1, 0], [PROMPTS[3], PROMPTS[1], PROMPTS[0]], chances[[3, 1, 0]])
        written: list[list[int]] = [[] for _ in PROMPTS]
        rows = [0, 1, 2, 3]
        for number in range(new_tokens):
            for row, token in zip(rows, steps.state.ids_B.tolist(), strict=True):
                written[row].append(token)
            if number == 2:
                steps.select(torch.tensor([3, 0]))
                rows = [3, 0]
            if number < new_tokens - 1:
                steps.step(steps.products())
    return written


def assert_follows(plain: Any, written: list[list[int]], sizes: list[int]) -> None:
    """Each token is the likeliest of a float32 forward, or within float16's rounding of it."""
    assert [len(tokens) for tokens in written] == sizes
    for prompt, tokens in zip(PROMPTS, written, strict=True):
        with torch.no_grad():
            steps = plain(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0][len(prompt) - 1 : -1]
        short = steps.amax(-1) - steps.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((short / steps.std(-1)).max()) < 0.02


@pytest.mark.parametrize(("family", "sizes"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_steps_follow_the_forward(family: str, sizes: dict[str, Any]) -> None:
    fast, plain = pair(build_model(family, torch.float16, **sizes))
    assert_follows(plain.float(), write(fast, 6), [6, 3, 3, 6])


def test_draws_depend_on_the_seed_alone() -> None:
    fast, _ = pair(build_model("llama", torch.float16))
    warm: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
    first = write(fast, 4, **warm)
    assert write(fast, 4, **warm) == first
    assert write(fast, 4, **warm, seed=1) != first
    assert write(fast, 4, temperature=0.8, top_p=1e-6) == write(fast, 4)


def quantise(projection: Projection, dtype: torch.dtype) -> None:
    """Give a group NF4 weights, and its plain modules what they stand for."""
    bases = [base_of(part) for part in projection.parts]
    packed: list[Any] = [SimpleNamespace(weight=twin.quantise(base.weight.data)) for base in bases]
    weight = Nf4Weight(bases, dtype)
    weight._parts = packed
    for base, rows in zip(bases, weight.dense().split(weight.out_features), strict=True):
        base.weight.data = rows.clone()
    projection.weight = weight


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_steps_with_packed_weights(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from medcot.engine import graph_decoding, step_ops

    monkeypatch.setattr(step_ops, "GEMV_ROWS", 32)  # the interpreter's time is the number of programs
    monkeypatch.setattr(graph_decoding, "keep_what_fits", lambda *_: None)
    monkeypatch.setattr(graph_decoding, "THIN_ROWS_WITHOUT_MEMORY", 2)
    model = build_model(family, torch.float16, intermediate_size=128)
    fast, plain = pair(model)
    engine = engine_of(fast)
    assert engine is not None
    for layer in engine.layers:
        for projection in layer.projections:
            quantise(projection, torch.float16)
    plain.load_state_dict(fast.state_dict())
    kinds = set()
    bound = graph_decoding.Steps.products

    def spy(steps: Any) -> Any:
        products = bound(steps)
        kinds.add((len(steps.state.ids_B), type(products[0][0])))
        return products

    monkeypatch.setattr(graph_decoding.Steps, "products", spy)
    assert_follows(plain.float(), write(fast, 6), [6, 3, 3, 6])
    assert kinds == {(4, Product), (2, ThinProduct)}


def test_unpacked_scales_are_bitsandbytes_own() -> None:
    from bitsandbytes.functional import dequantize_4bit

    for nested in (False, True):
        parameter = twin.quantise(randn(96, 192), nested=nested)
        words, scales, code = twin.pack([parameter])
        nibbles = torch.stack([(words[0] >> shift) & 15 for shift in (4, 0, 12, 8, 20, 16, 28, 24)], -1).flatten()
        got = code[nibbles] * scales.repeat_interleave(64)
        assert torch.allclose(got.view(96, 192), dequantize_4bit(parameter.data, parameter.quant_state), rtol=1e-6)


def test_block_diagonal_lora_is_the_references() -> None:
    fast, _ = pair(build_model("qwen2"))
    engine = engine_of(fast)
    assert engine is not None
    for projection in engine.layers[0].projections:
        product, adapters = Product(projection, torch.float32), projection.adapters()
        x = randn(7, base_of(projection.parts[0]).in_features)
        dense, bias = projection.weight.dense(), projection.bias_N
        As, Bs = [a.A for a in adapters], [a.B for a in adapters]
        with torch.no_grad():
            wanted = reference.lora_linear(x, dense, bias, As, Bs, adapters[0].scale)
            assert largest(product(x), wanted) < TIGHT
            with fast.disable_adapter():
                assert torch.equal(Product(projection, torch.float32)(x), F.linear(x, dense, bias))


# --- the recorded loop, with a stand-in for CUDA ----------------------------------------------------------------------


class Stream:
    """Of a device that does all at once; also its events. Classes, since libraries name them in their signatures."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None: ...

    def record(self) -> None: ...


class Graph:
    """Records the one step that is taken between beginning and end, without taking it, and replays that very step."""

    recording: Graph | None = None
    num_recorded = 0

    def capture_begin(self, **_: Any) -> None:
        Graph.recording = self
        Graph.num_recorded += 1

    def capture_end(self) -> None:
        Graph.recording = None

    def note(self, steps: Any, work: Any) -> None:
        self.known = steps, [tensor.data_ptr() for tensor in known_tensors(steps)]
        self.replay = work

    def check(self) -> None:
        steps, tensors = self.known
        assert [tensor.data_ptr() for tensor in known_tensors(steps)] == tensors, "the graph would not see this"

    def reset(self) -> None: ...


def known_tensors(steps: Any) -> list[Tensor]:
    caches = [tensor for cache in steps.caches for tensor in (cache.keys, cache.values)]
    return [*steps.state.tensors(), steps.chances_BT, *caches]


class Counting:
    """Steps whose n-th token is known from the prompt, ``token_of``; a place that nobody has read into has none."""

    caches: tuple[()] = ()

    def __init__(self, engine: Any, num_slots: int, row_tokens: int, num_chances: int, **_: Any) -> None:
        self.device, self.chances_BT = torch.device("cpu"), torch.zeros(num_slots, num_chances)
        self._rows(torch.full((num_slots,), -1), torch.full((num_slots,), -1), torch.full((num_slots,), -1))

    def _rows(self, *tensors: Tensor) -> None:
        self.state = SimpleNamespace(ids_B=tensors[0], tensors=lambda: tensors)

    def read(self, places: list[int], prompts: Any, chances_RT: Tensor) -> Tensor:
        ids_B, firsts_B, steps_B = self.state.tensors()
        firsts_B[places], steps_B[places] = torch.tensor([prompt[0] for prompt in prompts]), 0
        ids_B[places] = token_of(firsts_B[places], steps_B[places])
        return ids_B[places]

    def products(self) -> None: ...

    def step(self, products: None) -> None:
        ids_B, firsts_B, steps_B = self.state.tensors()
        assert (firsts_B >= 0).all()
        steps_B += 1
        ids_B.copy_(token_of(firsts_B, steps_B))

    def select(self, places: Tensor) -> None:
        self._rows(*(tensor[places] for tensor in self.state.tensors()))
        self.chances_BT = self.chances_BT[places]


def token_of(first: Any, step: Any) -> Any:
    return (first * 31 + step * 7 + step * first * step) % 53 + 4


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``GraphDecoder`` asks of CUDA, done on a CPU; a replay that could not see a change of tensors fails."""
    from medcot import generate as module
    from medcot.engine import graph_decoding

    make_empty = torch.empty

    def empty(*arguments: Any, pin_memory: bool = False, **how: Any) -> Tensor:
        return make_empty(*arguments, **how)

    monkeypatch.setattr(torch, "empty", empty)
    stand_ins = {"Stream": Stream, "Event": Stream, "CUDAGraph": Graph, "current_stream": Stream}
    stand_ins |= {"device": contextlib.nullcontext, "stream": contextlib.nullcontext}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(module, "has_graphs", lambda engine: True)
    for steps in (graph_decoding.Steps, Counting):
        take = steps.step

        def step(self: Any, products: Any, take: Any = take) -> None:
            graph = Graph.recording
            if graph is None:
                take(self, products)
                return

            def replay() -> None:
                graph.check()
                take(self, products)

            graph.note(self, replay)

        monkeypatch.setattr(steps, "step", step)
    monkeypatch.setattr(Graph, "num_recorded", 0)


def ask(model: Any, prompts: list[list[int]], eos: int | None = None, **options: Any) -> list[Any]:
    from medcot.generate import Sampling, generate

    settings: dict[str, Any] = {"sampling": Sampling(0.0, 1.0), "seed": 0}
    return generate(model, SimpleNamespace(eos_token_id=eos), prompts, **settings | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("eos", [None, 11])
@pytest.mark.parametrize(("num_prompts", "batch_size"), [(1, 1), (3, 8), (60, 1), (60, 7), (60, 40), (300, 64)])
def test_surplus_is_thrown_away_and_nothing_else(
    no_cuda: None, monkeypatch: pytest.MonkeyPatch, num_prompts: int, batch_size: int, eos: int | None
) -> None:
    from medcot.engine import graph_decoding

    monkeypatch.setattr(graph_decoding, "Steps", Counting)
    fast, _ = pair(build_model("llama", torch.float16))
    draws = torch.Generator().manual_seed(num_prompts)
    rooms = torch.randint(1, 40, (num_prompts,), generator=draws).tolist()
    prompts = [[number + 1, 5, 5] for number in range(num_prompts)]
    wanted = []
    for prompt, room in zip(prompts, rooms, strict=True):
        tokens = [token_of(prompt[0], step) for step in range(room)]
        wanted.append(tokens[: tokens.index(eos) + 1] if eos in tokens else tokens)
    told: dict[int, list[int]] = {row: [] for row in range(num_prompts)}
    ended: list[int] = []
    got = ask(
        fast,
        prompts,
        eos,
        max_new_tokens=rooms,
        batch_size=batch_size,
        on_token=lambda row, token: told[row].append(token),
        on_written=lambda row, answer: ended.append(row),
    )
    assert [tokens for tokens, _ in got] == wanted == list(told.values())
    assert sorted(ended) == list(range(num_prompts))
    assert Graph.num_recorded <= 1 + batch_size.bit_length()  # once, and once for each halving at the end


def test_a_graph_is_recorded_once_however_many_prompts(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from medcot.engine import graph_decoding

    monkeypatch.setattr(graph_decoding, "Steps", Counting)
    fast, _ = pair(build_model("llama", torch.float16))
    ask(fast, [[number + 1] for number in range(40)], max_new_tokens=[5, 9] * 20, batch_size=4)
    assert 1 <= Graph.num_recorded <= 3


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_refilled_slots_follow_the_forward(no_cuda: None, family: str) -> None:
    fast, plain = pair(build_model(family, torch.float16))
    rooms = [5, 2, 2, 3]
    got = [tokens for tokens, _ in ask(fast, PROMPTS, max_new_tokens=rooms, batch_size=2)]
    assert_follows(plain.float(), got, rooms)


def test_refilled_draws_are_those_of_the_portable_path(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from medcot import generate as module

    fast, _ = pair(build_model("llama", torch.float16))
    options: dict[str, Any] = {"sampling": module.Sampling(0.8, 0.9), "seed": [5, 2**40, 5, 9]}
    options |= {"max_new_tokens": [4, 1, 2, 2]}
    got = ask(fast, PROMPTS, batch_size=2, **options)
    monkeypatch.setattr(module, "has_graphs", lambda engine: False)
    wanted = ask(fast, PROMPTS, batch_size=4, **options)
    # Logits in 16 bit differ in their last place, which moves a draw only where a number falls on a border.
    assert sum(one == other for one, other in zip(got, wanted, strict=True)) >= 3
