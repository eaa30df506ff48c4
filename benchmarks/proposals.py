"""Importance-sampled minus exact log-likelihood on CubicJTEx, by proposal: the generating model, test rows, S = 5000.

CubicJTEx's posteriors are correlated and, where the cube is flat, far from Gaussian. Three kinds of proposals:

* networks of the paper's architecture (its last layer as wide as each needs), trained on the training rows by the evidence
  lower bound under the generating model: what a fitted inference model does at rows it has not seen;
* the best mean-field and the best full covariance of every test row, by the same bound: no network between them and the row;
* Laplace's approximation at the mode, and a mixture of it over the modes that are found.

Each as it is, with its variance doubled, and with a tenth of the prior.
"""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import libi_fast as lf
from benchmarks import report
from benchmarks.accuracy import mean_and_error
from libi_fast.errors import ParetoWarning
from libi_fast.models.laplace import log_joint
from libi_fast.models.networks import SigmoidCubeRoot
from libi_fast.models.proposals import (
    Defensive,
    FullCovariance,
    FullCovarianceGaussian,
    MixtureGaussian,
    laplace_mixture,
    laplace_proposal,
)

SEEDS = range(100, 105)
ROWS = 200  # of each test set
SAMPLES = 5000
COMPONENTS = 3
NETWORK: dict[str, Any] = {"steps": 1000, "rate": 5e-3, "draws": 2}
PER_ROW: dict[str, Any] = {"steps": 200, "rate": 3e-2, "draws": 8}
GAP, LARGEST, RELIABLE = "importance-sampled minus exact LL", "largest difference of a row", "share of rows with Pareto k < 0.7"


def lower_bound(model: lf.LatentVariableModel, x: Tensor, q: Any, noise: Tensor) -> Tensor:
    """Of every row, [N]; noise [N, s, L] serves every component, so that weights are differentiated exactly."""
    if isinstance(q, lf.MeanField):
        q = FullCovariance(q.mean, torch.diag_embed(q.log_std.exp()))
    if isinstance(q, FullCovariance):
        z = q.draw(noise)
        return (log_joint(model, x, z) - q.log_prob(z)).mean(-1)
    total = torch.zeros_like(x[:, 0])
    for k in range(q.components):
        z = FullCovariance(q.mean[:, k], q.scale_tril[:, k]).draw(noise)
        total = total + q.log_weights[:, k].exp() * (log_joint(model, x, z) - q.log_prob(z)).mean(-1)
    return total


def maximise(model: lf.LatentVariableModel, x: Tensor, q: nn.Module, steps: int, rate: float, draws: int) -> Any:
    """Adam on the bound's mean, its rate falling to 0; -> q of these rows."""
    optimiser = torch.optim.Adam(q.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        noise = lf.philox_normal(0, len(x), draws * model.latent_dim, repetition=step, stream=lf.Stream.TRAINING, dtype=x.dtype)
        loss = -lower_bound(model, x, q(x), noise.unflatten(-1, (draws, model.latent_dim))).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return q


def network(outputs: int) -> nn.Module:
    """That of the paper's inference model for CubicJTEx."""
    return nn.Sequential(nn.Linear(2, 4), SigmoidCubeRoot(), nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, outputs)).double()


class Table(nn.Module):
    """A row of numbers for each of the data's, in place of a network."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        return self.values


def starts(laplace: FullCovariance) -> tuple[Tensor, Tensor]:
    """Laplace's approximation as what a mean-field and a full-covariance network would give."""
    scale = laplace.scale_tril
    precision = torch.linalg.inv(scale @ scale.mT)
    log_std = -0.5 * precision.diagonal(dim1=-2, dim2=-1).log()
    row, column = torch.tril_indices(*scale.shape[-2:])
    triangle = torch.where(row == column, scale[:, row, column].clamp_min(1e-300).log(), scale[:, row, column])
    return torch.cat((laplace.mean, log_std), -1), torch.cat((laplace.mean, triangle), -1)


def proposals(model: lf.LatentVariableModel, train: Tensor, test: Tensor) -> dict[str, Any]:
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    full = 2 + 3
    for name, q in (
        ("mean-field network", lf.MeanFieldGaussian(network(4))),
        ("full-covariance network", FullCovarianceGaussian(network(full))),
        (f"network of {COMPONENTS} Gaussians", MixtureGaussian(network(COMPONENTS * (1 + full)), COMPONENTS)),
    ):
        found[name] = maximise(model, train, q, **NETWORK)(test)
    laplace = laplace_proposal(model, test)
    mean_field, triangle = starts(laplace)
    found["mean-field, best of each row"] = maximise(model, test, lf.MeanFieldGaussian(Table(mean_field)), **PER_ROW)(test)
    full_covariance = FullCovarianceGaussian(Table(triangle))
    found["full covariance, best of each row"] = maximise(model, test, full_covariance, **PER_ROW)(test)
    return {**found, "Laplace": laplace, "Laplace at several modes": laplace_mixture(model, test)}


def measure(model: lf.LatentVariableModel, x: Tensor, q: Any, inflation: float, exact: Tensor) -> dict[str, float]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ParetoWarning)  # the table says it
        found = lf.log_likelihood(model, x, q, SAMPLES, inflation, seed=0)
    assert found.pareto_k is not None
    gap = found.log_likelihood - exact
    return {
        "gap": gap.mean().item(),
        "largest": gap.abs().max().item(),
        "reliable": (found.pareto_k < 0.7).double().mean().item(),
    }


def run() -> dict[str, Any]:
    start = time.perf_counter()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        data = lf.data.load("CubicJTEx", seed=seed, dtype=torch.float64)
        model, test = data.truth.model, data.test[:ROWS]
        exact = lf.quadrature_log_likelihood(model, test)
        for name, q in proposals(model, data.train, test).items():
            defensive = Defensive(q)
            for label, form, inflation in (
                ("", q, 1.0), (", variance x 2", q, 2.0), (", a tenth prior", defensive, 1.0),
                (", variance x 2, a tenth prior", defensive, 2.0),
            ):  # fmt: skip
                found.setdefault(name + label, []).append(measure(model, test, form, inflation, exact))
    table = {
        name: {
            GAP: mean_and_error([f["gap"] for f in parts]),
            LARGEST: max(f["largest"] for f in parts),
            RELIABLE: math.fsum(f["reliable"] for f in parts) / len(parts),
        }
        for name, parts in found.items()
    }
    report.table(
        "CubicJTEx, importance-sampled minus exact log-likelihood, nats a row",
        ["proposal", "mean", "+-", "largest of a row", "k < 0.7"],
        [
            [name, *(format(row[GAP][part], ".4f") for part in ("mean", "standard error")),
             format(row[LARGEST], ".2f"), format(row[RELIABLE], ".0%")]
            for name, row in table.items()
        ],
    )  # fmt: skip
    settings = {
        "samples": SAMPLES,
        "test rows of each set": ROWS,
        "networks": NETWORK,
        "best of each row": PER_ROW,
        "data sets": list(SEEDS),
    }
    return {**settings, "seconds": time.perf_counter() - start, "proposals": table}
