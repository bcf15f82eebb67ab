"""The one node that autograd sees: what it may be asked, what it leaves alone, and the layers' inputs on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from medcot.engine import engine_of
from medcot.engine.memory import FASTEST, Keep, Memory
from medcot.engine.stack import HostStore
from medcot.train.optimizer import as_one
from tiny_models import build_model, flatten, gradients, make_rows, pair, relative
from twins import randn

MEMORIES = [FASTEST, Memory(Keep.LEAN), Memory(Keep.INPUT, tile_tokens=8), Memory(Keep.HOST)]
each_memory = pytest.mark.parametrize("memory", MEMORIES, ids=[memory.keep for memory in MEMORIES])


def build_engine(family: str = "llama") -> tuple[Any, Any]:
    model, _ = pair(build_model(family))
    return model, engine_of(model)


@each_memory
def test_a_second_backward_raises(memory: Memory) -> None:
    _, engine = build_engine()
    loss, _ = engine.summed_loss(*flatten(make_rows([9, 7])), memory=memory)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        loss.backward()


def test_a_gradient_of_the_gradient_raises() -> None:
    model, engine = build_engine()
    adapters = [p for p in model.parameters() if p.requires_grad]
    loss, _ = engine.summed_loss(*flatten(make_rows([9, 7])))
    first = torch.autograd.grad(loss, adapters, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first[0].sum(), adapters)


@each_memory
@pytest.mark.parametrize("num_tokens", [16, 17])  # 16 needs no filler, so nothing is cut off at the end
def test_the_incoming_gradient_is_left_alone(num_tokens: int, memory: Memory) -> None:
    model, engine = build_engine()
    ids = torch.arange(num_tokens) + 3
    hidden = engine.hidden_states(ids, [num_tokens], memory=memory)
    incoming = randn(*hidden.shape)
    before = incoming.clone()
    hidden.backward(incoming)
    gradients(model)
    assert torch.equal(incoming, before)


def test_a_forward_without_gradients_keeps_nothing_and_says_the_same() -> None:
    _, engine = build_engine()
    rows = flatten(make_rows([9, 7]))
    with torch.no_grad():
        loss, _ = engine.summed_loss(*rows)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(engine.summed_loss(*rows)[0].item(), rel=1e-6)


@pytest.mark.parametrize("memory", MEMORIES[:3], ids=[memory.keep for memory in MEMORIES[:3]])
def test_two_forwards_before_one_backward(memory: Memory) -> None:
    model, engine = build_engine()
    one, two = flatten(make_rows([9, 7])), flatten(make_rows([30], seed=5))
    for rows in (one, two):
        engine.summed_loss(*rows)[0].backward()
    wanted = gradients(model)
    (engine.summed_loss(*one, memory=memory)[0] + engine.summed_loss(*two, memory=memory)[0]).backward()
    got = gradients(model)
    assert max(relative(got[name], wanted[name]) for name in wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_optimizer_finds_all_gradients_in_one_block(family: str) -> None:
    model, engine = build_engine(family)
    engine.summed_loss(*flatten(make_rows([9, 7])))[0].backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert as_one(found).data_ptr() == found[0].data_ptr()


def test_the_embeddings_get_a_gradient_where_they_want_one() -> None:
    """The first layer computes none for an input that is not trained; here one asks for it."""
    model, engine = build_engine()
    hidden, cos, sin = engine.embed(torch.arange(16) + 3, torch.arange(16))
    leaf = hidden.clone().requires_grad_()
    engine.embed = lambda ids, positions: (leaf, cos, sin)
    weights = randn(16, 64)
    (engine.hidden_states(torch.arange(16) + 3, [16]) * weights).sum().backward()
    assert leaf.grad is not None
    got, step = leaf.grad.clone(), 1e-3 * randn(16, 64, seed=4)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            engine.embed = lambda ids, positions, sign=sign: (hidden + sign * step, cos, sin)
            ends.append((engine.hidden_states(torch.arange(16) + 3, [16]).double() * weights).sum())
    assert float((ends[0] - ends[1]) / 2) == pytest.approx(float((got.double() * step).sum()), rel=1e-3)
    gradients(model)


def test_what_is_put_on_the_host_comes_back() -> None:
    store = HostStore(torch.device("cpu"))
    for num_tokens in (5, 9, 3):  # buffers grow, and are used in part
        given = [randn(num_tokens, 6, seed=index) for index in range(4)]
        forward = store.begin()
        for index, tensor in enumerate(given):
            handed = tensor.clone()
            store.put(index, handed)
            handed.fill_(float("nan"))  # it may be forgotten at once
        for index in reversed(range(4)):
            assert torch.equal(store.take(index, forward), given[index])


def test_a_backward_after_the_next_forward_is_refused() -> None:
    """The host's buffers then hold the other forward's rows: wrong gradients, silently, if nobody looked."""
    model, _ = pair(build_model("llama"))
    engine = engine_of(model)
    assert engine is not None
    losses = [engine.summed_loss(*flatten(make_rows([9])), memory=Memory(Keep.HOST))[0] for _ in range(2)]
    with pytest.raises(RuntimeError, match="before the next forward"):
        losses[0].backward()
    losses[1].backward()
    gradients(model)
