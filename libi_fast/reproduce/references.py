"""What the methods are measured against: exact log-likelihoods, and exact maximum likelihood on the same training rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libi_fast.data.synthetic import JTEX_B
from libi_fast.models.laplace import local_log_likelihood
from libi_fast.models.likelihoods import DiagonalGaussian
from libi_fast.models.linear_gaussian import exact_log_likelihood, is_linear_gaussian
from libi_fast.models.model import LatentVariableModel
from libi_fast.models.networks import chain
from libi_fast.models.proposals import laplace_mixture
from libi_fast.models.quadrature import quadrature_log_likelihood

TOLERANCE = 1e-3  # of quadrature: it stops where two halvings in a row agree to a tenth of that, and is then right to 1e-9
CUBIC_NODES = 52  # along each axis: halving their spacing moves a row by less than 1e-9
CUBIC_REACH = 7.0  # standard deviations of the noise
MOBIUS = (1, 1 + 4j, 7 + 4j)  # a, b and d of the data set's map


def in_double(model: LatentVariableModel) -> LatentVariableModel:
    """A copy in float64: what is measured is the model, not rounding."""
    return copy.deepcopy(model).double().requires_grad_(False)


def exact(model: LatentVariableModel, x: Tensor) -> Tensor:
    """log p(x) of every row, [N] float64: in closed form, or by quadrature over two latent dimensions."""
    model, x = in_double(model), x.double()
    found = _without_search(model, x)
    return quadrature_log_likelihood(model, x, TOLERANCE) if found is None else found


def _without_search(model: LatentVariableModel, x: Tensor) -> Tensor | None:
    """log p(x) [N] where its integral has a closed form or fixed nodes: linear decoders, and CubicJTEx's."""
    if is_linear_gaussian(model):
        return exact_log_likelihood(model, x)
    pairs = chain(model.decoder)
    if pairs is not None and [name for _, name in pairs] == ["cube"] and x.shape[1] == model.latent_dim == 2:
        linear, likelihood = pairs[0][0], model.likelihood
        if getattr(linear, "bias", None) is None and isinstance(likelihood, DiagonalGaussian):
            return cubic_log_likelihood(x, likelihood.variance.expand(2), linear.weight)
    return None


@torch.no_grad()
def nearly_exact(model: LatentVariableModel, x: Tensor) -> float:
    """The mean of log p(x), exact but on Mobius, where adaptive quadrature takes half a minute on 500 rows: there by quadrature
    around the mode of p(z | x) that has most mass, which sees no other."""
    model, x = in_double(model), x.double()
    found = _without_search(model, x)
    if found is None:
        found = local_log_likelihood(model, x, laplace_mixture(model, x).heaviest())
    return float(found.mean())


def maximum_likelihood(data: Any) -> LatentVariableModel:
    """The model of the data set's own family that maximises the likelihood of its training rows, in float64.

    Linear: Tipping & Bishop (1999) with the noise known, whose optimum LinearJTEx's A can take, too. CubicJTEx:
    see :func:`cubic_maximum_likelihood`. Mobius: of the six numbers of such a map, not of 252 weights, which have no optimum
    that could be found with certainty; it is what a method would reach that knew what the data are.
    """
    x, noise = data.train.double(), data.truth.noise_variance
    if data.name == "Mobius":
        return mobius_maximum_likelihood(x, data.truth.model)
    model = in_double(data.model())
    weights = next(model.decoder.parameters())
    if data.name == "Gaussian":
        weights.copy_(principal_weight(x, float(noise[0]), 2))
    elif data.name == "LinearJTEx":
        weights.copy_(principal_weight(x, float(noise[0] + JTEX_B[0]), 2))
    else:
        weights.copy_(cubic_maximum_likelihood(x, noise, data.truth.model.decoder[0].weight))
    return model


