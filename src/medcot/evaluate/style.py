"""How the writing changed, measured.

The tutorial says that its tuned model answers shorter, in one paragraph, without bullets. This file turns each of those
impressions into a number that is defined in one sentence.

Lengths are in tokens of the model's own tokenizer, as generation counted them. Everything else is read off the text.
Words are runs of letters and digits, case set aside; in Chinese, Japanese and Korean each character is a word.
Distinct-n is from J. Li et al., "A Diversity-Promoting Objective Function", NAACL 2016; here its complement is given,
because a loop ("the patient has the patient has ...") is what one looks for, and more of it should read as more.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import mean, median
from typing import Any

from medcot.records import Completion

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•‣◦–][ \t]+|\d{1,3}[.)][ \t]+)\S", re.MULTILINE)
_FINAL_LINE = re.compile(r"\s*^[ \t*]*final[ \t]+answer[ \t*]*:.*\s*\Z", re.IGNORECASE | re.MULTILINE)
_NGRAM = 4


def measure_style(completions: Sequence[Completion]) -> dict[str, Any]:
    """Return measures of how a set of completions is written.

    Thinking is measured over all completions, answers over those that closed their thinking and then wrote something;
    a mean or share over nothing is ``None``.

    Returns:
        - ``completions``, ``answers``: how many there are of each.
        - ``think_tokens_mean``, ``think_tokens_median``, ``answer_tokens_mean``, ``answer_tokens_median``.
        - ``one_paragraph_share``: share of answers that are one paragraph (``is_one_paragraph``).
        - ``list_share``: share of answers with a bulleted or numbered line (``has_list``).
        - ``repeated_4gram_share``: mean over completions of ``repeated_ngram_share`` of the whole text.
        - ``foreign_letter_share``: letters outside the Latin and Greek scripts as a share of all letters of all
          completions, thinking included. Greek is let through because clinical English writes β-blocker and µg.
        - ``foreign_run_share``: share of completions with at least two such letters side by side anywhere.
    """
    answered = [completion for completion in completions if completion.closed and completion.answer.strip()]
    answers = [completion.answer for completion in answered]
    repeats = [share for completion in completions if (share := repeated_ngram_share(completion.text)) is not None]
    foreign, letters = zip(*(count_foreign(c.text) for c in completions), strict=True) if completions else ((), ())
    return {
        "completions": len(completions),
        "answers": len(answers),
        "think_tokens_mean": _over([c.num_think_tokens for c in completions], mean),
        "think_tokens_median": _over([c.num_think_tokens for c in completions], median),
        "answer_tokens_mean": _over([c.num_answer_tokens for c in answered], mean),
        "answer_tokens_median": _over([c.num_answer_tokens for c in answered], median),
        "one_paragraph_share": _over([is_one_paragraph(answer) for answer in answers], mean),
        "list_share": _over([has_list(answer) for answer in answers], mean),
        "repeated_4gram_share": _over(repeats, mean),
        "foreign_letter_share": sum(foreign) / sum(letters) if sum(letters) else None,
        "foreign_run_share": _over([has_foreign_run(completion.text) for completion in completions], mean),
    }


def is_one_paragraph(answer: str) -> bool:
    """Return whether an answer, its ``Final answer:`` line set aside, has no blank line inside and no list."""
    body = _FINAL_LINE.sub("", answer).strip()
    return not _BLANK_LINE.search(body) and not has_list(body)


def has_list(answer: str) -> bool:
    """Return whether any line starts with a bullet (``- * + • ‣ ◦ –``) or a number (``1.`` ``1)``), a space behind."""
    return _LIST_ITEM.search(answer) is not None


def repeated_ngram_share(text: str, n: int = _NGRAM) -> float | None:
    """Return the share of word ``n``-grams that stood in the text before: one minus distinct-n; ``None`` below n words.

    0 means every run of ``n`` words is new; a text that says one sentence ten times is near 0.9.
    """
    words = _WORD.findall(text.casefold())
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def count_foreign(text: str) -> tuple[int, int]:
    """Return how many letters are outside the Latin and Greek scripts, and how many letters there are in all."""
    letters = [char for char in unicodedata.normalize("NFKC", text) if char.isalpha()]
    return sum(_is_foreign(char) for char in letters), len(letters)


def has_foreign_run(text: str) -> bool:
    """Return whether two letters outside the Latin and Greek scripts (CJK, Cyrillic, Arabic, ...) stand together."""
    plain = unicodedata.normalize("NFKC", text)
    return any(_is_foreign(left) and _is_foreign(right) for left, right in pairwise(plain))


@lru_cache(maxsize=4096)
def _is_foreign(char: str) -> bool:
    # The Unicode name begins with the script for every letter; the standard library has no script property.
    return char.isalpha() and not unicodedata.name(char, "").startswith(("LATIN ", "GREEK ", "MODIFIER LETTER "))


def _over(values: Sequence[float], statistic: Any) -> float | None:
    return float(statistic(values)) if values else None
