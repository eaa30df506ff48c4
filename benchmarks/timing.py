"""Milliseconds on the CPU: forms in turns, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

SLOW = 20.0  # seconds of a call above which a form is timed less often
ROUNDS = 7
SETTLE, SHORT = 0.05, 0.1  # seconds


def finish(result: Any) -> None:
    """JAX returns before it has computed."""
    for leaf in result if isinstance(result, tuple | list) else [result]:
        if hasattr(leaf, "block_until_ready"):
            leaf.block_until_ready()


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    finish(run())
    return time.perf_counter() - start


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int = 15, warm: int = 2) -> dict[str, dict[str, Any]]:
    """Best and median milliseconds of each over at least ``rounds`` turns after ``warm`` ones; twice where a call is slow.

    A form's threads go on looking for work for a while after it: each turn waits until they sleep, and a short call is made
    once before it is timed, or it would pay for the form before it.
    """
    times: dict[str, list[float]] = {k: [] for k in functions}
    for turn in range(rounds + warm):
        for name, run in functions.items():
            if len(times[name]) >= 2 and min(times[name]) > 1e3 * SLOW:
                continue
            time.sleep(SETTLE)
            if times[name] and min(times[name]) < 1e3 * SHORT:
                finish(run())
            spent = 1e3 * seconds(run)
            if turn >= warm or spent > 1e3 * SLOW:
                times[name].append(spent)
    return {k: {"best ms": min(v), "median ms": statistics.median(v), "calls": len(v)} for k, v in times.items()}
