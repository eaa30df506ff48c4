"""log_mean_exp over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels.log_mean_exp import reference
from libi_fast.ops import _library as lib


def _vmap(op: Any):
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any):
        *tensors, backend = args
        moved = [lib.leading(t, d, info.batch_size) for t, d in zip(tensors, in_dims, strict=False)]
        return op(*moved, backend), 0

    return rule


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _native_forward(x: Tensor) -> Tensor:
    return native.log_mean_exp(_rows(x)).reshape(x.shape[:-1])


def _native_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    flat = native.log_mean_exp_backward(grad.reshape(-1).contiguous(), _rows(x), out.reshape(-1).contiguous())
    return flat.reshape(x.shape)


def _triton_forward(x: Tensor) -> Tensor:
    from libi_fast.kernels.log_mean_exp import gpu

    return gpu.forward(x)


def _triton_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    from libi_fast.kernels.log_mean_exp import gpu

    return gpu.backward(grad, x, out)


def _float32_only(*tensors: Tensor) -> str | None:
    return None if tensors[0].dtype == torch.float32 else f"it computes in float32, got {tensors[0].dtype}"


_forward: Any = lib.define(
    "log_mean_exp",
    "(Tensor log_weights, str backend) -> Tensor",
    {"reference": reference.forward, "cpu": _native_forward, "triton": _triton_forward},
    lambda x: x.new_empty(x.shape[:-1]),
    _vmap(lambda *args: _forward(*args)),
    limits={"triton": _float32_only},
)
_backward: Any = lib.define(
    "log_mean_exp_backward",
    "(Tensor grad, Tensor log_weights, Tensor out, str backend) -> Tensor",
    {"reference": reference.backward, "cpu": _native_backward, "triton": _triton_backward},
    lambda grad, x, out: x.new_empty(x.shape),
    _vmap(lambda *args: _backward(*args)),
    limits={"triton": _float32_only},
)


class _LogMeanExp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(log_weights: Tensor, backend: str) -> Tensor:
        return _forward(log_weights, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.backend = inputs[1]

    @staticmethod
    @lib.once_differentiable("log_mean_exp")
    def backward(ctx: Any, grad: Tensor):
        return _backward(grad, *ctx.saved_tensors, ctx.backend), None


def log_mean_exp(log_weights: Tensor, *, backend: str | None = None) -> Tensor:
    """log (1/S) sum_s exp(log_weights[..., s]).

    Args:
        log_weights: [..., S], float32 or float64, any strides; -inf is a weight of zero, a NaN makes its row NaN.

    Returns:
        [...]: -inf where every weight is zero, inf where one is infinite.

    Raises:
        InputError: S = 0 or no dimension; TypeError: not a float tensor.
    """
    lib.check_tensor("log_weights", log_weights, 1)
    if log_weights.shape[-1] == 0:
        raise InputError(f"log_weights has no samples: shape {tuple(log_weights.shape)}")
    return _LogMeanExp.apply(log_weights, lib.current_backend(backend))
