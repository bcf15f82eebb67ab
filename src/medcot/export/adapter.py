"""The adapter in PEFT's format, for the base as its makers published it.

Two traps are avoided on purpose:

- **PiSSA changes the base.** It moves the strongest directions of the weights into the adapter, so the tuned adapter
  fits only the residual base. It is saved converted, as A' = [A; A0], B' = [B, -B0] at twice the rank, which added to
  the *unmodified* base gives the tuned model (https://huggingface.co/docs/peft/developer_guides/lora#pissa). PEFT's own
  conversion needs the initial adapter in a folder, loads it into the model being saved, and drops trained biases; ours
  works on the tensors.
- **An adapter beside merged weights is applied twice** by transformers 5, which loads any adapter it finds. So the two
  never share a folder.

A LoftQ adapter is saved as it is: its base is the 4-bit rounding of the named model, and PEFT repeats that rounding
from the adapter's configuration whenever it loads the adapter onto the 16-bit base.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file

from medcot.errors import OutputError
from medcot.export.places import SLACK, TOKENIZER_BYTES, replacing
from medcot.model import initial_pissa_weights
from medcot.quiet import quiet_libraries

with quiet_libraries():
    from peft import get_peft_model_state_dict

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedTokenizerBase

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


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
    with replacing(folder, estimate_adapter_bytes(model, init=init)) as work:
        save_file(tensors, work / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(work))
        with quiet_libraries():
            tokenizer.save_pretrained(work)
        (work / "README.md").write_text(_adapter_card(config), encoding="utf-8")
    return folder


def estimate_adapter_bytes(model: PeftModel, *, init: str = "default") -> int:
    """Return the bytes an adapter folder takes: trained weights in fp32 (twice for a converted PiSSA) and tokenizer."""
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return int(num_trained * 4 * (2 if init == "pissa" else 1) * SLACK) + TOKENIZER_BYTES


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
