"""Any text at all: a row gives it back as it was, or it is refused; it never opens or closes thinking or forges a turn.

Texts are strung together from arbitrary characters (halves of surrogate pairs too), markers, pieces of markers, and
what has broken other tokenisers. What may be refused is stated exactly, so that refusing everything would not pass.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from medcot.data.packing import flatten_rows
from medcot.data.survival import check_batches
from medcot.errors import DataError
from medcot.prompt import (
    ELLIPSIS,
    Style,
    count_shortest_think,
    decode,
    decode_tokens,
    encode_prompt,
    encode_row,
    find_markers,
    render_prompt,
    split_completion,
    truncate_think,
)
from medcot.prompt.frames import control_ids
from medcot.records import Example, Finish, Row
from real_tokenizers import load_r1, load_smol

LOADERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {"r1": load_r1, "smol": load_smol}
PARTS = [
    *("<think>", "</think>", "<think", "</think", "</", "<", ">", "think>", "/think>", "< think >", "<THINK>"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜", "｜>", "<|User|>"),
    *("<|im_start|>", "<|im_end|>", "<|im_", "start|>", "<|endoftext|>", "<|EOT|>", "<tool_call>", "<filename>"),
    *("### Question:", "### Response:", "###", "\n\n", "\r\n", "\n", " ", "\t", "\x0b", "\x85", "\u2028", "\u3000"),
    *("\x00", "\x04", "\x07", "\x1b[31m", "\x7f", "\ufeff", "\u200b", "\u200d", "\u202e", "\u2066", "\u0301", "\ufffd"),
    *("ＡＢ＜think＞", "x²½", "ﬁ", "é", "e\u0301", "≮", "شكرا", "שלום", "患者缺钠", "😀", "👩🏽‍⚕️", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "▁", "Ġ", "Ċ"),
    *("{question}", "{{ bos_token }}", "{% raw %}", "%s", "\\n", "…", " … ", "0.9 % saline", "BP 120/80", "Okay"),
]
anything = st.text(st.characters(exclude_categories=()), max_size=8)
texts = st.lists(st.sampled_from(PARTS) | anything, max_size=8).map("".join)
valid = st.lists(st.sampled_from([*PARTS[-24:], "word ", "\n"]), min_size=1, max_size=60).map("".join)
fuzzed = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", params=LOADERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return LOADERS[request.param]()


def find_reason(text: str, field: str, style: Style, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why a text must be refused, worked out from the text alone; ``None`` where it must not."""
    if not text.strip():
        return "empty"
    if re.search("[\ud800-\udfff]", text):
        return "surrogate"
    markers, headings = find_markers(style, tokenizer)
    if any(marker in text for marker in markers + (headings if field == "question" else ())):
        return "marker"
    # Characters that the tokenizer has no token for, found one by one.
    if any(decode(tokenizer(c, add_special_tokens=False).input_ids, tokenizer) != c for c in set(text.strip())):
        return "lost"
    return None


def encode(example: Example, style: Style, tokenizer: PreTrainedTokenizerBase) -> Row | None:
    """The row, or ``None`` where it was refused and had to be."""
    texts = {"question": example.question, "reasoning": example.reasoning, "response": example.response}
    reasons = {field: find_reason(text or "", field, style, tokenizer) for field, text in texts.items()}
    try:
        row = encode_row(example, style, tokenizer, train_on_prompt=False)
    except DataError as error:
        assert any(reasons.values()), f"refused without reason: {error}"
        return None
    assert not any(reasons.values()), reasons
    return row


def count_control(row: Row, tokenizer: PreTrainedTokenizerBase) -> Counter[int]:
    control = control_ids(tokenizer)
    return Counter(token for token in row.input_ids if token in control)


@pytest.mark.parametrize("style", Style)
@fuzzed
@given(question=texts, reasoning=texts, response=texts)
def test_any_text_round_trips_or_is_refused(
    style: Style, tokenizer: PreTrainedTokenizerBase, question: str, reasoning: str, response: str
) -> None:
    example = Example("f:1", question, "fuzz", reasoning, response)
    row = encode(example, style, tokenizer)
    if row is None:
        return
    prompt = encode_prompt(question, style, tokenizer)
    assert row.input_ids[: len(prompt)] == prompt and row.think[0] == len(prompt)
    assert decode(prompt, tokenizer).endswith(render_prompt(question, style, tokenizer))
    assert question.strip() in decode(row.input_ids[slice(*row.question)], tokenizer)
    done = split_completion(row.input_ids[row.think[0] :], tokenizer, num_prompt_tokens=0, finish=Finish.EOS)
    assert (done.think, done.answer, done.closed) == (reasoning.strip(), response.strip(), True)


