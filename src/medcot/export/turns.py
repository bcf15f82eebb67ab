"""A run's prompt style as a template for other programs: the same text around a question, token for token.

Chat servers put a template of their own around what a user writes: the one in the tokenizer's files, or none. Neither
is what the model was tuned on, unless the run's style was ``chat`` with a template that opens the thinking. So the
run's frame (``prompt/frames.py``) is handed over as it is, cut here into the parts that a template needs, once for
Jinja (vLLM, SGLang, llama.cpp's server) and once for Go (Ollama).

A single question is exact, and is proven. Beyond it nothing was trained, and what is done is R1's own practice: earlier
turns keep their answers and lose their thinking, and a system message stands before all else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcot.prompt import THINK_CLOSE, THINK_OPEN, Style, encode_prompt, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "medcot"  # a question that no style refuses


@dataclass(frozen=True, slots=True)
class Turns:
    """What stands around a question.

    Attributes:
        bos: BOS as text where the prompt begins with it, else empty.
        added: whether the tokenizer puts that BOS there by itself, so that its text is not in a template for programs
            that tokenise with BOS.
        head: before the question, BOS left out.
        tail: after the question, up to the opening of the thinking.
        opening: ``<think>`` and what follows it.
        eos: ends a turn of the model.
    """

    bos: str
    added: bool
    head: str
    tail: str
    opening: str
    eos: str

    def put(self, question: str) -> str:
        """Return a prompt as text, without a BOS that tokenizers add."""
        return ("" if self.added else self.bos) + self.head + question + self.tail + self.opening


def build_turns(style: Style, tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Cut a style's frame into parts; errors as for ``prompt.render_prompt``."""
    head, _, rest = render_prompt(_PROBE, style, tokenizer).partition(_PROBE)
    first = encode_prompt(_PROBE, style, tokenizer)[0]
    adds = tokenizer("a", verbose=False)["input_ids"][0] == tokenizer.bos_token_id
    has_bos = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    added = has_bos and adds
    bos = str(tokenizer.bos_token) if has_bos else ""
    if has_bos and head.startswith(bos):
        head = head.removeprefix(bos)
    tail, _, after = rest.rpartition(THINK_OPEN)
    return Turns(bos, added, head, tail, THINK_OPEN + after, str(tokenizer.eos_token))


_JINJA = (
    "{{- @bos@ }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{{- message['content'] + '\\n\\n' }}"
    "{%- elif message['role'] == 'user' %}{{- @head@ + message['content'] + @tail@ }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{- (message['content'] or '').split('</think>')[-1].lstrip() + @eos@ }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- @closed@ }}"
    "{%- else %}{{- @opening@ }}{%- endif %}"
    "{%- endif %}"
)
# Texts stand in it as quoted strings, so that Go's trimming of spaces cannot reach them. The tags around .Thinking are
# plain, because Ollama reads from there which tags set thinking apart from the answer.
_GO = (
    "{{ @bos@ }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{ if eq .Role "system" }}{{ .Content }}{{ "\\n\\n" }}'
    '{{ else if eq .Role "user" }}{{ @head@ }}{{ .Content }}{{ @tail@ }}'
    "{{ if $last }}{{ if and $.IsThinkSet (not $.Think) }}{{ @closed@ }}{{ else }}{{ @opening@ }}{{ end }}{{ end }}"
    '{{ else if eq .Role "assistant" }}'
    "{{ if and $last .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ .Content }}"
    "{{ if not $last }}{{ @eos@ }}{{ end }}"
    "{{ end }}{{ end }}"
)


def build_jinja(turns: Turns) -> str:
    """Return a chat template in Jinja; ``enable_thinking=false`` closes the thinking at once, as Qwen3's own does."""
    return _fill(_JINJA, turns, turns.bos)


def build_go(turns: Turns) -> str:
    """Return a template for Ollama 0.9 or later, which has ``.Thinking``, ``.Think`` and ``.IsThinkSet``.

    A BOS that llama.cpp adds by itself is not in it.
    """
    return _fill(_GO, turns, "" if turns.added else turns.bos)


def _fill(template: str, turns: Turns, bos: str) -> str:
    texts = {
        "bos": bos,
        "head": turns.head,
        "tail": turns.tail,
        "opening": turns.opening,
        "closed": turns.opening + THINK_CLOSE + "\n\n",
        "eos": turns.eos,
    }
    for name, text in texts.items():
        template = template.replace(f"@{name}@", json.dumps(text, ensure_ascii=False))  # Jinja and Go quote as JSON
    return template
