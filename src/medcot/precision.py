"""Which device computes, and in which precision the base is held there.

``auto`` is 16 bit, never 4: NF4 costs accuracy (it raises the embedded model's loss by 10 % before any training), so it
is taken when a recipe asks for it. On CUDA, auto is bf16 where the GPU computes in it and fp16 on older ones such as
the T4; on a CPU it is bf16 where there are bf16 instructions (AVX-512 BF16 or AMX) and fp32 elsewhere, where bf16 would
be emulated. The CPU's answer is read from PyTorch's list of capabilities and not from a timing, so that a busy machine
gives the same answer as an idle one and a resumed run computes as the first did.
"""

from __future__ import annotations

from typing import Any

import torch

from medcot.errors import ModelError, one_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = ("auto", "nf4", "int8", "fp8", *DTYPES)


def choose_device(device: str = "auto") -> torch.device:
    """Return the device: for ``"auto"`` the current CUDA device, else the CPU.

    Raises:
        ModelError: a device that this machine or this build of PyTorch does not have.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ModelError(f"'{device}' is no device", "A device is auto, cpu or cuda:N", "Use 'auto'") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device '{device}' was asked for and PyTorch sees {torch.cuda.device_count()} CUDA devices",
            "A CUDA device needs an NVIDIA driver and a CUDA build of PyTorch",
            "Use device 'auto' or 'cpu'; 'medcot doctor' shows what PyTorch sees",
        )
    return target


def choose_precision(precision: str, device: torch.device) -> tuple[str, torch.dtype, str | None]:
    """Return the precision that ``auto`` stands for, the dtype of activations, and a sentence where a choice was made.

    For nf4, int8 and fp8 the dtype is the one that ``auto`` would have chosen.

    Raises:
        ModelError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"precision '{precision}'", *one_of(precision, PRECISIONS))
    if precision in DTYPES:
        return precision, DTYPES[precision], None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        name, reason = ("bf16", "this GPU has bf16") if native else ("fp16", "this GPU has no bf16")
    elif device.type == "cpu" and _cpu_is_fast_in_bf16():
        name, reason = "bf16", "this CPU has bf16 instructions"
    else:
        name, reason = "fp32", "no bf16 instructions were found on this processor"
    if precision == "auto":
        return name, DTYPES[name], f"precision auto: {name}, because {reason}"
    return precision, DTYPES[name], None


def _cpu_is_fast_in_bf16() -> bool:
    """Whether the CPU multiplies matrices in bf16 faster than in fp32.

    With AVX-512 BF16, two cores of an AMD EPYC do 850 GFLOP/s in bf16 and 190 in fp32. ARM's bf16 is not counted:
    whether PyTorch uses it depends on how it was built. A PyTorch too old to report capabilities gets the safe answer.
    """
    if "get_capabilities" not in torch.cpu.__all__:
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def quantised_precision(quantization: dict[str, Any]) -> str:
    """Return the precision of an already quantised checkpoint, from the ``quantization_config`` of its config.json."""
    if quantization.get("load_in_4bit"):
        return str(quantization.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if quantization.get("load_in_8bit") else str(quantization.get("quant_method", "quantised"))
