"""A TRL ``SFTTrainer`` of the user's own over an accelerated model on CUDA. Run with ``-m gpu``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from bare_trainer import NUM_STEPS, SETTINGS, build_on, count, train_bare
from medcot.engine import engine_of
from medcot.engine.memory import Keep
from tiny_models import attach, build_base, distance, gradients, pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error:an accelerated model runs its plain forward"),
]


@pytest.mark.parametrize("case", SETTINGS)
def test_a_bare_trainer_in_bfloat16(
    case: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast on, as TRL has it; TRL warns of packed rows without flash attention, but masks keep them apart."""
    settings, keep = SETTINGS[case]
    fast, plain = pair(build_on(model_folder, torch.bfloat16, "cuda"))
    kept = count(fast, monkeypatch)
    wanted = train_bare(plain, model_folder, tmp_path / "plain", **settings)
    got = train_bare(fast, model_folder, tmp_path / "fast", **settings)
    assert len(got) == NUM_STEPS and set(kept) == {keep}
    assert len(kept) == 2 * NUM_STEPS or (case == "packed" and len(kept) >= NUM_STEPS)  # few rows when packed
    assert got == pytest.approx(wanted, rel=2e-2)  # bfloat16's rounding, through three steps of AdamW
    assert got[0] == pytest.approx(wanted[0], rel=5e-3)
    assert got[-1] < got[0]


def test_a_bare_trainer_in_float32(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("highest")
    fast, plain = pair(build_on(model_folder, torch.float32, "cuda"))
    kept = count(fast, monkeypatch)
    wanted = train_bare(plain, model_folder, tmp_path / "plain", bf16=False)
    got = train_bare(fast, model_folder, tmp_path / "fast", bf16=False)
    assert len(kept) == 2 * NUM_STEPS
    assert got == pytest.approx(wanted, rel=1e-4)


def test_a_model_that_the_trainer_moves_is_fast_there(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded and accelerated on the CPU, as ``from_pretrained`` leaves it; the trainer puts it on the GPU."""
    fast, plain = pair(build_on(model_folder, torch.bfloat16))
    kept = count(fast, monkeypatch)
    got = train_bare(fast, model_folder, tmp_path / "fast")
    engine: Any = engine_of(fast)
    assert engine.device.type == "cuda" and len(kept) == 2 * NUM_STEPS
    assert got == pytest.approx(train_bare(plain, model_folder, tmp_path / "plain"), rel=2e-2)


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_a_loop_of_ones_own_under_autocast(left: bool, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attach(build_base("llama", torch.bfloat16).cuda()).train()
    exact = copy.deepcopy(plain).float()
    fast, plain = pair(plain)
    kept = count(fast, monkeypatch)
    lengths = torch.tensor([23, 2, 140, 9])
    slots = torch.arange(140).expand(4, -1)
    mask = (slots >= 140 - lengths[:, None]) if left else (slots < lengths[:, None])
    ids = torch.randint(3, 97, (4, 140), generator=torch.Generator().manual_seed(3))
    first = slots == ((140 - lengths)[:, None] if left else 0)
    labels = ids.masked_fill(~mask | first, -100)
    batch = {"input_ids": ids.cuda(), "attention_mask": mask.long().cuda(), "labels": labels.cuda()}
    exact(**batch).loss.backward()
    wanted, off = gradients(exact), []
    for model in (fast, plain):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        off.append(distance(gradients(model), wanted))
    assert kept == [Keep.ALL]
    assert off[0] < 1.5 * off[1]
