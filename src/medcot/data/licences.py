"""The licence that a source states: in the head of the card beside it, the only place where data says so by itself.

On the Hub and in folders that come from there, ``README.md`` begins with YAML between two lines of dashes, and
``license:`` in it is an identifier or a list of them (https://huggingface.co/docs/hub/datasets-cards). Nothing else is
read: a licence guessed from prose would be quoted in a model card as if the owner had said it.
"""

from __future__ import annotations

from pathlib import Path

import yaml

CARD = "README.md"
BUILT_IN = "apache-2.0"  # medcot's own problems


def find_licence(name: str, *, revision: str | None = None, token: str | None = None) -> str | None:
    """Return the licence that a file's folder, a folder or a Hub data set states, or ``None`` where none is stated.

    Args:
        name: a path or a Hub id, without a slice.
        revision: of the Hub.
        token: of the Hub.
    """
    path = Path(name).expanduser()
    if path.exists():
        card: Path | None = (path if path.is_dir() else path.parent) / CARD
    else:
        card = _fetch_card(name, revision, token)
    if card is None or not card.is_file():
        return None
    return read_licence(card.read_text(encoding="utf-8", errors="replace"))


def read_licence(card: str) -> str | None:
    """Return the licence in the head of a card, several joined with commas."""
    lines = card.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    ends = [number for number, line in enumerate(lines[1:], start=1) if line.strip() == "---"]
    try:
        head = yaml.safe_load("\n".join(lines[1 : ends[0]])) if ends else None
    except yaml.YAMLError:
        return None  # the card is the owner's; that it is broken is not what the user asked about
    licence = head.get("license") if isinstance(head, dict) else None
    stated = [str(one) for one in licence] if isinstance(licence, list) else [str(licence)] if licence else []
    return ", ".join(stated) or None


def _fetch_card(name: str, revision: str | None, token: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, CARD, repo_type="dataset", revision=revision, token=token))
    except (HfHubHTTPError, LocalEntryNotFoundError):  # no card, or none in the cache while the Hub is out of reach
        return None
