"""Closing a chain of thought that has used up its budget, with the very ids that a training row has there.

A budget is kept by force (Muennighoff et al. 2025, arXiv:2501.19393): at the cap the thinking block is closed for the
model, and it goes on with its answer. Written as ids and not as text, the close is what the model was trained on, in
every style, so a tuned model meets nothing that it never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from medcot.prompt.frames import Frame, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def closing_ids(frame: Frame, tokenizer: PreTrainedTokenizerBase, answer: str = "", before: str = "") -> list[int]:
    """Return the ids that end thinking and begin an answer, as a training row has them.

    Args:
        frame: of the prompt's style.
        tokenizer: the model's.
        answer: the answer's first words, if it is told them.
        before: text that opens a thinking block which is to stay empty.
    """
    end = tokenise(before + frame.after_think, tokenizer)[0]
    return [*end, *frame.close_ids, *answer_ids(frame, tokenizer, answer)]


def answer_ids(frame: Frame, tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Return the ids of an answer's first words behind closed thinking."""
    return tokenise(frame.before_answer + answer, tokenizer)[0]


def count_torn(written: Sequence[int], frame: Frame) -> int:
    """Return how many of the last ids are the beginning of a closing tag that is not whole.

    One alone is no sign: where the tag is made of ordinary tokens, its first is a sign of less-than, or of anything.
    """
    tag = list(frame.close_ids)
    return next((n for n in range(len(tag) - 1, 1, -1) if list(written[-n:]) == tag[:n]), 0)
