"""log p(x) to a given accuracy where codes have one or two dimensions: the midpoint rule on cells that are halved where they
matter.

The integrand p(x|z) N(z; 0, I) may be a peak of width 1e-3 anywhere in the prior's support, or a thin curve. So cells are kept
or dropped by an upper bound on what they hold: the decoder's output moves by at most REACH times what it moves along the axes
within the cell, and the likelihood is highest at the reachable output nearest to the likeliest one. For a smooth integrand the
midpoint rule converges exponentially once its cells are narrower than the peak; a row is done when halving the cells moves its
value by less than the tolerance twice in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.models.likelihoods import Bernoulli, DiagonalGaussian, Gaussian, Likelihood
from libi_fast.models.model import LatentVariableModel, evaluation_mode
from libi_fast.ops._library import check_finite

RADII = (9, 18, 36)  # of the square of codes; a row whose mass reaches the edge takes the next
WIDEST = 1 / 8  # cells to begin with
LEVELS = 16
REACH = 2.0
NEGLIGIBLE = 40.0  # nats below a row's value
PAIRS = 2**20  # of row and cell at once


def quadrature_log_likelihood(model: LatentVariableModel, x: Tensor, tolerance: float = 1e-6) -> Tensor:
    """log p(x) of every row in nats, [N] float64, by adaptive quadrature over the codes.

    Args:
        model: latent_dim 1 or 2 and a Gaussian, DiagonalGaussian or Bernoulli likelihood; computed with in float64.
        x: [N, D].
        tolerance: halving all cells moves each value by less.

    Raises:
        InputError: another latent_dim or likelihood, NaN or infinity in x, tolerance not above 0, or a row that does not
        converge (a decoder with steps, or codes beyond 36 standard deviations).
    """
    if model.latent_dim not in (1, 2):
        raise InputError(f"quadrature is over 1 or 2 latent dimensions, but latent_dim is {model.latent_dim}")
    if not tolerance > 0:
        raise InputError(f"tolerance must be positive, got {tolerance}")
    if x.dim() != 2:
        raise InputError(f"x must have shape [rows, columns], got {tuple(x.shape)}")
    check_finite("x", x)
    model.check(x.to(model.dtype))
    rows = x.detach().double()
    values = torch.empty(len(rows), dtype=torch.float64, device=x.device)
    with torch.no_grad(), evaluation_mode(model), _in_float64(model) as decode:
        likeliest = _likeliest(model.likelihood, rows)
        left = torch.arange(len(rows), device=x.device)
        for radius in RADII:
            part = rows[left], likeliest[left]
            value, at_edge, done = _integrate(decode, model.likelihood, *part, model.latent_dim, radius, tolerance)
            if not bool(done.all()):
                raise InputError(f"row {int(left[~done][0])} of x: the integral does not settle; is the decoder continuous?")
            values[left] = value
            left = left[at_edge]
            if not len(left):
                return values
    raise InputError(f"row {int(left[0])} of x has its codes beyond {RADII[-1]} standard deviations of the prior")


class _in_float64:
    """The model in float64 within the block, and its decoder as a function of codes [K, L]."""

    def __init__(self, model: LatentVariableModel):
        self.model, self.dtype = model, model.dtype

    def __enter__(self) -> Callable[[Tensor], Tensor]:
        self.before = [(t, t.data) for t in (*self.model.parameters(), *self.model.buffers()) if t.is_floating_point()]
        for t, data in self.before:
            t.data = data.double()
        return self.model.decode

    def __exit__(self, *ignored: object) -> None:
        for t, data in self.before:
            t.data = data


def _likeliest(likelihood: Likelihood, x: Tensor) -> Tensor:
    """The decoder's output at which each value of x is likeliest."""
    if isinstance(likelihood, Bernoulli):
        return torch.logit(x)
    if isinstance(likelihood, Gaussian | DiagonalGaussian):
        return x
    raise InputError(f"quadrature knows Gaussian, DiagonalGaussian and Bernoulli, not {type(likelihood).__name__}")


def _log_prior(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)


