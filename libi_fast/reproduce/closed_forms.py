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
DIFFERENCE = 1e-5  # of numerical derivatives


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

    truth, places = true_a(), torch.tril_indices(2, 2)

    def of(values: Tensor) -> Tensor:
        return truth.index_put(tuple(places), values)

    best = _minimum(lambda values: objective(of(values))[0], truth[*places])
    at_truth, at_optimum = objective(truth), objective(of(best))
    return {
        "objective at the truth": at_truth[0], "objective at the optimum": at_optimum[0],
        "log-likelihood of the truth": at_truth[1], "log-likelihood of the optimum": at_optimum[1],
    }  # fmt: skip


@torch.no_grad()
def _minimum(function: Callable[[Tensor], float], start: Tensor) -> Tensor:
    """The local minimum of a smooth function of a few numbers [n] next to ``start``: L-BFGS by central differences."""
    point = start.clone()
    steps = DIFFERENCE * torch.eye(len(point), dtype=point.dtype)

    def closure() -> float:
        slopes = [(function(point + step) - function(point - step)) / (2 * DIFFERENCE) for step in steps]
        point.grad = torch.tensor(slopes, dtype=point.dtype)
        return function(point)

    torch.optim.LBFGS([point], max_iter=100, line_search_fn="strong_wolfe").step(closure)
    return point
