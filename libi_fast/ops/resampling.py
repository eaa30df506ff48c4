"""Sampling importance resampling as an operator: the importance-weighted log-likelihood, and from the same samples the mean and
covariance of p(z | x) and draws from it (kernels/importance/reference.py). Not differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from libi_fast.kernels import cpu as native
from libi_fast.kernels.importance import reference
from libi_fast.kernels.importance.reference import Draws
from libi_fast.ops import _library as lib
from libi_fast.ops import random
from libi_fast.ops.importance import _DECODER_SCHEMA, _DRAWS_SCHEMA, Layers, Settings, _float32_only, _unpack, check_layers
from libi_fast.ops.random import Stream

__all__ = ["Resampling", "resampling_of_layers", "uniforms"]


class Resampling(NamedTuple):
    """log_likelihood, effective_sample_size [R, N] and top [R, N, tail] as in ``importance.Estimate``; mean [R, N, L] and
    covariance [R, N, L, L] by self-normalised weights; z [R, N, M, L] with log p(x, z) in log_density [R, N, M]."""

    log_likelihood: Tensor
    effective_sample_size: Tensor
    top: Tensor
    mean: Tensor
    covariance: Tensor
    z: Tensor
    log_density: Tensor


def uniforms(
    seed: Tensor, replicas: Tensor, first_row: int, rows: int, count: int, repetition: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """What chooses the draws of each row, [R, rows, count]."""
    draw = random.drawing("uniform")
    return draw(seed, replicas, first_row, rows, 0, count, repetition, int(Stream.RESAMPLING), dtype)


def _of_rows(draws: Draws, count: int, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    def of_rows(rows: slice) -> Tensor:
        first = draws.first_row + rows.start
        return uniforms(draws.seed, draws.replicas, first, rows.stop - rows.start, count, draws.repetition, dtype)

    return of_rows


def _reference(x, mean, log_scale, *arguments):
    *rest, count = arguments
    decoder, chosen, draws = _unpack(*rest)
    chosen_by = _of_rows(draws, count, mean.dtype)
    return reference.forward_and_resample(x, mean, log_scale, decoder, draws, chosen.num_samples, chosen.tail, chosen_by)


def _triton(x, mean, log_scale, *arguments):
    from libi_fast.kernels.importance import gpu_resampling

    *rest, count = arguments
    decoder, chosen, draws = _unpack(*rest)
    return gpu_resampling.forward_and_resample(
        x, mean, log_scale, decoder, draws, chosen.num_samples, chosen.tail, chosen.precision,
        _of_rows(draws, count, mean.dtype), count,
    )  # fmt: skip


def _cpu(x, mean, log_scale, *arguments):
    *rest, count = arguments
    decoder, chosen, draws = _unpack(*rest)
    return native.resampling(
        x, mean, log_scale, decoder, draws, chosen.num_samples, chosen.tail, count, int(Stream.RESAMPLING)
    )  # fmt: skip


def _fake(x, mean, log_scale, parameters, variance, activations, has_bias, likelihood, seed, replicas, num_samples, gradient,
          tail, *settings):  # fmt: skip
    count, shape, latents = settings[-1], mean.shape[:2], mean.shape[2]
    sizes = [(), (), (tail,), (latents,), (latents, latents), (count, latents), (count,)]
    return tuple(mean.new_empty((*shape, *size)) for size in sizes)


_resampling = lib.define(
    "resampling",
    f"(Tensor x, Tensor mean, Tensor log_scale, {_DECODER_SCHEMA}{_DRAWS_SCHEMA.removesuffix('str backend')}SymInt count, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"reference": _reference, "cpu": _cpu, "triton": _triton},
    _fake,
    limits={"triton": _float32_only},
)


def resampling_of_layers(
    x: Tensor, mean: Tensor, log_scale: Tensor, layers: Layers, parameters: Sequence[Tensor], variance: Tensor, seed: Tensor,
    replicas: Tensor, settings: Settings, count: int,
) -> Resampling:  # fmt: skip
    """A recognised decoder, ``count`` draws a row; the other arguments as in ``importance.importance_layers``."""
    check_layers(x, layers, parameters, variance)
    *rest, backend = settings
    with torch.no_grad():
        return Resampling(*_resampling(
            x, mean, log_scale, list(parameters), variance, ",".join(layers.activations), list(layers.has_bias),
            layers.likelihood, seed, replicas, *rest, count, backend,
        ))  # fmt: skip
