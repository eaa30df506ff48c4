"""The importance-weighted log-likelihood as an operator.

Two paths with the same draws and the same formulas (kernels/importance/reference.py):

* decoders that are a chain of linear maps and elementwise activations go through ``torch.ops.libi_fast.importance``;
* any other function is evaluated in chunks over samples and evaluated again in backward.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels.importance import reference
from libi_fast.kernels.importance.reference import (
    GRADIENTS,
    Decoder,
    Draws,
    Sums,
    bernoulli,
    gaussian,
    log_prior_over_proposal,
)
from libi_fast.ops import _library as lib
from libi_fast.ops import random
from libi_fast.ops.random import Stream

__all__ = ["GRADIENTS", "Estimate", "Layers", "Settings", "bernoulli", "gaussian"]
DEFAULT_CHUNK = 4096
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")


class Settings(NamedTuple):
    """What a call needs besides tensors; one value for forward and backward."""

    num_samples: int
    gradient: str = "reparameterized"
    tail: int = 0  # how many of the largest log-weights of each row are kept
    first_row: int = 0
    repetition: int = 0
    stream: int = Stream.PROPOSAL
    chunk_size: int = DEFAULT_CHUNK
    precision: str = "ieee"
    backend: str = ""

    def draws(self, seed: Tensor, replicas: Tensor) -> Draws:
        normal = random.drawing("normal", self.backend)
        return Draws(seed, replicas, self.first_row, self.repetition, int(self.stream), normal)


class Layers(NamedTuple):
    """The shape of a recognised decoder; its tensors travel apart, weight then bias of each layer."""

    activations: tuple[str, ...]
    has_bias: tuple[bool, ...]
    likelihood: str

    def decoder(self, parameters: Sequence[Tensor], variance: Tensor) -> Decoder:
        rest = list(parameters)
        weights, biases = [], []
        for has in self.has_bias:
            weights.append(rest.pop(0))
            biases.append(rest.pop(0) if has else None)
        return Decoder(weights, biases, self.activations, self.likelihood, variance)


# --- recognised decoders: raw operators ---

_DECODER_SCHEMA = "Tensor[] parameters, Tensor variance, str activations, bool[] has_bias, str likelihood, "
_DRAWS_SCHEMA = (
    "Tensor seed, Tensor replicas, SymInt num_samples, str gradient, SymInt tail, SymInt first_row, SymInt repetition, "
    "int stream, SymInt chunk_size, str precision, str backend"
)


def _unpack(parameters, variance, activations, has_bias, likelihood, seed, replicas, *settings):
    layers = Layers(tuple(activations.split(",")), tuple(has_bias), likelihood)
    # The noise takes its fastest backend whatever the importance operator runs on: the numbers agree by contract.
    chosen = Settings(*settings)
    return layers.decoder(parameters, variance), chosen, chosen.draws(seed, replicas)


def _reference_forward(x, mean, log_scale, *rest):
    decoder, chosen, draws = _unpack(*rest)
    return reference.forward(x, mean, log_scale, decoder, draws, chosen.num_samples, chosen.tail, chosen.chunk_size)


def _reference_backward(grad, log_likelihood, wanted, x, mean, log_scale, parameters, *rest):
    decoder, chosen, draws = _unpack(parameters, *rest)
    to_x, to_mean, to_scale, to_weights, to_biases, to_variance = reference.backward(
        grad, log_likelihood, x, mean, log_scale, decoder, draws, chosen.num_samples, chosen.gradient, chosen.chunk_size
    )
    return _shared(x, to_x, to_mean, to_scale, parameters, _flat(to_weights, to_biases, rest[2]), rest[0], to_variance)


def _flat(weights, biases, has_bias):
    """In the order in which a decoder's tensors travel."""
    pairs = zip(weights, biases, has_bias, strict=True)
    return [t for weight, bias, has in pairs for t in ([weight, bias] if has else [weight])]


