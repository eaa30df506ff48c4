"""The exact Henze-Zirkler statistic, differentiable, and its p-value."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels.henze_zirkler import reference
from libi_fast.ops import _library as lib


def _folding(op: Any):
    """vmap: the mapped dimension joins the replicas."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any):
        *tensors, beta, backend = args
        moved = [lib.leading(t, d, info.batch_size) for t, d in zip(tensors, in_dims, strict=False)]
        result = op(*(t.flatten(0, 1) for t in moved), beta, backend)
        return result.unflatten(0, moved[0].shape[:2]), 0

    return rule


_forward: Any = lib.define(
    "henze_zirkler",
    "(Tensor z, float beta, str backend) -> Tensor",
    {"reference": reference.forward},
    lambda z, beta: z.new_empty(z.shape[:1]),
    _folding(lambda *args: _forward(*args)),
)
_backward: Any = lib.define(
    "henze_zirkler_backward",
    "(Tensor grad, Tensor z, float beta, str backend) -> Tensor",
    {"reference": reference.backward},
    lambda grad, z, beta: z.new_empty(z.shape),
    _folding(lambda *args: _backward(*args)),
)


class _HenzeZirkler(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, beta: float, backend: str) -> Tensor:
        return _forward(z, beta, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.beta, ctx.backend = inputs[1:]

    @staticmethod
    @lib.once_differentiable("henze_zirkler")
    def backward(ctx: Any, grad: Tensor):
        return _backward(grad, *ctx.saved_tensors, ctx.beta, ctx.backend), None, None


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
    flat = _HenzeZirkler.apply(z.reshape(-1, n, d), value, lib.current_backend(backend))
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
