"""Random importance-weighted problems, solved by the fused kernels and by the reference, and the comparison of both."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from libi_fast.kernels import cpu
from libi_fast.kernels.importance import reference
from libi_fast.kernels.importance.reference import Decoder, Draws, reference_normal
from libi_fast.kernels.random import reference as random


class Problem(NamedTuple):
    """The arguments of one call, on the CPU in float32."""

    x: Tensor
    mean: Tensor
    log_scale: Tensor
    decoder: Decoder
    grad: Tensor  # of what follows, to the log-likelihood
    replicas: Tensor
    num_samples: int
    kind: str = "reparameterized"
    tail: int = 0
    precision: str = "ieee"
    wanted: tuple[bool, bool, bool] = (True, True, True)  # x, variance, parameters
    first_row: int = 7

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Problem:
        return self._replace(**{name: _moved(getattr(self, name), device, dtype) for name in self._fields})

    def draws(self) -> Draws:
        seed = torch.tensor(2**62 + 12345, device=self.x.device)
        return Draws(seed, self.replicas, self.first_row, 2, 5, reference_normal)

    def rows(self, rows: slice) -> Problem:
        """These rows alone, with the draws that they have among all."""
        parts = {name: getattr(self, name)[:, rows].contiguous() for name in ("x", "mean", "log_scale", "grad")}
        return self._replace(**parts, first_row=self.first_row + rows.start)


def _moved(value: Any, device: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Decoder):
        return Decoder(*(_moved(v, device, dtype) for v in value))
    return [_moved(v, device, dtype) for v in value] if isinstance(value, list) else value


def problem(
    widths: list[int], activation: str = "tanh", likelihood: str = "gaussian", *, output: str = "identity", rows: int = 3,
    num_samples: int = 20, replicas: int = 1, own: int = 1, diagonal: bool = True, bias: bool = True, **settings: Any,
) -> Problem:  # fmt: skip
    """``widths`` from latents to outputs; parameters for ``own`` replicas, ``own`` = 1 shared by all."""
    pairs = list(itertools.pairwise(widths))
    latent_dim, outputs = widths[0], widths[-1]
    decoder = Decoder(
        [torch.randn(own, out, into) / into**0.5 for into, out in pairs],
        [0.3 * torch.randn(own, out) if bias else None for _, out in pairs],
        [activation] * (len(pairs) - 1) + [output],
        likelihood,
        torch.rand(own, outputs if diagonal else 1) + 0.3 if likelihood == "gaussian" else torch.empty(1, 0),
    )
    return Problem(
        torch.rand(replicas, rows, outputs), 0.5 * torch.randn(replicas, rows, latent_dim),
        0.3 * torch.randn(replicas, rows, latent_dim) - 0.5, decoder, torch.randn(replicas, rows), torch.arange(replicas) + 3,
        num_samples, **settings,
    )  # fmt: skip


# --- solutions: every result of forward and backward under its name ---


def _named(forward: Any, backward: Any) -> dict[str, Tensor]:
    names = ("log_likelihood", "effective_sample_size", "top", "to_x", "to_mean", "to_log_scale")
    to_x, to_mean, to_scale, to_weights, to_biases, to_variance = backward
    found = dict(zip(names, (*forward, to_x, to_mean, to_scale), strict=True))
    for i, (weight, bias) in enumerate(zip(to_weights, to_biases, strict=True)):
        found[f"to_weight_{i}"], found[f"to_bias_{i}"] = weight, bias
    return {**found, "to_variance": to_variance}


def fused(p: Problem, device: torch.device) -> dict[str, Tensor]:
    from libi_fast.kernels.importance import gpu

    p = p.to(device, torch.float32)
    arguments = (p.x, p.mean, p.log_scale, p.decoder, p.draws(), p.num_samples)
    forward = gpu.forward(*arguments, p.tail, p.precision)
    return _named(forward, gpu.backward(p.grad, forward[0], *arguments, p.kind, p.precision, list(p.wanted)))


def native(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    p = p.to("cpu", dtype)
    arguments = (p.x, p.mean, p.log_scale, p.decoder, p.draws(), p.num_samples)
    forward = cpu.importance(*arguments, p.tail)
    return _named(forward, cpu.importance_backward(p.grad, forward[0], *arguments, p.kind, list(p.wanted)))


def exact(p: Problem, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    p = p.to("cpu", dtype)
    arguments = (p.x, p.mean, p.log_scale, p.decoder, p.draws(), p.num_samples)
    forward = reference.forward(*arguments, p.tail, 4096)
    return _named(forward, reference.backward(p.grad, forward[0], *arguments, p.kind, 4096))


def check(p: Problem, device: torch.device, times: float = 8.0, floor: float = 4e-6) -> dict[str, Tensor]:
    """The Triton kernels on ``device``: ``compare`` has the measure."""
    return compare(p, fused(p, device), times, floor)


def compare(p: Problem, found: dict[str, Tensor], times: float, floor: float) -> dict[str, Tensor]:
    """The error against float64 is at most ``times`` that of the reference in float32, plus ``floor`` of the result's largest
    value (a few dozen roundings of float32)."""
    truth, rounded = exact(p), exact(p, torch.float32)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name].shape == value.shape, name
        if not value.numel():
            continue
        error = (found[name].cpu().double() - value).abs().max()
        allowed = times * (rounded[name].double() - value).abs().max() + floor * value.abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    return found


# --- sampling importance resampling ---

RESAMPLED = ("log_likelihood", "effective_sample_size", "top", "mean", "covariance", "z", "log_density")
RESAMPLING_STREAM = 1


def resampling_uniforms(p: Problem, count: int, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    draws = p.draws()

    def uniforms(rows: slice) -> Tensor:
        first, many = draws.first_row + rows.start, rows.stop - rows.start
        return random.draws(
            random.to_uniform, draws.seed, draws.replicas, first, many, 0, count, draws.repetition, RESAMPLING_STREAM, dtype
        )  # fmt: skip

    return uniforms


def resampled_exactly(p: Problem, count: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    p = p.to("cpu", dtype)
    uniforms = resampling_uniforms(p, count, dtype)
    results = reference.forward_and_resample(p.x, p.mean, p.log_scale, p.decoder, p.draws(), p.num_samples, p.tail, uniforms)
    return dict(zip(RESAMPLED, results, strict=True))
