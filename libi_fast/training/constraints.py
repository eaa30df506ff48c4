"""LiBI's constraints on the codes of step 1, as penalties that cannot overflow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LINEAR_FROM = 8.0


def safe_exp(exponent: Tensor) -> Tensor:
    """exp up to exponent 8, its tangent beyond: exp(u / 0.2) overflows float32 at u = 17.7, which bad starts reach."""
    capped = exponent.clamp_max(LINEAR_FROM).exp()
    return capped + math.exp(LINEAR_FROM) * (exponent - LINEAR_FROM).clamp_min(0)


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., L] and covariance [..., L, L] (divisor n) of codes z [..., n, L]."""
    mean = z.mean(-2)
    centred = z - mean[..., None, :]
    return mean, centred.mT @ centred / z.shape[-2]


def moment_errors(z: Tensor) -> tuple[Tensor, Tensor]:
    """||mean||^2 and ||Cov - I||_F^2 of codes z [..., n, L]."""
    mean, covariance = moments(z)
    identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return mean.square().sum(-1), (covariance - identity).square().sum((-2, -1))
