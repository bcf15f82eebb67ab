"""Strict grading: one documented pattern, and whatever does not match it is wrong, counted and shown.

Published scores of the very same outputs differ by up to 11 points with the extractor, because most extractors guess:
they take the first letter that looks like an option, or the better of the first and the last match. Here nothing is
guessed. The rules, all of them:

1. Only what follows the last ``</think>`` counts (``Completion.answer``). No such tag, or a ``<think>`` that opens
   after it: ``UNFINISHED``.
2. The last non-empty line must be ``Final answer: X``, in any case. Markdown bold (``**``) on that line is ignored,
   because models add it by habit and it changes no meaning, and so are characters that no reader sees (zero width,
   direction marks; not overrides, which show another order than is written); nothing else may stand around it.
   Otherwise ``UNPARSED``.
3. An earlier line of that form with another ``X`` makes the answer ``UNPARSED``: who answers twice has not answered.
   The same ``X`` again is fine; "same" means equal after case, white space and a trailing period are set aside.
4. Generation that hit its length limit before that line ended is ``UNPARSED``: "Final answer: 12" may have been on its
   way to 120.
5. ``X`` is then read by the kind of the gold answer (``answers`` holds the pattern of each kind); if it cannot be,
   ``UNPARSED``; if it can, ``CORRECT`` or ``WRONG``.

A completion that was never produced (``None``) is ``FAILED``. Every outcome but ``CORRECT`` counts as wrong. What a
guessing extractor would have made of the same text is ``lenient``'s to say, beside this score and never instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from medcot.evaluate.answers import WORDS, check_gradable, judge
from medcot.evaluate.phrases import normalise_text
from medcot.prompt import THINK_OPEN
from medcot.records import AnswerKind, Completion, Example, Finish, Grade, Outcome

_FINAL_LINE = re.compile(r"final[ \t]+answer[ \t]*:[ \t]*(?P<answer>.*)", re.IGNORECASE)
# Soft hyphen, zero-width characters, direction marks and isolates, variation selectors, byte order mark.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202c\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff]"
)
_SPACES = re.compile("[\u00a0\u2007\u2009\u200a\u202f]")


def instruction(kind: AnswerKind, options: Collection[str] | None = None) -> str:
    """Return the one sentence that a prompt asks for the last line with; it constrains nothing else.

    It holds no quotation marks and no markdown, because models copy them.

    Args:
        kind: what the gold answer is.
        options: the letters to choose from; of kind YESNO the words, where they are not yes, no and maybe.
    """
    if kind is AnswerKind.LETTER:
        wanted = "the letter of the right option" + (f" ({_join(options)})" if options else "")
    elif kind is AnswerKind.YESNO:
        wanted = _join(options or WORDS)
    elif kind is AnswerKind.NUMBER:
        wanted = "a number with its unit, if it has one"
    else:
        wanted = "a short phrase"
    return f"On the last line write Final answer: X, where X is {wanted}."


def _join(words: Collection[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def parse_final_answer(text: str) -> str | None:
    """Return ``X`` of the closing line ``Final answer: X``, or ``None`` where rules 2 and 3 above are not met."""
    lines = [_SPACES.sub(" ", INVISIBLE.sub("", line)).replace("**", "").strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    matches = [match for line in lines if (match := _FINAL_LINE.fullmatch(line))]
    if not matches or matches[-1].string != lines[-1]:
        return None
    answers = [match["answer"].strip() for match in matches]
    final = answers[-1]
    if not final or _FINAL_LINE.search(final) or len({normalise_text(answer) for answer in answers}) > 1:
        return None
    return final


def grade(example: Example, completion: Completion | None) -> Grade:
    """Return the verdict on one completion by the rules above.

    Args:
        example: the problem; it must carry ``gold`` and ``answer_kind``.
        completion: what the model wrote, or ``None`` when generation itself broke.

    Raises:
        DataError: the example has no gold answer, or its gold answer does not have the form of its kind.
    """
    check_gradable(example)
    if completion is None:
        return Grade(Outcome.FAILED)
    if not completion.closed or THINK_OPEN in completion.answer:
        return Grade(Outcome.UNFINISHED)
    cut = completion.finish is Finish.LENGTH and not completion.text.endswith("\n")
    final = None if cut else parse_final_answer(completion.answer)
    read = None if final is None else judge(final, example)
    if read is None:
        return Grade(Outcome.UNPARSED)
    return Grade(Outcome.CORRECT if read.right else Outcome.WRONG, parsed=read.parsed)
