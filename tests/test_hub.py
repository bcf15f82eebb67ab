"""Pushing to a Hub on loopback."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from loopback_hub import Fault, LoopbackHub
from medcot.errors import NetworkError, OutputError
from medcot.hub import Delivery, Kind, MismatchError, Verify, deliver, pack, pack_folder, push_folder

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


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the Hub's client would have made."""
    from huggingface_hub.utils import _http

    paused: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", paused.append)
    return paused


def send(
    hub: LoopbackHub, folder: Path, repo: str = "me/model", **options: Any
) -> tuple[Delivery, list[str], list[float]]:
    kind, parcels, _ = pack_folder(folder)
    said: list[str] = []
    waited: list[float] = []
    found = deliver(parcels, kind, repo, token=TOKEN, endpoint=hub.url, tell=said.append, wait=waited.append, **options)
    return found, said, waited


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


def test_large_files_go_through_storage_and_all_appear_in_one_commit(hub: LoopbackHub, merged: Path) -> None:
    (merged / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    hub.part_bytes = 4000
    found, _, _ = send(hub, merged)
    assert [commit.message for commit in hub.commits["me/model"]][1:] == ["Upload merged model with medcot"]
    assert hub.count("PUT /lfs/.*/part/.*") == 3
    assert hub.repos["me/model"]["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert (found.num_files, found.num_changed, found.num_downloaded) == (2, 2, 2)
    assert found.commit == hub.sha("me/model")


def test_the_same_push_again_makes_no_second_commit(hub: LoopbackHub, merged: Path) -> None:
    first, _, _ = send(hub, merged)
    sent = hub.count("PUT .*")
    again, _, _ = send(hub, merged)
    assert (again.commit, again.num_changed, hub.count("PUT .*")) == (first.commit, 0, sent)
    (merged / "config.json").write_text('{"a": 1}')
    third, _, _ = send(hub, merged)
    assert (third.num_changed, len(hub.commits["me/model"])) == (1, 3)


def test_only_files_of_the_artefact_go(hub: LoopbackHub, adapter: Path) -> None:
    for name in ("optimizer.pt", ".env", "notes.txt", "pytorch_model.bin"):
        (adapter / name).write_text("private")
    (adapter / "checkpoint-1").mkdir()
    (adapter / "checkpoint-1" / "adapter_config.json").write_text("{}")
    (adapter / "tokenizer.json").write_text("{}")
    _, parcels, left = pack_folder(adapter)
    assert [parcel.name for parcel in parcels] == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert sorted(left) == [
        ".env",
        "checkpoint-1/adapter_config.json",
        "notes.txt",
        "optimizer.pt",
        "pytorch_model.bin",
    ]
    push(hub, adapter)
    assert set(hub.repos["me/model"]) == {parcel.name for parcel in parcels}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"token": "hf_' + "a" * 34 + '"}', "a Hugging Face token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("key sk-" + "proj-" + "B7" * 20, "an API key"),
        ("ghp_" + "a1" * 18, "a GitHub token"),
        ("AKIA" + "A" * 16, "an AWS key"),
    ],
)
def test_a_file_with_a_token_is_never_sent(hub: LoopbackHub, adapter: Path, text: str, what: str) -> None:
    (adapter / "chat_template.jinja").write_text(text)
    with pytest.raises(OutputError, match=f"'chat_template.jinja' holds {what}") as caught:
        push(hub, adapter)
    assert hub.requests == [] and text not in str(caught.value)


def test_this_machines_own_token_is_found_whatever_it_looks_like(
    hub: LoopbackHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "plainwords12")
    (adapter / "tokenizer_config.json").write_text('{"x": "plainwords12"}')
    with pytest.raises(OutputError, match="a secret of this machine"):
        push(hub, adapter)


def test_a_cut_upload_shows_nothing_and_the_next_push_goes_on(
    hub: LoopbackHub, merged: Path, waits: list[float]
) -> None:
    for part in (1, 2):
        (merged / f"model-0000{part}-of-00002.safetensors").write_bytes(bytes([part]) * 300_000)
    (merged / "model.safetensors").unlink()
    last = pack("x", merged / "model-00002-of-00002.safetensors").sha256
    hub.faults = [Fault(f"PUT /lfs/{last}", after=100_000, times=99)]
    with pytest.raises(NetworkError, match=r"Error while uploading 'model-00002-of-00002.safetensors'") as caught:
        send(hub, merged)
    assert dict(hub.repos["me/model"]) == {} and len(hub.commits["me/model"]) == 1
    assert "same command again" in caught.value.remedy
    hub.faults.clear()
    before = hub.count("PUT .*")
    found, _, _ = send(hub, merged)
    assert hub.count("PUT .*") == before + 1  # the other half was in storage
    assert found.num_changed == len(hub.repos["me/model"]) == 3


