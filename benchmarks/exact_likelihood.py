"""The nonlinear data sets' ground truth: how exact its likelihood is, and what it scores on endless test data.

The population value is the mean of log p(x) over fresh rows, with a control variate that is cheap on many more:
log N(z; 0, I) - 1/2 log det(2 pi (J J' + noise)), J the decoder's Jacobian, which is log p(x) where the decoder is linear
over the noise's width and no other code gives the same x.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import libi_fast as lf
from libi_fast.data.synthetic import rows_of
from libi_fast.ops.random import Stream

DATASETS = ("CubicJTEx", "Mobius")
ROWS = 60_000
CHEAP = 2**23
BLOCK = 2000
SEED = 2


def near(truth: Any, z: Tensor, noise: Tensor) -> Tensor:
    """The control variate of codes [N, 2] and standardised noises [N, D], both of which log p(x) depends on."""
    jacobian = torch.vmap(torch.func.jacrev(lambda one: truth.model.decode(one[None])[0]))(z)
    covariance = jacobian @ jacobian.mT + torch.diag(truth.noise_variance)
    x = (jacobian @ z[..., None])[..., 0] + noise * truth.noise_variance.sqrt()
    return torch.distributions.MultivariateNormal(torch.zeros_like(x), covariance).log_prob(x)


def population(data: Any) -> dict[str, Any]:
    """E log p(x) and its standard error."""
    truth, latent = data.truth, data.latent_dim
    dims = latent + len(truth.noise_variance)

    def draws(first: int, n: int) -> tuple[Tensor, Tensor]:
        values = lf.philox_normal(SEED, n, dims, first_row=first, stream=Stream.MODEL_SAMPLE, dtype=torch.float64)
        return values[:, :latent], values[:, latent:]

    exact, control = [], []
    for first in range(0, ROWS, BLOCK):
        x, _ = rows_of(truth, latent, BLOCK, SEED, first, Stream.MODEL_SAMPLE)
        exact.append(truth.log_likelihood(x))
        control.append(near(truth, *draws(first, BLOCK)))
    y, c = torch.cat(exact), torch.cat(control)
    slope = float(((y - y.mean()) * (c - c.mean())).sum() / (c - c.mean()).square().sum())
    cheap = torch.cat([near(truth, *draws(ROWS + first, CHEAP // 64)) for first in range(0, CHEAP, CHEAP // 64)])
    residual = y - slope * c
    error = math.sqrt(float(residual.var()) / ROWS + slope**2 * float(cheap.var()) / CHEAP)
    return {
        "E log p(x)": float(residual.mean() + slope * cheap.mean()), "standard error": error,
        "rows": ROWS, "without the control variate": [float(y.mean()), float(y.std()) / math.sqrt(ROWS)],
    }  # fmt: skip


def run() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in DATASETS:
        data = lf.data.load(name)
        x = data.test.double()
        value = lf.quadrature_log_likelihood(data.truth.model, x)
        finer = lf.quadrature_log_likelihood(data.truth.model, x, tolerance=1e-10)
        results[name] = {
            "test rows": len(x), "largest change where cells are halved further": float((finer - value).abs().max()),
            "mean test log-likelihood of the truth": float(value.mean()), "population": population(data),
        }  # fmt: skip
    return results
