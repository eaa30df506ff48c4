"""Proposals for importance sampling that are not mean-field: full covariances, mixtures, a defensive share of the prior, and
Laplace's approximation at the mode. One distribution for each data point.

An importance weight p(x | z) p(z) / q(z) has a finite variance only where q is at least as wide as the posterior in every
direction. A mean-field q fitted by a lower bound is narrower than a correlated posterior; what is here is not, or bounds the
weights whatever the posterior.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from libi_fast.errors import InputError
from libi_fast.models.laplace import laplace, log_joint
from libi_fast.models.model import InferenceModel, LatentVariableModel, MeanField, MeanFieldGaussian, evaluation_mode
from libi_fast.ops import _library as lib
from libi_fast.ops.random import Stream, philox_normal

EVERY = slice(None)
LOG_2PI = math.log(2 * math.pi)


class Proposal:
    """One distribution over codes for each of N rows: what :func:`libi_fast.log_likelihood` draws from. Derive from it to make
    your own: the attributes, ``draw`` and ``log_prob``.

    Attributes:
        rows: N. latent_dim: L. needs_uniform: whether a draw takes a uniform number beside its L normal ones.
        components: Gaussians in each distribution.
    """

    rows: int
    latent_dim: int
    needs_uniform = False
    components = 1

    def draw(self, noise: Tensor, uniform: Tensor | None = None, rows: slice = EVERY) -> Tensor:
        """Draws [n, s, L] of the rows, from standard normal noise [n, s, L] and uniforms [n, s] in (0, 1)."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, rows: slice = EVERY) -> Tensor:
        """The exact log-density of codes z [n, s, L] under the rows' distributions, [n, s]."""
        raise NotImplementedError

    def inflated(self, factor: float) -> Proposal:
        """The same with every covariance multiplied by ``factor``."""
        raise NotImplementedError(f"{type(self).__name__} has no variance to inflate: define inflated(factor)")

    def centres(self) -> Tensor:
        """Codes [N, K, L] where its mass is, K = ``components``."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its mass is: define centres()")

    def expectation(self) -> Tensor:
        """E[z] of each row, [N, L]."""
        raise NotImplementedError(f"{type(self).__name__} does not say its mean: define expectation()")

    def standard_deviations(self) -> Tensor:
        """Of each latent of each row, [N, L]."""
        raise NotImplementedError(f"{type(self).__name__} does not say its spread: define standard_deviations()")

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name, for checks of dtype and device."""
        return {}


class FullCovariance(Proposal):
    """N(mean, S S') of each row; differentiable in both tensors.

    Args:
        mean: [N, L]. scale_tril: S [N, L, L], lower triangular (what is above the diagonal is not looked at), float32 or
            float64 as mean.

    Raises:
        InputError: shapes or devices that do not agree, a zero on a diagonal; TypeError: types or dtypes.
    """

    def __init__(self, mean: Tensor, scale_tril: Tensor):
        lib.check_tensor("mean", mean)
        if mean.dim() != 2:
            raise InputError(f"mean must have shape (N, L), got {tuple(mean.shape)}")
        self.rows, self.latent_dim = mean.shape
        _check_part("scale_tril", scale_tril, mean, (*mean.shape, self.latent_dim))
        _check_diagonal(scale_tril)
        self.mean, self.scale_tril = mean, scale_tril.tril()

    def draw(self, noise: Tensor, uniform: Tensor | None = None, rows: slice = EVERY) -> Tensor:
        return _affine(self.mean[rows], self.scale_tril[rows], noise)

    def log_prob(self, z: Tensor, rows: slice = EVERY) -> Tensor:
        return _log_normal(z, self.mean[rows], self.scale_tril[rows])

    def inflated(self, factor: float) -> FullCovariance:
        lib.check_positive("factor", factor)
        return FullCovariance(self.mean, math.sqrt(factor) * self.scale_tril)

    def centres(self) -> Tensor:
        return self.mean[:, None]

    def expectation(self) -> Tensor:
        return self.mean

    def standard_deviations(self) -> Tensor:
        return self.scale_tril.norm(dim=-1)

    def component(self, k: int) -> tuple[Tensor, FullCovariance]:
        """A component's weights [N] and Gaussians: the only one's."""
        return torch.ones_like(self.mean[:, 0]), self

    def kl_from_prior(self) -> Tensor:
        """KL[q || N(0, I)] of each row, [N], in nats."""
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        spread = self.scale_tril.square().sum((-2, -1))
        return 0.5 * (spread + self.mean.square().sum(-1) - self.latent_dim) - log_det

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "scale_tril": self.scale_tril}


