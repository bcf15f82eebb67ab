"""A tokenizer in GGUF's words: tokens, their types, the merges, and the name of how text is cut before merging.

llama.cpp has tokenizers of its own. A GGUF file tells it the vocabulary, and names the *pre-tokenizer*, the expression
that cuts text into words, out of a list compiled into llama.cpp. A wrong name loads without a word and cuts "250 mg"
into tokens that the model never saw. llama.cpp's converter finds the name by hashing what the tokenizer makes of one
sample text, and knows only hashes of tokenizers it has met. Here the name follows from the tokenizer's own definition:
the structure that ``tokenizer.json`` spells out is looked up in a table, so a tokenizer that was retrained or extended
with tokens keeps its name, and one with any other expression is refused. (That llama.cpp then really makes the same
tokens of every prompt is part of the proof, ``equality.py``.)

Sources: GGUF's keys, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the expressions in llama.cpp's
src/llama-vocab.cpp, beside which it quotes the original of each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from medcot.errors import ModelError
from medcot.prompt.frames import control_ids

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut into words, and what llama.cpp calls it. "bytes" is GPT-2's own expression inside ByteLevel.
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "tekken",
}
# With these, llama.cpp takes a word that is a token whole, without merging; with the others it does not.
WHOLE_WORDS = {"llama-bpe", "tekken"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    special: dict[str, int]  # bos, eos, unknown, padding
    add_bos: bool


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, num_rows: int, *, add_bos: bool) -> Vocabulary:
    """Describe a tokenizer for a model with ``num_rows`` rows of embedding; rows without a token are marked unused.

    Args:
        tokenizer: a fast tokenizer.
        num_rows: rows of the embedding.
        add_bos: whether llama.cpp is to put BOS before a text.

    Raises:
        ModelError: a tokenizer that llama.cpp has no twin of.
    """
    from gguf import TokenType

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _name_pre_tokenizer(parts, tokenizer.name_or_path)
    control, added = control_ids(tokenizer), tokenizer.added_tokens_decoder
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(texts) >= num_rows:
        raise ModelError(
            f"the tokenizer of '{tokenizer.name_or_path}' has token {max(texts)}, and the embedding {num_rows} rows",
            "Every token has a row",
            "Take the tokenizer that belongs to the model",
        )
    tokens, types = [], []
    for index in range(num_rows):
        tokens.append(texts.get(index, f"[PAD{index}]"))
        if index not in texts:
            types.append(TokenType.UNUSED)
        elif index in control:
            types.append(TokenType.CONTROL)
        else:
            types.append(TokenType.USER_DEFINED if index in added else TokenType.NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"]]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    special = {name: int(index) for name, index in ids.items() if index is not None}
    return Vocabulary(tokens, [int(kind) for kind in types], merges, pre, special, add_bos)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, chat_template: str | None) -> None:
    """Put a vocabulary and a chat template into the header of a GGUF file."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    setters = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unknown": writer.add_unk_token_id,
        "padding": writer.add_pad_token_id,
    }
    for name, index in vocabulary.special.items():
        setters[name](index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def _name_pre_tokenizer(parts: dict[str, Any], name: str) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text."""
    model, normalizer = parts["model"], parts["normalizer"]
    steps = tuple(_list_steps(parts["pre_tokenizer"] or {"type": "nothing"}))
    found = PRE_TOKENIZERS.get(steps)
    # NFC is left out by llama.cpp too; text that is not in NFC differs, and the proof would show it.
    plain = normalizer is None or normalizer["type"] == "NFC"
    whole_words = bool(model.get("ignore_merges"))
    if model["type"] != "BPE" or found is None or not plain or whole_words != (found in WHOLE_WORDS):
        what = " then ".join(steps) if model["type"] == "BPE" else model["type"]
        raise ModelError(
            f"the tokenizer of '{name}' ({what}) has no twin in llama.cpp that is known here",
            "A GGUF file names how llama.cpp cuts text into tokens; a wrong name would change every prompt",
            "Export merged-16bit, and convert it with llama.cpp's own convert_hf_to_gguf.py",
        )
    return found


def _list_steps(part: dict[str, Any]) -> list[str]:
    """Write a pre-tokenizer as a list of its steps; what is not understood stands there by its type."""
    kind = part["type"]
    if kind == "Sequence":
        return [step for inner in part["pretokenizers"] for step in _list_steps(inner)]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return ["bytes"] if part["use_regex"] else []  # without its expression it only renames bytes
    if kind == "Digits" and part["individual_digits"]:
        return ["digits"]
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return [str(part["pattern"].get("Regex", part["pattern"]))]
    return [kind]
