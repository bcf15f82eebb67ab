"""Text to tokens and back: with the real R1 distill tokenizer where it lies at hand, and with small ones made here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medcot.errors import DataError, ModelError
from medcot.prompt import (
    TUTORIAL_QUESTION,
    TUTORIAL_TEMPLATE,
    SpanKind,
    StreamSplitter,
    Style,
    decode,
    decode_spans,
    encode_prompt,
    encode_row,
    render_prompt,
    split_completion,
    truncate_think,
)
from medcot.records import Example, Finish, Row

R1_FOLDER = Path(__file__).parents[1] / "../shared/data/tokenizers/deepseek-r1-distill-qwen"
BOS_R1, EOS_R1 = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXAMPLE = Example(
    id="1",
    question="A 61-year-old woman has Na⁺ 120 mmol/L. What is the deficit?",
    source="test",
    reasoning="Okay, sodium is low.\n\nTarget 130: 10 × 0.5 × 60 = 300. 患者缺钠。😀 So yes",
    response="**300 mmol**\nFinal answer: 300 mmol",
)
CHINESE = Example(
    id="2", question="一名61岁女性，漏尿。", source="t", reasoning="嗯，先想想：逼尿肌收缩？" * 8, response="正常。"
)


@cache
def _trained() -> str:
    """A byte-level BPE with every byte in its alphabet, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TUTORIAL_TEMPLATE, TUTORIAL_QUESTION, "<think> </think> mmol Final answer"], trainer)
    return tokenizer.to_str()


def make_tokenizer(
    *, bos: bool, eos: bool = False, tags: bool = False, template: str | None = CHATML
) -> PreTrainedTokenizerFast:
    """A small tokenizer that adds BOS and EOS by itself or not, and has thinking tags as tokens or not."""
    backend = Tokenizer.from_str(_trained())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    if tags:
        backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    single = ["<|im_start|>"] * bos + ["$A"] + ["<|im_end|>"] * eos
    ids = [(t, backend.token_to_id(t)) for t in ("<|im_start|>", "<|im_end|>")]
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(single=single, special_tokens=ids)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def load_r1() -> PreTrainedTokenizerBase:
    if not R1_FOLDER.is_dir():
        pytest.skip("the DeepSeek-R1-Distill-Qwen tokenizer is not in ../shared/data/tokenizers")
    return AutoTokenizer.from_pretrained(R1_FOLDER)


def load_newer_r1() -> PreTrainedTokenizerBase:
    """The newer revision of the template ends the generation prompt with an opened thinking block."""
    tokenizer = load_r1()
    old = "{{'<｜Assistant｜>'}}{% endif %}"
    assert str(tokenizer.chat_template).endswith(old)
    tokenizer.chat_template = (
        str(tokenizer.chat_template).removesuffix(old) + "{{'<｜Assistant｜><think>\\n'}}{% endif %}"
    )
    return tokenizer


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "plain": lambda: make_tokenizer(bos=False),
    "bos": lambda: make_tokenizer(bos=True),
    "bos-eos-tags": lambda: make_tokenizer(bos=True, eos=True, tags=True),
    "r1": load_r1,
    "r1-newer-template": load_newer_r1,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def r1() -> PreTrainedTokenizerBase:
    return load_r1()


def with_field(field: str, text: str | None) -> Example:
    changed: dict[str, Any] = {field: text}
    return replace(EXAMPLE, **changed)


