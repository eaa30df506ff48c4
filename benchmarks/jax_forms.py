"""The peers in JAX: `natural` as one would write it, and for narrow decoders coordinate by coordinate; rows in chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from benchmarks.workloads import Form, Problem, rows_of

PRECISION = {"ieee": "highest", "tf32": "tensorfloat32", "bf16": "bfloat16"}  # of products of float32 matrices


class Variant(NamedTuple):
    """What else moves JAX's time, besides rows."""

    generator: str = "threefry2x32"  # or rbg, unsafe_rbg
    latents_first: bool = False  # the noise is drawn as [L, rows, S]: coordinates without strides
    python_loop: bool = False  # over chunks, instead of a scan on the device

    def __str__(self) -> str:
        latents = "latents first" if self.latents_first else ""
        words = [self.generator.replace("threefry2x32", ""), latents, "Python loop" if self.python_loop else ""]
        return "".join(f", {word}" for word in words if word)


def forms(p: Problem, precision: str, lines: list[int], variants: tuple[Variant, ...] = (Variant(),)) -> Iterator[Form]:
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
        for step, variant in itertools.product(sorted({rows_of(size, w) for size in lines}), variants):

            def chunk(params: Any, key: Any, total: Any, part: Any, solve=solve, step=step, variant=variant) -> Any:
                """Of ``step`` rows: the next key, the parameters' gradients added to ``total``, and what belongs to rows."""
                key, use = jax.random.split(key)
                if variant.latents_first:
                    noise = jnp.moveaxis(jax.random.normal(use, (latents, step, w.samples)), 0, -1)
                else:
                    noise = jax.random.normal(use, (step, w.samples, latents))
                value, *grads = solve(params, *part, noise)
                return key, [a + b for a, b in zip(total, grads[2:], strict=True)], (value, *grads[:2])

            def whole(params: Any, key: Any, total: Any, x: Any, mean: Any, log_std: Any, chunk=chunk) -> Any:
                """x [chunks, step, D] and the proposal alike: one loop on the device, gradients added up in it."""

                def body(carried: Any, part: Any) -> Any:
                    key, total, rows = chunk(params, *carried, part)
                    return (key, total), rows

                (_, total), rows = jax.lax.scan(body, (key, total), (x, mean, log_std))
                return [r.reshape(-1, *r.shape[2:]) for r in rows] + total

            jitted = jax.jit(chunk)

            def looped(params: Any, key: Any, total: Any, x: Any, mean: Any, log_std: Any, chunk=jitted) -> Any:
                """The same for lists of chunks."""
                found = []
                for part in zip(x, mean, log_std, strict=True):
                    key, total, rows = chunk(params, key, total, part)
                    found.append(rows)
                return [jnp.concatenate(r) for r in zip(*found, strict=True)] + total

            whole = looped if variant.python_loop else jax.jit(whole)
            zeros = [jnp.zeros_like(t) for pair in params for t in pair] if w.backward else []
            arrays = [jnp.asarray(t.cpu().numpy().reshape(w.rows // step, step, -1)) for t in (p.x, p.mean, p.log_std)]
            if variant.python_loop:
                arrays = [list(a) for a in arrays]

            def run(whole=whole, arrays=arrays, variant=variant, zeros=zeros) -> Any:
                with jax.default_matmul_precision(PRECISION[precision]):
                    return tuple(whole(params, jax.random.key(0, impl=variant.generator), zeros, *arrays))

            def check(part: Problem, noise: Tensor, checker=checker) -> tuple[Tensor, ...]:
                import torch

                numbers = [jnp.asarray(t.cpu().numpy()) for t in (part.x, part.mean, part.log_std, noise)]
                with jax.default_matmul_precision(PRECISION[precision]):
                    results = checker(params, *numbers)
                return tuple(torch.from_numpy(np.array(r)) for r in results)

            yield Form(f"{name}, {step} rows{variant}", precision, run, check)
