"""The aggregated posterior against the prior: its draws, its statistics, and their values under the null."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import libi_fast as lf
from libi_fast.metrics import aggregate, aggregated_posterior, energy_distance
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic


def gaussians(n: int, d: int, std: float = 0.6, dtype: torch.dtype = torch.float64) -> lf.MeanField:
    """Means so spread that the aggregate is N(0, I)."""
    mean = lf.philox_normal(11, n, d, dtype=torch.float64) * math.sqrt(1 - std * std)
    return lf.MeanField(mean.to(dtype), torch.full((n, d), math.log(std), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_draws_are_those_of_each_row(dtype: torch.dtype) -> None:
    q = gaussians(300, 3, dtype=dtype)
    found = aggregated_posterior(q, samples_per_row=2, seed=5)
    noise = lf.philox_normal(5, 300, 6, stream=lf.Stream.PROPOSAL, dtype=dtype).reshape(300, 2, 3)
    expected = (q.mean[:, None] + q.log_std.exp()[:, None] * noise).reshape(600, 3)
    torch.testing.assert_close(found.z, expected)
    again = aggregated_posterior(q, samples_per_row=2, seed=torch.tensor(5))
    assert torch.equal(again.z, found.z)
    assert again[1:] == found[1:]
    assert not torch.equal(aggregated_posterior(q, samples_per_row=2, seed=6).z, found.z)


def test_the_statistics_are_those_of_the_draws() -> None:
    found = aggregated_posterior(gaussians(400, 3))
    z = found.z
    assert found.mean_norm2 == pytest.approx(float(z.mean(0).square().sum()), rel=1e-12)
    covariance = torch.cov(z.T, correction=0)
    assert found.covariance_error == pytest.approx(float((covariance - torch.eye(3)).square().sum()), rel=1e-10)
    exact = lf.henze_zirkler(z)
    assert (found.method, found.henze_zirkler) == ("exact", pytest.approx(float(exact.statistic), rel=1e-12))
    assert found.p_value == pytest.approx(float(exact.p_value), rel=1e-12)
    prior = lf.philox_normal(0, 400, 3, stream=lf.Stream.MODEL_SAMPLE, repetition=3, dtype=torch.float64)
    assert found.energy_distance == pytest.approx(float(energy_distance(z, prior)), rel=1e-12)


@pytest.mark.parametrize(("rows", "d", "method"), [(250, 2, "quadrature"), (250, 5, "random")])
def test_many_draws(rows: int, d: int, method: str) -> None:
    found = aggregated_posterior(gaussians(rows, d, std=0.999), samples_per_row=20)
    assert found.z.shape == (rows * 20, d)
    assert found.method == method
    assert found.henze_zirkler == pytest.approx(float(henze_zirkler_statistic(found.z)), rel=1e-8 if d == 2 else 0.2)
    paired = found.z[::2]  # 5000 are more than the energy distance takes
    prior = lf.philox_normal(0, 2500, d, stream=lf.Stream.MODEL_SAMPLE, repetition=3, dtype=torch.float64)
    assert found.energy_distance == pytest.approx(float(energy_distance(paired, prior)), rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 7, 100])
def test_chi_square_quantile(d: int) -> None:
    assert aggregate.chi_square_quantile(d) == pytest.approx(stats.chi2.ppf(0.95, d), rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(40, 2), (350, 2), (350, 5)])
def test_one_in_twenty_samples_of_the_prior_passes_each_value(n: int, d: int) -> None:
    """n = 350: simulated at a smaller size."""
    z = lf.philox_normal(99, 400, n * d, dtype=torch.float64).reshape(400, n, d)
    other = lf.philox_normal(98, 100, n * d, dtype=torch.float64).reshape(100, n, d)
    _, covariance_error = aggregate.moment_errors(z)
    exceeded = {
        "mean": z.mean(1).square().sum(-1) > aggregate.chi_square_quantile(d) / n,
        "covariance": covariance_error > aggregate.covariance_error_quantile(n, d),
        "energy": energy_distance(z[:100], other) > aggregate.energy_distance_quantile(n, d),
        "normality": henze_zirkler_statistic(z) > float(aggregate.null_quantile(z[0], 0.95)),
    }
    for name, hits in exceeded.items():
        rate, error = float(hits.double().mean()), math.sqrt(0.05 * 0.95 * (1 / len(hits) + 1 / 400))
        assert abs(rate - 0.05) < 4 * error, (name, rate)


def test_the_values_of_a_size_are_remembered() -> None:
    q = gaussians(60, 2)
    aggregated_posterior(q)
    before = aggregate.covariance_error_quantile.cache_info().misses, aggregate.energy_distance_quantile.cache_info().misses
    aggregated_posterior(q, seed=1)
    after = aggregate.covariance_error_quantile.cache_info().misses, aggregate.energy_distance_quantile.cache_info().misses
    assert after == before


def test_each_departure_is_seen() -> None:
    q = gaussians(1000, 2)
    same = aggregated_posterior(q)
    assert same.energy_distance < 2 * same.energy_distance_95
    assert same.p_value > 0.01
    moved = aggregated_posterior(lf.MeanField(q.mean + 0.3, q.log_std))
    assert moved.mean_norm2 > 5 * moved.mean_norm2_95
    assert moved.energy_distance > 3 * moved.energy_distance_95
    wide = aggregated_posterior(lf.MeanField(q.mean * 1.6, q.log_std))
    assert wide.covariance_error > 5 * wide.covariance_error_95
    assert wide.energy_distance > wide.energy_distance_95
    clusters = aggregated_posterior(lf.MeanField(q.mean.sign() * 0.95, q.log_std - 0.65))
    assert clusters.henze_zirkler > 5 * clusters.henze_zirkler_95
    assert clusters.p_value < 1e-3
    assert clusters.energy_distance > clusters.energy_distance_95


def test_no_gradient_and_two_draws() -> None:
    q = gaussians(2, 1)
    found = aggregated_posterior(lf.MeanField(q.mean.requires_grad_(), q.log_std))
    assert not found.z.requires_grad
    assert all(math.isfinite(v) for v in found if isinstance(v, float))


FLAT = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("error", "message", "q", "options"),
    [
        (TypeError, "q must be a MeanField", FLAT, {}),
        (TypeError, "q must be a MeanField", (FLAT, FLAT, FLAT), {}),
        (TypeError, "q.mean must be a torch.Tensor", ([0.0], FLAT), {}),
        (TypeError, "q.log_std must be float32 or float64", (FLAT, FLAT.long()), {}),
        (TypeError, "q.log_std is torch.float64 but q.mean is torch.float32", (FLAT, FLAT.double()), {}),
        (lf.InputError, "q must hold mean and log_std", (FLAT, FLAT[:4]), {}),
        (lf.InputError, "q must hold mean and log_std", (FLAT[None], FLAT[None]), {}),
        (lf.InputError, "q must hold mean and log_std", (FLAT[:, :0], FLAT[:, :0]), {}),
        (lf.InputError, "q.mean holds nan at row 0, column 0", (FLAT + math.nan, FLAT), {}),
        (lf.InputError, "q.log_std holds inf at row 0, column 0", (FLAT, FLAT + math.inf), {}),
        (lf.InputError, "2 in all are needed", (FLAT[:1], FLAT[:1]), {}),
        (lf.InputError, "at least 1 draw a row", (FLAT, FLAT), {"samples_per_row": 0}),
        (lf.InputError, "samples_per_row must lie in", (FLAT, FLAT), {"samples_per_row": -1}),
        (TypeError, "samples_per_row must be an integer", (FLAT, FLAT), {"samples_per_row": 1.5}),
        (lf.InputError, "seed must lie in", (FLAT, FLAT), {"seed": -1}),
        (TypeError, "seed must be an integer", (FLAT, FLAT), {"seed": "a"}),
    ],
)
def test_bad_input(error: type, message: str, q: Any, options: dict[str, Any]) -> None:
    if isinstance(q, tuple) and len(q) == 2 and all(isinstance(t, Tensor) for t in q):
        q = lf.MeanField(*q)
    with pytest.raises(error, match=message):
        aggregated_posterior(q, **options)
