"""The fast layers behind the model's own forward, for training loops that are not medcot's.

medcot's trainer asks the engine for a loss; any other loop calls ``model(input_ids=..., labels=...)``. For those loops
the decoder instance of an accelerated model is given a ``forward`` of its own, an attribute that shadows its class's
method: modules' hooks, PEFT, TRL's fused head and DistributedDataParallel all stand around the decoder and go on as
they were. In training mode it takes the real tokens out of the rectangle it is given, runs the engine's layers over
them end to end and puts the results back; logits and loss remain the business of whoever called. Positions of padding
come back as zeros. The plain decoder's numbers there depend on how much padding there is; a loss reads them only if it
has labels on padding, or, in a batch padded on the left, on a row's first token, which nothing can predict.

What is not training takes the decoder's usual forward without a word: evaluation mode, a cache, a compiler's tracing.
So does a training call that the engine cannot answer exactly, but that is announced, once for each reason.

The model may have changed since it was accelerated: moved to the GPU by a trainer, wrapped in new adapters, hooked,
unfrozen. Every call looks for that, at each module that the engine reads or passes by, and builds the engine again, or
declines. Transformers' switch for gradient checkpointing means ``Keep.INPUT``.

The attribute holds the decoder and the engine weakly, so that a model is freed when its last user forgets it, and not
at the garbage collector's next visit. A copy of the model, or a pickled one, carries an attribute without an engine.

Axes: B rows, L slots of a row, T real tokens, D hidden.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from medcot.engine.devices import send
from medcot.engine.layers import GROUPS, FastLayer
from medcot.engine.lora import base_of
from medcot.engine.memory import FASTEST, Keep, Memory

CHECKPOINTED = Memory(Keep.INPUT)
# Arguments that decide nothing here: what the loss is divided by, and what flash attention reads beside the positions.
IDLE = {"num_items_in_batch", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
READ = {"input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache", "return_dict"}


class Accelerated(Protocol):
    """What is needed of an ``Engine``."""

    causal_lm: Any
    dtype: torch.dtype
    device: torch.device
    layers: list[FastLayer]

    def hidden_states(
        self, tokens: Tensor, lengths: list[int], *, memory: Memory, positions_T: Tensor | None
    ) -> Tensor:
        """See ``Engine``."""

    def renew(self) -> str | None:
        """See ``Engine``."""


class Declined(Exception):
    """A training call that the plain forward has to answer, and why; it does not leave this file."""


def install(engine: Accelerated) -> None:
    """Give the engine's decoder its fast forward; one that is there for another engine is replaced."""
    decoder = engine.causal_lm.model
    own = vars(decoder).get("forward")
    if isinstance(own, FastForward):
        if own.serves(engine):
            return
        own = own.previous
    decoder.forward = FastForward(decoder, engine, own)


def remove(engine: Accelerated) -> None:
    """Give the decoder back the forward that it had."""
    decoder = engine.causal_lm.model
    own = vars(decoder).get("forward")
    if not isinstance(own, FastForward) or not own.serves(engine):
        return
    del decoder.forward
    if own.previous is not None:
        decoder.forward = own.previous


