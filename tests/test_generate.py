"""Generation: the accelerated and the plain path against transformers' own generate, token for token in float32."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding_twins import nucleus
from medcot.engine.decoding import SLOT_STEP, Decoder, next_logits
from medcot.generate import Sampling, draw, eos_token_ids, generate, make_chances, row_seed, sampling_defaults
from medcot.records import Finish
from tiny_models import MIXED_WINDOWS, VOCAB, build_model, make_rows, pair

GREEDY = Sampling(temperature=0.0, top_p=1.0)
WARM = Sampling(temperature=0.8, top_p=0.9)
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("mistral", {}),  # a window of 7, shorter than prompts and answers
    ("qwen2", MIXED_WINDOWS),
    ("qwen3", {}),
]
families = pytest.mark.parametrize(("family", "sizes"), FAMILIES, ids=[family for family, _ in FAMILIES])
PROMPTS = [row[0].tolist() for row in make_rows([5, 1, 23, 12, 9, 3, 17])]
NEW_TOKENS = 40  # the cache passes a border of SLOT_STEP on the way


def tokenizer_with(eos: int | None) -> Any:
    return SimpleNamespace(eos_token_id=eos)


def run(model: Any, prompts: Sequence[list[int]] = PROMPTS, *, eos: int | None = None, **options: Any) -> list[Any]:
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "sampling": GREEDY, "seed": 0, "batch_size": 4}
    return generate(model, tokenizer_with(eos), prompts, **settings | options)


@torch.no_grad()
def transformers_greedy(model: Any, prompt: list[int], eos: list[int] | None = None) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """One accelerated Llama and its plain twin; no test changes either."""
    return pair(build_model("llama"))


@pytest.fixture(params=["fast", "plain"])
def either(request: pytest.FixtureRequest, models: tuple[Any, Any]) -> Any:
    return models[request.param == "plain"]


# --- the same tokens --------------------------------------------------------------------------------------------------


@families
def test_greedy_equals_transformers(family: str, sizes: dict[str, Any]) -> None:
    fast, plain = pair(build_model(family, **sizes))
    wanted = [(transformers_greedy(plain, prompt), Finish.LENGTH) for prompt in PROMPTS]
    assert max(map(len, PROMPTS)) + NEW_TOKENS > SLOT_STEP
    assert run(fast) == wanted
    assert run(fast, batch_size=1) == wanted  # a batch's rows do not depend on one another
    assert run(plain) == wanted


def test_base_and_adapter_as_they_are_switched(models: tuple[Any, Any]) -> None:
    fast, plain = models
    adapted = run(fast)
    with fast.disable_adapter(), plain.disable_adapter():
        base = run(fast)
        assert base == run(plain)
    assert base != adapted and run(fast) == adapted


def test_first_logits_are_those_of_a_forward(models: tuple[Any, Any]) -> None:
    from medcot.engine import engine_of

    fast, plain = models
    engine = engine_of(fast)
    assert engine is not None
    with torch.no_grad():
        decoder = Decoder(engine, len(PROMPTS), 25)
        places = [3, 0, 6, 1, 2, 5, 4]
        first, second = decoder.read(places, PROMPTS), decoder.step(torch.full((len(PROMPTS),), 5))
        for row, (place, prompt) in enumerate(zip(places, PROMPTS, strict=True)):
            wanted = plain(input_ids=torch.tensor([[*prompt, 5]])).logits[0]
            assert torch.allclose(first[row], wanted[-2], atol=1e-4)
            assert torch.allclose(second[place], wanted[-1], atol=1e-4)
        assert all(
            torch.allclose(logits, first[row], atol=1e-4)
            for row, logits in enumerate(torch.cat(list(next_logits(engine, PROMPTS))))
        )


# --- stopping ---------------------------------------------------------------------------------------------------------


def spread_stops(answers: Sequence[list[int]]) -> list[int]:
    """Three token ids at which the answers stop at different steps, one of them never."""
    for first in range(3, VOCAB):
        for second in range(first + 1, VOCAB):
            stops = [next((i for i, t in enumerate(a) if t in (first, second)), None) for a in answers]
            if None in stops and len({stop for stop in stops if stop is not None}) >= 4:
                return [first, second]
    raise AssertionError("no pair of ids stops these answers apart")


def test_rows_stop_at_eos_and_leave_the_cache(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = models
    sizes: list[int] = []
    keep = Decoder.keep

    def spy(decoder: Decoder, places: Sequence[int]) -> None:
        keep(decoder, places)
        sizes.append(len(decoder.lengths))

    monkeypatch.setattr(Decoder, "keep", spy)
    eos = spread_stops([tokens for tokens, _ in run(fast)])
    wanted = [transformers_greedy(plain, prompt, eos) for prompt in PROMPTS]
    for model in (fast, plain):
        monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
        for batch_size in (1, 3, len(PROMPTS)):
            got = run(model, eos=eos[0], batch_size=batch_size)
            assert [tokens for tokens, _ in got] == wanted
            for tokens, finish in got:
                assert finish == (Finish.EOS if tokens[-1] in eos else Finish.LENGTH)
                assert not set(tokens[:-1]) & set(eos)
                assert finish == Finish.EOS or len(tokens) == NEW_TOKENS
    assert {finish for _, finish in got} == {Finish.EOS, Finish.LENGTH}
    assert len(sizes) >= 3 and len(set(sizes)) >= 3  # rows left the cache in several goes


def test_the_tokenizers_eos_stops_too(either: Any) -> None:
    tokens = run(either)[0][0]
    (got,) = run(either, PROMPTS[:1], eos=tokens[6])
    assert got == (tokens[: tokens.index(tokens[6]) + 1], Finish.EOS)


def test_a_token_at_the_limit_may_be_eos(either: Any) -> None:
    tokens = run(either)[0][0]
    number = next(i for i, token in enumerate(tokens) if i > 2 and token not in tokens[:i])
    (got,) = run(either, PROMPTS[:1], eos=tokens[number], max_new_tokens=number + 1)
    assert got == (tokens[: number + 1], Finish.EOS)
    (got,) = run(either, PROMPTS[:1], eos=tokens[number], max_new_tokens=number)
    assert got == (tokens[:number], Finish.LENGTH)


def test_eos_can_be_passed_over(either: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(either)
    monkeypatch.setattr(either.generation_config, "eos_token_id", wanted[0][0][3])
    assert run(either, eos=wanted[0][0][3], stop_at_eos=False) == wanted


def test_the_models_repetition_penalty_changes_nothing(either: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some checkpoints ship one; an answer may not depend on which path wrote it."""
    wanted = run(either)
    monkeypatch.setattr(either.generation_config, "repetition_penalty", 1.5)
    assert run(either) == wanted


