"""``model.generate`` as the tutorial calls it, written by medcot's decoding wherever that writes the same.

transformers' ``generate`` takes some eighty settings. Those of a plain answer (greedy, or sampled by temperature and
top_p, until EOS or a number of new tokens; a streamer) are what the engine's decoding does too, an order of magnitude
faster. ``read_call`` settles a call as transformers would: what the call says, else the model's generation_config,
else the library's default. Whatever goes beyond a plain answer is handed on to transformers, and said once. One default
is not taken over: transformers keeps to the 50 likeliest tokens where neither call nor model says so, which no model
card asks for; a ``top_k`` that anybody has written goes to transformers.

Draws come from medcot's streams, whose seed is taken from torch's generator: ``torch.manual_seed`` repeats an answer,
and two calls in a row differ.

Axes: B rows; L slots of the rectangle that the caller gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from medcot.engine import engine_of
from medcot.generate import Sampling, eos_token_ids, generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A setting and the values at which it changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "return_dict_in_generate": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}
# Read below, or without influence on which tokens are written.
READ = {
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k", "eos_token_id", "pad_token_id"),
    *("bos_token_id", "use_cache", "cache_implementation", "early_stopping", "length_penalty", "_from_model_config"),
    *("transformers_version", "disable_compile", "compile_config", "renormalize_logits", "remove_invalid_values"),
    *("decoder_start_token_id", "max_cache_len", "cache_config", "low_memory"),
}
SAMPLING_ONLY = {"temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
INPUTS = {"inputs", "input_ids", "attention_mask", "streamer"}


@dataclass(frozen=True)
class Call:
    """A call that medcot's decoding answers."""

    prompts: list[list[int]]
    max_new_tokens: int
    sampling: Sampling
    pad_token_id: int
    streamer: Any


class Declined(Exception):
    """A call that is transformers' to answer, and why; it does not leave this file."""


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, str | None]:
    """Answer a call of ``generate``: prompts and answers (B, L), or ``None`` and the reason why not.

    The reason is ``None`` too where the model runs the plain path anyhow.
    """
    if engine_of(model) is None:
        return None, None
    try:
        call = read_call(model, tokenizer, args, kwargs)
    except Declined as declined:
        return None, str(declined)
    given = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    assert isinstance(given, Tensor)
    if call.streamer is not None:
        call.streamer.put(given.cpu())
    written = generate(
        model,
        tokenizer,
        call.prompts,
        max_new_tokens=call.max_new_tokens,
        sampling=call.sampling,
        seed=int(torch.randint(2**62, (1,))) if call.sampling.temperature else 0,
        batch_size=len(call.prompts),
        on_token=None if call.streamer is None else lambda _, token: call.streamer.put(torch.tensor([token])),
    )
    if call.streamer is not None:
        call.streamer.end()
    longest = max(len(tokens) for tokens, _ in written)
    padded = [[*tokens, *[call.pad_token_id] * (longest - len(tokens))] for tokens, _ in written]
    return torch.cat([given, torch.tensor(padded, dtype=given.dtype, device=given.device)], dim=1), None


def read_call(model: Any, tokenizer: PreTrainedTokenizerBase, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Settle a call of ``generate``.

    Raises:
        Declined: it asks for more than a plain answer.
    """
    if len(args) > 1:
        raise Declined("it passes more than the prompt by position")
    given = dict(kwargs) | ({"inputs": args[0]} if args else {})
    config = given.pop("generation_config", None) or model.generation_config
    own = {name: value for name, value in config.to_diff_dict().items() if value is not None}
    inherited = {name: value for name, value in model.generation_config.to_diff_dict().items() if value is not None}
    settings = inherited | own | {name: value for name, value in given.items() if name not in INPUTS}
    sampled = bool(settings.get("do_sample"))
    _check_plain(settings, sampled)
    known = eos_token_ids(model, tokenizer)
    eos = given.get("eos_token_id")
    if eos is not None and (set(eos) if isinstance(eos, list | tuple) else {eos}) != known:
        raise Declined(f"it ends at eos_token_id={eos}, and the model's answers at {sorted(known)}")
    room = settings.get("max_new_tokens")
    if not isinstance(room, int) or room < 1:
        raise Declined("it sets no max_new_tokens")
    prompts = _read_prompts(given)
    streamer = given.get("streamer")
    if streamer is not None and len(prompts) > 1:
        raise Declined("it streams several rows at once")
    # The neutral value of what nobody has set is transformers' own default.
    sampling = Sampling(float(settings.get("temperature", 1.0)), float(settings.get("top_p", 1.0)))
    pad = settings.get("pad_token_id", min(known))
    return Call(prompts, room, sampling if sampled else Sampling(0.0, 1.0), int(pad), streamer)


def _check_plain(settings: Mapping[str, Any], sampled: bool) -> None:
    for name, value in settings.items():
        if not sampled and name in SAMPLING_ONLY:
            continue
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise Declined(f"{name}={value}")
        elif name not in READ and value is not None and value is not False:
            raise Declined(f"{name}={value!r}" if isinstance(value, int | float | str) else name)
    if sampled and settings.get("top_k"):
        raise Declined(f"top_k={settings['top_k']}")
    if sampled and settings.get("temperature") == 0:
        raise Declined("temperature=0 with do_sample")
    if settings.get("use_cache") is False:
        raise Declined("use_cache=False")


def _read_prompts(given: Mapping[str, Any]) -> list[list[int]]:
    """The rows without their padding, which stands on the left where there is any."""
    ids_BL = given.get("input_ids", given.get("inputs"))
    if not isinstance(ids_BL, Tensor) or ids_BL.ndim != 2 or 0 in ids_BL.shape:
        raise Declined("its prompt is not a matrix of token ids")
    mask_BL = given.get("attention_mask")
    if mask_BL is None:
        return [list(row) for row in ids_BL.tolist()]
    if not isinstance(mask_BL, Tensor) or mask_BL.shape != ids_BL.shape:
        raise Declined("its attention mask is not one of real and padding tokens")
    real_BL = mask_BL.cpu() != 0
    if (real_BL[:, :-1] & ~real_BL[:, 1:]).any() or not real_BL[:, -1].all():
        raise Declined("its padding is not on the left")
    return [[token for token, is_real in zip(*row, strict=True) if is_real]
            for row in zip(ids_BL.tolist(), real_BL.tolist(), strict=True)]  # fmt: skip
