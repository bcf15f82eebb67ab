"""The doctor always answers, tells no secret, and recommends what fits."""

from __future__ import annotations

import json
import re
import types
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest

from medcot import doctor
from medcot.doctor import Status, examine, recommend
from medcot.recipe import build_recipe

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "abcDEF123" * 4

RECIPES = {
    "default": build_recipe({}),
    "tutorial-8b": build_recipe(
        {"model": {"source": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "precision": "nf4"}, "name": "tutorial-8b"}
    ),
    "other-8b": build_recipe({"model": {"source": "someone/Model-8B", "precision": "nf4"}}),
    "qwen-14b": build_recipe({"model": {"source": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "precision": "nf4"}}),
    "llama-70b": build_recipe({"model": {"source": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "precision": "nf4"}}),
}


def test_every_area_is_examined_and_no_secret_is_told(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    findings = examine()
    assert {finding.area for finding in findings} >= set(doctor.AREAS)
    text = json.dumps([asdict(finding) for finding in findings])
    assert TOKEN not in text and "environment variable HF_TOKEN" in text


def test_an_area_that_breaks_is_a_finding(monkeypatch):
    def broken() -> list[doctor.Finding]:
        raise OSError(f"libcudart is missing; {TOKEN}")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(doctor, "AREAS", {"torch": broken, "network": doctor._look_at_network})
    first, second = examine()
    assert first.status is Status.PROBLEM and "libcudart is missing" in first.text and TOKEN not in first.text
    assert second.area == "network"


@pytest.mark.parametrize(
    ("memory_gb", "expected"),
    [
        (0, "'medcot run' trains the embedded model on the CPU"),
        (4, "'medcot run' trains the embedded model on it"),
        (16, "'medcot run tutorial-8b' fits"),
        (24, "'medcot run qwen-14b' fits"),
        (80, "'medcot run llama-70b' fits"),
    ],
)
def test_recommendation_follows_the_memory(memory_gb, expected):
    assert expected in recommend(memory_gb, RECIPES)


def test_fp8_is_named_where_the_card_multiplies_in_it():
    assert "up to 14 B train faster" in recommend(141, RECIPES, multiplies_fp8=True)
    assert "up to 8 B train faster" in recommend(30, RECIPES, multiplies_fp8=True)
    assert "fp8" not in recommend(141, RECIPES) and "fp8" not in recommend(4, RECIPES, multiplies_fp8=True)


@pytest.mark.parametrize(
    ("source", "billions"),
    [
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.5),
        ("unsloth/DeepSeek-R1-Distill-Llama-8B-unsloth-bnb-4bit", 8),
        ("embedded", 0),
        ("folder-70B/tiny", 0),
    ],
)
def test_size_is_read_from_the_name(source, billions):
    assert doctor._billions(source) == billions


@pytest.mark.parametrize(("free_gb", "status"), [(1, Status.PROBLEM), (10, Status.NOTE), (100, Status.OK)])
def test_disk(monkeypatch, free_gb, status):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2e12, 0, free_gb * 1e9))
    assert {finding.status for finding in doctor._look_at_disk()} == {status}


def test_cpu_build_beside_a_gpu_is_a_problem(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (finding,) = doctor._look_at_torch()
    assert finding.status is Status.PROBLEM and "lies idle" in finding.text


def test_a_gpu_is_described_and_a_busy_one_is_noted(monkeypatch):
    import torch

    t4 = types.SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15.8e9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: t4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ([15.1e9, 3e9][index], 15.8e9))
    free, busy, _ = doctor._look_at_devices()
    assert free == doctor.Finding("gpu", Status.OK, "cuda:0 Tesla T4, 16 GB (15 free), compute capability 7.5")
    assert busy.status is Status.NOTE and "another process uses it" in busy.text


def test_libraries_missing_outside_and_untested(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: ["torch>=2.11", "trl>=1.15", "peft>=0.21", "wandb; extra == 'wandb'"]
    )

    def version(name: str) -> str:
        if name == "peft":
            raise doctor.metadata.PackageNotFoundError(name)
        return {"torch": "2.11.0+cu130", "trl": "1.0"}[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = [(finding.status, finding.text.split(";")[0]) for finding in doctor._look_at_libraries()]
    assert found == [
        (Status.NOTE, "torch 2.11.0+cu130"),
        (Status.PROBLEM, "trl 1.0 is outside >=1.15"),
        (Status.PROBLEM, "peft is not installed"),
    ]


def test_a_name_spelt_with_a_hyphen_is_the_same_library(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["huggingface-hub>=1.30"])
    monkeypatch.setattr(doctor.metadata, "version", lambda name: doctor.TESTED["huggingface_hub"])
    (finding,) = doctor._look_at_libraries()
    assert finding.text == f"as tested: huggingface_hub {doctor.TESTED['huggingface_hub']}"


def test_bitsandbytes_that_cannot_load_is_no_crash(monkeypatch):
    def refuse(name: str) -> types.ModuleType:
        raise RuntimeError("native library not available\nlong traceback")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    (finding,) = doctor._look_at_bitsandbytes()
    assert finding.status is Status.NOTE and "(native library not available)" in finding.text


def test_offline_is_said(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (finding,) = doctor._look_at_network()
    assert "offline by HF_HUB_OFFLINE" in finding.text


def test_tested_versions_are_those_of_the_constraints_file():
    path = ROOT / "constraints.txt"
    if not path.exists():
        pytest.skip("constraints.txt is not part of an installed package")
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), flags=re.MULTILINE))
    pinned = {name.lower().replace("-", "_"): version for name, version in pinned.items()}
    for name, version in doctor.TESTED.items():
        assert pinned.get(name) == version, name
