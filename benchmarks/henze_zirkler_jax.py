"""The Henze-Zirkler statistic in JAX, value and gradient from points: natural (all at once, jit) and rows in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Form = Callable[[], tuple[Tensor, Tensor]]


def forms(z: Tensor, method: str, beta: float, vectors: Any, chunks: list[int]) -> Iterator[tuple[str, Form]]:
    """``vectors``: frequencies [m, d] for "random"; (nodes, weights) of each coordinate for "quadrature". Chunk 0: all."""
    import jax
    import jax.numpy as jnp
    from jax.scipy.linalg import solve_triangular

    n, d = z.shape[-2:]
    b2 = beta * beta

    def whiten(x: Any) -> Any:
        centred = x - x.mean(0)
        return solve_triangular(jnp.linalg.cholesky(centred.T @ centred / n), centred.T, lower=True).T

    def summed(of_rows: Callable[[Any], Any], y: Any, chunk: int) -> Any:
        if chunk == 0:
            return of_rows(y)
        parts = jax.lax.map(jax.checkpoint(of_rows), y.reshape(n // chunk, chunk, d))
        return jax.tree.map(lambda p: p.sum(0), parts)

    def exact(x: Any, chunk: int) -> Any:
        y = whiten(x)

        def of_rows(rows: Any) -> Any:
            square = sum((rows[:, c, None] - y[None, :, c]) ** 2 for c in range(d))
            return jnp.exp(-0.5 * b2 * square).sum()

        single = jnp.exp(-b2 / (2 * (1 + b2)) * (y**2).sum(1)).sum()
        return summed(of_rows, y, chunk) / n - 2 * (1 + b2) ** (-d / 2) * single + n * (1 + 2 * b2) ** (-d / 2)

    def random(x: Any, chunk: int) -> Any:
        t = jnp.asarray(vectors.numpy())

        def of_rows(rows: Any) -> Any:
            phase = rows @ t.T
            return jnp.cos(phase).sum(0), jnp.sin(phase).sum(0)

        cosines, sines = summed(of_rows, whiten(x), chunk)
        return n * ((cosines / n - jnp.exp(-0.5 * (t**2).sum(1))) ** 2 + (sines / n) ** 2).mean()

    def quadrature(x: Any, chunk: int) -> Any:
        (t, v), (s, w) = ((jnp.asarray(a.numpy()) for a in pair) for pair in vectors)

        def features(column: Any, nodes: Any) -> Any:
            phase = column[:, None] * nodes
            return jnp.concatenate((jnp.cos(phase), jnp.sin(phase)), 1)

        def target(nodes: Any) -> Any:
            return jnp.concatenate((jnp.exp(-0.5 * nodes**2), jnp.zeros_like(nodes)))

        sums = summed(lambda rows: features(rows[:, 0], t).T @ features(rows[:, 1], s), whiten(x), chunk)
        weights = jnp.tile(v, 2)[:, None] * jnp.tile(w, 2)
        return n * (weights * (sums / n - target(t)[:, None] * target(s)) ** 2).sum()

    one = {"exact": exact, "random": random, "quadrature": quadrature}[method]
    points = jnp.asarray(z.numpy())
    for chunk in chunks:

        def both(x: Any, chunk: int = chunk) -> Any:
            return jax.vmap(jax.value_and_grad(lambda replica: one(replica, chunk)))(x)

        def looped(x: Any, chunk: int = chunk) -> Any:
            return jax.lax.map(jax.value_and_grad(lambda replica: one(replica, chunk)), x)

        for kind, function in [("", both), *([(", looped", looped)] if len(z) > 1 else [])]:
            compiled = jax.jit(function)

            def call(compiled: Any = compiled) -> tuple[Tensor, Tensor]:
                value, slope = jax.block_until_ready(compiled(points))
                return torch.from_numpy(np.array(value)), torch.from_numpy(np.array(slope))

            yield f"JAX{f', chunks of {chunk}' if chunk else ''}{kind}", call


def available() -> bool:
    try:
        import jax

        return math.isfinite(float(jax.numpy.zeros(()))) and not jax.config.jax_enable_x64
    except ImportError:
        return False
