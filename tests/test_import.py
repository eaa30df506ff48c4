"""Importing the package and loading the compiled library change nothing else in the process."""

import json
import subprocess
import sys

import pytest

STATE = """
import hashlib, json, sys, threading
import numpy as np
import torch

def subnormals():
    # Read from a file or argument in real life: here from arrays, so that nothing is folded at compile time.
    small, one = float(sys.argv[1]), float(sys.argv[2])
    singles = torch.full((64,), 1e-38) * torch.full((64,), 1e-5)  # 64: vector code as well
    return [small * one, (torch.full((64,), small, dtype=torch.float64) * one).min().item(), singles.min().item(),
            (np.full(64, small) * one).min().item(), (np.full(64, 1e-38, np.float32) * np.float32(1e-5)).min().item()]

def state():
    found = {}
    thread = threading.Thread(target=lambda: found.update(other=subnormals()))
    thread.start()
    thread.join()
    return {
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "main thread": subnormals(), "new thread": found["other"],
        "dtype": str(torch.get_default_dtype()), "device": str(torch.get_default_device()),
        "generators": [hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(), repr(np.random.get_state()[1][:9])],
        "modes": [torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
                  str(np.geterr()), sys.getrecursionlimit()],
    }

torch.manual_seed(3)
np.random.seed(3)
"""
LOAD = """
import libi_fast as lf
from libi_fast.kernels import cpu
cpu.available()
"""
WORK = """
lf.log_mean_exp(torch.zeros(64, 4096))
lf.philox_normal(0, 64, 4096)
lf.henze_zirkler(torch.eye(9)[:, :2])
lf.smooth_knn(torch.eye(9)[:, :2], torch.zeros(5, 2), 3)
with torch.random.fork_rng():  # a module's first weights are torch's draws
    model = lf.LatentVariableModel(lf.mlp(2, [5], 2), lf.Gaussian(0.1), 2)
lf.log_likelihood(model, torch.zeros(3, 2), num_samples=9, seed=0).log_likelihood.sum().backward()
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_import_and_library_leave_the_process_as_it_was(threads: int) -> None:
    def states(program: str) -> list[dict]:
        command = [sys.executable, "-c", program, "5e-324", "1"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
        return [json.loads(line) for line in lines]

    show = "print(json.dumps(state()))\n"
    plain, imported, worked = states(STATE + f"torch.set_num_threads({threads})\n" + show + LOAD + show + WORK + show)
    assert imported == plain
    assert worked == plain
    assert all(x > 0 for x in plain["main thread"] + plain["new thread"])
    (first,) = states(LOAD + STATE + f"torch.set_num_threads({threads})\n" + show)  # libi_fast before torch and numpy
    assert first == plain
