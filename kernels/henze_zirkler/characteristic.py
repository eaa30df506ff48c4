r"""Henze-Zirkler statistic in plain torch at a cost linear in n, from the empirical characteristic function.

Henze & Zirkler 1990; with y_i the whitened points and phi_n(t) = mean_i exp(i t.y_i),

    HZ = n E_{t ~ N(0, b^2 I)} |phi_n(t) - exp(-|t|^2/2)|^2

and 4n where the covariance is singular. Three measures take the place of N(0, b^2 I), each symmetric in t:

    quadrature   a tensor grid, d <= 3: the statistic itself
    random       draws of N(0, b^2 I): an estimate without bias over the draws
    sliced       N(0, b^2) on the lines through random directions: the mean of the projections' univariate statistics

A product measure over t = (t_1, ..., t_F) needs n times the sum of its factors' nodes in exponentials, not their product:
by exp(i t.y) = prod_f exp(i t_f.y_f) and the symmetry, the mean over t of |phi_n - exp(-|t|^2/2)|^2 is the mean of
(mean_i prod_f trig_f(t_f.y_if) - target)^2 summed over every choice of trig_f = cos or sin: a product of matrices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from libi_fast.kernels.henze_zirkler import reference
from libi_fast.kernels.henze_zirkler.reference import Reduce, alone, gradient_at_points, whiten

BUDGET = 2**20  # numbers held at a time, over rows and replicas
CHUNK = 256  # rows whose products are summed in the dtype of y
LARGEST_GRID = 2**22  # of numbers a replica; past it the exact form serves
TOLERANCE = {torch.float32: 1e-7, torch.float64: 1e-10}  # of the quadrature, absolute, in HZ


class Factor(NamedTuple):
    """Frequencies [m, k] for the next k columns of y, and their weights [m] in the mean."""

    frequencies: Tensor
    weight: Tensor

    def features(self, y: Tensor) -> Tensor:
        """[..., k] -> [..., 2m]: cosines, then sines."""
        m = len(self.weight)
        phase = y @ self.frequencies.mT
        result = phase.new_empty((*phase.shape[:-1], 2 * m))
        torch.cos(phase, out=result[..., :m])
        torch.sin(phase, out=result[..., m:])
        return result

    def pulled_back(self, slope: Tensor, features: Tensor) -> Tensor:
        """The gradient in y [..., k] from that in the features."""
        (by_cos, by_sin), (cos, sin) = slope.chunk(2, -1), features.chunk(2, -1)
        return (by_sin * cos).addcmul_(by_cos, sin, value=-1) @ self.frequencies

    def target(self) -> Tensor:
        """The features' mean under N(0, I), [2m]."""
        cos = (-0.5 * self.frequencies.square().sum(-1)).exp()
        return torch.cat((cos, torch.zeros_like(cos)))

    def weights(self) -> Tensor:
        return self.weight.repeat(2)


Features = list[Tensor]  # of each factor, [..., n, w_f]


def products(features: Features) -> tuple[Tensor, Tensor]:
    """Of two or more factors: products of every choice of a column from each but the last, [..., n, w_1 w_2 ...]; the last."""
    left, *others, last = features
    for f in others:
        left = (left[..., :, None] * f[..., None, :]).flatten(-2)
    return left, last


def row_sums(features: Features) -> Tensor:
    """Sums of :func:`products` over rows, [..., w_1 w_2 ..., w_last], in float64 over chunks of rows: HZ is a small number."""
    if len(features) == 1:
        return features[0].sum(-2, keepdim=True, dtype=torch.float64)
    left, last = (t.split(CHUNK, -2) for t in products(features))
    result = (left[0].mT @ last[0]).double()
    for a, b in zip(left[1:], last[1:], strict=True):
        result += a.mT @ b
    return result


def products_pulled_back(features: Features, slope: Tensor) -> Features:
    """The gradient in the features of up to three factors from that in the sum over rows of their products."""
    if len(features) == 1:
        return [slope]  # [..., 1, w]: the same in every row
    left, last = products(features)
    by_last = left @ slope
    by_left = last @ slope.mT
    if len(features) == 2:
        return [by_left, by_last]
    a, b = features[:2]
    by_left = by_left.unflatten(-1, (a.shape[-1], b.shape[-1]))
    return [(by_left @ b[..., None]).squeeze(-1), (a[..., None, :] @ by_left).squeeze(-2), by_last]


# --- the measures ---


