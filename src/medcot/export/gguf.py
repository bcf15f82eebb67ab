"""Merged weights as one GGUF file, for llama.cpp and what is built on it (Ollama, LM Studio, koboldcpp).

llama.cpp's own converter is a script in its source tree that reads a saved model. Here the merged tensors go straight
from the base's files into GGUF's blocks, a few rows at a time, rounded once from their float32 sum and not first to 16
bit and then again. The ``gguf`` package supplies the container, the map of tensor names and the block formats that can
be written without llama.cpp (``WRITTEN``); K-quants choose a format for each tensor by rules that live in llama.cpp
alone, and are made by it from such a file (``llama_cpp.py``).

Three things about Llama in GGUF are not in its metadata and go wrong silently:

- its query and key rows stand in another order, because llama.cpp rotates neighbouring pairs of a head's dimensions
  where transformers rotates the two halves (``permute``); Qwen's do not;
- Llama 3's stretched rotary frequencies are a tensor, ``rope_freqs.weight``, of divisors for each pair;
- a tied head is left out, and llama.cpp then takes the embedding.

A tensor whose rows are no multiple of the format's block stays in F16; norms and biases stay in F32.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; Llama 3's frequencies:
``_compute_llama3_parameters`` in transformers' modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    get_tensor_name_map,
)
from gguf.quants import quantize

from medcot.errors import ModelError
from medcot.export.gguf_tokenizer import add_vocabulary, read_vocabulary
from medcot.export.kinds import MADE_BY_LLAMA_CPP
from medcot.export.merged import MergedTensors
from medcot.export.places import TOKENIZER_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Family:
    """What GGUF calls an architecture, and whether its query and key rows stand in another order there."""

    arch: MODEL_ARCH
    permuted: bool


FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, permuted=True),
    "mistral": Family(MODEL_ARCH.LLAMA, permuted=True),
    "qwen2": Family(MODEL_ARCH.QWEN2, permuted=False),
    "qwen3": Family(MODEL_ARCH.QWEN3, permuted=False),
}
# The kinds of ``WRITTEN_HERE``, and how a file of them is marked.
WRITTEN = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q5_0": (GGMLQuantizationType.Q5_0, LlamaFileType.MOSTLY_Q5_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


@dataclass(frozen=True, slots=True)
class _Planned:
    """One tensor of the file to be."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    source: str | None  # the merged tensor; None where ``made`` holds the values
    heads: int | None  # rows are reordered within so many heads
    made: np.ndarray[Any, Any] | None = None


def estimate_gguf_bytes(num_params: int, quant: str) -> int:
    """Return the bytes that making the file takes: itself, and the F16 file that llama.cpp starts from."""
    if quant in MADE_BY_LLAMA_CPP:
        return int(num_params * (2.05 + MADE_BY_LLAMA_CPP[quant] / 8)) + TOKENIZER_BYTES
    block, size = GGML_QUANT_SIZES[WRITTEN[quant][0]]
    return int(num_params * size / block * 1.02) + TOKENIZER_BYTES


def write_gguf(
    tensors: MergedTensors,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    quant: str,
    name: str,
    add_bos: bool,
    chat_template: str | None,
) -> None:
    """Write the merged model in a kind of ``WRITTEN``.

    Args:
        tensors: the merged weights.
        tokenizer: as training had it.
        path: the file; its folder exists.
        quant: key of ``WRITTEN``.
        name: the model's name in the header.
        add_bos: whether llama.cpp is to put BOS before a text.
        chat_template: Jinja, as llama.cpp's server renders it.

    Raises:
        ModelError: an architecture, rotary scaling or tokenizer that llama.cpp has no twin of.
    """
    family = find_family(tensors.config)
    kind, file_type = WRITTEN[quant]
    num_rows = next(shape[0] for key, shape in tensors.shapes.items() if key.endswith("embed_tokens.weight"))
    vocabulary = read_vocabulary(tokenizer, num_rows, add_bos=add_bos)
    writer = GGUFWriter(path, arch=_arch_name(family))
    try:
        writer.add_name(name)
        writer.add_quantization_version(2)
        writer.add_file_type(int(file_type))
        _add_sizes(writer, tensors.config, num_rows)
        add_vocabulary(writer, vocabulary, chat_template)
        plan = _plan(tensors, family, kind)
        for planned in plan:
            _announce(writer, planned)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for planned in plan:
            writer.write_tensor_data(_encode(tensors, planned))
    finally:
        writer.close()


