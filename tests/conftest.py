"""Settings of every test: poisoned memory and a fixed seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill the memory of `torch.empty` with NaN, so that an unwritten output shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
