"""Answers written token by token: the tiny model in memory, and vLLM's seam with a module that stands for it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from medcot.engine import accelerate
from medcot.errors import DataError, MissingExtraError, ModelError
from medcot.evaluate import vllm_writer
from medcot.evaluate.backends import Answer, Counts, Ending, Limits, Request
from medcot.evaluate.grading import grade
from medcot.evaluate.local import ModelWriter, TokenBackend
from medcot.evaluate.store import AnswerStore, Subject, answer_all
from medcot.evaluate.vllm_writer import VllmWriter
from medcot.evaluate.writing import Shares, Thoughts, seed_of
from medcot.generate import Generated, OnWritten, Sampling
from medcot.prompt import Style, encode_prompt, encode_row, render_prompt
from medcot.records import AnswerKind, Example, Finish, Outcome
from tiny_models import attach

GREEDY, WARM = Sampling(0.0, 1.0), Sampling(0.9, 0.95)
WRITTEN, FORCED, LIKELIHOOD = (Limits(20, 12, ending) for ending in Ending)
QUESTIONS = ["one?", "a much longer question, is it not?", "and two?", "abcd ab cd?", "why?", "a middling question?"]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


def load(model_folder: Path, *, fast: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).requires_grad_(False).eval()
    if fast:
        model = attach(model)
        assert accelerate(model).fast
    return model


@pytest.fixture(scope="module", params=["fast", "plain"])
def model(request: pytest.FixtureRequest, model_folder: Path) -> Any:
    return load(model_folder, fast=request.param == "fast")


def make_requests(limits: Limits, sampling: Sampling = GREEDY, seeds: Sequence[int] = (0,)) -> list[Request]:
    return [
        Request(f"q-{number}", question, sampling, seed, limits, ("A", "B", "C", "D"))
        for seed in seeds
        for number, question in enumerate(QUESTIONS)
    ]


def ask(backend: TokenBackend, requests: list[Request]) -> dict[tuple[str, int], Answer]:
    answers: list[Answer] = []
    backend.answer(requests, answers.append)
    assert len(answers) == len(requests)
    return {(answer.item_id, answer.seed): answer for answer in answers}


def same(left: Answer, right: Answer) -> bool:
    close = left.log_probs is None or right.log_probs is None or all(
        math.isclose(left.log_probs[key], right.log_probs[key], abs_tol=1e-4) for key in left.log_probs
    )  # fmt: skip
    return close and (left.text, left.finish, left.forced) == (right.text, right.finish, right.forced)


@pytest.mark.parametrize("limits", [WRITTEN, FORCED, LIKELIHOOD, Limits(0, 12), Limits(0, 12, Ending.FORCED)])
def test_the_same_answers_whatever_the_batch(model: Any, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
    writer, found = ModelWriter(model, tokenizer), []
    for size, tokens in ((1, None), (4, None), (16, None), (16, 300)):
        backend = TokenBackend(writer, tokenizer, Style.SHORT, batch_size=size, batch_tokens=tokens)
        found.append(ask(backend, make_requests(limits)))
    for other in found[1:]:
        assert all(same(answer, other[place]) for place, answer in found[0].items())
    assert len({answer.text for answer in found[0].values()}) > 1


def test_several_seeds_and_the_store(model: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    backend = TokenBackend(ModelWriter(model, tokenizer), tokenizer, Style.SHORT, batch_size=4)
    requests = make_requests(WRITTEN, WARM, seeds=(1, 2))
    with AnswerStore(tmp_path / "a.jsonl") as store:
        first = answer_all(backend, requests, store, Subject("tiny", None, "t"))
        again = answer_all(backend, requests, store, Subject("tiny", None, "t"))
    assert (first.num_asked, again.num_asked) == (12, 0) and first.answers == again.answers
    texts = [answer.text for answer in first.answers]
    assert texts[:6] != texts[6:]
    assert [answer.text for answer in sorted(ask(backend, requests[:6]).values(), key=lambda a: a.item_id)] == texts[:6]


def test_draws_belong_to_the_item(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Other questions beside it, another order, another batch, another seed's requests: nothing changes an answer."""

    def fresh(size: int) -> TokenBackend:
        return TokenBackend(ModelWriter(model, tokenizer), tokenizer, Style.SHORT, batch_size=size)

    whole = ask(fresh(4), make_requests(FORCED, WARM, seeds=(1, 2)))
    for size in (1, 3):
        some = ask(fresh(size), make_requests(FORCED, WARM, seeds=(2,))[::-2])
        assert len(some) == 3 and all(same(answer, whole[place]) for place, answer in some.items())
    again = dataclasses.replace(make_requests(FORCED, WARM)[0], item_id="another")
    assert not same(ask(fresh(1), [again])["another", 0], ask(fresh(1), make_requests(FORCED, WARM)[:1])["q-0", 0])