def find_family(config: PreTrainedConfig) -> Family:
    """Return how GGUF holds an architecture.

    Raises:
        ModelError: one that is not in ``FAMILIES``, or attention that llama.cpp does not compute for it.
    """
    values = config.to_dict()
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"GGUF for architecture '{config.model_type}'",
            f"It is written for {', '.join(FAMILIES)}",
            "Export merged-16bit, and convert it with llama.cpp's own convert_hf_to_gguf.py",
        )
    longest = values.get("max_position_embeddings") or 0
    window, layers = values.get("sliding_window"), values.get("layer_types")
    windowed = "sliding_attention" in layers if layers else True
    if windowed and window is not None and window < longest:
        raise ModelError(
            f"a window of {window} tokens in attention",
            "llama.cpp lets every token of this architecture see all before it",
            "Export merged-16bit; or, if rows are shorter than the window, set sliding_window to null in config.json",
        )
    return FAMILIES[config.model_type]


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Bring the two halves of each head's dimensions together in pairs: (h, 2, d/2) to (h, d/2, 2) in the rows."""
    half = rows.shape[0] // heads // 2
    return rows.view(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _add_sizes(writer: GGUFWriter, config: PreTrainedConfig, num_rows: int) -> None:
    values = config.to_dict()
    head_dim = _head_dim(config)
    writer.add_vocab_size(num_rows)
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values.get("num_key_value_heads") or values["num_attention_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(original)
    elif kind not in ("default", "llama3"):
        raise ModelError(
            f"rotary scaling '{kind}'",
            "GGUF files are written for default, linear, yarn and llama3",
            "Export merged-16bit, and convert it with llama.cpp's own convert_hf_to_gguf.py",
        )


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotary settings: newer transformers keep them together, older ones theta apart."""
    values = config.to_dict()
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    if "rope_theta" not in rope:
        rope["rope_theta"] = values.get("rope_theta") or 10_000.0
    return rope


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """Return by what each pair's frequency is divided, float32 (head_dim / 2): 1 for short waves, factor for long."""
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] / waves  # of each pair within the original context
    between = np.clip((turns - low) / (high - low), 0, 1)  # 0 is stretched whole, 1 not at all
    return (1 / ((1 - between) / factor + between)).astype(np.float32)


def _plan(tensors: MergedTensors, family: Family, kind: GGMLQuantizationType) -> list[_Planned]:
    """List the file's tensors in order.

    Raises:
        ModelError: a tensor that GGUF has no name for.
    """
    config = tensors.config
    names = get_tensor_name_map(family.arch, config.num_hidden_layers)
    plan = []
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        divisors = _llama3_divisors(rope, _head_dim(config))
        plan.append(_Planned("rope_freqs.weight", divisors.shape, GGMLQuantizationType.F32, None, None, divisors))
    for source, shape in tensors.shapes.items():
        if source.endswith("rotary_emb.inv_freq"):  # computed, and stored in some old checkpoints
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(
                f"GGUF has no name for the tensor '{source}' of architecture '{config.model_type}'",
                "Every weight of the model must be in the file",
                "Export merged-16bit instead",
            )
        heads = None
        if family.permuted and ".q_proj." in source:
            heads = config.num_attention_heads
        elif family.permuted and ".k_proj." in source:
            heads = config.num_key_value_heads
        plan.append(_Planned(name, shape, _choose_kind(shape, kind), source, heads))
    return plan


def _choose_kind(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


_PLAIN: dict[GGMLQuantizationType, type[np.generic]] = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
}


def _layout(planned: _Planned) -> tuple[tuple[int, ...], Any]:
    """Return shape and dtype of a tensor's array: values in F32 and F16, bytes of blocks otherwise."""
    if planned.kind in _PLAIN:
        return planned.shape, np.dtype(_PLAIN[planned.kind])
    block, size = GGML_QUANT_SIZES[planned.kind]
    return (*planned.shape[:-1], planned.shape[-1] // block * size), np.dtype(np.uint8)


def _announce(writer: GGUFWriter, planned: _Planned) -> None:
    shape, dtype = _layout(planned)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    writer.add_tensor_info(planned.name, shape, dtype, num_bytes, None if planned.kind in _PLAIN else planned.kind)


def _encode(tensors: MergedTensors, planned: _Planned) -> np.ndarray[Any, Any]:
    """Read a tensor and round it; a reordered one whole, since its rows move, others a few rows at a time."""
    if planned.source is None:
        assert planned.made is not None
        return planned.made
    round_rows = _rounding(planned.kind)
    shape, dtype = _layout(planned)
    if planned.heads is not None:
        rows = permute(tensors.read(planned.source, 0, None), planned.heads)
        return round_rows(rows.contiguous().numpy()).reshape(shape)
    encoded = np.empty(shape, dtype)
    for first, last in tensors.cut(planned.source):
        encoded[first:last] = round_rows(tensors.read(planned.source, first, last).contiguous().numpy())
    return encoded


def _rounding(kind: GGMLQuantizationType) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    if kind in _PLAIN:
        return lambda rows: rows.astype(_PLAIN[kind])
    return lambda rows: quantize(rows, kind)


def _arch_name(family: Family) -> str:
    from gguf import MODEL_ARCH_NAMES

    return MODEL_ARCH_NAMES[family.arch]
