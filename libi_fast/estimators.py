"""Importance-sampled log-likelihoods of models, with what is needed to judge them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from libi_fast.errors import InputError
from libi_fast.models.likelihoods import LIKELIHOODS, DiagonalGaussian
from libi_fast.models.model import LatentVariableModel, MeanField
from libi_fast.models.networks import recognise
from libi_fast.ops import _library as lib
from libi_fast.ops import importance as op
from libi_fast.ops import random
from libi_fast.ops.random import Stream


class LogLikelihood(NamedTuple):
    """Estimates for each row, [N].

    log_likelihood: log (1/S) sum w, differentiable; standard_error: of it (delta method), in nats;
    effective_sample_size: Kish's, 1 .. S; pareto_k: tail shape of the weights, above 0.7 the estimate is not to be trusted
    (None where it was not asked for).
    """

    log_likelihood: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor | None


PARETO_VALUES = 2**19  # values held at once by the Pareto fit


def tail_length(num_samples: int) -> int:
    """How many of the largest weights the Pareto fit takes: min(S/5, 3 sqrt S) (Vehtari et al. 2024)."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def pareto_k(top: Tensor) -> Tensor:
    """Shape of a generalised Pareto distribution fitted to the largest importance weights of each row.

    Args:
        top: [..., M + 1] log-weights, largest first; the last one is the threshold.

    Returns:
        [...]: inf where at most 4 weights exceed the threshold (the estimator of Vehtari et al. needs 5).

    Source:
        Zhang & Stephens 2009 with the weak prior of Vehtari, Simpson, Gelman, Yao, Gabry 2024 (PSIS).
    """
    flat = top.reshape(-1, top.shape[-1])
    rows = max(1, PARETO_VALUES // (flat.shape[-1] * (31 + math.isqrt(flat.shape[-1]))))
    shapes = [_pareto_k(block) for block in flat.split(rows)] if len(flat) else [flat.new_empty(0)]
    return torch.cat(shapes).reshape(top.shape[:-1])


def _pareto_k(top: Tensor) -> Tensor:
    """top [n, M + 1] -> [n]; holds n x M x (30 + sqrt M) values at once."""
    scaled = (top.double() - top[..., :1].double()).exp()
    threshold = scaled[..., -1:].clamp_min(torch.finfo(scaled.dtype).tiny)
    x = (scaled[..., :-1] - threshold).clamp_min(0).flip(-1)  # ascending; 0 for ties with the threshold and what underflows
    most = x.shape[-1]
    if most < 5:
        return torch.full(top.shape[:-1], math.inf, dtype=top.dtype, device=top.device)
    count = (x > 0).sum(-1, keepdim=True)  # the fit is to the weights above the threshold alone
    m = count.to(x.dtype)
    grid = 30 + m.sqrt().floor()
    quartile = x.gather(-1, (most - count + (m / 4 + 0.5).long() - 1).clamp(0, most - 1))
    largest = x[..., -1:]
    steps = torch.arange(1, 31 + math.isqrt(most), dtype=x.dtype, device=x.device)
    b = (1 - torch.sqrt(grid / (steps - 0.5))) / (3 * quartile) + 1 / largest
    k = torch.log1p(-b[..., None] * x[..., None, :]).sum(-1) / m
    profile = m * (torch.log(-b / k) - k - 1)
    weights = torch.softmax(torch.where(steps <= grid, profile, -math.inf), -1)
    # Weights too small to matter are dropped before the mean, as in the published estimator.
    weights = torch.where(weights >= 10 * torch.finfo(x.dtype).eps, weights, 0.0)
    b_mean = (b * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
    shape = torch.log1p(-b_mean * x).sum(-1, keepdim=True) / m
    shape = (m * shape + 10 * 0.5) / (m + 10)
    return torch.where(count > 4, shape, math.inf)[..., 0].to(top.dtype)


def as_mean_field(proposal: Any, x: Tensor, latent_dim: int) -> MeanField:
    """A proposal as mean and log standard deviation [N, L]: None is the prior; torch's Normal (or Independent) is taken too.

    Raises:
        TypeError: anything else; InputError: wrong shapes.
    """
    if proposal is None:
        zeros = x.new_zeros((x.shape[0], latent_dim))
        return MeanField(zeros, zeros)
    if isinstance(proposal, torch.distributions.Independent):
        proposal = proposal.base_dist
    if isinstance(proposal, torch.distributions.Normal):
        proposal = MeanField(proposal.loc, proposal.scale.log())
    if not (isinstance(proposal, tuple) and len(proposal) == 2):
        raise TypeError(f"proposal must be q(x), a (mean, log_std) pair or a Normal, got {type(proposal).__name__}")
    for name, value in zip(("proposal mean", "proposal log_std"), proposal, strict=True):
        lib.check_tensor(name, value)
        lib.check_like(name, value, "x", x)
        if value.shape != (x.shape[0], latent_dim):
            raise InputError(f"{name} must have shape {(x.shape[0], latent_dim)}, got {tuple(value.shape)}")
    return MeanField(*proposal)


def log_likelihood(
    model: LatentVariableModel,
    x: Tensor,
    proposal: Any = None,
    num_samples: int = 5000,
    variance_inflation: float = 1.0,
    gradient: str = "reparameterized",
    precision: str = "ieee",
    seed: int | Tensor | None = None,
    backend: str | None = None,
    *,
    chunk_size: int | None = None,
    first_row: int = 0,
    pareto: bool | None = None,
) -> LogLikelihood:
    """Importance-weighted log-likelihood of every row, log (1/S) sum_s p(x|z_s) p(z_s) / q(z_s|x).

    Memory does not depend on num_samples, forward or backward: samples are reduced as they come and drawn again in backward.
    As a loss: ``-lf.log_likelihood(model, x, proposal=q(x), num_samples=64).log_likelihood.mean()``.

    Args:
        x: [N, D] (or [N, ...], flattened), the model's dtype and device.
        proposal: q(x) of a ``MeanFieldGaussian``, a (mean, log_std) pair of [N, L], a torch ``Normal``, or None for the prior.
        num_samples: S. variance_inflation: factor on the proposal's variance (the paper evaluates with 2).
        gradient: 'reparameterized', 'sticking-the-landing' or 'doubly-reparameterized' (of the proposal's parameters).
        precision: of the matrix products of wide decoders on a GPU, whose sums stay float32; elsewhere all is 'ieee'. A
            product's terms err by 6e-8 of their size in 'ieee', 1e-6 in 'tf32x3', 5e-4 in 'tf32', 4e-3 in 'bf16'; log-weights
            and gradients by a few times that.
        seed: 0 .. 2^64 - 1, an int64 tensor, or None for torch's generator. first_row: global index of x[0], so that a shard
            draws what the whole would.
        chunk_size: samples held at once; moves no bit of a recognised decoder's result, and any other's within 1e-6.
        pareto: compute Pareto k; None does so where no gradient is recorded.

    Returns:
        LogLikelihood of [N] tensors.

    Raises:
        InputError: shapes that do not fit, NaN or infinity in x (the row is named), values outside the likelihood's support,
        num_samples < 1, an unknown name. TypeError: wrong types or dtypes.

    Source:
        Paper Eq 48; Burda et al. 2016; gradients Roeder et al. 2017, Tucker et al. 2019.
    """
    if not isinstance(model, LatentVariableModel):
        raise TypeError(f"model must be a LatentVariableModel, got {type(model).__name__}")
    lib.check_tensor("x", x, 1)
    lib.check_index("num_samples", num_samples, random.INDEX_LIMIT)
    if precision not in op.PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(map(repr, op.PRECISIONS))}, got {precision!r}")
    lib.check_positive("variance_inflation", variance_inflation)
    if x.dtype != model.dtype:
        raise TypeError(f"x is {x.dtype} but the model is {model.dtype}; convert one of them")
    device = next((p.device for p in model.parameters()), x.device)
    if x.device != device:
        raise InputError(f"x is on {x.device} but the model is on {device}; they must agree")
    x = x.flatten(1) if x.dim() > 1 else x[:, None]
    lib.check_finite("x", x)
    if not torch.compiler.is_compiling():
        model.likelihood.check(x)
    mean, log_std = as_mean_field(proposal, x, model.latent_dim)
    if pareto is None:
        pareto = not (torch.is_grad_enabled() and _needs_gradient(model, x, mean, log_std))
    tail = tail_length(num_samples) + 1 if pareto and num_samples else 0
    settings = op.Settings(
        num_samples, gradient, min(tail, num_samples), first_row, 0, Stream.PROPOSAL,
        op.DEFAULT_CHUNK if chunk_size is None else chunk_size, precision, lib.current_backend(backend),
    )  # fmt: skip
    op.check_settings(settings)
    if first_row + x.shape[0] > random.INDEX_LIMIT or num_samples * model.latent_dim > 4 * random.INDEX_LIMIT:
        raise InputError("a row index past 2^32 or num_samples * latent_dim past 2^34 does not fit the random numbers' counter")
    key = random.as_seed(seed, x.device)
    log_scale = log_std + 0.5 * math.log(variance_inflation)
    known = type(model.likelihood) in LIKELIHOODS
    recognised = recognise(model.decoder, model.likelihood.name) if known else None
    replicas = random.as_replicas(None, x.device)
    if recognised is not None:
        layers, parameters = recognised
        model.check_decoder(parameters[0].shape[-1], parameters[-2 if layers.has_bias[-1] else -1].shape[1], x.shape[-1])
        variance = model.likelihood.variance[None] if isinstance(model.likelihood, DiagonalGaussian) else x.new_empty((1, 0))
        estimate = op.importance_layers(
            x[None], mean[None], log_scale[None], layers, parameters, variance, key, replicas, settings
        )
    else:
        if not torch.compiler.is_compiling():
            model.check(x)
        names = [name for name, _ in model.named_parameters()]
        parameters = list(model.parameters())

        def log_prob(leaves, rows: Tensor, z: Tensor) -> Tensor:
            if torch.compiler.is_compiling():  # the leaves are the model's own there, and functional_call is not traced
                return model.log_prob(rows[:, :, None], z)
            method = _LogProb(model)
            named = {f"model.{name}": leaf for name, leaf in zip(names, leaves, strict=True)}
            return functional_call(method, named, (rows[:, :, None], z))

        widest = max([x.shape[-1], model.latent_dim, *(max(p.shape) for p in parameters if p.dim())])
        estimate = op.importance_streamed(
            x[None], mean[None], log_scale[None], log_prob, parameters, key, replicas, settings, widest, chunk_size
        )
    value, effective, top = (part[0] for part in estimate)
    shape = pareto_k(top) if pareto else None
    return LogLikelihood(value, op.standard_error(effective, num_samples), effective, shape)


class _LogProb(torch.nn.Module):
    """``functional_call`` runs a module's forward; this one's is the model's log_prob."""

    def __init__(self, model: LatentVariableModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.model.log_prob(x, z)


def _needs_gradient(model: LatentVariableModel, *tensors: Tensor) -> bool:
    return any(t.requires_grad for t in tensors) or any(p.requires_grad for p in model.parameters())
