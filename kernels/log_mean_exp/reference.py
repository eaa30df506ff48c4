"""log_mean_exp(x)_r = log (1/S) sum_s exp x_rs and its gradient, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(x: Tensor) -> Tensor:
    """[..., S] -> [...]."""
    return torch.logsumexp(x, -1) - math.log(x.shape[-1])


def backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """grad [...] times the softmax of x [..., S]; rows whose maximum is infinite share it as torch.softmax's limit does not
    exist there: zero for all -inf, equal shares among the +inf."""
    infinite = torch.isinf(out)[..., None]
    shares = (x == float("inf")).to(x.dtype)
    limit = shares / shares.sum(-1, keepdim=True).clamp_min(1)
    share = torch.where(infinite, limit, (x - out[..., None]).exp() / x.shape[-1])
    return grad[..., None] * share
