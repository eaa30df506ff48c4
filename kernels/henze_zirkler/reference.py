r"""Henze-Zirkler statistic in plain torch, pairs in blocks of rows so that nothing of size n x n is held.

Henze & Zirkler 1990; with y_i = S^{-1/2} (z_i - mean), S of divisor n:

    HZ / n = mean_ij exp(-b^2/2 |y_i - y_j|^2) - 2 (1 + b^2)^{-d/2} mean_i exp(-b^2/2/(1+b^2) |y_i|^2) + (1 + 2 b^2)^{-d/2}

and 4n where S is singular. The null distribution's mean and variance are the paper's Theorem 2 (estimated parameters).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

PAIR_BUDGET = 2**20  # pairs held at a time, over all replicas


def default_beta(n: int, d: int) -> float:
    return (1 / math.sqrt(2)) * ((2 * d + 1) * n / 4) ** (1 / (d + 4))


def whiten(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[R, n, d] -> whitened points, the Cholesky factor of S, and which replicas are singular.

    Centred first: an offset of 100 would cost float32 two digits. Any square root of S serves, since only distances enter.
    """
    n, d = z.shape[-2:]
    eps = torch.finfo(z.dtype).eps
    mean = z.mean(-2, keepdim=True)
    centred = z - mean
    # The scale is taken out before the rank is judged, so that units do not decide what counts as singular.
    scale = centred.square().mean(-2, keepdim=True).sqrt()
    constant = scale <= 10 * eps * mean.abs()
    unit = torch.where(constant, torch.ones_like(scale), scale)
    standard = centred / torch.where(constant, torch.full_like(scale, math.inf), scale)
    correlation = standard.mT @ standard / n
    identity = torch.eye(d, dtype=z.dtype, device=z.device)
    # A replica that holds NaN must not stop the others: eigenvalue routines fail on NaN, and its y carries the NaN on.
    finite = torch.isfinite(correlation).all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[:, None, None], correlation, identity))
    singular = eigenvalues[..., 0] <= 10 * d * eps * eigenvalues[..., -1]
    factor = torch.linalg.cholesky_ex(torch.where((finite & ~singular)[:, None, None], correlation, identity)).L
    y = torch.linalg.solve_triangular(factor, standard.mT, upper=False).mT
    return y, unit.mT * factor, singular


def pair_sums(y: Tensor, beta: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """k_ij = exp(-b^2/2 |y_i - y_j|^2) of [R, n, d]: sum_ij k_ij [R] and, if asked for, sum_j k_ij [y_j, 1] [R, n, d+1]."""
    b2 = beta * beta
    replicas, n, _ = y.shape
    square = y.square().sum(-1, keepdim=True)
    one = torch.ones_like(square)
    # [y, -|y|^2/2, 1] . [y, 1, -|y|^2/2] = -|y_i - y_j|^2 / 2, and the kernel times [y, 1] is all that the gradient needs.
    left = torch.cat((y, -0.5 * square, one), -1) * b2
    right = torch.cat((y, one, -0.5 * square), -1).mT
    sums = torch.empty_like(torch.cat((y, one), -1)) if gradient else None
    pairs = torch.zeros_like(square[:, 0, 0])
    step = max(1, PAIR_BUDGET // max(1, replicas * n))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        kernel = (left[:, rows] @ right).exp_()
        if sums is None:
            pairs += kernel.sum((-2, -1))
        else:
            sums[:, rows] = kernel @ torch.cat((y, one), -1)
            pairs += sums[:, rows, -1].sum(-1)
    return pairs, sums


PairSums = Callable[[Tensor, float, bool], tuple[Tensor, Tensor | None]]


def forward(z: Tensor, beta: float, gradient: bool, pair_sums: PairSums = pair_sums) -> tuple[Tensor, Tensor]:
    """[R, n, d] -> HZ [R] and, if asked for, d HZ / d z [R, n, d] from the same pass over the pairs (else [R, 0, d]).

    Where singular the gradient is zero: HZ is the constant 4n there. HZ is unchanged by affine maps of z, so the gradient may
    be taken at y, where mean and covariance are 0 and I, and carried back with the factor. There a step e_j moves the whitened
    y_i by e_i - mean(e) - (1/2n) sum_j (y_j e_j' + e_j y_j') y_i.
    """
    replicas, n, d = z.shape
    b2 = beta * beta
    y, factor, singular = whiten(z)
    pairs, sums = pair_sums(y, beta, gradient)  # pairs may be more precise than y: HZ is a small difference
    single = (-b2 / (2 * (1 + b2)) * y.square().sum(-1, keepdim=True)).exp()
    once = single.sum((-2, -1), dtype=pairs.dtype)
    value = (pairs / n - 2 * (1 + b2) ** (-d / 2) * once + n * (1 + 2 * b2) ** (-d / 2)).to(z.dtype)
    value = torch.where(singular, torch.full_like(value, 4 * n), value)
    if sums is None:
        return value, z.new_empty((replicas, 0, d))
    plain = (-2 * b2 / n) * (sums[..., -1:] * y - sums[..., :-1]) + 2 * b2 * (1 + b2) ** (-d / 2 - 1) * single * y
    moment = y.mT @ plain
    through = plain - plain.mean(-2, keepdim=True) - y @ (moment + moment.mT) / (2 * n)
    result = torch.linalg.solve_triangular(factor.mT, through.mT, upper=True).mT
    return value, result.masked_fill_(singular[:, None, None], 0).contiguous()


def null_distribution(n: int, d: int, beta: float) -> tuple[float, float]:
    """Mean and variance of HZ under normality."""
    b2 = beta * beta
    a, w = 1 + 2 * b2, (1 + b2) * (1 + 3 * b2)
    mean = 1 - a ** (-d / 2) * (1 + d * b2 / a + d * (d + 2) * b2**2 / (2 * a**2))
    variance = (
        2 * (1 + 4 * b2) ** (-d / 2)
        + 2 * a**-d * (1 + 2 * d * b2**2 / a**2 + 3 * d * (d + 2) * b2**4 / (4 * a**4))
        - 4 * w ** (-d / 2) * (1 + 3 * d * b2**2 / (2 * w) + d * (d + 2) * b2**4 / (2 * w**2))
    )
    return mean, variance


def log_p_value_parameters(n: int, d: int, beta: float) -> tuple[float, float]:
    """Log-mean and log-standard deviation of the lognormal whose survival function is the p-value."""
    mean, variance = null_distribution(n, d, beta)
    ratio = variance / mean**2
    return math.log(mean) - 0.5 * math.log1p(ratio), math.sqrt(math.log1p(ratio))
