"""Recorded steps whose tokens the host draws (``graph_decoding.Stepper``), as the server uses them. ``-m gpu``."""

from __future__ import annotations

import copy

import pytest
import torch

from medcot.engine import accelerate, engine_of
from tiny_models import attach, build_base, make_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [ids.tolist() for ids, _ in make_rows([5, 1, 230, 12])]
NEW_TOKENS = 40
# Short of the likeliest logit by this share of the logits' spread is bfloat16's rounding.
CLOSE = 0.1


@torch.no_grad()
def test_slots_read_into_at_any_step_write_the_likeliest_tokens() -> None:
    from medcot.engine.graph_decoding import Stepper

    model = attach(build_base("llama", torch.bfloat16)).cuda()
    exact = copy.deepcopy(model).float()
    assert accelerate(model).fast
    engine = engine_of(model)
    assert engine is not None
    stepper = Stepper(engine, len(PROMPTS) + 2, 320)
    written: dict[int, list[int]] = {}
    place_of: dict[int, int] = {}
    for step in range(NEW_TOKENS + 3 * len(PROMPTS)):
        if step % 3 == 0 and step // 3 < len(PROMPTS):  # one more comes at every third step
            row, place = step // 3, len(PROMPTS) - step // 3
            place_of[row] = place
            written[row] = stepper.read([place], [PROMPTS[row]]).float().argmax(-1).tolist()
        width = max(place_of.values()) + 1
        taken = set(place_of.values())
        stepper.rest([place for place in range(width) if place not in taken])
        ids = [0] * width
        for row, place in place_of.items():
            ids[place] = written[row][-1]
        chosen = stepper.step(torch.tensor(ids, device=stepper.device)).float().argmax(-1).tolist()
        for row, place in place_of.items():
            written[row].append(chosen[place])
    for prompt, tokens in zip(PROMPTS, (written[row] for row in range(len(PROMPTS))), strict=True):
        assert len(tokens) >= NEW_TOKENS
        logits = exact(input_ids=torch.tensor([[*prompt, *tokens]], device="cuda")).logits[0, len(prompt) - 1 : -1]
        short = logits.max(-1).values - logits.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        assert (short <= CLOSE * logits.std(-1)).all()
