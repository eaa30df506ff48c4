"""Closed forms for linear decoders with Gaussian noise: the exact likelihood that everything else is checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.models.likelihoods import DiagonalGaussian, Gaussian
from libi_fast.models.model import LatentVariableModel, MeanField
from libi_fast.models.networks import chain


def is_linear_gaussian(model: LatentVariableModel) -> bool:
    """Whether the decoder is a chain of linear maps and the noise Gaussian, so that the closed forms here hold; a subclass of
    the likelihood may have its own density, so it does not count."""
    pairs = chain(model.decoder)
    linear = pairs is not None and all(name == "identity" for _, name in pairs)
    return linear and type(model.likelihood) in (Gaussian, DiagonalGaussian)


@torch.no_grad()
def affine_map(model: LatentVariableModel) -> tuple[Tensor, Tensor, Tensor]:
    """(weight [D, L], bias [D], noise variance [D]) in float64.

    Raises:
        InputError: the decoder is not a chain of linear maps, or the likelihood is not Gaussian.
    """
    if not is_linear_gaussian(model):
        raise InputError(
            "closed forms need a linear decoder and a Gaussian likelihood, got "
            f"{type(model.decoder).__name__} and {model.likelihood.name}"
        )
    pairs = chain(model.decoder) or []
    weight = torch.eye(model.latent_dim, dtype=torch.float64, device=model.device)
    shift = weight.new_zeros(model.latent_dim)
    for linear, _ in pairs:
        matrix = linear.weight.double()
        bias = getattr(linear, "bias", None)
        weight, shift = matrix @ weight, matrix @ shift
        if bias is not None:
            shift = shift + bias.double()
    assert isinstance(model.likelihood, DiagonalGaussian)
    return weight, shift, model.likelihood.variance.double().expand(len(shift))


def linear_gaussian_marginal(model: LatentVariableModel) -> tuple[Tensor, Tensor]:
    """p(x) = N(mean [D], covariance [D, D]) of a linear decoder with Gaussian noise, float64. Raises as affine_map."""
    weight, bias, variance = affine_map(model)
    return bias, weight @ weight.mT + torch.diag(variance)


def exact_log_likelihood(model: LatentVariableModel, x: Tensor) -> Tensor:
    """log p(x) in closed form, [N] float64, for a linear decoder with Gaussian noise.

    Args:
        x: [N, D].

    Raises:
        InputError: another decoder or likelihood, or a covariance that is singular to float64.
    """
    mean, covariance = linear_gaussian_marginal(model)
    return gaussian_log_density(x, mean, covariance)


def gaussian_log_density(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log N(x; mean, covariance) of rows x [N, D], in float64."""
    factor, failed = torch.linalg.cholesky_ex(covariance.double())
    if bool(failed.any()):
        raise InputError("the covariance is singular to float64, so the density does not exist")
    normal = torch.distributions.MultivariateNormal(mean.double(), scale_tril=factor)
    return normal.log_prob(x.double())


def exact_posterior(model: LatentVariableModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """p(z | x) = N(mean [N, L], covariance [L, L]) in float64. Raises as affine_map."""
    weight, bias, variance = affine_map(model)
    precision = torch.eye(model.latent_dim, dtype=weight.dtype) + (weight / variance[:, None]).mT @ weight
    covariance = torch.linalg.inv(precision)
    return ((x.double() - bias) / variance) @ weight @ covariance, covariance


def closest_mean_field(model: LatentVariableModel, x: Tensor) -> MeanField:
    """The mean-field Gaussian nearest p(z | x) in KL[q || p]: its mean, and variances 1 / diag(precision). float64."""
    mean, covariance = exact_posterior(model, x)
    log_std = -0.5 * torch.linalg.inv(covariance).diagonal().log()
    return MeanField(mean, log_std.expand_as(mean))


@torch.no_grad()
def mean_field_gap(model: LatentVariableModel) -> Tensor:
    """min over mean-field Gaussians q of KL[q || p(z | x)] in nats, [] float64; the same for every x (paper, Figure 1 A).

    Raises as affine_map."""
    _, covariance = exact_posterior(model, torch.zeros(1, affine_map(model)[0].shape[0], dtype=torch.float64))
    precision = torch.linalg.inv(covariance)
    return 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))


@torch.no_grad()
def exact_mutual_information(model: LatentVariableModel) -> Tensor:
    """I(X;Z) in nats, [] float64, of a linear decoder with Gaussian noise (paper, Eq 15). Raises as affine_map."""
    weight, _, variance = affine_map(model)
    identity = torch.eye(model.latent_dim, dtype=torch.float64, device=weight.device)
    return 0.5 * torch.logdet(identity + (weight / variance[:, None]).mT @ weight)
