"""What the machine reaches at most with as many threads as torch has: the bounds that our times are a share of.

Arithmetic is measured by a small C++ program of its own (peak.cpp, compiled for this machine when asked for), special functions
by the shortest sequences that the kernels could use; without a compiler by torch's matrix product, multiply-adds alone.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import seconds

SOURCE = Path(__file__).with_name("peak.cpp")
FLAGS = "-O3 -march=native -mprefer-vector-width=512 -ffp-contract=fast -fno-math-errno -fno-trapping-math -std=c++17 -pthread"
NAMES = ("multiply-add", "exp2", "tanh", "sqrt")


@functools.cache
def rates() -> dict[str, Any]:
    """Of each operation how many a second, all threads together; ``by`` says how."""
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    threads = torch.get_num_threads()
    if compiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            program = str(Path(folder) / "peak")
            # Not every compiler knows the vector width's option; nor every processor the one for its own.
            for flags in (FLAGS, FLAGS.replace(" -mprefer-vector-width=512", "")):
                if subprocess.run([compiler, *flags.split(), str(SOURCE), "-o", program], capture_output=True).returncode == 0:
                    printed = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True).stdout
                    return {**dict(zip(NAMES, map(float, printed.split()), strict=True)), "by": "loops in C++ (peak.cpp)"}
    a, b = torch.randn(2, 2048, 2048)
    best = min(seconds(lambda: a @ b) for _ in range(6))
    return {"multiply-add": 2048**3 / best, "by": "torch's product of two matrices (no compiler)"}


def bound(counts: dict[str, float]) -> dict[str, Any]:
    """Seconds that these operations take one after another at the machine's rates; None where a rate is unknown."""
    found = rates()
    known = all(name in found for name in counts)
    at_most = sum(count / found[name] for name, count in counts.items()) if known else None
    of_products = counts["multiply-add"] / found["multiply-add"] if "multiply-add" in counts else None
    return {"seconds": at_most, "multiply-adds alone, seconds": of_products, "counts": counts, "rates": found}


def reading(x: Tensor) -> dict[str, Any]:
    """Seconds of reading x once, by the fastest of torch's reductions of it."""
    flat = x.view(-1)
    readers = {"amax of rows": lambda: x.amax(-1), "sum": lambda: flat.sum(), "dot": lambda: flat.dot(flat)}
    times = {name: min(seconds(run) for _ in range(20)) for name, run in readers.items()}
    by = min(times, key=lambda name: times[name])
    size = x.numel() * x.element_size()
    return {"seconds": times[by], "bytes": size, "bytes a second": size / times[by], "by": f"torch's {by}"}