def principal_weight(x: Tensor, noise_variance: float, latent_dim: int) -> Tensor:
    """W [D, L] of the maximum of sum log N(x; 0, W W' + noise_variance I) over rows x [N, D] (Tipping & Bishop 1999, Eq 7)."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return vectors[:, -latent_dim:] * (values[-latent_dim:] - noise_variance).clamp_min(0).sqrt()


def cubic_log_likelihood(x: Tensor, noise_variance: Tensor, factor: Tensor) -> Tensor:
    """log p(x) of rows [N, 2] under x = u^3 + eps, u ~ N(0, factor factor'), [N], differentiable in ``factor`` [2, 2].

    The integral over u, of a product of two one-dimensional densities N(x_d; u_d^3, noise) and a Gaussian: the midpoint rule
    where those densities are above exp(-CUBIC_REACH^2 / 2), on nodes that do not depend on the parameter.
    """
    margin = CUBIC_REACH * noise_variance.sqrt()
    low, high = (torch.sign(v) * v.abs().pow(1 / 3) for v in (x - margin, x + margin))
    width = (high - low) / CUBIC_NODES  # [N, 2]
    steps = torch.arange(CUBIC_NODES, dtype=x.dtype, device=x.device) + 0.5
    u = low[..., None] + width[..., None] * steps  # [N, 2, nodes]
    noise = noise_variance[:, None]
    given = -0.5 * ((x[..., None] - u**3) ** 2 / noise + torch.log(2 * math.pi * noise)) + width[..., None].log()
    precision = torch.linalg.inv(factor @ factor.mT)
    diagonal = -0.5 * precision.diagonal()[:, None] * u**2 + given
    cross = precision[0, 1] * u[:, 0, :, None] * u[:, 1, None, :]
    joint = diagonal[:, 0, :, None] + diagonal[:, 1, None, :] - cross
    return torch.logsumexp(joint.flatten(1), 1) - math.log(2 * math.pi) - torch.linalg.slogdet(factor)[1]


def cubic_maximum_likelihood(x: Tensor, noise_variance: Tensor, start: Tensor) -> Tensor:
    """A [2, 2], lower triangular, of CubicJTEx's decoder chol(A A' + B) at the maximum of the likelihood next to ``start``, a
    lower-triangular factor of a covariance: L-BFGS over its three numbers."""
    free = start.detach().clone().tril().requires_grad_()
    _maximise(free, lambda: cubic_log_likelihood(x, noise_variance, free.tril()))
    factor = free.detach().tril()
    b = torch.diag(torch.tensor(JTEX_B, dtype=x.dtype, device=x.device))
    return torch.linalg.cholesky(factor @ factor.T - b)


class MobiusMap(nn.Module):
    """z -> (a z + b) / (z + d) in complex arithmetic, z [..., 2] as z1 + i z2; a, b and d as three pairs of real numbers."""

    def __init__(self, numbers: Sequence[complex] = MOBIUS):
        super().__init__()
        self.numbers = nn.Parameter(torch.view_as_real(torch.tensor(numbers, dtype=torch.complex128)))

    def forward(self, z: Tensor) -> Tensor:
        a, b, d = torch.view_as_complex(self.numbers)
        z = torch.view_as_complex(z.contiguous())
        return torch.view_as_real((a * z + b) / (z + d))


def mobius_maximum_likelihood(x: Tensor, truth: LatentVariableModel) -> LatentVariableModel:
    """The map's six numbers at the maximum of the likelihood of rows x next to those that ``truth`` was fitted to, the noise
    being the truth's: L-BFGS on the integral around the modes."""
    decoder = MobiusMap()
    model = LatentVariableModel(decoder, copy.deepcopy(truth.likelihood).double(), 2)
    z = laplace_mixture(model, x).heaviest()
    _maximise(decoder.numbers, lambda: local_log_likelihood(model, x, z))
    return model.requires_grad_(False)


def _maximise(free: Tensor, log_likelihood: Callable[[], Tensor]) -> None:
    """The mean of the rows' log-likelihoods, over the numbers ``free``, in place."""
    optimiser = torch.optim.LBFGS([free], max_iter=60, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -log_likelihood().mean()
        loss.backward()
        return loss.detach()

    with torch.enable_grad():
        optimiser.step(closure)
