"""The aggregated posterior (1/N) sum_n q(z | x_n) against the prior N(0, I)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.metrics.energy import energy_distance
from libi_fast.models.model import MeanField
from libi_fast.models.proposals import Proposal
from libi_fast.ops import _library as lib
from libi_fast.ops.henze_zirkler import LARGEST_QUADRATURE, henze_zirkler, null_quantile
from libi_fast.ops.random import Stream, as_seed, philox_normal, philox_uniform
from libi_fast.ops.training import moment_errors

LEVEL = 0.95
EXACT_UP_TO = 4096  # draws: for Henze-Zirkler over all pairs
PAIRED_UP_TO = 4096  # draws: for the energy distance
REPETITIONS, LARGEST_SIMULATION = 400, 256  # samples of N(0, I), and their size


class AggregatedPosterior(NamedTuple):
    """How far draws of the aggregated posterior are from N(0, I); beside each statistic what 95% of samples of N(0, I) of the
    same size stay below.

    z [n, L]: the draws, those of a row consecutive; mean_norm2: ||mean||^2; covariance_error: ||Cov - I||_F^2, divisor n;
    henze_zirkler: the statistic, by ``method``, and its p_value; energy_distance: to draws of N(0, I).
    """

    z: Tensor
    mean_norm2: float
    mean_norm2_95: float
    covariance_error: float
    covariance_error_95: float
    henze_zirkler: float
    henze_zirkler_95: float
    p_value: float
    method: str
    energy_distance: float
    energy_distance_95: float


@functools.cache
def chi_square_quantile(dimensions: int) -> float:
    """Of level LEVEL, by bisection on the regularised incomplete gamma function."""
    low, high = 0.0, 10.0 * dimensions + 10
    shape = torch.tensor(dimensions / 2, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        below = float(torch.special.gammainc(shape, torch.tensor(middle / 2, dtype=torch.float64))) < LEVEL
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def _simulated(n: int, dimensions: int, of: int) -> Tensor:
    """Draws of N(0, I) in float64, [repetitions, n, dimensions]; ``of`` tells samples apart."""
    draws = philox_normal(
        0, REPETITIONS, n * dimensions, repetition=of, stream=Stream.MODEL_SAMPLE, dtype=torch.float64
    )  # fmt: skip
    return draws.unflatten(1, (n, dimensions))


@functools.cache
def covariance_error_quantile(n: int, dimensions: int) -> float:
    """Of samples of N(0, I), of level LEVEL: simulated at up to LARGEST_SIMULATION or 4 L draws, as n times it converges."""
    size = min(n, max(LARGEST_SIMULATION, 4 * dimensions))
    _, errors = moment_errors(_simulated(size, dimensions, 0))
    return float(errors.quantile(LEVEL)) * size / n


@functools.cache
def energy_distance_quantile(n: int, dimensions: int) -> float:
    """Between two samples of N(0, I), of level LEVEL, as :func:`covariance_error_quantile`."""
    size = min(n, LARGEST_SIMULATION)
    distances = energy_distance(_simulated(size, dimensions, 1), _simulated(size, dimensions, 2))
    return float(distances.quantile(LEVEL)) * size / n


def _checked_mean(q: Any) -> Tensor:
    """The mean of a (mean, log_std) pair."""
    if not isinstance(q, tuple) or len(q) != 2:
        raise TypeError(f"q must be a MeanField (mean, log_std) or a Proposal, got {type(q).__name__}")
    mean, log_std = q
    lib.check_tensor("q.mean", mean)
    lib.check_tensor("q.log_std", log_std)
    lib.check_like("q.log_std", log_std, "q.mean", mean)
    if mean.dim() != 2 or mean.shape != log_std.shape or not mean.shape[1]:
        raise InputError(f"q must hold mean and log_std [N, L], got {tuple(mean.shape)} and {tuple(log_std.shape)}")
    lib.check_finite("q.mean", mean)
    lib.check_finite("q.log_std", log_std)
    return mean


@torch.no_grad()
def aggregated_posterior(
    q: MeanField | Proposal, *, samples_per_row: int = 1, seed: int | Tensor | None = 0
) -> AggregatedPosterior:
    """Compare z ~ (1/N) sum_n q(z | x_n) with the prior N(0, I).

    The statistics are taken in float64. Henze-Zirkler is exact up to 4096 draws, past that by quadrature for L <= 3 and at 1024
    random frequencies for L > 3; for L above about 30 it has no power. The energy distance sees at most 4096 of the draws,
    evenly spaced. The 95% values: ||mean||^2 by the chi-square distribution, Henze-Zirkler by the lognormal that gives the
    p-value (for a few draws only about right), the others by 400 simulated samples with a fixed seed; those of one size are
    remembered. They take draws for independent: rows that cover the prior evenly stay below them more often.

    Args:
        q: mean and log standard deviation [N, L] of each row's Gaussian, float32 or float64, or a :class:`libi_fast.Proposal`,
            such as ``inference(x)``.
        samples_per_row: draws of each row, S; n = N S.
        seed: of the draws, 0 .. 2^64 - 1, an int64 tensor [], or None for one number from torch's default generator.

    Returns:
        :class:`AggregatedPosterior`: z [n, L] of q's dtype, the statistics as numbers.

    Raises:
        InputError: q that is not [N, L] twice, fewer than 2 draws, samples_per_row below 1, NaN or infinity.
        TypeError: q that is no pair of float tensors, samples_per_row that is no integer.

    Source:
        Hoffman & Johnson 2016 (the aggregated posterior); Henze & Zirkler 1990; Szekely & Rizzo 2013.
    """
    if isinstance(q, Proposal):
        mean = q.expectation()
        for name, value in q.tensors().items():
            lib.check_finite(f"q.{name}", value)
    else:
        mean = _checked_mean(q)
    lib.check_index("samples_per_row", samples_per_row, 2**32)
    rows, dimensions = mean.shape
    n = rows * samples_per_row
    if samples_per_row < 1 or n < 2:
        raise InputError(f"at least 1 draw a row and 2 in all are needed, got samples_per_row={samples_per_row}, N={rows}")

    seed = as_seed(seed, mean.device)
    noise = philox_normal(
        seed, rows, samples_per_row * dimensions, stream=Stream.PROPOSAL, dtype=mean.dtype, device=mean.device
    )
    noise = noise.unflatten(1, (samples_per_row, dimensions))
    if isinstance(q, Proposal):
        uniform = philox_uniform(seed, rows, samples_per_row, stream=Stream.MIXTURE, dtype=mean.dtype, device=mean.device)
        z = q.draw(noise, uniform).flatten(0, 1)
    else:
        z = (mean[:, None] + q[1].exp()[:, None] * noise).flatten(0, 1)
    points = z.double()
    off_mean, off_covariance = moment_errors(points)
    if n <= EXACT_UP_TO:
        method = "exact"
    else:
        method = "quadrature" if dimensions <= LARGEST_QUADRATURE else "random"
    normality = henze_zirkler(points, method=method)
    paired = points[:: -(-n // PAIRED_UP_TO)]
    prior = philox_normal(0, *paired.shape, repetition=3, stream=Stream.MODEL_SAMPLE, dtype=torch.float64, device=mean.device)
    return AggregatedPosterior(
        z=z,
        mean_norm2=float(off_mean),
        mean_norm2_95=chi_square_quantile(dimensions) / n,
        covariance_error=float(off_covariance),
        covariance_error_95=covariance_error_quantile(n, dimensions),
        henze_zirkler=float(normality.statistic),
        henze_zirkler_95=float(null_quantile(points, LEVEL, method=method)),
        p_value=float(normality.p_value),
        method=method,
        energy_distance=float(energy_distance(paired, prior)),
        energy_distance_95=energy_distance_quantile(len(paired), dimensions),
    )
