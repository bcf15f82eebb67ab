"""Tiny random models of every family the engine knows, and the plain transformers + PEFT answer to compare with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VOCAB = 97

# One, three and four query heads a key head, a window smaller than the rows, biases, head norms: between them the four
# families meet every branch of a decoder layer.
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "mistral": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "qwen3": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12},
}
# Qwen with windows on its later layers only: layer_types decide, layer by layer.
MIXED_WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_base(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Any:
    """A frozen model of two layers and hidden size 64, biases and norm weights random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.12,  # at the usual 0.02 attention is so flat that a wrong mask hardly shows
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **settings | SIZES[family] | sizes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight") or name.endswith(".bias"):
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.to(dtype).requires_grad_(False).eval()


def attach(base: Any, seed: int = 1, **lora: Any) -> Any:
    """LoRA of rank 4 on every projection, with a B that is not zero."""
    from medcot.quiet import quiet_libraries

    with quiet_libraries():  # PEFT imports bitsandbytes, which advises at import
        from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(), quiet_libraries():
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(**settings | lora))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def build_model(family: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """Base and adapter together."""
    return attach(build_base(family, dtype, **sizes))


def pair(model: Any) -> tuple[Any, Any]:
    """An accelerated model and the plain one it was copied from."""
    from medcot.engine import accelerate

    plain = copy.deepcopy(model)
    assert accelerate(model).fast
    return model, plain


def make_rows(lengths: Sequence[int], seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of rows; about the first third of a row is prompt, which carries no loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = -100
        rows.append((ids, labels))
    return rows


def flatten(rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, list[int]]:
    """Rows end to end: ids, labels, lengths."""
    return torch.cat([ids for ids, _ in rows]), torch.cat([labels for _, labels in rows]), [len(r[0]) for r in rows]


def plain_logits(model: Any, rows: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Each row's logits (L, V) from a forward of its own."""
    return [model(input_ids=ids[None].to(model.device)).logits[0] for ids, _ in rows]


def plain_loss(model: Any, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Summed cross-entropy of all rows, one forward a row."""
    losses = [
        F.cross_entropy(logits[:-1].float(), labels[1:].to(logits.device), ignore_index=-100, reduction="sum")
        for logits, (_, labels) in zip(plain_logits(model, rows), rows, strict=True)
    ]
    return torch.stack(losses).sum()


def gradients(model: Any) -> dict[str, Tensor]:
    """Take the trainable weights' gradients away from the model, in float32."""
    taken = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} got no gradient"
            taken[name] = parameter.grad.float().cpu()
            parameter.grad = None
    return taken


def relative(got: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest value wanted."""
    difference = (got.detach().float().cpu() - wanted.detach().float().cpu()).abs().max()
    return float(difference / wanted.detach().float().abs().max().cpu())


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, as a share of their norm."""
    assert got.keys() == wanted.keys()
    off = torch.cat([(got[name] - wanted[name]).flatten() for name in wanted]).norm()
    return float(off / torch.cat([gradient.flatten() for gradient in wanted.values()]).norm())
