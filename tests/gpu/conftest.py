"""Tests of the Triton kernels: on a GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, a process of its
own). Where neither is at hand nothing here is collected."""

import pytest
import torch

from libi_fast.kernels import gpu

collect_ignore_glob = [] if gpu.available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if gpu.interpreted() else "cuda")
