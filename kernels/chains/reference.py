r"""Markov chains on p(z | x) for many rows at once in plain torch: the specification of the fused kernels.

Each row x_n has C chains z in R^L on  log pi(z) = log p(x_n | f(z)) + log N(z; 0, I)  with gradient g(z). A step size eps of
each chain and a scale sigma of each row and latent give h = eps sigma; eps is multiplied by 1 + jitter (2 v - 1), v uniform,
anew in each transition, so that no trajectory is periodic. With noise u ~ N(0, I) a transition proposes

    hmc          u += (h/2) g(z),  then K times  z += h u,  u += h g(z)  (h/2 at the last)      (Duane et al. 1987)
    mala         the same with K = 1, which is Langevin's proposal                              (Roberts & Tweedie 1996)
    random-walk  z += h u

(h u is a velocity under the mass matrix diag(sigma)^-2), and accepts where log v' < -dH, v' uniform, dH the change of
|u|^2 / 2 - log pi(z), or of -log pi(z) for random-walk. A proposal with dH > 1000 or not a number is a divergence.

With a target delta > 0 each chain adapts eps by dual averaging (Hoffman & Gelman 2014, algorithm 5): after transition
t = 1, 2, .. with acceptance probability a, and with mu = log(10 eps) of the beginning,

    b = (1 - 1/(t + t0)) b + (delta - a)/(t + t0),    log eps  = mu - b sqrt(t)/gamma,
                                                      log eps' = t^-kappa log eps + (1 - t^-kappa) log eps'

and eps' is returned. Counters: momenta of a chain form one sequence over its transitions, draw t L + l of stream MOMENTUM with
the chain as repetition; v' and v are draws 2 t and 2 t + 1 of stream ACCEPTANCE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from libi_fast.kernels.importance.reference import LOG_2PI, TILE_VALUES, Decoder, blocks
from libi_fast.kernels.random import reference as random

METHODS = ("hmc", "mala", "random-walk")
GAMMA, T0, KAPPA = 0.05, 10, 0.75  # of dual averaging
DIVERGENCE = 1000.0
TRANSITIONS_AT_ONCE = 32  # whose noise is drawn together

Density = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(rows, z [R, n, C, L]) -> log pi [R, n, C] and its gradient [R, n, C, L]"""


class Settings(NamedTuple):
    """What a call needs besides tensors."""

    method: str
    transitions: int
    leapfrogs: int = 1  # of hmc; the others take one step whatever it says
    thinning: int = 1  # one draw is kept after each so many transitions
    jitter: float = 0.0
    target: float = 0.0  # acceptance rate to adapt to; 0 keeps the step sizes
    first_transition: int = 0
    first_row: int = 0

    @property
    def kept(self) -> int:
        return self.transitions // self.thinning

    @property
    def steps(self) -> int:
        return self.leapfrogs if self.method == "hmc" else 1


class Noise(NamedTuple):
    """Where the noise of a call comes from."""

    seed: Tensor
    replicas: Tensor  # [R]
    streams: tuple[int, int]  # momentum, acceptance
    normal: Callable[..., Tensor]
    uniform: Callable[..., Tensor]

    def draw(
        self, kind: Callable[..., Tensor], stream: int, each: int, rows: slice, chains: int, transitions: slice, like: Tensor
    ) -> Tensor:
        """[R, n, C, t, each]: draws each * t .. of every chain's sequence."""
        count = transitions.stop - transitions.start
        first = (rows.start, rows.stop - rows.start, transitions.start * each, count * each)
        parts = [kind(self.seed, self.replicas, *first, chain, stream, like.dtype) for chain in range(chains)]
        return torch.stack(parts, 2).unflatten(-1, (count, each))


def reference_normal(*args) -> Tensor:
    return random.draws(random.to_normal, *args)


def reference_uniform(*args) -> Tensor:
    return random.draws(random.to_uniform, *args)


class Result(NamedTuple):
    """z [R, N, C, kept, L] and log_density [R, N, C, kept] after each ``thinning`` transitions; of each chain [R, N, C] the
    step size (adapted where asked for), the mean acceptance probability, and the divergences (int64)."""

    z: Tensor
    log_density: Tensor
    step: Tensor
    acceptance: Tensor
    divergences: Tensor


def log_joint(decoder: Decoder, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x | z) + log N(z; 0, I) [R, n, C] and its gradient [R, n, C, L]; x [R, n, 1, D], z [R, n, C, L]."""
    given, slope = decoder.log_prob_and_gradient(x, z)
    return given - 0.5 * (z.square() + LOG_2PI).sum(-1), slope - z


class _Adaptation:
    """Dual averaging of each chain's step size."""

    def __init__(self, step: Tensor, target: float):
        self.target, self.mu = target, (10 * step).log()
        self.log_step, self.averaged, self.bias = step.log(), step.log(), torch.zeros_like(step)

    def update(self, t: int, acceptance: Tensor) -> None:
        rate, weight = 1 / (t + T0), t**-KAPPA
        self.bias = (1 - rate) * self.bias + rate * (self.target - acceptance)
        self.log_step = self.mu - math.sqrt(t) / GAMMA * self.bias
        self.averaged = weight * self.log_step + (1 - weight) * self.averaged


