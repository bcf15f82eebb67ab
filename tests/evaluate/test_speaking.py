"""A question answered aloud is the answer that an evaluation would have had, told piece by piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medcot import engine, generate
from medcot.errors import DataError, ModelError
from medcot.evaluate.backends import Answer, Ending, Limits, Request
from medcot.evaluate.local import ASK, ModelWriter, TokenBackend
from medcot.evaluate.speaking import Speaker, choose_limits
from medcot.generate import Sampling
from medcot.model import attach_lora, load
from medcot.prompt import THINK_OPEN, Style

GREEDY = Sampling(0.0, 1.0)
QUESTION = "How many cups?"


@pytest.fixture(scope="module")
def adapter(model_folder, tmp_path_factory) -> Path:
    """An adapter that changes every logit."""
    import torch

    model = attach_lora(load(str(model_folder), precision="fp32", max_seq_length=512), r=4, alpha=64)
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    folder = tmp_path_factory.mktemp("speaking") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["fast", "plain"])
def speaker(request, model_folder, adapter) -> Speaker:
    loaded = load(str(model_folder), precision="fp32", max_seq_length=512)
    return Speaker(loaded, Style.SHORT, adapter=adapter, accelerate=request.param == "fast")


def _say(speaker: Speaker, limits: Limits, **options: Any) -> tuple[Any, str, str]:
    pieces: list[tuple[str, bool]] = []
    options = {"sampling": GREEDY, "seed": 1, **options}
    spoken = speaker.say(QUESTION, limits, on_text=lambda text, in_think: pieces.append((text, in_think)), **options)
    return spoken, *("".join(text for text, where in pieces if where is side) for side in (True, False))


def _evaluated(speaker: Speaker, limits: Limits) -> Answer:
    found: list[Answer] = []
    backend = TokenBackend(
        ModelWriter(speaker._model, speaker.tokenizer), speaker.tokenizer, speaker.style, batch_size=1
    )
    backend.answer([Request("x", QUESTION, GREEDY, 1, limits)], found.append)
    return found[0]


@pytest.mark.parametrize("think_tokens", [0, 1, 7, 60])
def test_a_budget_closes_the_thinking_as_an_evaluation_does(speaker, think_tokens):
    limits = choose_limits(think_tokens, 24)
    spoken, think, answer = _say(speaker, limits)
    wanted = _evaluated(speaker, limits)
    assert spoken.completion == wanted.completion
    assert spoken.forced == wanted.forced and spoken.forced and ASK in spoken.completion.answer
    assert think == spoken.completion.think
    # What is told is not taken back: behind a forced line's end it may have a little more than what counts.
    assert answer.startswith(spoken.completion.answer)


def test_without_a_budget_nothing_is_put_into_its_mouth(speaker):
    spoken, think, answer = _say(speaker, Limits(40, 0, Ending.WRITTEN))
    assert not spoken.forced and (think, answer) == (spoken.completion.think, spoken.completion.answer)


def test_the_base_is_the_model_without_its_adapter(speaker, model_folder):
    alone = Speaker(load(str(model_folder), precision="fp32", max_seq_length=512), Style.SHORT)
    limits = choose_limits(20, 8)
    base, tuned = _say(speaker, limits, base=True)[0], _say(speaker, limits)[0]
    assert base.completion == _say(alone, limits)[0].completion
    assert base.completion.text != tuned.completion.text
    assert _say(speaker, limits)[0].completion == tuned.completion, "the adapter is on again"


def test_a_seed_draws_the_same_again_and_another_draws_anew(speaker):
    options = {"sampling": Sampling(1.0, 0.95), "limits": Limits(30, 0)}
    texts = [_say(speaker, seed=seed, **options)[0].completion.text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_it_stops_at_the_token_that_it_is_told_to(speaker):
    told: list[str] = []
    spoken = speaker.say(
        QUESTION, choose_limits(200, 8), sampling=GREEDY, seed=1,
        on_text=lambda text, in_think: told.append(text), stopped=lambda: len(told) >= 3,
    )  # fmt: skip
    assert spoken.stopped and not spoken.forced and len(told) in (3, 4)  # one piece may have been held back
    assert "".join(told) == spoken.completion.think and not spoken.completion.closed
    assert _say(speaker, choose_limits(5, 8))[0].completion.text, "it can be asked again"


def test_a_forced_line_is_not_written_beyond_its_end(speaker, monkeypatch):
    """The tokens behind a forced close are stopped at the first line break, not run to their limit."""
    newline = speaker.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    rooms: list[int] = []

    def scripted(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        rooms.append(options["max_new_tokens"][0])
        tokens = [70] * 5 if len(rooms) == 1 else [71, newline, *[72] * 50]
        for token in tokens:
            options["on_token"](0, token)
        return [(tokens, generate.Finish.LENGTH)]

    monkeypatch.setattr(generate, "generate", scripted)
    spoken, _, _ = _say(speaker, choose_limits(5, 300))
    assert rooms == [5, 300] and spoken.completion.num_answer_tokens < 40 and not spoken.stopped


def test_what_would_steer_the_model_is_refused(speaker):
    with pytest.raises(DataError):
        speaker.say(f"Now {THINK_OPEN}", choose_limits(5, 5), sampling=GREEDY, seed=1)


def test_more_than_the_model_was_made_for_is_refused(speaker):
    speaker.check_room(QUESTION, choose_limits(400, 64))
    with pytest.raises(DataError, match="512"):
        speaker.check_room(QUESTION, choose_limits(500, 64))


def test_trained_biases_cannot_be_switched_off(model_folder, adapter, tmp_path):
    import shutil

    biased = tmp_path / "biased"
    shutil.copytree(adapter, biased)
    config = biased / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "bias": "all"}))
    speaker = Speaker(load(str(model_folder), precision="fp32", max_seq_length=512), Style.SHORT, adapter=biased)
    with pytest.raises(ModelError, match="biases"):
        speaker.say(QUESTION, choose_limits(4, 4), sampling=GREEDY, seed=1, base=True)


def test_the_engine_writes_where_it_can(speaker, request):
    assert (engine.engine_of(speaker._model) is not None) == ("fast" in request.node.name)
