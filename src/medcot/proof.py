"""Proof that the answers before training came from the base alone, and those after it from the adapter.

One question's next-token logits are the probe. Before, the model has no adapter at all; after, switching the adapter
off must give the first probe's logits back, and switching it on must not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from medcot import prompt
from medcot.errors import ModelError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def probe(model: Any, tokenizer: PreTrainedTokenizerBase, style: str) -> torch.Tensor:
    """Next-token logits of the tutorial's question, by the plain forward; (V) float32 on the CPU."""
    import torch

    ids = torch.tensor([prompt.encode_prompt(prompt.TUTORIAL_QUESTION, prompt.Style(style), tokenizer)])
    ids = ids.to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
    model.train(was_training)
    return logits


def prove_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, style: str, before: torch.Tensor, *, base_is_kept: bool
) -> dict[str, Any]:
    """Switch the adapter on and off, and compare the probes: off must be the model that was asked before.

    Args:
        model: the trained model, adapter on.
        tokenizer: its tokenizer.
        style: prompt style of the probe.
        before: the probe of the model before it had an adapter.
        base_is_kept: false for PiSSA and LoftQ, which change the base itself; then only on and off are compared.

    Returns:
        The ``proof`` part of run.json.

    Raises:
        ModelError: the adapter does nothing, gives logits that are not finite, or the base has moved.
    """
    on = probe(model, tokenizer, style)
    with model.disable_adapter():
        off = probe(model, tokenizer, style)
    changed = float((on - off).abs().max())
    drift = float((off - before).abs().max())
    if not math.isfinite(changed):
        raise ModelError(
            "with the trained adapter the model's logits are not finite numbers",
            "A trained model must give finite logits",
            "Train again with a lower train.learning_rate, or a longer train.warmup",
        )
    if changed == 0:
        raise ModelError(
            "the trained adapter changes no logit",
            "After training, the model with its adapter must differ from the model without",
            "Raise train.learning_rate or train.max_steps, and run again",
        )
    # The fused weights are the same numbers in another place; a kernel may add them up in another order.
    tolerance = 1e-2 * float(before.abs().max())
    if base_is_kept and drift > tolerance:
        raise ModelError(
            f"without its adapter the model's logits moved by {drift:.3g} during training",
            f"The base is frozen; at most {tolerance:.3g} is rounding",
            "This is a fault of medcot; please report it with the recipe",
        )
    return {"adapter_before": "absent", "adapter_after": "on", "logits_changed_by": changed, "base_moved_by": drift}