class FastForward:
    """A decoder's forward.

    Args:
        decoder: the instance that it is set on.
        engine: the engine over that decoder's layers; ``None`` on a copy of an accelerated model.
        previous: what the instance had instead of its class's method, if anything.
    """

    def __init__(self, decoder: Any, engine: Accelerated | None, previous: Callable[..., Any] | None = None) -> None:
        self._decoder = weakref.ref(decoder)
        self._engine = None if engine is None else weakref.ref(engine)
        self.previous = previous
        self._watch = None if engine is None else Watch(engine)
        self._said: set[str] = set()
        self.__signature__ = inspect.signature(type(decoder).forward.__get__(decoder))

    def __reduce__(self) -> tuple[Any, ...]:
        return FastForward, (self._decoder(), None, self.previous)

    def serves(self, engine: Accelerated) -> bool:
        """Whether this is that engine's."""
        return self._engine is not None and self._engine() is engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder: the arguments and the result are those of its class's ``forward``."""
        decoder = self._decoder()
        assert decoder is not None, "a forward is called through its module, which is alive"
        # args first: the plain forward gets them as they came.
        given = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        if self._engine is not None and decoder.training and not _cached(decoder, given):
            try:
                return self._run(decoder, given)
            except Declined as declined:
                self._announce(str(declined))
        plain = self.previous or type(decoder).forward.__get__(decoder)
        return plain(*args, **kwargs)

    def _run(self, decoder: Any, given: Mapping[str, Any]) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        engine = self._fresh_engine()
        _check_options(decoder, given)
        _check_dtype(engine)
        embedded_BLD = given.get("inputs_embeds")
        shape = given["input_ids"].shape if embedded_BLD is None else embedded_BLD.shape[:2]
        rows = find_rows(shape, given, cached=_wants_cache(decoder, given))
        if embedded_BLD is None:
            # In its rectangle, as hooks on the embedding (noise, gradients switched on) expect it.
            table = decoder.embed_tokens
            embedded_BLD = table(send(given["input_ids"], table.weight.device))
        flat_XD = embedded_BLD.flatten(0, 1)
        slots_T = None if rows.slots_T is None else send(rows.slots_T, flat_XD.device)
        embedded_TD = flat_XD if slots_T is None else flat_XD.index_select(0, slots_T)
        memory = CHECKPOINTED if _checkpointed(decoder) else FASTEST
        with torch.autocast(engine.device.type, enabled=False):
            final_TD = engine.hidden_states(embedded_TD, rows.lengths, memory=memory, positions_T=rows.positions_T)
        if slots_T is not None:
            final_TD = final_TD.new_zeros(flat_XD.shape).index_copy(0, send(slots_T, final_TD.device), final_TD)
        return BaseModelOutputWithPast(last_hidden_state=final_TD.view(embedded_BLD.shape))

    def _fresh_engine(self) -> Accelerated:
        """The engine, built again where the model has changed under it."""
        assert self._engine is not None and self._watch is not None
        engine = self._engine()
        if engine is None:
            raise Declined("the model that accelerate() was called on is gone")
        if self._watch.changed(engine):
            reason = engine.renew()
            if reason is not None:
                raise Declined(reason)
            self._watch = Watch(engine)
        hooked = self._watch.hooked()
        if hooked is not None:
            raise Declined(f"{hooked} has a hook or a forward of its own, which the fast layers would pass by")
        return engine

    def _announce(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"an accelerated model runs its plain forward, which is slower: {reason}", stacklevel=2)


def _cached(decoder: Any, given: Mapping[str, Any]) -> bool:
    """Whether a call is an answer being written, or is traced by a compiler: no training step either way."""
    if torch.compiler.is_compiling() or given.get("past_key_values") is not None:
        return True
    return given.get("use_cache") is True and not _checkpointed(decoder)  # which switches the cache off


def _wants_cache(decoder: Any, given: Mapping[str, Any]) -> bool:
    """Whether the plain forward would make a cache: by the configuration, for all who do not say otherwise."""
    use_cache = given.get("use_cache")
    return bool(decoder.config.use_cache if use_cache is None else use_cache) and not _checkpointed(decoder)


def _checkpointed(decoder: Any) -> bool:
    return any(layer.gradient_checkpointing for layer in decoder.layers)


def _check_options(decoder: Any, given: Mapping[str, Any]) -> None:
    if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
        raise Declined("either input_ids or inputs_embeds is to be given")
    asked = {name for name, value in given.items() if value is not None and value is not False} - IDLE - READ
    config = decoder.config
    asked |= {"output_attentions"} if config.output_attentions else set()
    asked |= {"output_hidden_states"} if config.output_hidden_states else set()
    if given.get("return_dict") is False:
        asked.add("return_dict=False")
    if asked:
        raise Declined(f"the fast layers do not know the option {', '.join(sorted(asked))}")


