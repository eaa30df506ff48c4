r"""The smooth k-nearest-neighbour two-sample statistic in plain torch, in blocks so that memory stays bounded.

Djolonga & Krause 2017 (arXiv 1709.01006). The N = n1 + n2 points z are pooled; D_ij = sqrt(1e-5 + |z_i - z_j|^2). For each i a
set S of exactly k other points has probability proportional to exp(-alpha sum_{j in S} D_ij); P_ij = Pr(j in S), averaged over
the alphas. T is the sum of P over pairs from different samples. Over all assignments of the labels to the points it has

    mean = 2 m chi1
    Var = chi1 (1 - chi2) sum_i (r_i + c_i)^2 + chi1 chi2 sum_ij (P_ij^2 + P_ij P_ji) + chi1 (chi2 - 4 chi1) m^2
    chi1 = n1 n2 / (N (N-1)),   chi2 = 4 (n1-1) (n2-1) / ((N-2) (N-3)),   r and c the row and column sums,   m = sum_ij P_ij

and the statistic is -(T - mean) / sqrt(1e-5 + Var). A row of P sums to k, and Var is 0 if P is constant; so with
E_ij = P_ij - k / (N-1) off the diagonal the same is, without differences of large numbers,

    T - mean = sum of E over pairs from different samples
    Var = chi1 (1 - chi2) sum_j (c_j - k)^2 + chi1 chi2 sum_ij (E_ij^2 + E_ij E_ji)

Inside it computes in float64: for 100 points against 100, float32 throughout leaves errors of up to 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PAIR_BUDGET = 5 * 2**16  # pairs held at a time, over repetitions
POLYNOMIAL_BUDGET = 2**21  # coefficients held at a time: they are read twice, better from the cache
JITTER = 1e-5
STEP = 1e-30  # of the complex-step derivative: its square vanishes beside 1


def log_odds_scale(x: Tensor, k: int) -> Tensor:
    """t [rows] such that sum_j sigmoid(x_j + t) = k within 1/4, for x [n, rows] with -inf for a point that is left out.

    With such odds the number of chosen points has its mass at k, so that the recursions neither over- nor underflow. P is the
    same for any t, hence a rough one does. Newton's method on the logarithm, then bisection.
    """
    present = x > -math.inf
    count = present.sum(0)
    low = math.log(k) - x.logsumexp(0)  # sigmoid(y) <= exp(y)
    high = torch.where(present, -x, x).logsumexp(0) - (count - k).log()  # 1 - sigmoid(y) <= exp(-y)
    t = low
    for iteration in range(100):
        p = torch.sigmoid(x + t)
        total = p.sum(0)
        todo = (total - k).abs() > 0.25  # a NaN is never to do
        if not bool(todo.any()):
            break
        low, high = torch.where(total < k, t, low), torch.where(total < k, high, t)
        newton = t + total * (k / total).log() / (p - p.square()).sum(0)
        good = (newton > low) & (newton < high) & (iteration < 10)
        t = torch.where(todo, torch.where(good, newton, (low + high) / 2), t)
    return t


def inclusion(x: Tensor, k: int, direction: Tensor | None = None) -> Tensor:
    """P_j = Pr(j in S), Pr(S) proportional to exp(sum_{j in S} x_j) over sets S of k of the points with x_j > -inf.

    x [n, rows] -> P [n, rows], or with a ``direction`` G [n, rows] instead its derivative along G, sum_l Cov(1_j, 1_l) G_l:
    the covariance is symmetric, so that this is the gradient of sum_l G_l P_l too.
    """
    if k == 0:
        return torch.zeros_like(x)
    if k == 1:
        p = torch.softmax(x, 0)
        return p if direction is None else p * (direction - (p * direction).sum(0))
    out = torch.empty_like(x)
    step = max(1, POLYNOMIAL_BUDGET // (len(x) * (k + 1)))
    for start in range(0, x.shape[1], step):
        rows = slice(start, start + step)
        p = torch.sigmoid(x[:, rows] + log_odds_scale(x[:, rows], k))
        if direction is None:
            out[:, rows] = _condition(p, k)
        else:
            out[:, rows] = _condition(torch.complex(p, STEP * p * (1 - p) * direction[:, rows]), k).imag / STEP
    return out


def _condition(p: Tensor, k: int) -> Tensor:
    """Pr(j is chosen | k are) = p_j Pr(k-1 of the others are) / Pr(k are), points chosen independently with p [n, rows]."""
    n, rows = p.shape
    # before[j, m + 1] = Pr(m of the points before j are chosen), m < k; the zero in front spares the recursion its first case.
    before = p.new_empty((n, k + 1, rows))
    before[:, 0] = 0
    before[0, 1] = 1
    before[0, 2:] = 0
    for j in range(n - 1):
        torch.lerp(before[j, 1:], before[j, :-1], p[j], out=before[j + 1, 1:])
    # after[m] = Pr(k - 1 - m of the points after j are chosen), so that it meets before[j, m + 1]
    after, next_after = p.new_zeros((2, k + 1, rows))
    after[k - 1] = 1
    joint = torch.empty_like(p)
    for j in reversed(range(n)):
        torch.sum(before[j, 1:] * after[:-1], 0, out=joint[j])
        torch.lerp(after[:-1], after[1:], p[j], out=next_after[:-1])
        after, next_after = next_after, after
    joint *= p
    return joint * (k / joint.sum(0))  # sum_j Pr(j and k - 1 of the others) = k Pr(k)


def neighbours(distance: Tensor, k: int, alpha: float, direction: Tensor | None = None) -> Tensor:
    """D [R, N, N] -> P [R, i, j], zero for j = i; or its derivative along ``direction`` [R, i, j] with respect to -alpha D."""
    replicas, n, _ = distance.shape
    own = torch.eye(n, dtype=torch.bool, device=distance.device)
    # Where most are chosen, choose who is not: its probabilities are one less, its covariances the same.
    complement = 2 * k > n - 1
    size, sign = (n - 1 - k, alpha) if complement else (k, -alpha)
    x = (sign * distance).masked_fill(own, -math.inf)
    along = None if direction is None else direction.permute(2, 0, 1).reshape(n, -1)
    found = inclusion(x.permute(2, 0, 1).reshape(n, -1), size, along)  # rows, the many, lie innermost
    result = found.reshape(n, replicas, n).permute(1, 2, 0)
    return (1 - result).masked_fill(own, 0) if complement and direction is None else result


def _block(z: Tensor, n1: int, k: int, alphas: Sequence[float], gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Pooled points [R, N, d] -> the statistic [R] and, if asked for, its gradient [R, N, d]."""
    n = z.shape[1]
    n2 = n - n1
    chi1, chi2 = n1 * n2 / (n * (n - 1)), 4 * (n1 - 1) * (n2 - 1) / ((n - 2) * (n - 3))
    distance = (JITTER + torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist").square()).sqrt()
    excess = torch.stack([neighbours(distance, k, alpha) for alpha in alphas]).mean(0) - k / (n - 1)
    excess.diagonal(dim1=1, dim2=2).zero_()
    columns = excess.sum(1, keepdim=True)
    both = excess + excess.mT
    between = excess[:, :n1, n1:].sum((1, 2)) + excess[:, n1:, :n1].sum((1, 2))
    variance = chi1 * (1 - chi2) * columns.square().sum((1, 2)) + chi1 * chi2 * (excess * both).sum((1, 2))
    scale = (JITTER + variance).rsqrt()
    statistic = -between * scale
    if not gradient:
        return statistic, None
    # The derivative along P, up to constants of a row: those do not matter, as rows of P sum to k.
    along = (between * scale**3)[:, None, None] * (chi1 * (1 - chi2) * columns + chi1 * chi2 * both)
    along[:, :n1, n1:] -= scale[:, None, None]
    along[:, n1:, :n1] -= scale[:, None, None]
    through = torch.stack([-alpha * neighbours(distance, k, alpha, along) for alpha in alphas]).mean(0)
    pull = (through + through.mT) / distance
    centred = z - z.mean(1, keepdim=True)
    return statistic, pull.sum(2, keepdim=True) * centred - pull @ centred


def forward(a: Tensor, b: Tensor, k: int, alphas: Sequence[float], gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """a [R, n1, d], b [R, n2, d] -> the statistic [R] and, if asked for, its gradients by a and b (else [R, 0, d])."""
    replicas, n1, _ = a.shape
    n = n1 + b.shape[1]
    value = a.new_empty(replicas)
    to_a, to_b = (t.new_empty((replicas, t.shape[1] * gradient, t.shape[2])) for t in (a, b))
    step = max(1, PAIR_BUDGET // n**2)
    for start in range(0, replicas, step):
        block = slice(start, start + step)
        value[block], to_z = _block(torch.cat((a[block], b[block]), 1).double(), n1, k, alphas, gradient)
        if to_z is not None:
            to_a[block], to_b[block] = to_z[:, :n1], to_z[:, n1:]
    return value, to_a, to_b