def _shared(x, to_x, to_mean, to_scale, parameters, to_parameters, variance, to_variance):
    """Tensors shared by all replicas take the sum."""
    summed = [g.sum_to_size(p.shape).contiguous() for g, p in zip(to_parameters, parameters, strict=True)]
    return (
        to_x.sum_to_size(x.shape).contiguous(), to_mean, to_scale, summed,
        to_variance.sum_to_size(variance.shape).contiguous(),
    )  # fmt: skip


def _cpu_forward(x, mean, log_scale, *rest):
    decoder, chosen, draws = _unpack(*rest)
    return native.importance(x, mean, log_scale, decoder, draws, chosen.num_samples, chosen.tail)


def _cpu_backward(grad, log_likelihood, wanted, x, mean, log_scale, parameters, *rest):
    decoder, chosen, draws = _unpack(parameters, *rest)
    to_x, to_mean, to_scale, to_weights, to_biases, to_variance = native.importance_backward(
        grad, log_likelihood, x, mean, log_scale, decoder, draws, chosen.num_samples, chosen.gradient, wanted
    )
    return _shared(x, to_x, to_mean, to_scale, parameters, _flat(to_weights, to_biases, rest[2]), rest[0], to_variance)


def _triton_forward(x, mean, log_scale, *rest):
    from libi_fast.kernels.importance import gpu

    decoder, chosen, draws = _unpack(*rest)
    return gpu.forward(x, mean, log_scale, decoder, draws, chosen.num_samples, chosen.tail, chosen.precision)


def _triton_backward(grad, log_likelihood, wanted, x, mean, log_scale, parameters, *rest):
    from libi_fast.kernels.importance import gpu

    decoder, chosen, draws = _unpack(parameters, *rest)
    to_x, to_mean, to_scale, to_weights, to_biases, to_variance = gpu.backward(
        grad, log_likelihood, x, mean, log_scale, decoder, draws, chosen.num_samples, chosen.gradient, chosen.precision, wanted
    )
    return _shared(x, to_x, to_mean, to_scale, parameters, _flat(to_weights, to_biases, rest[2]), rest[0], to_variance)


def _float32_only(*arguments):
    tensors = [t for t in arguments if isinstance(t, Tensor) and t.is_floating_point()]
    return None if all(t.dtype == torch.float32 for t in tensors) else "it computes in float32"


def _fake_forward(x, mean, log_scale, parameters, variance, activations, has_bias, likelihood, seed, replicas,
                  num_samples, gradient, tail, *settings):  # fmt: skip
    shape = mean.shape[:2]
    return mean.new_empty(shape), mean.new_empty(shape), mean.new_empty((*shape, tail))


def _fake_backward(grad, log_likelihood, wanted, x, mean, log_scale, parameters, variance, *rest):
    return (
        x.new_empty(x.shape), mean.new_empty(mean.shape), mean.new_empty(log_scale.shape),
        [p.new_empty(p.shape) for p in parameters], variance.new_empty(variance.shape),
    )  # fmt: skip


def _fold(info: Any, in_dims: Any, arguments: Sequence[Any]) -> tuple[list[Any], int]:
    """Fold the vmapped dimension into the replicas. Every vmapped element keeps the loop's draws, hence repeated replica ids;
    tensors that all replicas share (a dimension of 1) are expanded, since elements may differ in them."""
    size, settings = info.batch_size, len(Settings._fields)
    *tensors, seed, replicas = arguments[:-settings]
    count = replicas.shape[0]
    if in_dims[len(tensors)] is not None:
        raise NotImplementedError("vmap over seed: loop over seeds, or use replicas")

    def fold(value: Any, dim: Any) -> Any:
        if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
            return [fold(v, d) for v, d in zip(value, _dims(dim, value), strict=True)]
        if not isinstance(value, Tensor):
            return value
        moved = lib.leading(value, dim, size)
        return moved.expand(size, count, *moved.shape[2:]).flatten(0, 1)

    folded = [fold(v, d) for v, d in zip(tensors, in_dims, strict=False)]
    return [*folded, seed, replicas.repeat(size), *arguments[-settings:]], count


