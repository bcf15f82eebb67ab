"""The engine: makes the training step of a PEFT-wrapped transformers model fast without changing what it computes.

``accelerate(model)`` looks at the very model it is given and builds fast counterparts of its decoder layers over the
same weights; ``explain(model)`` says which part took which path, and why not. No class is patched: the one thing put on
the model is its decoder instance's ``forward`` (``forward.py``), by which any training loop gets the fast layers, and
anything else done with it (saving, merging, generating) goes on as before. medcot's trainer asks ``engine_of(model)``
for the fast loss as well, and uses the model itself where there is none.

A part that the engine does not know sends the whole model down the plain path: half a fast model is harder to trust
than a slow one, and the reason is printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medcot.engine import pointwise
from medcot.engine.attention import SHAPE_STEP, build_layout
from medcot.engine.devices import has_flash, has_fp8, has_triton, send
from medcot.engine.flash import is_made_for
from medcot.engine.forward import install, remove
from medcot.engine.frozen import FP8_STEP, Fp8, Fp8Head, Fp8Linear, Fp8Weight, Matrix, Nf4Weight, dense_weight
from medcot.engine.layers import FAMILIES, GROUPS, FastLayer, LayerPairs, Step, layer_reason, window_of
from medcot.engine.lora import base_of, cast_adapters
from medcot.engine.loss import token_loss
from medcot.engine.memory import FASTEST, Keep, Memory
from medcot.engine.stack import DecoderStack, HostStore
from medcot.errors import ModelError

__all__ = ["Engine", "Explanation", "accelerate", "check_fp8", "engine_of", "explain", "hold_in_fp8", "release"]


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
        self.device: torch.device = self.decoder.norm.weight.device
        self.ops: ModuleType = operations(self.device)
        self.layers = [
            FastLayer(layer, family, window_of(config, index), self.dtype)
            for index, layer in enumerate(self.decoder.layers)
        ]
        self._host: HostStore | None = None
        self._keeps_unpacked = False
        self._fp8_head: tuple[tuple[int, Fp8], Fp8Head] | None = None

    @property
    def head(self) -> Tensor | Matrix:
        """The output head for the loss, as it is now: in 8 bit where the layers are and as they have it chosen.

        Answers come from the head as it is.
        """
        weight: Tensor = self.causal_lm.lm_head.weight
        base = self.layers[0].down.weight
        if not isinstance(base, Fp8Weight) or len(weight) % FP8_STEP:
            return weight
        if not (base.choice.head_forward or base.choice.head_backward):
            return weight
        built_for = weight.data_ptr(), base.choice
        if self._fp8_head is None or self._fp8_head[0] != built_for:
            self._fp8_head = built_for, Fp8Head(weight.detach(), self.dtype, base.choice)
        return self._fp8_head[1]

    def embed(self, tokens: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token embeddings (T, D) of ids (T), if need be, and the rotary angles' cosine and sine (T, C)."""
        if tokens.ndim == 1:
            table = self.decoder.embed_tokens
            tokens = table(send(tokens, table.weight.device))
        hidden_TD = send(tokens, self.device).to(self.dtype)
        cos_1TC, sin_1TC = self.decoder.rotary_emb(hidden_TD[None], position_ids=positions_T[None])
        return hidden_TD, cos_1TC[0], sin_1TC[0]

    def hidden_states(
        self, tokens: Tensor, lengths: Sequence[int], *, memory: Memory = FASTEST, positions_T: Tensor | None = None
    ) -> Tensor:
        """Final hidden states (T, D), after the last norm.

        Args:
            tokens: ids (T) of all rows, end to end, or their embeddings (T, D).
            lengths: tokens of each row; they add up to T.
            memory: what is kept for the backward pass.
            positions_T: each token's position; ``None`` counts from 0 in each row.
        """
        num_tokens = len(tokens)
        if positions_T is None:
            positions_T = torch.cat([torch.arange(length) for length in lengths])
        if self.device.type == "cpu" and num_tokens % SHAPE_STEP:
            # The filler lengthens the last row at its end, where causal attention hides it from every real token.
            filler = SHAPE_STEP - num_tokens % SHAPE_STEP
            tokens = F.pad(tokens, (0, 0) * (tokens.ndim - 1) + (0, filler))
            lengths = [*lengths[:-1], lengths[-1] + filler]
            positions_T = F.pad(positions_T, (0, filler))
        device = self.device
        hidden_TD, cos_TC, sin_TC = self.embed(tokens, send(positions_T, device))
        step = Step(
            layout=build_layout(lengths, device),
            cos_TC=cos_TC.contiguous(),
            sin_TC=sin_TC.contiguous(),
            ops=self.ops,
            keep=memory.keep,
            tile_tokens=memory.tile_tokens,
            one_weight=memory.one_weight,
        )
        self._set_unpacked(memory.unpacked)
        groups = [projection.adapters() for layer in self.layers for projection in layer.projections]
        cast = cast_adapters(groups, self.dtype, device)
        pairs = [LayerPairs(*cast[first : first + len(GROUPS)]) for first in range(0, len(cast), len(GROUPS))]
        adapters = [tensor for group in groups for adapter in group for tensor in (adapter.A, adapter.B)]
        host = self._host_store() if memory.keep is Keep.HOST else None
        final_TD = DecoderStack.apply(hidden_TD, self.layers, self.decoder.norm, pairs, step, host, *adapters)
        return final_TD[:num_tokens]

    def renew(self) -> str | None:
        """Build itself again over a model that has changed; or return why it cannot, and stay as it was."""
        reason = _plain_reason(self.causal_lm)
        if reason is None:
            self.__init__(self.causal_lm)  # type: ignore[misc]  # whoever holds the engine holds the new one
        return reason

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has layers of its own, and no engine until it is accelerated."""
        return type(None), ()

    def _set_unpacked(self, kept: bool) -> None:
        """Have 4-bit weights stay unpacked once they are opened, or have what was unpacked forgotten."""
        if kept == self._keeps_unpacked:
            return
        self._keeps_unpacked = kept
        for layer in self.layers:
            for projection in layer.projections:
                if isinstance(projection.weight, Nf4Weight):
                    projection.weight.keeps_unpacked = kept
                    if not kept:
                        projection.weight.forget_unpacked()

    def give_back(self) -> None:
        """Free what only training needs: unpacked weights, and the layers' inputs on the host."""
        self._set_unpacked(False)
        self._host = None

    def _host_store(self) -> HostStore:
        if self._host is None:
            self._host = HostStore(self.device)
        return self._host

    def summed_loss(
        self, ids_T: Tensor, labels_T: Tensor, lengths: Sequence[int], *, memory: Memory = FASTEST
    ) -> tuple[Tensor, int]:
        """Cross-entropy summed over the trained tokens, and how many they are.

        Args:
            ids_T: token ids of all rows, end to end; best on the host.
            labels_T: the id to learn at each position, -100 for none; unshifted, and -100 at each row's first token.
            lengths: tokens of each row.
            memory: what is kept for the backward pass.
        """
        hidden_TD = self.hidden_states(ids_T, lengths, memory=memory)
        # Found where the labels are: on the host, in training, so that nothing waits for the GPU.
        targets = (labels_T[1:] != -100).nonzero().flatten()
        wanted_T = send(labels_T[1:][targets], self.device)
        picked_TD = hidden_TD[send(targets, self.device)]
        loss = token_loss(picked_TD, self.head, wanted_T, memory.chunk_tokens)
        return loss, len(targets)

    @contextmanager
    def table_on_host(self) -> Iterator[None]:
        """Keep the input embedding in host memory meanwhile: 1 GB of Llama 8B, read row by row.

        A table that is also the output head stays where it is.
        """
        table = self.decoder.embed_tokens
        if self.device.type != "cuda" or table.weight is self.causal_lm.lm_head.weight:
            yield
            return
        table.weight.data = table.weight.data.to("cpu")
        try:
            yield
        finally:
            torch.cuda.empty_cache()  # after a step that failed for want of memory, there may be no room for it yet
            table.weight.data = table.weight.data.to(self.device)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Next-token logits (T, V) in the model's dtype."""
        return self.causal_lm.lm_head(hidden_TD)