def leapfrog(density: Density, rows: slice, z: Tensor, gradient: Tensor, u: Tensor, h: Tensor, steps: int):
    """New z, log pi, gradient and u after ``steps`` leapfrogs of size h [R, n, C, L]."""
    u = u + 0.5 * h * gradient
    for k in range(steps):
        z = z + h * u
        value, gradient = density(rows, z)
        u = u + (h if k + 1 < steps else 0.5 * h) * gradient
    return z, value, gradient, u


def _propose(density: Density, rows: slice, z: Tensor, gradient: Tensor, u: Tensor, h: Tensor, settings: Settings):
    """New z, log pi, gradient and u."""
    if settings.method == "random-walk":
        z = z + h * u
        return z, *density(rows, z), u
    return leapfrog(density, rows, z, gradient, u, h, settings.steps)


def _run_rows(
    density: Density, rows: slice, z: Tensor, step: Tensor, scale: Tensor, noise: Noise, settings: Settings
) -> Result:
    chains, latents = z.shape[-2:]
    value, gradient = density(rows, z)
    adaptation = _Adaptation(step, settings.target)
    sum_acceptance, divergences = torch.zeros_like(step), torch.zeros_like(step, dtype=torch.int64)
    kept_z, kept_value = [], []
    in_sequence = slice(settings.first_row + rows.start, settings.first_row + rows.stop)
    for block in blocks(settings.transitions, TRANSITIONS_AT_ONCE):
        moved = slice(settings.first_transition + block.start, settings.first_transition + block.stop)
        momenta = noise.draw(noise.normal, noise.streams[0], latents, in_sequence, chains, moved, z)
        uniforms = noise.draw(noise.uniform, noise.streams[1], 2, in_sequence, chains, moved, z)
        for t in range(block.start, block.stop):
            u, (v_accept, v_step) = momenta[..., t - block.start, :], uniforms[..., t - block.start, :].unbind(-1)
            eps = adaptation.log_step.exp() if settings.target else step
            h = (eps * (1 + settings.jitter * (2 * v_step - 1)))[..., None] * scale
            new_z, new_value, new_gradient, new_u = _propose(density, rows, z, gradient, u, h, settings)
            kinetic = 0.0 if settings.method == "random-walk" else 0.5 * (new_u.square() - u.square()).sum(-1)
            change = kinetic - (new_value - value)
            probability = (-change).exp().clamp_max(1).nan_to_num(0.0)
            accept = v_accept.log() < -change
            z = torch.where(accept[..., None], new_z, z)
            gradient = torch.where(accept[..., None], new_gradient, gradient)
            value = torch.where(accept, new_value, value)
            sum_acceptance = sum_acceptance + probability
            divergences = divergences + ~(change <= DIVERGENCE)
            if settings.target:
                adaptation.update(t + 1, probability)
            if (t + 1) % settings.thinning == 0:
                kept_z.append(z)
                kept_value.append(value)
    shape = step.shape
    empty = settings.kept == 0
    return Result(
        z.new_empty((*shape, 0, latents)) if empty else torch.stack(kept_z, 3),
        z.new_empty((*shape, 0)) if empty else torch.stack(kept_value, 3),
        adaptation.averaged.exp() if settings.target else step,
        sum_acceptance / max(settings.transitions, 1),
        divergences,
    )


def run(
    density: Density, z: Tensor, step: Tensor, log_scale: Tensor, noise: Noise, settings: Settings, widest: int
) -> Result:  # fmt: skip
    """Chains from z [R, N, C, L] with step sizes [R, N, C] and scales exp(log_scale) [R, N, L]; ``widest``: values a point of
    ``density`` needs at once."""
    replicas, n, chains, latents = z.shape
    at_once = max(1, TILE_VALUES // (widest * replicas * max(chains, 1)))
    parts: Sequence[Result] = [
        _run_rows(density, rows, z[:, rows], step[:, rows], log_scale[:, rows, None].exp(), noise, settings)
        for rows in blocks(n, at_once)
    ]
    if not parts:
        empty, kept = z.new_empty((replicas, 0, chains)), settings.kept
        return Result(z.new_empty((replicas, 0, chains, kept, latents)), z.new_empty((replicas, 0, chains, kept)),
                      empty, empty, empty.long())  # fmt: skip
    return Result(*(torch.cat(p, 1) for p in zip(*parts, strict=True)))