def _dims(dims: Any, values: Sequence[Tensor]) -> Sequence[int | None]:
    """vmap gives one None for a list in which nothing is mapped."""
    return dims if isinstance(dims, list | tuple) else [None] * len(values)


def _vmap_forward(info: Any, in_dims: Any, *arguments: Any) -> Any:
    folded, count = _fold(info, in_dims, arguments)
    results = _forward(*folded)
    return tuple(r.unflatten(0, (info.batch_size, count)) for r in results), (0,) * len(results)


def _vmap_backward(info: Any, in_dims: Any, *arguments: Any) -> Any:
    folded, count = _fold(info, in_dims, arguments)
    x, parameters, variance = arguments[3], arguments[6], arguments[7]
    dims = _dims(in_dims[6], parameters)
    to_x, to_mean, to_scale, to_parameters, to_variance = _backward(*folded)

    def unfold(grad: Tensor, like: Tensor, dim: int | None) -> Tensor:
        shape = lib.leading(like, dim, info.batch_size).shape
        return grad.unflatten(0, (info.batch_size, count)).sum_to_size(shape)

    grads = (
        unfold(to_x, x, in_dims[3]), to_mean.unflatten(0, (info.batch_size, count)),
        to_scale.unflatten(0, (info.batch_size, count)),
        [unfold(g, p, d) for g, p, d in zip(to_parameters, parameters, dims, strict=True)],
        unfold(to_variance, variance, in_dims[7]),
    )  # fmt: skip
    return grads, (0, 0, 0, [0] * len(parameters), 0)


_forward = lib.define(
    "importance",
    f"(Tensor x, Tensor mean, Tensor log_scale, {_DECODER_SCHEMA}{_DRAWS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    {"reference": _reference_forward, "cpu": _cpu_forward, "triton": _triton_forward},
    _fake_forward,
    _vmap_forward,
    {"triton": _float32_only},
)
_backward = lib.define(
    "importance_backward",
    f"(Tensor grad, Tensor log_likelihood, bool[] wanted, Tensor x, Tensor mean, Tensor log_scale, {_DECODER_SCHEMA}"
    f"{_DRAWS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor[], Tensor)",
    {"reference": _reference_backward, "cpu": _cpu_backward, "triton": _triton_backward},
    _fake_backward,
    _vmap_backward,
    {"triton": _float32_only},
)


class _Fused(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, mean, log_scale, variance, seed, replicas, layers, settings, *parameters):
        return _forward(
            x, mean, log_scale, list(parameters), variance, ",".join(layers.activations), list(layers.has_bias),
            layers.likelihood, seed, replicas, *settings,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, mean, log_scale, variance, seed, replicas, layers, settings, *parameters = inputs
        log_likelihood, effective, top = output
        ctx.mark_non_differentiable(effective, top)
        ctx.save_for_backward(log_likelihood, x, mean, log_scale, variance, seed, replicas, *parameters)
        ctx.layers, ctx.settings = layers, settings

    @staticmethod
    @lib.once_differentiable("log_likelihood")
    def backward(ctx: Any, grad: Tensor, *ignored: Any):
        log_likelihood, x, mean, log_scale, variance, seed, replicas, *parameters = ctx.saved_tensors
        layers = ctx.layers
        # x, variance, any parameter: kernels leave out what nobody reads.
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[3], any(ctx.needs_input_grad[8:])]
        to_x, to_mean, to_scale, to_parameters, to_variance = _backward(
            grad, log_likelihood, wanted, x, mean, log_scale, parameters, variance, ",".join(layers.activations),
            list(layers.has_bias), layers.likelihood, seed, replicas, *ctx.settings,
        )  # fmt: skip
        return to_x, to_mean, to_scale, to_variance, None, None, None, None, *to_parameters