def test_a_connection_cut_once_is_mended_by_trying_again(hub: LoopbackHub, merged: Path, waits: list[float]) -> None:
    (merged / "model.safetensors").write_bytes(b"\x02" * 300_000)
    hub.faults = [Fault("PUT /lfs/.*", after=1000), Fault("PUT /lfs/.*", status=503)]
    send(hub, merged)
    assert len(waits) == 2 and len(hub.commits["me/model"]) == 2


@pytest.mark.parametrize("fault", [Fault("", status=500), Fault("", status=503), Fault("", after=50)])
@pytest.mark.parametrize("request_", ["POST /api/models/.*/commit/main", "GET /api/models/.*/tree/.*"])
def test_errors_of_the_moment_are_waited_out(
    hub: LoopbackHub, adapter: Path, waits: list[float], fault: Fault, request_: str
) -> None:
    hub.faults = [Fault(request_, fault.status, fault.after, times=1)]
    found, said, waited = send(hub, adapter)
    assert found.num_changed == 2 and len(hub.commits["me/model"]) == 2
    if request_.startswith("POST"):
        assert waited == [1.0] and said[0].endswith("trying again in 1 s")


@pytest.mark.parametrize("status", [500, None])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: LoopbackHub, adapter: Path, status: int | None) -> None:
    hub.faults = [Fault("POST /api/models/.*/commit/main", status, obeyed=True)]
    found, _, waited = send(hub, adapter)
    assert len(hub.commits["me/model"]) == 2 and waited == [1.0]
    assert (found.commit, found.num_changed) == (hub.sha("me/model"), 2)


def test_somebody_elses_commit_in_between_is_kept(hub: LoopbackHub, adapter: Path) -> None:
    hub.make("me/model")
    inner = hub.answer

    def answer(method: str, path: str, body: bytes) -> Any:
        if path.endswith("/commit/main") and "theirs.txt" not in hub.repos["me/model"]:
            hub.add("me/model", {"theirs.txt": b"first"})
        return inner(method, path, body)

    hub.answer = answer  # type: ignore[method-assign]
    _, said, _ = send(hub, adapter)
    assert "changed by somebody else meanwhile (412)" in said[0]
    assert set(hub.repos["me/model"]) == {"theirs.txt", "adapter_config.json", "adapter_model.safetensors"}


def test_it_gives_up_with_the_last_reason(hub: LoopbackHub, adapter: Path) -> None:
    hub.faults = [Fault("POST /api/models/.*/commit/main", status=500, times=99, words=f"oh {TOKEN}")]
    waited: list[float] = []
    kind, parcels, _ = pack_folder(adapter)
    with pytest.raises(NetworkError, match="answered 500"):
        deliver(parcels, kind, "me/model", token=TOKEN, endpoint=hub.url, wait=waited.append)
    assert waited == [1.0, 4.0, 10.0] and dict(hub.repos["me/model"]) == {}


@pytest.mark.parametrize(
    ("status", "words", "message"),
    [(413, "too large", "no room"), (403, "Private repository storage limit reached", "no room")],
)
def test_a_full_account_is_told_from_a_missing_right(
    hub: LoopbackHub, adapter: Path, status: int, words: str, message: str
) -> None:
    hub.faults = [Fault("POST /api/models/.*/commit/main", status=status, words=words, times=9)]
    with pytest.raises(OutputError, match=message) as caught:
        push(hub, adapter)
    assert "billing" in caught.value.remedy


def test_bytes_that_the_hub_keeps_wrong_are_an_error_that_names_the_file(hub: LoopbackHub, merged: Path) -> None:
    hub.spoil = {"config.json"}  # a small file: the Hub's own hash gives it away
    with pytest.raises(MismatchError, match=r"'config.json' in 'me/model' comes back with other bytes") as caught:
        push(hub, merged)
    assert caught.value.exit_code == 1