class Extent(NamedTuple):
    """Of points along a coordinate: the largest distance of two, and of one from 0."""

    between: float
    away: float


def extents(y: Tensor) -> list[Extent]:
    """Of each coordinate of y [R, n, k], over the replicas that are finite."""
    if not len(y):
        return [Extent(0, 0)] * y.shape[-1]
    low, high = (x.nan_to_num(0, 0, 0) for x in torch.aminmax(y, dim=-2))
    between, away = (high - low).amax(0), torch.maximum(high, -low).amax(0)
    return [Extent(*pair) for pair in zip(between.tolist(), away.tolist(), strict=True)]


def nodes(extent: Extent, n: int, beta: float, dtype: torch.dtype) -> int:
    """Nodes +-(k + 1/2) h for N(0, beta^2) on one coordinate, h in units of beta.

    The midpoint rule errs by the integrand's Fourier transform at 2 pi / h, and by the tail that is cut. The transform of
    |phi_n|^2 is a Gaussian of width 1 around beta times each distance of two points, that of phi_n exp(-t^2/2) has the width
    sqrt(1 + beta^2) around beta times each point, and that of exp(-t^2) the width sqrt(1 + 2 beta^2) around 0.
    """
    margin = margin_of(n, dtype)
    bandwidth = max(
        beta * extent.between + margin,
        beta * extent.away + margin * math.sqrt(1 + beta**2),
        margin * math.sqrt(1 + 2 * beta**2),
    )
    count = math.ceil(margin * bandwidth / (2 * math.pi))
    return count + -count % 8  # few sizes, and whole vectors


def margin_of(n: int, dtype: torch.dtype) -> float:
    return math.sqrt(2 * math.log(n / TOLERANCE[dtype]))


def axis(extent: Extent, n: int, beta: float, like: Tensor) -> Factor:
    count = nodes(extent, n, beta, like.dtype)
    step = margin_of(n, like.dtype) / count
    s = (torch.arange(count, dtype=torch.float64) + 0.5) * step
    weight = 2 * step / math.sqrt(2 * math.pi) * (-0.5 * s.square()).exp()
    return Factor((beta * s)[:, None].to(like), weight.to(like))


def grid(y: Tensor, beta: float) -> list[Factor]:
    return [axis(e, y.shape[-2], beta, y) for e in extents(y)]


