r"""Importance-weighted log-likelihood in plain torch: the specification of the fused kernels.

For each row x_n with proposal q = N(mean_n, c diag(exp(log_std_n))^2), c the variance inflation, z_s = mean + scale * eps_s:

    log w_s = log p(x_n | f(z_s)) + log N(z_s; 0, I) - log q(z_s)          log-likelihood = log (1/S) sum_s w_s
            = log p(x_n | f(z_s)) + sum_l [ -z_sl^2 / 2 + log scale_l + eps_sl^2 / 2 ]

Paper Eq 48 (S = 5000, c = 2); Burda, Grosse, Salakhutdinov 2016 for the bound. With v_s = w_s / sum w the gradients are

    decoder, noise and x   sum_s v_s d log p(x | f(z_s))                     in every kind
    reparameterized        sum_s v_s   d log w_s           through z and through log q
    sticking-the-landing   sum_s v_s   (d log w_s / d z_s) d z_s             log q's own parameters held (Roeder et al. 2017)
    doubly reparameterized sum_s v_s^2 (d log w_s / d z_s) d z_s             (Tucker et al. 2019)

Samples are taken in tiles of a fixed size, merged in order: no chunk size changes a bit. Nothing of size rows x samples x
data outlives its tile; backward draws the noise again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from libi_fast.kernels.random import reference as random

TILE_SAMPLES = 64
TILE_VALUES = 2**19  # values of the widest layer in a tile
GRADIENTS = ("reparameterized", "sticking-the-landing", "doubly-reparameterized")
LOG_2PI = math.log(2 * math.pi)


def _gelu_slope(a: Tensor, h: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


def _silu_slope(a: Tensor, h: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s + h * (1 - s)


# name: (function of a, its slope as a function of a and of the function's value h)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "identity": (lambda a: a, lambda a, h: torch.ones_like(a)),
    "relu": (torch.relu, lambda a, h: (a > 0).to(a.dtype)),
    "tanh": (torch.tanh, lambda a, h: 1 - h * h),
    "sigmoid": (torch.sigmoid, lambda a, h: h * (1 - h)),
    "softplus": (F.softplus, lambda a, h: torch.sigmoid(a)),
    "silu": (F.silu, _silu_slope),
    "gelu": (F.gelu, _gelu_slope),
    "cube": (lambda a: a * a * a, lambda a, h: 3 * a * a),
    "leaky_relu": (F.leaky_relu, lambda a, h: torch.where(a > 0, torch.ones_like(a), 0.01)),
    "elu": (F.elu, lambda a, h: torch.where(a > 0, torch.ones_like(a), h + 1)),
}


# --- likelihoods: log p(x | output), summed over the last dimension, and its slopes ---


def gaussian(x: Tensor, output: Tensor, variance: Tensor) -> Tensor:
    """log N(x; output, variance); variance broadcasts to x."""
    constant = (variance.log() + LOG_2PI).expand(*variance.shape[:-1], x.shape[-1]).sum(-1)
    return -0.5 * ((output - x).square() / variance).sum(-1) - 0.5 * constant


def bernoulli(x: Tensor, output: Tensor) -> Tensor:
    """x log sigma(o) + (1 - x) log sigma(-o) with output o in logits; x anywhere in [0, 1]."""
    return (x * output - F.softplus(output)).sum(-1)


class Decoder(NamedTuple):
    """A chain of linear maps and elementwise activations with its likelihood; a leading replica dimension on all tensors."""

    weights: Sequence[Tensor]  # [R or 1, out, in]
    biases: Sequence[Tensor | None]  # [R or 1, out]
    activations: Sequence[str]
    likelihood: str  # "gaussian" or "bernoulli"
    variance: Tensor  # [R or 1, D or 1]; empty for Bernoulli

    @property
    def widths(self) -> list[int]:
        """From latents to outputs."""
        return [self.weights[0].shape[-1], *(w.shape[-2] for w in self.weights)]

    @property
    def widest(self) -> int:
        return max(self.widths)

    def run(self, z: Tensor) -> list[tuple[Tensor, Tensor]]:
        """z [R, n, L] -> (pre-activation, activation) of every layer."""
        trace, h = [], z
        for weight, bias, name in zip(self.weights, self.biases, self.activations, strict=True):
            a = h @ weight.mT if bias is None else torch.baddbmm(*_same_batch(bias[:, None], h, weight.mT))
            h = ACTIVATIONS[name][0](a)
            trace.append((a, h))
        return trace

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """x [R, n, 1, D], output [R, n, s, D] -> [R, n, s]."""
        if self.likelihood == "gaussian":
            return gaussian(x, output, self.variance[:, None, None])
        return bernoulli(x, output)

    def score(self, x: Tensor, output: Tensor) -> Tensor:
        """d log p(x | output) / d output, [R, n, s, D]."""
        if self.likelihood == "gaussian":
            return (x - output) * (1 / self.variance[:, None, None])
        return x - torch.sigmoid(output)

    def log_prob_and_gradient(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x | z) [R, n, s] and its gradient to z [R, n, s, L]; x [R, n, 1, D], z [R, n, s, L]."""
        trace = self.run(z.flatten(1, 2))
        output = trace[-1][1].unflatten(1, z.shape[1:3])
        delta = self.score(x, output).flatten(1, 2)
        for weight, name, layer in zip(reversed(self.weights), reversed(self.activations), reversed(trace), strict=True):
            delta = (delta * ACTIVATIONS[name][1](*layer)) @ weight
        return self.log_prob(x, output), delta.unflatten(1, z.shape[1:3])


