"""The Henze-Zirkler statistic, differentiable, and its p-value: exact over all pairs, or at a cost linear in the points."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels.henze_zirkler import characteristic, reference
from libi_fast.kernels.henze_zirkler.reference import default_beta, whiten
from libi_fast.ops import _library as lib
from libi_fast.ops.random import Stream, philox_normal

METHODS = ("exact", "quadrature", "random", "sliced")
LARGEST_QUADRATURE = 3  # dimensions


def _vmap(op: Callable[[], Any]) -> Callable[..., Any]:
    """The mapped dimension joins the replicas."""

    def rule(info: Any, in_dims: tuple[Any, ...], z: Tensor, *rest: Any):
        if any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError("henze_zirkler has one seed for all replicas: it cannot be mapped over")
        moved = lib.leading(z, in_dims[0], info.batch_size)
        results = op()(moved.flatten(0, 1), *rest)
        return tuple(r.unflatten(0, moved.shape[:2]) for r in results), (0, 0)

    return rule


def _shapes(z: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape[:1]), z.new_empty((z.shape[0], z.shape[1] * gradient, z.shape[2]))


def _triton(z: Tensor, beta: float, gradient: bool) -> tuple[Tensor, Tensor]:
    from libi_fast.kernels.henze_zirkler import gpu

    return gpu.forward(z, beta, gradient)


def _refusal(z: Tensor, beta: float, gradient: bool) -> str | None:
    from libi_fast.kernels.henze_zirkler import gpu

    return gpu.refusal(z)


def _triton_characteristic(z: Tensor, vectors: Tensor, beta: float, method: str, gradient: bool) -> tuple[Tensor, Tensor]:
    from libi_fast.kernels.henze_zirkler import gpu_characteristic

    return gpu_characteristic.forward(z, vectors, beta, method, gradient)


def _refusal_characteristic(z: Tensor, vectors: Tensor, beta: float, method: str, gradient: bool) -> str | None:
    from libi_fast.kernels.henze_zirkler import gpu_characteristic

    return gpu_characteristic.refusal(z, beta, method)


_forward: Any = lib.define(
    "henze_zirkler",
    "(Tensor z, float beta, bool gradient, str backend) -> (Tensor, Tensor)",
    {
        "reference": reference.forward,
        "cpu": native.henze_zirkler,
        "triton": _triton,
    },
    lambda z, beta, gradient: _shapes(z, gradient),
    _vmap(lambda: _forward),
    limits={"triton": _refusal},
)

_characteristic: Any = lib.define(
    "henze_zirkler_characteristic",
    "(Tensor z, Tensor vectors, float beta, str method, bool gradient, str backend) -> (Tensor, Tensor)",
    {
        "reference": characteristic.forward,
        "cpu": native.henze_zirkler_characteristic,
        "triton": _triton_characteristic,
    },
    lambda z, vectors, beta, method, gradient: _shapes(z, gradient),
    _vmap(lambda: _characteristic),
    limits={"triton": _refusal_characteristic},
)


__all__ = ["HenzeZirkler", "default_beta", "henze_zirkler", "henze_zirkler_statistic", "whiten"]

Reduce = Callable[[Tensor], Tensor]


class _Setting(NamedTuple):
    """What the statistic is taken with: vectors [m, d] are frequencies or directions; total counts all processes' rows."""

    method: str
    beta: float
    vectors: Tensor | None
    total: int


