"""Lengths are counted, the policies weighed and padding's waste computed; each figure against brute force."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from dataclasses import replace

import pytest

from medcot.data.findings import Severity
from medcot.data.lengths import Lengths, _expect_padded, describe_lengths, draw_sample
from medcot.errors import DataError
from medcot.prompt import Style, count_shortest_think, encode_row, truncate_think
from medcot.records import Example, Row
from test_prompt import make_tokenizer

np = pytest.importorskip("numpy")


def make_row(number: int, prompt: int, reasoning: int, answer: int) -> Row:
    edges = list(itertools.accumulate([0, prompt, reasoning, answer, 1]))
    spans = list(itertools.pairwise(edges))
    return Row(f"x:{number}", [7] * edges[-1], [7] * edges[-1], *spans)


def count(rows: list[Row], max_tokens: int = 100, shortest_think: int = 5) -> Lengths:
    lengths = Lengths(max_tokens, shortest_think)
    for row in rows:
        lengths.add(row)
    return lengths


SIZES = [(10, 20, 5), (12, 70, 17), (12, 70, 18), (40, 200, 30), (90, 50, 20)]  # 36, 100, 101, 271, 161 tokens
ROWS = [make_row(number, *sizes) for number, sizes in enumerate(SIZES, start=1)]


def test_parts_are_counted() -> None:
    lengths = count(ROWS)
    assert lengths.tokens("prompt").tolist() == [10, 12, 12, 40, 90]
    assert lengths.tokens("reasoning").tolist() == [20, 70, 70, 200, 50]
    assert lengths.tokens("answer").tolist() == [6, 18, 19, 31, 21]
    assert lengths.tokens("row").tolist() == [36, 100, 101, 271, 161]
    info, _ = describe_lengths(lengths, over_length="drop", batch_size=2)
    row = info.figures["parts"]["row"]
    assert (row["tokens"], row["mean"], row["min"], row["max"]) == (669, 133.8, 36, 271)
    assert row["percentiles"]["50"] == 101 and row["percentiles"]["99"] == 271
    assert row["histogram"]["edges"] == [0, 32, 48, 64, 96, 128, 192, 256, 384]
    assert row["histogram"]["rows"] == [0, 1, 0, 0, 2, 1, 0, 1]
    assert info.severity is Severity.INFO and info.count == 5
    json.dumps(info.figures)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("drop", "they are dropped, with 533 tokens"),
        ("error", "the run refuses them"),
        ("truncate_think", "2 lose 172 tokens from the middle of their reasoning, and 1, whose question"),
    ],
)
def test_rows_over_the_limit_and_what_becomes_of_them(policy: str, says: str) -> None:
    _, over = describe_lengths(count(ROWS), over_length=policy, batch_size=2)
    assert (over.id, over.severity, over.count, over.rows) == ("over_length", Severity.YELLOW, 3, ("x:4", "x:5", "x:3"))
    assert over.says.startswith("3 of 5 rows are over 100 tokens;") and says in over.says
    assert "model.max_seq_length=271" in over.fix
    assert ("truncate_think" in over.fix) is (policy != "truncate_think")
    assert over.figures["drop"] == {"rows_lost": 3, "tokens_lost": 533}
    assert over.figures["truncate_think"] == {"shortened": 2, "reasoning_lost": 172, "rows_lost": 1}


def test_a_limit_that_all_rows_keep_is_no_finding() -> None:
    assert [f.id for f in describe_lengths(count(ROWS, 271), over_length="drop", batch_size=2)] == ["lengths"]


@pytest.mark.parametrize("style", Style)
def test_what_can_be_shortened_is_what_truncation_can_shorten(style: Style) -> None:
    tokenizer = make_tokenizer(bos=True)
    example = Example("x:1", "What now? " * 3, "x", "Okay, sodium is low. " * 30, "Give saline slowly.")
    row = encode_row(example, style, tokenizer, train_on_prompt=False)
    shortest = count_shortest_think(style, tokenizer)
    limit = row.think[0] + (row.num_tokens - row.answer[0]) + shortest
    for max_tokens, can in ((limit, 1), (limit - 1, 0)):
        _, over = describe_lengths(count([row], max_tokens, shortest), over_length="drop", batch_size=1)
        assert over.figures["truncate_think"]["shortened"] == can
    short = truncate_think(example, style, tokenizer, train_on_prompt=False, max_tokens=limit)
    assert short.think[1] - short.think[0] == shortest
    with pytest.raises(DataError):
        truncate_think(example, style, tokenizer, train_on_prompt=False, max_tokens=limit - 1)


@pytest.mark.parametrize(("num", "batch_size"), [(6, 2), (7, 3), (5, 8), (4, 1), (4, 4), (0, 2)])
def test_padding_is_that_of_all_shuffles(num: int, batch_size: int) -> None:
    counts = [random.Random(num).randint(1, 50) for _ in range(num)]
    padded = []
    for order in itertools.permutations(counts):
        batches = [order[start : start + batch_size] for start in range(0, num, batch_size)]
        padded.append(sum(max(batch) * len(batch) for batch in batches))
    assert _expect_padded(np.array(counts, dtype=np.int64), batch_size) == pytest.approx(sum(padded) / len(padded))


def test_padding_is_weighed_for_the_rows_that_train() -> None:
    rows = [make_row(n, 10, 80, 9) for n in range(4)] + [make_row(9, 10, 500, 9)]  # 100 tokens; 520
    for policy, kept in (("drop", 4), ("truncate_think", 5)):
        figures = describe_lengths(count(rows, 100), over_length=policy, batch_size=2)[0].figures["padding"]
        assert figures == {
            "batch_size": 2,
            "real": 100 * kept,
            "to_longest": {"wasted": 0, "share": 0.0},
            "to_limit": {"wasted": 0, "share": 0.0},
        }
    figures = describe_lengths(count(ROWS[:2], 1_000), over_length="drop", batch_size=2)[0].figures["padding"]
    assert figures["to_longest"] == {"wasted": 64, "share": 0.32}
    assert figures["to_limit"] == {"wasted": 2_000 - 136, "share": 0.932}


def test_no_row_within_the_limit() -> None:
    info, over = describe_lengths(count(ROWS, 10), over_length="drop", batch_size=2)
    assert over.count == 5 and info.figures["padding"]["to_longest"] == {"wasted": 0, "share": 0.0}


def test_a_million_rows_are_no_trouble() -> None:
    lengths = count(ROWS)
    for part in ("prompt", "reasoning", "answer", "row"):
        lengths._counts[part] = lengths._counts[part] * 200_000
    info = describe_lengths(lengths, over_length="drop", batch_size=16)[0]
    share = info.figures["padding"]["to_longest"]["share"]
    assert info.count == 1_000_000 and share == pytest.approx(1 - 68 / 100, abs=1e-3)


def test_counts_add_up_and_travel() -> None:
    whole, left, right = count(ROWS), count(ROWS[:2]), count(ROWS[2:])
    left.merge(pickle.loads(pickle.dumps(right)))
    settings = {"over_length": "drop", "batch_size": 2}
    assert describe_lengths(left, **settings) == describe_lengths(whole, **settings)  # type: ignore[arg-type]


def test_a_sample_is_chosen_by_content_and_said_to_be_one() -> None:
    examples = [Example(f"x:{n}", f"Question number {n}?", "x", "r", "a") for n in range(4_000)]
    sample = [example.question for example in draw_sample(examples, 400, 4_000)]
    assert 320 < len(sample) < 480
    shuffled = [replace(example, id="other") for example in reversed(examples)]
    assert [example.question for example in draw_sample(shuffled, 400, 4_000)] == sample[::-1]
    assert len(list(draw_sample(examples, 5_000, 4_000))) == 4_000
    info, _ = describe_lengths(count(ROWS), over_length="drop", batch_size=2, num_rows=4_000)
    assert info.says.startswith("5 of 4,000 rows counted:") and info.figures["of_rows"] == 4_000
