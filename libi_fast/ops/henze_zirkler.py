"""The exact Henze-Zirkler statistic, differentiable, and its p-value."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels.henze_zirkler import reference
from libi_fast.kernels.henze_zirkler.reference import whiten
from libi_fast.ops import _library as lib


def _vmap(info: Any, in_dims: tuple[Any, ...], z: Tensor, *rest: Any):
    """The mapped dimension joins the replicas."""
    moved = lib.leading(z, in_dims[0], info.batch_size)
    results = _forward(moved.flatten(0, 1), *rest)
    return tuple(r.unflatten(0, moved.shape[:2]) for r in results), (0, 0)


_forward: Any = lib.define(
    "henze_zirkler",
    "(Tensor z, float beta, bool gradient, str backend) -> (Tensor, Tensor)",
    {
        "reference": reference.forward,
        "cpu": lambda z, beta, gradient: reference.forward(z, beta, gradient, native.henze_zirkler_pairs),
    },
    lambda z, beta, gradient: (z.new_empty(z.shape[:1]), z.new_empty((z.shape[0], z.shape[1] * gradient, z.shape[2]))),
    _vmap,
)


__all__ = ["HenzeZirkler", "henze_zirkler", "henze_zirkler_statistic", "whiten"]


class _HenzeZirkler(torch.autograd.Function):
    """The gradient comes with the value: its sums over pairs cost little beside the pairs' exponentials."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, beta: float, gradient: bool, backend: str) -> tuple[Tensor, Tensor]:
        return _forward(z, beta, gradient, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])  # z only so that a second derivative is noticed, and raises

    @staticmethod
    @lib.once_differentiable("henze_zirkler")
    def backward(ctx: Any, grad: Tensor, ignored: Any):
        _, gradient = ctx.saved_tensors
        return grad[:, None, None] * gradient, None, None, None


class HenzeZirkler(NamedTuple):
    """statistic [...] and p_value [...] (survival of the moment-matched lognormal)."""

    statistic: Tensor
    p_value: Tensor


def henze_zirkler_statistic(z: Tensor, *, beta: float | None = None, backend: str | None = None) -> Tensor:
    """The statistic alone, [...] for z [..., n, d], without a look at the values: for training loops."""
    lib.check_tensor("z", z, 2)
    n, d = z.shape[-2:]
    if n < 2 or d < 1:
        raise InputError(f"z must hold at least 2 points of at least 1 dimension, got shape {tuple(z.shape)}")
    if beta is not None and not (math.isfinite(beta) and beta > 0):
        raise InputError(f"beta must be positive and finite, got {beta}")
    value = reference.default_beta(n, d) if beta is None else float(beta)
    gradient = torch.is_grad_enabled() and z.requires_grad
    flat, _ = _HenzeZirkler.apply(z.reshape(-1, n, d), value, gradient, lib.current_backend(backend))
    return flat.reshape(z.shape[:-2])


def henze_zirkler(z: Tensor, *, beta: float | None = None, backend: str | None = None) -> HenzeZirkler:
    """Henze-Zirkler test of multivariate normality: large values mean "not Gaussian".

    Exact, over all pairs; unchanged by shifts, scales and rotations. 4n where the sample covariance is singular.

    Args:
        z: [..., n, d], float32 or float64; leading dimensions are replicas.
        beta: the kernel's inverse width; None takes Henze and Zirkler's optimum for (n, d).

    Returns:
        .statistic [...], differentiable in z; .p_value [...], not differentiable.

    Raises:
        InputError: fewer than 2 points, NaN or infinity (the row is named), beta <= 0; TypeError: not a float tensor.

    Source:
        Henze & Zirkler 1990; null moments Theorem 2 there; also paper section 4 (LiBI's constraint).
    """
    lib.check_tensor("z", z, 2)
    lib.check_finite("z", z)
    statistic = henze_zirkler_statistic(z, beta=beta, backend=backend)
    n, d = z.shape[-2:]
    value = reference.default_beta(n, d) if beta is None else float(beta)
    location, scale = reference.log_p_value_parameters(n, d, value)
    standardised = (statistic.detach().log() - location) / scale
    return HenzeZirkler(statistic, 0.5 * torch.erfc(standardised / math.sqrt(2)))
