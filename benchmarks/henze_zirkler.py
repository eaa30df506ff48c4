"""W5a, W5b, W5c: the Henze-Zirkler statistic and its gradient, float32, against torch eager, torch.compile and JAX.

W5a is the exact form, W5b the quadrature, W5c 1024 random frequencies. Peers of W5a in torch share the reference's whitening;
all of them take the gradient's sums in the forward pass: by coordinate or by matrix products, eager or compiled, over all
replicas at once or one after another. W5b's and W5c's are differentiated by autograd, or by hand in chunks; W5b's get their
nodes for nothing. JAX takes value_and_grad of the whole, at once and in rematerialised chunks, where it is installed.

On a GPU (``python -m benchmarks.gpu --only W5``) the chunks are larger, torch has no loop over replicas, and KeOps, where it is
installed, takes W5a's pairs in place of JAX.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import henze_zirkler_jax, peak
from benchmarks.cases import Case
from benchmarks.workloads import Form
from libi_fast.kernels.henze_zirkler import characteristic, reference
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic
from libi_fast.ops.random import Stream, philox_normal

PROBLEMS = {
    "4000 x 2": ("exact", 1, 4000, 2),
    "320 x 500 x 2": ("exact", 320, 500, 2),
    "4000 x 8": ("exact", 1, 4000, 8),
    "quadrature, 4000 x 2": ("quadrature", 1, 4000, 2),
    "quadrature, 100,000 x 2": ("quadrature", 1, 100_000, 2),
    "random, 4000 x 2": ("random", 1, 4000, 2),
    "random, 100,000 x 8": ("random", 1, 100_000, 8),
}
QUICK = {
    "200 x 2": ("exact", 1, 200, 2),
    "3 x 100 x 2": ("exact", 3, 100, 2),
    "quadrature, 200 x 2": ("quadrature", 1, 200, 2),
    "random, 200 x 3": ("random", 1, 200, 3),
}
ON_GPU = {
    "65536 x 2": ("exact", 1, 65_536, 2),
    "65536 x 8": ("exact", 1, 65_536, 8),
    "1600x500x2": ("exact", 1600, 500, 2),
    "quadrature": ("quadrature", 1, 10**6, 2),
    "random": ("random", 1, 10**6, 16),
}
ON_GPU_QUICK = {
    "200 x 2": ("exact", 1, 200, 2),
    "200 x 8": ("exact", 1, 200, 8),
    "3x100x2": ("exact", 3, 100, 2),
    "quadrature": ("quadrature", 1, 400, 2),
    "random": ("random", 1, 400, 3),
}
FREQUENCIES = 1024
JUDGED = 32_000  # points at most, of up to 8 replicas, that our error is judged by
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


def pair_forms(replicas: int, n: int) -> dict[str, PairSums]:
    compiled = torch.compile(by_coordinate, dynamic=False)
    looped = replicas > 1
    result: dict[str, PairSums] = {
        "torch eager, products": reference.pair_sums,
        "torch eager, 125 rows": chunked(by_coordinate, min(n, 125), looped),
        "torch.compile, all rows": chunked(compiled, n, looped),
    }
    if looped:
        result["torch.compile, all replicas"] = chunked(compiled, n, False)
    else:
        result["torch.compile, 500 rows"] = chunked(compiled, min(n, 500), False)
    result["torch.compile, products"] = torch.compile(reference.pair_sums, dynamic=False)
    return result


def by_products(y: Tensor, beta: float, rows: Tensor) -> tuple[Tensor, Tensor]:
    """As by_coordinate, by products of matrices as in reference.pair_sums."""
    b2 = beta * beta
    here, there = (-0.5 * b2 * p.square().sum(-1) for p in (rows, y))
    kernel = torch.exp(torch.baddbmm(here[..., :, None] + there[..., None, :], rows, y.mT, alpha=b2))
    sums = kernel @ torch.cat((y, torch.ones_like(y[..., :1])), -1)
    return sums[..., -1].sum(-1), sums


def by_keops(y: Tensor, beta: float, gradient: bool) -> tuple[Tensor, Tensor]:
    from pykeops.torch import LazyTensor

    here, there = LazyTensor(y[:, :, None].contiguous()), LazyTensor(y[:, None].contiguous())
    kernel = (-0.5 * beta * beta * ((here - there) ** 2).sum(-1)).exp()
    sums = kernel @ torch.cat((y, torch.ones_like(y[..., :1])), -1)
    return sums[..., -1].sum(-1), sums


def pair_forms_on_gpu(n: int) -> dict[str, PairSums]:
    compiled, products = torch.compile(by_coordinate, dynamic=False), torch.compile(by_products, dynamic=False)
    few = min(n, 2048)
    result: dict[str, PairSums] = {
        f"torch eager products, {few} rows": chunked(by_products, few, False),
        f"torch.compile products, {few} rows": chunked(products, few, False),
    }
    for chunk in dict.fromkeys((few, min(n, 16_384))):
        result[f"torch.compile, {chunk} rows"] = chunked(compiled, chunk, False)
    if importlib.util.find_spec("pykeops") is not None:
        result["KeOps"] = by_keops
    return result


def linear_forms(
    z: Tensor, method: str, vectors: Any, chunks: tuple[int, ...] = (500, 2000), largest: int = 10**5
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """torch's forms of the two that cost n, beside the reference, which is eager in chunks: by autograd, by hand in chunks.
    Of up to ``largest`` numbers eager autograd is tried."""
    n = z.shape[-2]

    def natural(y: Tensor) -> Tensor:
        if method == "random":
            phase = y @ vectors.mT
            real = phase.cos().mean(-2) - (-0.5 * vectors.square().sum(-1)).exp()
            return n * (real.square() + phase.sin().mean(-2).square()).mean(-1)
        columns = zip(y.unbind(-1), vectors, strict=True)
        left, right = (torch.cat(((c[..., None] * t).cos(), (c[..., None] * t).sin()), -1) for c, (t, _) in columns)
        (target, weight), (other, factor) = (
            (torch.cat(((-0.5 * t * t).exp(), torch.zeros_like(t))), w.repeat(2)) for t, w in vectors
        )
        difference = left.mT @ right / n - target[:, None] * other
        return n * (weight[:, None] * factor * difference.square()).sum((-2, -1))

    def sums(y: Tensor) -> tuple[Tensor, Tensor]:
        phase = y @ vectors.mT
        return phase.cos().sum(-2), phase.sin().sum(-2)

    def pull(y: Tensor, by_cos: Tensor, by_sin: Tensor) -> Tensor:
        phase = y @ vectors.mT
        return (by_sin * phase.cos() - by_cos * phase.sin()) @ vectors

    def differentiated(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        y, factor, singular = reference.whiten(z)
        leaf = y.detach().requires_grad_()
        value = function(leaf)
        return value.detach(), reference.gradient_at_points(torch.autograd.grad(value.sum(), leaf)[0], y, factor, singular)

    def by_hand(chunk: int, sums: Callable[..., Any], pull: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        y, factor, singular = reference.whiten(z)
        parts = y.split(chunk, -2)
        cos, sin = (sum(terms) / n for terms in zip(*(sums(p) for p in parts), strict=True))
        cos = cos - (-0.5 * vectors.square().sum(-1)).exp()
        by_cos, by_sin = 2 / len(vectors) * cos[:, None], 2 / len(vectors) * sin[:, None]
        slope = torch.cat([pull(p, by_cos, by_sin) for p in parts], -2)
        return n * (cos.square() + sin.square()).mean(-1), reference.gradient_at_points(slope, y, factor, singular)

    compiled = torch.compile(natural, dynamic=False)
    result = {"torch.compile, autograd": lambda: differentiated(compiled)}
    if z.numel() <= largest:
        result["torch eager, autograd"] = lambda: differentiated(natural)
    if method == "random":
        fused = torch.compile(sums, dynamic=False), torch.compile(pull, dynamic=False)
        for chunk in chunks:
            if n % chunk == 0:
                result[f"torch.compile, {chunk} rows"] = lambda chunk=chunk: by_hand(chunk, *fused)
        chunk = min(n, chunks[0])
        result[f"torch eager, {chunk} rows"] = lambda: by_hand(chunk, sums, pull)
    return result


def cases(quick: bool = False) -> list[Case]:
    return [case(f"W5, {name}", *problem) for name, problem in (QUICK if quick else PROBLEMS).items()]


def differentiated(z: Tensor, method: str, backend: str) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    value = henze_zirkler_statistic(leaf, backend=backend, method=method, num_frequencies=FREQUENCIES)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def compared(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, Any]:
    """The value's error relative to it, the gradient's to its largest entry."""
    value = (found[0] - truth[0]) / truth[0]
    slope = (found[1] - truth[1]) / truth[1].abs().max()
    largest, of_slope = float(value.abs().max()), float(slope.abs().max())
    means = {"mean value": float(value.square().mean().sqrt()), "mean gradients": float(slope.square().mean().sqrt())}
    return {"value": largest, "gradients": of_slope, **means, "allowed": largest <= TOLERANCE and of_slope <= TOLERANCE}


def case(name: str, method: str, replicas: int, n: int, d: int, device: str = "cpu", backend: str = "cpu") -> Case:
    z = philox_normal(0, replicas, n * d, device=device).reshape(replicas, n, d)
    more = philox_normal(1, max(1, min(8, JUDGED // n)), n * d, device=device).reshape(-1, n, d)
    truths: dict[str, tuple[Tensor, Tensor]] = {}  # made when first asked for

    def error(found: tuple[Any, ...], points: Tensor = z) -> dict[str, Any]:
        key = "more" if points is more else "z"
        if key not in truths:  # random: of frequencies drawn in double, the same to rounding
            truths[key] = differentiated(points.double(), method, "reference")
        return compared(found, truths[key])

    return Case(
        name, f"{replicas} x {n} x {d}, forward + backward", lambda: differentiated(z, method, backend),
        lambda: error(differentiated(more, method, backend), more),
        lambda: error(differentiated(more, method, "reference"), more),
        error, (), lambda: (peers if backend == "cpu" else peers_on_gpu)(z, method), None,
        lambda: peak.bound(counts(z, method)),
    )  # fmt: skip


def peers_on_gpu(z: Tensor, method: str) -> Iterator[Form]:
    n, d = z.shape[-2:]
    beta = reference.default_beta(n, d)
    functions: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    if method == "exact":
        for name, sums in pair_forms_on_gpu(n).items():
            functions[name] = lambda sums=sums: reference.forward(z, beta, True, sums)
    else:
        vectors: Any = beta * philox_normal(0, FREQUENCIES, d, stream=Stream.FREQUENCIES, device=z.device)
        if method == "quadrature":
            factors = characteristic.grid(reference.whiten(z)[0], beta)
            vectors = [(f.frequencies[:, 0], f.weight) for f in factors]
        functions["torch eager, reference"] = lambda: differentiated(z, method, "reference")
        functions |= linear_forms(z, method, vectors, (min(n, 50_000), min(n, 250_000)), 10**7)
    for name, run in functions.items():
        yield Form(name, "ieee", run, run)


def cycles_on_gpu(z: Tensor, method: str) -> float:
    """Of a multiprocessor at least (kernels/henze_zirkler/gpu.py, gpu_characteristic.py). Exact: an exponential of each ordered
    pair, 16 a cycle. Random: 3 d + 38 instructions of each point and frequency, quadrature: 3 multiply-adds of each product of
    features, 128 lanes a cycle."""
    replicas, n, d = z.shape
    if method == "exact":
        return replicas * n * n / 16
    if method == "random":
        return replicas * n * FREQUENCIES * (3 * d + 38) / 128
    return counts(z, method)["multiply-add"] / 128


def peers(z: Tensor, method: str) -> Iterator[Form]:
    replicas, n, d = z.shape
    beta = reference.default_beta(n, d)
    vectors: Any = None
    functions: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
    if method == "exact":
        for name, sums in pair_forms(replicas, n).items():
            functions[name] = lambda sums=sums: reference.forward(z, beta, True, sums)
    else:
        if method == "random":
            vectors = beta * philox_normal(0, FREQUENCIES, d, stream=Stream.FREQUENCIES)
        else:
            factors = characteristic.grid(reference.whiten(z)[0], beta)
            vectors = [(f.frequencies[:, 0], f.weight) for f in factors]
        functions["torch eager, reference"] = lambda: differentiated(z, method, "reference")
        functions |= linear_forms(z, method, vectors)
    for name, run in functions.items():
        yield Form(name, "ieee", run, run)
    if henze_zirkler_jax.available():
        chunks = {"exact": [0] if replicas > 1 else [0, 500], "quadrature": [0, 2000]}.get(method, [500, 2000])
        if method == "random":  # all at once would hold gigabytes; the smaller chunks, half as fast, take half a minute
            chunks = [0, *chunks] if n < 10**5 else chunks[1:]
        for name, run in henze_zirkler_jax.forms(z, method, beta, vectors, [c for c in chunks if c == 0 or n % c == 0]):
            yield Form(name, "ieee", run, run)


def counts(z: Tensor, method: str) -> dict[str, float]:
    """Exact: of each unordered pair an exponential, and d multiply-adds for its distance and for each of its points' slopes.
    Random: of each point and frequency a cosine and a sine, d multiply-adds for the phase and d + 2 for the slope.
    Quadrature: cosines and sines of each coordinate, and their products, once forward and twice back."""
    replicas, n, d = z.shape
    if method == "exact":
        pairs = replicas * n * (n - 1) / 2
        return {"multiply-add": 3 * d * pairs, "exp2": pairs}
    if method == "random":
        each = float(replicas * n * FREQUENCIES)
        return {"multiply-add": (2 * d + 2) * each, "exp2": 2 * each}
    widths = [2 * len(f.weight) for f in characteristic.grid(reference.whiten(z)[0], reference.default_beta(n, d))]
    each = float(replicas * n)
    return {"multiply-add": 3 * each * math.prod(widths), "exp2": each * sum(widths)}
