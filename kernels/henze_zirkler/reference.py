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
FAR = 20.0  # beta from which rounding of |y_i - y_j|^2 by products would be felt


def default_beta(n: int, d: int) -> float:
    return (1 / math.sqrt(2)) * ((2 * d + 1) * n / 4) ** (1 / (d + 4))


Reduce = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return tensor


def whiten(z: Tensor, total: int | None = None, reduce: Reduce = alone) -> tuple[Tensor, Tensor, Tensor]:
    """[R, n, d] -> whitened points, the Cholesky factor of S, and which replicas are singular.

    Centred first: an offset of 100 would cost float32 two digits. Any square root of S serves where only distances enter.
    Of ``total`` rows that are spread over processes, these n are this process's, and ``reduce`` sums over processes.
    """
    d = z.shape[-1]
    n = z.shape[-2] if total is None else total
    eps = torch.finfo(z.dtype).eps
    mean = reduce(z.sum(-2, keepdim=True)) / n
    centred = z - mean
    # The scale is taken out before the rank is judged, so that units do not decide what counts as singular.
    scale = (reduce(centred.square().sum(-2, keepdim=True)) / n).sqrt()
    constant = scale <= 10 * eps * mean.abs()
    unit = torch.where(constant, torch.ones_like(scale), scale)
    standard = centred / torch.where(constant, torch.full_like(scale, math.inf), scale)
    correlation = reduce(standard.mT @ standard) / n
    identity = torch.eye(d, dtype=z.dtype, device=z.device)
    # A replica that holds NaN must not stop the others: eigenvalue routines fail on NaN, and its y carries the NaN on.
    finite = torch.isfinite(correlation).all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[:, None, None], correlation, identity))
    singular = eigenvalues[..., 0] <= 10 * d * eps * eigenvalues[..., -1]
    factor = torch.linalg.cholesky_ex(torch.where((finite & ~singular)[:, None, None], correlation, identity)).L
    y = torch.linalg.solve_triangular(factor, standard.mT, upper=False).mT
    return y, unit.mT * factor, singular


def gradient_at_points(
    slope: Tensor, y: Tensor, factor: Tensor, singular: Tensor, total: int | None = None, reduce: Reduce = alone
) -> Tensor:
    """The gradient in z from ``slope``, that in y with the y_i taken as free; arguments as :func:`whiten` gives and takes them.

    The statistic is unchanged where z is replaced by its whitened points, so the gradient may be taken at y, where mean and
    covariance are 0 and I, and carried back with the factor. There a step e_j moves the whitened y_i by e_i - mean(e) - P y_i,
    P the lower triangle, its diagonal halved, of A = (1/n) sum_j (y_j e_j' + e_j y_j'): chol(I + A) = I + P to first order.
    Where singular it is zero: the statistic is the constant 4n there.
    """
    n = y.shape[-2] if total is None else total
    moment = reduce(y.mT @ slope)
    through = slope - reduce(slope.sum(-2, keepdim=True)) / n - y @ (moment.triu() + moment.triu(1).mT) / n
    result = torch.linalg.solve_triangular(factor.mT, through.mT, upper=True).mT
    return result.masked_fill_(singular[:, None, None], 0).contiguous()


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
        if beta < FAR:
            kernel = (left[:, rows] @ right).exp_()
        else:
            columns = (beta * y).unbind(-1)
            between = sum(((c[:, rows, None] - c[:, None]).square() for c in columns), y.new_zeros(()))
            kernel = between.mul_(-0.5).exp_()
        if sums is None:
            pairs += kernel.sum((-2, -1))
        else:
            sums[:, rows] = kernel @ torch.cat((y, one), -1)
            pairs += sums[:, rows, -1].sum(-1)
    return pairs, sums


PairSums = Callable[[Tensor, float, bool], tuple[Tensor, Tensor | None]]


def forward(z: Tensor, beta: float, gradient: bool, pair_sums: PairSums = pair_sums) -> tuple[Tensor, Tensor]:
    """[R, n, d] -> HZ [R] and, if asked for, d HZ / d z [R, n, d] from the same pass over the pairs (else [R, 0, d])."""
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
    slope = (-2 * b2 / n) * (sums[..., -1:] * y - sums[..., :-1]) + 2 * b2 * (1 + b2) ** (-d / 2 - 1) * single * y
    return value, gradient_at_points(slope, y, factor, singular)


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


def lognormal_parameters(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mean and log-standard deviation of the lognormal of these moments, whose survival function is the p-value."""
    log_variance = torch.log1p(variance / mean.square())
    return mean.log() - 0.5 * log_variance, log_variance.sqrt()
