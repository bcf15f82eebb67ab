"""``transformers serve`` as a process of its own on 127.0.0.1, and the tiny model that it serves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_S = 120.0
# Opens thinking in the prompt, as DeepSeek-R1's does.
TEMPLATE = "<|user|>{{ messages[-1]['content'] }}<|assistant|>{% if add_generation_prompt %}<think>\n{% endif %}"


def make_served(tiny: Path, folder: Path, family: str = "llama") -> Path:
    """The tiny model so that it can be talked to: a template, draws, only ASCII, and now and then an end of things."""
    shutil.copytree(tiny, folder)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    strange = [i for token, i in vocab.items() if not all(sign.isascii() or sign in "ĠĊ" for sign in token)]
    generation = {"do_sample": True, "bos_token_id": vocab["<s>"], "eos_token_id": vocab["</s>"]}
    generation |= {"pad_token_id": vocab["</s>"], "suppress_tokens": strange}
    generation |= {"sequence_bias": [[[vocab["</think>"]], 1.0], [[vocab["</s>"]], 1.0]]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2048}
    if family != "llama":
        architecture = {"qwen2": "Qwen2ForCausalLM"}[family]
        config |= {"model_type": family, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class RealServer:
    """A server that can be killed and started again, at the same address."""

    def __init__(self, model: Path, log: Path) -> None:
        self.model, self.log, self.num_starts = model, log, 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    def __enter__(self) -> RealServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and return when it answers."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(self.model), "--device", "cpu"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)], stdout=log, stderr=log, env=environment
            )
        self.num_starts += 1
        end = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"transformers serve did not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False