@pytest.mark.parametrize("style", Style)
@fuzzed
@given(question=texts, reasoning=texts, response=texts)
def test_no_text_opens_or_closes_thinking_or_forges_a_turn(
    style: Style, tokenizer: PreTrainedTokenizerBase, question: str, reasoning: str, response: str
) -> None:
    row = encode(Example("f:1", question, "fuzz", reasoning, response), style, tokenizer)
    if row is None:
        return
    plain = encode_row(Example("p:1", "Why?", "fuzz", "So.", "Yes."), style, tokenizer, train_on_prompt=False)
    assert count_control(row, tokenizer) == count_control(plain, tokenizer)
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [row.input_ids.count(tag) for tag in tags] == [plain.input_ids.count(tag) for tag in tags]
    text = decode(row.input_ids, tokenizer)
    assert (text.count("<think>"), text.count("</think>")) == (1, 1)


@pytest.mark.parametrize("style", Style)
@fuzzed
@given(question=valid, reasoning=valid, response=valid, train_on_prompt=st.booleans())
def test_the_gate_lets_every_encoded_row_pass(
    style: Style,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    reasoning: str,
    response: str,
    train_on_prompt: bool,
) -> None:
    example = Example("f:1", question, "fuzz", reasoning, response)
    assume(encode(example, style, tokenizer))
    row = encode_row(example, style, tokenizer, train_on_prompt=train_on_prompt)
    found = check_batches(
        [flatten_rows([row, row])], [[example, example]], tokenizer, style, train_on_prompt=train_on_prompt
    )
    assert [(finding.id, finding.says) for finding in found][1:] == [] and found[0].id == "survival"


@pytest.mark.parametrize("style", Style)
@fuzzed
@given(reasoning=valid, response=valid, limit=st.integers(0, 400))
def test_truncation_keeps_all_that_it_should_at_any_limit_that_can_hold_it(
    style: Style, tokenizer: PreTrainedTokenizerBase, reasoning: str, response: str, limit: int
) -> None:
    example = Example("f:1", "Why 患者缺钠 😀?", "fuzz", reasoning, response)
    full = encode(example, style, tokenizer)
    assume(full)
    assert full is not None
    fewest = full.think[0] + full.num_tokens - full.answer[0] + count_shortest_think(style, tokenizer)
    limit = fewest - 2 + limit % (full.num_tokens - fewest + 4) if full.num_tokens > fewest else limit
    try:
        row = truncate_think(example, style, tokenizer, train_on_prompt=False, max_tokens=limit)
    except DataError:
        assert limit < min(fewest, full.num_tokens)
        return
    assert limit >= min(fewest, full.num_tokens) and row.num_tokens <= limit
    if limit >= full.num_tokens:
        assert row == full
        return
    assert row.input_ids[: row.think[0]] == full.input_ids[: full.think[0]]
    assert row.input_ids[row.answer[0] :] == full.input_ids[full.answer[0] :]
    assert row.labels == [-100] * row.think[0] + row.input_ids[row.think[0] :]
    think = decode(row.input_ids[slice(*row.think)], tokenizer).removesuffix("</think>")
    whole = decode(full.input_ids[slice(*full.think)], tokenizer).removesuffix("</think>")
    marks = [match.start() for match in re.finditer(f"(?={ELLIPSIS})", think)]
    assert any(whole.startswith(think[:at]) and whole.endswith(think[at + len(ELLIPSIS) :]) for at in marks)


@fuzzed
@given(ids=st.lists(st.integers(0, 40_000), max_size=60), text=valid)
def test_each_token_has_its_characters(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> None:
    for tokens in (ids, tokenizer(text, add_special_tokens=False).input_ids):
        decoded, spans = decode_tokens(tokens, tokenizer)
        assert decoded == decode(tokens, tokenizer) and len(spans) == len(tokens)
        if tokens:
            assert spans[0][0] == 0 and spans[-1][1] == len(decoded)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    for (start, stop), span in zip(encoded.offset_mapping, decode_tokens(encoded.input_ids, tokenizer)[1], strict=True):
        if decode(encoded.input_ids, tokenizer) == text:
            assert span[0] <= start and stop <= span[1]
