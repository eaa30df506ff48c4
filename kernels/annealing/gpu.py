r"""Annealed importance sampling of reference.py in Triton for narrow decoders: a chain's whole path in one launch.

A lane has a chain, and half of it where chains are few, as in ../chains/gpu.py, whose decoder and random numbers these are.
log p(x, z) and its gradient stay in registers between temperatures, so that one costs its leapfrogs and a tenth: two of q's
densities, and its row's step size and scales from memory. A leapfrog costs q's slope and two products with S more than there,
4 L + L (L + 1) instructions beside about a thousand.
"""
# mypy: disable-error-code="assignment, var-annotated"
# In Triton's language a loop that is unrolled may grow a tuple.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu, tuning
from libi_fast.kernels.annealing.reference import Result, Settings
from libi_fast.kernels.chains.gpu import (
    block_of,
    chains_of,
    choose,
    decode,
    gradient_of,
    log_density_of,
    momenta_of,
    prepare,
    squares_of,
    uniforms_of,
    zeros_of,
)
from libi_fast.kernels.chains.reference import Noise
from libi_fast.kernels.importance.gpu_formulas import exp
from libi_fast.kernels.importance.gpu_narrow import variances_of
from libi_fast.kernels.importance.reference import Decoder


@triton.jit
def standardised(z, mean, inverse, L: tl.constexpr):
    """(z - mean) / scale of q."""
    values = ()
    for l in tl.static_range(L):
        values = values + ((z[l] - mean[l]) * inverse[l],)
    return values


@triton.jit
def triangle_of(pointer, L: tl.constexpr):
    """S, row after row of what is not above its diagonal."""
    values = ()
    for l in tl.static_range(L):
        for k in tl.static_range(l + 1):
            values = values + (tl.load(pointer + l * L + k),)
    return values


