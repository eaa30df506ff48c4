"""Held-out handwritten digits, 8 latents: what each method reaches, beside FactorAnalysis, and which estimates to rely on.

The same rows are judged in three ways: importance sampling with q (its variance doubled, as published), the same weights
Pareto-smoothed, and annealed importance sampling from the prior. A row counts as vouched for where its Pareto k is below 0.7,
or, annealed, where the standard error is below LARGEST_ERROR; and on simulated rows bounds from both sides say how far
annealing is off.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import libi_fast as lf
from benchmarks import report
from libi_fast.errors import ParetoWarning

SETTINGS = {
    "LiBI": (lf.LiBI, {"repeats": 6}, 3000),
    "VAE": (lf.VAE, {}, 6000),
    "IWAE": (lf.IWAE, {"num_samples": 8}, 1500),
}
SAMPLES = (5000, 400_000)  # the second: about as many decoded codes as annealing takes
INFLATION = 2.0
ANNEALED: dict[str, Any] = {"chains": 16, "temperatures": 1000}
SIMULATED = 100  # rows
LARGEST_ERROR = 0.1  # nats
LIKELIHOOD, VOUCHED = "test LL", "share of rows vouched for"


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def estimates(fitted: Any, test: Tensor) -> dict[str, Any]:
    """Mean log-likelihood of test rows in the data's units, the share vouched for, and seconds, by every estimator."""
    found: dict[str, Any] = {}
    for samples in SAMPLES:
        for name, smoothed in (("importance sampling", False), ("Pareto-smoothed", True)):
            r, seconds = timed(lambda: fitted.log_likelihood(test, samples, INFLATION, pareto_smoothed=smoothed))  # noqa: B023
            found[f"{name}, S = {samples:,}"] = row(r.log_likelihood, r.pareto_k < 0.7, seconds)
            found[f"{name}, S = {samples:,}"]["median effective sample size"] = r.effective_sample_size.median().item()
    model, standardizer = fitted.model, fitted.standardizer
    x = standardizer.transform(test).to(model.dtype)
    r, seconds = timed(lambda: lf.annealed_log_likelihood(model, x, seed=0, **ANNEALED))
    name = "annealed, {chains} chains, {temperatures} temperatures".format(**ANNEALED)
    found[name] = row(r.log_likelihood - standardizer.log_abs_det, r.standard_error < LARGEST_ERROR, seconds)
    found[name]["median standard error"] = r.standard_error.median().item()
    gap, seconds = timed(lambda: lf.bidirectional_gap(model, SIMULATED, seed=0, **ANNEALED))
    found["bounds on simulated rows"] = {
        "upper minus lower": gap.gap.mean().item(), "its standard error over rows": spread(gap.gap), "rows": SIMULATED,
        "seconds": seconds,
    }  # fmt: skip
    return found


def row(value: Tensor, vouched: Tensor, seconds: float) -> dict[str, float]:
    return {LIKELIHOOD: value.double().mean().item(), VOUCHED: vouched.double().mean().item(), "seconds": seconds}


def spread(values: Tensor) -> float:
    return (values.double().std() / math.sqrt(len(values))).item()


def run(progress: bool = True) -> dict[str, Any]:
    from sklearn.decomposition import FactorAnalysis

    data = lf.data.load("digits", seed=0)
    factors = FactorAnalysis(8, tol=1e-6, max_iter=10_000).fit(data.train.double().numpy())
    exact = torch.from_numpy(factors.score_samples(data.test.double().numpy()))
    results: dict[str, Any] = {"FactorAnalysis(8)": {"exact test LL": exact.mean().item(), "rows": len(exact)}}
    rows = []
    for label, (method, settings, epochs) in SETTINGS.items():
        torch.manual_seed(0)
        model = lf.LatentVariableModel(lf.mlp(8, [64], 64, "tanh"), lf.DiagonalGaussian(torch.ones(64), learned=True), 8)
        fitted = method(model, lf.MeanFieldGaussian(lf.mlp(64, [64], 16, "relu")), **settings)
        options: dict[str, Any] = {"standardize": True, "early_stopping": True, "progress": progress}
        _, seconds = timed(lambda: fitted.fit(data.train, data.validation, epochs=epochs, seed=0, **options))  # noqa: B023
        r = fitted.log_likelihood(data.test)
        gain = r.log_likelihood.double() - exact
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParetoWarning)  # the table says it
            found = estimates(fitted, data.test)
        results[label] = {
            "epochs": epochs, **settings, "seconds": seconds, "above FactorAnalysis(8)": gain.mean().item(),
            "its standard error over rows": spread(gain), "estimates": found,
        }  # fmt: skip
        for name, e in found.items():
            value, share = (format(e[k], f) if k in e else "" for k, f in ((LIKELIHOOD, ".2f"), (VOUCHED, ".0%")))
            bounds = format(e["upper minus lower"], ".2f") if "upper minus lower" in e else ""
            rows.append([f"{label}: {name}", value, share, bounds, format(e["seconds"], ".1f")])
    report.table(
        f"digits, {len(exact)} held-out rows, nats a row", ["estimate", LIKELIHOOD, "vouched for", "gap", "seconds"], rows
    )
    return results
