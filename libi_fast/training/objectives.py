"""Bounds on the likelihood that several methods train on, as this process's share of their mean over rows, each [R]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from libi_fast.ops import importance as op
from libi_fast.ops.random import Stream
from libi_fast.training.distributed import Rows
from libi_fast.training.replicas import Replicas
from libi_fast.training.run import SMALLEST_BLOCK, Run, Terms


def elbo_terms(replicas: Replicas, rows: Rows, noise: Callable[[], Tensor], beta: float | Tensor = 1.0) -> Terms:
    """The terms of -ELBO, the KL term times beta; noise() [R, n, S, L]. The KL term is in closed form, the reconstruction too
    where the model is linear-Gaussian: at noise variances of 1e-6 draws alone keep a VAE from converging."""
    q = replicas.posterior(rows.values)
    reconstruction = -rows.mean(replicas.expected_log_prob(rows.values, q, noise))
    return {"reconstruction": reconstruction, "kl": beta * rows.mean(q.kl_from_prior())}


def importance_terms(run: Run, rows: Rows, samples: int, gradient: str, repetition: int) -> Terms:
    """-log (1/S) sum_s p(x, z_s) / q(z_s|x)."""
    replicas = run.replicas
    q = replicas.posterior(rows.values)
    names = [k for k in replicas.parameters if k.startswith("model.")]

    def log_prob(leaves: Any, x: Tensor, z: Tensor) -> Tensor:
        parameters = {**replicas.parameters, **dict(zip(names, leaves, strict=True))}
        shared = x.shape[0] < replicas.count  # x [1, n, D] of all replicas, or [R, n, D]
        rows_and_codes = ((x[0] if shared else x)[..., None, :], z)
        return replicas.with_parameters(parameters, "log_prob", rows_and_codes, (None if shared else 0, 0))

    settings = op.Settings(samples, gradient, first_row=rows.first, repetition=repetition, stream=Stream.TRAINING)
    widest = max(max(replicas.parameters[k].shape[1:], default=1) for k in names)
    x = rows.values if rows.values.dim() == 3 else rows.values[None]
    estimate = op.importance_streamed(
        x, q.mean, q.log_std, log_prob, [replicas.parameters[k] for k in names], run.seed, replicas.own["ids"], settings,
        max(widest, x.shape[-1]), most_replicas=SMALLEST_BLOCK,
    )  # fmt: skip
    return {"bound": -rows.mean(estimate.log_likelihood)}
