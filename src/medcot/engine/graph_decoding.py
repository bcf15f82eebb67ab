"""Decoding on CUDA: one step is one recorded graph, and the host only watches.

Launched one by one, the operations of a step take longer to issue than to run: the portable decoder writes 28 tokens a
second on a GPU that could write several hundred. Here a step (embedding, layers, head, choice of the next token) is
recorded once as a CUDA graph and replayed for every token. All that changes from step to step is in tensors on the
device: each row's next token, its length, how many tokens it has been given. So a step needs nothing from the host, and
the host reads the tokens while the next steps run: it is a few steps late in seeing that a row has ended, the row's
surplus is thrown away, and nothing else about it is different. Draws depend on the seed, the row's number and its step
alone, not on when rows are dropped.

A row writes its keys and values right behind its own, and attention reads each row's cache as far as it is filled. When
half of the rows have ended the others move together and the step is recorded anew for their number.

Products choose their own way (``products.py``); the kernels between them are in ``decode_kernels.py``.

Axes: as in ``decoding.py``; P parts of a product's output, to be added by its reader.
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
from medcot.engine.decoding import BoundLayer, read_prompts
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
CACHE_STEP = 64

AnyProduct = Product | ThinProduct


class Steps:
    """What happens on the device: reading the prompts, then steps that ask the host nothing.

    Args:
        engine: the model's fast forward, in 16 bit.
        prompts: token ids of each row, none empty.
        max_new_tokens: how many tokens a row may grow by.
        temperature: of the draws; 0 is greedy.
        top_p: of the draws.
        seed: of the draws.

    Attributes:
        state: each row's next token, lengths and steps; a step changes it in place.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> None:
        self.engine, self.prompts = engine, prompts
        self.device: torch.device = engine.causal_lm.device
        self.temperature, self.top_p = temperature, top_p
        self.layers = [BoundLayer(engine, index) for index in range(len(engine.layers))]
        lengths = [len(prompt) for prompt in prompts]
        slots = round_up(max(lengths) + max_new_tokens, CACHE_STEP)
        self.caches = [self._allocate(layer, len(prompts), slots) for layer in self.layers]
        self.thin_rows = THIN_ROWS if self._keep_weights(len(prompts)) else THIN_ROWS_WITHOUT_MEMORY
        self._thin: list[list[AnyProduct]] | None = None
        self.angles = self._table(slots)
        # ``sample`` moves a row on by one, and the prompt's last token is in the cache before the first draw.
        starts = torch.tensor(lengths, dtype=torch.int32, device=self.device) - 1
        numbers = torch.arange(len(prompts), dtype=torch.int32, device=self.device)
        ids = torch.zeros(len(prompts), dtype=torch.long, device=self.device)
        self.state = step_ops.Rows(ids, starts, torch.zeros_like(starts), numbers)
        # A row's draws follow from the seed and its number, whatever batch it is in.
        # Neighbouring seeds share no row's draws.
        rows = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in range(len(prompts))]
        chances_BT = torch.stack([torch.rand(max_new_tokens, generator=generator) for generator in rows])
        self.chances_TB = send(chances_BT.T.contiguous(), self.device)
        self._embedding = engine.causal_lm.model.embed_tokens.weight.to(self.device)

    def read(self) -> None:
        """Read all prompts and choose the first tokens."""
        self._choose(read_prompts(self.engine, self.layers, self.prompts, self._store))

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
        self._choose(x.x_BD)

    def products(self) -> Sequence[Sequence[AnyProduct]]:
        """Each layer's products, for the number of rows there are now."""
        if len(self.state.ids_B) > self.thin_rows:
            return [layer.products for layer in self.layers]
        if self._thin is None:
            self._thin = [_thin_products(layer, self.engine.dtype) for layer in self.layers]
        return self._thin

    def select(self, places: Tensor) -> None:
        """Go on with these of the current rows only."""
        self.state = self.state.select(places)
        for index, cache in enumerate(self.caches):  # one at a time: the old cache is not held beside the new
            self.caches[index] = step_ops.Cache(cache.keys[places], cache.values[places])

    def _allocate(self, layer: BoundLayer, num_rows: int, slots: int) -> step_ops.Cache:
        shape = (num_rows, layer.num_kv, slots, layer.channels)
        return step_ops.Cache(*(torch.empty(shape, dtype=self.engine.dtype, device=self.device) for _ in range(2)))

    def _keep_weights(self, num_rows: int) -> bool:
        """Make weights dense for many rows; whether all of them are."""
        products = [product for layer in self.layers for product in layer.products]
        thin = all(can_be_thin(projection) for layer in self.engine.layers for projection in layer.projections)
        if (num_rows > THIN_ROWS or not thin) and any(product.dense_bytes for product in products):
            # Reading the prompts holds about three tensors as wide as the widest output.
            widest = max(sum(product.weight.out_features) for product in products)
            tokens = sum(len(prompt) for prompt in self.prompts)
            keep_what_fits(products, self.device, 3 * tokens * widest * self.engine.dtype.itemsize)
        return not any(product.dense_bytes for product in products)

    def _table(self, slots: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every position, (S, C)."""
        positions = torch.arange(slots, device=self.device)
        _, cos_SC, sin_SC = self.engine.embed(torch.zeros_like(positions), positions)
        return cos_SC.contiguous(), sin_SC.contiguous()

    def _store(self, index: int, rows_T: Tensor, positions_T: Tensor, keys_TGC: Tensor, values_TGC: Tensor) -> None:
        self.caches[index].keys[rows_T, :, positions_T] = keys_TGC
        self.caches[index].values[rows_T, :, positions_T] = values_TGC

    def _choose(self, hidden_BD: Tensor) -> None:
        logits_BV = self.engine.logits(hidden_BD).contiguous()
        step_ops.sample(logits_BV, self.state, self.chances_TB, self.temperature, self.top_p)


class Written(NamedTuple):
    """One step's tokens: of which rows of the batch, and their ids."""

    rows: list[int]
    tokens: list[int]


class _Flight(NamedTuple):
    rows: list[int]
    ids: Tensor  # pinned
    arrived: torch.cuda.Event


class GraphDecoder:
    """Steps as a recorded graph: ``launch`` them, ``read`` their tokens in order, ``close`` at the end.

    Args:
        steps: of the batch, nothing read yet. No more than its ``max_new_tokens`` may be launched.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps, self.device = steps, steps.device
        self.rows = list(range(len(steps.prompts)))
        self.launched = 0
        self._flights: deque[_Flight] = deque()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(self.device)

    @property
    def in_flight(self) -> int:
        """Steps launched and not yet read."""
        return len(self._flights)

    def launch(self) -> None:
        """Start a step, the first of which reads the prompts; returns at once."""
        with torch.cuda.device(self.device):
            if self.launched == 0:
                self.steps.read()
            else:
                if self._graph is None:
                    self._graph = self._record()
                self._graph.replay()
            ids = torch.empty(len(self.rows), dtype=torch.long, pin_memory=True)
            ids.copy_(self.steps.state.ids_B, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._flights.append(_Flight(self.rows, ids, arrived))
        self.launched += 1

    def read(self) -> Written:
        """Wait for the oldest step launched."""
        flight = self._flights.popleft()
        flight.arrived.synchronize()
        return Written(flight.rows, flight.ids.tolist())

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch only; steps in flight are still read with all of theirs."""
        places = torch.tensor([self.rows.index(row) for row in rows], device=self.device)
        self.rows = list(rows)
        self._release()
        self.steps.select(places)

    def close(self) -> None:
        """Give back the graph's memory."""
        self._release()
        self._flights.clear()

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
