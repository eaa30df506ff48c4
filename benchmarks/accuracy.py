"""What the methods reach: exact likelihoods on LinearJTEx and Gaussian, held-out digits beside FactorAnalysis."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn

import libi_fast as lf

SEEDS = range(10, 15)


def linear_model(data: Any) -> lf.LatentVariableModel:
    """The ground truth's architecture, its noise known."""
    if data.name == "LinearJTEx":
        return lf.LatentVariableModel(lf.JTExMap([0.006, 0.006]), lf.DiagonalGaussian(data.noise_variance), 2)
    return lf.LatentVariableModel(nn.Linear(2, 4, bias=False), lf.DiagonalGaussian(data.noise_variance), 2)


# name: (method, its settings, epochs, restarts), fixed before the data sets of SEEDS were first used
LINEAR = {
    "LinearJTEx": {"LiBI": (lf.LiBI, {"repeats": 1}, 3000, 5), "VAE": (lf.VAE, {}, 15_000, 5)},
    "Gaussian": {"LiBI": (lf.LiBI, {"repeats": 1}, 6000, 5), "VAE": (lf.VAE, {}, 15_000, 5)},
}


def mean_and_error(values: list[float]) -> dict[str, Any]:
    v = torch.tensor(values, dtype=torch.float64)
    return {"mean": v.mean().item(), "standard error": (v.std() / math.sqrt(len(v))).item(), "each": values}


def linear(name: str, progress: bool = True) -> dict[str, Any]:
    """Exact test log-likelihood minus the ground truth's on the same points, five data sets."""
    results: dict[str, Any] = {}
    for label, (method, settings, epochs, restarts) in LINEAR[name].items():
        gaps, populations, gap_of_is, seconds = [], [], [], 0.0
        for seed in SEEDS:
            data = lf.data.load(name, seed=seed)
            model = linear_model(data)
            fitted = method(model, lf.MeanFieldGaussian(nn.Linear(data.train.shape[1], 4)), **settings)
            start = time.perf_counter()
            fitted.fit(data.train, data.validation, epochs=epochs, restarts=restarts, seed=seed, progress=progress)
            seconds += time.perf_counter() - start
            exact = lf.exact_log_likelihood(model, data.test)
            gaps.append((exact - data.truth.log_likelihood(data.test)).mean().item())
            populations.append(float(data.truth.expected_log_likelihood(*lf.linear_gaussian_marginal(model))))
            gap_of_is.append((fitted.log_likelihood(data.test).log_likelihood.double() - exact).mean().item())
        results[label] = {
            "epochs": epochs, "restarts": restarts, **settings, "seconds": seconds,
            "exact test LL minus the ground truth's": mean_and_error(gaps),
            "population LL": mean_and_error(populations),
            "importance-sampled minus exact LL": mean_and_error(gap_of_is),
        }  # fmt: skip
    return results


DIGITS_SETTINGS = {
    "LiBI": (lf.LiBI, {"repeats": 6}, 3000),
    "VAE": (lf.VAE, {}, 2000),
    "IWAE": (lf.IWAE, {"num_samples": 8}, 2000),
}


def digits(progress: bool = True) -> dict[str, Any]:
    """Held-out log-likelihood of dequantised digits, 8 latents, beside FactorAnalysis(8)'s exact one."""
    from sklearn.decomposition import FactorAnalysis

    data = lf.data.load("digits", seed=0)
    factors = FactorAnalysis(8, tol=1e-6, max_iter=10_000).fit(data.train.double().numpy())
    exact = torch.from_numpy(factors.score_samples(data.test.double().numpy()))
    results: dict[str, Any] = {"FactorAnalysis(8)": {"exact test LL": exact.mean().item(), "rows": len(exact)}}
    for label, (method, settings, epochs) in DIGITS_SETTINGS.items():
        torch.manual_seed(0)
        model = lf.LatentVariableModel(lf.mlp(8, [64], 64, "tanh"), lf.DiagonalGaussian(torch.ones(64), learned=True), 8)
        fitted = method(model, lf.MeanFieldGaussian(lf.mlp(64, [64], 16, "relu")), **settings)
        start = time.perf_counter()
        fitted.fit(data.train, data.validation, epochs=epochs, standardize=True, early_stopping=True, seed=0, progress=progress)
        r = fitted.log_likelihood(data.test)
        gain = r.log_likelihood.double() - exact
        results[label] = {
            "epochs": epochs, **settings, "seconds": time.perf_counter() - start,
            "importance-sampled test LL (S = 5000, inflation 2)": r.log_likelihood.mean().item(),
            "above FactorAnalysis(8)": gain.mean().item(),
            "its standard error over rows": (gain.std() / math.sqrt(len(gain))).item(),
            "median effective sample size": r.effective_sample_size.median().item(),
            "share of rows with Pareto k < 0.7": (r.pareto_k < 0.7).double().mean().item(),
        }  # fmt: skip
    return results
