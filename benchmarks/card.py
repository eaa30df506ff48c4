"""The GPU at hand: what it is, what it reaches, and how long work takes on it."""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS = 7
SLOW = 20.0  # seconds of one call above which a form is timed once


class Card:
    """Clocks, power and energy through nvidia-ml-py; where it is missing they are None, and `about` says so."""

    def __init__(self) -> None:
        self.handle: Any = None
        if importlib.util.find_spec("pynvml") is not None:
            import pynvml

            pynvml.nvmlInit()
            self.nvml = pynvml
            self.handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())

    def about(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name, "multiprocessors": properties.multi_processor_count, "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda, "hip": torch.version.hip,
            "driver": self._ask("nvmlSystemGetDriverVersion", of_device=False) if self.handle else "nvidia-ml-py is missing",
            **self.now(),
        }  # fmt: skip

    def now(self) -> dict[str, Any]:
        """MHz, W, degrees."""
        if not self.handle:
            return {"sm MHz": None, "memory MHz": None, "power W": None, "temperature C": None}
        power = self._ask("nvmlDeviceGetPowerUsage")
        return {
            "sm MHz": self._ask("nvmlDeviceGetClockInfo", self.nvml.NVML_CLOCK_SM),
            "memory MHz": self._ask("nvmlDeviceGetClockInfo", self.nvml.NVML_CLOCK_MEM),
            "power W": None if power is None else power / 1e3,
            "temperature C": self._ask("nvmlDeviceGetTemperature", self.nvml.NVML_TEMPERATURE_GPU),
        }

    def energy(self) -> float | None:
        """Joules since the driver was loaded."""
        used = self._ask("nvmlDeviceGetTotalEnergyConsumption") if self.handle else None
        return None if used is None else used / 1e3

    def _ask(self, name: str, *arguments: Any, of_device: bool = True) -> Any:
        try:
            return getattr(self.nvml, name)(*([self.handle] if of_device else []), *arguments)
        except self.nvml.NVMLError_NotSupported:  # such as energy on consumer cards
            return None


def seconds(run: Callable[[], Any]) -> float:
    """Of one call, the host's part included: until the device has finished."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    finish(run())
    return time.perf_counter() - start


def finish(result: Any) -> None:
    for leaf in result if isinstance(result, tuple | list) else [result]:
        if hasattr(leaf, "block_until_ready"):  # JAX has streams of its own
            leaf.block_until_ready()
    torch.cuda.synchronize()


def interleaved(forms: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, dict[str, Any]]:
    """Best and median milliseconds of each, taken in turns; every form has run before."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds):
        for name, run in forms.items():
            if turn and min(times[name]) > SLOW:
                continue
            times[name].append(1e3 * seconds(run))
    return {k: {"best ms": min(v), "median ms": statistics.median(v), "calls": len(v)} for k, v in times.items()}


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that torch holds at most during a call, above what it held before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    finish(run())
    return torch.cuda.max_memory_allocated() - before


def spent(card: Card, run: Callable[[], Any], least: float = 2.0) -> dict[str, Any]:
    """Energy of a call, from the counter over at least ``least`` seconds of calls, with clocks and power in their midst."""
    before, start, calls = card.energy(), time.perf_counter(), 0
    during: dict[str, Any] = {}
    while not calls or time.perf_counter() - start < least:
        run()
        calls += 1
        if not during and time.perf_counter() - start > least / 2:
            during = card.now()
        torch.cuda.synchronize()
    after = card.energy()
    joules = None if before is None or after is None else (after - before) / calls
    return {"joules a call": joules, "calls": calls, "during": during or card.now()}


@contextlib.contextmanager
def matmul_precision(precision: str):
    """Of torch's float32 products: "ieee" or "tf32"; "bf16" is autocast, which a form asks for itself."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def copy_bandwidth(bytes_: int = 2**30) -> float:
    """Bytes a second of a copy on the device, read and written."""
    source = torch.randn(bytes_ // 4, device="cuda")
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    return 2 * bytes_ / best


def matmul_rate(precision: str, size: int = 8192) -> float:
    """Floating-point operations a second of torch's own product of two square matrices."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    with matmul_precision(precision):
        best = min(seconds(lambda: a @ b) for _ in range(6))
    return 2 * size**3 / best
