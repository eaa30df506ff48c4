"""W5a: the Henze-Zirkler statistic and its gradient, float32, against torch.compile and torch eager.

Peers start where the kernel does and share its whitening: what differs is the sums over pairs, all of them with the
gradient's sums taken in the forward pass: by coordinate or by matrix products, eager or compiled, over all replicas at once
or one after another. No peer uses the symmetry of the pairs. JAX is not installed with libi_fast and so not among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.log_mean_exp import interleaved
from libi_fast.kernels.henze_zirkler import reference
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic
from libi_fast.ops.random import philox_normal

SIZES = {"4000 x 2": (1, 4000, 2), "320 x 500 x 2": (320, 500, 2), "4000 x 8": (1, 4000, 8)}
TOLERANCE = 2e-3  # of the value and of the largest gradient, against float64: HZ is a small difference of large sums
PairSums = Callable[[Tensor, float, bool], tuple[Tensor, Tensor | None]]


def by_coordinate(y: Tensor, beta: float, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over all columns for some rows, coordinates in lanes of their own: [..., rows, n] is fused away by a compiler."""
    columns = y.unbind(-1)
    square = sum((a[..., :, None] - b[..., None, :]).square() for a, b in zip(rows.unbind(-1), columns, strict=True))
    kernel = torch.exp(square * (-0.5 * beta * beta))
    total = kernel.sum(-1)
    return total.sum(-1), torch.stack([*((kernel * c[..., None, :]).sum(-1) for c in columns), total], -1)


def chunked(one: Callable[..., tuple[Tensor, Tensor]], chunk: int, looped: bool) -> PairSums:
    def replica(y: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        parts = [one(y, beta, rows) for rows in y.split(chunk, -2)]
        return sum(p[0] for p in parts), torch.cat([p[1] for p in parts], -2)  # type: ignore[return-value]

    def pair_sums(y: Tensor, beta: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
        y = y.contiguous()
        if not looped:
            return replica(y, beta)
        results = [replica(r, beta) for r in y]
        return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])

    return pair_sums


def forms(replicas: int, n: int) -> dict[str, PairSums]:
    compiled = torch.compile(by_coordinate, dynamic=False)
    looped = replicas > 1
    result: dict[str, PairSums] = {
        "reference": reference.pair_sums,
        "torch.compile": chunked(compiled, n, looped),
        "torch eager, chunks of 125": chunked(by_coordinate, 125, looped),
    }
    if looped:
        result["torch.compile, batched"] = chunked(compiled, n, False)
    else:
        result["torch.compile, chunks of 500"] = chunked(compiled, 500, False)
    result["reference, torch.compile"] = torch.compile(reference.pair_sums, dynamic=False)
    return result


def measure(replicas: int, n: int, d: int) -> dict[str, Any]:
    z = philox_normal(0, replicas, n * d).reshape(replicas, n, d)
    beta = reference.default_beta(n, d)

    def ours() -> tuple[Tensor, Tensor]:
        leaf = z.detach().requires_grad_()
        value = henze_zirkler_statistic(leaf, backend="cpu")
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    def peer(sums: PairSums) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: reference.forward(z, beta, True, sums)

    functions = {"libi_fast": ours} | {name: peer(f) for name, f in forms(replicas, n).items()}
    value, gradient = reference.forward(z.double(), beta, True)
    errors = {}
    for name, function in functions.items():
        found, slope = function()
        error = max(float(((found - value) / value).abs().max()), float((slope - gradient).abs().max() / gradient.abs().max()))
        errors[name] = error
        if not error <= TOLERANCE:
            raise RuntimeError(f"{name} is wrong by {error}: no speed is quoted for a wrong answer")
    times = interleaved(functions)
    fastest = min(v["best ms"] for k, v in times.items() if k != "libi_fast")
    best = times["libi_fast"]["best ms"]
    pairs = replicas * n * (n + 1) / 2
    return {
        "times": times,
        "errors": errors,
        "ratio to the fastest peer": fastest / best,
        "ns per exp, all threads": 1e6 * best / pairs,
    }


def run() -> dict[str, Any]:
    return {name: measure(*size) for name, size in SIZES.items()}