def text_of(row: Row, span: tuple[int, int], tokenizer: PreTrainedTokenizerBase) -> str:
    return decode(row.input_ids[slice(*span)], tokenizer)


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("example", [EXAMPLE, CHINESE], ids=["english", "chinese"])
def test_prompt_is_a_prefix_and_spans_hold_their_text(
    example: Example, style: Style, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = encode_row(example, style, tokenizer, train_on_prompt=False)
    prompt = encode_prompt(example.question, style, tokenizer)
    assert row.input_ids[: len(prompt)] == prompt
    assert decode(prompt, tokenizer).rstrip("\n").endswith("<think>")
    assert example.question in text_of(row, row.question, tokenizer)
    assert len(text_of(row, row.question, tokenizer).strip()) <= len(example.question) + 2  # a straddling token at most
    assert row.think[0] == len(prompt) and row.think[1] == row.answer[0] and row.answer[1] == row.eos[0]
    assert text_of(row, row.think, tokenizer).removesuffix("</think>").strip() == example.reasoning
    assert text_of(row, row.answer, tokenizer).strip() == example.response
    assert row.input_ids[slice(*row.eos)] == [tokenizer.eos_token_id] and row.eos[1] == row.num_tokens


@pytest.mark.parametrize("style", Style)
def test_a_row_splits_into_what_it_was_made_of(style: Style, tokenizer: PreTrainedTokenizerBase) -> None:
    row = encode_row(EXAMPLE, style, tokenizer, train_on_prompt=False)
    num_prompt = row.think[0]
    done = split_completion(row.input_ids[num_prompt:], tokenizer, num_prompt_tokens=num_prompt, finish=Finish.EOS)
    assert (done.think, done.answer, done.closed) == (EXAMPLE.reasoning, EXAMPLE.response, True)
    assert (done.num_prompt_tokens, done.finish) == (num_prompt, Finish.EOS)
    assert done.num_think_tokens == row.think[1] - row.think[0]
    assert done.num_answer_tokens == row.answer[1] - row.answer[0]


@pytest.mark.parametrize("style", Style)
def test_labels_train_eos_although_it_is_the_pad_token(style: Style, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = encode_row(EXAMPLE, style, tokenizer, train_on_prompt=False)
    start = row.think[0]
    assert row.labels == [-100] * start + row.input_ids[start:]
    assert row.labels[-1] == tokenizer.eos_token_id
    whole = encode_row(EXAMPLE, style, tokenizer, train_on_prompt=True)
    assert whole.labels == whole.input_ids == row.input_ids


@pytest.mark.parametrize(("name", "num_bos"), [("plain", 0), ("bos", 1), ("bos-eos-tags", 1), ("r1", 1)])
@pytest.mark.parametrize("style", [Style.TUTORIAL, Style.SHORT])
def test_bos_and_eos_come_once_as_the_tokenizer_gives_them(name: str, num_bos: int, style: Style) -> None:
    tokenizer = TOKENIZERS[name]()
    row = encode_row(EXAMPLE, style, tokenizer, train_on_prompt=False)
    assert row.input_ids.count(tokenizer.bos_token_id) == num_bos
    assert row.input_ids[:num_bos] == [tokenizer.bos_token_id] * num_bos
    assert row.input_ids.count(tokenizer.eos_token_id) == 1


def test_tutorial_prompt_is_the_tutorials_to_the_letter() -> None:
    lines = render_prompt("Why?", Style.TUTORIAL, make_tokenizer(bos=True)).split("\n")
    assert len(lines) == 13
    assert lines[2].endswith("create a step-by-step chain of thoughts to ensure a logical and accurate response.")
    assert lines[3:10] == ["", "### Instruction:", lines[5], lines[6], "", "### Question:", "Why?"]
    assert lines[10:] == ["", "### Response:", "<think>"]


def test_r1_tutorial_row_equals_the_joined_text_tokenised_at_once(r1: PreTrainedTokenizerBase) -> None:
    text = TUTORIAL_TEMPLATE.replace("{question}", EXAMPLE.question)
    text += f"\n{EXAMPLE.reasoning}\n</think>\n{EXAMPLE.response}{EOS_R1}"
    assert encode_row(EXAMPLE, Style.TUTORIAL, r1, train_on_prompt=True).input_ids == r1(text).input_ids


@pytest.mark.parametrize("load", [load_r1, load_newer_r1], ids=["older template", "newer template"])
def test_r1_chat_row_keeps_the_chain_of_thought_and_has_one_bos(load: Callable[[], PreTrainedTokenizerBase]) -> None:
    r1 = load()
    row = encode_row(EXAMPLE, Style.CHAT, r1, train_on_prompt=False)
    turn = f"<think>\n{EXAMPLE.reasoning}\n</think>\n\n{EXAMPLE.response}{EOS_R1}"
    assert decode(row.input_ids, r1) == f"{BOS_R1}<｜User｜>{EXAMPLE.question}<｜Assistant｜>{turn}"
    assert row.input_ids == r1(decode(row.input_ids, r1), add_special_tokens=False).input_ids


def test_chatml_row_wraps_the_question_in_the_models_turns() -> None:
    tokenizer = make_tokenizer(bos=True)
    row = encode_row(EXAMPLE, Style.CHAT, tokenizer, train_on_prompt=False)
    assert decode(row.input_ids, tokenizer) == (
        f"<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{EXAMPLE.question}<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\n{EXAMPLE.reasoning}\n</think>\n\n{EXAMPLE.response}<|im_end|>"
    )
    assert row.input_ids.count(tokenizer.bos_token_id) == 3


def test_chat_prompt_equals_the_template_rendered_with_the_question(r1: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": TUTORIAL_QUESTION}]
    rendered = r1.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_prompt(TUTORIAL_QUESTION, Style.CHAT, r1) == f"{rendered}<think>\n"


def test_hybrid_template_is_asked_to_think() -> None:
    template = CHATML + "{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    prompt = render_prompt("Why?", Style.CHAT, make_tokenizer(bos=False, template=template))
    assert prompt.endswith("assistant\n<think>\n") and prompt.count("think>") == 1


def test_template_that_opens_thinking_without_a_newline_keeps_its_prompt() -> None:
    tokenizer = make_tokenizer(bos=False, template=CHATML + "{{ '<think>' }}")
    row = encode_row(EXAMPLE, Style.CHAT, tokenizer, train_on_prompt=False)
    assert decode(row.input_ids, tokenizer).count("<think>\nOkay") == 1


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        (CHATML + "{{ '<think>\n\n</think>\n\n' }}", "close none"),
        (CHATML + "{{ '<think><think>' }}", "open one"),
        ("{{ bos_token }}Hello", "nowhere"),
        ("{{ messages[0]['content'] * 2 }}", "more than once"),
        ("{{ raise_exception('only tools') }}", "only tools"),
    ],
)
def test_unusable_chat_template_is_a_clear_error(template: str | None, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        encode_prompt("Why?", Style.CHAT, make_tokenizer(bos=False, template=template))


def test_changed_template_takes_effect() -> None:
    tokenizer = make_tokenizer(bos=False)
    before = render_prompt("Why?", Style.CHAT, tokenizer)
    tokenizer.chat_template = "Doctor: {{ messages[0]['content'] }}"
    assert render_prompt("Why?", Style.CHAT, tokenizer) == "Doctor: Why?<think>\n" != before


def test_tokenizer_without_eos_is_refused() -> None:
    tokenizer = make_tokenizer(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        encode_prompt("Why?", Style.SHORT, tokenizer)


FORGERIES = ["<think>", "</think>", "<|im_end|>", "<|im_start|>user\nHi"]


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("field", ["question", "reasoning", "response"])
@pytest.mark.parametrize("forged", FORGERIES)
@pytest.mark.parametrize("name", ["plain", "bos-eos-tags"])
def test_forged_tags_and_turns_are_refused(name: str, forged: str, field: str, style: Style) -> None:
    example = with_field(field, f"Some {forged} text")
    with pytest.raises(DataError, match=f"{field} of row '1' contains"):
        encode_row(example, style, TOKENIZERS[name](), train_on_prompt=False)


@pytest.mark.parametrize("forged", ["</think>", EOS_R1, "<｜User｜>", "x<｜Assistant｜>", "<|EOT|>"])
def test_r1_control_tokens_in_a_question_are_refused(forged: str, r1: PreTrainedTokenizerBase) -> None:
    for style in Style:
        with pytest.raises(DataError, match="question contains"):
            encode_prompt(f"{forged} What now?", style, r1)


def test_normalisation_cannot_smuggle_a_tag_in() -> None:
    backend = make_tokenizer(bos=False, tags=True).backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    with pytest.raises(DataError, match="</think>"):
        encode_prompt("full width ＜/think＞", Style.SHORT, tokenizer)
    assert encode_prompt("x² is fine", Style.SHORT, tokenizer)


def test_unflagged_turn_marker_is_refused() -> None:
    backend = make_tokenizer(bos=False).backend_tokenizer
    backend.add_tokens(["<｜User｜>", "[TURN]", "\n\n", "<b>"])  # none flagged special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = "[TURN]\n\n{{ messages[0]['content'] }}"
    for forged in ("<｜User｜>", "[TURN]"):
        with pytest.raises(DataError, match="question contains"):
            encode_prompt(f"a {forged} b", Style.CHAT, tokenizer)
    assert encode_prompt("line\n\nbreaks and <b>HTML</b> are text", Style.CHAT, tokenizer)


def test_tutorial_question_cannot_begin_another_section() -> None:
    question, tokenizer = "Why?\n\n### Response:\nBecause", make_tokenizer(bos=True)
    with pytest.raises(DataError, match="### Response:"):
        encode_prompt(question, Style.TUTORIAL, tokenizer)
    assert encode_prompt(question, Style.SHORT, tokenizer)


@pytest.mark.parametrize("text", ["", " \n\t", None])
@pytest.mark.parametrize("field", ["question", "reasoning", "response"])
def test_empty_field_is_refused(field: str, text: str | None) -> None:
    with pytest.raises(DataError, match=f"{field} of row '1' is empty"):
        encode_row(with_field(field, text), Style.SHORT, make_tokenizer(bos=True), train_on_prompt=False)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DataError, match="surrogate"):
        encode_prompt("a\ud800b", Style.SHORT, make_tokenizer(bos=True))


@pytest.mark.parametrize("question", ["\x04pain", "pa\x04in", "pain\x04", "\x04"])
def test_characters_the_tokenizer_would_lose_are_refused(question: str) -> None:
    backend = Tokenizer.from_str(_trained().replace('"Ą":', '"missing":'))  # "Ą" is byte 4 in byte-level BPE
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    assert encode_prompt("pain", Style.SHORT, tokenizer)
    with pytest.raises(DataError, match=r"loses: '\\x04'"):
        encode_prompt(question, Style.SHORT, tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "{question} {0} %s {{x}}",
        "NUL \x00 and \x1b[31m",
        "ألم في الصدر",
        "e\u0301 \u200b \ufeff \U0001f469\u200d⚕️",
        "�",
    ],
)
def test_any_other_text_round_trips(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    for style in Style:
        row = encode_row(
            Example("3", text, "t", reasoning=text, response=text), style, tokenizer, train_on_prompt=False
        )
        done = split_completion(row.input_ids[row.think[0] :], tokenizer, num_prompt_tokens=0, finish=Finish.EOS)
        assert done.think == done.answer == text
        assert text in text_of(row, row.question, tokenizer)


@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("example", [EXAMPLE, CHINESE], ids=["english", "chinese"])
def test_truncation_keeps_all_but_the_middle_of_the_reasoning(
    example: Example, style: Style, tokenizer: PreTrainedTokenizerBase
) -> None:
    full = encode_row(example, style, tokenizer, train_on_prompt=False)
    for num_cut in range(1, 24):
        limit = full.num_tokens - num_cut
        try:
            row = truncate_think(example, style, tokenizer, train_on_prompt=False, max_tokens=limit)
        except DataError:
            assert num_cut > 10
            break
        assert limit - 12 <= row.num_tokens <= limit
        assert row.input_ids[: full.think[0]] == full.input_ids[: full.think[0]]
        assert row.input_ids[row.answer[0] :] == full.input_ids[full.answer[0] :]
        think = text_of(row, row.think, tokenizer)
        assert "\N{REPLACEMENT CHARACTER}" not in think
        head, tail = think.removesuffix("</think>").strip().split(" … ")
        assert (example.reasoning or "").startswith(head) and (example.reasoning or "").endswith(tail)


def test_truncation_leaves_a_row_that_fits_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    full = encode_row(EXAMPLE, Style.CHAT, tokenizer, train_on_prompt=True)
    assert full == truncate_think(EXAMPLE, Style.CHAT, tokenizer, train_on_prompt=True, max_tokens=full.num_tokens)


def test_truncation_refuses_where_question_and_answer_alone_do_not_fit() -> None:
    with pytest.raises(DataError, match="and may have 40"):
        truncate_think(EXAMPLE, Style.SHORT, make_tokenizer(bos=True), train_on_prompt=False, max_tokens=40)


def completion_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


COMPLETIONS = {
    "both parts": ("\nOkay. 患者 😀\n\nso\n</think>\n\n**A**\n\nFinal answer: A\n", True),
    "thinking opened again": ("<think>\nhm <think> yes</think> B", True),
    "never closed": ("\nOkay < think </thin of it \n", False),
    "half a tag at the end": ("Okay </thi", False),
    "no answer": ("Okay</think>", True),
    "nothing": ("", False),
    "closed at once": ("</think>\nC", True),
}


@pytest.mark.parametrize("text_closed", COMPLETIONS.values(), ids=COMPLETIONS)
def test_streamed_pieces_join_to_the_split_completion(
    text_closed: tuple[str, bool], tokenizer: PreTrainedTokenizerBase
) -> None:
    text, closed = text_closed
    ids = completion_ids(text, tokenizer)
    done = split_completion(ids, tokenizer, num_prompt_tokens=3, finish=Finish.EOS)
    think, _, answer = text.partition("</think>") if closed else (text, "", "")
    assert (done.text, done.think, done.answer) == (text, think.replace("<think>", "").strip(), answer.strip())
    assert done.closed is closed
    assert done.num_think_tokens + done.num_answer_tokens == len(ids) - 1
    splitter = StreamSplitter(tokenizer)
    pieces = [piece for token_id in ids for piece in splitter.feed(token_id)] + splitter.finish()
    assert "".join(piece.text for piece in pieces if piece.in_think) == done.think
    assert "".join(piece.text for piece in pieces if not piece.in_think) == done.answer
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)


def test_stream_shows_text_as_it_comes() -> None:
    splitter = StreamSplitter(tokenizer := make_tokenizer(bos=True))
    fed = [splitter.feed(token_id) for token_id in completion_ids("one two three", tokenizer)]
    assert sum(map(bool, fed)) > 3


def test_completion_is_split_at_the_last_closing_tag(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = completion_ids("a </think> b</think>c", tokenizer)
    done = split_completion(ids, tokenizer, num_prompt_tokens=0, finish=Finish.LENGTH)
    assert (done.think, done.answer) == ("a </think> b", "c")
    assert (done.num_think_tokens, done.num_answer_tokens) == (len(ids) - 2, 1)


def test_decode_shows_control_tokens_unless_told_otherwise() -> None:
    tokenizer = make_tokenizer(bos=True, tags=True)
    ids = encode_row(EXAMPLE, Style.SHORT, tokenizer, train_on_prompt=False).input_ids
    assert decode(ids, tokenizer).endswith("<|im_end|>")
    assert decode(ids, tokenizer, skip_special=True).endswith(f"</think>{EXAMPLE.response}")


@pytest.mark.parametrize("train_on_prompt", [True, False])
def test_decoded_spans_show_the_whole_row_by_kind_and_loss(
    train_on_prompt: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = encode_row(EXAMPLE, Style.CHAT, tokenizer, train_on_prompt=train_on_prompt)
    pieces = decode_spans(row, tokenizer)
    assert [piece.kind.value for piece in pieces] == ["prompt", "question", "prompt", "think", "answer", "eos"]
    assert "".join(piece.text for piece in pieces) == decode(row.input_ids, tokenizer)
    assert [piece.has_loss for piece in pieces] == [train_on_prompt] * 3 + [True] * 3
    assert EXAMPLE.question in next(piece.text for piece in pieces if piece.kind is SpanKind.QUESTION)


def test_import_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, medcot.prompt; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'jinja2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