# --- any other decoder: streamed ---

LogProb = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]
"""(parameters, x [R, n, D], z [R, n, s, L]) -> log p(x | z) [R, n, s]"""


class _Generators(NamedTuple):
    """Torch's generators before the forward pass: backward evaluates the decoder again, and dropout must drop the same."""

    devices: list[torch.device]
    states: list[Tensor]

    @staticmethod
    def now(device: torch.device) -> _Generators:
        devices = [device] if device.type == "cuda" else []
        return _Generators(devices, [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)])

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.states[0])
            for device, state in zip(self.devices, self.states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class _Stream(NamedTuple):
    log_prob: LogProb
    settings: Settings
    row_step: int
    sample_step: int
    generators: _Generators | None  # None where a checkpoint replays them

    def tiles(self, mean: Tensor, log_scale: Tensor, draws: Draws):
        """Yield (rows, z, noise, log_scale of the rows) in the order the sums are merged."""
        for rows in reference.blocks(mean.shape[1], self.row_step):
            for samples in reference.blocks(self.settings.num_samples, self.sample_step):
                noise = draws.noise(rows, samples, mean.shape[-1], mean.dtype)
                row_scale = log_scale[:, rows, None]
                yield rows, mean[:, rows, None] + row_scale.exp() * noise, noise, row_scale


def _accumulate(stream: _Stream, x: Tensor, mean: Tensor, log_scale: Tensor, draws: Draws, parameters: Sequence[Tensor]):
    """log-likelihood, effective sample size and top log-weights, tile after tile."""
    parts: list[Sums] = []
    current = None
    for rows, z, noise, row_scale in stream.tiles(mean, log_scale, draws):
        if rows != current:
            current = rows
            parts.append(Sums.empty((mean.shape[0], rows.stop - rows.start), stream.settings.tail, mean))
        log_weights = stream.log_prob(parameters, x[:, rows], z) + log_prior_over_proposal(z, noise, row_scale)
        parts[-1] = parts[-1].merge(log_weights)
    if not parts:
        shape = mean.shape[:2]
        return mean.new_empty(shape), mean.new_empty(shape), mean.new_empty((*shape, stream.settings.tail))
    results = [p.results(stream.settings.num_samples) for p in parts]
    return tuple(torch.cat(r, 1) for r in zip(*results, strict=True))


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(x, mean, log_scale, seed, replicas, stream, *parameters):
        return _accumulate(stream, x, mean, log_scale, stream.settings.draws(seed, replicas), parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, mean, log_scale, seed, replicas, stream, *parameters = inputs
        log_likelihood, effective, top = output
        ctx.mark_non_differentiable(effective, top)
        ctx.save_for_backward(log_likelihood, x, mean, log_scale, seed, replicas, *parameters)
        ctx.stream = stream

    @staticmethod
    @lib.once_differentiable("log_likelihood")
    def backward(ctx: Any, grad: Tensor, *ignored: Any):
        with ctx.stream.generators.replayed():
            return _Streamed.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_likelihood, x, mean, log_scale, seed, replicas, *parameters = ctx.saved_tensors
        stream, settings = ctx.stream, ctx.stream.settings
        wanted = [i for i, p in enumerate(parameters) if ctx.needs_input_grad[6 + i]]
        to_x, to_mean, to_scale = torch.zeros_like(x), torch.zeros_like(mean), torch.zeros_like(log_scale)
        to_parameters = {i: torch.zeros_like(parameters[i]) for i in wanted}
        for rows, z, noise, row_scale in stream.tiles(mean, log_scale, settings.draws(seed, replicas)):
            with torch.enable_grad():
                z_leaf, x_leaf = z.detach().requires_grad_(), x[:, rows].detach().requires_grad_()
                leaves = [p.detach().requires_grad_(i in to_parameters) for i, p in enumerate(parameters)]
                log_prob = stream.log_prob(leaves, x_leaf, z_leaf)
            log_weights = log_prob.detach() + log_prior_over_proposal(z, noise, row_scale)
            v, share = reference.shares(grad[:, rows], log_weights, log_likelihood[:, rows], settings.num_samples)
            inputs = [z_leaf, x_leaf, *(leaves[i] for i in wanted)]
            to_z, from_x, *from_parameters = torch.autograd.grad(
                log_prob, inputs, share, allow_unused=True, materialize_grads=True
            )
            from_mean, from_scale = reference.proposal_gradient(settings.gradient, to_z, share, v, z, noise, row_scale)
            to_mean[:, rows] += from_mean
            to_scale[:, rows] += from_scale
            to_x[:, rows] += from_x
            for i, g in zip(wanted, from_parameters, strict=True):
                to_parameters[i] += g
        return to_x, to_mean, to_scale, None, None, None, *(to_parameters.get(i) for i in range(len(parameters)))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            "log_likelihood under vmap needs a decoder of Linear and elementwise layers; pass replicas for any other"
        )


class _WeightedGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by v."""

    @staticmethod
    def forward(z: Tensor, v: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return grad * ctx.saved_tensors[0], None


def _traced(stream: _Stream, x: Tensor, mean: Tensor, log_scale: Tensor, draws: Draws, parameters: Sequence[Tensor]):
    """What :class:`_Streamed` computes, in a form a compiler can trace: the value without gradients, then, tile by tile under
    checkpoints, sum_s v_s log w_s with v held, whose gradient is the estimate's (the head of the reference lists the kinds)."""
    kind = stream.settings.gradient
    with torch.no_grad():
        value, effective, top = _accumulate(stream, x, mean, log_scale, draws, parameters)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, mean, log_scale, *parameters))):
        return value, effective, top

    def surrogate(x: Tensor, mean: Tensor, log_scale: Tensor, value: Tensor, noise: Tensor) -> Tensor:
        z = mean[:, :, None] + log_scale[:, :, None].exp() * noise
        with torch.no_grad():
            log_weights = stream.log_prob(parameters, x, z) + log_prior_over_proposal(z, noise, log_scale[:, :, None])
            v, share = reference.shares(torch.ones_like(value), log_weights, value, stream.settings.num_samples)
        if kind == "reparameterized":
            rest = log_prior_over_proposal(z, noise, log_scale[:, :, None])
        else:
            if kind == "doubly-reparameterized":
                z = _WeightedGradient.apply(z, v[..., None])
            held = (z - mean.detach()[:, :, None]) / log_scale.detach().exp()[:, :, None]
            rest = 0.5 * (held.square() - z.square()).sum(-1)
        return (share * (stream.log_prob(parameters, x, z) + rest)).sum(-1)

    parts: dict[int, Tensor] = {}
    for rows, _, noise, _ in stream.tiles(mean.detach(), log_scale.detach(), draws):
        tile = checkpoint(surrogate, x[:, rows], mean[:, rows], log_scale[:, rows], value[:, rows], noise, use_reentrant=False)
        parts[rows.start] = parts[rows.start] + tile if rows.start in parts else tile
    total = torch.cat(list(parts.values()), 1)
    return value + (total - total.detach()), effective, top


