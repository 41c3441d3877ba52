"""Settings for every test: poisoned memory, fixed seeds, one warm-up for compilers."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what `torch.empty` returns with NaN, so that an output nobody wrote is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
