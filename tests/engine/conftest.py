from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory handed out uninitialised holds NaN, so that a value never written shows in every comparison."""
    torch.use_deterministic_algorithms(True)  # what makes torch fill it
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
