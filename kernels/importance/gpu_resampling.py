"""Sampling importance resampling in Triton (reference.forward_and_resample): the likelihood's kernels, whose log-weights stay
on the card for a block of rows, then one program a row.

Choosing needs the weights' running sum. It is taken of whole numbers, weights in units of 2^-31 of the row's largest: exact, so
it never falls, a sample of no weight is never chosen, and no order of summing moves a bit. A draw finds its sample in it by
bisection. Moments are summed about the sample of the largest weight, so that a posterior much narrower than its proposal loses
nothing; noise is drawn again from its counters, not kept.

A sample costs 4 bytes of log-weights, read twice more, 8 of their sums, and its noise once more: beside a decoder of 50 units
(850 instructions) a tenth. With more than 8 latents the moments would not stay in registers: there torch has them, chunk by
chunk, which is little beside such decoders.
"""

# mypy: disable-error-code="assignment, var-annotated"
# In Triton's language a loop that is unrolled may grow a tuple.

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu
from libi_fast.kernels.importance.gpu import weigh
from libi_fast.kernels.importance.gpu_formulas import LOG_2PI, exp
from libi_fast.kernels.importance.gpu_narrow import columns_of, noise_of
from libi_fast.kernels.importance.reference import Decoder, Draws, blocks
from libi_fast.kernels.random import gpu as random
from libi_fast.kernels.random.gpu import normals4

WIDEST = 8  # latents whose moments stay in registers
HELD = 2**24  # log-weights of a block of rows
STEP = 512  # samples that are summed at once
DRAWS = 128  # that are chosen at once

# --- what all draws need ---


