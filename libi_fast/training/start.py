"""Where training begins: white codes, a decoder that fits them, a sensible spread of q."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from libi_fast.errors import InputError
from libi_fast.ops.henze_zirkler import whiten
from libi_fast.ops.random import Stream, philox_normal
from libi_fast.ops.training import moment_errors
from libi_fast.training.replicas import Replicas, chosen

START_STDS = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001]
UNUSED = -1000.0  # log weight of a component whose weight is 0 in either precision


def last_linear(replicas: Replicas, prefix: str) -> tuple[str, str | None] | None:
    """Names of the weight and bias of the last Linear under ``prefix``, where it is wide enough to give the codes."""
    found = [
        name for name, m in replicas.template.named_modules() if isinstance(m, nn.Linear) and f"{name}.".startswith(prefix)
    ]
    if not found:
        return None
    weight, bias = f"{found[-1]}.weight", f"{found[-1]}.bias"
    if replicas.parameters[weight].shape[1] <= int(code_places(replicas, prefix).max()):
        return None
    return weight, bias if bias in replicas.parameters else None


def code_places(replicas: Replicas, prefix: str) -> Tensor:
    """Which values of the network under ``prefix`` are codes: those of each component, [K, L]."""
    latent_dim = replicas.template.model.latent_dim
    return torch.arange(latent_dim)[None] if prefix == "encoder." else replicas.template.inference.places(latent_dim)[0]


@torch.no_grad()
def use_one_component(replicas: Replicas) -> None:
    """Give the first component of a mixture all the weight, so that codes, its mean, are that component's alone. Gradients of
    all others are exactly 0: of equal components they would be rounding errors, which Adam makes steps of."""
    names = _last_of_inference(replicas)
    if names is None:
        return
    weight, bias = replicas.parameters[names[0]], replicas.parameters[names[1]]
    components = replicas.template.inference.components  # whose log weights come first
    weight[:, :components] = 0
    bias[:, 0] = 0
    bias[:, 1:components] = UNUSED


def _last_of_inference(replicas: Replicas) -> tuple[str, str] | None:
    """Names of q's last Linear's weight and bias, where it gives all that q is made of."""
    names = last_linear(replicas, "inference.")
    width = replicas.template.inference.width(replicas.template.model.latent_dim)
    if names is None or names[1] is None or replicas.parameters[names[1]].shape[1] != width:
        return None
    return names[0], names[1]


def _others(replicas: Replicas, places: Tensor) -> Tensor:
    """The values that are not at these places."""
    kept = torch.ones(replicas.template.inference.width(replicas.template.model.latent_dim), dtype=torch.bool)
    kept[places] = False
    return kept.nonzero()[:, 0]


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
    centre = torch.where(usable[..., 0], z.mean(-2), torch.zeros_like(z.mean(-2)))
    for codes in code_places(replicas, prefix):
        weight[:, codes] = inverse @ weight[:, codes]
        if bias is not None:
            bias[:, codes] = (inverse @ (bias[:, codes] - centre)[..., None])[..., 0]
    off_mean, off_covariance = moment_errors(replicas.codes(x))
    worked = (off_covariance < 0.01) & ((off_mean < 0.01) if bias is not None else torch.isfinite(off_mean))
    replicas.restore(chosen(worked, replicas.snapshot(), before))


@torch.no_grad()
def mirror_codes(replicas: Replicas, prefix: str, group: int) -> None:
    """Negate the first code of every second replica of each group (where the encoder's last layer is a Linear)."""
    names = last_linear(replicas, prefix)
    odd = (torch.arange(replicas.count) % group % 2 == 1).nonzero()
    first = code_places(replicas, prefix)[:, 0]
    for name in names or ():
        if name is not None:
            replicas.parameters[name][odd, first] *= -1


@torch.no_grad()
def start_std(replicas: Replicas, objective: Callable[[], Tensor], initial_std: float | None = None) -> None:
    """Set q's standard deviation to one number, without correlations: the one given, or each replica's best of a grid by
    ``objective`` [R]. Components of a mixture begin with the first one's mean, that far apart."""
    names = _last_of_inference(replicas)
    if names is None:
        return
    weight, bias = replicas.parameters[names[0]], replicas.parameters[names[1]]
    inference, latent_dim = replicas.template.inference, replicas.template.model.latent_dim
    means, log_stds = inference.places(latent_dim)
    for tensor in (weight, bias):
        tensor[:, means] = tensor[:, means[:1]].expand_as(tensor[:, means]).clone()
        tensor[:, _others(replicas, means)] = 0
    centre = bias[:, means]
    apart = torch.zeros_like(centre[0])
    if inference.components > 1:
        apart = philox_normal(0, *apart.shape, stream=Stream.INITIALISATION, dtype=bias.dtype, device=bias.device)

    def place(log_std: Tensor) -> None:
        bias[:, log_stds] = log_std[:, None, None].expand_as(centre)
        bias[:, means] = centre + log_std.exp()[:, None, None] * apart

    best = torch.full((replicas.count,), math.inf, dtype=bias.dtype, device=bias.device)
    value = torch.full_like(best, math.log(initial_std or 0.05))
    for std in START_STDS if initial_std is None else ():
        place(torch.full_like(best, math.log(std)))
        now = objective()
        better = now < best
        best, value = torch.where(better, now, best), torch.where(better, math.log(std), value)
    place(value)


@torch.no_grad()
def copy_encoder(replicas: Replicas, latent_dim: int) -> None:
    """Start the inference network from the encoder: the same layers, the last one's first L rows as every component's mean.

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
    inference, last = template.inference, _last_of_inference(replicas)
    means, _ = inference.places(latent_dim)
    for a, b in zip(source, target, strict=True):
        new, old = replicas.parameters[a], replicas.parameters[b]
        if last is not None and b in last and new.shape[2:] == old.shape[2:] and new.shape[1] >= latent_dim:
            old[:, means] = new[:, None, :latent_dim].expand_as(old[:, means])
        elif new.shape == old.shape:
            old.copy_(new)
        else:
            raise mismatch
