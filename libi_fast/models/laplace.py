"""Gaussians around given codes that fit p(z | x) locally, and integrals over z that take their scale from them.

With J the decoder's Jacobian at a code z, F the likelihood's Fisher information and s its score at the decoder's output,
Laplace's approximation after one Gauss-Newton step is N(z + P (J's - z), P), P = (I + J'FJ)^-1: the exact posterior of a
linear-Gaussian model, whatever z.

Everything here is for one model under ``torch.vmap``, too.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels.chains.reference import Density
from libi_fast.models.model import LatentVariableModel, evaluation_mode
from libi_fast.ops.log_mean_exp import log_mean_exp
from libi_fast.ops.random import Stream, philox_normal, philox_uniform

WIDER = 1.5  # a proposal's variance over Laplace's: weights of a posterior that is nearly Gaussian stay bounded
SPACING, NODES = 0.75, 13  # of local quadrature along each axis: how far apart, in standard deviations, and how many
ROUNDS = 2  # of Gauss-Newton steps, and of fitting the nodes to the posterior's own mean and covariance
SHARES = (0.0, 0.1, 0.3, 1.0)  # of a Gauss-Newton step
MOVED = 2.0  # nats by which log p(x, z) must be higher elsewhere for the nodes to leave their place


@torch.no_grad()
def laplace(model: LatentVariableModel, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n, L] of Laplace's approximation to p(z | x) and a square root of its covariance [n, L, L], from codes z near its
    mode; not differentiated."""
    try:
        jacobian = torch.vmap(torch.func.jacfwd(lambda one: model.decode(one[None])[0]))(z).double()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the decoder's Jacobian is needed, but torch.func cannot take it: {reason}") from error
    output = model.decode(z)
    # In float64: narrow posteriors have precisions of 1e7 in one direction and 1 in another.
    information, score = model.likelihood.information(output).double(), model.likelihood.score(x, output).double()
    identity = torch.eye(z.shape[-1], dtype=torch.float64, device=z.device)
    precision = identity + jacobian.mT @ (information[..., None] * jacobian)
    slope = (jacobian.mT @ score[..., None])[..., 0] - z
    factor = torch.linalg.cholesky_ex(precision).L
    scale = torch.linalg.solve_triangular(factor.mT, identity.expand_as(factor), upper=True)
    mean = z + (scale @ (scale.mT @ slope[..., None]))[..., 0]
    return mean.to(z.dtype), scale.to(z.dtype)


def log_joint(model: LatentVariableModel, x: Tensor, z: Tensor) -> Tensor:
    """log p(x | z) + log N(z; 0, I), x [n, D] with z [n, L] or [n, S, L]."""
    prior = -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
    return model.log_prob(x if z.dim() == x.dim() else x[:, None], z) + prior


