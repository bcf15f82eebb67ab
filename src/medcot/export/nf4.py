"""Merged weights in NF4, in the layout that transformers and bitsandbytes load without being told anything.

The usual way loads the merged 16-bit model with ``load_in_4bit`` and saves it, which needs the whole model on a GPU.
But bitsandbytes rounds each matrix by itself (and has a CPU kernel for it), so here one merged matrix after the other
is rounded and written. A linear layer's ``weight`` becomes bytes of two 4-bit codes, and beside it stand the blocks'
scales, themselves rounded to 8 bit in blocks of 256 (``absmax``, ``nested_absmax``), the two tables of codes
(``quant_map``, ``nested_quant_map``) and a JSON of the sizes as bytes (``quant_state.bitsandbytes__nf4``).

Embedding, output head and norms stay in 16 bit: which layers are rounded is what transformers' own quantizer decides
for the model, asked on a copy without storage.

Sources: QLoRA, https://arxiv.org/abs/2305.14314 (NF4, double quantisation); ``QuantState.as_dict`` in
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py (names and layout).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

from medcot.errors import MissingExtraError
from medcot.export.merged import Base, Merged, MergedTensors, open_merged, refuse_beside_adapter, save_configuration
from medcot.export.places import SLACK, TOKENIZER_BYTES, replacing
from medcot.merging import SHARD_BYTES
from medcot.precision import DTYPES
from medcot.quiet import quiet_libraries

BYTES_OF_WEIGHT = 0.516  # half a byte, and 8.127 bits of scale for each 64


def save_nf4(base: Base, adapter: Path, folder: Path, *, device: str = "cpu") -> Merged:
    """Write the merged model in NF4 with double quantisation and its tokenizer to ``folder``, replacing one there.

    Memory holds one shard, and one matrix with what bitsandbytes needs to round it (on a CPU about seven times its
    16-bit size); the whole 16-bit model where PEFT has to merge.

    Raises:
        OutputError: the folder holds an adapter, or the disk is full.
        ModelError: the adapter does not fit, or merging gives a value that is not finite.
        MissingExtraError: bitsandbytes is absent.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            "merged-4bit without bitsandbytes",
            "4-bit weights are made by bitsandbytes",
            "Run 'pip install bitsandbytes'",
        )
    refuse_beside_adapter(folder, adapter)
    tensors = open_merged(base, adapter, device=device)
    packed = find_packed(tensors.config)
    with replacing(folder, estimate_nf4_bytes(tensors, packed)) as work:
        written = _write_shards(_round_all(tensors, packed, base.dtype, torch.device(device)), work)
        tensors.config.quantization_config = _settings(base.dtype).to_dict()
        save_configuration(tensors, base.tokenizer, base.dtype, work)
    held = next(name for name, dtype in DTYPES.items() if dtype == base.dtype)
    return Merged(folder, f"{tensors.base}, and rounded to nf4 (embedding, head and norms in {held})", written)


def estimate_nf4_bytes(tensors: MergedTensors, packed: set[str]) -> int:
    """Return the bytes the folder takes."""
    sizes = {name: torch.Size(shape).numel() for name, shape in tensors.shapes.items()}
    weights = sum(size * (BYTES_OF_WEIGHT if name in packed else 2) for name, size in sizes.items())
    return int(weights * SLACK) + TOKENIZER_BYTES


def find_packed(config: PreTrainedConfig) -> set[str]:
    """Return the names of the weights that transformers would hold in 4 bit for this architecture."""
    from transformers.quantizers.base import get_keys_to_not_convert

    with quiet_libraries(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kept = set(get_keys_to_not_convert(model))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {f"{name}.weight" for name in linear - kept}


def _settings(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _round_all(
    tensors: MergedTensors, packed: set[str], dtype: torch.dtype, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what each merged tensor becomes: itself in 16 bit, or its codes with all that decodes them."""
    with quiet_libraries():
        from bitsandbytes.functional import quantize_4bit
    for name in tensors.shapes:
        shape = tensors.shapes[name]
        whole = torch.empty(shape, dtype=dtype)
        for first, last in tensors.cut(name):  # the merged matrix is never in memory twice in float32
            (whole[first:last] if shape else whole).copy_(tensors.read(name, first, last))
        if name not in packed:
            yield {name: whole}
            continue
        codes, state = quantize_4bit(whole.to(device), compress_statistics=True, quant_type="nf4")
        parts = {f"{name}.{key}": part.cpu() for key, part in state.as_dict(packed=True).items()}
        yield {name: codes.cpu(), **parts}


def _write_shards(parts: Iterator[dict[str, torch.Tensor]], work: Path) -> int:
    """Write shards as they fill; return the bytes of all."""
    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        path = work / f"shard-{len(shards) + 1}"
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, path, metadata={"format": "pt"})
        shards.append((path, list(held)))
        held.clear()

    for part in parts:
        if held and sum(t.nbytes for t in (*held.values(), *part.values())) > SHARD_BYTES:
            flush()
        held.update(part)
    flush()
    if len(shards) == 1:
        shards[0][0].rename(work / "model.safetensors")
    else:
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(shards, 1):
            renamed = path.rename(work / f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            weight_map |= dict.fromkeys(names, renamed.name)
        index: dict[str, Any] = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        index["metadata"]["total_size"] = sum(cast("Path", path).stat().st_size for path in work.glob("*.safetensors"))
        (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sum(path.stat().st_size for path in work.glob("*.safetensors"))
