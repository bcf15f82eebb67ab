"""Pushing to a Hub on loopback."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from medcot.errors import NetworkError, OutputError
from medcot.hub import push_folder

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub

TOKEN = "hf_" + "t" * 34


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    return folder


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x01" * 100)
    return folder


def push(hub: LoopbackHub, folder: Path, repo: str = "me/model", **options: bool) -> str:
    return push_folder(folder, repo, token=TOKEN, endpoint=hub.url, **options)


@pytest.mark.parametrize("private", [True, False])
def test_a_pushed_folder_arrives_whole(hub: LoopbackHub, adapter: Path, private: bool) -> None:
    assert push(hub, adapter, private=private) == f"{hub.url}/me/model"
    sent = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert sent.items() <= hub.repos["me/model"].items()
    assert hub.private["me/model"] is private


def test_pushing_again_updates_the_same_repository(hub: LoopbackHub, adapter: Path) -> None:
    push(hub, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"new")
    push(hub, adapter)
    assert hub.repos["me/model"]["adapter_model.safetensors"] == b"new"


def test_adapter_and_merged_weights_never_share_a_repository(hub: LoopbackHub, adapter: Path, merged: Path) -> None:
    push(hub, adapter)
    before = dict(hub.repos["me/model"])
    with pytest.raises(OutputError, match="already holds an adapter"):
        push(hub, merged)
    assert hub.repos["me/model"] == before
    push(hub, merged, "me/merged")
    with pytest.raises(OutputError, match=r"already holds a model \(config.json\)"):
        push(hub, adapter, "me/merged")
    (adapter / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="neither an adapter nor a model alone"):
        push(hub, adapter, "me/third")
    assert "me/third" not in hub.repos


def test_nothing_to_push_is_an_error(hub: LoopbackHub, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OutputError, match="neither"):
            push(hub, folder)
    assert hub.requests == []


def test_no_token_says_how_to_log_in(hub: LoopbackHub, adapter: Path) -> None:
    with pytest.raises(OutputError, match="hf auth login"):
        push_folder(adapter, "me/model", endpoint=hub.url)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "does not accept the token"), (403, "may not write"), (404, "may not write")],
)
def test_refusals_say_what_to_do_and_never_the_token(
    hub: LoopbackHub, adapter: Path, status: int, message: str
) -> None:
    hub.deny = (status, {})
    with pytest.raises(OutputError, match=message) as caught:
        push(hub, adapter)
    assert TOKEN not in str(caught.value) and "settings/tokens" in caught.value.remedy


def test_no_network_is_a_network_error(hub: LoopbackHub, adapter: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(NetworkError, match="does not answer"):
            push_folder(adapter, "me/model", token=TOKEN, endpoint=endpoint)


def test_a_bad_repository_id_is_an_error(hub: LoopbackHub, adapter: Path) -> None:
    with pytest.raises(OutputError):
        push(hub, adapter, "me/not/an/id")