@pytest.mark.parametrize(
    ("configured", "eos", "wanted"), [([4, 5], 6, {4, 5, 6}), (4, 4, {4}), (None, 6, {6}), (None, None, set())]
)
def test_eos_ids_come_from_both(configured: object, eos: int | None, wanted: set[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert eos_token_ids(model, tokenizer_with(eos)) == wanted


# --- slots that are filled again --------------------------------------------------------------------------------------

ROOMS = [3, 1, 40, 17, 8, 29, 5]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize(("family", "sizes"), [FAMILIES[0], FAMILIES[1]], ids=["llama", "mistral"])
def test_a_refilled_slot_writes_what_a_batch_of_one_does(family: str, sizes: Any, sampling: Sampling) -> None:
    fast, plain = pair(build_model(family, **sizes))
    prompts, rooms = [*PROMPTS, *PROMPTS[::-1]], [*ROOMS, *ROOMS]
    options: dict[str, Any] = {"max_new_tokens": rooms, "sampling": sampling, "seed": 5}
    wanted = run(plain, prompts, batch_size=1, **options)
    assert [len(tokens) for tokens, _ in wanted] == rooms
    for batch_size in (1, 2, 3, 5, 99):
        assert run(fast, prompts, batch_size=batch_size, **options) == wanted
    assert run(plain, prompts, batch_size=4, **options) == wanted


def test_slots_are_filled_while_others_go_on(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = models
    events: list[str] = []

    def watch(name: str) -> None:
        bound = getattr(Decoder, name)

        def spy(*arguments: Any) -> Any:
            events.append(name)
            return bound(*arguments)

        monkeypatch.setattr(Decoder, name, spy)

    watch("read")
    watch("step")
    run(fast, PROMPTS[:4], batch_size=2, max_new_tokens=[30, 6, 6, 6])
    assert events.count("read") == 3 and events.index("step") < len(events) - events[::-1].index("read") - 1
    assert events.count("step") == 29  # the short ones went through the second slot beside the long one


def test_draws_belong_to_their_row(either: Any) -> None:
    seeds = [11, 2**62, 7, 11, 0, 3, 99]
    whole = run(either, sampling=WARM, seed=seeds)
    order = [5, 2, 6, 0]
    some = run(either, [PROMPTS[row] for row in order], sampling=WARM, seed=[seeds[row] for row in order], batch_size=3)
    assert some == [whole[row] for row in order]
    same = run(either, [PROMPTS[0]] * 3, sampling=WARM, seed=[4, 5, 4])
    assert same[0] == same[2] != same[1]
    assert run(either, sampling=WARM, seed=8) == run(either, sampling=WARM, seed=[row_seed(8, i) for i in range(7)])


def test_a_smaller_room_is_the_beginning(either: Any) -> None:
    whole = run(either, sampling=WARM, seed=3)
    cut = run(either, sampling=WARM, seed=3, max_new_tokens=9, batch_size=2)
    assert cut == [(tokens[:9], Finish.LENGTH) for tokens, _ in whole]


def test_an_answer_that_ends_at_its_first_token(either: Any) -> None:
    firsts = [tokens[0] for tokens, _ in run(either)]
    eos = max(firsts, key=firsts.count)
    for batch_size in (1, 2, 7):
        for first, (tokens, finish) in zip(firsts, run(either, eos=eos, batch_size=batch_size), strict=True):
            assert (tokens == [eos] and finish is Finish.EOS) == (first == eos)
    everywhere = run(either, [PROMPTS[firsts.index(eos)]] * 5, eos=eos, batch_size=2)
    assert everywhere == [([eos], Finish.EOS)] * 5


def test_each_answer_is_handed_over_as_it_ends(either: Any) -> None:
    order: list[int] = []
    kept: dict[int, Any] = {}

    def on_written(row: int, answer: Any) -> None:
        assert row not in kept
        kept[row] = answer
        order.append(row)

    got = run(either, batch_size=3, max_new_tokens=ROOMS, on_written=on_written)
    assert [kept[row] for row in range(len(PROMPTS))] == got
    if order != sorted(order):  # the plain path hands over batch by batch
        assert order == [1, 0, 4, 3, 6, 5, 2]


def test_what_was_handed_over_is_kept_when_all_else_is_lost(models: tuple[Any, Any]) -> None:
    fast, _ = models
    kept = []

    def on_written(row: int, answer: Any) -> None:
        kept.append(row)
        if len(kept) == 4:
            raise KeyboardInterrupt

    fast.train()
    with pytest.raises(KeyboardInterrupt):
        run(fast, batch_size=3, max_new_tokens=ROOMS, on_written=on_written)
    assert kept == [1, 0, 4, 3] and fast.training
    fast.eval()


def test_prompts_are_read_in_pieces(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from medcot.engine import slots

    fast, _ = models
    wanted = run(fast)
    monkeypatch.setattr(slots, "READ_TOKENS", 24)
    sizes: list[int] = []
    read = Decoder.read

    def spy(decoder: Decoder, places: Any, prompts: Any) -> Tensor:
        sizes.append(sum(map(len, prompts)))
        return read(decoder, places, prompts)

    monkeypatch.setattr(Decoder, "read", spy)
    assert run(fast, batch_size=7) == wanted
    assert sizes == [6, 23, 24, 17] and max(sizes) <= 24


def test_no_prompts(either: Any) -> None:
    assert run(either, []) == []


# --- being told -------------------------------------------------------------------------------------------------------


def test_every_token_is_told_as_it_comes(models: tuple[Any, Any]) -> None:
    fast, _ = models
    eos = spread_stops([tokens for tokens, _ in run(fast)])[0]
    told: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    progress: list[tuple[int, int]] = []
    got = run(
        fast,
        eos=eos,
        batch_size=3,
        on_token=lambda row, token: told[row].append(token),
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert list(told.values()) == [tokens for tokens, _ in got]
    assert progress == sorted(progress) and progress[-1] == (len(PROMPTS), len(PROMPTS))
    assert {total for _, total in progress} == {len(PROMPTS)}


def test_the_plain_path_tells_too(models: tuple[Any, Any]) -> None:
    _, plain = models
    told: list[int] = []
    progress: list[tuple[int, int]] = []
    (got,) = run(plain, PROMPTS[:1], batch_size=1, on_token=lambda row, token: told.append(token))
    assert told == got[0]
    run(plain, on_progress=lambda done, total: progress.append((done, total)))
    assert progress == [(4, 7), (7, 7)]


def test_training_mode_is_given_back(either: Any) -> None:
    either.train()
    run(either, PROMPTS[:1], max_new_tokens=1)
    assert either.training
    either.eval()
    run(either, PROMPTS[:1], max_new_tokens=1)
    assert not either.training


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_draws_and_leaves_other_generators_alone(either: Any) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = run(either, sampling=WARM, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert run(either, sampling=WARM, seed=1) == first
    assert run(either, sampling=WARM, seed=2) != first
    assert run(either) != first


def test_a_tiny_nucleus_is_greedy(either: Any) -> None:
    assert run(either, sampling=Sampling(0.9, 1e-6)) == run(either)


def test_every_path_draws_the_same(models: tuple[Any, Any]) -> None:
    fast, plain = models
    for sampling in (WARM, Sampling(1.0, 1.0)):
        assert run(fast, sampling=sampling, seed=6) == run(plain, sampling=sampling, seed=6)


def test_a_stream_is_its_seed_s_own() -> None:
    first = make_chances(3, 1000)
    assert (make_chances(3, 40) == first[:40]).all() and first.min() >= 0 and first.max() < 1
    for other in (2, 4, 3 + 2**32):  # PyTorch's own generator takes the last for the first
        assert not (make_chances(other, 1000) == first).any()
    assert len({row_seed(seed, row) for seed in range(100) for row in range(100)}) == 10_000


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_a_draw_is_the_token_whose_stretch_holds_the_number(top_p: float) -> None:
    logits = 3 * torch.randn(500, generator=torch.Generator().manual_seed(1))
    shares = nucleus(logits, 0.7, top_p)
    edges, chances = shares.cumsum(0), torch.from_numpy(make_chances(2, 64))
    for chance, token in zip(
        chances.double(), draw(logits.expand(64, -1), Sampling(0.7, top_p), chances).tolist(), strict=True
    ):
        assert shares[token] > 0 and edges[token] - shares[token] - 1e-6 <= chance <= edges[token] + 1e-6
    most = torch.tensor([1 - 2**-24, 0.0])  # the ends of the interval
    last, first = draw(logits.expand(2, -1), Sampling(0.7, top_p), most).tolist()
    assert (first, last) == (int(shares.nonzero()[0]), int(shares.nonzero()[-1]))


# Token ids in no order of probability, so that a forgotten re-sorting shows.
CHANCES = {3: 0.5, 0: 0.3, 4: 0.15, 1: 0.05, 2: 0.0}
LOGITS = torch.tensor([CHANCES[i] for i in range(5)]).log()
DRAWS = 40_000
# Four standard deviations of a share of 40,000 draws, 4 * sqrt(0.25 / 40,000).
NOISE = 0.01


def shares(temperature: float, top_p: float) -> dict[int, float]:
    chances = torch.from_numpy(make_chances(4, DRAWS))
    drawn = draw(LOGITS.expand(DRAWS, -1), Sampling(temperature, top_p), chances)
    assert drawn.shape == (DRAWS,)
    return {token: int((drawn == token).sum()) / DRAWS for token in range(5)}


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (0.3, {3}),
        (0.49, {3}),
        (0.51, {3, 0}),  # the smallest set that reaches top_p, so the token that crosses it belongs
        (0.79, {3, 0}),
        (0.81, {3, 0, 4}),
        (0.96, {3, 0, 4, 1}),
        (1.0, {3, 0, 4, 1}),
    ],
)
def test_draws_follow_the_nucleus(top_p: float, nucleus: set[int]) -> None:
    total = sum(CHANCES[token] for token in nucleus)
    for token, share in shares(1.0, top_p).items():
        if token in nucleus:
            assert share == pytest.approx(CHANCES[token] / total, abs=NOISE)
        else:
            assert share == 0


def test_temperature_comes_before_the_nucleus() -> None:
    powers = {token: chance**2 for token, chance in CHANCES.items()}  # temperature 1/2 squares the chances
    top = {token: power / (powers[3] + powers[0]) for token, power in powers.items() if token in (3, 0)}
    drawn = shares(0.5, 0.9)  # 0.25 and 0.09 of 0.365: 93 % in the first two
    assert drawn[3] == pytest.approx(top[3], abs=NOISE) and drawn[0] == pytest.approx(top[0], abs=NOISE)
    assert drawn[1] == drawn[2] == drawn[4] == 0


def test_temperature_zero_takes_the_likeliest() -> None:
    assert shares(0.0, 0.5)[3] == 1.0


def test_each_row_is_drawn_from_its_own_logits() -> None:
    logits = torch.full((6, 9), -50.0)
    wanted = torch.tensor([8, 0, 3, 3, 7, 1])
    logits[torch.arange(6), wanted] = 50.0
    for sampling in (GREEDY, WARM, Sampling(1.0, 1.0)):
        assert torch.equal(draw(logits, sampling, torch.rand(6)), wanted)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8}, Sampling(0.7, 0.8)),
        ({"do_sample": True, "temperature": None, "top_p": None}, Sampling(0.6, 0.95)),
        ({"do_sample": False, "temperature": 1.0, "top_p": 1.0}, Sampling(0.6, 0.95)),
    ],
)
def test_sampling_defaults(settings: dict[str, Any], wanted: Sampling) -> None:
    assert sampling_defaults(SimpleNamespace(generation_config=SimpleNamespace(**settings))) == wanted


@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nucleus_found_among_the_likeliest_is_that_of_the_whole_vocabulary(
    scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat rows, whose nucleus is wider, and 16-bit rows, full of equals, included."""
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(24, 3000, generator=generator) * scale).to(dtype)
    chances = torch.rand(24, generator=generator)
    for top_p in (0.05, 0.9, 0.999):
        got = draw(logits, Sampling(0.6, top_p), chances)
        with monkeypatch.context() as patch:
            patch.setattr("medcot.generate.LIKELIEST", logits.shape[1])
            assert torch.equal(got, draw(logits, Sampling(0.6, top_p), chances))
