"""The gate lets whole rows pass and says of each broken one what is broken, whoever made it."""

from __future__ import annotations

import json
import pickle
import string
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from medcot.data.faults import FAULTS, MOST_SHOWN, Tally, report
from medcot.data.findings import Finding, Severity
from medcot.data.packing import collate, flatten_rows
from medcot.data.survival import Gate, check_batches, check_rows
from medcot.errors import DataError
from medcot.prompt import Style, encode_row, truncate_think
from medcot.records import Example, Row
from real_tokenizers import load_r1, load_smol

REAL = Path(__file__).parents[2] / "../shared/data/medical-o1-reasoning-SFT/train.jsonl"
EXAMPLES = [
    Example(
        "x:1", "A 40-year-old has Na⁺ 120. What now?", "x", "Okay, low … sodium. 患者缺钠 😀.\n\nSo fluids.", "Go slow."
    ),
    Example(
        "x:2", "Is 0.9 % saline hypotonic?", "x", "No: about 308 mOsm per litre, near plasma.", "**No.**\nIsotonic."
    ),
    Example("x:3", "Which drug treats scurvy?", "x", "Scurvy is a lack of ascorbic acid.", "Vitamin C"),
]
LOADERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {"r1": load_r1, "smol": load_smol}
Lists = dict[str, Any]
Case = tuple[str, Style]  # tokenizer, style
CASES = [(name, style) for name in LOADERS for style in Style]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerBase, Style]:
    return LOADERS[request.param[0]](), request.param[1]


def make_rows(tokenizer: PreTrainedTokenizerBase, style: Style, *, train_on_prompt: bool = False) -> list[Row]:
    return [encode_row(example, style, tokenizer, train_on_prompt=train_on_prompt) for example in EXAMPLES]


def as_lists(batch: Any) -> Lists:
    return {name: value if isinstance(value, list) else value.tolist() for name, value in batch.items()}


def judge(
    batch: Any,
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    examples: list[Example] = EXAMPLES,
    *,
    train_on_prompt: bool = False,
) -> dict[str, Finding]:
    found = check_batches([batch], [examples], tokenizer, style, train_on_prompt=train_on_prompt)
    return {finding.id: finding for finding in found if finding.severity is Severity.RED}


def test_whole_rows_pass(case: tuple[PreTrainedTokenizerBase, Style]) -> None:
    tokenizer, style = case
    for train_on_prompt in (False, True):
        rows = make_rows(tokenizer, style, train_on_prompt=train_on_prompt)
        pairs = list(zip(EXAMPLES, rows, strict=True)) * 5
        (only,) = check_rows(pairs, tokenizer, style, train_on_prompt=train_on_prompt)
        assert (only.id, only.severity, only.count) == ("survival", Severity.INFO, 15)
        assert only.says == "15 of 15 rows reach the model whole."
        assert only.figures["tokens"] == 5 * sum(row.num_tokens for row in rows)
        assert only.figures["trained_tokens"] == 5 * sum(row.num_trained_tokens for row in rows)


def test_rows_tokenised_at_once_and_padded_pass_too() -> None:
    tokenizer = load_r1()
    texts = [
        f"<｜User｜>{e.question}<｜Assistant｜><think>\n{e.reasoning}\n</think>\n\n{e.response}<｜end▁of▁sentence｜>"
        for e in EXAMPLES
    ]
    batch = dict(tokenizer(texts, padding=True, return_offsets_mapping=True))
    starts = [text.index("<think>") + len("<think>\n") for text in texts]
    batch["labels"] = [
        [i if m and begin >= start else -100 for i, m, (begin, _) in zip(ids, mask, offsets, strict=True)]
        for ids, mask, offsets, start in zip(
            batch["input_ids"], batch["attention_mask"], batch["offset_mapping"], starts, strict=True
        )
    ]
    assert judge(batch, tokenizer, Style.CHAT) == {}
    without_mask = {name: batch[name] for name in ("input_ids", "labels")}
    assert judge(without_mask, tokenizer, Style.CHAT) == {}
    left = dict(tokenizer(texts, padding=True, padding_side="left", return_tensors="pt"))
    left["labels"] = left["input_ids"].clone()
    assert set(judge(left, tokenizer, Style.CHAT)) == {"question_trained", "padding_trained"}