class GaussianMixture(Proposal):
    """sum_k w_k N(mean_k, S_k S_k') of each row; densities are differentiable in all tensors, draws in means and scales.

    Args:
        log_weights: log w [N, K], normalised here; -inf leaves a component out. mean: [N, K, L]. scale_tril: S [N, K, L, L],
            as of :class:`FullCovariance`.

    Raises: as :class:`FullCovariance`.
    """

    needs_uniform = True

    def __init__(self, log_weights: Tensor, mean: Tensor, scale_tril: Tensor):
        lib.check_tensor("mean", mean)
        if mean.dim() != 3 or not mean.shape[1]:
            raise InputError(f"mean must have shape (N, K, L), K at least 1, got {tuple(mean.shape)}")
        self.rows, self.components, self.latent_dim = mean.shape
        _check_part("log_weights", log_weights, mean, (self.rows, self.components))
        _check_part("scale_tril", scale_tril, mean, (*mean.shape, self.latent_dim))
        _check_diagonal(scale_tril)
        self.log_weights, self.mean, self.scale_tril = log_weights.log_softmax(-1), mean, scale_tril.tril()

    def draw(self, noise: Tensor, uniform: Tensor | None = None, rows: slice = EVERY) -> Tensor:
        if uniform is None:
            raise TypeError("a mixture's draws need uniform numbers")
        # Divided by its last value, so that rounding leaves nothing to a component of no weight at the end.
        cumulative = self.log_weights[rows].detach().double().exp().cumsum(-1)
        cumulative = cumulative / cumulative[..., -1:]
        chosen = (uniform.double()[..., None] >= cumulative[..., None, :-1]).sum(-1)
        z = torch.zeros_like(noise)
        for k in range(self.components):  # one after another: samples x components x L^2 values are never held
            moved = _affine(self.mean[rows, k], self.scale_tril[rows, k], noise)
            z = torch.where((chosen == k)[..., None], moved, z)
        return z

    def log_prob(self, z: Tensor, rows: slice = EVERY) -> Tensor:
        parts = [
            self.log_weights[rows, k, None] + _log_normal(z, self.mean[rows, k], self.scale_tril[rows, k])
            for k in range(self.components)
        ]
        return torch.logsumexp(torch.stack(parts), 0)

    def inflated(self, factor: float) -> GaussianMixture:
        lib.check_positive("factor", factor)
        return GaussianMixture(self.log_weights, self.mean, math.sqrt(factor) * self.scale_tril)

    def centres(self) -> Tensor:
        return self.mean

    def expectation(self) -> Tensor:
        return (self.log_weights.exp()[..., None] * self.mean).sum(1)

    def heaviest(self) -> Tensor:
        """The mean of each row's component of most weight, [N, L]."""
        rows = torch.arange(self.rows, device=self.mean.device)
        return self.mean[rows, self.log_weights.argmax(1)]

    def standard_deviations(self) -> Tensor:
        second = self.mean.square() + self.scale_tril.square().sum(-1)
        variance = (self.log_weights.exp()[..., None] * second).sum(1) - self.expectation().square()
        return variance.clamp_min(0).sqrt()

    def component(self, k: int) -> tuple[Tensor, FullCovariance]:
        """A component's weights [N] and Gaussians."""
        return self.log_weights[:, k].exp(), FullCovariance(self.mean[:, k], self.scale_tril[:, k])

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "log_weights": self.log_weights, "scale_tril": self.scale_tril}


