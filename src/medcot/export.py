"""What a run leaves behind: the adapter in PEFT's format, and on request the merged 16-bit weights.

Everything here opens in the plain libraries without medcot. Three traps are avoided on purpose:

- **PiSSA changes the base.** It moves the strongest directions of the weights into the adapter, so the tuned adapter
  fits only the residual base. It is saved converted, as A' = [A; A0], B' = [B, -B0] at twice the rank, which added to
  the *unmodified* base gives the tuned model (https://huggingface.co/docs/peft/developer_guides/lora#pissa). PEFT's own
  conversion needs the initial adapter in a folder, loads it into the model being saved, and drops trained biases; ours
  works on the tensors.
- **Merging into what was trained on is not merging into the base** when that was held in 4 or 8 bit. ``save_merged``
  reads the base's own files again, merges into those, and says so in ``Merged.base``. Where it can, it does so without
  building a model (``merging.py``); else PEFT merges a fresh 16-bit copy. A checkpoint that exists only in 4 bit is
  unpacked first, and that is said too.
- **An adapter beside merged weights is applied twice** by transformers 5, which loads any adapter it finds. So the two
  never share a folder.

A LoftQ adapter is saved as it is: its base is the 4-bit rounding of the named model, and PEFT repeats that rounding
from the adapter's configuration whenever it loads the adapter onto the 16-bit base.

Each folder is written under another name beside its place and moved there when whole, after a look at the free disk.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file

from medcot.errors import ModelError, OutputError
from medcot.merging import find_updates, write_merged
from medcot.model import LoadedModel, initial_pissa_weights, load, load_adapter
from medcot.precision import DTYPES
from medcot.quiet import quiet_libraries
from medcot.weights import EMBEDDED, Weights, find_weights, read_config

with quiet_libraries():
    from peft import get_peft_model_state_dict

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TOKENIZER_BYTES = 40_000_000  # generous: a vocabulary of 150,000 tokens takes 10 to 20 MB
_SLACK = 1.02  # file headers and JSON


@dataclass(frozen=True, slots=True)
class Merged:
    """Merged weights on disk."""

    folder: Path
    base: str  # which weights the adapter was merged into, one sentence
    num_bytes: int  # of the safetensors files


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, init: str = "default") -> Path:
    """Write adapter, tokenizer and a short README to ``folder``, replacing an adapter that is there.

    Args:
        model: what ``attach_lora`` returned, trained or not; it is not changed.
        tokenizer: saved beside the adapter, so that the folder is enough to serve from.
        folder: must not hold a model.
        init: how the adapter was initialised; ``"pissa"`` is converted to the unmodified base.

    Raises:
        OutputError: the folder holds a model, or cannot be written.
    """
    if (folder / "config.json").exists():
        raise OutputError(
            f"'{folder}' holds a model",
            "An adapter beside a model would be applied to it unasked",
            "Save the adapter to a folder of its own",
        )
    config = cast("LoraConfig", copy.deepcopy(model.peft_config["default"]))
    tensors = {
        name: tensor.detach().to("cpu").contiguous()
        # Without embedding layers: to decide whether they were changed, PEFT would ask the Hub.
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    if init == "pissa":
        tensors = _convert_pissa(tensors, initial_pissa_weights(model), config)
    config.inference_mode = True
    with _replacing(folder, estimate_adapter_bytes(model, init=init)) as work:
        save_file(tensors, work / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(work))
        with quiet_libraries():
            tokenizer.save_pretrained(work)
        (work / "README.md").write_text(_adapter_card(config), encoding="utf-8")
    return folder


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
    if folder.resolve() == adapter.resolve() or (folder / "adapter_config.json").exists():
        raise OutputError(
            f"merged weights would go to '{folder}', which holds an adapter",
            "Loaders apply an adapter they find beside merged weights a second time",
            "Save the merged model to a folder of its own",
        )
    check_free_space(folder, estimate_merged_bytes(loaded.num_params))
    precision = "fp16" if loaded.dtype == torch.float16 else "bf16"
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    weights = find_weights(
        loaded.name if loaded.source == EMBEDDED else loaded.source, revision=loaded.revision, **allowed
    )
    updates = find_updates(weights, adapter)
    if updates is None:
        return _save_with_peft(loaded, adapter, folder, precision, device, allowed)
    with _replacing(folder, estimate_merged_bytes(loaded.num_params)) as work:
        num_bytes = write_merged(weights, updates, work, dtype=DTYPES[precision], device=torch.device(device))
        _save_configuration(loaded, weights, DTYPES[precision], work)
    return Merged(folder, _describe_base(loaded, weights.resolved, precision, precision), num_bytes)


def _save_configuration(loaded: LoadedModel, weights: Weights, dtype: torch.dtype, work: Path) -> None:
    """Write what stands beside the weights, as ``save_pretrained`` of the merged model would."""
    config = read_config(weights)
    config.dtype = dtype
    config.architectures = [type(loaded.model).__name__]
    with quiet_libraries():
        config.save_pretrained(work)
        cast("Any", loaded.model).generation_config.save_pretrained(work)
        loaded.tokenizer.save_pretrained(work)


def _save_with_peft(
    loaded: LoadedModel, adapter: Path, folder: Path, precision: str, device: str, allowed: dict[str, bool]
) -> Merged:
    """Merge by loading base and adapter, for what ``find_updates`` does not cover."""
    base = load(
        loaded.source, precision=precision, revision=loaded.revision, max_seq_length=1, device=device, **allowed
    )
    merged = _merge(base, adapter, DTYPES[precision])
    with _replacing(folder, estimate_merged_bytes(loaded.num_params)) as work, quiet_libraries():
        # "Original format" means the checkpoint's names and packing; unpacked weights cannot go back to theirs.
        merged.save_pretrained(work, max_shard_size="5GB", save_original_format=base.precision in DTYPES)
        loaded.tokenizer.save_pretrained(work)
        num_bytes = sum(file.stat().st_size for file in work.glob("*.safetensors"))
    return Merged(folder, _describe_base(loaded, base.resolved, base.precision, precision), num_bytes)


def _merge(base: LoadedModel, adapter: Path, dtype: torch.dtype) -> PreTrainedModel:
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


def estimate_adapter_bytes(model: PeftModel, *, init: str = "default") -> int:
    """Return the bytes an adapter folder takes: trained weights in fp32 (twice for a converted PiSSA) and tokenizer."""
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return int(num_trained * 4 * (2 if init == "pissa" else 1) * _SLACK) + _TOKENIZER_BYTES


def estimate_merged_bytes(num_params: int) -> int:
    """Return the bytes a merged 16-bit folder takes: two a parameter, and the tokenizer."""
    return int(num_params * 2 * _SLACK) + _TOKENIZER_BYTES


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise ``OutputError`` where the disk that would hold ``folder`` has less than ``num_bytes`` free."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OutputError(
            f"the disk of '{folder}' has {free / 1e9:.2f} GB free",
            f"{num_bytes / 1e9:.2f} GB are needed there",
            "Free some space, or choose a folder on another disk with --out",
        )


def _convert_pissa(
    tensors: dict[str, torch.Tensor], initial: dict[str, torch.Tensor], config: LoraConfig
) -> dict[str, torch.Tensor]:
    """Return the adapter for the unmodified base, and double the rank in ``config`` at an unchanged scale.

    W + dW = W_res + BA and W = W_res + B0 A0, so dW = BA - B0 A0 = [B, -B0] [A; A0].
    Shapes: A is [r, in] and becomes [2r, in]; B is [out, r] and becomes [out, 2r]. Other tensors stay.
    """
    converted = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            converted[name] = torch.cat([tensor, initial[name].to(tensor.dtype)], dim=0)
        elif ".lora_B." in name:
            converted[name] = torch.cat([tensor, -initial[name].to(tensor.dtype)], dim=1)
        else:
            converted[name] = tensor
    config.r *= 2
    # The scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
    config.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)  # type: ignore[assignment]
    config.init_lora_weights = True
    return converted


def _describe_base(loaded: LoadedModel, resolved: str, held: str, precision: str) -> str:
    """Say into what was merged; ``held`` is the precision in which the base's files hold it."""
    if held not in DTYPES:
        return f"merged into {resolved} unpacked from {held} to {precision}: no 16-bit weights are there"
    if loaded.precision in DTYPES:
        return f"merged into {resolved} in {precision}"
    return (
        f"merged into {resolved} in {precision}; training saw the same weights in {loaded.precision},"
        " so the merged model differs a little from the tuned one"
    )


