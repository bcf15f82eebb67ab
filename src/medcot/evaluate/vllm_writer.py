"""vLLM as a ``Writer``, where it is installed.

vLLM is an option and never a dependency: it brings a torch of its own and runs on Linux with a GPU. Its module is
handed in rather than imported, so that the tests can hand in another, and that nobody pays for the import who does not
use it. Prompts go in as ids and answers come out as ids: its own tokenizer and chat template, which would delete what
they like, have no part in it. It batches by itself, so a batch here is only how often answers are kept.

Sources: vllm.LLM.generate with ``prompt_token_ids``, vllm.SamplingParams, vllm.lora.request.LoRARequest.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medcot.errors import MissingExtraError, ModelError
from medcot.evaluate.backends import Draws
from medcot.generate import Generated, OnWritten
from medcot.records import Finish


def load_vllm() -> Any:
    """Import vLLM.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            "vllm is not installed",
            "This back end needs it",
            "Install it with pip install vllm, or take the local back end",
        )
    importlib.import_module("vllm.lora.request")  # vllm alone need not load it
    return importlib.import_module("vllm")


class VllmWriter:
    """A model held by vLLM.

    Args:
        vllm: its module.
        model: a Hub id or folder of whole weights.
        adapter: a folder with a PEFT adapter.
        adapter_rank: its rank, which vLLM wants to know in advance.
        settings: further ones of ``vllm.LLM``.
    """

    def __init__(
        self, vllm: Any, model: str, *, adapter: Path | None = None, adapter_rank: int = 16, **settings: Any
    ) -> None:
        self._vllm = vllm
        self._adapter = vllm.lora.request.LoRARequest("adapter", 1, str(adapter)) if adapter is not None else None
        lora = {} if adapter is None else {"enable_lora": True, "max_lora_rank": adapter_rank}
        self._llm = vllm.LLM(model=model, **lora, **settings)

    def without_adapter(self) -> VllmWriter:
        """Return the plain base, held by the same vLLM."""
        plain = copy.copy(self)
        plain._adapter = None
        return plain

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        rooms: Sequence[int],
        sampling: Draws,
        seeds: Sequence[int],
        on_written: OnWritten,
        *,
        batch_size: int,
    ) -> None:
        """Continue each prompt until EOS or its room is full; each is drawn from its own seed."""
        params = [
            self._vllm.SamplingParams(
                temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=room, seed=seed, detokenize=False
            )
            for room, seed in zip(rooms, seeds, strict=True)
        ]
        prepared = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        for start in range(0, len(prompts), batch_size):
            some = slice(start, start + batch_size)
            outputs = self._llm.generate(prepared[some], params[some], lora_request=self._adapter, use_tqdm=False)
            for place, output in enumerate(outputs, start):
                on_written(place, _read(output.outputs[0]))

    def score(self, prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> list[list[float]]:
        """Refuse: vLLM tells the log-probabilities of the likeliest tokens only.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "Likelihoods were asked of vLLM",
            "It tells those of the likeliest tokens only, and a choice may not be among them",
            "Take the local back end, or let the answers be written (ending=forced)",
        )


def _read(output: Any) -> Generated:
    return list(output.token_ids), Finish.LENGTH if output.finish_reason == "length" else Finish.EOS
