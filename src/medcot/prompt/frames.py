"""Frames: what each style puts around a question, a chain of thought and an answer, for one tokenizer.

A chat frame is cut from a rendering of the model's own template around a marker instead of rendering every question:
the template then cannot alter, drop or be steered by what a question says, and one rendering serves a million rows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from medcot.errors import ModelError
from medcot.records import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

TUTORIAL_QUESTION = (
    "A 61-year-old woman with a long history of involuntary urine loss during activities like coughing or sneezing but "
    "no leakage at night undergoes a gynecological exam and Q-tip test. Based on these findings, what would cystometry "
    "most likely reveal about her residual volume and detrusor contractions?"
)

TUTORIAL_TEMPLATE = """\
Below is an instruction that describes a task, paired with an input that provides further context.
Write a response that appropriately completes the request.
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a logical \
and accurate response.

### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.
Please answer the following medical question.

### Question:
{question}

### Response:
<think>"""

_SHORT_TEMPLATE = "{question}\n<think>"
_HEADINGS = ("### Instruction:", "### Question:", "### Response:")  # the tutorial's turns, made of ordinary text
_MARKER = "medcot-puts-the-question-here"  # rendered through a chat template to find its frame
_LOOKS_LIKE_CONTROL = re.compile(r"[<\[][|｜]")  # <|im_end|>, <｜User｜>: some tokenizers do not flag these as special


class Style(StrEnum):
    """How a question is put to the model; see the recipe key ``prompt.style``."""

    TUTORIAL = "tutorial"
    CHAT = "chat"  # the model's own chat template
    SHORT = "short"  # fewest tokens, for small models: question, newline, <think>


@dataclass(frozen=True, slots=True)
class Frame:
    """One style with one tokenizer: everything around the three texts of an example."""

    lead_ids: tuple[int, ...]  # what the tokenizer itself puts before a text, e.g. BOS; none where the template has it
    head: str  # text before the question
    tail: str  # text after it, ending with the opened <think> block
    before_think: str
    after_think: str
    before_answer: str
    close_ids: tuple[int, ...]
    eos_id: int
    refused_ids: frozenset[int]  # control tokens and thinking tags: the frame's alone
    headings: tuple[str, ...]  # text that would begin another turn, if a question held it


def frame_of(style: Style, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Return the frame of a style, computed once for a tokenizer in its present state."""
    return _build_frame(Style(style), tokenizer, str(tokenizer.chat_template), tokenizer.eos_token_id, len(tokenizer))


@lru_cache(maxsize=8)
def _build_frame(
    style: Style, tokenizer: PreTrainedTokenizerBase, template: str, eos_id: int | None, num_tokens: int
) -> Frame:
    """Build a frame; the arguments after ``tokenizer`` only tell the cache that the tokenizer was changed."""
    if not tokenizer.is_fast or eos_id is None:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path!r} {'has no EOS token' if tokenizer.is_fast else 'is slow'}",
            "Rows end with EOS and their spans come from a fast tokenizer's offsets",
            "Use a model with a tokenizer.json that names an EOS token",
        )
    if style is Style.CHAT:
        head, tail = _chat_frame(tokenizer)
        glue = ("" if tail.endswith("\n") else "\n", "\n", "\n\n")
    else:
        head, _, tail = (TUTORIAL_TEMPLATE if style is Style.TUTORIAL else _SHORT_TEMPLATE).partition("{question}")
        glue = ("\n", "\n", "\n") if style is Style.TUTORIAL else ("", "", "")
    return Frame(
        lead_ids=() if style is Style.CHAT else _lead_ids(tokenizer),
        head=head,
        tail=tail,
        before_think=glue[0],
        after_think=glue[1],
        before_answer=glue[2],
        close_ids=tuple(tokenise(THINK_CLOSE, tokenizer)[0]),
        eos_id=eos_id,
        refused_ids=control_ids(tokenizer) | _tag_ids(tokenizer),
        headings=_headings(style, head, tail, tokenizer),
    )


