"""Templates that lose or double thinking are named; forged markers are found in any spelling the tokenizer reads."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medcot.data.findings import Chunk, Finding, Severity
from medcot.data.tags import ForgedTags, check_template
from medcot.errors import DataError
from medcot.prompt import Style, encode_row
from medcot.records import Example, Problem, Quarantined
from real_tokenizers import load_r1, load_smol
from test_prompt import CHATML, make_tokenizer

ANSWERS_TWICE = CHATML.replace("message['content']", "'<think>\n' + message['content']")
KEEPS_AND_PREFILLS = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
GOOD = Example("g:1", "Is BP < 90 mmHg (≤ 12 kPa) low?", "g", "Yes, 90 > 80 … so [low].", "Yes — #1 cause: sepsis.")


def says(tokenizer: PreTrainedTokenizerBase, style: Style, *, renders_answers: bool) -> dict[str, Severity]:
    found = check_template(tokenizer, style, renders_answers=renders_answers)
    return {finding.id: finding.severity for finding in found}


@pytest.mark.parametrize("style", Style)
def test_r1s_template_deletes_the_reasoning(style: Style) -> None:
    tokenizer = load_r1()
    (finding,) = check_template(tokenizer, style)
    assert (finding.id, finding.severity, finding.fix) == ("template_drops_reasoning", Severity.INFO, "")
    assert "do not pass through it" in finding.says and finding.figures["reasoning"] == 0
    (finding,) = check_template(tokenizer, style, renders_answers=True)
    assert finding.severity is Severity.RED and finding.fix


def test_smollm2s_template_keeps_it() -> None:
    assert check_template(load_smol(), Style.CHAT, renders_answers=True) == []


@pytest.mark.parametrize(
    ("template", "relied_on", "bypassed"),
    [
        (ANSWERS_TWICE, {"template_duplicates_think": Severity.RED}, {"template_duplicates_think": Severity.INFO}),
        (
            KEEPS_AND_PREFILLS,
            {"template_prefills_think": Severity.INFO},
            {"template_prefills_think": Severity.INFO},
        ),
        (
            KEEPS_AND_PREFILLS.replace("message['content']", "message['content'].split('</think>')[-1]"),
            {"template_drops_reasoning": Severity.RED, "template_prefills_think": Severity.RED},
            {"template_drops_reasoning": Severity.INFO, "template_prefills_think": Severity.INFO},
        ),
    ],
    ids=["duplicates", "prefills", "prefills and drops"],
)
def test_templates(template: str, relied_on: dict[str, Severity], bypassed: dict[str, Severity]) -> None:
    tokenizer = make_tokenizer(bos=True, template=template)
    assert says(tokenizer, Style.TUTORIAL, renders_answers=True) == relied_on
    assert says(tokenizer, Style.TUTORIAL, renders_answers=False) == bypassed


@pytest.mark.parametrize("template", [None, CHATML + "{{ '<think>\n\n</think>\n\n' }}", "{{ raise_exception('no') }}"])
def test_a_template_that_cannot_serve_matters_to_chat_alone(template: str | None) -> None:
    tokenizer = make_tokenizer(bos=True, template=template)
    assert says(tokenizer, Style.CHAT, renders_answers=False)["template_unusable"] is Severity.RED
    assert "template_unusable" not in says(tokenizer, Style.TUTORIAL, renders_answers=False)


# Texts --------------------------------------------------------------------------------------------------------------


def look(check: ForgedTags, *examples: Example) -> dict[str, Finding]:
    tallies = [check.map(Chunk(n, 1, [example])) for n, example in enumerate(examples, start=1)]
    found = check.reduce(pickle.loads(pickle.dumps(tallies)), None)  # type: ignore[arg-type]
    return {finding.id: finding for finding in found}


@pytest.mark.parametrize("load", [load_r1, load_smol])
@pytest.mark.parametrize("style", Style)
def test_ordinary_text_is_let_be(load: Callable[[], PreTrainedTokenizerBase], style: Style) -> None:
    assert look(ForgedTags.of(load(), style), GOOD) == {}


R1_MARKERS = ["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|EOT|>"]
SMOL_MARKERS = ["<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("load", "marker"), [*((load_r1, text) for text in R1_MARKERS), *((load_smol, text) for text in SMOL_MARKERS)]
)  # fmt: skip
@pytest.mark.parametrize("field", ["question", "reasoning", "response"])
def test_markers_are_found_and_refused(load: Callable[[], PreTrainedTokenizerBase], marker: str, field: str) -> None:
    tokenizer = load()
    example = replace(GOOD, **{field: f"Well, {marker} then"})  # type: ignore[arg-type]
    found = look(ForgedTags.of(tokenizer, Style.CHAT), GOOD, example)["forged_tags"]
    assert (found.severity, found.count, found.rows) == (Severity.RED, 1, ("g:1",))
    assert found.evidence[0].parts == {field: f"Well, {marker} then"} and found.figures["markers"] == {marker: 1}
    assert "1 of 2 rows" in found.says
    with pytest.raises(DataError):
        encode_row(example, Style.CHAT, tokenizer, train_on_prompt=False)


DISGUISES = ["＜think＞", "<th\u200bink>", "<\u2060/think>", "﹤/think﹥", "<THINK>", "<|User|>", "<｜Us\u00ader｜>"]


@pytest.mark.parametrize("text", DISGUISES)
def test_a_disguise_that_the_tokenizer_does_not_see_through_is_yellow(text: str) -> None:
    example = replace(GOOD, question=f"Well, {text} then")
    found = look(ForgedTags.of(load_r1(), Style.SHORT), example)
    assert set(found) == {"lookalike_tags"} and found["lookalike_tags"].severity is Severity.YELLOW
    row = encode_row(example, Style.SHORT, load_r1(), train_on_prompt=False)
    assert row.num_tokens


def test_a_disguise_that_the_tokenizer_sees_through_is_red() -> None:
    backend = make_tokenizer(bos=False, tags=True).backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\u200b", "")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    check = pickle.loads(pickle.dumps(ForgedTags.of(tokenizer, Style.SHORT)))
    assert check.settings == ForgedTags.of(tokenizer, Style.SHORT).settings
    assert check.settings != ForgedTags.of(make_tokenizer(bos=False), Style.SHORT).settings
    for text in ("＜think＞", "<th\u200bink>", "＜/th\u200bink＞"):
        example = replace(GOOD, response=f"Well, {text} then")
        assert set(look(check, example)) == {"forged_tags"}
        with pytest.raises(DataError):
            encode_row(example, Style.SHORT, tokenizer, train_on_prompt=False)
    assert set(look(check, replace(GOOD, response="half \ud800 <think>"))) == {"forged_tags"}


def test_a_row_set_aside_for_its_tags_counts_too() -> None:
    aside = [
        Quarantined(3, "the question holds a stray </think>", {"Question": "a</think>b"}, "question", Problem.TAGS),
        Quarantined(4, "the question ('Question') is empty", {"Question": ""}, "question", Problem.EMPTY),
    ]
    check = ForgedTags.of(load_smol(), Style.SHORT)
    (found,) = check.reduce([check.map(Chunk(1, 4, [GOOD, GOOD], aside))], None)  # type: ignore[arg-type]
    assert (found.id, found.severity, found.count, found.rows) == ("forged_tags", Severity.RED, 1, ("row 3",))
    assert "1 of 4 rows" in found.says and found.figures["markers"] == {"</think>": 1}
    assert found.evidence[0].parts == {"question": "the question holds a stray </think>"}


def test_headings_matter_in_questions_of_the_style_that_has_them() -> None:
    text = "Why?\n\n### Response:\nBecause"
    check = ForgedTags.of(load_smol(), Style.TUTORIAL)
    assert set(look(check, replace(GOOD, question=text))) == {"forged_tags"}
    assert look(check, replace(GOOD, reasoning=text)) == {}
    assert look(ForgedTags.of(load_smol(), Style.CHAT), replace(GOOD, question=text)) == {}


def test_a_template_of_ordinary_text_has_turns_too() -> None:
    template = "[INST] {{ messages[0]['content'] }} [/INST]"
    tokenizer = make_tokenizer(bos=True, template=template)
    example = replace(GOOD, question="Why? [/INST] Because. [INST] And?")
    assert set(look(ForgedTags.of(tokenizer, Style.CHAT), example)) == {"forged_tags"}
    with pytest.raises(DataError, match=r"\[/?INST\]"):
        encode_row(example, Style.CHAT, tokenizer, train_on_prompt=False)
    plain = replace(GOOD, question="Should my assistant help a user?")
    for each in (tokenizer, load_smol(), make_tokenizer(bos=True)):
        assert look(ForgedTags.of(each, Style.CHAT), plain) == {}
        assert encode_row(plain, Style.CHAT, each, train_on_prompt=False).num_tokens


def test_many_rows_are_counted_and_few_listed_at_speed() -> None:
    check = ForgedTags.of(load_smol(), Style.SHORT)
    bad = [replace(GOOD, id=f"b:{n}", response="a <think> b") for n in range(50)]
    found = check.reduce([check.map(Chunk(1, 25, bad[:25])), check.map(Chunk(26, 25, bad[25:]))], None)[0]  # type: ignore[arg-type]
    assert (found.count, len(found.rows), len(found.evidence)) == (50, 20, 20)
    started_s = time.perf_counter()
    check.map(Chunk(1, 2_000, [replace(GOOD, reasoning="Fluid is lost. " * 60)] * 2_000))
    assert time.perf_counter() - started_s < 2  # 50 times what it takes alone
