"""How far importance weights can be trusted: a generalised Pareto distribution fitted to the largest of each row, the estimate
that its quantiles smooth (PSIS), and the warning where the tail is too heavy for either.

Source: Zhang & Stephens 2009 with the weak prior of Vehtari, Simpson, Gelman, Yao, Gabry 2024.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from libi_fast.errors import ParetoWarning
from libi_fast.ops import _library as lib

PARETO_LIMIT = 0.7  # above it no practical number of samples gives a reliable estimate (Vehtari et al. 2024)
PARETO_VALUES = 2**19  # values held at once by the fit
LEAST_TAIL = 5  # weights that the fit needs above the threshold
EQUAL_WEIGHTS = 1e-4  # squared coefficient of variation below which the weights' tail is rounding


def tail_length(num_samples: int) -> int:
    """How many of the largest weights the Pareto fit takes: min(S/5, 3 sqrt S) (Vehtari et al. 2024)."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


class ParetoFit(NamedTuple):
    """Of each row, [...] float64; weights in units of the row's largest.

    shape: k, inf where at most 4 weights exceed the threshold; above: how many do; raw: their sum; smoothed: that of what
    replaces them, raw itself where there is no fit; threshold.
    """

    shape: Tensor
    above: Tensor
    raw: Tensor
    smoothed: Tensor
    threshold: Tensor