def _same_batch(*tensors: Tensor) -> list[Tensor]:
    batch = max(t.shape[0] for t in tensors)
    return [t.expand(batch, -1, -1) for t in tensors]


# --- proposal and draws ---


class Draws(NamedTuple):
    """Where the noise of a call comes from: the arguments of the random numbers that stay the same over tiles."""

    seed: Tensor
    replicas: Tensor  # [R]
    first_row: int
    repetition: int
    stream: int
    normal: Callable[..., Tensor]

    def noise(self, rows: slice, samples: slice, latent_dim: int, dtype: torch.dtype) -> Tensor:
        """eps [R, n, s, L]."""
        count = samples.stop - samples.start
        draws = self.normal(
            self.seed, self.replicas, self.first_row + rows.start, rows.stop - rows.start,
            samples.start * latent_dim, count * latent_dim, self.repetition, self.stream, dtype,
        )  # fmt: skip
        return draws.unflatten(-1, (count, latent_dim))


def reference_normal(*args) -> Tensor:
    return random.draws(random.to_normal, *args)


def log_prior_over_proposal(z: Tensor, noise: Tensor, log_scale: Tensor) -> Tensor:
    """log N(z; 0, I) - log q(z) at z = mean + scale * noise, [..., s, L] -> [..., s]; the 2 pi cancel."""
    return (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)


def blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


# --- the running sums of a row ---


