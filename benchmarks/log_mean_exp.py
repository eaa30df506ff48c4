"""W1: log_mean_exp of [N, S], float32, against torch eager, torch.compile and JAX, whole and in chunks of rows."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import libi_fast as lf
from benchmarks import peak
from benchmarks.cases import Case, compared
from benchmarks.timing import interleaved as interleaved  # the Henze-Zirkler benchmark takes it from here
from benchmarks.workloads import Form, Workload

TOLERANCE = 1e-5  # of the largest value
CHUNKS = (16, 64, 256, 1024, 2048)


def case(w: Workload) -> Case:
    x = lf.philox_normal(0, w.rows, w.samples) * 30
    truth = eager(x.double())
    scale = float(truth.abs().max())

    def error(found: tuple[Tensor, ...]) -> dict[str, Any]:
        return compared(found[0], truth, TOLERANCE, scale)

    return Case(
        "W1", f"{w.rows} x {w.samples}", lambda: (lf.log_mean_exp(x),), lambda: error((lf.log_mean_exp(x),)),
        lambda: error((eager(x),)), error, (), lambda: forms(x), None, lambda: peak.reading(x),
    )  # fmt: skip


def eager(x: Tensor) -> Tensor:
    return torch.logsumexp(x, -1) - math.log(x.shape[-1])


def forms(x: Tensor) -> Iterator[Form]:
    chunks = [c for c in CHUNKS if c < len(x)] + [len(x)]

    def chunked(function: Any, rows: int) -> tuple[Tensor]:
        return (torch.cat([function(part) for part in x.split(rows)]),)

    for name, function in {"torch eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}.items():
        for rows in chunks:

            def run(function=function, rows=rows) -> tuple[Tensor]:
                return chunked(function, rows)

            yield Form(f"{name}, {rows} rows", "ieee", run, run)
    if importlib.util.find_spec("jax") is not None:
        yield from jax_forms(x, chunks)


def jax_forms(x: Tensor, chunks: list[int]) -> Iterator[Form]:
    import jax
    import jax.numpy as jnp

    def once(x: Any) -> Any:
        return jax.scipy.special.logsumexp(x, -1) - math.log(x.shape[-1])

    def by_hand(x: Any) -> Any:  # no care for infinities
        top = x.max(-1, keepdims=True)
        return jnp.log(jnp.exp(x - top).sum(-1)) + top[..., 0] - math.log(x.shape[-1])

    array = jnp.asarray(x.numpy())
    for name, function in {"JAX": once, "JAX by hand": by_hand}.items():
        for rows in chunks:
            if len(x) % rows:
                continue
            parts = array.reshape(-1, rows, x.shape[1])
            whole = jax.jit(lambda parts, function=function: jax.lax.map(function, parts).reshape(-1))

            def run(whole=whole, parts=parts) -> tuple[Any]:
                return (whole(parts),)

            yield Form(f"{name}, {rows} rows", "ieee", run, run)
