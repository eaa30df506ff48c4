"""What training survives and how it scales: kill -9, the published penalties, restarts side by side, two processes, data larger
than memory."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import libi_fast as lf
from libi_fast.training import libi as libi_module

KILLS = 50
MAPPED_BYTES = 10 * 2**30
MAPPED_COLUMNS = 784


def _python(program: str, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
    """Another process that runs a function of this file: its name and arguments."""
    command = [sys.executable, "-m", "benchmarks.robustness", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


# --- kill -9 ---


def train_mobius(checkpoint: str, result: str) -> None:
    """LiBI on Mobius, checkpoints as often as possible."""
    torch.set_num_threads(1)
    data = lf.data.Mobius(seed=10)
    method = lf.LiBI(data.model(), data.inference(), repeats=2)
    options = {"epochs": 240, "restarts": 4, "survivors": 2, "progress": False}
    method.fit(data.train, data.validation, **options, checkpoint=checkpoint, checkpoint_seconds=0.05, resume=True)
    torch.save([method.state(), method.history], result)


def kills() -> dict[str, Any]:
    """Kill a fit at a random moment of its life, again and again until it has ended; KILLS kills in all."""
    moments = random.Random(0)
    killed = fits = same = 0
    with tempfile.TemporaryDirectory() as folder:
        whole, result, checkpoint = (f"{folder}/{name}" for name in ("whole", "result", "checkpoint"))
        start = time.perf_counter()
        assert _python("train_mobius", f"{folder}/other", whole).wait() == 0
        lifetime = time.perf_counter() - start
        expected = repr(torch.load(whole, weights_only=True))
        expected_state = torch.load(whole, weights_only=True)[0]
        while killed < KILLS:
            process = _python("train_mobius", checkpoint, result)
            try:
                process.wait(moments.uniform(0, lifetime))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed += 1
                if killed < KILLS:
                    continue
                assert _python("train_mobius", checkpoint, result).wait() == 0
            fits += 1
            state, history = torch.load(result, weights_only=True)
            equal = all(torch.equal(state[k], v) for k, v in expected_state.items())
            same += equal and repr([state, history]) == expected
            Path(result).unlink()
    return {"kills": killed, "fits that ended": fits, "of them with the bits of one never killed": same}


# --- penalties ---


@contextmanager
def _raw_exp() -> Iterator[None]:
    original, libi_module.safe_exp = libi_module.safe_exp, torch.exp
    try:
        yield
    finally:
        libi_module.safe_exp = original


def penalties() -> dict[str, Any]:
    """Restarts of LiBI on Mobius, published penalties and 30,000 epochs, whose objective was ever NaN or infinite."""
    data = lf.data.Mobius(seed=10)
    plain = {"whiten": False, "warm_up": 0, "candidates": 1}
    results = {}
    for label, settings, raw, epochs in [
        ("library's defaults", {}, False, 30_000),
        ("plain start, safe exponential", plain, False, 3000),
        ("plain start, raw exponential", plain, True, 3000),
    ]:
        method = lf.LiBI(data.model(), data.inference(), **settings)
        with warnings.catch_warnings(), _raw_exp() if raw else warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                method.fit(data.train, data.validation, epochs=epochs, restarts=20, progress=False)
                fallen = len({h["restart"] for h in method.history if "non_finite" in h})
            except FloatingPointError:
                fallen = 20
        results[label] = {"epochs": epochs, "restarts": 20, "non-finite": fallen}
    return results


# --- restarts ---


def restarts() -> dict[str, Any]:
    """32 restarts side by side against 32 fits in sequence, each with its best of two threads or one."""
    results: dict[str, Any] = {}
    before = torch.get_num_threads()
    for name in ("LinearJTEx", "CubicJTEx", "Mobius"):
        data = lf.data.load(name, seed=10)
        options = {"epochs": 300, "seed": 0, "progress": False}
        best: dict[str, float] = {"side by side": math.inf, "in sequence": math.inf}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            together = lf.LiBI(data.model(), data.inference(), repeats=1, candidates=1)
            start = time.perf_counter()
            together.fit(data.train, data.validation, restarts=32, **options)
            best["side by side"] = min(best["side by side"], time.perf_counter() - start)
            scores = []
            start = time.perf_counter()
            for r in range(32):
                # The seed of restart r within the batch, and its random numbers.
                alone = _Restart(data.model(), data.inference(), r, repeats=1, candidates=1)
                alone.fit(data.train, data.validation, restarts=1, **options)
                scores.append(alone.history[-1]["objective"][0])
            best["in sequence"] = min(best["in sequence"], time.perf_counter() - start)
        selection = together.history[-1]
        results[name] = {
            "seconds": best, "ratio": best["in sequence"] / best["side by side"],
            "same restart selected": selection["restart"] == int(np.argmin(scores)),
            "largest relative difference of objectives": max(
                abs(a - b) / abs(a) for a, b in zip(scores, selection["objective"], strict=True)
            ),
        }  # fmt: skip
    torch.set_num_threads(before)
    return results


class _Restart(lf.LiBI):
    """Restart ``number`` of a batch, alone."""

    def __init__(self, model: Any, inference: Any, number: int, **settings: Any):
        super().__init__(model, inference, **settings)
        self.number = number

    def _systems(self, restarts: int, seed: int) -> list[Any]:
        return super()._systems(self.number + 1, seed)[-1:]

    def _stages(self, run: Any, epochs: int) -> list[Any]:
        run.replicas.own["ids"] += self.number
        return super()._stages(run, epochs)


# --- processes ---


def fit_in_process(rank: str, world: str, port: str, name: str, dtype: str, result: str) -> None:
    torch.set_num_threads(1)
    if int(world) > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=int(world)
        )
    data = lf.data.load(name, seed=10, dtype=getattr(torch, dtype))
    method = lf.LiBI(data.model(), data.inference(), repeats=1)
    method.fit(data.train, data.validation, epochs=200, progress=False)
    likelihood = method.log_likelihood(data.test).log_likelihood
    given = lf.VAE(data.model(), data.inference())  # the same decoder in both, and q the prior: only the draws could differ
    ramp = {k: torch.linspace(-0.3, 0.3, v.numel(), dtype=v.dtype).view_as(v) for k, v in given.state().items()}
    given.load_state({k: v if k.startswith("model.") else 0 * v for k, v in ramp.items()})
    draws = given.log_likelihood(data.test, num_samples=64).log_likelihood
    if rank == "0":
        torch.save([method.state(), likelihood, draws], result)
    if int(world) > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def processes() -> dict[str, Any]:
    """A fit of 200 epochs and its evaluation in one process and in two."""
    results: dict[str, Any] = {}
    for name, dtype in [(n, d) for n in ("LinearJTEx", "Mobius", "CubicJTEx") for d in ("float64", "float32")]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            for world in (1, 2):
                running = [
                    _python("fit_in_process", rank, world, port, name, dtype, f"{folder}/{world}") for rank in range(world)
                ]
                codes = [p.wait() for p in running]
                assert not any(codes)
            (one, one_ll, one_draws), (two, two_ll, two_draws) = (
                torch.load(f"{folder}/{w}", weights_only=True) for w in (1, 2)
            )
        results[f"{name}, {dtype}"] = {
            "largest relative difference of a parameter tensor": max(
                float((one[k] - two[k]).norm() / one[k].norm()) for k in one
            ),
            "largest difference of a log-likelihood, nats": float((one_ll - two_ll).abs().max()),
            "and with the same parameters (64 draws each)": float((one_draws - two_draws).abs().max()),
        }
    return results


# --- data larger than memory ---


def evaluate_mapped(file: str) -> None:
    model = lf.LatentVariableModel(torch.nn.Linear(2, MAPPED_COLUMNS), lf.Gaussian(1.0), 2)
    method = lf.VAE(model, lf.MeanFieldGaussian(torch.nn.Linear(MAPPED_COLUMNS, 4)))
    x = np.load(file, mmap_mode="r")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = method.log_likelihood(x, num_samples=10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "bytes": x.nbytes, "rows": len(result.log_likelihood), "seconds": time.perf_counter() - start,
                "peak resident MB": peak / 1024, "of which before the call": before / 1024,
                "finite": bool(torch.isfinite(result.log_likelihood).all()),
            }
        )
    )  # fmt: skip


def mapped() -> dict[str, Any]:
    """Evaluate a .npy file of 10 GB of random numbers, memory-mapped."""
    rows = MAPPED_BYTES // (4 * MAPPED_COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/x.npy"
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, MAPPED_COLUMNS)}
        generator = np.random.default_rng(0)
        with open(file, "wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for start in range(0, rows, 2**14):
                n = min(2**14, rows - start)
                generator.standard_normal((n, MAPPED_COLUMNS), dtype=np.float32).tofile(out)
        process = _python("evaluate_mapped", file)
        output, _ = process.communicate()
    return json.loads(output)


def run() -> dict[str, Any]:
    return {f.__name__: f() for f in (restarts, kills, penalties, processes, mapped)}


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
