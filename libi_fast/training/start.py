"""Where training begins: white codes, a decoder that fits them, a sensible spread of q."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from libi_fast.errors import InputError
from libi_fast.ops.henze_zirkler import whiten
from libi_fast.training.constraints import moment_errors
from libi_fast.training.replicas import Replicas, chosen

START_STDS = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001]


def last_linear(replicas: Replicas, prefix: str) -> tuple[str, str | None] | None:
    """Names of the weight and bias of the last Linear under ``prefix``."""
    found = [
        name for name, m in replicas.template.named_modules() if isinstance(m, nn.Linear) and f"{name}.".startswith(prefix)
    ]
    if not found:
        return None
    weight, bias = f"{found[-1]}.weight", f"{found[-1]}.bias"
    return weight, bias if bias in replicas.parameters else None


@torch.no_grad()
def whiten_codes(replicas: Replicas, prefix: str, x: Tensor) -> None:
    """Rescale the encoder's last Linear so that the codes of x have mean 0 and covariance I; replicas where that last layer
    does not produce the codes linearly, or whose codes are singular, stay as they are."""
    names = last_linear(replicas, prefix)
    if names is None:
        return
    z = replicas.codes(x)
    latent_dim = z.shape[-1]
    _, factor, singular = whiten(z)
    before = replicas.snapshot()
    usable = (~singular).view(-1, 1, 1)
    inverse = torch.linalg.inv(torch.where(usable, factor, torch.eye(latent_dim, dtype=z.dtype, device=z.device)))
    weight, bias = replicas.parameters[names[0]], replicas.parameters[names[1]] if names[1] else None
    weight[:, :latent_dim] = inverse @ weight[:, :latent_dim]
    if bias is not None:
        centre = torch.where(usable[..., 0], z.mean(-2), torch.zeros_like(z.mean(-2)))
        bias[:, :latent_dim] = (inverse @ (bias[:, :latent_dim] - centre)[..., None])[..., 0]
    off_mean, off_covariance = moment_errors(replicas.codes(x))
    worked = (off_covariance < 0.01) & ((off_mean < 0.01) if bias is not None else torch.isfinite(off_mean))
    replicas.restore(chosen(worked, replicas.snapshot(), before))


@torch.no_grad()
def mirror_codes(replicas: Replicas, prefix: str, group: int) -> None:
    """Negate the first code of every second replica of each group (where the encoder's last layer is a Linear)."""
    names = last_linear(replicas, prefix)
    odd = torch.arange(replicas.count) % group % 2 == 1
    for name in names or ():
        if name is not None:
            replicas.parameters[name][odd, 0] *= -1


@torch.no_grad()
def start_std(replicas: Replicas, objective: Callable[[], Tensor], initial_std: float | None = None) -> None:
    """Set q's log standard deviation to one number: the one given, or each replica's best of a grid by ``objective`` [R]."""
    names = last_linear(replicas, "inference.")
    if names is None or names[1] is None:
        return
    weight, bias = replicas.parameters[names[0]], replicas.parameters[names[1]]
    latent_dim = replicas.template.model.latent_dim
    if bias.shape[1] != 2 * latent_dim:
        return
    weight[:, latent_dim:] = 0
    best = torch.full((replicas.count,), math.inf, dtype=bias.dtype, device=bias.device)
    value = torch.full_like(best, math.log(initial_std or 0.05))
    for std in START_STDS if initial_std is None else ():
        bias[:, latent_dim:] = math.log(std)
        now = objective()
        better = now < best
        best, value = torch.where(better, now, best), torch.where(better, math.log(std), value)
    bias[:, latent_dim:] = value[:, None]


@torch.no_grad()
def copy_encoder(replicas: Replicas, latent_dim: int) -> None:
    """Start the inference network from the encoder: the same layers, the last one's L rows as the mean.

    Raises:
        InputError: the two architectures differ.
    """
    template = replicas.template
    assert template.encoder is not None
    source = [f"encoder.{n}" for n, _ in template.encoder.named_parameters()]
    target = [f"inference.network.{n}" for n, _ in template.inference.network.named_parameters()]
    mismatch = InputError(
        "the encoder and the inference network must share their architecture up to the last layer's width; "
        "leave encoder=None to use the mean of q"
    )
    if len(source) != len(target):
        raise mismatch
    for a, b in zip(source, target, strict=True):
        new, old = replicas.parameters[a], replicas.parameters[b]
        if new.shape == old.shape:
            old.copy_(new)
        elif new.shape[2:] == old.shape[2:] and new.shape[1] == latent_dim and old.shape[1] == 2 * latent_dim:
            old[:, :latent_dim] = new
        else:
            raise mismatch