class Defensive(Proposal):
    """(1 - weight) q(z) + weight N(z; 0, I): no importance weight exceeds p(x | z) / weight, so that their variance is finite
    wherever the likelihood is bounded.

    Args:
        proposal: anything that :func:`libi_fast.log_likelihood` takes but None, [N] rows of it.
        weight: the prior's share, in (0, 1).

    Raises:
        InputError: weight outside (0, 1); TypeError: what is no proposal, or None.

    Source:
        Hesterberg 1995; Owen & Zhou 2000.
    """

    needs_uniform = True

    def __init__(self, proposal: Any, weight: float = 0.1):
        lib.check_positive("weight", weight)
        if not weight < 1:
            raise InputError(f"weight must lie between 0 and 1, got {weight}")
        self.proposal, self.weight = _as_full(proposal), float(weight)
        self.rows, self.latent_dim = self.proposal.rows, self.proposal.latent_dim
        self.components = self.proposal.components

    def draw(self, noise: Tensor, uniform: Tensor | None = None, rows: slice = EVERY) -> Tensor:
        if uniform is None:
            raise TypeError("a mixture's draws need uniform numbers")
        # Given that it is not below the weight, a uniform number stretched to (0, 1) is uniform again.
        rest = ((uniform.double() - self.weight) / (1 - self.weight)).clamp(1e-12, 1 - 1e-12)
        z = self.proposal.draw(noise, rest, rows)
        return torch.where((uniform < self.weight)[..., None], noise, z)

    def log_prob(self, z: Tensor, rows: slice = EVERY) -> Tensor:
        inner = math.log1p(-self.weight) + self.proposal.log_prob(z, rows)
        return torch.logaddexp(inner, math.log(self.weight) + _log_standard_normal(z))

    def inflated(self, factor: float) -> Defensive:
        """The covariances of q multiplied by ``factor``; the prior stays."""
        return Defensive(self.proposal.inflated(factor), self.weight)

    def centres(self) -> Tensor:
        return self.proposal.centres()

    def expectation(self) -> Tensor:
        return (1 - self.weight) * self.proposal.expectation()

    def standard_deviations(self) -> Tensor:
        mean, deviation = self.proposal.expectation(), self.proposal.standard_deviations()
        second = (1 - self.weight) * (mean.square() + deviation.square()) + self.weight
        return (second - self.expectation().square()).clamp_min(0).sqrt()

    def tensors(self) -> dict[str, Tensor]:
        return self.proposal.tensors()


def _affine(mean: Tensor, scale_tril: Tensor, noise: Tensor) -> Tensor:
    return mean[..., None, :] + noise @ scale_tril.mT


def _log_standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + LOG_2PI).sum(-1)


def _log_normal(z: Tensor, mean: Tensor, scale_tril: Tensor) -> Tensor:
    """z [n, s, L], mean [n, L], scale_tril [n, L, L] -> [n, s]."""
    whitened = torch.linalg.solve_triangular(scale_tril, (z - mean[..., None, :]).mT, upper=False).mT
    log_det = scale_tril.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return _log_standard_normal(whitened) - log_det[..., None]


def _check_part(name: str, value: Any, mean: Tensor, shape: tuple[int, ...]) -> None:
    lib.check_tensor(name, value)
    lib.check_like(name, value, "mean", mean)
    if value.shape != shape:
        raise InputError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def _check_diagonal(scale_tril: Tensor) -> None:
    if lib.values_known(scale_tril):
        zero = (scale_tril.diagonal(dim1=-2, dim2=-1) == 0).flatten(1).any(-1)
        if bool(zero.any()):
            raise InputError(f"scale_tril has a zero on the diagonal in row {int(zero.nonzero()[0])} (counted from 0)")


# --- what callers pass ---


def as_proposal(proposal: Any, x: Tensor, latent_dim: int) -> Proposal | MeanField:
    """What a caller passes as the proposal for rows x [N, D]: a MeanField where it is one (None, the prior, included), else a
    Proposal.

    Takes a MeanField or (mean, log_std) pair, a :class:`Proposal`, torch's ``Normal``, ``MultivariateNormal`` [N, L],
    ``MixtureSameFamily`` of ``MultivariateNormal`` or ``Independent(Normal, 1)`` [N, K, L].

    Raises:
        TypeError: anything else, another dtype than x; InputError: shapes or devices that do not fit.
    """
    found = _general(proposal)
    if found is None:
        return as_mean_field(proposal, x, latent_dim, FORMS)
    for name, value in found.tensors().items():
        lib.check_like(f"proposal {name}", value, "x", x)
    if (found.rows, found.latent_dim) != (x.shape[0], latent_dim):
        raise InputError(
            f"proposal must be of {x.shape[0]} rows and {latent_dim} latents, got {found.rows} and {found.latent_dim}"
        )
    return found