PADDED_ATTENTION = (
    "padded inside attention only, blocks of queries (varlen_attn wants CUDA, 16 bit and compute capability 8.0)"
)
# What a base layer's class says about how its weights are held.
BASES = {
    "Linear": "dense",
    "Linear4bit": "NF4, unpacked for its products",
    "Fp8Linear": "FP8 products, a scale for each token and output",
}


def operations(device: torch.device) -> ModuleType:
    """Return the module that holds the elementwise operations for a device: Triton's kernels, or plain torch."""
    if has_triton(device):
        from medcot.engine import launch

        return launch
    return pointwise


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
        release(model)  # from an earlier call, when the model was another
        explanation = Explanation(fast=False, reason=reason)
    else:
        if engine_of(model) is None:
            setattr(model, _ENGINE, Engine(causal_lm))
        install(vars(model)[_ENGINE])
        explanation = Explanation(fast=True, parts=_parts(causal_lm))
    setattr(model, _EXPLANATION, explanation)
    return explanation


def explain(model: nn.Module) -> Explanation:
    """Say which path each part of a model took; a model never accelerated says so."""
    explanation = vars(model).get(_EXPLANATION)
    if explanation is None or (explanation.fast and engine_of(model) is None):  # a copy has the words alone
        return Explanation(fast=False, reason="accelerate() was not called on it")
    return explanation