@triton.jit
def kick(u, h, slope, z, mean, inverse, b, triangle, L: tl.constexpr):
    """u + h S' times the gradient of log f_b; slope: of log p(x, z)."""
    pull = ()
    for l in tl.static_range(L):
        of_q = (mean[l] - z[l]) * (inverse[l] * inverse[l])
        pull = pull + (b * slope[l] + (1.0 - b) * of_q,)
    kicked = ()
    for l in tl.static_range(L):
        total = triangle[l * (l + 1) // 2 + l] * pull[l]
        for k in tl.static_range(l + 1, L):
            total += triangle[k * (k + 1) // 2 + l] * pull[k]
        kicked = kicked + (u[l] + h * total,)
    return kicked


@triton.jit
def move(z, h, u, triangle, L: tl.constexpr):
    """z + h S u."""
    moved = ()
    for l in tl.static_range(L):
        total = triangle[l * (l + 1) // 2] * u[0]
        for k in tl.static_range(1, l + 1):
            total += triangle[l * (l + 1) // 2 + k] * u[k]
        moved = moved + (z[l] + h * total,)
    return moved


# Sizes and counters change from call to call, and nothing is gained by a kernel compiled for a multiple of 16 of them.
COUNTS = (
    "rows", "chains", "temperatures", "windows", "leapfrogs", "first_transition", "first_row", "momentum_stream",
    "acceptance_stream", "x_step", "table_step", "bias_step", "variance_step",
)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def annealing_kernel(
    seed, replicas, x, z_start, betas, step, scale_tril, mean, log_scale, table, bias, variance, last, log_weights, acceptance,
    steps_out, path, rows, chains, temperatures, windows, leapfrogs, jitter, rate, target, first_transition, first_row,
    momentum_stream, acceptance_stream, x_step, table_step, bias_step, variance_step,
    L: tl.constexpr, D: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr, LIKELIHOOD: tl.constexpr, ADAPT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """BLOCK chains of one replica, LANES lanes each; arrays as in reference.run."""
    replica, row, own, lane, valid, counter, number = chains_of(rows, chains, first_row, BLOCK, LANES)
    line = replica * rows + row

    key = tl.load(seed)
    use = 256 * tl.load(replicas + replica)
    momentum_use = (momentum_stream + use).to(tl.uint32)
    acceptance_use = (acceptance_stream + use).to(tl.uint32)
    betas += replica * (temperatures + 1)
    table += replica * table_step
    if LANES == 2 and STEPS > 0:
        table += lane * ((STEPS + 1) // 2 * UNROLL * (L + 1 + D))
    bias += replica * bias_step
    precisions, of_joint = variances_of(variance + replica * variance_step, D, LIKELIHOOD)
    constant = of_joint + tl.zeros((BLOCK, LANES), tl.float32)  # of log p(x, z) - log q(z)
    x_d = ()
    for d in tl.static_range(D):
        x_d = x_d + (tl.load(x + replica * x_step + row * D + d),)
    z = ()
    centre = ()
    inverse = ()
    for l in tl.static_range(L):
        z = z + (tl.load(z_start + own * L + l),)
        centre = centre + (tl.load(mean + line * L + l),)
        log_s = tl.load(log_scale + line * L + l)
        constant += log_s
        inverse = inverse + (exp(-log_s),)

    offset = tl.zeros((BLOCK, LANES), tl.float32)  # of the log of the step size
    value = tl.zeros((BLOCK, LANES), tl.float32)  # of log p(x, z) without its constants, where the chain stands
    slope = zeros_of(L, BLOCK, LANES)
    log_weight = tl.zeros((BLOCK, LANES), tl.float64)
    accepted = tl.zeros((BLOCK, LANES), tl.float32)
    n0, n1, n2, n3 = zeros_of(4, BLOCK, LANES)
    v0, v1, v2, v3 = zeros_of(4, BLOCK, LANES)
    # Transition -1 takes one step of length 0, and takes it always: so the start is evaluated by the code of all others.
    for t in range(-1, temperatures):
        time = (tl.cast(first_transition, tl.int64) + t).to(tl.uint64)
        log_v, w, v0, v1, v2, v3 = uniforms_of(key, counter, number, acceptance_use, time, t < 0, v0, v1, v2, v3)
        drawn = momenta_of(key, counter, number, momentum_use, time, t < 0, n0, n1, n2, n3, L)
        n0, n1, n2, n3 = drawn[L], drawn[L + 1], drawn[L + 2], drawn[L + 3]
        now = tl.maximum(t, 0)
        eps = tl.load(step + line * temperatures + now)
        if ADAPT:
            eps *= exp(offset)
        h = tl.where(t < 0, 0.0, eps * (1.0 + jitter * (2.0 * w - 1.0)))
        triangle = triangle_of(scale_tril + (line * windows + tl.cast(now, tl.int64) * windows // temperatures) * (L * L), L)
        u = ()
        for l in tl.static_range(L):
            u = u + (drawn[l],)

        before, after = tl.load(betas + now), tl.load(betas + now + 1)
        b = after.to(tl.float32)
        of_q = -0.5 * squares_of(standardised(z, centre, inverse, L), L)
        log_weight += tl.where(t < 0, 0.0, (after - before) * (value - of_q + constant).to(tl.float64))
        energy = 0.5 * squares_of(u, L) - (b * value + (1.0 - b) * of_q)
        moved = z
        there = slope
        u = kick(u, 0.5 * h, there, moved, centre, inverse, b, triangle, L)
        sums = zeros_of(D + D * L, BLOCK, LANES)
        steps = tl.where(t < 0, 1, leapfrogs)
        for k in range(0, steps):
            moved = move(moved, h, u, triangle, L)
            sums = decode(moved, table, bias, L, D, STEPS, UNROLL, ACTIVATION, True, BLOCK, LANES)
            there = gradient_of(sums, moved, x_d, precisions, L, D, ACTIVATION, OUTPUT, LIKELIHOOD)
            u = kick(u, tl.where(k + 1 < steps, h, 0.5 * h), there, moved, centre, inverse, b, triangle, L)
        new_value = log_density_of(sums, moved, x_d, precisions, L, D, OUTPUT, LIKELIHOOD)
        of_q = -0.5 * squares_of(standardised(moved, centre, inverse, L), L)
        gain = energy - (0.5 * squares_of(u, L) - (b * new_value + (1.0 - b) * of_q))

        accept = (log_v < gain) | (t < 0)  # never where gain is not a number
        value = tl.where(accept, new_value, value)
        new_z = ()
        new_slope = ()
        for l in tl.static_range(L):
            new_z = new_z + (tl.where(accept, moved[l], z[l]),)
            new_slope = new_slope + (tl.where(accept, there[l], slope[l]),)
        z = new_z
        slope = new_slope
        if t >= 0:
            probability = tl.where(gain == gain, exp(tl.minimum(gain, 0.0)), 0.0)
            accepted += probability
            if ADAPT:
                tl.store(steps_out + own * temperatures + t, eps, mask=valid)
                for l in tl.static_range(L):
                    tl.store(path + (own * temperatures + t) * L + l, z[l], mask=valid)
                offset += rate * (probability - target)

    for l in tl.static_range(L):
        tl.store(last + own * L + l, z[l], mask=valid)
    tl.store(log_weights + own, log_weight.to(tl.float32), mask=valid)
    tl.store(acceptance + own, accepted / temperatures, mask=valid)


def run(
    x: Tensor, z: Tensor, betas: Tensor, step: Tensor, scale_tril: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder,
    noise: Noise, settings: Settings,
) -> Result:  # fmt: skip
    """As ``kernels.annealing.reference.run`` on chains' ``log_joint``; float32 but for betas."""
    replicas, rows, chains, latent_dim = z.shape
    temperatures = betas.shape[-1] - 1
    adapts = settings.rate > 0
    told = (*z.shape[:3], temperatures if adapts else 0)
    result = Result(
        z.new_empty(z.shape), z.new_empty(z.shape[:3]), z.new_empty(z.shape[:3]), z.new_empty(told),
        z.new_empty((*told, latent_dim)),
    )  # fmt: skip
    if not result.log_weights.numel():
        return result
    x, z, step, scale_tril, mean, log_scale = (t.contiguous() for t in (x, z, step, scale_tril, mean, log_scale))
    betas = betas.to(x.device).expand(replicas, -1).contiguous()
    prepared = prepare(x, decoder)
    # Left to itself, an assembler for sm_100 gives a pilot run 96 registers, for more programs at a time, and spills.
    limit = {"maxnreg": 255} if adapts and not gpu.amd() else {}

    def launch(configuration: tuning.Configuration) -> None:
        block, lanes = block_of(configuration), configuration["lanes"]
        gpu.launch(
            annealing_kernel, (replicas * triton.cdiv(rows * chains, block),),
            noise.seed, noise.replicas, x, z, betas, step, scale_tril, mean, log_scale, *prepared.tensors, *result,
            rows, chains, temperatures, scale_tril.shape[2], settings.leapfrogs, float(settings.jitter), float(settings.rate),
            float(settings.target), settings.first_transition, settings.first_row, *noise.streams,
            *prepared.steps, **prepared.options, ADAPT=adapts, BLOCK=block, LANES=lanes, num_warps=configuration["warps"],
            **limit,
        )  # fmt: skip

    with gpu.device_of(x):
        launch(choose("annealing", decoder, prepared, result.log_weights.numel(), launch, adapt=adapts))
    return result
