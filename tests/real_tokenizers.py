"""The two real tokenizers that tests share: loading takes seconds, so each is loaded once, and left as it is."""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedTokenizerBase

from test_prompt import load_r1 as load_fresh_r1


@cache
def load_smol() -> PreTrainedTokenizerBase:
    """SmolLM2's, from the embedded model: thinking tags of several tokens, BOS only where ChatML writes it."""
    from medcot.model import load_tokenizer

    return load_tokenizer("embedded", precision="fp32")


@cache
def load_r1() -> PreTrainedTokenizerBase:
    """DeepSeek-R1-Distill-Qwen's; skips the test where it is not at hand."""
    return load_fresh_r1()