def test_a_hub_that_counts_in_its_own_way_is_compared_by_bytes(
    hub: LoopbackHub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medcot.hub.delivery._is_there", lambda *_: False)
    found = send(hub, merged, verify=Verify.HASH)[0]
    assert found.num_downloaded == found.num_files > 1


def test_wrong_bytes_behind_a_right_hash_show_in_a_download_only(
    hub: LoopbackHub, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.spoil = {"model.safetensors"}
    monkeypatch.setattr("medcot.hub.delivery.SMALL_BYTES", 50)
    assert send(hub, merged)[0].num_downloaded == 1
    assert send(hub, merged, verify=Verify.HASH)[0].num_downloaded == 0
    with pytest.raises(MismatchError, match=r"'model.safetensors' in 'me/model' comes back with other bytes"):
        send(hub, merged, verify=Verify.DOWNLOAD)


def test_a_file_that_changes_during_the_push_is_noticed(hub: LoopbackHub, merged: Path) -> None:
    kind, parcels, _ = pack_folder(merged)
    (merged / "model.safetensors").write_bytes(b"\x02" * 100)
    with pytest.raises(MismatchError, match=r"'model.safetensors'"):
        deliver(parcels, kind, "me/model", token=TOKEN, endpoint=hub.url)


def test_shards_of_an_earlier_push_go_away_in_the_same_commit(hub: LoopbackHub, merged: Path) -> None:
    old = {"config.json": b"{}", "model-00001-of-00001.safetensors": b"old", "samples.txt": b"theirs"}
    hub.make("me/model", old)
    found, _, _ = send(hub, merged)
    assert found.removed == ("model-00001-of-00001.safetensors",)
    assert set(hub.repos["me/model"]) == {"config.json", "model.safetensors", "samples.txt"}
    assert len(hub.commits["me/model"]) == 3


def test_weights_in_4_and_16_bit_never_share_a_repository(hub: LoopbackHub, merged: Path) -> None:
    push(hub, merged)
    (merged / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(OutputError, match="already holds 16-bit weights"):
        push(hub, merged)


def test_gguf_files_gather_in_one_repository_and_meet_nothing_else(
    hub: LoopbackHub, merged: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"model-{name}.gguf").write_bytes(name.encode() * 50)
        push(hub, tmp_path / name, "me/ggufs")
    assert set(hub.repos["me/ggufs"]) == {"model-a.gguf", "model-b.gguf"}
    with pytest.raises(OutputError, match="already holds GGUF files"):
        push(hub, merged, "me/ggufs")


def test_a_private_push_refuses_a_public_repository(hub: LoopbackHub, adapter: Path) -> None:
    hub.make("me/model", private=False)
    with pytest.raises(OutputError, match="'me/model' is public") as caught:
        push(hub, adapter)
    assert "--public" in caught.value.remedy and dict(hub.repos["me/model"]) == {}
    assert send(hub, adapter, private=False)[0].private is False


def test_an_existing_private_repository_stays_private(hub: LoopbackHub, adapter: Path) -> None:
    hub.make("me/model", private=True)
    assert send(hub, adapter, private=False)[0].private is True


def test_offline_is_said_as_such(hub: LoopbackHub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()  # a session made before would not know
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    try:
        with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
            push(hub, adapter)
    finally:
        close_session()
    assert hub.requests == []


def test_what_plain_transformers_and_peft_push_is_pulled_back_the_same(hub: LoopbackHub, tiny_folder: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.push_to_hub("me/plain", token=TOKEN)
    AutoTokenizer.from_pretrained(tiny_folder).push_to_hub("me/plain", token=TOKEN)
    pulled: Any = AutoModelForCausalLM.from_pretrained("me/plain")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(pulled(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained("me/plain").encode("ab") == AutoTokenizer.from_pretrained(tiny_folder).encode(
        "ab"
    )
    tuned: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.push_to_hub("me/plain-adapter", token=TOKEN)
    assert torch.equal(PeftModel.from_pretrained(pulled, "me/plain-adapter")(ids).logits, tuned(ids).logits)


def test_what_this_pushes_is_loaded_by_the_plain_library(hub: LoopbackHub, tiny_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    found, _, _ = send(hub, tiny_folder, verify=Verify.DOWNLOAD)
    assert found.num_downloaded == found.num_files
    ids = torch.tensor([[5, 6, 7, 8]])
    pulled, kept = (AutoModelForCausalLM.from_pretrained(place) for place in ("me/model", tiny_folder))
    assert torch.equal(pulled(ids).logits, kept(ids).logits)


def test_kinds_are_known_by_what_loaders_look_for() -> None:
    from medcot.hub.parcels import find_kinds, is_wanted

    assert find_kinds(["adapter_config.json", "README.md"]) == {Kind.ADAPTER}
    assert find_kinds(["config.json", "adapter/adapter_config.json"]) == {Kind.MODEL}
    assert find_kinds(["config.json", "adapter_config.json"]) == {Kind.MODEL, Kind.ADAPTER}
    assert is_wanted("adapter/adapter_model.safetensors", Kind.MODEL) and not is_wanted("adapter/x.pt", Kind.MODEL)
    assert not is_wanted("../config.json", Kind.MODEL)
