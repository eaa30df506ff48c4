"""The smooth k-nearest-neighbour two-sample statistic, differentiable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels.smooth_knn import reference
from libi_fast.ops import _library as lib


def _vmap(info: Any, in_dims: tuple[Any, ...], a: Tensor, b: Tensor, *rest: Any):
    """The mapped dimension joins the repetitions."""
    moved_a, moved_b = (lib.leading(t, d, info.batch_size) for t, d in zip((a, b), in_dims, strict=False))
    results = _forward(moved_a.flatten(0, 1), moved_b.flatten(0, 1), *rest)
    return tuple(r.unflatten(0, moved_a.shape[:2]) for r in results), (0, 0, 0)


def _fake(a: Tensor, b: Tensor, k: int, alphas: Sequence[float], gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    to_a, to_b = (t.new_empty((t.shape[0], t.shape[1] * gradient, t.shape[2])) for t in (a, b))
    return a.new_empty(a.shape[:1]), to_a, to_b


def _native(a: Tensor, b: Tensor, k: int, alphas: Sequence[float], gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The value alone; where the gradient is wanted too, the reference gives both."""
    if gradient:
        return reference.forward(a, b, k, alphas, gradient)
    value = native.smooth_knn(torch.cat((a, b), 1), a.shape[1], k, alphas)
    return value, *(t.new_empty((t.shape[0], 0, t.shape[2])) for t in (a, b))  # type: ignore[return-value]


def _triton(a: Tensor, b: Tensor, k: int, alphas: Sequence[float], gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `_native`."""
    if gradient:
        return reference.forward(a, b, k, alphas, gradient)
    from libi_fast.kernels.smooth_knn import gpu

    return gpu.forward(a, b, k, alphas), *(t.new_empty((t.shape[0], 0, t.shape[2])) for t in (a, b))  # type: ignore[return-value]


def _triton_limit(a: Tensor, b: Tensor, k: int, alphas: Sequence[float], gradient: bool) -> str | None:
    from libi_fast.kernels.smooth_knn import gpu

    return None if gradient else gpu.refusal(a.shape[1], b.shape[1], a.shape[2], k)


_forward: Any = lib.define(
    "smooth_knn",
    "(Tensor a, Tensor b, SymInt k, float[] alphas, bool gradient, str backend) -> (Tensor, Tensor, Tensor)",
    {"reference": reference.forward, "cpu": _native, "triton": _triton},
    _fake,
    _vmap,
    limits={"triton": _triton_limit},
)


class _SmoothKNN(torch.autograd.Function):
    """The gradient comes with the value, as it needs the same distances and probabilities."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, k: int, alphas: Sequence[float], gradient: bool, backend: str):
        return _forward(a, b, k, alphas, gradient, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:2], *output[1:])
        ctx.rest = inputs[2:]

    @staticmethod
    @lib.once_differentiable("smooth_knn")
    def backward(ctx: Any, grad: Tensor, *ignored: Any):
        a, b, to_a, to_b = ctx.saved_tensors
        k, alphas, gradient, backend = ctx.rest
        if not gradient:  # vmap inside grad hides that one is wanted
            _, to_a, to_b = _forward(a, b, k, alphas, True, backend)
        to_a, to_b = grad[:, None, None] * to_a, grad[:, None, None] * to_b
        return to_a, to_b, None, None, None, None


def smooth_knn(
    a: Tensor, b: Tensor, k: int = 10, alphas: float | Sequence[float] = 1.0, *, backend: str | None = None
) -> Tensor:
    """Smooth k-nearest-neighbour two-sample statistic: large values mean "two distributions".

    Each of the pooled points picks k others, a set whose distances sum to D with probability proportional to exp(-alpha D). The
    statistic is the expected number of picks from the other sample, standardised over all assignments of the labels, its sign
    turned: mean 0 and variance 1 where a and b have one distribution. A large alpha comes close to counting the k nearest.

    Computed in float64; the kernels, which give values without gradients, take float32 where that moves a result by some 1e-6
    at most. Memory: some ten numbers a pair of points of one repetition, and a block of repetitions at a time; the compiled
    kernel, one or two numbers a pair for each thread. The Triton kernel takes up to 1024 points of both samples together, 8
    dimensions, and k up to 16 (or as near to n1 + n2 - 1) in a workspace of at most 268 MB; the reference serves beyond.

    Args:
        a: [..., n1, d] and
        b: [..., n2, d], both float32 or both float64; leading dimensions (repetitions) are equal or broadcast. Not scaled:
            alpha is measured against their units.
        k: how many neighbours each point picks, 1 .. n1 + n2 - 1.
        alphas: inverse lengths, one or several; the probabilities of the picks are averaged over them.

    Returns:
        [...], differentiable once in a and b.

    Raises:
        InputError: fewer than 2 points in a sample, dimensions that differ, k or alphas out of range, NaN or infinity (the row
            is named).
        TypeError: not float tensors of one dtype, k not an integer, alphas not numbers.

    Source:
        Djolonga & Krause 2017, arXiv 1709.01006; the paper's S-kNN is its mean over repetitions.
    """
    flat_a, flat_b, batch = paired_samples(a, b, least=2)
    _check_k(k, a.shape[-2] + b.shape[-2] - 1)
    chosen = _check_alphas(alphas)
    gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    value, _, _ = _SmoothKNN.apply(flat_a, flat_b, k, chosen, gradient, lib.current_backend(backend))
    return value.reshape(batch)


def paired_samples(a: Tensor, b: Tensor, least: int) -> tuple[Tensor, Tensor, torch.Size]:
    """Checks a [..., n1, d] and b [..., n2, d], and gives them as [R, n1, d] and [R, n2, d] with their leading shape [...]."""
    for name, value in (("a", a), ("b", b)):
        lib.check_tensor(name, value, 2)
        if value.shape[-2] < least or value.shape[-1] < 1:
            expected = f"at least {least} point{'s' * (least > 1)} of at least 1 dimension"
            raise InputError(f"{name} must hold {expected}, got shape {tuple(value.shape)}")
    lib.check_like("b", b, "a", a)
    if a.shape[-1] != b.shape[-1]:
        raise InputError(f"a has points of {a.shape[-1]} dimensions but b of {b.shape[-1]}; they must agree")
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise InputError(f"leading dimensions do not broadcast: a has {tuple(a.shape)}, b has {tuple(b.shape)}") from None
    for name, value in (("a", a), ("b", b)):
        lib.check_finite(name, value)
    flat_a, flat_b = (t.expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (a, b))
    return flat_a, flat_b, batch


def _check_k(k: int, most: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise TypeError(f"k must be an integer, got {type(k).__name__}")
    if not 1 <= k <= most:
        raise InputError(f"k must lie in 1 .. {most} (all points but one), got {k}")


def _check_alphas(alphas: float | Sequence[float]) -> list[float]:
    if isinstance(alphas, str | bytes):  # a sequence, whose letters may be digits
        raise TypeError(f"alphas must be a number or a sequence of numbers, got {alphas!r}")
    try:
        chosen = [float(alphas)] if isinstance(alphas, int | float) else [float(alpha) for alpha in alphas]
    except (TypeError, ValueError):
        raise TypeError(f"alphas must be a number or a sequence of numbers, got {alphas!r}") from None
    if not chosen or not all(math.isfinite(alpha) and alpha > 0 for alpha in chosen):
        raise InputError(f"alphas must be positive and finite, and at least one, got {alphas!r}")
    return chosen
