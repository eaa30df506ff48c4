"""Tests of the Triton kernels: on a GPU where there is one, else in Triton's interpreter (TRITON_INTERPRET=1, a process of its
own). Where neither is at hand nothing here is collected."""

import pytest
import torch

from libi_fast.kernels import gpu

collect_ignore_glob = [] if gpu.available() else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if gpu.interpreted() else "cuda")


@pytest.fixture(autouse=True, scope="session")
def products_alike_in_every_shape():
    """The interpreter multiplies matrices by numpy, whose BLAS may round a row in another way where the matrix has another
    shape. A product taken in float64 and rounded once shows what the kernel itself does to the bits."""
    if not gpu.interpreted():
        yield
        return
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.create_dot

    def create_dot(self, a, b, d, *options):
        if a.data.dtype != np.float32 or d.data.dtype != np.float32:
            return original(self, a, b, d, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64) + d.data
        return interpreter.TensorHandle(product.astype(np.float32), d.dtype.scalar)

    builder.create_dot = create_dot
    yield
    builder.create_dot = original
