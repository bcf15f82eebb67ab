"""Decoding on CUDA: one step is one recorded graph, and the host only watches.

Launched one by one, the operations of a step take longer to issue than to run: the portable decoder writes 28 tokens a
second on a GPU that could write several hundred. Here a step (embedding, layers, head, choice of the next token) is
recorded once as a CUDA graph and replayed for every token. All that changes from step to step is in tensors on the
device: each row's next token, its length, how many tokens it has been given. So a step needs nothing from the host, and
the host reads the tokens while the next steps run: it is a few steps late in seeing that a row has ended, and the row's
surplus is thrown away. Each flight of tokens carries what was in the slots when it was launched, so a surplus is known
even when its slot has been given to another prompt since.

A row writes its keys and values right behind its own, and attention reads each row's cache as far as it is filled. A
slot is given to another prompt between two replays: its keys and values, its state and its chances are written into the
very tensors that the graph knows, on the same stream, behind all steps launched for the row before; nothing is recorded
anew. A row that has ended and is still stepped stays at the last place of its own cache. When no prompt waits and half
of the rows have ended, the others move together and the step is recorded for their number.

Products choose their own way (``products.py``); the kernels between them are in ``decode_kernels.py``.

Axes: as in ``decoding.py``; P parts of a product's output, to be added by its reader; T steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medcot.engine import step_ops
from medcot.engine.attention import round_up
from medcot.engine.decoding import CACHE_STEP, BoundLayer, read_prompts, reading_bytes
from medcot.engine.devices import send
from medcot.engine.products import Product, ThinProduct, can_be_thin, keep_what_fits

if TYPE_CHECKING:
    from medcot.engine import Engine

# Steps that run before the host looks at a token: one would do if the host were never late.
LAG = 2
# The rows are moved together when this share of them has ended: recording a step costs about ten of them.
DROP_SHARE = 0.5
# Rows at which a pass over packed weights for each of them beats one over dense ones (2 bytes against 0.56 each), and
# rows up to which it beats making the weights dense at every step (4.56), where memory is too short to keep them.
THIN_ROWS, THIN_ROWS_WITHOUT_MEMORY = 2, 7

AnyProduct = Product | ThinProduct


class Steps:
    """What happens on the device: reading prompts into slots, and steps that ask the host nothing.

    Args:
        engine: the model's fast forward, in 16 bit.
        num_slots: rows; each is read into before the first step.
        row_tokens: the longest prompt and what it may grow by, together.
        num_chances: draws that a row may need.
        temperature: of the draws; 0 is greedy.
        top_p: of the draws.
        read_tokens: the most that are read together.

    Attributes:
        state: each row's next token, lengths and steps; a step changes it in place.
    """

    def __init__(
        self,
        engine: Engine,
        num_slots: int,
        row_tokens: int,
        num_chances: int,
        *,
        temperature: float,
        top_p: float,
        read_tokens: int,
    ) -> None:
        self.engine = engine
        self.device: torch.device = engine.causal_lm.device
        self.temperature, self.top_p = temperature, top_p
        self.layers = [BoundLayer(engine, index) for index in range(len(engine.layers))]
        slots = round_up(row_tokens, CACHE_STEP)
        self.caches = [self._allocate(layer, num_slots, slots) for layer in self.layers]
        self._last = slots - 1
        self.thin_rows = THIN_ROWS if self._keep_weights(num_slots, read_tokens) else THIN_ROWS_WITHOUT_MEMORY
        self._thin: list[list[AnyProduct]] | None = None
        self.angles = self._table(slots)
        ids = torch.zeros(num_slots, dtype=torch.long, device=self.device)
        self.state = step_ops.Rows(ids, ids.int(), ids.int())
        self.chances_BT = torch.zeros(num_slots, num_chances, device=self.device)
        self._embedding = engine.causal_lm.model.embed_tokens.weight.to(self.device)

    def read(self, places: Sequence[int], prompts: Sequence[Sequence[int]], chances_RT: Tensor) -> Tensor:
        """Read prompts into these slots, whoever had them, and choose their first tokens, which are returned, (R)."""
        places_R = send(torch.tensor(places), self.device)

        def store(index: int, rows_T: Tensor, positions_T: Tensor, keys_TGC: Tensor, values_TGC: Tensor) -> None:
            cache, places_T = self.caches[index], places_R[rows_T]
            cache.keys[places_T, :, positions_T] = keys_TGC
            cache.values[places_T, :, positions_T] = values_TGC

        hidden_RD = read_prompts(self.engine, self.layers, prompts, store)
        # ``sample`` moves a row on by one, and the prompt's last token is in the cache before the first draw.
        starts = send(torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int32), self.device)
        chances_RT = send(chances_RT, self.device)
        rows = step_ops.Rows(torch.zeros_like(places_R), starts, torch.zeros_like(starts))
        self._choose(hidden_RD, rows, chances_RT)
        self.state.put(places_R, rows)
        self.chances_BT.index_copy_(0, places_R, chances_RT)
        return rows.ids_B

    def step(self, products: Sequence[Sequence[AnyProduct]]) -> None:
        """Read each row's token and choose its next."""
        hidden_BD = F.embedding(self.state.ids_B, self._embedding).to(self.engine.dtype)
        delta_PBD: Tensor | None = None
        for layer, cache, (qkv, out, gate_up, down) in zip(self.layers, self.caches, products, strict=True):
            hidden_BD, x = _normed(hidden_BD, delta_PBD, layer.input_norm, qkv)
            fused_PBN = qkv.multiply(*x)
            x = step_ops.attend(fused_PBN, self.state, self.angles, cache, layer.window, _head_norms(layer), out)
            hidden_BD, x = _normed(hidden_BD, out.multiply(*x), layer.mlp_norm, gate_up)
            delta_PBD = down.multiply(*step_ops.swiglu(gate_up.multiply(*x), hidden_BD, down))
        _, x = _normed(hidden_BD, delta_PBD, self.engine.causal_lm.model.norm, None)
        self._choose(x.x_BD, self.state, self.chances_BT)

    def products(self) -> Sequence[Sequence[AnyProduct]]:
        """Each layer's products, for the number of rows there are now."""
        if len(self.state.ids_B) > self.thin_rows:
            return [layer.products for layer in self.layers]
        if self._thin is None:
            self._thin = [_thin_products(layer, self.engine.dtype) for layer in self.layers]
        return self._thin

    def select(self, places: Tensor) -> None:
        """Go on with these of the current rows only."""
        self.state, self.chances_BT = self.state.select(places), self.chances_BT[places]
        for index, cache in enumerate(self.caches):  # one at a time: the old cache is not held beside the new
            self.caches[index] = step_ops.Cache(cache.keys[places], cache.values[places])

    def _allocate(self, layer: BoundLayer, num_rows: int, slots: int) -> step_ops.Cache:
        shape = (num_rows, layer.num_kv, slots, layer.channels)
        return step_ops.Cache(*(torch.empty(shape, dtype=self.engine.dtype, device=self.device) for _ in range(2)))

    def _keep_weights(self, num_rows: int, read_tokens: int) -> bool:
        """Make weights dense for many rows; whether all of them are."""
        products = [product for layer in self.layers for product in layer.products]
        thin = all(can_be_thin(projection) for layer in self.engine.layers for projection in layer.projections)
        if (num_rows > THIN_ROWS or not thin) and any(product.dense_bytes for product in products):
            keep_what_fits(products, self.device, reading_bytes(self.engine, read_tokens))
        return not any(product.dense_bytes for product in products)

    def _table(self, slots: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, (S, C)."""
        positions = torch.arange(slots, device=self.device)
        _, cos_SC, sin_SC = self.engine.embed(torch.zeros_like(positions), positions)
        return cos_SC.contiguous(), sin_SC.contiguous()

    def _choose(self, hidden_BD: Tensor, rows: step_ops.Rows, chances_BT: Tensor) -> None:
        logits_BV = self.engine.logits(hidden_BD).contiguous()
        step_ops.sample(logits_BV, rows, chances_BT, self._last, self.temperature, self.top_p)


class Written(NamedTuple):
    """One step's tokens: of which rows, as they were when it was launched, and their ids."""

    rows: list[int]
    tokens: list[int]


class _Flight(NamedTuple):
    rows: list[int]
    ids: Tensor  # pinned
    arrived: torch.cuda.Event


class GraphDecoder:
    """Steps as a recorded graph: ``read`` prompts, ``launch`` steps, ``collect`` the tokens of either in order.

    Rows are any numbers that tell the caller what a token belongs to.

    Args:
        steps: of all slots, nothing read yet.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps, self.device = steps, steps.device
        self._flights: deque[_Flight] = deque()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(self.device)

    @property
    def in_flight(self) -> int:
        """Steps and readings launched and not yet collected."""
        return len(self._flights)

    @property
    def recorded(self) -> bool:
        """Whether there is a graph, so that the next step costs no recording."""
        return self._graph is not None

    def read(
        self, places: Sequence[int], rows: Sequence[int], prompts: Sequence[Sequence[int]], chances_RT: Tensor
    ) -> None:
        """Read prompts into slots, behind all steps launched; returns at once."""
        with torch.cuda.device(self.device):
            self._fly(rows, self.steps.read(places, prompts, chances_RT))

    def launch(self, rows: Sequence[int]) -> None:
        """Start a step, ``rows`` being in the slots; returns at once."""
        with torch.cuda.device(self.device):
            self.replay()
            self._fly(rows, self.steps.state.ids_B)

    def replay(self) -> None:
        """Start a step whose tokens nobody collects; returns at once."""
        with torch.cuda.device(self.device):
            if self._graph is None:
                self._graph = self._record()
            self._graph.replay()

    def collect(self) -> Written:
        """Wait for the oldest of what was launched."""
        flight = self._flights.popleft()
        flight.arrived.synchronize()
        return Written(flight.rows, flight.ids.tolist())

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these slots only; steps in flight are still collected with all of theirs."""
        self._release()
        self.steps.select(torch.tensor(places, device=self.device))

    def close(self) -> None:
        """Give back the graph's memory."""
        self._release()
        self._flights.clear()

    def _fly(self, rows: Sequence[int], ids_B: Tensor) -> None:
        ids = torch.empty(len(rows), dtype=torch.long, pin_memory=True)
        ids.copy_(ids_B, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._flights.append(_Flight(list(rows), ids, arrived))

    def _record(self) -> torch.cuda.CUDAGraph:
        """Record a step, after one for practice that compiles kernels and is undone."""
        products = self.steps.products()
        saved = [tensor.clone() for tensor in self.steps.state.tensors()]
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            self.steps.step(products)
            for tensor, value in zip(self.steps.state.tensors(), saved, strict=True):
                tensor.copy_(value)
            # Not torch.cuda.graph: it empties the allocator's cache, which training would have to fill again.
            graph.capture_begin(capture_error_mode="thread_local")
            self.steps.step(products)
            graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return graph

    def _release(self) -> None:
        """Forget the graph, once its last replay is over: it holds the step's intermediate tensors."""
        if self._graph is not None:
            torch.cuda.current_stream(self.device).synchronize()
            self._graph.reset()
            self._graph = None


class _LogitsSteps(Steps):
    """Steps that leave the logits where the host finds them, and choose nothing."""

    def __init__(self, engine: Engine, num_slots: int, row_tokens: int) -> None:
        super().__init__(engine, num_slots, row_tokens, 1, temperature=0.0, top_p=1.0, read_tokens=row_tokens)
        for cache in self.caches:  # slots that nobody has read into are stepped like the others
            cache.keys.zero_()
            cache.values.zero_()
        vocabulary = engine.causal_lm.lm_head.out_features
        self.step_logits_BV = torch.zeros(num_slots, vocabulary, dtype=engine.dtype, device=self.device)
        self.read_logits_RV = self.step_logits_BV[:0]

    def _choose(self, hidden_BD: Tensor, rows: step_ops.Rows, chances_BT: Tensor) -> None:
        logits = self.engine.logits(hidden_BD)
        if rows is self.state:
            self.step_logits_BV.copy_(logits)
        else:
            self.read_logits_RV = logits
        rows.lengths_B.add_(1).clamp_(max=self._last)


class Stepper:
    """``decoding.Decoder``'s two calls over recorded steps, for a caller who draws each row's token its own way.

    The host waits for each step's logits, so it is slower than ``GraphDecoder``, by the choice of the tokens. Every
    step is of all slots, whoever has them.

    Args:
        engine: the model's fast forward, in 16 bit.
        num_slots: rows.
        row_tokens: the longest prompt and what it may grow by, together.
    """

    def __init__(self, engine: Engine, num_slots: int, row_tokens: int) -> None:
        self._steps = _LogitsSteps(engine, num_slots, row_tokens)
        self._decoder = GraphDecoder(self._steps)
        self.device = self._steps.device

    def read(self, places: Sequence[int], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts into these slots, whoever had them; return the logits of each one's first new token, (R, V)."""
        self._steps.read(places, prompts, torch.zeros(len(places), 1))
        return self._steps.read_logits_RV

    def step(self, ids_B: Tensor) -> Tensor:
        """Append one token to each of the first B slots; return the logits of the next, (B, V), until the next call."""
        self._steps.state.ids_B[: len(ids_B)].copy_(ids_B)
        self._decoder.replay()
        return self._steps.step_logits_BV[: len(ids_B)]

    def rest(self, places: Sequence[int]) -> None:
        """Count these slots as empty: attention then reads nothing of theirs."""
        self._steps.state.lengths_B[send(torch.tensor(places, dtype=torch.long), self.device)] = 0


def _thin_products(layer: BoundLayer, dtype: torch.dtype) -> list[AnyProduct]:
    return [
        ThinProduct(projection, dtype) if can_be_thin(projection) else product
        for projection, product in zip(layer.projections, layer.products, strict=True)
    ]


def _normed(
    hidden_BD: Tensor, delta_PBD: Tensor | None, module: torch.nn.Module, reader: AnyProduct | None
) -> tuple[Tensor, step_ops.Input]:
    weight_D, eps = module.weight, module.variance_epsilon
    assert isinstance(weight_D, Tensor) and isinstance(eps, float)
    return step_ops.add_norm(hidden_BD, delta_PBD, weight_D, eps, reader)


def _head_norms(layer: BoundLayer) -> tuple[Tensor, Tensor, float] | None:
    if layer.head_norms is None:
        return None
    q_norm, k_norm = layer.head_norms
    return q_norm.weight, k_norm.weight, q_norm.variance_epsilon
