"""The energy distance between two samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from libi_fast.ops import _library as lib
from libi_fast.ops.smooth_knn import paired_samples

PAIR_BUDGET = 2**20  # pairs held at a time, over all batch dimensions


def _mean_distance(x: Tensor, y: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[R, n, d], [R, m, d] -> the mean distance [R] and, if asked for, its gradients by x and y (else zeros)."""
    replicas, n, _ = x.shape
    m = y.shape[1]
    total, to_x, to_y = x.new_zeros(replicas), torch.zeros_like(x), torch.zeros_like(y)
    step = max(1, PAIR_BUDGET // max(1, replicas * m))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        distance = torch.cdist(x[:, rows], y, compute_mode="donot_use_mm_for_euclid_dist")
        total += distance.sum((1, 2))
        if gradient:
            inverse = distance.reciprocal_().masked_fill_(distance.isinf(), 0)  # equal points pull nowhere
            to_x[:, rows] = inverse.sum(2, keepdim=True) * x[:, rows] - inverse @ y
            to_y += inverse.sum(1).unsqueeze(2) * y - inverse.mT @ x[:, rows]
    return total / (n * m), to_x / (n * m), to_y / (n * m)


class _EnergyDistance(torch.autograd.Function):
    """The gradient comes with the value, as it needs the same distances."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        # The gradient is a difference of sums, which an offset would drown.
        centre = a.double().mean(1, keepdim=True)
        x, y = a.double() - centre, b.double() - centre
        between, between_x, between_y = _mean_distance(x, y, gradient)
        within_x, first_x, second_x = _mean_distance(x, x, gradient)
        within_y, first_y, second_y = _mean_distance(y, y, gradient)
        value = (2 * between - within_x - within_y).clamp_min(0)  # rounding can leave -1e-16
        to_a, to_b = 2 * between_x - first_x - second_x, 2 * between_y - first_y - second_y
        return value.to(a.dtype), to_a.to(a.dtype), to_b.to(a.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[1:])  # a and b only so that a second derivative is noticed, and raises

    @staticmethod
    @lib.once_differentiable("energy_distance")
    def backward(ctx: Any, grad: Tensor, *ignored: Any):
        to_a, to_b = (grad[:, None, None] * t for t in ctx.saved_tensors[2:])
        return to_a, to_b, None


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, X and X' from the points a, Y and Y' from b, pairs of a point with itself included.

    Never negative, 0 for equal samples, in the units of the points. Over all pairs, in blocks: memory is linear in n + m,
    backward included.

    Args:
        a: [..., n, d] and
        b: [..., m, d], both float32 or both float64; leading dimensions are equal or broadcast. Summed in float64.

    Returns:
        [...], differentiable once in a and b.

    Raises:
        InputError: no points, dimensions that differ, NaN or infinity (the row is named).
        TypeError: not float tensors of one dtype.

    Source:
        Szekely & Rizzo 2013, as a V-statistic: dcor.energy_distance. scipy.stats.energy_distance (1-D) is its square root.
    """
    flat_a, flat_b, batch = paired_samples(a, b, least=1)
    gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    value, _, _ = _EnergyDistance.apply(flat_a, flat_b, gradient)
    return value.reshape(batch)
