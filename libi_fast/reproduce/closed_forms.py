"""The paper's worked examples (its Figure 1 and appendix C): models that the likelihood cannot tell apart.

Where its formulas are misprinted:

* Eq 15 gives I(X; Z) of the univariate example with an additive constant. With x = theta z + eps, Var x = s2 and Var eps = s2 -
  theta^2, I(X; Z) = h(x) - h(x | z) = 1/2 log(s2 / (s2 - theta^2)): the constants log(2 pi e) / 2 cancel, as they must, for
  theta = 0 makes x and z independent.
* The factor M of M M' = A A' + B must be the lower Cholesky factor. p(x) is the same for any, but the posterior is not: with
  the upper factor the objective at the VAE's optimum is not the 0.196 that the paper reports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from libi_fast.data.synthetic import JTEX_B, JTEX_NOISE, LinearJTEx
from libi_fast.models.likelihoods import DiagonalGaussian
from libi_fast.models.linear_gaussian import exact_mutual_information, linear_gaussian_marginal, mean_field_gap
from libi_fast.models.model import LatentVariableModel
from libi_fast.models.networks import JTExMap

GRID = 41  # values of each of B's two numbers


def univariate_information(theta: Tensor, variance: Tensor | float) -> Tensor:
    """I(X; Z) in nats of x = theta z + eps, eps ~ N(0, variance - theta^2), theta^2 < variance (Eq 15 without its constant)."""
    return -0.5 * torch.log1p(-theta.square() / variance)


def bivariate(a: Tensor | Sequence[Sequence[float]], b: Sequence[float] = JTEX_B) -> LatentVariableModel:
    """x = chol(A A' + B) z + eps, eps ~ N(0, 0.01 I - B), in float64: p(x) = N(0, A A' + 0.01 I) whatever B."""
    decoder = JTExMap(b).double()
    with torch.no_grad():
        decoder.a.copy_(torch.as_tensor(a, dtype=torch.float64))
    noise = JTEX_NOISE - torch.as_tensor(b, dtype=torch.float64)
    return LatentVariableModel(decoder, DiagonalGaussian(noise), 2).requires_grad_(False)


def true_a() -> Tensor:
    """An A of LinearJTEx's p(x), lower triangular: A A' is all that matters of it."""
    truth = LinearJTEx().truth
    return torch.linalg.cholesky(truth.covariance - JTEX_NOISE * torch.eye(2, dtype=torch.float64))


def grids(points: int = GRID) -> dict[str, Tensor]:
    """Figure 1, A and B: over B's two numbers, [points] strictly between 0 and 0.01, min over q of KL[q || p(z | x)] and
    I(X; Z), [points, points] in nats, the first number of B along the rows. All these models have the same p(x)."""
    b = torch.linspace(0, JTEX_NOISE, points + 2, dtype=torch.float64)[1:-1]
    a = true_a()
    models = [[bivariate(a, (float(first), float(second))) for second in b] for first in b]
    return {
        "b": b,
        "gap": torch.tensor([[float(mean_field_gap(m)) for m in row] for row in models], dtype=torch.float64),
        "information": torch.tensor([[float(exact_mutual_information(m)) for m in row] for row in models], dtype=torch.float64),
    }  # fmt: skip


def objective(a: Tensor) -> tuple[float, float]:
    """Of LinearJTEx's model with this A: KL[p || p_theta] + min over mean-field q of E KL[q || p_theta(z | x)] (Eq 2 on endless
    data, less p's entropy), and the log-likelihood on endless data."""
    truth, model = LinearJTEx().truth, bivariate(a)
    population = truth.expected_log_likelihood(*linear_gaussian_marginal(model))
    return truth.entropy_bound() - population + float(mean_field_gap(model)), population


@functools.cache
def worked_example() -> dict[str, float]:
    """The objective at LinearJTEx's truth and at its optimum, which is what a VAE learns there, and the log-likelihoods."""

    def of(values: list[float]) -> float:
        return objective(_lower(values))[0]

    truth = true_a()
    best = minimise(of, [float(truth[0, 0]), float(truth[1, 0]), float(truth[1, 1])])
    at_truth, at_optimum = objective(truth), objective(_lower(best))
    return {
        "objective at the truth": at_truth[0], "objective at the optimum": at_optimum[0],
        "log-likelihood of the truth": at_truth[1], "log-likelihood of the optimum": at_optimum[1],
    }  # fmt: skip


def _lower(values: Sequence[float]) -> Tensor:
    return torch.tensor([[values[0], 0.0], [values[1], values[2]]], dtype=torch.float64)


def minimise(
    function: Callable[[list[float]], float], start: list[float], step: float = 0.1, least: float = 1e-4
) -> list[float]:
    """A local minimum of a smooth function of a few numbers (Hooke & Jeeves 1961): along the axes, then on in the direction
    that helped; the step is halved where nothing helps."""

    def explored(point: list[float], value: float) -> tuple[list[float], float]:
        for i in range(len(point)):
            for sign in (step, -step):
                moved = [*point[:i], point[i] + sign, *point[i + 1 :]]
                if (now := function(moved)) < value:
                    point, value = moved, now
                    break
        return point, value

    base, best = list(start), function(start)
    while step > least:
        point, value = explored(base, best)
        if not value < best:
            step /= 2
            continue
        while value < best:
            ahead = [2 * p - b for p, b in zip(point, base, strict=True)]
            base, best = point, value
            point, value = explored(ahead, function(ahead))
    return base