# --- entry points on tensors ---


class Estimate(NamedTuple):
    """log_likelihood (differentiable), effective_sample_size [R, N] and top [R, N, tail] log-weights, largest first."""

    log_likelihood: Tensor
    effective_sample_size: Tensor
    top: Tensor


def check_settings(settings: Settings) -> None:
    """Raise InputError for settings that no path can honour."""
    if settings.gradient not in GRADIENTS:
        raise InputError(f"gradient must be one of {', '.join(map(repr, GRADIENTS))}, got {settings.gradient!r}")
    lib.check_index("num_samples", settings.num_samples, 2**32)
    if settings.num_samples < 1:
        raise InputError("num_samples must be at least 1, got 0")
    lib.check_index("chunk_size", settings.chunk_size, 2**32)
    if settings.chunk_size < 1:
        raise InputError("chunk_size must be at least 1, got 0")
    lib.check_index("first_row", settings.first_row, random.INDEX_LIMIT)
    lib.check_index("repetition", settings.repetition, random.INDEX_LIMIT)


def check_layers(x: Tensor, layers: Layers, parameters: Sequence[Tensor], variance: Tensor) -> None:
    """Raise unless the decoder's tensors fit each other and x in shape, dtype and device, which kernels take for granted.

    Raises:
        InputError: shapes or devices; TypeError: dtypes. The layer is named, counted from 1, linear maps alone.
    """
    rest, width = iter(parameters), None
    for number, has_bias in enumerate(layers.has_bias, 1):
        layer, weight = f"decoder layer {number}", next(rest)
        lib.check_tensor(f"{layer}'s weight", weight)
        lib.check_like(f"{layer}'s weight", weight, "x", x)
        if weight.dim() != 3:
            raise InputError(f"{layer}'s weight must have shape (outputs, inputs), got {tuple(weight.shape[1:])}")
        _, units, inputs = weight.shape
        if width is not None and inputs != width:
            raise InputError(f"{layer} takes {inputs} inputs, but layer {number - 1} gives {width}")
        width = units
        if has_bias:
            bias = next(rest)
            lib.check_tensor(f"{layer}'s bias", bias)
            lib.check_like(f"{layer}'s bias", bias, "x", x)
            if bias.dim() != 2 or bias.shape[1] != units:
                raise InputError(f"{layer} has {units} units, but its bias has shape {tuple(bias.shape[1:])}")
    lib.check_like("the likelihood's variance", variance, "x", x)


