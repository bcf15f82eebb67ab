"""Merged weights without a second model: the checkpoint's bytes pass through once, and the adapted ones change.

The usual way loads a second copy of the base through transformers and PEFT, adds the adapter layer by layer and saves:
19 s for 8 billion parameters on an H200 machine, most of it one thread moving memory. But merging changes nothing
except the adapted matrices, ``W + scale * B A``, and safetensors is a JSON header and a flat run of bytes
(https://huggingface.co/docs/safetensors). So here pieces of a few million weights are read, changed and written at
their new place by several threads, and no more than a few pieces are ever in memory. The sum is made in float32, on
the GPU where there is one, and rounded once to the merged dtype. (PEFT's ``safe_merge`` rounds the product first and
then the sum, so its weights may differ from these by one rounding; these are the nearer ones.)

Systems take one writer a file at a time, so the merged weights are cut into shards of 2 GB, written side by side.

What this covers is decided by ``find_updates``: a plain LoRA adapter whose every target is found in the checkpoint
under the module's own name and in its shape. DoRA, trained biases, LoftQ, tied heads, converted or already quantised
checkpoints are left to PEFT (``export.py``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from medcot.errors import ModelError
from medcot.quiet import quiet_libraries
from medcot.weights import Weights, has_conversion, list_shards

SHARD_BYTES = 2_000_000_000
PIECE_WEIGHTS = 2**23  # 16 MB in 16 bit: long enough for a copy to run at full speed, short enough to have many
MAX_THREADS = 12
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_BYTES |= {name: dtype.itemsize for name, dtype in FLOATS.items()}
# An adapter's settings that say how it was made or where, but not what it adds; the others must be LoRA's defaults.
_HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "lora_dropout"),
}
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Update:
    """What is added to one matrix: ``scale * up @ down``; up is (out, r), down is (r, in)."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a safetensors file; ``start`` counts bytes from the beginning of the file."""

    name: str
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_size(self) -> int:
        return math.prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows ``first`` to ``last`` of a tensor, from where it is stored to where it goes."""

    source: _Stored
    target: _Stored
    first: int
    last: int


def find_updates(weights: Weights, adapter: Path) -> dict[str, Update] | None:
    """Return what the adapter adds to which tensor of the checkpoint, or ``None`` where streaming does not cover it.

    Args:
        weights: the base.
        adapter: a folder that ``save_adapter`` wrote.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if weights.gguf is not None or weights.pickled or not _is_plain_base(weights) or not _is_plain_lora(config):
        return None
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - the file is no mapping
            name, _, half = key.removesuffix(".weight").rpartition(".")
            halves.setdefault(name.removeprefix(_PREFIX) + ".weight", {})[half] = file.get_tensor(key)
    stored = {tensor.name: tensor for path in list_shards(weights.folder) for tensor in _read_header(path)}
    vocabulary = weights.config.get("vocab_size") if weights.config.get("tie_word_embeddings") else None
    for name, pair in halves.items():
        base = stored.get(name)
        if base is None or base.dtype not in FLOATS or set(pair) != {"lora_A", "lora_B"}:
            return None
        if base.shape != (pair["lora_B"].shape[0], pair["lora_A"].shape[1]) or base.shape[0] == vocabulary:
            return None
    return {name: Update(pair["lora_B"], pair["lora_A"], scale) for name, pair in halves.items()}