class Sums(NamedTuple):
    """Pivot m, sum w e^-m, sum w^2 e^-2m and the largest log-weights of each row, merged tile after tile in order."""

    pivot: Tensor
    first: Tensor
    second: Tensor
    top: Tensor

    @staticmethod
    def empty(shape: Sequence[int], tail: int, like: Tensor) -> Sums:
        lowest = like.new_full(shape, -float("inf"))
        return Sums(lowest, torch.zeros_like(lowest), torch.zeros_like(lowest), like.new_full((*shape, tail), -float("inf")))

    def merge(self, log_weights: Tensor) -> Sums:
        """log_weights [R, n, s]."""
        # The floor keeps -inf - -inf out; a NaN weight passes through maximum and poisons its row alone.
        pivot = torch.maximum(self.pivot, log_weights.amax(-1)).clamp_min(torch.finfo(log_weights.dtype).min)
        old = (self.pivot - pivot).exp()
        weights = (log_weights - pivot[..., None]).exp()
        top = self.top
        if top.shape[-1]:
            top = torch.cat((top, log_weights), -1).topk(top.shape[-1], -1).values
        return Sums(pivot, self.first * old + weights.sum(-1), self.second * old * old + weights.square().sum(-1), top)

    def results(self, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
        """log-likelihood, effective sample size (Kish) and the top log-weights, largest first."""
        log_likelihood = self.pivot + self.first.log() - math.log(num_samples)
        effective = torch.where(self.first == 0, 0.0, self.first.square() / self.second)
        return log_likelihood, effective, self.top


def tiles(decoder: Decoder, replicas: int, rows: int, num_samples: int, chunk_size: int) -> Iterator[tuple[slice, list[slice]]]:
    """(rows, sample chunks); chunks hold whole tiles, and tiles depend on the decoder alone, so chunks move no bit."""
    row_step = max(1, TILE_VALUES // (decoder.widest * TILE_SAMPLES * replicas))
    sample_step = TILE_SAMPLES * max(1, chunk_size // TILE_SAMPLES)
    for row in blocks(rows, row_step):
        yield row, list(blocks(num_samples, sample_step))


def weigh(x: Tensor, mean: Tensor, log_scale: Tensor, noise: Tensor, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Codes z [R, n, s, L] of the noise, and their log-weights [R, n, s]; x [R, n, 1, D], mean and log_scale [R, n, 1, L]."""
    z = mean + log_scale.exp() * noise
    output = decoder.run(z.flatten(1, 2))[-1][1].unflatten(1, z.shape[1:3])
    return z, decoder.log_prob(x, output) + log_prior_over_proposal(z, noise, log_scale)


def forward(
    x: Tensor,
    mean: Tensor,
    log_scale: Tensor,
    decoder: Decoder,
    draws: Draws,
    num_samples: int,
    tail: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [R or 1, N, D], mean and log_scale [R, N, L] (log_scale with the inflation inside) -> [R, N], [R, N], [R, N, tail]."""
    replicas, n, latent_dim = mean.shape
    parts = []
    for rows, chunks in tiles(decoder, replicas, n, num_samples, chunk_size):
        sums = Sums.empty((replicas, rows.stop - rows.start), tail, mean)
        for chunk in chunks:
            chunk_noise = draws.noise(rows, chunk, latent_dim, mean.dtype)
            for noise in chunk_noise.split(TILE_SAMPLES, 2):
                at = x[:, rows, None], mean[:, rows, None], log_scale[:, rows, None]
                sums = sums.merge(weigh(*at, noise, decoder)[1])
        parts.append(sums.results(num_samples))
    if not parts:
        return mean.new_empty(mean.shape[:2]), mean.new_empty(mean.shape[:2]), mean.new_empty((*mean.shape[:2], tail))
    return tuple(torch.cat(p, 1) for p in zip(*parts, strict=True))  # type: ignore[return-value]


def shares(grad: Tensor, log_weights: Tensor, log_likelihood: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """v_s and the row's gradient times v_s, both [..., s]; a row of no weight at all gets none."""
    lost = torch.isinf(log_likelihood)[..., None]
    v = torch.where(lost, 0.0, (log_weights - log_likelihood[..., None] - math.log(num_samples)).exp())
    return v, grad[..., None] * v


def proposal_gradient(
    kind: str, slope: Tensor, share: Tensor, v: Tensor, z: Tensor, noise: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients [..., L] to mean and log_scale from one tile; slope [..., s, L] is share * d log p(x|z) / d z."""
    scale = log_scale.exp()
    if kind == "doubly-reparameterized":
        slope, share = slope * v[..., None], share * v
    # log q at a reparameterized draw depends on log_scale alone; with its parameters held, on z alone.
    rest = -z if kind == "reparameterized" else noise / scale - z
    path = slope + share[..., None] * rest
    to_log_scale = path * noise * scale
    if kind == "reparameterized":
        to_log_scale = to_log_scale + share[..., None]
    return path.sum(-2), to_log_scale.sum(-2)


def backward(
    grad: Tensor, log_likelihood: Tensor, x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws,
    num_samples: int, kind: str, chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """Gradients to x [R, N, D], mean, log_scale [R, N, L], weights, biases and variance, all with R replicas in front."""
    replicas, n, latent_dim = mean.shape
    to_x = mean.new_zeros((replicas, n, x.shape[-1]))
    to_mean, to_log_scale = torch.zeros_like(mean), torch.zeros_like(mean)
    to_weights = [w.new_zeros((replicas, *w.shape[1:])) for w in decoder.weights]
    to_biases = [w.new_zeros((replicas, w.shape[1])) for w in decoder.weights]
    to_variance = decoder.variance.new_zeros((replicas, *decoder.variance.shape[1:]))
    for rows, chunks in tiles(decoder, replicas, n, num_samples, chunk_size):
        target, row_log_scale = x[:, rows, None], log_scale[:, rows, None]
        for chunk in chunks:
            for noise in draws.noise(rows, chunk, latent_dim, mean.dtype).split(TILE_SAMPLES, 2):
                z = mean[:, rows, None] + row_log_scale.exp() * noise
                shape = z.shape[1:3]
                trace = decoder.run(z.flatten(1, 2))
                output = trace[-1][1].unflatten(1, shape)
                log_weights = decoder.log_prob(target, output) + log_prior_over_proposal(z, noise, row_log_scale)
                v, share = shares(grad[:, rows], log_weights, log_likelihood[:, rows], num_samples)
                weight = share[..., None]
                score = decoder.score(target, output)
                delta = weight * score
                if decoder.likelihood == "gaussian":
                    to_x[:, rows] -= delta.sum(2)
                    precision = 1 / decoder.variance[:, None, None]
                    to_variance += (0.5 * weight * (score.square() - precision)).sum((1, 2)).sum_to_size(to_variance.shape)
                else:
                    to_x[:, rows] += (weight * output).sum(2)
                delta = delta.flatten(1, 2)
                for i in reversed(range(len(trace))):
                    delta = delta * ACTIVATIONS[decoder.activations[i]][1](*trace[i])
                    to_weights[i] += delta.mT @ (trace[i - 1][1] if i else z.flatten(1, 2))
                    to_biases[i] += delta.sum(1)
                    delta = delta @ decoder.weights[i]
                slope = delta.unflatten(1, shape)
                from_mean, from_scale = proposal_gradient(kind, slope, share, v, z, noise, row_log_scale)
                to_mean[:, rows] += from_mean
                to_log_scale[:, rows] += from_scale
    return to_x, to_mean, to_log_scale, to_weights, to_biases, to_variance


# --- sampling importance resampling ---


class Resampled(NamedTuple):
    """Of p(z | x) by self-normalised weights v_s = w_s / sum w: mean sum v z [R, n, L], covariance sum v (z - mean)(z - mean)'
    [R, n, L, L], and draws z [R, n, M, L] with log p(x, z) [R, n, M]."""

    mean: Tensor
    covariance: Tensor
    z: Tensor
    log_density: Tensor


def resample(z: Tensor, log_weights: Tensor, log_q: Tensor, uniforms: Tensor) -> Resampled:
    """z [R, n, S, L], log_weights and log q(z) [R, n, S], uniforms [R, n, M]: draw m takes the first sample whose cumulated
    weight passes uniforms[m] of the total (Rubin 1987; multinomial). A row of no weight or of NaN takes its first sample."""
    latent_dim = z.shape[-1]
    pivot = log_weights.amax(-1, keepdim=True).clamp_min(torch.finfo(log_weights.dtype).min)
    weights = (log_weights - pivot).exp().double()
    total = weights.sum(-1, keepdim=True)
    v = weights / total
    # About the sample of the largest weight: a posterior much narrower than its proposal loses nothing.
    best = log_weights.argmax(-1)[..., None, None].expand(*log_weights.shape[:-1], 1, latent_dim)
    centre = z.gather(-2, best)
    off = torch.where(v[..., None] > 0, (z - centre).double(), 0.0)
    mean = (v[..., None] * off).sum(-2)
    covariance = (v[..., None] * off).mT @ off - mean[..., :, None] * mean[..., None, :]
    chosen = torch.searchsorted(weights.cumsum(-1), uniforms.double() * total, right=True).clamp_max(z.shape[-2] - 1)
    chosen = torch.where(total > 0, chosen, 0)
    return Resampled(
        (centre[..., 0, :].double() + mean).to(z.dtype), covariance.to(z.dtype),
        z.gather(-2, chosen[..., None].expand(*chosen.shape, latent_dim)), (log_weights + log_q).gather(-1, chosen),
    )  # fmt: skip


def log_proposal(noise: Tensor, log_scale: Tensor) -> Tensor:
    """log q(z) at z = mean + scale * noise, [..., s, L] -> [..., s]."""
    return -(0.5 * (noise.square() + LOG_2PI) + log_scale).sum(-1)


RESAMPLED_VALUES = 2**22  # codes of all samples of the rows held at once


def forward_and_resample(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws, num_samples: int, tail: int,
    uniforms: Callable[[slice], Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """As :func:`forward`, then the tensors of :class:`Resampled`; ``uniforms(rows)`` gives [R, n, M]."""
    replicas, n, latent_dim = mean.shape
    parts = []
    for rows in blocks(n, max(1, RESAMPLED_VALUES // (num_samples * latent_dim * replicas))):
        target, at_mean, at_scale = x[:, rows, None], mean[:, rows, None], log_scale[:, rows, None]
        sums = Sums.empty((replicas, rows.stop - rows.start), tail, mean)
        kept = []
        for samples in blocks(num_samples, TILE_SAMPLES):
            noise = draws.noise(rows, samples, latent_dim, mean.dtype)
            z, log_weights = weigh(target, at_mean, at_scale, noise, decoder)
            sums = sums.merge(log_weights)
            kept.append((z, log_weights, log_proposal(noise, at_scale)))
        z, log_weights, log_q = (torch.cat(k, 2) for k in zip(*kept, strict=True))
        parts.append((*sums.results(num_samples), *resample(z, log_weights, log_q, uniforms(rows))))
    if not parts:
        count = uniforms(slice(0, 0)).shape[-1]
        shapes = [(), (), (tail,), (latent_dim,), (latent_dim, latent_dim), (count, latent_dim), (count,)]
        return tuple(mean.new_empty((replicas, 0, *shape)) for shape in shapes)
    return tuple(torch.cat(p, 1) for p in zip(*parts, strict=True))
