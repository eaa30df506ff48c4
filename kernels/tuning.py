"""Opt-in choice of launch configurations by measurement.

Every kernel has a fixed configuration, reasoned from its bound. With ``LIBI_FAST_TUNE=1`` the first call of a problem's shape
times a few others on the GPU at hand and keeps the fastest, for later processes too, in the JSON file ``LIBI_FAST_TUNING_FILE``
(default: tuning.json in the user's cache folder). A configuration is block sizes, warps and stages: no drawn number depends on
it, sums may differ in their last bits.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Configuration = dict[str, int]


def enabled() -> bool:
    return os.environ.get("LIBI_FAST_TUNE", "0") not in ("", "0")


def path() -> Path:
    """The file that holds what was measured."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LIBI_FAST_TUNING_FILE") or Path(cache) / "libi_fast" / "tuning.json")


def choose(
    kernel: str, problem: Mapping[str, Any], candidates: Sequence[Configuration], run: Callable[[Configuration], Any]
) -> Configuration:
    """The first candidate, which is the fixed one; with tuning on, the fastest for this kernel, problem and GPU.

    Args:
        problem: what the best choice may depend on; sizes count by their power of two.
        run: launches the kernel; it is called several times with every candidate, so it must not read what it writes.
    """
    if not enabled() or len(candidates) == 1:
        return candidates[0]
    key = " ".join([kernel, *(f"{name}={_rounded(value)}" for name, value in problem.items())])
    known = _load(path()).setdefault(_machine(), {})
    if known.get(key) not in candidates:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return candidates[0]  # nothing can be timed inside a graph
        known[key] = min(candidates, key=lambda candidate: _milliseconds(lambda: run(candidate)))
        _save(path())
    return known[key]


def _rounded(value: Any) -> Any:
    return 1 << (value - 1).bit_length() if isinstance(value, int) and not isinstance(value, bool) and value > 0 else value


def _machine() -> str:
    import triton

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return f"{name}, triton {triton.__version__}"


def _milliseconds(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(run, warmup=10, rep=50, return_mode="median")
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


@functools.cache
def _load(file: Path) -> dict[str, dict[str, Configuration]]:
    """{GPU and Triton's version: {kernel and problem: configuration}}; read once a process, then kept up to date here."""
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        warnings.warn(f"{file} is not JSON ({error}); configurations are measured anew", stacklevel=2)
        return {}


def _save(file: Path) -> None:
    """Whole or not at all: other processes may read it, and the last to write wins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as scratch:
        json.dump(_load(file), scratch, indent=1, sort_keys=True)
    os.replace(scratch.name, file)