def importance_layers(
    x: Tensor, mean: Tensor, log_scale: Tensor, layers: Layers, parameters: Sequence[Tensor], variance: Tensor,
    seed: Tensor, replicas: Tensor, settings: Settings,
) -> Estimate:  # fmt: skip
    """A recognised decoder. x [R or 1, N, D]; mean, log_scale [R, N, L]; parameters with R or 1 in front; variance likewise."""
    check_layers(x, layers, parameters, variance)
    return Estimate(*_Fused.apply(x, mean, log_scale, variance, seed, replicas, layers, settings, *parameters))


def importance_streamed(
    x: Tensor, mean: Tensor, log_scale: Tensor, log_prob: LogProb, parameters: Sequence[Tensor], seed: Tensor,
    replicas: Tensor, settings: Settings, widest: int, chunk_size: int | None = None, most_replicas: int | None = None,
) -> Estimate:  # fmt: skip
    """Any conditional density. ``widest`` (values a sample needs at once) sets the tile; ``chunk_size`` samples override it.
    Past ``most_replicas`` the tile does not shrink, so that their number moves no bit."""
    budget = max(1, reference.TILE_VALUES // (widest * min(mean.shape[0], most_replicas or mean.shape[0])))
    row_step = max(1, min(mean.shape[1], budget))
    sample_step = min(settings.num_samples, chunk_size or max(1, budget // row_step))
    if torch.compiler.is_compiling():
        stream = _Stream(log_prob, settings, row_step, sample_step, None)
        return Estimate(*_traced(stream, x, mean, log_scale, settings.draws(seed, replicas), parameters))
    stream = _Stream(log_prob, settings, row_step, sample_step, _Generators.now(mean.device))
    return Estimate(*_Streamed.apply(x, mean, log_scale, seed, replicas, stream, *parameters))


def standard_error(effective_sample_size: Tensor, num_samples: int) -> Tensor:
    """Of the log-likelihood, by the delta method: sd(w) / (mean(w) sqrt S), from Kish's effective sample size."""
    if num_samples < 2:
        return torch.full_like(effective_sample_size, math.nan)
    return ((num_samples / effective_sample_size - 1).clamp_min(0) / (num_samples - 1)).sqrt()