def write_merged(
    weights: Weights,
    updates: Mapping[str, Update],
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Write the checkpoint with the updates added as safetensors and their index; return the bytes written.

    Args:
        weights: the base.
        updates: from ``find_updates``.
        folder: where the shards go.
        dtype: of every floating-point tensor written; others are copied.
        device: where sums are made.

    Raises:
        ModelError: a merged weight that is not finite.
    """
    stored = [tensor for path in list_shards(weights.folder) for tensor in _read_header(path)]
    lanes, weight_map = [], {}
    shards = _cut_shards(stored, dtype)
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        path = folder / ("model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        targets = _write_header(path, shard, dtype)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), path.name))
        lanes.append([piece for pair in zip(shard, targets, strict=True) for piece in _cut_pieces(*pair)])
    if len(shards) > 1:
        sizes = {
            "total_parameters": sum(tensor.num_rows * tensor.row_size for tensor in stored),
            "total_size": sum(_num_bytes(tensor, dtype) for tensor in stored),
        }
        index = json.dumps({"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    moved = {name: Update(u.up.to(device).float(), u.down.to(device).float(), u.scale) for name, u in updates.items()}
    _run_lanes(lanes, moved, dtype, device)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class MergedReader:
    """The merged weights a few rows at a time, in float32 and unrounded, for whoever rounds them otherwise."""

    def __init__(self, weights: Weights, updates: Mapping[str, Update]) -> None:
        self._stored = {tensor.name: tensor for path in list_shards(weights.folder) for tensor in _read_header(path)}
        self._updates = updates
        self.shapes = {name: tensor.shape for name, tensor in self._stored.items() if tensor.dtype in FLOATS}

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return rows ``first`` to ``last`` of a tensor, float32 on the CPU.

        Raises:
            ModelError: a file that ends early, or a merged weight that is not finite.
        """
        source = self._stored[name]
        last = source.num_rows if last is None else last
        wide = _read_rows(source, first, last, pinned=False).float()
        update = self._updates.get(name)
        if update is not None:
            wide.addmm_(update.up[first:last].float(), update.down.float(), alpha=update.scale)
            _check_finite(wide, name)
        return wide.view(last - first, *source.shape[1:]) if source.shape else wide.view(())


def _is_plain_base(weights: Weights) -> bool:
    """Whether the files hold the model's own tensors: neither quantised nor renamed or regrouped while loading."""
    settings = weights.config
    return not ({"quantization_config", "auto_map"} & set(settings)) and not has_conversion(settings["model_type"])


def _is_plain_lora(config: Mapping[str, Any]) -> bool:
    with quiet_libraries():
        from peft import LoraConfig

        defaults = LoraConfig().to_dict()
    return config["peft_type"] == "LORA" and all(
        key in defaults and value == defaults[key]
        for key, value in config.items()
        if key not in _HARMLESS and key != "peft_type"
    )


def _read_header(path: Path) -> Iterator[_Stored]:
    """Tensors of a file in the order of their bytes: 8 bytes of header length, the header, then the data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        yield _Stored(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + entry["data_offsets"][0])


def _num_bytes(tensor: _Stored, dtype: torch.dtype) -> int:
    """Bytes a tensor takes when written."""
    size = dtype.itemsize if tensor.dtype in FLOATS else _BYTES[tensor.dtype]
    return tensor.num_rows * tensor.row_size * size


def _cut_shards(stored: Sequence[_Stored], dtype: torch.dtype) -> list[list[_Stored]]:
    """A shard ends before it would grow beyond ``SHARD_BYTES``, a single larger tensor excepted."""
    shards: list[list[_Stored]] = [[]]
    filled = 0
    for tensor in stored:
        size = _num_bytes(tensor, dtype)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _write_header(path: Path, shard: Sequence[_Stored], dtype: torch.dtype) -> list[_Stored]:
    """Write a shard's header and make the file as long as it will be; return where its tensors go."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        kind = _NAMES[dtype] if tensor.dtype in FLOATS else tensor.dtype
        end = offset + _num_bytes(tensor, dtype)
        header[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    entries = [(tensor, header[tensor.name]) for tensor in shard]
    return [
        _Stored(tensor.name, entry["dtype"], tensor.shape, path, 8 + len(text) + entry["data_offsets"][0])
        for tensor, entry in entries
    ]


def _cut_pieces(source: _Stored, target: _Stored) -> Iterator[_Piece]:
    step = max(1, PIECE_WEIGHTS // max(1, source.row_size))
    for first in range(0, source.num_rows, step):
        yield _Piece(source, target, first, min(first + step, source.num_rows))


def _run_lanes(
    lanes: Sequence[Sequence[_Piece]], updates: Mapping[str, Update], dtype: torch.dtype, device: torch.device
) -> None:
    """Do all pieces, those of different files in turn, so that threads seldom wait for each other's file."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)  # the updates are there before other streams read them
    # On a CPU the sums themselves use all cores; two threads overlap them with reading and writing.
    num_threads = min(MAX_THREADS, os.cpu_count() or 1) if on_cuda else 2

    def start() -> None:
        if on_cuda:
            torch.cuda.set_stream(torch.cuda.Stream(device))

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="medcot-merge", initializer=start)
    try:
        turns = [piece for turn in zip_longest(*lanes) for piece in turn if piece is not None]
        jobs = [pool.submit(_do_piece, piece, updates.get(piece.source.name), dtype, device) for piece in turns]
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _do_piece(piece: _Piece, update: Update | None, dtype: torch.dtype, device: torch.device) -> None:
    """Read, add, round, write."""
    source, target = piece.source, piece.target
    rows = _read_rows(source, piece.first, piece.last, pinned=device.type == "cuda")
    raw = rows.view(-1).view(torch.uint8)
    if update is not None or source.dtype != target.dtype:
        wide = rows.to(device, non_blocking=True).float()
        if update is not None:
            wide.addmm_(update.up[piece.first : piece.last], update.down, alpha=update.scale)
        merged = wide.to(dtype)
        if update is not None:
            _check_finite(merged, source.name)
        back = torch.empty(merged.shape, dtype=dtype, pin_memory=device.type == "cuda")
        raw = back.copy_(merged).view(-1).view(torch.uint8)
    with target.file.open("r+b", buffering=0) as file:
        file.seek(target.start + piece.first * source.row_size * _BYTES[target.dtype])
        _write_all(file, raw)


def _read_rows(source: _Stored, first: int, last: int, *, pinned: bool) -> torch.Tensor:
    """Return rows of a tensor as they are stored, (rows, row size); what is no float comes as bytes."""
    size = _BYTES[source.dtype]
    raw = torch.empty((last - first) * source.row_size * size, dtype=torch.uint8, pin_memory=pinned)
    with source.file.open("rb", buffering=0) as file:
        file.seek(source.start + first * source.row_size * size)
        _read_all(file, raw)
    if source.dtype not in FLOATS:
        return raw.view(last - first, source.row_size * size)
    return raw.view(FLOATS[source.dtype]).view(last - first, source.row_size)


def _check_finite(merged: torch.Tensor, name: str) -> None:
    if not bool(merged.isfinite().all()):
        raise ModelError(
            f"the adapter cannot be merged: '{name}' would have weights that are not finite",
            "Merged weights are finite numbers",
            "Look at the loss in metrics.jsonl, and train again with a lower learning rate",
        )


def _read_all(file: Any, raw: torch.Tensor) -> None:
    view = _bytes_of(raw)
    while len(view):
        got = file.readinto(view)
        if not got:
            raise ModelError(
                f"'{file.name}' ends in the middle of a tensor",
                "A safetensors file holds what its header names",
                "Download the model again",
            )
        view = view[got:]


def _write_all(file: Any, raw: torch.Tensor) -> None:
    view = _bytes_of(raw)
    while len(view):
        view = view[file.write(view) :]


def _bytes_of(raw: torch.Tensor) -> memoryview:
    """The memory of a uint8 tensor."""
    return memoryview(raw.numpy())  # type: ignore[arg-type]  # NumPy's arrays are buffers, its stubs do not say so
