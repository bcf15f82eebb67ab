"""Merged weights: the adapter added into a base that is read again, in 16 bit, or in 32 to lose nothing.

**Merging into what was trained on is not merging into the base** when that was held in 4 or 8 bit. So the base's own
files are read again and merged into, and ``Merged.base`` says so. Where it can, this happens without building a model
(``merging.py``): the bytes pass through a few megabytes of memory. Else PEFT merges a fresh 16-bit copy. A checkpoint
that exists only in 4 bit, or as a GGUF file, is unpacked first, and that is said too; who has its 16-bit original can
name it instead (``Base.original``).

``open_merged`` gives the same sums, unrounded, to the kinds that round them in another way (``nf4.py``, ``gguf.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

from medcot.errors import ModelError, OutputError
from medcot.export.places import SLACK, TOKENIZER_BYTES, check_free_space, replacing
from medcot.merging import MergedReader, Update, find_updates, write_merged
from medcot.model import LoadedModel, load, load_adapter
from medcot.precision import DTYPES
from medcot.quiet import quiet_libraries
from medcot.weights import EMBEDDED, Weights, find_weights, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PIECE_WEIGHTS = 2**23  # weights that are converted together, 32 MB in float32


@dataclass(frozen=True, slots=True)
class Merged:
    """Merged weights on disk."""

    folder: Path
    base: str  # which weights the adapter was merged into, one sentence
    num_bytes: int  # of the safetensors files


@dataclass(frozen=True, slots=True)
class Base:
    """The base of a run as far as merging needs it: where its files are, and nothing of it in memory.

    Attributes:
        source: what ``find_weights`` and ``load`` take; for the embedded model, the folder it was unpacked to.
        revision: commit of a Hub repository.
        precision: in which training held the weights.
        dtype: of the 16-bit artefacts, fp16 for a run in fp16 and bf16 otherwise.
        num_params: logical ones.
        tokenizer: as training had it; saved beside merged weights.
        embedded: whether it is medcot's embedded model.
        original: a 16-bit base to merge into instead, where training had only a quantised one.
        allowed: ``allow_pickle`` and ``trust_remote_code``, as given to ``load``.
    """

    source: str
    revision: str | None
    precision: str
    dtype: torch.dtype
    num_params: int
    tokenizer: PreTrainedTokenizerBase
    embedded: bool = False
    original: str | None = None
    allowed: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, loaded: LoadedModel, **allowed: bool) -> Base:
        """Return the base of a model that is in memory."""
        return cls(
            source=loaded.name if loaded.source == EMBEDDED else loaded.source,
            revision=loaded.revision,
            precision=loaded.precision,
            dtype=torch.float16 if loaded.dtype == torch.float16 else torch.bfloat16,
            num_params=loaded.num_params,
            tokenizer=loaded.tokenizer,
            embedded=loaded.source == EMBEDDED,
            allowed=allowed,
        )

    def find_weights(self) -> Weights:
        """Return the files that are merged into; errors as for ``weights.find_weights``."""
        if self.original is not None:
            return find_weights(self.original, **self.allowed)
        return find_weights(self.source, revision=self.revision, **self.allowed)


@dataclass(frozen=True, slots=True)
class MergedTensors:
    """Every merged tensor by its name in transformers, read when asked for.

    Attributes:
        shapes: name to shape; a tied head is not listed.
        read: ``read(name, first, last)`` returns rows of a tensor in float32, unrounded where merging is streamed.
        base: which weights the adapter was merged into, one sentence.
        config: the merged model's.
        generation: the base's settings for generation.
        weights: the files merged into.
    """

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str, int, int | None], torch.Tensor]
    base: str
    config: PreTrainedConfig
    generation: GenerationConfig
    weights: Weights

    def cut(self, name: str) -> list[tuple[int, int]]:
        """Return ranges of rows that together are the tensor, each of about ``PIECE_WEIGHTS`` weights."""
        shape = self.shapes[name]
        num_rows = shape[0] if shape else 1
        step = max(1, PIECE_WEIGHTS * num_rows // max(1, torch.Size(shape).numel()))
        return [(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]


def save_merged(
    loaded: LoadedModel,
    adapter: Path,
    folder: Path,
    *,
    device: str = "cpu",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Merged:
    """Merge a saved adapter into the base's own weights, in 16 bit, and write them with the tokenizer to ``folder``.

    The model in memory is not touched. The disk needs the model's 16-bit size; memory needs a few megabytes where
    ``merging.find_updates`` covers base and adapter, and the model's 16-bit size where PEFT has to merge.

    Args:
        loaded: the base that was tuned; it says what to read again.
        adapter: a folder that ``save_adapter`` wrote.
        folder: where the merged model goes; replaced if it holds one.
        device: where the merge is computed.
        allow_pickle: as given to ``load``.
        trust_remote_code: as given to ``load``.

    Raises:
        OutputError: the folder is the adapter's or holds one, or the disk is full.
        ModelError: the adapter does not fit, or merging gives a value that is not finite.
    """
    base = Base.of(loaded, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    return merge(base, adapter, folder, dtype=base.dtype, device=device)


def merge(base: Base, adapter: Path, folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> Merged:
    """Do what ``save_merged`` does, with no model in memory, in ``dtype``; errors as there."""
    refuse_beside_adapter(folder, adapter)
    num_bytes = estimate_merged_bytes(base.num_params, dtype)
    check_free_space(folder, num_bytes)
    weights = base.find_weights()
    updates = find_updates(weights, adapter)
    if updates is None:
        return _save_with_peft(base, adapter, folder, dtype, device)
    with replacing(folder, num_bytes) as work:
        written = write_merged(weights, updates, work, dtype=dtype, device=torch.device(device))
        save_configuration(_open_streamed(base, weights, updates, dtype), base.tokenizer, dtype, work)
    return Merged(folder, _describe_base(base, weights, _name(dtype)), written)


def open_merged(base: Base, adapter: Path, *, device: str = "cpu") -> MergedTensors:
    """Return the merged tensors of a base and a saved adapter; errors as for ``save_merged``."""
    weights = base.find_weights()
    updates = find_updates(weights, adapter)
    if updates is not None:
        return _open_streamed(base, weights, updates, base.dtype)
    held = _load_again(base, base.dtype, device)
    words = _describe_base(base, weights, _name(base.dtype), held.precision)
    merged = _add(held, adapter, base.dtype)
    tied = set(merged.all_tied_weights_keys)
    tensors = {name: tensor for name, tensor in merged.state_dict().items() if name not in tied}

    def read(name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        tensor = tensors[name]
        return (tensor[first:last] if tensor.shape else tensor).float().cpu()

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    generation = cast("GenerationConfig", merged.generation_config)
    return MergedTensors(shapes, read, words, cast("PreTrainedConfig", merged.config), generation, weights)


def save_configuration(
    tensors: MergedTensors, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, work: Path
) -> None:
    """Write what stands beside the weights, as ``save_pretrained`` of the merged model would."""
    config = tensors.config
    config.dtype = dtype
    config.architectures = [cast("Any", MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)].__name__]
    with quiet_libraries():
        config.save_pretrained(work)
        tensors.generation.save_pretrained(work)
        tokenizer.save_pretrained(work)


def refuse_beside_adapter(folder: Path, adapter: Path) -> None:
    """Raise ``OutputError`` where merged weights would come to stand beside an adapter."""
    if folder.resolve() == adapter.resolve() or (folder / "adapter_config.json").exists():
        raise OutputError(
            f"merged weights would go to '{folder}', which holds an adapter",
            "Loaders apply an adapter they find beside merged weights a second time",
            "Save the merged model to a folder of its own",
        )


def estimate_merged_bytes(num_params: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes a merged folder takes: two or four a parameter, and the tokenizer."""
    return int(num_params * dtype.itemsize * SLACK) + TOKENIZER_BYTES