def engine_of(model: nn.Module) -> Engine | None:
    """Return the fast forward of a model, or ``None`` where it runs the plain one."""
    return vars(model).get(_ENGINE)


def check_fp8(model_type: str, device: torch.device) -> None:
    """Say whether a model can be held in FP8, before its weights are read.

    Raises:
        ModelError: a family that the engine does not know, or a device without FP8 products.
    """
    if model_type not in FAMILIES or not has_fp8(device):
        raise ModelError(
            f"precision fp8 for a {model_type} model on {device}",
            f"8-bit products are the engine's own: {', '.join(FAMILIES)}, on a GPU of Hopper's generation or later",
            "Set model.precision=auto or nf4",
        )


def hold_in_fp8(model: nn.Module) -> None:
    """Replace the seven projections of every layer by 8-bit ones, in place; a group at a time, so that little is added.

    Args:
        model: a model of a known family without adapters, on a device that multiplies in FP8; its weights in 16 or 32
            bit, or in NF4, whose rounding they then keep.

    Raises:
        ModelError: a family that the engine does not know, or a device without FP8 products.
    """
    causal_lm = _causal_lm(model)
    check_fp8(causal_lm.config.model_type, causal_lm.device)
    linears = [
        layer.get_submodule(f"{o}.{n}") for layer in causal_lm.model.layers for o, names in GROUPS for n in names
    ]
    odd = {size for linear in linears for size in (linear.in_features, linear.out_features) if size % FP8_STEP}
    if odd:
        raise ModelError(
            f"precision fp8 for projections of {', '.join(map(str, sorted(odd)))} inputs or outputs",
            f"8-bit products take sizes that are multiples of {FP8_STEP}",
            "Set model.precision=auto or nf4",
        )
    for layer in causal_lm.model.layers:
        for owner, names in GROUPS:
            parent = layer.get_submodule(owner)
            bases = [getattr(parent, name) for name in names]
            weight = Fp8Weight([dense_weight(base, causal_lm.dtype) for base in bases], causal_lm.dtype)
            for index, (name, base) in enumerate(zip(names, bases, strict=True)):
                setattr(parent, name, Fp8Linear(weight, index, base.bias))


def release(model: nn.Module) -> None:
    """Forget a model's fast forward, before the model is changed in ways the engine would not see (a new adapter)."""
    engine = engine_of(model)
    if engine is not None:
        remove(engine)
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
    dtype = causal_lm.model.norm.weight.dtype
    for index, layer in enumerate(causal_lm.model.layers):
        reason = layer_reason(layer, causal_lm.config.hidden_act, dtype)
        if reason is not None:
            return f"layer {index}: {reason}"
    return None


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _parts(causal_lm: Any) -> dict[str, str]:
    device = causal_lm.device
    dtype = causal_lm.model.norm.weight.dtype
    attention = "torch varlen_attn" if has_flash(device, dtype) else PADDED_ATTENTION
    heads = causal_lm.model.layers[0].self_attn
    if is_made_for(device, dtype, heads.head_dim, heads.num_key_value_groups):
        attention = "flash attention of medcot's own for Hopper (Triton kernels)"
    base = type(base_of(causal_lm.model.layers[0].mlp.down_proj)).__name__
    kernels = "Triton kernels"
    if not has_triton(device):
        why = "no CUDA device" if device.type != "cuda" else "Triton wants compute capability 8.0"
        kernels = f"plain torch, gradients written out ({why})"
    return {
        "projections": f"q/k/v and gate/up fused, base {BASES[base]}; LoRA added by whoever reads the output",
        "attention": attention,
        "norm, rotary, SwiGLU": kernels,
        "loss": f"trained tokens only, in chunks, no logits kept; {kernels}",
    }
