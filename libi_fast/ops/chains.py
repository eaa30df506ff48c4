"""Markov chains on p(z | x) for every row as an operator.

Two paths with the same draws and the same formulas (kernels/chains/reference.py): decoders that are a chain of linear maps and
elementwise activations go through ``torch.ops.libi_fast.chains``; any other density runs in plain torch. Not differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels.chains import reference
from libi_fast.kernels.chains.reference import METHODS, Density, Noise, Result, Settings, log_joint
from libi_fast.ops import _library as lib
from libi_fast.ops import random
from libi_fast.ops.importance import _DECODER_SCHEMA, Layers, _float32_only, check_layers
from libi_fast.ops.random import Stream

__all__ = ["METHODS", "Density", "Result", "Settings", "chains_of_density", "chains_of_layers"]

_STREAMS = (int(Stream.MOMENTUM), int(Stream.ACCEPTANCE))


def noise_of(streams: tuple[int, int], seed: Tensor, replicas: Tensor) -> Noise:
    """What moves chains, from ``streams`` of momenta and of acceptance."""
    return Noise(seed, replicas, streams, random.drawing("normal"), random.drawing("uniform"))


def unpack(kind, streams, parameters, variance, activations, has_bias, likelihood, seed, replicas, *settings):
    """The decoder, noise and settings, of type ``kind``, in an operator's last arguments."""
    layers = Layers(tuple(activations.split(",")), tuple(has_bias), likelihood)
    return layers.decoder(parameters, variance), noise_of(streams, seed, replicas), kind(*settings)


_unpack = functools.partial(unpack, Settings, _STREAMS)


def _reference(x, z, step, log_scale, *rest):
    decoder, noise, settings = _unpack(*rest)
    return tuple(
        reference.run(
            lambda rows, at: log_joint(decoder, x[:, rows, None], at), z, step, log_scale, noise, settings, decoder.widest
        )
    )  # fmt: skip


def _cpu(x, z, step, log_scale, *rest):
    decoder, noise, settings = _unpack(*rest)
    return tuple(native.chains(x, z, step, log_scale, decoder, noise, settings))


def _triton(x, z, step, log_scale, *rest):
    from libi_fast.kernels.chains import gpu

    decoder, noise, settings = _unpack(*rest)
    return tuple(gpu.run(x, z, step, log_scale, decoder, noise, settings))


def _narrow_only(x, z, step, log_scale, *rest):
    from libi_fast.kernels.chains import gpu

    return _float32_only(x, z, step, log_scale) or gpu.refusal(_unpack(*rest)[0])


def _fake(x, z, step, log_scale, parameters, variance, activations, has_bias, likelihood, seed, replicas, method,
          transitions, leapfrogs, thinning, *settings):  # fmt: skip
    kept, shape = transitions // thinning, z.shape[:3]
    return (
        z.new_empty((*shape, kept, z.shape[3])), z.new_empty((*shape, kept)), z.new_empty(shape), z.new_empty(shape),
        z.new_empty(shape, dtype=torch.int64),
    )  # fmt: skip


_chains = lib.define(
    "chains",
    f"(Tensor x, Tensor z, Tensor step, Tensor log_scale, {_DECODER_SCHEMA}Tensor seed, Tensor replicas, str method, "
    "SymInt transitions, SymInt leapfrogs, SymInt thinning, float jitter, float target, SymInt first_transition, "
    "SymInt first_row, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"reference": _reference, "cpu": _cpu, "triton": _triton},
    _fake,
    limits={"triton": _narrow_only},
)


def check_settings(settings: Settings, latent_dim: int) -> None:
    """Raise InputError for settings that no backend can honour."""
    if settings.method not in METHODS:
        raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, got {settings.method!r}")
    lib.check_count("leapfrogs", settings.leapfrogs, 1)
    lib.check_count("thinning", settings.thinning, 1)
    lib.check_index("transitions", settings.transitions, random.INDEX_LIMIT)
    lib.check_index("first_row", settings.first_row, random.INDEX_LIMIT)
    lib.check_count("first_transition", settings.first_transition, 0)
    if isinstance(settings.jitter, bool) or not isinstance(settings.jitter, int | float):
        raise TypeError(f"jitter must be a number, got {type(settings.jitter).__name__}")
    if not 0 <= settings.jitter < 1:
        raise InputError(f"jitter must lie in [0, 1), got {settings.jitter}")
    if not 0 <= settings.target < 1:
        raise InputError(f"target_acceptance must lie in (0, 1), got {settings.target}")
    last = settings.first_transition + settings.transitions
    if last > random.INDEX_LIMIT or last * latent_dim > 4 * random.INDEX_LIMIT:
        raise InputError(
            f"warmup and counted transitions, {last}, are past 2^32, or times {latent_dim} latents past 2^34: that does not "
            "fit the random numbers' counter"
        )


def chains_of_layers(
    x: Tensor, z: Tensor, step: Tensor, log_scale: Tensor, layers: Layers, parameters: Sequence[Tensor], variance: Tensor,
    seed: Tensor, replicas: Tensor, settings: Settings, backend: str = "",
) -> Result:  # fmt: skip
    """A recognised decoder. x [R or 1, N, D], z [R, N, C, L], step [R, N, C], log_scale [R, N, L]; parameters with R or 1 in
    front; variance likewise."""
    check_layers(x, layers, parameters, variance)
    with torch.no_grad():
        return Result(*_chains(
            x, z, step, log_scale, list(parameters), variance, ",".join(layers.activations), list(layers.has_bias),
            layers.likelihood, seed, replicas, *settings, backend,
        ))  # fmt: skip


def chains_of_density(
    density: Density, z: Tensor, step: Tensor, log_scale: Tensor, seed: Tensor, replicas: Tensor, settings: Settings,
    widest: int,
) -> Result:  # fmt: skip
    """Any density, with its gradient: see ``kernels.chains.reference.run``."""
    with torch.no_grad():
        return reference.run(density, z, step, log_scale, noise_of(_STREAMS, seed, replicas), settings, widest)
