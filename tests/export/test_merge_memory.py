"""Merging passes a checkpoint through: its peak memory is far below two shards, however many there are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tiny_models import attach, build_base

SHARD = 40_000_000
PROGRAM = """
import json, sys, torch
from pathlib import Path
from transformers import AutoTokenizer
from medcot import merging
from medcot.export import merged

base_folder, adapter, out, kind, shard = sys.argv[1:]
merging.SHARD_BYTES = int(shard)
merging.PIECE_WEIGHTS = merged.PIECE_WEIGHTS = 2**20  # a model 50 times smaller than a distill, and its pieces with it
base = merged.Base(base_folder, None, "bf16", torch.bfloat16, 10**8, AutoTokenizer.from_pretrained(base_folder))
if kind == "merged-4bit":
    import bitsandbytes.functional as bnb
    bnb.quantize_4bit(torch.zeros(64, 64), compress_statistics=True, quant_type="nf4")  # its library is loaded once
if kind == "whole model":
    merged.find_updates = lambda *_: None

def read(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports, is forgotten
before = read("VmRSS:")
merged.merge(base, Path(adapter), Path(out), dtype=torch.bfloat16)
print(json.dumps({"grown": read("VmHWM:") - before}))
"""


@pytest.fixture(scope="module")
def parts(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in five shards, and an adapter for it."""
    root = tmp_path_factory.mktemp("memory")
    base = build_base("llama", vocab_size=2048, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                      num_key_value_heads=4).bfloat16()  # fmt: skip
    base.save_pretrained(root / "base", max_shard_size=SHARD)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(root / "base")
    attach(base).save_pretrained(root / "adapter")
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["merged-16bit", "whole model"])
def test_peak_memory_is_at_most_two_shards(parts: Path, tmp_path: Path, kind: str) -> None:
    shards = sorted((parts / "base").glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in shards)
    assert len(shards) >= 5
    command = [sys.executable, "-c", PROGRAM, parts / "base", parts / "adapter", tmp_path / "out", kind, SHARD]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])["grown"]
    print(f"{kind}: grew by {grown / 1e6:.0f} MB; a shard has {SHARD / 1e6:.0f}, the model {whole / 1e6:.0f}")
    if kind == "whole model":  # the way that is not taken, which shows that the measure measures
        assert grown > whole / 2
    else:
        assert grown <= 2 * SHARD < whole / 2
