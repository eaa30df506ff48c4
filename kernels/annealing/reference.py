r"""Annealed importance sampling for many rows at once in plain torch: the specification of the fused kernels.

Each row x_n has C chains z in R^L, which pass from f_b(0) to f_b(T) along the geometric path (Neal 2001)

    log f_b(z) = (1 - b) log q(z) + b log p(x_n, z),     q = N(mean_n, diag(exp(log_scale_n))^2),  b = betas[0] .. betas[T],

log p(x, z) = log p(x | decoder(z)) + log N(z; 0, I). For t = 0 .. T - 1, from log w = 0,

    log w += (betas[t + 1] - betas[t]) (log p(x_n, z) - log q(z)),
    one transition of Hamiltonian Monte Carlo that leaves f_b, b = betas[t + 1], invariant.

With betas from 0 to 1 and z from q, E[w] = p(x_n), and log mean w is a lower bound in expectation. From 1 to 0 and z from
p(z | x_n), E[w] = 1 / p(x_n): the upper bound of bidirectional Monte Carlo (Grosse, Ghahramani & Adams 2015).

The transition is that of ../chains/reference.py with a matrix S in place of its scales, so that velocities h S u have the mass
matrix (S S')^-1: with u ~ N(0, I) and the gradient g of log f_b

    u += (h/2) S' g(z),  then K times  z += h S u,  u += h S' g(z)  (h/2 at the last),
    h = step[n, t] exp(a) (1 + jitter (2 v - 1)).

S, lower triangular, is number floor(t W / T) of W for the row. a is 0, and with a rate > 0 (a pilot run, whose weights mean
nothing) each chain moves it after each transition by rate (acceptance probability - target). log p(x, z) and its gradient are
kept where a chain stands and do not depend on b, so that a call evaluates them T K + 1 times for each chain.

log w is summed in float64. Counters: as of chains, transition t of the call being first_transition + t.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from libi_fast.kernels.chains.reference import TRANSITIONS_AT_ONCE, Density, Noise, leapfrog
from libi_fast.kernels.importance.reference import LOG_2PI, TILE_VALUES, blocks


class Settings(NamedTuple):
    """What a call needs besides tensors."""

    leapfrogs: int
    jitter: float = 0.0
    rate: float = 0.0  # of the adaptation of step sizes; 0 keeps them
    target: float = 0.0  # acceptance rate to adapt to
    first_transition: int = 0
    first_row: int = 0


class Result(NamedTuple):
    """z [R, N, C, L] at the end; log w and the mean acceptance probability of each chain [R, N, C]; with a rate > 0 the step
    size of each transition, without its jitter, [R, N, C, T], and z after it [R, N, C, T, L], else T = 0 of both."""

    z: Tensor
    log_weights: Tensor
    acceptance: Tensor
    steps: Tensor
    path: Tensor


class _Path:
    """The densities f_b of some rows; mean and log_scale [R, n, 1, L]."""

    def __init__(self, density: Density, rows: slice, mean: Tensor, log_scale: Tensor):
        self.density, self.rows = density, rows
        self.mean, self.log_scale, self.scale = mean, log_scale, log_scale.exp()
        self.b = mean.new_zeros((1, 1, 1))  # [R or 1, 1, 1]

    def log_q(self, z: Tensor) -> Tensor:
        return -(0.5 * (((z - self.mean) / self.scale).square() + LOG_2PI) + self.log_scale).sum(-1)

    def between(self, z: Tensor, joint: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """log f_b and its gradient from those of log p(x, z)."""
        to_q = -(z - self.mean) / self.scale.square()
        b = self.b[..., None]
        return (1 - self.b) * self.log_q(z) + self.b * joint, (1 - b) * to_q + b * slope

    def propose(self, z: Tensor, joint: Tensor, slope: Tensor, u: Tensor, h: Tensor, scale_tril: Tensor, leapfrogs: int):
        """New z, log p(x, z) and its gradient after leapfrogs of h [R, n, C, 1], and the change of the energy; scale_tril
        [R, n, L, L]."""
        last = z, joint, slope

        def density(_: slice, moved: Tensor) -> tuple[Tensor, Tensor]:
            """log f_b at z + S moved, and its gradient to moved."""
            nonlocal last
            at = z + moved @ scale_tril.mT
            last = at, *self.density(self.rows, at)
            value, gradient = self.between(*last)
            return value, gradient @ scale_tril

        value, gradient = self.between(z, joint, slope)
        _, new_value, _, new_u = leapfrog(density, self.rows, torch.zeros_like(z), gradient @ scale_tril, u, h, leapfrogs)
        return *last, 0.5 * (new_u.square() - u.square()).sum(-1) - (new_value - value)


def _run_rows(
    density: Density, rows: slice, z: Tensor, betas: Tensor, step: Tensor, scale_tril: Tensor, mean: Tensor,
    log_scale: Tensor, noise: Noise, settings: Settings,
) -> Result:  # fmt: skip
    (chains, latents), temperatures, windows = z.shape[-2:], betas.shape[-1] - 1, scale_tril.shape[2]
    path = _Path(density, rows, mean, log_scale)
    joint, slope = density(rows, z)
    log_weights, offset, sum_acceptance = (
        torch.zeros_like(joint, dtype=torch.float64),
        torch.zeros_like(joint),
        torch.zeros_like(joint),
    )
    steps, visited = [], []
    in_sequence = slice(settings.first_row + rows.start, settings.first_row + rows.stop)
    for block in blocks(temperatures, TRANSITIONS_AT_ONCE):
        moved = slice(settings.first_transition + block.start, settings.first_transition + block.stop)
        momenta = noise.draw(noise.normal, noise.streams[0], latents, in_sequence, chains, moved, z)
        uniforms = noise.draw(noise.uniform, noise.streams[1], 2, in_sequence, chains, moved, z)
        for t in range(block.start, block.stop):
            u, (v_accept, v_step) = momenta[..., t - block.start, :], uniforms[..., t - block.start, :].unbind(-1)
            before, after = betas[:, t, None, None], betas[:, t + 1, None, None]
            log_weights = log_weights + (after - before) * (joint - path.log_q(z)).double()
            path.b = after.to(z.dtype)
            eps = step[:, :, t, None] * offset.exp()
            h = (eps * (1 + settings.jitter * (2 * v_step - 1)))[..., None]
            scales = scale_tril[:, :, t * windows // temperatures]
            new_z, new_joint, new_slope, change = path.propose(z, joint, slope, u, h, scales, settings.leapfrogs)
            probability = (-change).exp().clamp_max(1).nan_to_num(0.0)
            accept = v_accept.log() < -change
            z = torch.where(accept[..., None], new_z, z)
            slope = torch.where(accept[..., None], new_slope, slope)
            joint = torch.where(accept, new_joint, joint)
            sum_acceptance = sum_acceptance + probability
            if settings.rate:
                steps.append(eps)
                visited.append(z)
                offset = offset + settings.rate * (probability - settings.target)
    told = (torch.stack(steps, 3), torch.stack(visited, 3)) if settings.rate else _nothing(z)
    return Result(z, log_weights.to(z.dtype), sum_acceptance / temperatures, *told)


def _nothing(z: Tensor, temperatures: int = 0) -> tuple[Tensor, Tensor]:
    return z.new_empty((*z.shape[:3], temperatures)), z.new_empty((*z.shape[:3], temperatures, z.shape[3]))


def run(
    density: Density, z: Tensor, betas: Tensor, step: Tensor, scale_tril: Tensor, mean: Tensor, log_scale: Tensor, noise: Noise,
    settings: Settings, widest: int,
) -> Result:  # fmt: skip
    """Chains from z [R, N, C, L] over betas [R or 1, T + 1] (float64) with step sizes [R, N, T], S [R, N, W, L, L] (what is
    above the diagonal is not looked at) and q's mean and log_scale [R, N, L]; ``density`` is log p(x, z), ``widest`` the
    values that a point of it needs at once."""
    replicas, n, chains, _ = z.shape
    at_once = max(1, TILE_VALUES // (widest * replicas * max(chains, 1)))
    parts = [
        _run_rows(
            density, rows, z[:, rows], betas, step[:, rows], scale_tril[:, rows].tril(), mean[:, rows, None],
            log_scale[:, rows, None], noise, settings,
        )
        for rows in blocks(n, at_once)
    ]  # fmt: skip
    if not parts:
        shape = (replicas, 0, chains)
        return Result(
            z.new_empty(z.shape),
            z.new_empty(shape),
            z.new_empty(shape),
            *_nothing(z, (betas.shape[-1] - 1) * bool(settings.rate)),
        )
    return Result(*(torch.cat(p, 1) for p in zip(*parts, strict=True)))
