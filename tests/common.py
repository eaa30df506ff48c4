"""What several test modules share: sample points, and the checks that compiled kernels give the same bits everywhere."""

from __future__ import annotations

import functools
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

import libi_fast as lf


def points(n: int, d: int, kind: str = "normal", dtype: torch.dtype = torch.float64) -> Tensor:
    """[n, d] of a kind: normal, skewed or correlated."""
    z = torch.randn(n, d, dtype=dtype)
    if kind == "skewed":
        z = z.exp()
    if kind == "correlated":
        z = z @ torch.randn(d, d, dtype=dtype) + 3
    return z


def far_apart(size: int, device: torch.device, folder: Path) -> Tensor:
    """[size] float32, of which few numbers are to be used: on the CPU a sparse file; skips where a GPU lacks the room."""
    if device.type != "cuda":
        return torch.from_file(str(folder / "sparse"), shared=True, size=size)
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("less than 12 GiB of GPU memory free")
    return torch.empty(size, device=device)


def check_same_bits_for_any_number_of_threads(digest: Callable[[], str]) -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(digest())
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


def check_same_bits_for_instruction_set(isa: str, module: str, digest: Callable[[], str]) -> None:
    """``module`` (a test module with ``cpu`` and ``digest``) in a process that asks for ``isa`` against ``digest()`` here."""
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n" + (
        f"import {module} as t; print(t.cpu.isa(), t.digest())"
    )
    environment = {**os.environ, "LIBI_FAST_ISA": isa}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", program]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    used, found = output.split()
    if used != isa:
        pytest.skip(f"this machine has no {isa}")
    assert found == digest()


def results_of_instruction_sets(program: str, folder: Path) -> dict[str, Any]:
    """What ``program`` saves under the name in its first argument, (instruction set used, result), for each that is here."""
    results = {}
    for isa in ("generic", "v3", "v4"):
        path = folder / f"{isa}.pt"
        command = [sys.executable, "-W", "ignore", "-c", program, str(path)]
        subprocess.run(command, env={**os.environ, "LIBI_FAST_ISA": isa}, check=True, timeout=300)
        found, results[isa] = torch.load(path)
        if found != isa:
            del results[isa]  # this machine lacks it
    return results


def of_processes(function):
    """Makes of ``function(rank, world, result, *arguments)`` one that joins the other processes and leaves them."""

    @functools.wraps(function)
    def joined(rank, world, port, result, *arguments):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        if world > 1:
            torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        function(rank, world, result, *arguments)
        if world > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        torch.set_num_threads(threads)

    return joined


def in_one_process(function, *arguments):
    """What ``function``, one that ``of_processes`` made, puts into the list ``result``."""
    result = []
    function(0, 1, 0, result, *arguments)
    return result


def in_two_processes(function, *arguments):
    """As ``in_one_process``, from two."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        shared = manager.list()
        torch.multiprocessing.spawn(function, (2, port, shared, *arguments), nprocs=2)
        return list(shared)


def assert_results_close(found: Any, expected: Any, tolerance: float) -> None:
    """Of two named tuples of tensors, each field."""
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


# --- models ---


def curved(seed: int = 1) -> lf.LatentVariableModel:
    torch.manual_seed(seed)
    return lf.LatentVariableModel(lf.mlp(2, [10], 3), lf.Gaussian(0.1), 2)


class Unknown(nn.Module):
    """A decoder that no kernel recognises."""

    def __init__(self, decoder: nn.Module, broken: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.decoder, self.broken = decoder, broken

    def forward(self, z: Tensor) -> Tensor:
        output = self.decoder(z)
        return output if self.broken is None else torch.where(self.broken(z)[:, None], math.nan, output)


def unknown(model: lf.LatentVariableModel, **options: Any) -> lf.LatentVariableModel:
    return lf.LatentVariableModel(Unknown(model.decoder, **options), model.likelihood, model.latent_dim)