class _HenzeZirkler(torch.autograd.Function):
    """The gradient comes with the value: it shares the whitening, and its sums over pairs cost little beside the pairs'
    exponentials."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, vectors: Tensor | None, beta: float, method: str, gradient: bool, backend: str, total: int,
        reduce: Reduce | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if vectors is None:
            return _forward(z, beta, gradient, backend)
        if reduce is None:
            return _characteristic(z, vectors, beta, method, gradient, backend)
        return characteristic.forward(z, vectors, beta, method, gradient, total=total, reduce=reduce)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])  # z only so that a second derivative is noticed, and raises
        ctx.reduce = inputs[-1]

    @staticmethod
    @lib.once_differentiable("henze_zirkler")
    def backward(ctx: Any, grad: Tensor, ignored: Any):
        _, gradient = ctx.saved_tensors
        if ctx.reduce is not None:  # every process has the statistic, and its own use of it
            grad = ctx.reduce(grad)
        return grad[:, None, None] * gradient, None, None, None, None, None, None, None


class HenzeZirkler(NamedTuple):
    """statistic [...] and p_value [...] (survival of the moment-matched lognormal)."""

    statistic: Tensor
    p_value: Tensor


def _count(name: str, value: int) -> None:
    lib.check_index(name, value, 2**32)
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")


def _setting(
    z: Tensor, method: str, beta: float | None, num_frequencies: int, num_slices: int, seed: int | Tensor | None,
    reduce: Reduce | None,
) -> _Setting:  # fmt: skip
    lib.check_tensor("z", z, 2)
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if reduce is not None and not callable(reduce):
        raise TypeError(f"reduce must be a function of a tensor, got {type(reduce).__name__}")
    if reduce is not None and method != "random":
        raise InputError(f"rows spread over processes (reduce) need method 'random', got {method!r}")
    _count("num_frequencies", num_frequencies)
    _count("num_slices", num_slices)
    rows, d = z.shape[-2:]
    n = rows if reduce is None else int(reduce(torch.tensor(rows, device=z.device)))
    if n < 2 or d < 1:
        raise InputError(f"z must hold at least 2 points of at least 1 dimension, got shape {tuple(z.shape)}")
    if beta is not None:
        lib.check_positive("beta", beta)
        if not 1e-10 <= beta <= 1e10:  # so that its powers and its points' phases are numbers
            raise InputError(f"beta must lie in 1e-10 .. 1e10, got {beta}")
    value = reference.default_beta(n, 1 if method == "sliced" else d) if beta is None else float(beta)
    if method == "exact":
        return _Setting(method, value, None, n)
    if method == "quadrature":
        if d > LARGEST_QUADRATURE:
            raise InputError(
                f"quadrature serves at most {LARGEST_QUADRATURE} dimensions, got {d}; 'random' and 'sliced' serve more"
            )
        vectors = torch.empty((0, d), dtype=z.dtype, device=z.device)  # not of z, which may be vmapped
    elif method == "random":
        vectors = value * _draws(seed, num_frequencies, z, 0)
    else:
        vectors = torch.nn.functional.normalize(_draws(seed, num_slices, z, 1), dim=-1)
    if method != "random" and lib.capturing(z.device):
        raise InputError(f"{method!r} looks at the data to choose its nodes, which a CUDA graph cannot; see 'exact', 'random'")
    return _Setting(method, value, vectors, n)


def _draws(seed: int | Tensor | None, count: int, z: Tensor, repetition: int) -> Tensor:
    return philox_normal(
        seed, count, z.shape[-1], repetition=repetition, stream=Stream.FREQUENCIES, dtype=z.dtype, device=z.device
    )


def _statistic(z: Tensor, setting: _Setting, reduce: Reduce | None, backend: str | None) -> Tensor:
    # Within torch.func transforms a tensor does not say whether it requires a gradient.
    gradient = torch.is_grad_enabled() and (z.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(z))
    flat, _ = _HenzeZirkler.apply(
        z.reshape(-1, *z.shape[-2:]), setting.vectors, setting.beta, setting.method, gradient, lib.current_backend(backend),
        setting.total, reduce,
    )  # fmt: skip
    return flat.reshape(z.shape[:-2])


def _null_parameters(setting: _Setting, z: Tensor) -> tuple[Tensor, Tensor]:
    """Log-mean and log-standard deviation of the statistic under normality, given its frequencies or directions."""
    method, beta, vectors, total = setting
    if method == "random" and vectors is not None:
        mean, variance = characteristic.null_of_draws(vectors)
    elif method == "sliced" and vectors is not None:
        mean, variance = characteristic.null_of_slices(vectors, total, beta)
    else:
        moments = reference.null_distribution(total, z.shape[-1], beta)
        mean, variance = (torch.tensor(m, dtype=torch.float64, device=z.device) for m in moments)
    location, scale = reference.lognormal_parameters(mean, variance)
    return location.to(z.dtype), scale.to(z.dtype)


def null_quantile(
    z: Tensor, level: float, *, method: str = "exact", beta: float | None = None, num_frequencies: int = 1024,
    num_slices: int = 64, seed: int | Tensor | None = 0,
) -> Tensor:  # fmt: skip
    """What the statistic of points like z [n, d] (size, dtype and device count) stays below with probability ``level`` under
    normality, []: the lognormal's, so that p_value = 1 - level there. Arguments and errors as in :func:`henze_zirkler`."""
    location, scale = _null_parameters(_setting(z, method, beta, num_frequencies, num_slices, seed, None), z)
    return (location + scale * math.sqrt(2) * torch.erfinv(torch.full_like(scale, 2 * level - 1))).exp()