FORMS = "q(x), a (mean, log_std) pair, a torch Normal or MultivariateNormal, a mixture of them, a Proposal, or None"


def as_mean_field(
    proposal: Any, x: Tensor, latent_dim: int, forms: str = "q(x), a (mean, log_std) pair or a Normal"
) -> MeanField:
    """A proposal as mean and log standard deviation [N, L]: None is the prior; torch's Normal (or Independent) is taken too.

    Raises:
        TypeError: anything else; InputError: wrong shapes.
    """
    if proposal is None:
        zeros = x.new_zeros((x.shape[0], latent_dim))
        return MeanField(zeros, zeros)
    pair = _pair(proposal, forms)
    for name, value in zip(("proposal mean", "proposal log_std"), pair, strict=True):
        lib.check_tensor(name, value)
        lib.check_like(name, value, "x", x)
        if value.shape != (x.shape[0], latent_dim):
            raise InputError(f"{name} must have shape {(x.shape[0], latent_dim)}, got {tuple(value.shape)}")
    return pair


def _pair(proposal: Any, forms: str) -> MeanField:
    if isinstance(proposal, Independent):
        proposal = proposal.base_dist
    if isinstance(proposal, Normal):
        proposal = MeanField(proposal.loc, proposal.scale.log())
    if not (isinstance(proposal, tuple) and len(proposal) == 2):
        raise TypeError(f"proposal must be {forms}, got {type(proposal).__name__}")
    return MeanField(*proposal)


def _general(proposal: Any) -> Proposal | None:
    """None where it is not one of the general kinds."""
    if isinstance(proposal, Proposal):
        return proposal
    if isinstance(proposal, MultivariateNormal):
        return FullCovariance(proposal.loc, proposal.scale_tril)
    if not isinstance(proposal, MixtureSameFamily):
        return None
    weights, parts = proposal.mixture_distribution, proposal.component_distribution
    base = parts.base_dist if isinstance(parts, Independent) else parts
    if isinstance(base, Normal) and isinstance(parts, Independent):
        mean, scale = base.loc, torch.diag_embed(base.scale)
    elif isinstance(base, MultivariateNormal):
        mean, scale = base.loc, base.scale_tril
    else:
        raise TypeError(
            f"a MixtureSameFamily must be of MultivariateNormal or Independent(Normal, 1), got {type(parts).__name__}"
        )
    assert isinstance(weights, Categorical)
    return GaussianMixture(weights.logits.expand(mean.shape[:-1]), mean, scale)


def _as_full(proposal: Any) -> Proposal:
    """A mean-field pair as a diagonal covariance."""
    found = _general(proposal)
    if found is not None:
        return found
    mean, log_std = _pair(proposal, FORMS.removesuffix(", or None"))
    lib.check_tensor("proposal mean", mean)
    lib.check_tensor("proposal log_std", log_std)
    if mean.shape != log_std.shape:
        raise InputError(f"proposal log_std must have shape {tuple(mean.shape)}, got {tuple(log_std.shape)}")
    return FullCovariance(mean, torch.diag_embed(log_std.exp()))


# --- inference networks ---


def _triangle(values: Tensor, latent_dim: int) -> Tensor:
    """[..., L (L + 1) / 2], the lower triangle row by row with the logarithm of its diagonal -> [..., L, L]."""
    row, column = torch.tril_indices(latent_dim, latent_dim, device=values.device)
    # The same bounds as a mean-field network's: they keep exp and its square finite while a bad start recovers.
    bounded = values.clamp(MeanFieldGaussian.LEAST_LOG_STD, MeanFieldGaussian.LARGEST_LOG_STD).exp()
    matrix = values.new_zeros((*values.shape[:-1], latent_dim, latent_dim))
    matrix[..., row, column] = torch.where(row == column, bounded, values)
    return matrix


def _latents(width: int, what: str) -> int:
    """L of a width L + L (L + 1) / 2."""
    latent_dim = (math.isqrt(9 + 8 * width) - 3) // 2
    if latent_dim < 1 or latent_dim * (latent_dim + 3) // 2 != width:
        raise InputError(f"the inference network must give {what} L + L (L + 1) / 2 values, got {width}")
    return latent_dim


