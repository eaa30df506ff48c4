"""W1: log_mean_exp of [2048, 5000] float32 against torch eager and torch.compile, and the bandwidth of one read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import libi_fast as lf

TOLERANCE = 1e-5
REPEATS = 15


def interleaved(functions: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Best and median milliseconds of each, taken in turns after a warm-up."""
    times: dict[str, list[float]] = {k: [] for k in functions}
    for turn in range(REPEATS + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {k: {"best ms": min(v), "median ms": sorted(v)[len(v) // 2]} for k, v in times.items()}


def run(rows: int = 2048, samples: int = 5000) -> dict[str, Any]:
    x = lf.philox_normal(0, rows, samples) * 30

    def eager(x: Tensor) -> Tensor:
        return torch.logsumexp(x, -1) - math.log(samples)

    forms: dict[str, Callable[[Tensor], Tensor]] = {"libi_fast": lf.log_mean_exp, "torch eager": eager}
    forms["torch.compile"] = torch.compile(eager)
    truth = eager(x.double())
    for name, form in forms.items():
        error = (form(x).double() - truth).abs().max().item()
        if not error <= TOLERANCE * truth.abs().max().item():
            raise RuntimeError(f"{name} is wrong by {error}: no speed is quoted for a wrong answer")
    times = interleaved({k: lambda f=f: f(x) for k, f in forms.items()} | {"one read (amax)": lambda: x.amax(-1)})
    fastest = min(times[k]["best ms"] for k in forms if k != "libi_fast")
    return {
        "shape": [rows, samples], "times": times,
        "ratio to the fastest peer": fastest / times["libi_fast"]["best ms"],
        "share of read bandwidth": times["one read (amax)"]["best ms"] / times["libi_fast"]["best ms"],
    }  # fmt: skip
