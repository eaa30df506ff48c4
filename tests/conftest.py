"""Fixtures of every test: fresh memory is poisoned, torch's seed is fixed."""

import os

import pytest
import torch

# Tests share two cores with whatever else runs, or with each other (pytest -n 2); more threads than that only fight.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN, so that a value nobody wrote cannot pass for a zero."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