def log_joint_and_gradient(model: LatentVariableModel, x: Tensor) -> Density:
    """log p(x, z) of rows x [N, D], with its gradient to codes z [1, n, C, L]: the density of Markov chains."""

    def density(rows: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = z[0].detach().requires_grad_()
            value = log_joint(model, x[rows], leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach()[None], gradient[None]

    return density


# --- mutual information ---


class MutualInformationEstimate(NamedTuple):
    """value [] in nats, differentiable in nothing; standard_error []; effective_sample_size [n] of each p(x)'s weights."""

    value: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor


def log_ratios(model: LatentVariableModel, z: Tensor, noise: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x|z) - log p(x) of draws (z, x) of the model, [n], and log-weights [n, S] behind the second term.

    z [n, L] from the prior, noise [n, D] that the likelihood makes x of, inner [n, S, L] standard normal.

    The mean over draws estimates I(X; Z), and its derivatives those of I(X; Z) (of a likelihood that cannot be differentiated
    through its draws by the score function), all with a bias that falls as 1/S: the estimate of p(x), importance-weighted with
    Laplace's approximation around z, has none, but that of its logarithm is low, and the ratio high, by about half the
    estimate's relative variance.
    """
    likelihood = model.likelihood
    x = likelihood.sample(model.decode(z), noise)
    mean, scale = laplace(model, x.detach(), z)
    scale = math.sqrt(WIDER) * scale
    samples = mean[:, None] + inner @ scale.mT
    log_q = -0.5 * (inner.square() + math.log(2 * math.pi)).sum(-1) - torch.linalg.slogdet(scale)[1][:, None]
    log_weights = log_joint(model, x, samples) - log_q
    given = model.log_prob(x, z)
    ratio = given - log_mean_exp(log_weights)
    if not likelihood.reparameterized:
        ratio = ratio + (ratio - ratio.mean()).detach() * (given - given.detach())
    return ratio, log_weights


@torch.no_grad()
def mutual_information(
    model: LatentVariableModel, num_points: int = 4096, num_samples: int = 64, seed: int | Tensor | None = None
) -> MutualInformationEstimate:
    """I(X; Z) = E log p(x|z) - E log p(x) of the model's own joint distribution, by simulation.

    The estimate is high by about the mean of 1 / (2 ESS): compare 1 / ``effective_sample_size`` with the error that matters.
    Where the posterior has several modes, only the one around the simulated code counts, and log 2 and the like is added.
    Closed forms of linear-Gaussian models: :func:`libi_fast.exact_mutual_information`.

    Args:
        model: its likelihood must know its Fisher information (Gaussian, DiagonalGaussian, Bernoulli do).
        num_points: simulated pairs. num_samples: importance samples for the p(x) of each.
        seed: 0 .. 2^64 - 1, an int64 tensor, or None for torch's generator.

    Raises:
        InputError: fewer than 2 pairs or 1 sample; NotImplementedError: another likelihood.

    Source:
        Paper, section on constraints, and appendix C for its closed forms.
    """
    if num_points < 2 or num_samples < 1:
        raise InputError(f"at least 2 points and 1 sample are needed, got {num_points} and {num_samples}")
    latent_dim = model.latent_dim
    like: dict[str, Any] = {"stream": Stream.CONSTRAINTS, "dtype": model.dtype, "device": model.device}
    with evaluation_mode(model):
        width = model.decode(torch.zeros(1, latent_dim, dtype=model.dtype, device=model.device)).shape[-1]
        draws = philox_normal(seed, num_points, latent_dim * (1 + num_samples), **like)
        draw = philox_normal if model.likelihood.reparameterized else philox_uniform
        noise = draw(seed, num_points, width, repetition=1, **like)
        inner = draws[:, latent_dim:].unflatten(-1, (num_samples, latent_dim))
        ratio, log_weights = log_ratios(model, draws[:, :latent_dim], noise, inner)
    weights = torch.softmax(log_weights, -1)
    return MutualInformationEstimate(
        ratio.mean(), ratio.std() / math.sqrt(num_points), 1 / weights.square().sum(-1)
    )  # fmt: skip


# --- local quadrature ---


class Quadrature(NamedTuple):
    """log p(x) [n], differentiable in the model's parameters; mean [n, L] of p(z | x) under the nodes and a square root
    [n, L, L] of its covariance: where the next nodes are to be, not differentiated."""

    value: Tensor
    mean: Tensor
    scale: Tensor


def local_log_likelihood(model: LatentVariableModel, x: Tensor, z: Tensor) -> Tensor:
    """log p(x) of rows [n, D], [n], by quadrature around codes z [n, L] near the modes of p(z | x), L <= 2; differentiable in
    the model's parameters. Mass elsewhere is not seen: :func:`quadrature_log_likelihood` finds it."""
    return quadrature(model, x, *local_frame(model, x, z)).value


@torch.no_grad()
def local_frame(model: LatentVariableModel, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Where nodes are to be, mean [n, L] and scale [n, L, L], from codes z [n, L] near the modes: by Laplace's approximation,
    then by the mean and covariance of p(z | x) under the nodes before."""
    mean = z
    for _ in range(ROUNDS):
        mean, _ = _uphill(model, x, mean)
    _, scale = laplace(model, x, mean)
    for _ in range(ROUNDS):
        _, mean, scale = quadrature(model, x, mean, scale)
    return mean, scale


@torch.no_grad()
def follow_frame(model: LatentVariableModel, x: Tensor, z: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The frame of a model that has changed a little: as it was; or, where p(z | x) has moved away from it, by Laplace's
    approximation at a mode that is reached from it or from codes z [n, L]."""
    here = log_joint(model, x, mean)
    moved = log_joint(model, x, z) > here + MOVED
    place = torch.where(moved[:, None], z, mean)
    for _ in range(ROUNDS):
        higher, gained = _uphill(model, x, place)
        rises = gained > MOVED
        place, moved = torch.where(rises[:, None], higher, place), moved | rises
    _, laplace_scale = laplace(model, x, place)
    return place, torch.where(moved[:, None, None], laplace_scale, scale)


def _uphill(model: LatentVariableModel, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as far along a Gauss-Newton step from z [n, L] as log p(x, z) rises most, and by how much it does, [n]."""
    target, _ = laplace(model, x, z)
    step = torch.nan_to_num(target - z, 0.0, 0.0, 0.0)
    points = torch.stack([z + share * step for share in SHARES], 1)
    joint = torch.nan_to_num(log_joint(model, x, points), -math.inf, -math.inf)
    best, place = joint.max(-1, keepdim=True)
    return torch.take_along_dim(points, place[..., None], 1)[:, 0], best[:, 0] - joint[:, 0]


def quadrature(model: LatentVariableModel, x: Tensor, mean: Tensor, scale: Tensor) -> Quadrature:
    """By the midpoint rule on a grid of nodes around mean [n, L], its axes the columns of scale [n, L, L]."""
    latent_dim = mean.shape[-1]
    axis = SPACING * (torch.arange(NODES, dtype=mean.dtype, device=mean.device) - NODES // 2)
    points = mean[:, None] + torch.cartesian_prod(*[axis] * latent_dim).view(-1, latent_dim) @ scale.mT
    values = log_joint(model, x, points)
    value = torch.logsumexp(values, -1) + latent_dim * math.log(SPACING) + torch.linalg.slogdet(scale)[1]
    with torch.no_grad():
        weights = torch.softmax(values, -1)[..., None]
        mean = (weights * points).sum(1)
        centred, before = (points - mean[:, None]).double(), scale.double()
        # A cell has a spread of its own: without it nodes would collapse onto one that holds all the weight.
        covariance = (weights * centred).mT @ centred + SPACING**2 / 12 * before @ before.mT
        scale = torch.linalg.cholesky_ex(covariance).L.to(mean.dtype)
    return Quadrature(value, mean, scale)
