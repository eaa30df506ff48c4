"""What is said of a model on one data set: likelihoods, distances between samples, the aggregated posterior."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from libi_fast.data.nonlinear import QuadratureTruth
from libi_fast.data.synthetic import GaussianTruth, SyntheticDataset
from libi_fast.metrics import aggregated_posterior, energy_distance
from libi_fast.models.linear_gaussian import linear_gaussian_marginal
from libi_fast.ops.smooth_knn import smooth_knn
from libi_fast.reproduce import published, references

PARETO_LIMIT = 0.7
SAMPLE_SEEDS = (1, 2, 3)  # of draws of p(x), of the model, and of p(x) once more
BLOCK = 2000  # repetitions whose points are held at a time


def of_truth(data: SyntheticDataset, repetitions: int) -> dict[str, Any]:
    """The ground truth on its own test rows, beside exact maximum likelihood, and what two samples of p(x) differ by."""
    best = references.maximum_likelihood(data)
    if isinstance(data.truth, QuadratureTruth):
        truth = references.exact(data.truth.model, data.test)
    else:
        truth = data.truth.log_likelihood(data.test)
    first, second = (data.truth.sample(len(data.test), seed) for seed in (SAMPLE_SEEDS[0], SAMPLE_SEEDS[2]))
    return {
        "log-likelihood": float(truth.mean()), "of rows": truth.tolist(),
        "log-likelihood of maximum likelihood": float(references.exact(best, data.test).mean()),
        "smooth k-NN of maximum likelihood": smooth_knn_statistic(data.truth.sample, best.sample, repetitions, SAMPLE_SEEDS[1]),
        "smooth k-NN": smooth_knn_statistic(data.truth.sample, data.truth.sample, repetitions, SAMPLE_SEEDS[2]),
        "energy distance": float(energy_distance(first, second)),
    }  # fmt: skip


def of_method(fitted: Any, data: SyntheticDataset, truth: dict[str, Any], samples: int, repetitions: int) -> dict[str, Any]:
    """A fitted method on the test rows; log-likelihoods are means over rows in nats. ``truth``: as :func:`of_truth`."""
    fitted = copy.deepcopy(fitted)
    fitted.system.double()  # what is measured is the models, not rounding
    exact = references.exact(fitted.model, data.test)
    estimate = fitted.log_likelihood(data.test, num_samples=samples, variance_inflation=published.INFLATION)
    paired = exact - torch.tensor(truth["of rows"], dtype=exact.dtype)
    codes = aggregated_posterior(fitted.posterior(data.test))
    fresh = fitted.sample(len(data.test), SAMPLE_SEEDS[1]).double()
    return {
        "exact": float(exact.mean()),
        "minus truth": float(paired.mean()),
        "its error over rows": float(paired.std() / len(paired) ** 0.5),
        "minus maximum likelihood": float(exact.mean()) - truth["log-likelihood of maximum likelihood"],
        "on endless data": _population(fitted, data),
        "importance-sampled": float(estimate.log_likelihood.double().mean()),
        "importance-sampled minus exact": float((estimate.log_likelihood.double() - exact).mean()),
        "rows with Pareto k below 0.7": float((estimate.pareto_k < PARETO_LIMIT).double().mean()),
        "smooth k-NN": smooth_knn_statistic(data.truth.sample, fitted.sample, repetitions, SAMPLE_SEEDS[1]),
        "energy distance": float(energy_distance(data.truth.sample(len(data.test), SAMPLE_SEEDS[0]), fresh)),
        "codes": {name: value for name, value in codes._asdict().items() if name != "z"},
    }


def _population(fitted: Any, data: SyntheticDataset) -> float | None:
    """E log p_theta(x) under p(x), where both are Gaussian."""
    if not isinstance(data.truth, GaussianTruth):
        return None
    return data.truth.expected_log_likelihood(*linear_gaussian_marginal(fitted.model))


def smooth_knn_statistic(first: Any, second: Any, repetitions: int, seed: int) -> float:
    """The mean over repetitions between 100 fresh draws of each, k = 10, alpha = 1; both are sample(n, seed)."""
    points = published.POINTS

    def draws(sample: Any, seed: int) -> Tensor:
        return sample(repetitions * points, seed).float().unflatten(0, (repetitions, points))

    a, b = draws(first, SAMPLE_SEEDS[0]), draws(second, seed)
    parts = zip(a.split(BLOCK), b.split(BLOCK), strict=True)
    k = published.NEIGHBOURS
    return float(torch.cat([smooth_knn(x, y, k=k) for x, y in parts]).double().mean())