def _integrate(
    decode: Callable[[Tensor], Tensor], likelihood: Likelihood, x: Tensor, likeliest: Tensor, latent_dim: int, radius: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """log integral over the square of this radius [N]; whether mass lies at its edge; and whether the value has settled."""
    n, width = len(x), WIDEST
    axis = torch.arange(-radius + width / 2, radius, width, dtype=torch.float64, device=x.device)
    cells = torch.cartesian_prod(*[axis] * latent_dim).view(-1, latent_dim)
    every = torch.arange(len(cells), device=x.device)
    value = torch.full((n,), -math.inf, dtype=torch.float64, device=x.device)
    edge = torch.zeros(n, dtype=torch.bool, device=x.device)
    done, agreed = edge.clone(), edge.clone()
    row = cell = every[:0]
    for level in range(LEVELS):
        output, reach = _reach(decode, cells, width)
        if level == 0:  # all pairs, a few rows at a time
            parts = torch.arange(n, device=x.device).split(max(1, PAIRS // len(cells)))
            pairs = [(part.repeat_interleave(len(cells)), every.repeat(len(part))) for part in parts]
        else:
            pairs = list(zip(row.split(PAIRS), cell.split(PAIRS), strict=True))
        found, bounds = [], []
        for r, c in pairs:
            found.append(likelihood.log_prob(x[r], output[c]) + _log_prior(cells[c]))
            nearest = torch.minimum(torch.maximum(likeliest[r], output[c] - reach[c]), output[c] + reach[c])
            closest = (cells[c].abs() - width / 2).clamp_min(0)
            bounds.append(likelihood.log_prob(x[r], nearest) + _log_prior(closest))
            if level == 0:  # memory: only cells that can matter leave the block
                best = torch.full_like(value, -math.inf).scatter_reduce_(0, r, found[-1], "amax")
                keep = bounds[-1] > best[r] - NEGLIGIBLE
                found[-1], bounds[-1] = found[-1][keep], bounds[-1][keep]
                pairs[len(found) - 1] = (r[keep], c[keep])
        row, cell = (torch.cat(part) for part in zip(*pairs, strict=True))
        log_weights, bound = torch.cat(found), torch.cat(bounds)
        now = _log_sum(log_weights, row, n) + latent_dim * math.log(width)
        agrees = (now - value).abs() < 0.1 * tolerance
        at_edge = (cells.abs() > radius - width).any(-1)[cell] & (log_weights > now[row] - latent_dim * math.log(width) - 20)
        new = ~done
        edge[row[at_edge & new[row]]] = True
        value = torch.where(done, value, now)
        done |= (agrees & agreed) | (edge & (level > 2))
        agreed = agrees
        if bool(done.all()):
            break
        keep = ~done[row] & (bound > now[row] - latent_dim * math.log(width) - NEGLIGIBLE)
        row, cells, cell = _halve(row[keep], cells[cell[keep]], width, latent_dim)
        width /= 2
    return value, edge, done


def _reach(decode: Callable[[Tensor], Tensor], cells: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """The decoder's output [K, D] at the cells' centres, and how far it may move within them."""
    output = _in_blocks(decode, cells)
    reach = torch.zeros_like(output)
    for axis in range(cells.shape[1]):
        step = torch.zeros_like(cells)
        step[:, axis] = width / 2
        moved = [(_in_blocks(decode, cells + s) - output).abs() for s in (step, -step)]
        reach += torch.maximum(*moved)
    return output, REACH * reach


def _in_blocks(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.cat([decode(part) for part in z.split(PAIRS // 8)]) if len(z) else decode(z)


def _log_sum(log_weights: Tensor, row: Tensor, n: int) -> Tensor:
    """log sum exp over the pairs of each row, [n]."""
    top = torch.full((n,), -math.inf, dtype=torch.float64, device=row.device)
    top = top.scatter_reduce_(0, row, log_weights, "amax").clamp_min(torch.finfo(torch.float64).min)
    return torch.zeros_like(top).scatter_add_(0, row, (log_weights - top[row]).exp()).log() + top


def _halve(row: Tensor, cells: Tensor, width: float, latent_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair's cell cut in halves along every axis: rows, distinct cells, and the index of each pair's cell."""
    signs = torch.cartesian_prod(*[torch.tensor([-0.25, 0.25], dtype=torch.float64, device=row.device)] * latent_dim)
    children = (cells[:, None] + width * signs.view(-1, latent_dim)).flatten(0, 1)
    return row.repeat_interleave(2**latent_dim), children, torch.arange(len(children), device=row.device)
