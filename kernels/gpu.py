"""What every Triton kernel's launcher needs: whether Triton serves here, and the device of a launch.

Importing this asks neither for Triton nor for a GPU; the `gpu.py` of an operation imports Triton and is itself imported when it
is first called. `TRITON_INTERPRET=1`, set before that, runs the kernels on CPU tensors in Triton's interpreter, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def why_unavailable() -> str | None:
    """One line saying why Triton kernels do not serve, or None where they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not (interpreted() or torch.cuda.is_available()):
        return "torch sees no GPU"
    return None


def available() -> bool:
    """Whether Triton kernels serve here."""
    return why_unavailable() is None


def serves(*tensors: Tensor) -> bool:
    """Whether all tensors lie where a Triton kernel can reach them."""
    kind = "cpu" if interpreted() else "cuda"
    return available() and all(t.device.type == kind for t in tensors)


def amd() -> bool:
    """Whether torch was built for AMD GPUs."""
    return torch.version.hip is not None


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context of a launch: the tensor's GPU is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class Launch(NamedTuple):
    """One launch of a Triton kernel, as its launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexpr arguments, num_warps, num_stages


_record: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run ``kernel`` on a grid. Every launch of the library goes through here."""
    if _record is not None:
        _record.append(Launch(kernel, grid, args, options))
        return
    # Explicit, because Triton's interpreter does not take it from the environment.
    kernel[grid](*args, **options, enable_fp_fusion=True)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within the block launches are written down, not run. With tensors on the device "meta" this gives, without a GPU or
    memory, the very configurations that a workload launches."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before
