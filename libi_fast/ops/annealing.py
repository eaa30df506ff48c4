"""Annealed importance sampling of every row as an operator.

Two paths with the same draws and the same formulas (kernels/annealing/reference.py): decoders that are a chain of linear maps
and elementwise activations go through ``torch.ops.libi_fast.annealing``; any other density runs in plain torch. Not
differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels.annealing import reference
from libi_fast.kernels.annealing.reference import Result, Settings
from libi_fast.kernels.chains.reference import Density, log_joint
from libi_fast.ops import _library as lib
from libi_fast.ops import random
from libi_fast.ops.chains import noise_of, unpack
from libi_fast.ops.importance import _DECODER_SCHEMA, Layers, _float32_only, check_layers
from libi_fast.ops.random import Stream

__all__ = ["Result", "Settings", "annealing_of_density", "annealing_of_layers"]

_STREAMS = (int(Stream.ANNEALING_MOMENTUM), int(Stream.ANNEALING_ACCEPTANCE))


_unpack = functools.partial(unpack, Settings, _STREAMS)


def _reference(x, z, betas, step, scale_tril, mean, log_scale, *rest):
    decoder, noise, settings = _unpack(*rest)

    def density(rows: slice, at: Tensor) -> tuple[Tensor, Tensor]:
        return log_joint(decoder, x[:, rows, None], at)

    return tuple(reference.run(density, z, betas, step, scale_tril, mean, log_scale, noise, settings, decoder.widest))


def _cpu(x, z, betas, step, scale_tril, mean, log_scale, *rest):
    return tuple(native.annealing(x, z, betas, step, scale_tril, mean, log_scale, *_unpack(*rest)))


def _triton(x, z, betas, step, scale_tril, mean, log_scale, *rest):
    from libi_fast.kernels.annealing import gpu

    return tuple(gpu.run(x, z, betas, step, scale_tril, mean, log_scale, *_unpack(*rest)))


def _narrow_only(x, z, betas, step, scale_tril, mean, log_scale, *rest):
    from libi_fast.kernels.chains import gpu

    return _float32_only(x, z, step, scale_tril, mean, log_scale, *rest) or gpu.refusal(_unpack(*rest)[0])


def _fake(x, z, betas, step, scale_tril, mean, log_scale, parameters, variance, activations, has_bias, likelihood, seed,
          replicas, leapfrogs, jitter, rate, *settings):  # fmt: skip
    shape = z.shape[:3]
    temperatures = betas.shape[-1] - 1 if rate > 0 else 0
    return (
        z.new_empty(z.shape), z.new_empty(shape), z.new_empty(shape), z.new_empty((*shape, temperatures)),
        z.new_empty((*shape, temperatures, z.shape[3])),
    )  # fmt: skip


_annealing = lib.define(
    "annealing",
    f"(Tensor x, Tensor z, Tensor betas, Tensor step, Tensor scale_tril, Tensor mean, Tensor log_scale, {_DECODER_SCHEMA}"
    "Tensor seed, Tensor replicas, SymInt leapfrogs, float jitter, float rate, float target, SymInt first_transition, "
    "SymInt first_row, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"reference": _reference, "cpu": _cpu, "triton": _triton},
    _fake,
    limits={"triton": _narrow_only},
)


def check_settings(settings: Settings, temperatures: int, latent_dim: int) -> None:
    """Raise InputError for settings that no backend can honour."""
    lib.check_count("temperatures", temperatures, 1)
    lib.check_count("leapfrogs", settings.leapfrogs, 1)
    lib.check_index("first_row", settings.first_row, random.INDEX_LIMIT)
    if not 0 <= settings.jitter < 1:
        raise InputError(f"jitter must lie in [0, 1), got {settings.jitter}")
    if not 0 <= settings.target < 1:
        raise InputError(f"target_acceptance must lie in (0, 1), got {settings.target}")
    if not 0 <= settings.rate <= 1:
        raise InputError(f"rate must lie in [0, 1], got {settings.rate}")
    last = settings.first_transition + temperatures
    if last > random.INDEX_LIMIT or last * latent_dim > 4 * random.INDEX_LIMIT:
        raise InputError(
            f"the transitions of all runs, {last}, are past 2^32, or times {latent_dim} latents past 2^34: that does not fit "
            "the random numbers' counter; ask for fewer temperatures"
        )


def annealing_of_layers(
    x: Tensor, z: Tensor, betas: Tensor, step: Tensor, scale_tril: Tensor, mean: Tensor, log_scale: Tensor, layers: Layers,
    parameters: Sequence[Tensor], variance: Tensor, seed: Tensor, replicas: Tensor, settings: Settings, backend: str = "",
) -> Result:  # fmt: skip
    """A recognised decoder. x [R or 1, N, D], z [R, N, C, L], betas [R or 1, T + 1] float64, step [R, N, T],
    scale_tril [R, N, W, L, L], mean and log_scale of q [R, N, L]; parameters with R or 1 in front; variance likewise."""
    check_layers(x, layers, parameters, variance)
    with torch.no_grad():
        return Result(*_annealing(
            x, z, betas, step, scale_tril, mean, log_scale, list(parameters), variance, ",".join(layers.activations),
            list(layers.has_bias), layers.likelihood, seed, replicas, *settings, backend,
        ))  # fmt: skip


def annealing_of_density(
    density: Density, z: Tensor, betas: Tensor, step: Tensor, scale_tril: Tensor, mean: Tensor, log_scale: Tensor, seed: Tensor,
    replicas: Tensor, settings: Settings, widest: int,
) -> Result:  # fmt: skip
    """Any log p(x, z), with its gradient: see ``kernels.annealing.reference.run``."""
    with torch.no_grad():
        return reference.run(
            density, z, betas, step, scale_tril, mean, log_scale, noise_of(_STREAMS, seed, replicas), settings, widest
        )