def test_answers_are_handed_over_as_they_end(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """A killed evaluation keeps what had ended: here the fourth answer is the last that anyone hears of."""
    kept: list[Answer] = []

    def on_answer(answer: Answer) -> None:
        kept.append(answer)
        if len(kept) == 4:
            raise KeyboardInterrupt

    limits = [WRITTEN] * 3 + [Limits(0, 4)] * 3
    requests = [dataclasses.replace(r, limits=x) for r, x in zip(make_requests(WRITTEN), limits, strict=True)]
    backend = TokenBackend(ModelWriter(model, tokenizer), tokenizer, Style.SHORT, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        backend.answer(requests, on_answer)
    assert {answer.item_id for answer in kept[:3]} == {"q-0", "q-1", "q-2"} and kept[3].num_think_tokens > 0


def test_seconds_add_up_to_the_time(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    backend = TokenBackend(ModelWriter(model, tokenizer), tokenizer, Style.SHORT, batch_size=4)
    for limits in (WRITTEN, FORCED, LIKELIHOOD):
        start = time.monotonic()
        answers = ask(backend, make_requests(limits))
        spent = time.monotonic() - start
        assert all(answer.seconds > 0 for answer in answers.values() if limits is WRITTEN)
        assert sum(answer.seconds for answer in answers.values()) <= spent
        if limits is WRITTEN:
            assert sum(answer.seconds for answer in answers.values()) > 0.5 * spent


def test_measuring_passes_over_eos(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    ids = tokenizer("one?").input_ids
    rooms: dict[bool, list[int]] = {}
    for stop in (True, False):
        got: dict[int, Generated] = {}
        writer = ModelWriter(model, tokenizer, stop_at_eos=stop)
        writer.write([ids] * 40, [60] * 40, Sampling(2.0, 1.0), range(40), got.__setitem__, batch_size=16)
        rooms[stop] = [len(got[row][0]) for row in range(40)]
    assert min(rooms[True]) < 60 and rooms[False] == [60] * 40


# --- thoughts ---------------------------------------------------------------------------------------------------------


class Counted(ModelWriter):
    """Counts the tokens it writes."""

    num_tokens = 0

    def write(self, *arguments: Any, **how: Any) -> None:
        *rest, on_written = arguments

        def count(place: int, generated: Generated) -> None:
            self.num_tokens += len(generated[0])
            on_written(place, generated)

        super().write(*rest, count, **how)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_small_budget_is_the_beginning_of_a_large_one(
    model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> None:
    writer = Counted(model, tokenizer)
    sweep = TokenBackend(writer, tokenizer, Style.SHORT, batch_size=4)
    before = 0
    for cap in (24, 16, 5, 1):
        requests = make_requests(Limits(cap, 6, Ending.FORCED), sampling, seeds=(3, 4))
        found = ask(sweep, requests)
        fresh = ask(TokenBackend(ModelWriter(model, tokenizer), tokenizer, Style.SHORT, batch_size=4), requests)
        assert all(same(answer, fresh[place]) for place, answer in found.items())
        assert cap == 24 or writer.num_tokens - before <= 6 * len(requests)  # the answers alone
        before = writer.num_tokens
    ask(sweep, make_requests(Limits(30, 6, Ending.FORCED), sampling, seeds=(3,)))  # more than is known
    assert writer.num_tokens - before > 6 * len(QUESTIONS)


def test_largest_budgets_are_asked_first(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    caps = (3, 24, 12)
    requests = [request for cap in caps for request in make_requests(Limits(cap, 6, Ending.LIKELIHOOD), WARM)]
    writer, answers = Counted(model, tokenizer), list[Answer]()
    TokenBackend(writer, tokenizer, Style.SHORT, batch_size=4).answer(requests, answers.append)
    assert len(answers) == 18 and writer.num_tokens <= 24 * 6
    for cap in caps:
        backend = TokenBackend(ModelWriter(model, tokenizer), tokenizer, Style.SHORT, batch_size=4)
        alone = ask(backend, make_requests(Limits(cap, 6, Ending.LIKELIHOOD), WARM))
        place = (24, 12, 3).index(cap)
        for answer in answers[6 * place : 6 * place + 6]:
            assert same(answer, alone[answer.item_id, 0])


def test_what_is_known_of_a_thought() -> None:
    thoughts = Thoughts()
    thoughts.keep("cut", [5, 6, 7], Finish.LENGTH)
    thoughts.keep("ended", [5, 6, 1], Finish.EOS)
    thoughts.keep("ended", [5], Finish.LENGTH)  # less than is known
    assert thoughts.find("cut", 2) == thoughts.find("ended", 2) == ([5, 6], Finish.LENGTH)
    assert thoughts.find("cut", 3) == ([5, 6, 7], Finish.LENGTH) and thoughts.find("cut", 4) is None
    assert thoughts.find("ended", 3) == thoughts.find("ended", 9) == ([5, 6, 1], Finish.EOS)
    assert thoughts.find("other", 1) is None


def test_shares_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("medcot.evaluate.writing.time", SimpleNamespace(monotonic=lambda: now[0]))
    shares = Shares(3, 2)
    found = {}
    for row, at in ((1, 4.0), (0, 10.0), (2, 11.0)):
        now[0] = at
        found[row] = shares.end(row)
    assert found == {1: 2.0, 0: 5.0, 2: 4.0}  # two share the first ten, one has the last alone


def test_a_rows_seed_is_its_requests_and_its_items() -> None:
    first = make_requests(WRITTEN)[0]
    others = [dataclasses.replace(first, item_id="q-00"), dataclasses.replace(first, seed=1)]
    seeds = [seed_of(first), seed_of(first, "again"), *map(seed_of, others)]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(first) == 8764378790143933098  # the same in every process and version


def test_the_prompt_is_the_serving_prompt(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    backend = TokenBackend(ModelWriter(model, tokenizer), tokenizer, Style.TUTORIAL, batch_size=4)
    request = make_requests(WRITTEN)[1]
    assert backend.prompt_of(request) == render_prompt(request.question, Style.TUTORIAL, tokenizer)


def test_a_question_that_would_steer_the_model_fails_alone(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    requests = make_requests(WRITTEN)
    requests.append(Request("bad", "what is </think>?", GREEDY, 0, WRITTEN))
    answers = ask(TokenBackend(ModelWriter(model, tokenizer), tokenizer, Style.SHORT, batch_size=4), requests)
    assert [key[0] for key, answer in answers.items() if answer.error] == ["bad"]
    assert "'</think>'" in (answers["bad", 0].error or "")


# --- the thinking budget, with a writer that is told what to write ----------------------------------------------------


class Script:
    """Writes what it is told, by how its prompt ends."""

    def __init__(self, tokenizer: Any, *answers: tuple[str, str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.prompts: list[str] = []

    def write(
        self, prompts: Any, rooms: Any, sampling: Any, seeds: Any, on_written: OnWritten, *, batch_size: int
    ) -> None:
        for place, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)):
            on_written(place, self._continue(self.tokenizer.decode(prompt), room))

    def _continue(self, text: str, most: int) -> Generated:
        self.prompts.append(text)
        ids = self.tokenizer(next(a for end, a in self.answers if text.endswith(end))).input_ids
        cut = len(ids) >= most
        return (ids[:most], Finish.LENGTH) if cut else ([*ids, self.tokenizer.eos_token_id], Finish.EOS)

    def score(self, prompts: Any, candidates: Any) -> list[list[float]]:
        self.prompts += [self.tokenizer.decode(prompt) for prompt in prompts]
        return [[-3.0, -1.0, -2.0, -4.0][: len(ids)] for ids in candidates]


def run(tokenizer: Any, limits: Limits, *answers: tuple[str, str], style: Style = Style.SHORT) -> tuple[Answer, Script]:
    writer = Script(tokenizer, *answers)
    backend = TokenBackend(writer, tokenizer, style, batch_size=4)
    return ask(backend, make_requests(limits)[:1])["q-0", 0], writer


PROBLEM = Example("q-0", "one?", "t", options=dict.fromkeys("ABCD", "x"), gold="B", answer_kind=AnswerKind.LETTER)


def test_thinking_is_closed_at_the_cap(tokenizer: PreTrainedTokenizerBase) -> None:
    answer, writer = run(
        tokenizer, Limits(10, 12, Ending.FORCED), ("<think>", "on and on and on"), ("Final answer:", " B\nBecause")
    )
    assert writer.prompts[1] == "one?\n<think>on and on </think>Final answer:"
    assert (answer.think, answer.answer, answer.closed) == ("on and on", "Final answer: B", True)
    assert (answer.forced, answer.finish, answer.counts) == (True, Finish.EOS, Counts.EXACT)
    assert grade(PROBLEM, answer.completion).outcome is Outcome.CORRECT


def test_a_tag_that_the_cap_cut_in_two_is_written_once(tokenizer: PreTrainedTokenizerBase) -> None:
    answer, writer = run(tokenizer, Limits(7, 12, Ending.FORCED), ("<think>", "hm</think>B"), ("Final answer:", " B"))
    assert writer.prompts[1] == "one?\n<think>hm</think>Final answer:"
    assert (answer.think, answer.answer) == ("hm", "Final answer: B")


def test_thinking_that_ends_unclosed_is_closed_too(tokenizer: PreTrainedTokenizerBase) -> None:
    answer, writer = run(tokenizer, Limits(99, 12, Ending.FORCED), ("<think>", "hm"), ("Final answer:", " B"))
    assert writer.prompts[1] == "one?\n<think>hm</think>Final answer:" and answer.forced
    assert answer.text == "hm</think>Final answer: B"


def test_a_forced_answer_that_is_cut_is_no_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    answer, _ = run(tokenizer, Limits(5, 4, Ending.FORCED), ("<think>", "on and on"), ("Final answer:", " Because it"))
    assert answer.finish is Finish.LENGTH and grade(PROBLEM, answer.completion).outcome is Outcome.UNPARSED


def test_who_closes_in_time_is_left_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    answer, writer = run(tokenizer, Limits(60, 12, Ending.FORCED), ("<think>", "hm</think>Final answer: B"))
    assert len(writer.prompts) == 1 and not answer.forced and answer.text == "hm</think>Final answer: B"


def test_an_answer_begun_before_the_cap_goes_on(tokenizer: PreTrainedTokenizerBase) -> None:
    spoken = ("<think>", "hm</think>So, Final answer: B")
    cap = len(tokenizer("hm</think>So, F").input_ids)  # the tag is several tokens here
    answer, writer = run(tokenizer, Limits(cap, 30, Ending.FORCED), spoken, ("</think>So, F", "inal answer: B"))
    assert writer.prompts[1].endswith("hm</think>So, F") and not answer.forced
    assert (answer.answer, answer.finish) == ("So, Final answer: B", Finish.EOS)
    answer, _ = run(tokenizer, Limits(cap, 9, Ending.FORCED), spoken, ("</think>So, F", "inal answer: B"))
    assert (answer.num_answer_tokens, answer.finish) == (9, Finish.LENGTH)


def test_no_thinking_is_an_empty_block(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] + '!<think>\\n' }}"
    for style, wanted in ((Style.SHORT, "<think></think>"), (Style.CHAT, "!<think>\n\n</think>\n\n")):
        answer, writer = run(tokenizer, Limits(0, 40), ("", "Final answer: B"), style=style)
        assert writer.prompts[0].endswith(wanted)
        assert (answer.think, answer.answer, answer.forced) == ("", "Final answer: B", True)
        answer, writer = run(tokenizer, Limits(0, 9, Ending.FORCED), ("", " B"), style=style)
        assert writer.prompts == [writer.prompts[0]] and writer.prompts[0].endswith(wanted + "Final answer:")


@pytest.mark.parametrize("style", list(Style))
def test_the_forced_close_has_the_ids_of_a_training_row(tokenizer: PreTrainedTokenizerBase, style: Style) -> None:
    tokenizer.chat_template = "{{ messages[0]['content'] + '!<think>\\n' }}"
    example = Example("q-0", "one?", "t", reasoning="on and on", response="Final answer: B")
    row = encode_row(example, style, tokenizer, train_on_prompt=False)
    opened = len(encode_prompt("one?", style, tokenizer))
    glue = tokenizer("\n").input_ids if style is Style.TUTORIAL else []
    taken: list[list[int]] = []

    class Rows(Script):
        def write(self, prompts: Any, rooms: Any, sampling: Any, seeds: Any, on_written: Any, **_: Any) -> None:
            taken.append(list(prompts[0]))
            ids = glue + tokenizer("on and on").input_ids if len(taken) == 1 else tokenizer(" B").input_ids
            on_written(0, (ids, Finish.LENGTH))

    backend = TokenBackend(Rows(tokenizer), tokenizer, style, batch_size=1)
    answer = ask(backend, make_requests(Limits(20, 9, Ending.FORCED))[:1])["q-0", 0]
    assert len(taken[0]) == opened
    assert [*taken[1], *tokenizer(" B").input_ids, tokenizer.eos_token_id] == row.input_ids
    assert answer.answer == "Final answer: B"


# --- likelihoods ------------------------------------------------------------------------------------------------------


def test_the_likeliest_choice_is_taken(tokenizer: PreTrainedTokenizerBase) -> None:
    limits = Limits(10, 12, Ending.LIKELIHOOD)
    answer, writer = run(tokenizer, limits, ("<think>", "on and on and on"))
    assert writer.prompts[1] == "one?\n<think>on and on </think>Final answer: "  # a byte-level space is its own token
    assert (answer.answer, answer.forced, answer.finish) == ("Final answer: B", True, Finish.EOS)
    assert answer.log_probs == {"A": -3.0, "B": -1.0, "C": -2.0, "D": -4.0}
    answer, writer = run(tokenizer, Limits(40, 12, Ending.LIKELIHOOD), ("<think>", "hm</think>I say: C"))
    assert writer.prompts[1] == "one?\n<think>hm</think>Final answer: " and not answer.forced
    assert grade(PROBLEM, answer.completion).outcome is Outcome.CORRECT
    answer, writer = run(tokenizer, Limits(0, 12, Ending.LIKELIHOOD))
    assert writer.prompts == ["one?\n<think></think>Final answer: "] and answer.forced


def test_likelihoods_are_those_of_a_forward(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [tokenizer(text).input_ids for text in QUESTIONS]
    scores = ModelWriter(model, tokenizer).score(prompts, [[5, 70, 9]] * len(prompts))
    with torch.no_grad():
        for prompt, found in zip(prompts, scores, strict=True):
            wanted = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[[5, 70, 9]]
            assert torch.allclose(torch.tensor(found), wanted, atol=1e-4)


def test_what_cannot_be_compared_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = TokenBackend(Script(tokenizer, ("", "hm")), tokenizer, Style.SHORT, batch_size=4)
    for choices in ((), ("A",), ("A", "A1"), ("maybe", "may")):
        with pytest.raises(DataError):
            backend.answer([Request("q", "one?", GREEDY, 0, LIKELIHOOD, choices)], lambda _: None)
    answers = ask(backend, [Request("q", "one?", GREEDY, 0, LIKELIHOOD, ("yes", "no", "maybe"))])
    assert answers["q", 0].answer == "Final answer: no"


# --- vLLM -------------------------------------------------------------------------------------------------------------


class FakeVllm(SimpleNamespace):
    """What of vLLM's module is used."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(calls=[], lora=SimpleNamespace(request=SimpleNamespace(LoRARequest=lambda *a: ("lora", *a))))
        fake = self

        class LLM:
            def __init__(self, **settings: Any) -> None:
                fake.settings = settings

            def generate(self, prompts: Any, params: Any, **how: Any) -> list[Any]:
                fake.calls.append((prompts, params, how))
                ids = tokenizer("hm</think>Final answer: B").input_ids
                end = SimpleNamespace(token_ids=(*ids, tokenizer.eos_token_id), finish_reason="stop")
                cut = SimpleNamespace(token_ids=tuple(ids[:4]), finish_reason="length")
                return [SimpleNamespace(outputs=[cut if number == 1 else end]) for number in range(len(prompts))]

        self.LLM, self.SamplingParams = LLM, lambda **settings: settings


def test_vllm_is_asked_by_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    fake = FakeVllm(tokenizer)
    writer = VllmWriter(fake, "a-model", adapter=Path("run/adapter"), adapter_rank=8, max_model_len=512)
    assert fake.settings == {"model": "a-model", "enable_lora": True, "max_lora_rank": 8, "max_model_len": 512}
    answers = ask(TokenBackend(writer, tokenizer, Style.SHORT, batch_size=99), make_requests(WRITTEN, WARM, (7,))[:3])
    ((prompts, params, how),) = fake.calls
    assert [p["prompt_token_ids"] for p in prompts] == [encode_prompt(q, Style.SHORT, tokenizer) for q in QUESTIONS[:3]]
    seeds = [param.pop("seed") for param in params]
    assert len(set(seeds)) == 3
    assert params == [{"temperature": 0.9, "top_p": 0.95, "max_tokens": 32, "detokenize": False}] * 3
    assert how == {"lora_request": ("lora", "adapter", 1, "run/adapter"), "use_tqdm": False}
    finishes = [answer.finish for answer in answers.values()]
    assert finishes.count(Finish.LENGTH) == 1 and answers["q-0", 7].answer == "Final answer: B"


def test_vllm_without_likelihoods_or_adapter(tokenizer: PreTrainedTokenizerBase) -> None:
    fake = FakeVllm(tokenizer)
    backend = TokenBackend(VllmWriter(fake, "m"), tokenizer, Style.SHORT, batch_size=9)
    assert fake.settings == {"model": "m"}
    with pytest.raises(ModelError, match="likeliest tokens only"):
        backend.answer(make_requests(LIKELIHOOD), lambda _: None)


def test_vllm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_writer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="vllm is not installed"):
        vllm_writer.load_vllm()
