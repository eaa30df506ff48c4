"""Bounds on the likelihood that several methods train on, as this process's share of their mean over rows, each [R]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from libi_fast.models.model import MeanFieldGaussian
from libi_fast.ops import importance as op
from libi_fast.ops.random import Stream, philox_normal, philox_uniform
from libi_fast.training import distributed
from libi_fast.training.distributed import Rows
from libi_fast.training.replicas import Replicas
from libi_fast.training.run import SMALLEST_BLOCK, Run, Terms

MOST_LOG_WEIGHT = 2.0  # of a simulated pair: where q is far off, its own guess of the code is not to rule the step


def elbo_terms(replicas: Replicas, rows: Rows, noise: Callable[[], Tensor], beta: float | Tensor = 1.0) -> Terms:
    """The terms of -ELBO, the KL term times beta; noise() [R, n, S, L]. The KL term is in closed form (but for mixtures), the
    reconstruction too where the model is linear-Gaussian: at noise variances of 1e-6 draws alone keep a VAE from converging."""
    if not isinstance(replicas.template.inference, MeanFieldGaussian):
        x = rows.values
        reconstruction, kl = replicas("elbo_parts", x, noise(), shared=(x.dim() == 2, False))
        return {"reconstruction": -rows.mean(reconstruction), "kl": beta * rows.mean(kl)}
    q = replicas.posterior(rows.values)
    reconstruction = -rows.mean(replicas.expected_log_prob(rows.values, q, noise))
    return {"reconstruction": reconstruction, "kl": beta * rows.mean(q.kl_from_prior())}


def simulated_terms(run: Run, pairs: int, rows: Rows, repetition: int, std: float = 1.0) -> Terms:
    """-log q(z | x) of ``pairs`` new draws z ~ N(0, std^2 I), x ~ p(x | z) of each replica's own model: at std = 1 exact draws
    from p(z | x) at data that the model makes itself. Else the draws are weighted by p(z) / N(z; 0, std^2 I), and by that
    ratio's inverse at the code h(x): a function of x alone, so that at every x the codes' law is p(z | x) still (up to the
    cap on the weights), while there are more of the x that the model finds improbable."""
    replicas, model = run.replicas, run.replicas.template.model
    part = distributed.shard(pairs) if rows.spread else slice(0, pairs)
    own: dict[str, Any] = {
        "replicas": replicas.own["ids"], "first_row": part.start, "repetition": repetition, "dtype": replicas.dtype,
    }  # fmt: skip
    count = part.stop - part.start
    z = philox_normal(run.seed, count, model.latent_dim, stream=Stream.SIMULATION, **own)
    draw = philox_normal if model.likelihood.reparameterized else philox_uniform
    noise = draw(run.seed, count, rows.values.shape[-1], stream=Stream.SIMULATION_NOISE, **own)
    with torch.no_grad():
        z = std * z
        x = replicas("simulate", z, noise)
    log_q = replicas.log_q(x, z[:, :, None])[..., 0]
    if std != 1:
        with torch.no_grad():
            excess = replicas.codes(x).square().sum(-1) - z.square().sum(-1)
            weight = (0.5 * (1 - std**-2) * excess).clamp(max=MOST_LOG_WEIGHT).exp()
        log_q = weight * log_q
    return {"simulated": -log_q.sum(-1) / pairs}


def posterior_terms(replicas: Replicas, rows: Rows, z: Tensor) -> Terms:
    """-log q(z | x) of draws z [R, n, S, L] from p(z | x)."""
    return {"posterior": -rows.mean(replicas.log_q(rows.values, z).mean(-1))}


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
