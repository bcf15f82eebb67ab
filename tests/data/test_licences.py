"""The licence a source states, and nothing that it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from medcot.data.licences import find_licence, read_licence


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# Data\n", "mit"),
        ("\ufeff---\nlicense:\n- cc-by-4.0\n- mit\n---\n", "cc-by-4.0, mit"),
        ("---\npretty_name: x\n---\nlicense: mit", None),
        ("# Data\nlicense: mit\n", None),
        ("---\nlicense: mit\n", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense:\n---\n", None),
        ("", None),
    ],
)
def test_only_the_head_of_a_card_counts(card: str, licence: str | None) -> None:
    assert read_licence(card) == licence


def test_the_card_lies_beside_a_file_and_in_a_folder(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    assert find_licence(str(rows)) is None
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    assert find_licence(str(rows)) == find_licence(str(tmp_path)) == "cc0-1.0"


def test_a_data_set_that_is_not_to_be_had_states_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_licence("nobody/nothing-of-this-name") is None