def henze_zirkler_statistic(
    z: Tensor, *, method: str = "exact", beta: float | None = None, num_frequencies: int = 1024, num_slices: int = 64,
    seed: int | Tensor | None = 0, reduce: Reduce | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The statistic alone, [...] for z [..., n, d], without a look at the values: for training loops.

    Arguments and errors as in :func:`henze_zirkler`.
    """
    setting = _setting(z, method, beta, num_frequencies, num_slices, seed, reduce)
    return _statistic(z, setting, reduce, backend)


def henze_zirkler(
    z: Tensor, *, method: str = "exact", beta: float | None = None, num_frequencies: int = 1024, num_slices: int = 64,
    seed: int | Tensor | None = 0, reduce: Reduce | None = None, backend: str | None = None,
) -> HenzeZirkler:  # fmt: skip
    """Henze-Zirkler test of multivariate normality: large values mean "not Gaussian".

    4n where the sample covariance is singular. With phi_n the characteristic function of the n whitened points, the statistic
    is n E |phi_n(t) - exp(-|t|^2/2)|^2 over t ~ N(0, beta^2 I). The methods:

    - ``exact``: over all pairs, n^2 exponentials; unchanged by shifts, scales and rotations.
    - ``quadrature``: the same number, to 1e-6 (float64: 1e-9), at a cost linear in n; d <= 3. Nodes a dimension grow with the
      whitened points' range (32 for 500 normal ones); past 2^22 numbers a replica (d = 3 with far outliers) it is ``exact``.
    - ``random``: the mean over ``num_frequencies`` draws of t, without bias over seeds; cost n num_frequencies d.
    - ``sliced``: the mean over ``num_slices`` random directions of the univariate statistic of the whitened points projected
      on them, by quadrature. For d above about 30, where the full statistic is 1 to many digits whatever the points, and its
      gradient vanishes. A projection holds 1/d of any one direction: to see a single one that is not normal takes many slices
      and a small beta (1024 and 0.2 for d = 64), or ``exact`` with a small beta (0.1).

    ``random`` and ``sliced`` are unchanged by shifts and scales; a rotation acts as another seed would. All replicas share
    their draws. vmap over z and torch.compile(fullgraph=True) work without ``reduce``; second derivatives raise
    NotImplementedError.

    Args:
        z: [..., n, d], float32 or float64; leading dimensions are replicas.
        method: one of those above.
        beta: the kernel's inverse width; None takes Henze and Zirkler's optimum for (n, d), for ``sliced`` that for (n, 1).
        num_frequencies, num_slices: draws for ``random`` and ``sliced``.
        seed: of those draws, 0 .. 2^64 - 1, an int64 tensor [], or None for one number from torch's default generator.
        reduce: for ``random`` with rows spread over processes: a function that sums a tensor over processes, such as
            ``libi_fast.training.distributed.sum_over_processes``. Every process gets the statistic of all rows, and the
            gradient in its own; 2 d + d^2 + 2 num_frequencies numbers a replica are summed, d + d^2 more for a gradient.
            Every process passes the same arguments and seed, and all or none take the gradient.

    Returns:
        .statistic [...], differentiable in z; .p_value [...], not differentiable. The null moments are Theorem 2's for
        ``exact`` and ``quadrature``; for ``random`` and ``sliced`` those given the draws, so that the draws' own error is
        accounted for (work of num_frequencies^2 or num_slices^2).

    Raises:
        InputError: fewer than 2 points, NaN or infinity (the row is named), beta outside 1e-10 .. 1e10, an unknown method,
            counts below 1, ``quadrature`` with d > 3, ``reduce`` with another method than ``random``, a CUDA graph's capture of
            ``quadrature`` or ``sliced``, whose nodes depend on the data.
        TypeError: not a float tensor, counts that are not integers, a ``reduce`` that is no function.

    Source:
        Henze & Zirkler 1990; null moments Theorem 2 there; also paper section 4 (LiBI's constraint).
    """
    lib.check_tensor("z", z, 2)
    lib.check_finite("z", z)
    setting = _setting(z, method, beta, num_frequencies, num_slices, seed, reduce)
    statistic = _statistic(z, setting, reduce, backend)
    location, scale = _null_parameters(setting, z)
    standardised = (statistic.detach().log() - location) / scale
    return HenzeZirkler(statistic, 0.5 * torch.erfc(standardised / math.sqrt(2)))
