"""Texts as words: what dress is, what is not, and hashes that agree with counting by hand."""

import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medcot.data.words import (
    _TABLES,
    Signs,
    Windows,
    cut_stretches,
    excerpt,
    fold_numbers,
    hash_words,
    list_words,
    normalise,
)

SAME = [
    ("Chest pain -- radiating,\n to the LEFT arm!", "chest pain radiating to the left arm"),
    ("ﬁbrosis at ３７．５ ℃", "fibrosis at 37 5 °C"),
    ("anti\u00adbody \u200b\u200elevels\ufeff", "antibody levels"),
    ("Straße", "STRASSE"),
    ("Sjo\u0308gren", "SJÖGREN"),
    ("pH：7．2（动脉）", "ph 7 2 动 脉"),
    ("❤️ heart", "heart"),
]
DIFFERENT = [
    ("HBsAg +", "HBsAg"),
    ("base excess -5", "base excess 5"),
    ("glucose < 70", "glucose > 70"),
    ("1.5 mg", "15 mg"),
    ("काम", "कम"),  # vowel signs are letters to their readers
    ("Sjögren", "Sjogren"),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_dress_comes_off(left: str, right: str) -> None:
    assert normalise(left) == normalise(right) != ""


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_what_carries_meaning_stays(left: str, right: str) -> None:
    assert normalise(left) != normalise(right)


def test_scripts_without_spaces_give_a_word_a_character() -> None:
    assert normalise("患者、男性") == "患 者 男 性"
    assert normalise("患者は45歳のmale") == "患 者 は 45 歳 の male"
    assert normalise("ปวด") == "ป ว ด"
    assert normalise("السلام عليكم") == "السلام عليكم"


def test_numbers_fold_one_for_one() -> None:
    text = normalise("T 38.5 °C, BP 120/80, B12 ٣٤", Signs.DROP)
    assert fold_numbers(text) == "t 0 0 c bp 0 0 b0 0"
    assert normalise("a < -5 + b", Signs.DROP) == "a 5 b"


@given(st.text() | st.text("aB3 +-−’é中ﬁ\u200d\ud800", min_size=20))
def test_the_quick_way_to_translate_is_the_plain_one(text: str) -> None:
    for signs, table in _TABLES.items():
        assert table.apply(text) == text.translate(table)
        assert " ".join(list_words(text, signs)) == normalise(text, signs)


@given(st.text())
@example("\u0345\u1fb4 İ ǰ ½ \x00 \ud800 ŉ ﷺ")
def test_any_text_has_words(text: str) -> None:
    for signs in Signs:
        words = normalise(text, signs)
        assert words == " ".join(words.split())
        words.encode()  # no lone surrogate is left
        assert "\n" not in words
    assert fold_numbers(words).count(" ") == words.count(" ")


@given(st.text(st.characters(max_codepoint=0x24F)))
def test_normalising_twice_changes_nothing_in_latin_text(text: str) -> None:
    for signs in Signs:
        assert normalise(normalise(text, signs), signs) == normalise(text, signs)


@given(st.text())
def test_stretches_lie_in_the_text(text: str) -> None:
    stretches = list(cut_stretches(text))
    assert all(left.stop <= right.start for left, right in pairwise(stretches))
    for stretch in stretches:
        assert normalise(text[stretch.start : stretch.stop]).split() == list(stretch.words)


def test_stretches_have_the_words_of_the_text() -> None:
    text = "A 45-year-old man (BMI 31,5) 患者は anti-HBs: + ?"
    assert [word for stretch in cut_stretches(text) for word in stretch.words] == normalise(text).split()


def test_excerpts_say_what_is_missing() -> None:
    assert excerpt("short") == "short"
    assert excerpt("x" * 3000, 1000) == "x" * 1000 + "… (2,000 more characters)"


WORDS = st.sampled_from(["a", "b", "ab", "ba", "heart", "脉", "0"])
TEXTS = st.lists(st.lists(WORDS, max_size=12).map(" ".join), max_size=6)


@given(TEXTS, st.integers(1, 6))
def test_equal_hashes_are_equal_runs(texts: list[str], n: int) -> None:
    hashed = hash_words(texts)
    split = [text.split() for text in texts]
    assert hashed.lengths.tolist() == [len(words) for words in split]
    windows = Windows(hashed)
    runs, starts = windows.hash_ngrams(n)
    by_hand = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
    assert len(runs) == len(by_hand) == len(starts)
    assert len({*zip(runs.tolist(), by_hand, strict=True)}) == len({*by_hand}) == len({*runs.tolist()})
    whole = [*zip(windows.hash_texts().tolist(), texts, strict=True)]
    assert len({*whole}) == len({*texts})
    shingles, bounds = windows.hash_shingles(n)
    for words, (start, stop) in zip(split, pairwise(bounds.tolist()), strict=True):
        assert stop - start == (max(1, len(words) - n + 1) if words else 0)
        if len(words) >= n:
            alone = Windows(hash_words([" ".join(words)])).hash_ngrams(n)[0]
            assert np.array_equal(shingles[start:stop], alone)


def test_hashes_are_the_same_in_every_process() -> None:
    code = "from medcot.data.words import *; print(Windows(hash_words(['heart failure', '脉'])).hash_texts().tolist())"
    out = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    here = Windows(hash_words(["heart failure", "脉"])).hash_texts().tolist()
    assert out == {f"{here}\n"}


def test_blocks_do_not_show() -> None:
    words = [f"w{number}" for number in range(90_000)] + [
        "x" * 600_000,
        "end",
    ]  # over several blocks, one word over two
    long = hash_words([" ".join(words), "", "end"])
    assert long.lengths.tolist() == [len(words), 0, 1]
    assert long.words[-1] == long.words[-2] == hash_words(["end"]).words[0]
    assert np.array_equal(long.words[40_000:40_003], hash_words(["w40000 w40001 w40002"]).words)
    assert len(np.unique(long.words)) == len(words)


def test_ten_megabytes_cost_ten_times_one() -> None:
    def seconds(text: str) -> float:
        started = time.process_time()
        Windows(hash_words([normalise(text)])).hash_shingles(5)
        return time.process_time() - started

    text = "fever and chills of día 3 " * 40_000
    seconds(text)
    assert seconds(text * 10) < 40 * seconds(text)