@triton.jit
def normal_at(key, row, index, repetition, last):
    """The normal draws ``index`` of a row's sequence."""
    n0, n1, n2, n3 = normals4(key, row, (index // 4).to(tl.uint32), repetition, last)
    place = index % 4
    return tl.where(place < 2, tl.where(place == 0, n0, n1), tl.where(place == 2, n2, n3))


# Sizes and counters change from call to call, and nothing is gained by a kernel compiled for a multiple of 16 of them.
COUNTS = ("rows", "height", "first", "samples", "first_row", "repetition", "stream")


@triton.jit(do_not_specialize=[*COUNTS, "draws", "bisections", "latents"])
def choose_kernel(
    seed, replicas, mean, log_scale, weights, uniforms, cumulated, pivots, centres, z, log_density,
    rows, height, first, samples, first_row, repetition, stream, draws, bisections, latents,
    STEP: tl.constexpr, DRAWS: tl.constexpr, LATENTS: tl.constexpr,
):  # fmt: skip
    """Of one row, from its log-weights in weights [R, height, samples]: their largest -> pivots [R, height], its sample's code
    -> centres [R, height, latents], and for uniforms [R, height, draws] the chosen codes -> z [R, rows, draws, latents] and
    log p(x, z) -> log_density [R, rows, draws]. ``cumulated`` int64 [R, height, samples] is room."""
    program = tl.cast(tl.program_id(0), tl.int64)
    replica = program // height
    row = first + program % height
    samples = tl.cast(samples, tl.int64)
    draws = tl.cast(draws, tl.int64)
    weights += program * samples
    cumulated += program * samples
    key = tl.load(seed)
    last = (stream + 256 * tl.load(replicas + replica)).to(tl.uint32)
    again = tl.cast(repetition, tl.uint32)
    counter = (first_row + row).to(tl.uint32)
    mean += (replica * rows + row) * latents
    log_scale += (replica * rows + row) * latents

    best = tl.full((STEP,), -float("inf"), tl.float32)
    best_at = tl.zeros((STEP,), tl.int64)
    lost = tl.zeros((STEP,), tl.int32)
    for start in range(0, samples, STEP):
        sample = start + tl.arange(0, STEP)
        value = tl.load(weights + sample, mask=sample < samples, other=-float("inf"))
        best_at = tl.where(value > best, sample, best_at)
        best = tl.where(value > best, value, best)
        lost |= (value != value).to(tl.int32)
    pivot = tl.max(best, 0)
    at = tl.min(tl.where(best == pivot, best_at, samples), 0)
    pivot = tl.maximum(pivot, -3.4028234663852886e38)
    tl.store(pivots + program, pivot)
    latent = tl.arange(0, LATENTS)
    inside = latent < latents
    noise = normal_at(key, counter + 0 * latent.to(tl.uint32), at * latents + latent, again, last)
    code = tl.load(mean + latent, mask=inside) + exp(tl.load(log_scale + latent, mask=inside)) * noise
    tl.store(centres + program * latents + latent, code, mask=inside)

    total = tl.cast(0, tl.int64)
    for start in range(0, samples, STEP):
        sample = start + tl.arange(0, STEP)
        weight = exp(tl.load(weights + sample, mask=sample < samples, other=-float("inf")) - pivot)
        units = (tl.where(weight == weight, weight, 0.0) * 2147483648.0 + 0.5).to(tl.int64)
        tl.store(cumulated + sample, total + tl.cumsum(units, 0), mask=sample < samples)
        total += tl.sum(units, 0)
    total = tl.where(tl.max(lost, 0) > 0, 0, total)  # a row of no weight, or of one that is NaN, takes its first sample
    tl.debug_barrier()  # other threads wrote what is read now
    for start in range(0, draws, DRAWS):
        draw = start + tl.arange(0, DRAWS)
        valid = draw < draws
        u = tl.load(uniforms + program * draws + draw, mask=valid, other=0.0)
        level = (u.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        low = tl.zeros((DRAWS,), tl.int64)
        high = low + (samples - 1)
        for _ in range(0, bisections):
            middle = (low + high) // 2
            above = tl.load(cumulated + middle) > level
            low = tl.where(above, low, tl.minimum(middle + 1, high))
            high = tl.where(above, middle, high)
        sample = tl.where(total > 0, high, 0)
        density = tl.load(weights + sample)
        place = (replica * rows + row) * draws + draw
        for l in range(0, latents):
            normal = normal_at(key, counter + 0 * draw.to(tl.uint32), sample * latents + l, again, last)
            shift = tl.load(log_scale + l)
            tl.store(z + place * latents + l, tl.load(mean + l) + exp(shift) * normal, mask=valid)
            density -= 0.5 * (normal * normal + LOG_2PI) + shift
        tl.store(log_density + place, density, mask=valid)


# --- mean and covariance ---


@triton.jit(do_not_specialize=COUNTS)
def moments_kernel(
    seed, replicas, mean, log_scale, weights, pivots, centres, posterior_mean, covariance,
    rows, height, first, samples, first_row, repetition, stream, L: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Of one row -> posterior_mean [R, rows, L], covariance [R, rows, L, L]."""
    GROUP: tl.constexpr = 1 if L % 4 == 0 else (2 if L % 2 == 0 else 4)
    program = tl.cast(tl.program_id(0), tl.int64)
    replica = program // height
    row = first + program % height
    samples = tl.cast(samples, tl.int64)
    key = tl.load(seed)
    last = (stream + 256 * tl.load(replicas + replica)).to(tl.uint32)
    line = replica * rows + row + tl.zeros((1,), tl.int64)
    counter = (first_row + row + tl.zeros((1,), tl.int64)).to(tl.uint32)[:, None]
    mean_l = columns_of(mean, line, line >= 0, L)
    log_scale_l = columns_of(log_scale, line, line >= 0, L)
    centre_l = columns_of(centres, program + tl.zeros((1,), tl.int64), line >= 0, L)
    scale_l = ()
    for l in tl.static_range(L):
        scale_l = scale_l + (exp(log_scale_l[l]),)
    pivot = tl.load(pivots + program)

    total = tl.zeros((1, SAMPLES), tl.float32)
    first_moments = ()
    second_moments = ()
    for l in tl.static_range(L):
        first_moments = first_moments + (tl.zeros((1, SAMPLES), tl.float32),)
        for k in tl.static_range(l + 1):
            second_moments = second_moments + (tl.zeros((1, SAMPLES), tl.float32),)
    for start in range(0, samples, SAMPLES):
        group = (start // GROUP + tl.arange(0, SAMPLES // GROUP))[None, :]
        noise = noise_of(key, last, tl.cast(repetition, tl.uint32), counter, group, L, 1, SAMPLES)
        sample = (start + tl.arange(0, SAMPLES))[None, :]
        weight = exp(tl.load(weights + program * samples + sample, mask=sample < samples, other=-float("inf")) - pivot)
        total += weight
        off = ()
        for l in tl.static_range(L):
            off = off + ((mean_l[l] + scale_l[l] * noise[l]) - centre_l[l],)
        first_sums = ()
        second_sums = ()
        for l in tl.static_range(L):
            weighted = tl.where(weight > 0.0, weight * off[l], 0.0)
            first_sums = first_sums + (first_moments[l] + weighted,)
            for k in tl.static_range(l + 1):
                second_sums = second_sums + (second_moments[l * (l + 1) // 2 + k] + weighted * off[k],)
        first_moments = first_sums
        second_moments = second_sums
    inverse = 1.0 / tl.sum(total, 1)
    where = line * L
    for l in tl.static_range(L):
        shift = tl.sum(first_moments[l], 1) * inverse
        tl.store(posterior_mean + where + l, tl.reshape(centre_l[l], (1,)) + shift)
        for k in tl.static_range(l + 1):
            value = tl.sum(second_moments[l * (l + 1) // 2 + k], 1) * inverse
            value -= shift * (tl.sum(first_moments[k], 1) * inverse)
            tl.store(covariance + (where + l) * L + k, value)
            tl.store(covariance + (where + k) * L + l, value)


def wide_moments(
    mean: Tensor, log_scale: Tensor, draws: Draws, weights: Tensor, pivots: Tensor, centres: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of any number of latents, all rows given."""
    replicas, n, latents = mean.shape
    weights = (weights - pivots[..., None]).exp()
    first, second = torch.zeros_like(mean), mean.new_zeros((replicas, n, latents, latents))
    for samples in blocks(weights.shape[-1], max(1, HELD // (replicas * n * latents))):
        noise = random.draws(
            "normal", draws.seed, draws.replicas, draws.first_row, n, samples.start * latents,
            (samples.stop - samples.start) * latents, draws.repetition, draws.stream,
        ).unflatten(-1, (-1, latents))  # fmt: skip
        v = weights[..., samples, None]
        off = torch.where(v > 0, mean[..., None, :] + log_scale.exp()[..., None, :] * noise - centres[..., None, :], 0.0)
        first += (v * off).sum(-2)
        second += (v * off).mT @ off
    total = weights.sum(-1, keepdim=True)
    first = first / total
    return centres + first, second / total[..., None] - first[..., :, None] * first[..., None, :]


# --- a call ---


def forward_and_resample(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws, num_samples: int, tail: int, precision: str,
    uniforms: Callable[[slice], Tensor], count: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As reference.forward_and_resample, float32; ``count`` draws a row, ``precision`` as in gpu.forward."""
    replicas, n, latents = mean.shape
    mean, log_scale = mean.contiguous(), log_scale.contiguous()
    limit = {} if gpu.amd() else {"maxnreg": 96}  # left to itself, the assembler takes 56, for more programs, and spills

    def new(*shape: int) -> Tensor:
        return mean.new_empty((replicas, n, *shape))

    log_likelihood, effective, top = new(), new(), new(tail)
    posterior_mean, covariance, z, log_density = new(latents), new(latents, latents), new(count, latents), new(count)
    for rows in blocks(n, max(1, HELD // (num_samples * replicas))):
        height = rows.stop - rows.start
        weights = mean.new_empty((replicas, height, num_samples))

        def keep(part: slice, inner: slice, start: int, values: Tensor, weights: Tensor = weights) -> None:
            weights[part, inner, start : start + values.shape[-1]] = values

        here = mean[:, rows], log_scale[:, rows]
        own = draws._replace(first_row=draws.first_row + rows.start)
        log_likelihood[:, rows], effective[:, rows] = weigh(x[:, rows], *here, decoder, own, num_samples, precision, keep)
        top[:, rows] = weights.topk(tail, -1).values
        pivots, centres = mean.new_empty((replicas, height)), mean.new_empty((replicas, height, latents))
        cumulated = torch.empty_like(weights, dtype=torch.int64)
        counts = (n, height, rows.start, num_samples, draws.first_row, draws.repetition, draws.stream)
        with gpu.device_of(x):
            gpu.launch(
                choose_kernel, (replicas * height,), draws.seed, draws.replicas, mean, log_scale, weights,
                uniforms(rows).contiguous(), cumulated, pivots, centres, z, log_density, *counts, count,
                num_samples.bit_length(), latents, STEP=STEP, DRAWS=DRAWS, LATENTS=triton.next_power_of_2(latents),
                num_warps=4, **limit,
            )  # fmt: skip
            if latents > WIDEST:
                moments = wide_moments(*here, own, weights, pivots, centres)
                posterior_mean[:, rows], covariance[:, rows] = moments
                continue
            # A thread has four samples where their moments leave registers.
            gpu.launch(
                moments_kernel, (replicas * height,), draws.seed, draws.replicas, mean, log_scale, weights, pivots, centres,
                posterior_mean, covariance, *counts, L=latents, SAMPLES=512 if latents <= 3 else 128, num_warps=4,
            )  # fmt: skip
    return log_likelihood, effective, top, posterior_mean, covariance, z, log_density