# One row broken in each way -----------------------------------------------------------------------------------------


def keep(row: Row, start: int, stop: int | None = None) -> Row:
    return replace(row, input_ids=row.input_ids[start:stop], labels=row.labels[start:stop])


def mask(row: Row, start: int, stop: int) -> Row:
    return replace(row, labels=[*row.labels[:start], *[-100] * (stop - start), *row.labels[stop:]])


def insert(row: Row, at: int, ids: list[int]) -> Row:
    trained = ids if row.labels[at] != -100 else [-100] * len(ids)
    return replace(
        row,
        input_ids=[*row.input_ids[:at], *ids, *row.input_ids[at:]],
        labels=[*row.labels[:at], *trained, *row.labels[at:]],
    )


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def break_tag(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    close = len(ids_of("</think>", tokenizer))
    return mask(row, row.think[1] - close, row.think[1])


def mask_by_pad_id(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    return replace(row, labels=hide(tokenizer.pad_token_id, row.input_ids, row.labels))


def hide(token: int | None, ids: list[int], labels: list[int]) -> list[int]:
    return [-100 if i == token else label for i, label in zip(ids, labels, strict=True)]


def swap(row: Row, start: int, stop: int, ids: list[int]) -> Row:
    return insert(keep_out(row, start, stop), start, ids)


def keep_out(row: Row, start: int, stop: int) -> Row:
    return replace(
        row, input_ids=row.input_ids[:start] + row.input_ids[stop:], labels=row.labels[:start] + row.labels[stop:]
    )


def move_reasoning_into_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    close = row.think[1] - len(ids_of("</think>", tokenizer))
    moved = row.input_ids[row.think[0] : close]
    shorter = keep_out(row, row.think[0], close)
    return insert(shorter, row.question[1], moved)


def leave_out_open_tag(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    tag = ids_of("<think>", tokenizer)
    start = max(i for i in range(row.think[0]) if row.input_ids[i : i + len(tag)] == tag)
    return keep_out(row, start, start + len(tag))


Breakage = Callable[[Row, PreTrainedTokenizerBase], Row]
BREAKAGES: dict[str, tuple[Breakage, set[str]]] = {
    "all masked": (lambda row, _: mask(row, 0, row.num_tokens), {"nothing_trained"}),
    "prompt trained": (lambda row, _: replace(row, labels=list(row.input_ids)), {"question_trained"}),
    "one reasoning token masked": (
        lambda row, _: mask(row, row.think[0] + 3, row.think[0] + 4),
        {"reasoning_lost"},
    ),
    "</think> masked": (break_tag, {"think_close_lost"}),
    "last answer token masked": (lambda row, _: mask(row, row.answer[1] - 1, row.answer[1]), {"answer_lost"}),
    "masked by pad id": (mask_by_pad_id, {"eos_lost"}),
    "no EOS": (lambda row, _: keep(row, 0, row.eos[0]), {"eos_lost"}),
    "answer cut": (lambda row, _: keep(row, 0, row.answer[1] - 1), {"answer_cut", "eos_lost"}),
    "cut within the reasoning": (
        lambda row, _: keep(row, 0, row.think[0] + 6),
        {"reasoning_lost", "think_close_lost", "answer_lost", "eos_lost", "think_tags"},
    ),
    "answer of another": (
        lambda row, tokenizer: swap(row, *row.answer, ids_of("\n\nForty-two", tokenizer)),
        {"answer_lost"},
    ),
    "answer twice": (
        lambda row, _: insert(row, row.answer[1], row.input_ids[slice(*row.answer)]),
        {"answer_lost"},
    ),
    "reasoning left out": (
        lambda row, tokenizer: keep_out(row, row.think[0], row.think[1] - len(ids_of("</think>", tokenizer))),
        {"reasoning_lost"},
    ),
    "a word in the reasoning": (
        lambda row, tokenizer: insert(row, row.think[0] + 4, ids_of(" banana", tokenizer)),
        {"reasoning_lost"},
    ),
    "reasoning in the prompt": (move_reasoning_into_prompt, {"reasoning_lost", "prompt_not_prefix"}),
    "<think> a second time": (
        lambda row, tokenizer: insert(row, row.think[0], ids_of("<think>\n", tokenizer)),
        {"think_tags", "reasoning_lost"},
    ),
    "</think> a second time": (
        lambda row, tokenizer: insert(row, row.answer[0], ids_of("</think>", tokenizer)),
        {"think_tags", "answer_lost"},
    ),
    "never opened": (leave_out_open_tag, {"think_tags", "prompt_not_prefix"}),
    "labels shifted": (
        lambda row, _: replace(row, labels=[*row.labels[1:], -100]),
        {"labels_differ", "eos_lost"},
    ),
    "BOS doubled": (
        lambda row, tokenizer: insert(row, 0, [tokenizer.bos_token_id]),
        {"bos_doubled", "prompt_not_prefix"},
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_row_is_named_with_its_fault(name: str, case: tuple[PreTrainedTokenizerBase, Style]) -> None:
    tokenizer, style = case
    broken, faults = BREAKAGES[name]
    rows = make_rows(tokenizer, style)
    rows[1] = broken(rows[1], tokenizer)
    found = judge(flatten_rows(rows), tokenizer, style)
    assert set(found) == faults
    for finding in found.values():
        assert (finding.count, finding.rows) == (1, ("x:2",))
        assert finding.says.startswith("1 of 3 rows ") and "x:2" in finding.says and finding.fix.endswith(".")


def test_a_row_cut_from_the_left(case: tuple[PreTrainedTokenizerBase, Style]) -> None:
    tokenizer, style = case
    rows = make_rows(tokenizer, style)
    rows[0] = keep(rows[0], rows[0].question[0] + 2)
    found = set(judge(flatten_rows(rows), tokenizer, style))
    has_bos = tokenizer.bos_token_id in make_rows(tokenizer, style)[0].input_ids
    assert found == {"question_cut", "prompt_not_prefix"} | ({"bos_missing"} if has_bos else set())


def test_question_masked_although_asked_for(case: tuple[PreTrainedTokenizerBase, Style]) -> None:
    tokenizer, style = case
    batch = flatten_rows(make_rows(tokenizer, style))
    assert set(judge(batch, tokenizer, style, train_on_prompt=True)) == {"question_untrained"}


def test_bos_is_counted_as_the_model_has_it() -> None:
    counts = {("r1", Style.TUTORIAL): 1, ("r1", Style.CHAT): 1, ("smol", Style.TUTORIAL): 0, ("smol", Style.CHAT): 3}
    for (name, style), num in counts.items():
        tokenizer = LOADERS[name]()
        rows = make_rows(tokenizer, style)
        assert rows[0].input_ids.count(tokenizer.bos_token_id) == num
        assert judge(flatten_rows(rows), tokenizer, style) == {}


def test_a_rendered_template_tokenised_again_has_two_bos() -> None:
    tokenizer = load_r1()
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": EXAMPLES[0].question}], tokenize=False, add_generation_prompt=True
    )
    whole = f"{rendered}<think>\n{EXAMPLES[0].reasoning}\n</think>\n\n{EXAMPLES[0].response}<｜end▁of▁sentence｜>"
    ids = tokenizer(whole).input_ids
    start = len(tokenizer(rendered + "<think>\n").input_ids)
    found = judge({"input_ids": ids, "labels": [-100] * start + ids[start:]}, tokenizer, Style.CHAT, EXAMPLES[:1])
    assert set(found) == {"bos_doubled", "prompt_not_prefix"}
    assert "is there twice, and belongs there once" in found["bos_doubled"].says


# Templates ----------------------------------------------------------------------------------------------------------

CHATML_TWICE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def render_rows(tokenizer: PreTrainedTokenizerBase, opened: str = "<think>\n") -> Lists:
    """What a trainer does that renders whole conversations and trains on what follows the generation prompt."""
    ids_BT, labels_BT = [], []
    for example in EXAMPLES:
        asking = [{"role": "user", "content": example.question}]
        answer = f"{opened}{example.reasoning}\n</think>\n\n{example.response}"
        whole = tokenizer.apply_chat_template([*asking, {"role": "assistant", "content": answer}], tokenize=False)
        ids = ids_of(str(whole), tokenizer)
        start = len(ids_of(str(tokenizer.apply_chat_template(asking, tokenize=False)), tokenizer))
        ids_BT.append(ids)
        labels_BT.append([-100] * start + ids[start:])
    return as_lists(collate([{"input_ids": i, "labels": x} for i, x in zip(ids_BT, labels_BT, strict=True)]))


def test_r1s_template_drops_the_reasoning() -> None:
    found = judge(render_rows(load_r1()), load_r1(), Style.CHAT)
    assert set(found) == {"reasoning_lost", "think_close_lost", "think_tags", "prompt_not_prefix"}
    assert all(finding.count == 3 for finding in found.values())
    assert "there is no </think>" in found["think_close_lost"].says


def test_chatml_keeps_the_reasoning_and_smollm2_rows_pass() -> None:
    found = judge(render_rows(load_smol()), load_smol(), Style.CHAT)
    assert set(found) == set()


@pytest.mark.parametrize("name", LOADERS)
def test_a_template_that_opens_thinking_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = LOADERS[name]()
    marks = {"smol": ("<|im_start|>", "<|im_end|>"), "r1": ("<｜User｜>", "<｜end▁of▁sentence｜>")}[name]
    template = CHATML_TWICE.replace("<|im_start|>", marks[0]).replace("<|im_end|>", marks[1])
    monkeypatch.setattr(tokenizer, "chat_template", template)
    found = judge(render_rows(tokenizer), tokenizer, Style.CHAT)
    assert set(found) == {"think_tags", "reasoning_lost"}
    assert "<think> is there twice and </think> once" in found["think_tags"].says
    rows = make_rows(tokenizer, Style.CHAT)
    assert judge(flatten_rows(rows), tokenizer, Style.CHAT) == {}, "medcot's own rows bypass it"


def test_a_prefilled_prompt_that_training_rows_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_smol()
    plain = render_rows(tokenizer, opened="<think>")
    prefilled = str(tokenizer.chat_template).replace("assistant\n' }}", "assistant\n<think>\n' }}")
    monkeypatch.setattr(tokenizer, "chat_template", prefilled)
    found = judge(plain, tokenizer, Style.CHAT)
    assert set(found) == {"prompt_not_prefix"}
    assert "the row has 'Okay, low" in found["prompt_not_prefix"].says
    assert judge(render_rows(tokenizer), tokenizer, Style.CHAT) == {}


# Batches ------------------------------------------------------------------------------------------------------------


def shift_first_labels(batch: Lists) -> Lists:
    starts = [i for i, position in enumerate(batch["position_ids"][0]) if position == 0]
    both = enumerate(zip(batch["input_ids"][0], batch["labels"][0], strict=True))
    labels = [[token if at in starts else label for at, (token, label) in both]]
    return {**batch, "labels": labels}


TOUCHING: dict[str, Callable[[Lists], Lists]] = {
    "nothing says where rows begin": lambda b: {name: b[name] for name in ("input_ids", "labels")},
    "positions run on": lambda b: {**b, "position_ids": [list(range(len(b["input_ids"][0])))]},
    "positions run on, without lengths": lambda b: {
        "input_ids": b["input_ids"], "labels": b["labels"], "position_ids": [list(range(len(b["input_ids"][0])))]
    },
    "two rows as one": lambda b: {**b, "lengths": [b["lengths"][0] + b["lengths"][1], b["lengths"][2]]},
    "lengths off by one": lambda b: {**b, "lengths": [b["lengths"][0] - 1, b["lengths"][1] + 1, b["lengths"][2]]},
    "lengths too long": lambda b: {**b, "lengths": [*b["lengths"][:2], b["lengths"][2] + 5]},
    "first tokens trained": shift_first_labels,
}  # fmt: skip


@pytest.mark.parametrize("name", TOUCHING)
def test_rows_that_touch(name: str) -> None:
    tokenizer = load_smol()
    batch = as_lists(flatten_rows(make_rows(tokenizer, Style.TUTORIAL)))
    found = judge(TOUCHING[name](batch), tokenizer, Style.TUTORIAL)
    assert "rows_touch" in found


def test_padding_behind_packed_rows_belongs_to_none() -> None:
    tokenizer = load_smol()
    batch = as_lists(flatten_rows(make_rows(tokenizer, Style.TUTORIAL)))
    pads = [tokenizer.pad_token_id] * 4
    padded = {"input_ids": [batch["input_ids"][0] + pads], "labels": [batch["labels"][0] + [-100] * 4]}
    run_on = {"position_ids": [batch["position_ids"][0] + list(range(4))]}
    zeros = {"position_ids": [batch["position_ids"][0] + [0] * 4]}
    for where in ({"lengths": batch["lengths"]}, run_on, zeros):
        assert judge({**padded, **where}, tokenizer, Style.TUTORIAL) == {}
        trained = {**padded, "labels": [batch["labels"][0] + pads], **where}
        assert set(judge(trained, tokenizer, Style.TUTORIAL)) == {"padding_trained"}


def test_a_mask_over_packed_rows_hides_their_positions() -> None:
    tokenizer = load_smol()
    batch = as_lists(flatten_rows(make_rows(tokenizer, Style.TUTORIAL)))
    del batch["lengths"]
    assert judge(batch, tokenizer, Style.TUTORIAL) == {}
    masked = {**batch, "attention_mask": [[1] * len(batch["input_ids"][0])]}
    assert set(judge(masked, tokenizer, Style.TUTORIAL)) == {"rows_touch"}


@pytest.mark.parametrize("keys", [("lengths",), ("position_ids",), ("cu_seqlens",), ("lengths", "position_ids")])
def test_any_word_for_where_rows_begin_will_do(keys: tuple[str, ...]) -> None:
    tokenizer = load_smol()
    batch = as_lists(flatten_rows(make_rows(tokenizer, Style.TUTORIAL)))
    batch["cu_seqlens"] = [0]
    for length in batch["lengths"]:
        batch["cu_seqlens"].append(batch["cu_seqlens"][-1] + length)
    assert judge({k: batch[k] for k in ("input_ids", "labels", *keys)}, tokenizer, Style.TUTORIAL) == {}


def test_trained_padding_is_found_although_it_is_eos() -> None:
    tokenizer = load_smol()
    rows = make_rows(tokenizer, Style.SHORT)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    longest = max(row.num_tokens for row in rows) + 2
    fill = [[tokenizer.pad_token_id] * (longest - row.num_tokens) for row in rows]
    ids = [row.input_ids + pads for row, pads in zip(rows, fill, strict=True)]
    labels = [row.labels + [-100] * len(pads) for row, pads in zip(rows, fill, strict=True)]
    assert judge({"input_ids": ids, "labels": labels}, tokenizer, Style.SHORT) == {}
    labels[0] = rows[0].labels + fill[0]
    found = judge({"input_ids": ids, "labels": labels}, tokenizer, Style.SHORT)
    assert set(found) == {"padding_trained"} and found["padding_trained"].rows == ("x:1",)
    by_id = [hide(tokenizer.pad_token_id, *both) for both in zip(ids, labels, strict=True)]
    found = judge({"input_ids": ids, "labels": by_id}, tokenizer, Style.SHORT)
    assert set(found) == {"eos_lost"} and "is the padding token too" in found["eos_lost"].says


def make_sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2's: spaces are "▁", one is put before a text, and its decoder takes the first one away."""
    marks = ["<unk>", "<s>", "</s>", "<think>", "</think>"]
    letters = sorted({c for c in string.printable if not c.isspace()} | {"▁", "Na", "lo", "▁l"})
    tokens = [*marks, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("N", "a"), ("l", "o"), ("▁", "l")]
    vocab = {token: number for number, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(marks[:3])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("style", [Style.TUTORIAL, Style.SHORT])
def test_a_sentencepiece_tokenizer_is_read_as_well(style: Style) -> None:
    tokenizer = make_sentencepiece()
    rows = make_rows(tokenizer, style)
    assert judge(flatten_rows(rows), tokenizer, style) == {}
    for name in ("one reasoning token masked", "</think> masked", "answer cut", "no EOS"):
        broken, faults = BREAKAGES[name]
        found = judge(flatten_rows([rows[0], broken(rows[1], tokenizer), rows[2]]), tokenizer, style)
        assert faults <= set(found), name


# What is said -------------------------------------------------------------------------------------------------------


def test_a_failure_is_shown_by_span_and_loss() -> None:
    tokenizer = load_smol()
    rows = make_rows(tokenizer, Style.SHORT)
    rows[2] = mask(rows[2], *rows[2].answer)
    finding = judge(flatten_rows(rows), tokenizer, Style.SHORT)["answer_lost"]
    (evidence,) = finding.evidence
    assert evidence.row == "x:3"
    assert dict(evidence.parts) == {
        "what is wrong": "2 of its 2 tokens carry no loss",
        "1 question, no loss": "Which drug treats scurvy?",
        "2 prompt, no loss": "\n<think>",
        "3 think, loss": "Scurvy is a lack of ascorbic acid.</think>",
        "4 answer, no loss": "Vitamin C",
        "5 eos, loss": "<|im_end|>",
    }


def test_long_rows_are_shown_in_part_and_few_of_many() -> None:
    tokenizer = load_smol()
    example = replace(EXAMPLES[0], reasoning="word " * 3000)
    row = encode_row(example, Style.SHORT, tokenizer, train_on_prompt=False)
    pairs = [(replace(example, id=f"x:{n}"), keep(row, 0, row.eos[0])) for n in range(30)]
    finding = check_rows(pairs, tokenizer, Style.SHORT, train_on_prompt=False)[0]
    assert (finding.id, finding.count, len(finding.rows), len(finding.evidence)) == ("eos_lost", 30, 20, MOST_SHOWN)
    assert all(len(text) < 2_100 for text in finding.evidence[0].parts.values())
    assert "characters left out" in finding.evidence[0].parts["3 think, loss"]


def test_shortened_reasoning_passes_and_is_counted() -> None:
    tokenizer = load_smol()
    example = replace(EXAMPLES[0], reasoning="First this … then that. " * 40)
    row = truncate_think(example, Style.CHAT, tokenizer, train_on_prompt=False, max_tokens=150)
    (info,) = check_rows([(example, row)], tokenizer, Style.CHAT, train_on_prompt=False)
    assert info.figures["shortened"] == 1 and "taken out" in info.says
    other = replace(example, reasoning="Something else … " * 40)
    found = check_rows([(other, row)], tokenizer, Style.CHAT, train_on_prompt=False)
    assert found[0].id == "reasoning_lost"


def test_an_example_without_reasoning_or_answer_does_not_pass() -> None:
    tokenizer = load_smol()
    rows = make_rows(tokenizer, Style.SHORT)
    bare = [replace(EXAMPLES[0], reasoning=None), replace(EXAMPLES[1], response=" "), EXAMPLES[2]]
    found = judge(flatten_rows(rows), tokenizer, Style.SHORT, bare)
    assert {fault: finding.rows for fault, finding in found.items()} == {
        "reasoning_lost": ("x:1",),
        "answer_lost": ("x:2",),
    }


def test_tallies_add_up_and_travel() -> None:
    tokenizer = load_smol()
    rows = make_rows(tokenizer, Style.SHORT)
    rows[1] = keep(rows[1], 0, rows[1].eos[0])
    gate = Gate(tokenizer, Style.SHORT, train_on_prompt=False)
    whole = gate.judge(flatten_rows(rows), EXAMPLES)
    parts = [gate.judge(flatten_rows([row]), [example]) for row, example in zip(rows, EXAMPLES, strict=True)]
    merged = Tally()
    for part in parts:
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert report(merged) == report(whole)
    assert merged.num_failed == 1


def test_no_fault_is_without_a_test() -> None:
    proven = set().union(*(faults for _, faults in BREAKAGES.values()))
    elsewhere = {"question_untrained", "question_cut", "bos_missing", "rows_touch", "padding_trained"}
    assert proven | elsewhere == set(FAULTS)


def test_the_real_rows_pass() -> None:
    if not REAL.is_file():
        pytest.skip("medical-o1-reasoning-SFT is not in ../shared/data")
    rows = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    examples = [
        Example(str(n), row["Question"], "real", row["Complex_CoT"], row["Response"]) for n, row in enumerate(rows)
    ]
    for tokenizer, style in ((load_r1(), Style.CHAT), (load_smol(), Style.TUTORIAL)):
        encode = partial(truncate_think, style=style, tokenizer=tokenizer, train_on_prompt=False, max_tokens=800)
        pairs = []
        for example in examples:
            try:
                pairs.append((example, encode(example)))
            except DataError:
                continue
        (info,) = check_rows(pairs, tokenizer, style, train_on_prompt=False)
        assert info.count == len(pairs) > 190 and info.figures["shortened"] > 10
