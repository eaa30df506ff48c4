"""What training survives and how it scales: kill -9, the published penalties, restarts side by side, two processes, data larger
than memory."""

from __future__ import annotations

import json
import math
import os
import random
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
    data = lf.data.Mobius(seed=10)
    method = lf.LiBI(data.model(), data.inference(), repeats=2)
    options = {"epochs": 240, "restarts": 4, "survivors": 2, "progress": False}
    method.fit(data.train, data.validation, **options, checkpoint=checkpoint, checkpoint_seconds=0.01, resume=True)
    torch.save([method.state(), method.history], result)


def _forked(checkpoint: str, result: str) -> int:
    child = os.fork()
    if child == 0:
        train_mobius(checkpoint, result)
        os._exit(0)
    return child


def kill_fits() -> None:
    """KILLS fits, each killed at a random moment of its life and then resumed to its end. In a process of one thread, whose
    forks begin with everything imported."""
    torch.set_num_threads(1)
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole, result, checkpoint = (f"{folder}/{name}" for name in ("whole", "result", "checkpoint"))
        for _ in range(2):  # the second is timed
            start = time.perf_counter()
            os.waitpid(_forked(f"{folder}/other", whole), 0)
            lifetime = time.perf_counter() - start
        expected = repr(torch.load(whole, weights_only=True)[1])
        state = torch.load(whole, weights_only=True)[0]
        killed = interrupted = same = 0
        while killed < KILLS:
            child = _forked(checkpoint, result)
            time.sleep(moments.uniform(0, lifetime))
            os.kill(child, signal.SIGKILL)
            if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                Path(result).unlink()
                continue  # it had ended before
            killed += 1
            interrupted += Path(checkpoint).exists()
            assert os.waitpid(_forked(checkpoint, result), 0)[1] == 0
            found, history = torch.load(result, weights_only=True)
            same += all(torch.equal(found[k], v) for k, v in state.items()) and repr(history) == expected
            Path(result).unlink()
    print(
        json.dumps(
            {
                "fits killed": killed, "of them with a checkpoint to go on from": interrupted,
                "resumed to the same bits of parameters and history": same,
            }
        )
    )  # fmt: skip


def kills() -> dict[str, Any]:
    return json.loads(_python("kill_fits").communicate()[0])


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
    with torch.no_grad():
        for p in given.system.inference.parameters():
            p.zero_()
        for p in given.model.parameters():
            p.copy_(torch.linspace(-0.3, 0.3, p.numel(), dtype=p.dtype).view_as(p))
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


def _peak_megabytes() -> float:
    """Of this process's resident memory since it began (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def evaluate_mapped(file: str) -> None:
    model = lf.LatentVariableModel(torch.nn.Linear(2, MAPPED_COLUMNS), lf.Gaussian(1.0), 2)
    method = lf.VAE(model, lf.MeanFieldGaussian(torch.nn.Linear(MAPPED_COLUMNS, 4)))
    x = np.load(file, mmap_mode="r")
    before = _peak_megabytes()
    start = time.perf_counter()
    result = method.log_likelihood(x, num_samples=10)
    print(
        json.dumps(
            {
                "bytes": x.nbytes, "rows": len(result.log_likelihood), "seconds": time.perf_counter() - start,
                "peak resident MB": _peak_megabytes(), "of which before the call": before,
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
    return {f.__name__: f() for f in (kills, penalties, processes, mapped, restarts)}


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
