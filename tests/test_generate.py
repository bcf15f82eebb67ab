"""Generation: the accelerated and the plain path against transformers' own generate, token for token in float32."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from medcot.engine.decoding import SLOT_STEP, Decoder
from medcot.generate import Sampling, draw, eos_token_ids, generate, sampling_defaults
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
        decoder = Decoder(engine, PROMPTS, 2)
        first, second = decoder.prefill(), decoder.step(torch.full((len(PROMPTS),), 5))
        for row, prompt in enumerate(PROMPTS):
            wanted = plain(input_ids=torch.tensor([[*prompt, 5]])).logits[0]
            assert torch.allclose(first[row], wanted[-2], atol=1e-4)
            assert torch.allclose(second[row], wanted[-1], atol=1e-4)


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

    def spy(decoder: Decoder, rows: Tensor) -> None:
        keep(decoder, rows)
        sizes.append(len(decoder.positions_B))

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


# Token ids in no order of probability, so that a forgotten re-sorting shows.
CHANCES = {3: 0.5, 0: 0.3, 4: 0.15, 1: 0.05, 2: 0.0}
LOGITS = torch.tensor([CHANCES[i] for i in range(5)]).log()
DRAWS = 40_000
# Four standard deviations of a share of 40,000 draws, 4 * sqrt(0.25 / 40,000).
NOISE = 0.01


def shares(temperature: float, top_p: float) -> dict[int, float]:
    drawn = draw(LOGITS.expand(DRAWS, -1), Sampling(temperature, top_p), torch.Generator().manual_seed(4))
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
        assert torch.equal(draw(logits, sampling, torch.Generator().manual_seed(0)), wanted)


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