def _adapter_card(config: LoraConfig) -> str:
    base = str(config.base_model_name_or_path)
    is_local = Path(base).is_absolute()
    # The Hub rejects a card whose base_model is a path.
    front = ["library_name: peft", "pipeline_tag: text-generation", "tags: [lora, medcot]"]
    front += [] if is_local else [f"base_model: {base}"]
    where = "a folder on the machine it was trained on" if is_local else "a model on the Hugging Face Hub"
    loftq = (
        "\nIt was initialised with LoftQ: load the base in 16 bit, and PEFT rounds it to 4 bit as training did.\n"
        if config.init_lora_weights == "loftq"
        else ""
    )
    return (
        "---\n" + "\n".join(front) + "\n---\n# LoRA adapter\n\n"
        f"Made with medcot for the base model `{base}`, {where}. For research and education; not for diagnosis or"
        f" treatment.\n{loftq}\n"
        "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")\n```\n'
        + (
            "\nElsewhere, load the same base yourself and use"
            " `PeftModel.from_pretrained(base, folder)`; for medcot's `embedded` model,"
            " `medcot.model.load('embedded')` makes that base.\n"
            if is_local
            else ""
        )
    )


@contextlib.contextmanager
def _replacing(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a working folder that takes the place of ``folder`` when the block ends well, and vanishes when not."""
    check_free_space(folder, num_bytes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _cannot_write(folder, error) from None
    try:
        work = scratch / "new"
        work.mkdir()
        yield work
        if folder.exists():
            os.replace(folder, scratch / "old")
        os.replace(work, folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _cannot_write(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"'{folder}' cannot be written: {error.strerror or error}",
        "Saving needs a folder this user may write, on a disk with room",
        "Choose another folder with --out",
    )