def lines(y: Tensor, directions: Tensor, beta: float) -> list[Factor]:
    step = max(1, BUDGET // max(1, y.shape[0] * y.shape[1]))
    found = [e for part in directions.split(step) for e in extents(y @ part.mT)]
    widest = Extent(max(e.between for e in found), max(e.away for e in found))
    t, weight = axis(widest, y.shape[-2], beta, y)
    count = len(directions)
    return [Factor((directions[:, None] * t).flatten(0, 1), weight.repeat(count) / count)]


def draws(frequencies: Tensor) -> list[Factor]:
    count = len(frequencies)
    return [Factor(frequencies, frequencies.new_full((count,), 1 / count))]


# --- the statistic ---


def group_statistic(
    y: Tensor, factors: list[Factor], step: int, gradient: bool, n: int, reduce: Reduce
) -> tuple[Tensor, Tensor | None]:
    """y [R, rows, d] -> the statistic of the n rows of all processes [R] and, if asked for, its gradient in y."""
    columns = [f.frequencies.shape[-1] for f in factors]
    blocks = y.split(step, -2)

    def features(block: Tensor) -> Features:
        return [f.features(part) for f, part in zip(factors, block.split(columns, -1), strict=True)]

    kept = [features(blocks[0])] if len(blocks) == 1 else None  # else made again for the gradient
    sums = sum(map(row_sums, kept or map(features, blocks)), torch.zeros((), dtype=torch.float64, device=y.device))
    difference = reduce(sums) / n - row_sums([f.target()[None] for f in factors])
    weighted = row_sums([f.weights()[None] for f in factors]) * difference
    value = (n * (weighted * difference).sum((-2, -1))).to(y.dtype)
    if not gradient:
        return value, None
    slope = (2 * weighted).to(y.dtype)

    def pulled_back(features: Features) -> Tensor:
        parts = zip(factors, products_pulled_back(features, slope), features, strict=True)
        return torch.cat([factor.pulled_back(s, f) for factor, s, f in parts], -1)

    return value, torch.cat([pulled_back(f) for f in kept or map(features, blocks)], -2)


def statistic(y: Tensor, factors: list[Factor], gradient: bool, n: int, reduce: Reduce) -> tuple[Tensor, Tensor | None]:
    """:func:`group_statistic` for as many replicas at a time as the budget holds."""
    widths = [2 * len(f.weight) for f in factors]
    width = sum(widths) + (widths[0] * widths[1] if len(widths) == 3 else 0)
    # Of n, not of this process's rows: every process must make the same groups.
    group = max(1, BUDGET // max(n * width, math.prod(widths)))
    parts = [group_statistic(part, factors, max(1, BUDGET // (group * width)), gradient, n, reduce) for part in y.split(group)]
    slopes = [s for _, s in parts if s is not None]
    return torch.cat([v for v, _ in parts]), torch.cat(slopes) if gradient else None


def forward(
    z: Tensor, vectors: Tensor, beta: float, method: str, gradient: bool, total: int | None = None, reduce: Reduce = alone,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[R, n, d] -> the statistic [R] and, if asked for, its gradient in z [R, n, d] (else [R, 0, d]).

    ``vectors`` are random's frequencies [m, d] or sliced's directions [S, d]. Random's rows may be spread over processes:
    ``total`` of them, and ``reduce`` sums over processes; other methods choose nodes by all the points they see.
    """
    replicas, rows, d = z.shape
    n = rows if total is None else total
    y, factor, singular = whiten(z, n, reduce)
    if method == "random":
        factors = draws(vectors)
    elif method == "sliced":
        factors = lines(y, vectors, beta)
    else:
        if math.prod(2 * nodes(e, n, beta, y.dtype) for e in extents(y)) > LARGEST_GRID:
            return reference.forward(z, beta, gradient)
        factors = grid(y, beta)
    value, slope = statistic(y, factors, gradient, n, reduce)
    value = torch.where(singular, torch.full_like(value, 4 * n), value)
    if slope is None:
        return value, z.new_empty((replicas, 0, d))
    return value, gradient_at_points(slope, y, factor, singular, n, reduce)


# --- null distributions, which know the frequencies or directions ---


def null_of_draws(frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance under normality of the statistic at these frequencies [m, d].

    With K(s, t) = exp(-(|s|^2 + |t|^2)/2) (exp(s.t) - 1 - s.t - (s.t)^2/2), the covariance of the limiting process (Henze &
    Zirkler 1990, estimated parameters): mean_s K(s, s) and mean_st (K(s, t)^2 + K(s, -t)^2).
    """
    t = frequencies.double()
    square = t.square().sum(-1)

    def covariance(inner: Tensor, squares: Tensor) -> Tensor:
        return (inner - squares / 2).exp() - (-squares / 2).exp() * (1 + inner + inner.square() / 2)

    mean = covariance(square, 2 * square).mean()
    variance = torch.zeros_like(mean)
    for part, own in zip(t.split(max(1, BUDGET // len(t))), square.split(max(1, BUDGET // len(t))), strict=True):
        inner, squares = part @ t.mT, own[:, None] + square
        variance = variance + covariance(inner, squares).square().sum() + covariance(-inner, squares).square().sum()
    return mean, variance / len(t) ** 2


def null_of_slices(directions: Tensor, n: int, beta: float) -> tuple[Tensor, Tensor]:
    """Mean and variance under normality of the mean of univariate statistics along these directions [S, d].

    The covariance for two directions at cosine c is 2 E[K(s, t)^2] over s, t ~ N(0, beta^2), K as in :func:`null_of_draws`
    with s.t = c s t; I(q) = E[exp(-s^2 - t^2 + q s t)] = (a^2 - q^2 b^4)^(-1/2) and its derivatives in q give every term.
    At c = 1 it is :func:`reference.null_distribution`'s variance for d = 1.
    """
    mean, _ = reference.null_distribution(n, 1, beta)
    b2 = beta * beta
    b4, a = b2 * b2, 1 + 2 * b2
    u = directions.double()
    variance = u.new_zeros(())
    for part in u.split(max(1, BUDGET // len(u))):
        c = part @ u.mT
        w = a * a - c.square() * b4
        cross = w**-0.5 * (2 + 3 * c.square() * b4 / w + 3 * (c.square() * b4 / w).square())
        variance = (
            variance
            + 2
            * (
                (a * a - 4 * c.square() * b4) ** -0.5
                + 1 / a
                + 2 * c.square() * b4 / a**3
                + 9 * c**4 * b4**2 / (4 * a**5)
                - cross
            ).sum()
        )
    return u.new_tensor(mean), variance / len(u) ** 2
