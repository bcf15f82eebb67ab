"""The sizes of a model, known without its weights: what memory, time and suggestions are reckoned from.

The six distills that the shipped recipes name are in a table, so that a plan can be made with no network; any other
model's sizes follow from its configuration. Parameters are counted on a model built on the meta device, which has
shapes and no storage, and so are right for every architecture that transformers knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from medcot.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a decoder that memory and arithmetic follow from."""

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    num_params: int
    max_positions: int | None


# The six distills the shipped recipes name; sizes from their config.json, parameters counted on the meta device.
DISTILLS: dict[str, Shape] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936, 1_777_088_000, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, 7_615_616_512, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256, 8_030_261_248, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": Shape(48, 5120, 13824, 40, 8, 128, 152064, 14_770_033_664, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": Shape(64, 5120, 27648, 40, 8, 128, 152064, 32_763_876_352, 131072),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": Shape(80, 8192, 28672, 64, 8, 128, 128256, 70_553_706_496, 131072),
}
EMBEDDED_SHAPE = Shape(30, 576, 1536, 9, 3, 64, 49152, 134_515_008, 8192)


def compute_shape(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> Shape:
    """Return the sizes behind a configuration; parameters are counted on a model without storage (the meta device)."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet_libraries(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    values = text.to_dict()
    heads = text.num_attention_heads
    return Shape(
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=values.get("intermediate_size") or 4 * text.hidden_size,  # GPT-2's convention where unnamed
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or text.hidden_size // heads,
        vocab=text.vocab_size,
        num_params=sum(p.numel() for p in model.parameters()),
        max_positions=values.get("max_position_embeddings"),
    )
