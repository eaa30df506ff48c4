"""The smooth k-NN statistic between p(x) and models of LinearJTEx, as the paper takes it, and what 20,000 repetitions take."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

import libi_fast as lf
from benchmarks.accuracy import LINEAR, mean_and_error
from libi_fast.kernels import cpu as native
from libi_fast.ops.random import Stream

SEEDS = range(10, 15)
REPETITIONS, POINTS = 20_000, 100  # the paper's numbers
KS = (1, 10)
RUNS = 3


def statistic(truth: Any, model: Any, k: int) -> float:
    """The mean over repetitions, each with fresh draws of both."""
    a = truth.sample(REPETITIONS * POINTS, seed=1).float().unflatten(0, (REPETITIONS, POINTS))
    if model is None:
        b = truth.sample(REPETITIONS * POINTS, seed=2).float()
    else:
        b = model.sample(REPETITIONS * POINTS, seed=2)
    return lf.smooth_knn(a, b.unflatten(0, (REPETITIONS, POINTS)), k=k).mean().item()


def run(progress: bool = True) -> dict[str, Any]:
    sets = [lf.data.load("LinearJTEx", seed=s) for s in SEEDS]
    results: dict[str, Any] = {}
    for label, (method, settings, epochs, restarts) in LINEAR["LinearJTEx"].items():
        template = method(sets[0].model(), sets[0].inference(), **settings)
        (row,) = lf.fit_grid([template], sets, epochs=epochs, restarts=restarts, progress=progress)
        results[label] = {
            f"k = {k}, alpha = 1": mean_and_error([statistic(d.truth, m.model, k) for d, m in zip(sets, row, strict=True)])
            for k in KS
        }
    results["two samples of p(x)"] = {f"k = {k}, alpha = 1": statistic(sets[0].truth, None, k) for k in KS}
    return {**results, "repetitions": REPETITIONS, f"seconds for {REPETITIONS} repetitions": seconds()}


def seconds() -> dict[str, Any]:
    """The least of several runs; the reference on fewer repetitions, scaled."""
    a, b = (lf.philox_normal(s, REPETITIONS, 2 * POINTS, stream=Stream.DATA).unflatten(1, (POINTS, 2)) for s in (1, 2))
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "instruction set": native.isa()}
    for k in KS:
        least = {backend: math.inf for backend in ("cpu", "reference") if backend == "reference" or native.available()}
        for backend in [*least] * RUNS:
            count = REPETITIONS if backend == "cpu" else REPETITIONS // 100
            start = time.perf_counter()
            lf.smooth_knn(a[:count], b[:count], k=k, backend=backend)
            least[backend] = min(least[backend], (time.perf_counter() - start) * REPETITIONS / count)
        found[f"k = {k}"] = least
    return found