def _open_streamed(base: Base, weights: Weights, updates: dict[str, Update], dtype: torch.dtype) -> MergedTensors:
    reader = MergedReader(weights, updates)
    config = read_config(weights)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {name: shape for name, shape in reader.shapes.items() if name not in tied}
    if (weights.folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(weights.folder)
    else:
        generation = GenerationConfig.from_model_config(config)
    words = _describe_base(base, weights, _name(dtype))
    return MergedTensors(shapes, reader.read, words, config, cast("GenerationConfig", generation), weights)


def _save_with_peft(base: Base, adapter: Path, folder: Path, dtype: torch.dtype, device: str) -> Merged:
    """Merge by loading base and adapter, for what ``find_updates`` does not cover."""
    held = _load_again(base, dtype, device)
    precision, weights = held.precision, base.find_weights()
    merged = _add(held, adapter, dtype)
    with replacing(folder, estimate_merged_bytes(base.num_params, dtype)) as work, quiet_libraries():
        # "Original format" means the checkpoint's names and packing; unpacked weights cannot go back to theirs.
        merged.save_pretrained(work, max_shard_size="5GB", save_original_format=precision in DTYPES)
        base.tokenizer.save_pretrained(work)
        num_bytes = sum(file.stat().st_size for file in work.glob("*.safetensors"))
    return Merged(folder, _describe_base(base, weights, _name(dtype), precision), num_bytes)


def _load_again(base: Base, dtype: torch.dtype, device: str) -> LoadedModel:
    source, revision = (base.original, None) if base.original is not None else (base.source, base.revision)
    return load(
        cast("str", source),
        precision=_name(dtype),
        revision=revision,
        max_seq_length=1,
        device=device,
        **base.allowed,
    )


def _add(base: LoadedModel, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base in ``dtype`` with the adapter added to its weights; the base is used up."""
    with quiet_libraries():
        if base.precision not in DTYPES:
            base.model.dequantize(dtype)
        adapted = load_adapter(base, adapter)
        try:
            merged = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:  # what PEFT raises at a NaN
            raise ModelError(
                f"the adapter '{adapter}' cannot be merged: {error}",
                "Merged weights are finite numbers",
                "Look at the loss in metrics.jsonl, and train again with a lower learning rate",
            ) from None
    return cast("PreTrainedModel", merged.to(dtype))


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _describe_base(base: Base, weights: Weights, precision: str, held: str = "bf16") -> str:
    """Say into what was merged; ``held`` is the precision in which the base's files hold it."""
    resolved = weights.resolved
    if base.original is not None:
        return f"merged into {resolved} in {precision}, named as the original of {base.source} ({base.precision})"
    if held not in DTYPES:
        return f"merged into {resolved} unpacked from {held} to {precision}: no 16-bit weights are there"
    if base.embedded:
        return f"merged into the embedded model's weights, unpacked from 4-bit GGUF to {precision}: it has no others"
    if weights.gguf is not None:
        return f"merged into {resolved} unpacked from GGUF to {precision}"
    if base.precision in DTYPES:
        return f"merged into {resolved} in {precision}"
    return (
        f"merged into {resolved} in {precision}; training saw the same weights in {base.precision},"
        " so the merged model differs a little from the tuned one"
    )