def _check_dtype(engine: Accelerated) -> None:
    kind = engine.device.type
    if engine.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Declined(f"the engine computes in 16 or 32 bit, and its weights are {_name(engine.dtype)}")
    if engine.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        raise Declined(
            f"its weights are float32, in which the engine computes, but autocast asks for "
            f"{_name(torch.get_autocast_dtype(kind))}; load the weights in that"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Rows(NamedTuple):
    """The real tokens of a batch.

    Attributes:
        slots_T: each token's place in the flattened rectangle; ``None`` where every place holds one.
        lengths: tokens of each row.
        positions_T: each token's position; ``None`` counts from 0 in each row.
    """

    slots_T: Tensor | None
    lengths: list[int]
    positions_T: Tensor | None


def find_rows(shape: tuple[int, ...], given: Mapping[str, Any], *, cached: bool) -> Rows:
    """Find the rows that the plain decoder would attend within.

    With a mask, they are its runs of ones, one in each row of the rectangle. Without, each row of the rectangle, cut
    wherever ``position_ids`` do not go up by one (transformers' ``find_packed_sequence_indices``).

    Args:
        shape: rows and slots of the rectangle.
        given: the decoder's arguments.
        cached: whether the plain decoder would make a cache, beside which it does not look for restarts.

    Raises:
        Declined: the batch is not made of such rows.
    """
    if len(shape) != 2 or 0 in shape:
        raise Declined(f"its input is of shape {tuple(shape)}, not (rows, tokens)")
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    positions_BL = None
    if positions is not None:
        if positions.ndim != 2:
            raise Declined("position_ids are not (rows, tokens)")
        positions_BL = positions.cpu().expand(shape)
    if mask is not None:
        return _rows_of_mask(mask, shape, positions_BL)
    lengths = [shape[1]] * shape[0]
    if positions_BL is not None:
        starts_BL = positions_BL.diff(prepend=positions_BL[:, :1] - 2) != 1  # each row's first slot is a start
        starts = starts_BL.flatten().nonzero().flatten()
        ends = torch.cat((starts[1:], torch.tensor([starts_BL.numel()])))
        lengths = (ends - starts).tolist()
        if cached and len(lengths) > shape[0]:
            raise Declined("position_ids start again within a row, which transformers overlooks unless use_cache=False")
    _check_flash_rows(given.get("cu_seq_lens_q"), lengths)
    return Rows(None, lengths, None if positions_BL is None else positions_BL.flatten())


def _rows_of_mask(mask: Any, shape: tuple[int, ...], positions_BL: Tensor | None) -> Rows:
    if not isinstance(mask, Tensor) or mask.shape != shape:
        raise Declined("its attention mask is not one of real and padding tokens, (rows, tokens)")
    real_BL = mask.cpu() != 0
    if positions_BL is None:
        positions_BL = torch.arange(shape[1]).expand(shape)
    if real_BL.all():
        return Rows(None, [shape[1]] * shape[0], positions_BL.flatten())
    lengths_B = real_BL.sum(1)
    starts_B = (real_BL[:, 1:] & ~real_BL[:, :-1]).sum(1) + real_BL[:, 0]
    if (starts_B > 1).any():
        raise Declined("its attention mask has holes")
    if not lengths_B.any():
        raise Declined("its attention mask hides every token")
    slots_T = real_BL.flatten().nonzero().flatten()
    return Rows(slots_T, [length for length in lengths_B.tolist() if length], positions_BL[real_BL])


def _check_flash_rows(starts: Tensor | None, lengths: list[int]) -> None:
    if starts is not None and starts.diff().tolist() != lengths:
        raise Declined("cu_seq_lens_q and position_ids disagree about where rows begin")


class Seen(NamedTuple):
    """A module in the place where the engine found it."""

    siblings: Mapping[str, nn.Module | None]
    name: str
    module: nn.Module
    path: str


class Watch:
    """What the engine was built from, to be compared with what is there now."""

    def __init__(self, engine: Accelerated) -> None:
        decoder = engine.causal_lm.model
        self._norm: Any = decoder.norm
        self._seen = [Seen(decoder._modules, "norm", decoder.norm, "norm")]
        for number, fast in enumerate(engine.layers):
            self._seen += _parts_of(decoder.layers._modules, str(number), fast)
        self._frozen = [p for part in (decoder.layers, decoder.norm) for p in part.parameters() if not p.requires_grad]
        self._adapters = _active(self._seen)

    def changed(self, engine: Accelerated) -> bool:
        """Whether the engine has to be built again, or given up."""
        weight = self._norm.weight
        return (
            weight.dtype != engine.dtype
            or weight.device != engine.device
            or any(place.siblings.get(place.name) is not place.module for place in self._seen)
            or any(parameter.requires_grad for parameter in self._frozen)
            or _active(self._seen) != self._adapters
        )

    def hooked(self) -> str | None:
        """The path of a module inside the layers that someone else looks into, or ``None``."""
        return next((place.path for place in self._seen if _is_hooked(place.module)), None)


def _parts_of(layers: Mapping[str, nn.Module | None], number: str, fast: FastLayer) -> Iterator[Seen]:
    """The modules of a layer that the engine reads from, and those that call them."""
    layer = fast.layer
    yield Seen(layers, number, layer, f"layers.{number}")
    for name, child in layer.named_children():
        yield Seen(layer._modules, name, child, f"layers.{number}.{name}")
    for owner, names in GROUPS:
        for name in names:
            parent = layer.get_submodule(owner)
            path = f"layers.{number}.{owner}.{name}"
            part = parent.get_submodule(name)
            yield Seen(parent._modules, name, part, path)
            if base_of(part) is not part:
                yield Seen(part._modules, "base_layer", base_of(part), f"{path}.base_layer")
    if fast.family.norms_heads:
        for name in ("q_norm", "k_norm"):
            yield Seen(layer.self_attn._modules, name, layer.self_attn.get_submodule(name), f"layers.{number}.{name}")


def _active(seen: list[Seen]) -> list[str] | None:
    """The adapters that are switched on, which PEFT does for all layers alike; ``None`` without LoRA."""
    from peft.tuners.lora import LoraLayer

    for place in seen:
        if isinstance(place.module, LoraLayer):
            return list(place.module.active_adapters)
    return None


def _is_hooked(module: nn.Module) -> bool:
    if "forward" in vars(module) or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    # Those of transformers, for output_hidden_states, stay once they were used, and rest.
    return any(hook.__module__ != "transformers.utils.output_capturing" for hook in module._forward_hooks.values())
