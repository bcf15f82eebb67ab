"""What the tests of the tutorial's names share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def nothing_said_before() -> Iterator[None]:
    """Each test hears every sentence, and leaves no token behind."""
    from medcot.compat.notes import say_once
    from medcot.secrets import SecretName, take_secret

    say_once.cache_clear()
    yield
    take_secret(SecretName.HUGGING_FACE, None, "")