def _headings(style: Style, head: str, tail: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return what begins a turn in ordinary text: a template may write ``[/INST]`` or ``ASSISTANT:`` with no token.

    A line that is a bare word ("assistant" between control tokens) begins nothing, and is found in many a question.
    """
    if style is not Style.CHAT:
        return _HEADINGS if style is Style.TUTORIAL else ()
    control = cast("list[str]", tokenizer.convert_ids_to_tokens(sorted(control_ids(tokenizer))))
    between = re.compile("|".join(map(re.escape, [*control, THINK_OPEN, "\n"])))
    lines = [between.split(head.rstrip())[-1], *between.split(tail)]
    return tuple(line.strip() for line in lines if line.strip() and not line.strip().isalnum())


def _lead_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return what the tokenizer puts before a text by itself: BOS, or nothing. What it puts behind is left out."""
    plain = tokenise("a", tokenizer)[0]
    whole = cast("list[int]", tokenizer("a", verbose=False)["input_ids"])
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[:start])


def _chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what the model's chat template renders before and after a question, ``<think>`` opened at the end."""
    import jinja2  # only this style needs it

    name = repr(tokenizer.name_or_path)
    remedy = "Set prompt.style to tutorial, or to short for a small model"
    if not tokenizer.chat_template:
        raise ModelError(f"The tokenizer of {name} has no chat template", "Prompt style 'chat' renders it", remedy)
    try:
        # Hybrid models such as Qwen3 put a closed, empty thinking block there unless thinking is enabled.
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARKER}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
    except jinja2.TemplateError as error:
        raise ModelError(f"The chat template of {name} fails: {error}", "It must render a question", remedy) from error
    head, found, tail = cast(str, rendered).partition(_MARKER)
    if not found or _MARKER in tail:
        times = "more than once" if found else "nowhere"
        raise ModelError(f"The chat template of {name} puts the question {times}", "It must be there once", remedy)
    if not tail.rstrip().endswith(THINK_OPEN):
        tail += THINK_OPEN + "\n"
    if tail.count(THINK_OPEN) > 1 or THINK_CLOSE in tail:
        raise ModelError(
            f"The chat template of {name} ends its generation prompt with {tail!r}",
            "It may open one thinking block at its end, and close none",
            remedy,
        )
    return head, tail


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that steer the model rather than say something, the thinking tags not among them.

    Special tokens by flag or name, and added tokens that the chat template writes or that look like control tokens: not
    every tokenizer flags its turn markers. Other added tokens, such as Gemma's line breaks, are plain text.
    """
    template = str(tokenizer.chat_template)
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} - {None}
    added = {
        token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or (token.content.strip() and token.content in template)
        or _LOOKS_LIKE_CONTROL.match(token.content)
    }
    return frozenset(named | added) - _tag_ids(tokenizer)


def find_markers(style: Style, tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what no user text may hold (thinking tags, control tokens), and what no question may (headings).

    Raises:
        ModelError: the tokenizer has no usable chat template (style ``chat``), or no EOS.
    """
    frame = frame_of(style, tokenizer)
    control = cast("list[str]", tokenizer.convert_ids_to_tokens(sorted(control_ids(tokenizer))))
    return tuple(dict.fromkeys([THINK_OPEN, THINK_CLOSE, *control])), frame.headings


def _tag_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the thinking tags where they are single tokens; else none."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token_id for token_id, token in added if token.content in (THINK_OPEN, THINK_CLOSE))


def tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    """Return the ids of a text, nothing added, with each token's character range."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=False,  # the frame's own control tokens must become control tokens
        return_offsets_mapping=True,
        verbose=False,  # length is data.checks' business
    )
    return cast("list[int]", encoded["input_ids"]), cast("list[Span]", encoded["offset_mapping"])


def _most_bytes(core: str) -> int | None:
    parts = json.loads(core)
    model, before = parts["model"], json.dumps(parts["pre_tokenizer"])
    byte_level = '"ByteLevel"' in before
    if model["type"] != "BPE" or not (byte_level or model.get("byte_fallback")):
        return None  # a text without known characters may be a single unknown token
    if parts["normalizer"] is not None and parts["normalizer"]["type"] != "NFC":
        return None
    known = [*model["vocab"], *(token["content"] for token in parts["added_tokens"])]
    longest = max(len(token) if byte_level else len(token.encode()) for token in known)
    return longest * (3 if parts["normalizer"] is not None else 1)  # NFC joins three characters to one at most


def count_most_bytes(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the most bytes of UTF-8 that one token can stand for, or ``None`` where that has no bound.

    Text of more than so many bytes a token is known to be over a limit without being tokenised, which takes 25 s and
    4 GB for 12 MB.
    """
    return _most_bytes(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None