def fit(top: Tensor) -> ParetoFit:
    """top [..., M + 1] log-weights, largest first; the last one is the threshold."""
    flat = top.reshape(-1, top.shape[-1])
    rows = max(1, PARETO_VALUES // (flat.shape[-1] * (31 + math.isqrt(flat.shape[-1]))))
    parts = [_fit(block) for block in flat.split(rows)]  # of no rows, one empty block
    return ParetoFit(*[torch.cat(p).reshape(top.shape[:-1]) for p in zip(*parts, strict=True)])


def pareto_k(top: Tensor) -> Tensor:
    """Shape of a generalised Pareto distribution fitted to the largest importance weights of each row.

    Args:
        top: [..., M + 1] log-weights, largest first; the last one is the threshold.

    Returns:
        [...]: inf where at most 4 weights exceed the threshold (the estimator of Vehtari et al. needs 5).

    Source:
        Zhang & Stephens 2009 with the weak prior of Vehtari, Simpson, Gelman, Yao, Gabry 2024 (PSIS).
    """
    return fit(top).shape.to(top.dtype)


def _fit(top: Tensor) -> ParetoFit:
    """top [n, M + 1] -> [n]; holds n x M x (30 + sqrt M) values at once."""
    scaled = (top.double() - top[..., :1].double()).exp()
    most = scaled.shape[-1] - 1
    if most < LEAST_TAIL:
        nothing = torch.zeros(top.shape[:-1], dtype=scaled.dtype, device=top.device)
        return ParetoFit(nothing + math.inf, nothing, nothing, nothing, nothing)
    threshold = scaled[..., -1:].clamp_min(torch.finfo(scaled.dtype).tiny)
    tail = scaled[..., :-1].flip(-1)  # ascending
    x = (tail - threshold).clamp_min(0)  # 0 for ties with the threshold and what underflows
    count = (x > 0).sum(-1, keepdim=True)  # the fit is to the weights above the threshold alone
    m = count.to(x.dtype)
    grid = 30 + m.sqrt().floor()
    quartile = x.gather(-1, (most - count + (m / 4 + 0.5).long() - 1).clamp(0, most - 1))
    largest = x[..., -1:]
    steps = torch.arange(1, 31 + math.isqrt(most), dtype=x.dtype, device=x.device)
    b = (1 - torch.sqrt(grid / (steps - 0.5))) / (3 * quartile) + 1 / largest
    k = torch.log1p(-b[..., None] * x[..., None, :]).sum(-1) / m
    profile = m * (torch.log(-b / k) - k - 1)
    weights = torch.softmax(torch.where(steps <= grid, profile, -math.inf), -1)
    # Weights too small to matter are dropped before the mean, as in the published estimator.
    weights = torch.where(weights >= 10 * torch.finfo(x.dtype).eps, weights, 0.0)
    b_mean = (b * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    shape = torch.log1p(-b_mean * x).sum(-1, keepdim=True) / m
    scale = -shape / b_mean  # before the prior, as published
    shape = (m * shape + 10 * 0.5) / (m + 10)
    rank = torch.arange(most, device=x.device) - (most - count)
    quantiles = (threshold + scale * _unit_quantile((rank + 0.5) / m, shape)).clamp_max(1)
    raw, smoothed = (torch.where(rank >= 0, w, 0.0).sum(-1, keepdim=True) for w in (tail, quantiles))
    fitted = count >= LEAST_TAIL
    results = (
        torch.where(fitted, shape, math.inf), m, raw,
        torch.where(fitted & torch.isfinite(smoothed) & (scale > 0), smoothed, raw), threshold,
    )  # fmt: skip
    return ParetoFit(*(r[..., 0] for r in results))


def _unit_quantile(p: Tensor, k: Tensor) -> Tensor:
    """Of the generalised Pareto distribution with shape k and scale 1."""
    exponential = k.abs() < torch.finfo(k.dtype).eps
    safe = torch.where(exponential, 1.0, k)
    log_survival = torch.log1p(-p)
    return torch.where(exponential, -log_survival, torch.expm1(-safe * log_survival) / safe)


def smoothed_log_likelihood(log_likelihood: Tensor, tail: ParetoFit, top: Tensor, num_samples: int) -> Tensor:
    """log (1/S) sum of the smoothed weights, [...]: the largest M replaced by the fitted distribution's quantiles at
    (i - 1/2) / M, but none above the largest raw weight.

    log_likelihood [...] is that of the raw weights, top [..., M + 1] their largest logarithms, tail :func:`fit` of them.
    Weights below the tail enter as the sum less the tail's, so that they need not be kept; where that difference is rounding,
    it is at least held to what they can add up to.
    """
    largest = top[..., 0].double()
    total = (log_likelihood.double() + math.log(num_samples) - largest).exp()
    most = (num_samples - tail.above) * tail.threshold
    body = torch.minimum((total - tail.raw).clamp_min(0), most)
    value = largest + (body + tail.smoothed).log() - math.log(num_samples)
    return torch.where(tail.smoothed == tail.raw, log_likelihood, value.to(log_likelihood.dtype))


# --- the warning ---


def warn_where_unreliable(k: Tensor, effective_sample_size: Tensor, num_samples: int, stacklevel: int = 2) -> None:
    """A ParetoWarning where k is above 0.7 for some rows, with what to use instead.

    k and effective_sample_size [N]. Says nothing where the number of samples is too small for a fit (20 or fewer), nor of rows
    whose weights agree within a per cent: their tail is rounding. Skipped where values are unknown (see
    :func:`libi_fast.ops._library.values_known`).
    """
    if not lib.values_known(k) or tail_length(num_samples) < LEAST_TAIL:
        return
    unequal = num_samples / effective_sample_size - 1 > EQUAL_WEIGHTS
    bad, rows = int(((k > PARETO_LIMIT) & unequal).sum()), k.numel()
    if bad:
        message = (
            f"Pareto k is above {PARETO_LIMIT} for {bad} of {rows} rows: the proposal misses part of p(z | x), and their "
            "importance-sampled log-likelihoods are not to be trusted (mostly too low). Use a defensive mixture, "
            "lf.Defensive(proposal); lf.laplace_proposal(model, x) or another lf.FullCovariance; "
            f"more samples than {num_samples}; or, for codes, lf.sample_posterior(model, x, ..., method='hmc')"
        )
        warnings.warn(message, ParetoWarning, stacklevel=stacklevel + 1)