class FullCovarianceGaussian(InferenceModel):
    """q(z | x) = N(mean(x), S(x) S(x)').

    Args:
        network: a module from x [batch, D] to [batch, L + L (L + 1) / 2]: the mean, then S's lower triangle row by row, its
            diagonal as logarithms.

    Returns a :class:`FullCovariance`. Raises InputError for another width.
    """

    name = "full-covariance"

    def forward(self, x: Tensor) -> FullCovariance:
        output = self.network(x).to(x.dtype)
        latent_dim = _latents(output.shape[-1], "mean and triangle,")
        return FullCovariance(output[..., :latent_dim], _triangle(output[..., latent_dim:], latent_dim))

    def width(self, latent_dim: int) -> int:
        return latent_dim * (latent_dim + 3) // 2

    def places(self, latent_dim: int) -> tuple[Tensor, Tensor]:
        latents = torch.arange(latent_dim)
        return latents[None], (latent_dim + latents * (latents + 3) // 2)[None]


class MixtureGaussian(InferenceModel):
    """q(z | x) = sum_k w_k(x) N(mean_k(x), S_k(x) S_k(x)').

    Args:
        network: a module from x [batch, D] to [batch, K (1 + L + L (L + 1) / 2)]: K logarithms of weights (normalised here),
            then for each component what :class:`FullCovarianceGaussian` takes.
        components: K.

    Returns a :class:`GaussianMixture`. Raises InputError for another width.
    """

    name = "mixture"

    def __init__(self, network: nn.Module, components: int):
        super().__init__(network)
        lib.check_count("components", components, 1)
        self.components = components

    def forward(self, x: Tensor) -> GaussianMixture:
        output = self.network(x).to(x.dtype)
        width, left = divmod(output.shape[-1], self.components)
        if left:
            raise InputError(
                f"the inference network must give each of {self.components} components as many values, got {output.shape[-1]}"
            )
        latent_dim = _latents(width - 1, "for each component a weight and")
        parts = output[..., self.components :].unflatten(-1, (self.components, -1))
        return GaussianMixture(
            output[..., : self.components], parts[..., :latent_dim], _triangle(parts[..., latent_dim:], latent_dim)
        )

    def width(self, latent_dim: int) -> int:
        return self.components * (1 + latent_dim * (latent_dim + 3) // 2)

    def places(self, latent_dim: int) -> tuple[Tensor, Tensor]:
        latents = torch.arange(latent_dim)
        first = (self.components + torch.arange(self.components) * (latent_dim * (latent_dim + 3) // 2))[:, None]
        return first + latents, first + latent_dim + latents * (latents + 3) // 2

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "components": self.components}


INFERENCE_MODELS: dict[str, Any] = {m.name: m for m in (MeanFieldGaussian, FullCovarianceGaussian, MixtureGaussian)}


def inference_from_config(config: dict[str, Any], network: nn.Module) -> InferenceModel:
    """The inverse of ``InferenceModel.config()``, around a network.

    Raises:
        InputError: an unknown name.
    """
    settings = dict(config)
    name = settings.pop("name")
    if name not in INFERENCE_MODELS:
        raise InputError(f"unknown inference model {name!r}; known: {', '.join(INFERENCE_MODELS)}")
    return INFERENCE_MODELS[name](network, **settings)


# --- Laplace's approximation at the mode ---

CANDIDATES = 256  # draws of the prior, the same for every row, among which it looks for places to start from
STARTS = 4
HALVINGS = 20  # of a step, until log p(x, z) rises
RISE = 1e-4  # least share of the rise that the slope promises (Armijo)
CONVERGED = 1e-8  # of the squared step in standard deviations
DISTINCT = 0.5  # standard deviations between two modes
BLOCK_VALUES = 2**22  # held at once


def laplace_proposal(
    model: LatentVariableModel, x: Tensor, start: Any = None, steps: int = 50, variance_inflation: float = 1.0
) -> FullCovariance:
    """Laplace's approximation to p(z | x) of every row: a Gaussian at the mode, whose covariance is (I + J' F J)^-1, J the
    decoder's Jacobian there and F the likelihood's Fisher information. Exact where decoder and noise are linear-Gaussian.

    The mode is found by Gauss-Newton steps that are halved until log p(x, z) rises. Of several starts the mode with the most
    mass is taken. Deterministic; no row depends on the others; rows are taken in blocks.

    Args:
        model: its likelihood must know its Fisher information (Gaussian, DiagonalGaussian, Bernoulli do).
        x: [N, D] (or [N, ...], flattened), the model's dtype and device.
        start: codes [N, L] or [N, C, L] to begin with, or a proposal (its means); None: the 4 best of 256 draws of the prior.
        steps: at most so many. variance_inflation: factor on the covariance.

    Returns:
        FullCovariance of N rows, not differentiable. Where the decoder overflows at every start, the prior.

    Raises:
        InputError: shapes that do not fit, NaN or infinity in x (the row is named), a decoder that torch.func cannot
        differentiate; NotImplementedError: a likelihood without Fisher information; TypeError: wrong types or dtypes.

    Source:
        Laplace's method with the Gauss-Newton matrix for the Hessian (Bishop 2006, 4.4; Schraudolph 2002).
    """
    lib.check_positive("variance_inflation", variance_inflation)
    modes, mass, scale = _modes(model, x, start, steps)
    best = mass.argmax(-1)
    each = torch.arange(len(best), device=best.device)
    return FullCovariance(modes[each, best], math.sqrt(variance_inflation) * scale[each, best])


def laplace_mixture(
    model: LatentVariableModel, x: Tensor, start: Any = None, steps: int = 50, variance_inflation: float = 1.0
) -> GaussianMixture:
    """A mixture of Laplace's approximations at the modes that are reached from several starts, each weighted by the mass that
    it stands for, p(x, mode) det(covariance)^(1/2). A mode that several starts reach counts once.

    Args, Raises, Source: as :func:`laplace_proposal`.

    Returns:
        GaussianMixture of N rows and C components, one a start.
    """
    lib.check_positive("variance_inflation", variance_inflation)
    modes, mass, scale = _modes(model, x, start, steps)
    for later in range(1, modes.shape[1]):
        apart = modes[:, later, None] - modes[:, :later]
        whitened = torch.linalg.solve_triangular(scale[:, :later], apart[..., None], upper=False)[..., 0]
        repeated = (whitened.norm(dim=-1) < DISTINCT) & torch.isfinite(mass[:, :later])
        mass[:, later] = mass[:, later].masked_fill(repeated.any(-1), -math.inf)
    mass = torch.where(torch.isinf(mass).all(-1, keepdim=True), 0.0, mass)
    return GaussianMixture(mass, modes, math.sqrt(variance_inflation) * scale)


def check_rows(model: LatentVariableModel, x: Tensor) -> Tensor:
    """Data as [N, D]; raise unless it has the model's dtype and device and is finite.

    Raises:
        InputError, TypeError: as :func:`libi_fast.log_likelihood`.
    """
    if not isinstance(model, LatentVariableModel):
        raise TypeError(f"model must be a LatentVariableModel, got {type(model).__name__}")
    lib.check_tensor("x", x, 1)
    if x.dtype != model.dtype:
        raise TypeError(f"x is {x.dtype} but the model is {model.dtype}; convert one of them")
    device = next((p.device for p in model.parameters()), x.device)
    if x.device != device:
        raise InputError(f"x is on {x.device} but the model is on {device}; they must agree")
    x = x.flatten(1) if x.dim() > 1 else x[:, None]
    lib.check_finite("x", x)
    return x


def widest_layer(model: LatentVariableModel, x: Tensor) -> int:
    """Values that one code needs at once, about."""
    return max([x.shape[-1], model.latent_dim, *(max(p.shape) for p in model.parameters() if p.dim())])


@torch.no_grad()
def _modes(model: LatentVariableModel, x: Tensor, start: Any, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Modes [N, C, L], the logarithm of the mass of each [N, C] (up to a constant, -inf where there is none), and a lower
    triangular square root of each covariance [N, C, L, L]."""
    x = check_rows(model, x)
    model.check(x)
    lib.check_count("steps", steps, 0)
    latent_dim = model.latent_dim
    with evaluation_mode(model):
        begin = None if start is None else _codes(start, x, latent_dim)
        starts = STARTS if begin is None else begin.shape[1]
        width = max(CANDIDATES * x.shape[-1], 2 * starts * widest_layer(model, x) * (latent_dim + 1))
        size = max(1, BLOCK_VALUES // width)
        if not len(x):
            nothing = x.new_empty((0, starts, latent_dim))
            return nothing, nothing[..., 0], nothing[..., None].expand(-1, -1, -1, latent_dim)
        parts = [
            _modes_of_block(model, rows, None if begin is None else begin[i * size : (i + 1) * size], steps)
            for i, rows in enumerate(x.split(size))
        ]
    modes, mass, scale = (torch.cat(p) for p in zip(*parts, strict=True))
    return modes, mass, scale


def _codes(start: Any, x: Tensor, latent_dim: int) -> Tensor:
    """[N, C, L]."""
    if not isinstance(start, Tensor):
        found = as_proposal(start, x, latent_dim)
        return found.mean[:, None] if isinstance(found, MeanField) else found.centres()
    lib.check_tensor("start", start)
    lib.check_like("start", start, "x", x)
    if start.dim() not in (2, 3) or (start.shape[0], start.shape[-1]) != (x.shape[0], latent_dim) or not start.numel():
        raise InputError(f"start must have shape ({x.shape[0]}, {latent_dim}) or (N, C, L), got {tuple(start.shape)}")
    return start if start.dim() == 3 else start[:, None]


def _modes_of_block(model: LatentVariableModel, x: Tensor, start: Tensor | None, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    if start is None:
        start = _best_of_prior(model, x)
    n, count, latent_dim = start.shape
    data = x.repeat_interleave(count, 0)
    z = _climb(model, data, start.reshape(-1, latent_dim), steps)
    _, root = laplace(model, data, z)
    # Any root R of the covariance has a triangular one in the QR factors of R', without squaring its condition.
    factor = torch.linalg.qr(torch.nan_to_num(root.double()).mT).R.mT
    scale = factor * factor.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    log_det = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    mass = log_joint(model, data, z).double() + log_det
    lost = ~(torch.isfinite(mass) & torch.isfinite(root).flatten(1).all(-1))
    mass = mass.masked_fill(lost, -math.inf)
    z = torch.where(lost[:, None], 0.0, z)
    scale = torch.where(lost[:, None, None], torch.eye(latent_dim, dtype=scale.dtype, device=x.device), scale)
    shape = (n, count)
    return z.unflatten(0, shape), mass.to(x.dtype).unflatten(0, shape), scale.to(x.dtype).unflatten(0, shape)


def _best_of_prior(model: LatentVariableModel, x: Tensor) -> Tensor:
    """[n, STARTS, L]: the draws of the prior at which log p(x, z) is highest, nearly always around the largest modes."""
    like: dict[str, Any] = {"stream": Stream.INITIALISATION, "dtype": x.dtype, "device": x.device}
    candidates = philox_normal(0, CANDIDATES, model.latent_dim, **like)
    value = model.likelihood.log_prob(x[:, None], model.decode(candidates)) + _log_standard_normal(candidates)
    best = torch.nan_to_num(value, nan=-math.inf).topk(STARTS, -1).indices
    return candidates[best]


def _climb(model: LatentVariableModel, x: Tensor, z: Tensor, steps: int) -> Tensor:
    """The mode of p(z | x) uphill of each z [n, L]."""
    z = z.clone()
    value = log_joint(model, x, z)
    moving = torch.arange(len(z), device=z.device)
    for _ in range(steps):
        if not len(moving):
            break
        here, rows = z[moving], x[moving]
        target, root = laplace(model, rows, here)
        direction = target - here
        # With P = R R' and the step P g, g'P g is both the slope along the step and its squared length in deviations.
        decrement = torch.linalg.solve_triangular(root, direction[..., None], upper=True)[..., 0].square().sum(-1)
        left = (decrement > CONVERGED).nonzero()[:, 0]
        walking = left
        length = 1.0
        for _ in range(HALVINGS):
            if not len(left):
                break
            trial = here[left] + length * direction[left]
            reached = log_joint(model, rows[left], trial)
            better = reached > value[moving[left]] + RISE * length * decrement[left]
            accepted = moving[left[better]]
            z[accepted], value[accepted] = trial[better], reached[better]
            left, length = left[~better], length / 2
        stuck = torch.zeros(len(moving), dtype=torch.bool, device=z.device)
        stuck[left] = True
        moving = moving[walking[~stuck[walking]]]
    return z
