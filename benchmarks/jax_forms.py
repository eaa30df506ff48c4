"""The peers in JAX: `natural` as one would write it, and for narrow decoders coordinate by coordinate; rows in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.workloads import Form, Problem, rows_of

PRECISION = {"ieee": "highest", "tf32": "tensorfloat32", "bf16": "bfloat16"}  # of products of float32 matrices


def forms(p: Problem, precision: str, lines: list[int]) -> Iterator[Form]:
    import jax
    import jax.numpy as jnp

    w = p.workload
    latents = w.widths[0]

    def log_weights(params: Any, x: Any, mean: Any, log_std: Any, noise: Any) -> Any:
        z = mean[:, None] + jnp.exp(log_std)[:, None] * noise
        h = z
        for i, (weight, bias) in enumerate(params):
            h = h @ weight.T + bias
            h = jnp.tanh(h) if i + 1 < len(params) else h
        if w.likelihood == "gaussian":
            log_prob = (-0.5 * ((h - x[:, None]) ** 2 / w.variance + math.log(2 * math.pi * w.variance))).sum(-1)
        else:
            log_prob = (x[:, None] * h - jax.nn.softplus(h)).sum(-1)
        return log_prob + (0.5 * (noise**2 - z**2) + log_std[:, None]).sum(-1)

    def by_coordinate(params: Any, x: Any, mean: Any, log_std: Any, noise: Any) -> Any:
        (weight, bias), (v, c) = params
        z = [mean[:, i, None] + jnp.exp(log_std[:, i, None]) * noise[..., i] for i in range(latents)]
        total = sum(0.5 * (noise[..., i] ** 2 - z[i] ** 2) + log_std[:, i, None] for i in range(latents))
        outputs = [c[d] for d in range(x.shape[1])]
        for j in range(weight.shape[0]):
            h = jnp.tanh(bias[j] + sum(weight[j, i] * z[i] for i in range(latents)))
            outputs = [o + v[d, j] * h for d, o in enumerate(outputs)]
        for d, o in enumerate(outputs):
            if w.likelihood == "gaussian":
                total = total - 0.5 * ((o - x[:, d, None]) ** 2 / w.variance + math.log(2 * math.pi * w.variance))
            else:
                total = total + x[:, d, None] * o - jax.nn.softplus(o)
        return total

    def solver(function: Callable[..., Any]) -> Callable[..., Any]:
        """(params, x, mean, log_std, noise) of a chunk -> log-likelihood, and in backward the gradients of its sum."""

        def value(params: Any, x: Any, mean: Any, log_std: Any, noise: Any) -> Any:
            estimate = jax.scipy.special.logsumexp(function(params, x, mean, log_std, noise), -1) - math.log(noise.shape[1])
            return estimate.sum(), estimate

        if not w.backward:
            return lambda *arguments: (value(*arguments)[1],)

        def both(params: Any, x: Any, mean: Any, log_std: Any, noise: Any) -> Any:
            grad = jax.value_and_grad(value, argnums=(2, 3, 0), has_aux=True)
            (_, estimate), (to_mean, to_scale, to_params) = grad(params, x, mean, log_std, noise)
            return estimate, to_mean, to_scale, *(g for pair in to_params for g in pair)

        return both

    functions = {"JAX natural": log_weights, **({"JAX by coordinate": by_coordinate} if w.narrow else {})}
    params = [tuple(jnp.asarray(t.cpu().numpy()) for t in pair) for pair in p.pairs]
    for name, function in functions.items():
        solve = solver(function)
        checker = jax.jit(solve)
        for step in sorted({rows_of(size, w) for size in lines}):
            chunks = w.rows // step

            def whole(params: Any, key: Any, x: Any, mean: Any, log_std: Any, solve=solve, step=step) -> Any:
                """x [chunks, step, D] and the proposal alike: one loop on the device, gradients added up in it."""

                def body(carried: Any, part: Any) -> Any:
                    key, total = carried
                    key, use = jax.random.split(key)
                    noise = jax.random.normal(use, (step, w.samples, latents))
                    value, *grads = solve(params, *part, noise)
                    rows, rest = grads[:2], grads[2:]
                    return (key, [a + b for a, b in zip(total, rest, strict=True)]), (value, *rows)

                zeros = [jnp.zeros_like(t) for pair in params for t in pair] if w.backward else []
                (_, total), rows = jax.lax.scan(body, (key, zeros), (x, mean, log_std))
                return [r.reshape(-1, *r.shape[2:]) for r in rows] + total

            jitted = jax.jit(whole)
            arrays = [jnp.asarray(t.cpu().numpy().reshape(chunks, step, -1)) for t in (p.x, p.mean, p.log_std)]

            def run(jitted=jitted, arrays=arrays) -> Any:
                with jax.default_matmul_precision(PRECISION[precision]):
                    return tuple(jitted(params, jax.random.PRNGKey(0), *arrays))

            def check(part: Problem, noise: Tensor, checker=checker) -> tuple[Tensor, ...]:
                import torch

                numbers = [jnp.asarray(t.cpu().numpy()) for t in (part.x, part.mean, part.log_std, noise)]
                with jax.default_matmul_precision(PRECISION[precision]):
                    results = checker(params, *numbers)
                return tuple(torch.from_numpy(np.array(r)) for r in results)

            yield Form(f"{name}, {step} rows", precision, run, check)
