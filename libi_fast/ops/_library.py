"""What every operator shares: the torch.library namespace, the choice of backend, vmap rules and checks of arguments.

An operator here is a raw ``torch.ops.libi_fast`` op (schema, fake tensor, vmap rule) inside a ``torch.autograd.Function``.
That pair costs a few microseconds over the Function alone, where ``custom_op`` costs about twice as much, and it works under
``torch.func`` and ``torch.compile(fullgraph=True)``. Forward-mode derivatives raise NotImplementedError (torch's own message).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels import gpu

NAMESPACE = "libi_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
BACKENDS = ("reference", "cpu", "triton")
FLOATS = (torch.float32, torch.float64)

_requested = ""  # "" lets each operator take its fastest


def define(
    name: str,
    schema: str,
    implementations: dict[str, Callable[..., Any]],
    fake: Callable[..., Any],
    vmap: Callable[..., Any] | None = None,
    limits: dict[str, Callable[..., str | None]] | None = None,
) -> Any:
    """Register ``libi_fast::name``. The schema's last argument is ``str backend``, which picks the implementation.
    ``limits`` holds, for a backend that does not take everything, what says why it does not take these arguments."""

    def dispatch(*args: Any) -> Any:
        *arguments, backend = args
        return implementations[_choose(name, implementations, limits or {}, backend, arguments)](*arguments)

    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY)
    op = getattr(torch.ops.libi_fast, name).default
    torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap or _looped(op), lib=LIBRARY)
    return op


class _Once(torch.autograd.Function):
    """Identity on a gradient whose own gradient raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, name: str, *inputs: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{ctx.name} has no second derivative")


def once_differentiable(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For an autograd.Function's backward: a second derivative raises. PyTorch's own decorator gives silent zeros where the
    inputs but not the incoming gradient require one (a Hessian, a gradient penalty). Free in a plain backward pass."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *grads: Any) -> Any:
            with torch.no_grad():
                results = backward(ctx, *grads)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return results
            inputs = [t for t in (*grads, *ctx.saved_tensors) if isinstance(t, Tensor)]
            return tuple(_Once.apply(r, name, *inputs) if isinstance(r, Tensor) else r for r in results)

        return wrapper

    return decorate


def _choose(
    name: str,
    implementations: dict[str, Any],
    limits: dict[str, Callable[..., str | None]],
    backend: str,
    arguments: Sequence[Any],
) -> str:
    tensors = [t for a in arguments for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]

    on_cpu = all(t.device.type == "cpu" for t in tensors)

    def refusal(candidate: str) -> str | None:
        if candidate == "cpu" and not native.available():
            return f"the compiled library is missing: {native.why_unavailable()}"
        if candidate == "cpu" and not on_cpu:  # it would take the device's addresses for its own
            return f"it takes tensors on the CPU, got {', '.join(sorted({str(t.device) for t in tensors}))}"
        if candidate == "triton" and not gpu.serves(*tensors):
            found = ", ".join(sorted({str(t.device) for t in tensors}))
            return gpu.why_unavailable() or f"it takes tensors on one GPU, got {found}"
        return limits[candidate](*arguments) if candidate in limits else None

    if not backend:
        first = "triton" if tensors and all(t.is_cuda for t in tensors) else "cpu"
        serves = first in implementations and refusal(first) is None
        return first if serves else "reference"
    if backend not in implementations:
        raise InputError(f"{name} has no {backend!r} backend; it has {', '.join(map(repr, implementations))}")
    reason = refusal(backend)
    if reason is not None:
        raise InputError(f"backend {backend!r} was asked for {name}, but {reason}")
    return backend


def _looped(op: Any) -> Callable[..., Any]:
    """The vmap rule of an operator without a leading batch dimension to fold into: one call an element."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def pick(i: int) -> list[Any]:
            return [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]

        results = [op(*pick(i)) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])

    return rule


def leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The vmapped dimension in front; a tensor that is not vmapped is expanded."""
    return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def current_backend(backend: str | None = None) -> str:
    """The operator's ``backend`` argument: the caller's, else that of ``use_backend``, else '' (automatic)."""
    name = _requested if backend is None else backend
    if name and name not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the block every operator runs on ``backend`` ('reference', 'cpu' or 'triton'), for the whole process.

    Raises:
        InputError: an unknown name; an operator that lacks the backend raises it when it is called.
    """
    global _requested
    before, _requested = _requested, current_backend(backend)
    try:
        yield
    finally:
        _requested = before


# --- checks of arguments, before any kernel ---


def check_tensor(name: str, value: Any, least_dims: int = 0) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32 or float64, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a {'nested' if value.is_nested else value.layout} one")
    if value.dim() < least_dims:
        raise InputError(f"{name} must have at least {least_dims} dimensions, got shape {tuple(value.shape)}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name} is {value.dtype} but {other_name} is {other.dtype}; they must agree")
    if value.device != other.device:
        raise InputError(f"{name} is on {value.device} but {other_name} is on {other.device}; they must agree")


def check_index(name: str, value: int, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not 0 <= value < limit:
        raise InputError(f"{name} must lie in 0 .. {limit - 1}, got {value}")


def check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")


def check_positive(name: str, value: Any) -> None:
    try:
        good = math.isfinite(value) and value > 0
    except (TypeError, ValueError, RuntimeError):  # torch has its own for a tensor of several numbers
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not good:
        raise InputError(f"{name} must be positive and finite, got {value}")


def values_known(value: Tensor) -> bool:
    """Whether a check may look at the values: not while a compiler traces or a CUDA graph is captured, nor inside a torch.func
    transform, nor of a meta tensor, which has none."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_get_level(value) >= 0:
        return False
    return not value.is_meta and not capturing(value.device)


def capturing(device: torch.device) -> bool:
    """Whether work on ``device`` goes into a CUDA graph now, rather than running."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def check_finite(name: str, value: Tensor) -> None:
    """Name the first row that holds NaN or infinity. Skipped where values are unknown."""
    if not values_known(value):
        return
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        where = (~finite).nonzero()[0].tolist()
        place = f"row {where[-2] if len(where) > 1 else where[0]}" + (f", column {where[-1]}" if len(where) > 1 else "")
        raise InputError(f"{name} holds {value[tuple(where)].item()} at {place} (counted from 0)")
