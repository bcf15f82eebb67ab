"""The engine: makes the training step of a PEFT-wrapped transformers model fast without changing what it computes.

``accelerate(model)`` looks at the very model it is given and builds fast counterparts of its decoder layers over the
same weights; ``explain(model)`` says which part took which path, and why not. Nothing is patched: the model's classes
and methods stay as they were, so anything else done with it (saving, merging, generating) goes on as before. The
trainer asks ``engine_of(model)`` for the fast forward and uses the model itself where there is none.

A part that the engine does not know sends the whole model down the plain path: half a fast model is harder to trust
than a slow one, and the reason is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medcot.engine.attention import SHAPE_STEP, build_layout, has_flash
from medcot.engine.layers import FAMILIES, FastLayer, layer_reason, norm, window_of
from medcot.engine.loss import token_loss

__all__ = ["Engine", "Explanation", "accelerate", "engine_of", "explain", "release"]


@dataclass(frozen=True)
class Explanation:
    """Which path each part of a model took; ``reason`` says why it is the plain one, where it is."""

    fast: bool
    parts: dict[str, str] = field(default_factory=dict)
    reason: str | None = None

    def __str__(self) -> str:
        """One line a part."""
        if not self.fast:
            return f"plain path: {self.reason}"
        return "\n".join(f"{part}: {path}" for part, path in self.parts.items())


class Engine:
    """The fast forward of one model.

    Args:
        causal_lm: the transformers model under PEFT, with ``model`` (decoder) and ``lm_head``.
    """

    def __init__(self, causal_lm: Any) -> None:
        self.causal_lm = causal_lm
        self.decoder: Any = self.causal_lm.model
        config = self.causal_lm.config
        self.dtype: torch.dtype = self.decoder.norm.weight.dtype
        family = FAMILIES[config.model_type]
        self.layers = [
            FastLayer(layer, family, window_of(config, index), self.dtype)
            for index, layer in enumerate(self.decoder.layers)
        ]

    def embed(self, ids_T: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token embeddings (T, D) and the rotary angles' cosine and sine (T, C)."""
        hidden_TD = self.decoder.embed_tokens(ids_T).to(self.dtype)
        cos_1TC, sin_1TC = self.decoder.rotary_emb(hidden_TD[None], position_ids=positions_T[None])
        return hidden_TD, cos_1TC[0], sin_1TC[0]

    def hidden_states(self, ids_T: Tensor, lengths: Sequence[int], *, recompute: bool = False) -> Tensor:
        """Final hidden states (T, D), after the last norm.

        Args:
            ids_T: token ids of all rows, end to end.
            lengths: tokens of each row; they add up to T.
            recompute: keep each layer's input only, and compute the rest again in the backward pass.
        """
        num_tokens = len(ids_T)
        if ids_T.device.type == "cpu" and num_tokens % SHAPE_STEP:
            # The filler lengthens the last row at its end, where causal attention hides it from every real token.
            filler = SHAPE_STEP - num_tokens % SHAPE_STEP
            ids_T, lengths = F.pad(ids_T, (0, filler)), [*lengths[:-1], lengths[-1] + filler]
        layout = build_layout(lengths, ids_T.device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(ids_T.device)
        hidden_TD, cos_TC, sin_TC = self.embed(ids_T, positions_T)
        for layer in self.layers:
            if recompute:
                hidden_TD = checkpoint(layer, hidden_TD, cos_TC, sin_TC, layout, use_reentrant=False)
            else:
                hidden_TD = layer(hidden_TD, cos_TC, sin_TC, layout)
        return norm(self.decoder.norm, hidden_TD[:num_tokens])

    def summed_loss(
        self, ids_T: Tensor, labels_T: Tensor, lengths: Sequence[int], *, recompute: bool = False
    ) -> tuple[Tensor, int]:
        """Cross-entropy summed over the trained tokens, and how many they are.

        Args:
            ids_T: token ids of all rows, end to end.
            labels_T: the id to learn at each position, -100 for none; unshifted, and -100 at each row's first token.
            lengths: tokens of each row.
            recompute: see ``hidden_states``.
        """
        hidden_TD = self.hidden_states(ids_T, lengths, recompute=recompute)
        targets = (labels_T[1:] != -100).nonzero().flatten()
        loss = token_loss(hidden_TD[targets], self.causal_lm.lm_head.weight, labels_T[1:][targets])
        return loss, len(targets)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits (T, V) in the model's dtype."""
        return self.causal_lm.lm_head(hidden_TD)


# Both live on the instance they belong to, and go with it.
_ENGINE, _EXPLANATION = "_medcot_engine", "_medcot_explanation"


def accelerate(model: nn.Module) -> Explanation:
    """Build the fast counterpart of a model, if all of its parts are known; idempotent.

    Args:
        model: a transformers causal language model, usually PEFT-wrapped, adapters in place.

    Returns:
        What ``explain(model)`` will say.
    """
    causal_lm = _causal_lm(model)
    reason = _plain_reason(causal_lm)
    if reason is not None:
        vars(model).pop(_ENGINE, None)  # of an earlier call, when the model was another
        explanation = Explanation(fast=False, reason=reason)
    else:
        if engine_of(model) is None:
            setattr(model, _ENGINE, Engine(causal_lm))
        explanation = Explanation(fast=True, parts=_parts(causal_lm))
    setattr(model, _EXPLANATION, explanation)
    return explanation


def explain(model: nn.Module) -> Explanation:
    """Say which path each part of a model took; a model never accelerated says so."""
    return vars(model).get(_EXPLANATION, Explanation(fast=False, reason="accelerate() was not called on it"))


def engine_of(model: nn.Module) -> Engine | None:
    """Return the fast forward of a model, or ``None`` where it runs the plain one."""
    return vars(model).get(_ENGINE)


def release(model: nn.Module) -> None:
    """Forget a model's fast forward, before the model is changed in ways the engine would not see (a new adapter)."""
    for name in (_ENGINE, _EXPLANATION):
        vars(model).pop(name, None)


def _causal_lm(model: nn.Module) -> Any:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _plain_reason(causal_lm: Any) -> str | None:
    model_type = causal_lm.config.model_type
    if model_type not in FAMILIES:
        return f"the engine knows {', '.join(FAMILIES)}, not {model_type}"
    if causal_lm.config.to_dict().get("attention_dropout"):
        return "its attention has dropout"
    if causal_lm.get_output_embeddings().bias is not None:
        return "its output head has a bias"
    trained = [name for name in ("embed_tokens", "norm") if _trains(causal_lm.model.get_submodule(name))]
    trained += ["lm_head"] if _trains(causal_lm.lm_head) else []
    if trained:
        return f"{', '.join(trained)} is being trained"
    for index, layer in enumerate(causal_lm.model.layers):
        reason = layer_reason(layer, causal_lm.config.hidden_act)
        if reason is not None:
            return f"layer {index}: {reason}"
    return None


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _parts(causal_lm: Any) -> dict[str, str]:
    flash = has_flash(causal_lm.device, causal_lm.model.norm.weight.dtype)
    return {
        "projections": "q/k/v and gate/up fused, LoRA added in place, base frozen",
        "attention": "torch varlen_attn" if flash else "padded inside attention only, blocks of queries",
        "norm, rotary, SwiGLU": "own backward, in place where nothing else reads",
        "loss": "trained tokens only, in chunks, no logits kept",
    }
