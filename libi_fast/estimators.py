"""Importance-sampled log-likelihoods of models, with what is needed to judge them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from libi_fast.errors import InputError
from libi_fast.kernels.importance import reference
from libi_fast.models.model import LatentVariableModel
from libi_fast.models.networks import recognise_model
from libi_fast.models.proposals import Proposal, as_mean_field, as_proposal, check_rows, widest_layer
from libi_fast.models.weighted import rows_at_once, weighted_tiles
from libi_fast.ops import _library as lib
from libi_fast.ops import importance as op
from libi_fast.ops import random
from libi_fast.ops.random import Stream
from libi_fast.pareto import fit, pareto_k, smoothed_log_likelihood, tail_length, warn_where_unreliable

__all__ = ["LogLikelihood", "as_mean_field", "log_likelihood", "pareto_k", "tail_length"]


class LogLikelihood(NamedTuple):
    """Estimates for each row, [N].

    log_likelihood: log (1/S) sum w, differentiable where the proposal is mean-field and nothing is smoothed; standard_error: of
    it (delta method), in nats; effective_sample_size: Kish's, 1 .. S; pareto_k: tail shape of the weights, above 0.7 the
    estimate is not to be trusted (None where it was not asked for). The last three are of the raw weights.
    """

    log_likelihood: Tensor
    standard_error: Tensor
    effective_sample_size: Tensor
    pareto_k: Tensor | None


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
    pareto_smoothed: bool = False,
) -> LogLikelihood:
    """Importance-weighted log-likelihood of every row, log (1/S) sum_s p(x|z_s) p(z_s) / q(z_s|x).

    Memory does not depend on num_samples, forward or backward: samples are reduced as they come and drawn again in backward.
    As a loss: ``-lf.log_likelihood(model, x, proposal=q(x), num_samples=64).log_likelihood.mean()``.

    A mean-field proposal goes through fused kernels where the decoder is recognised. Any other goes through plain torch in
    chunks, for evaluation: without gradients, in as little memory, and a row of no weight at all is -inf, never NaN.

    Args:
        x: [N, D] (or [N, ...], flattened), the model's dtype and device.
        proposal: q(x) of a ``MeanFieldGaussian``, a (mean, log_std) pair of [N, L], a torch ``Normal``, or None for the prior.
            For evaluation, also a :class:`libi_fast.Proposal` (``FullCovariance``, ``GaussianMixture``, ``Defensive``,
            ``laplace_proposal(model, x)``), torch's ``MultivariateNormal`` or ``MixtureSameFamily`` of N rows.
        num_samples: S. variance_inflation: factor on the proposal's variance (the paper evaluates with 2), on every component's
            of a mixture; of a defensive one the prior stays.
        gradient: 'reparameterized', 'sticking-the-landing' or 'doubly-reparameterized' (of the proposal's parameters).
        precision: of the matrix products of wide decoders on a GPU, whose sums stay float32; elsewhere all is 'ieee'. A
            product's terms err by 6e-8 of their size in 'ieee', 1e-6 in 'tf32x3', 5e-4 in 'tf32', 4e-3 in 'bf16'; log-weights
            and gradients by a few times that.
        seed: 0 .. 2^64 - 1, an int64 tensor, or None for torch's generator. first_row: global index of x[0], so that a shard
            draws what the whole would.
        chunk_size: samples held at once; moves no bit of a recognised decoder's result, and any other's within 1e-6.
        pareto: compute Pareto k; None does so where no gradient is recorded.
        pareto_smoothed: return the estimate from Pareto-smoothed weights (PSIS): the largest, which make it vary, are replaced
            by quantiles of the distribution fitted to them, the largest raw weight being the most. Not differentiable.

    Returns:
        LogLikelihood of [N] tensors.

    Warns:
        ParetoWarning: Pareto k was computed and is above 0.7 for some rows, with what to use instead. Not where it is None,
        or num_samples 20 or fewer; ``Method.log_likelihood`` and the command line return and print k instead.

    Raises:
        InputError: shapes that do not fit, NaN or infinity in x (the row is named), values outside the likelihood's support,
        num_samples < 1, an unknown name. TypeError: wrong types or dtypes.

    Source:
        Paper Eq 48; Burda et al. 2016; gradients Roeder et al. 2017, Tucker et al. 2019; PSIS Vehtari et al. 2024.
    """
    x = check_rows(model, x)
    lib.check_index("num_samples", num_samples, random.INDEX_LIMIT)
    if precision not in op.PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(map(repr, op.PRECISIONS))}, got {precision!r}")
    lib.check_positive("variance_inflation", variance_inflation)
    if not torch.compiler.is_compiling():
        model.likelihood.check(x)
    q = as_proposal(proposal, x, model.latent_dim)
    if pareto is None:
        evaluation = pareto_smoothed or not torch.is_grad_enabled()
        pareto = evaluation or isinstance(q, Proposal) or not _needs_gradient(model, x, *q)
    tail = tail_length(num_samples) + 1 if (pareto or pareto_smoothed) and num_samples else 0
    settings = op.Settings(
        num_samples, gradient, min(tail, num_samples), first_row, 0, Stream.PROPOSAL,
        op.DEFAULT_CHUNK if chunk_size is None else chunk_size, precision, lib.current_backend(backend),
    )  # fmt: skip
    op.check_settings(settings)
    if first_row + x.shape[0] > random.INDEX_LIMIT or num_samples * model.latent_dim > 4 * random.INDEX_LIMIT:
        raise InputError("a row index past 2^32 or num_samples * latent_dim past 2^34 does not fit the random numbers' counter")
    key = random.as_seed(seed, x.device)
    if isinstance(q, Proposal):
        q = q if variance_inflation == 1 else q.inflated(variance_inflation)
        estimate = _any_proposal(model, x, q, key, settings, chunk_size)
    else:
        log_scale = q.log_std + 0.5 * math.log(variance_inflation)
        estimate = _mean_field(model, x, q.mean, log_scale, key, settings, chunk_size)
    value, effective, top = estimate
    shape = None
    if pareto or pareto_smoothed:
        fitted = fit(top)
        shape = fitted.shape.to(x.dtype)
        if pareto_smoothed:
            value = smoothed_log_likelihood(value.detach(), fitted, top, num_samples)
        if not torch.compiler.is_compiling():
            warn_where_unreliable(shape, effective, num_samples)
    return LogLikelihood(value, op.standard_error(effective, num_samples), effective, shape if pareto else None)


def _mean_field(
    model: LatentVariableModel, x: Tensor, mean: Tensor, log_scale: Tensor, key: Tensor, settings: op.Settings,
    chunk_size: int | None,
) -> op.Estimate:  # fmt: skip
    """By the fused kernels, or streamed where they do not know the decoder."""
    recognised = recognise_model(model, x)
    replicas = random.as_replicas(None, x.device)
    if recognised is not None:
        layers, parameters, variance = recognised
        model.check_decoder(parameters[0].shape[-1], parameters[-2 if layers.has_bias[-1] else -1].shape[1], x.shape[-1])
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

        estimate = op.importance_streamed(
            x[None], mean[None], log_scale[None], log_prob, parameters, key, replicas, settings, widest_layer(model, x),
            chunk_size,
        )  # fmt: skip
    return op.Estimate(*(part[0] for part in estimate))


@torch.no_grad()
def _any_proposal(
    model: LatentVariableModel, x: Tensor, q: Proposal, key: Tensor, settings: op.Settings, chunk_size: int | None
) -> op.Estimate:
    """Tile after tile."""
    model.check(x)
    parts = []
    for rows in reference.blocks(x.shape[0], rows_at_once(model, x, q)):
        sums = reference.Sums.empty((rows.stop - rows.start,), settings.tail, x)
        for tile in weighted_tiles(model, x, q, key, settings, rows, chunk_size):
            sums = sums.merge(tile.log_joint - tile.log_q)
        parts.append(sums.results(settings.num_samples))
    if not parts:
        return op.Estimate(x.new_empty(0), x.new_empty(0), x.new_empty((0, settings.tail)))
    return op.Estimate(*(torch.cat(p) for p in zip(*parts, strict=True)))


class _LogProb(torch.nn.Module):
    """``functional_call`` runs a module's forward; this one's is the model's log_prob."""

    def __init__(self, model: LatentVariableModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.model.log_prob(x, z)


def _needs_gradient(model: LatentVariableModel, *tensors: Tensor) -> bool:
    return any(t.requires_grad for t in tensors) or any(p.requires_grad for p in model.parameters())
