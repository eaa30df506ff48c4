r"""Chains of reference.py in Triton for narrow decoders (those of ../importance/gpu_narrow.py): all transitions in one launch.

    a_j = b_j + sum_l W_jl z_l   h_j = act(a_j)   o_d = c_d + sum_j V_dj h_j   J_dl = d o_d / d z_l = sum_j V_dj act'(a_j) W_jl

A lane has a chain, from the first transition to the last, in registers; lanes run through the chains of all rows of a
replica, so rows with few chains share a program. J is accumulated along with o: nothing is stored, no unit is seen twice. With
A instructions for an activation and its slope that is 2 L + D + L D + A a unit; going back through the units would be
3 L + 2 D + 2 A, less only where L D > L + D + A: never for tanh and L + D <= 7, by 3% for 4-4, by more for a wide relu.

2-50(tanh)-2 takes 16.5 instructions a unit, 1.5 of them special functions (12 cycles of their own pipe), and 2.5 loads, which
the chains of a thread share: a pair of units comes as one 64-bit word a parameter. With what a leapfrog (70) and a transition
(360) take besides, 1015 a leapfrog where there are 8 of them and two chains a thread: at most 3.0e10 leapfrogs a second of an
H200's 528 schedulers at 1.8 GHz.

The units are added up in two halves. With few chains a card would be half empty: there two lanes share a chain, each takes a
half, and both go through the rest side by side. So neither that nor a program's size moves a bit: a chain's numbers depend on
its own counters alone.

log pi is held without its constants, which what is kept gets back: they would only cost digits of the energy's change.
"""
# mypy: disable-error-code="assignment, misc, var-annotated"
# In Triton's language a loop that is unrolled may grow a tuple.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu, tuning
from libi_fast.kernels.chains import reference
from libi_fast.kernels.chains.reference import Noise, Result, Settings
from libi_fast.kernels.importance import gpu_narrow
from libi_fast.kernels.importance.gpu_formulas import (
    LOG_2PI,
    activation,
    activation_slope,
    exp,
    log_prob,
    to_output,
)
from libi_fast.kernels.importance.gpu_narrow import activations_of, variances_of
from libi_fast.kernels.importance.gpu_narrow import step as step_of
from libi_fast.kernels.importance.reference import Decoder
from libi_fast.kernels.random.gpu import log_unit, normals4, uniform4

GAMMA, T0, KAPPA = tl.constexpr(reference.GAMMA), tl.constexpr(reference.T0), tl.constexpr(reference.KAPPA)
DIVERGENCE = tl.constexpr(reference.DIVERGENCE)
LN_2 = tl.constexpr(0.6931471805599453)
FEW, MANY = 2**15, 2**18  # chains: fewer have two lanes each, more share a thread
CHEAP = ("logistic", "relu", "leaky_relu")  # activations


def refusal(decoder: Decoder) -> str | None:
    """Why this kernel does not take the decoder, or None."""
    if gpu_narrow.takes(decoder):
        return None
    return (
        "it takes decoders with at most one hidden layer and at most "
        f"{gpu_narrow.WIDEST} latents and outputs together, got {'-'.join(map(str, decoder.widths))}"
    )


# --- the decoder at blocks [BLOCK, LANES], a chain in each row ---


@triton.jit
def two_of(pointer):
    """A parameter of both units of a pair."""
    word = tl.load(pointer)
    return word.to(tl.int32).to(tl.float32, bitcast=True), (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def add_pair(sums, z, at, L: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr, GRADIENT: tl.constexpr):
    """Two units' share of o_d and, after these, of J_dl; a logistic unit's J counts in units of ln 2 (gpu_narrow.pack)."""
    a0, a1 = two_of(at + L)
    first = ()
    second = ()
    for l in tl.static_range(L):
        w0, w1 = two_of(at + l)
        a0 = a0 + w0 * z[l]
        a1 = a1 + w1 * z[l]
        first = first + (w0,)
        second = second + (w1,)
    h0, h1 = activations_of(a0, a1, ACTIVATION)
    if ACTIVATION == "logistic":
        s0 = h0 * h0 - h0
        s1 = h1 * h1 - h1
    else:
        s0 = activation_slope(a0, h0, ACTIVATION)
        s1 = activation_slope(a1, h1, ACTIVATION)
    outputs = ()
    jacobian = ()
    for d in tl.static_range(D):
        v0, v1 = two_of(at + (L + 1 + d))
        outputs = outputs + (sums[d] + v0 * h0 + v1 * h1,)
        if GRADIENT:
            for l in tl.static_range(L):
                jacobian = jacobian + (sums[D + d * L + l] + v0 * (first[l] * s0) + v1 * (second[l] * s1),)
    return outputs + jacobian


@triton.jit
def zeros_of(COUNT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.zeros((BLOCK, LANES), tl.float32),)
    return values


@triton.jit
def add(values, more, COUNT: tl.constexpr):
    sums = ()
    for i in tl.static_range(COUNT):
        sums = sums + (values[i] + more[i],)
    return sums


@triton.jit
def decode(
    z, table, bias, L: tl.constexpr, D: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """o_d before the output's activation and, with GRADIENT, J_dl after them. ``table``: where a lane's units begin."""
    COUNT: tl.constexpr = D + (D * L if GRADIENT else 0)
    HALF: tl.constexpr = (STEPS + 1) // 2
    WORDS: tl.constexpr = L + 1 + D
    total = zeros_of(COUNT, BLOCK, LANES)
    if STEPS == 0:  # no hidden layer
        sums = ()
        for d in tl.static_range(D):
            o = total[d]
            for l in tl.static_range(L):
                o += tl.load(table + d * L + l) * z[l]
            sums = sums + (o,)
        if GRADIENT:
            for i in tl.static_range(D * L):
                sums = sums + (total[D + i] + tl.load(table + i),)
        total = sums
    else:
        for half in range(0, 2 // LANES):
            part = zeros_of(COUNT, BLOCK, LANES)
            steps = HALF if LANES == 2 else tl.minimum(HALF, STEPS - half * HALF)
            for step in range(0, steps):
                for u in tl.static_range(UNROLL):
                    at = table + ((half * HALF + step) * UNROLL + u) * WORDS
                    part = add_pair(part, z, at, L, D, ACTIVATION, GRADIENT)
            total = add(total, part, COUNT)
        if LANES == 2:
            sums = ()
            for i in tl.static_range(COUNT):
                sums = sums + (tl.broadcast_to(tl.sum(total[i], 1)[:, None], (BLOCK, LANES)),)
            total = sums
    sums = ()
    for i in tl.static_range(COUNT):
        sums = sums + (total[i] + tl.load(bias + i) if i < D else total[i],)
    return sums


@triton.jit
def gradient_of(
    sums, z, x, precisions, L: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
):  # fmt: skip
    """Of log pi, from `decode`'s sums."""
    delta = ()
    for d in tl.static_range(D):
        o = activation(sums[d], OUTPUT)
        delta = delta + (to_output(x[d], o, precisions[d], LIKELIHOOD) * activation_slope(sums[d], o, OUTPUT),)
    gradient = ()
    for l in tl.static_range(L):
        slope = delta[0] * sums[D + l]
        for d in tl.static_range(1, D):
            slope += delta[d] * sums[D + d * L + l]
        gradient = gradient + (slope * LN_2 - z[l] if ACTIVATION == "logistic" else slope - z[l],)
    return gradient


@triton.jit
def log_density_of(
    sums, z, x, precisions, L: tl.constexpr, D: tl.constexpr, OUTPUT: tl.constexpr, LIKELIHOOD: tl.constexpr
):  # fmt: skip
    """log pi without its constants."""
    value = log_prob(x[0], activation(sums[0], OUTPUT), precisions[0], LIKELIHOOD)
    for d in tl.static_range(1, D):
        value += log_prob(x[d], activation(sums[d], OUTPUT), precisions[d], LIKELIHOOD)
    return value - 0.5 * squares_of(z, L)


@triton.jit
def squares_of(values, COUNT: tl.constexpr):
    total = values[0] * values[0]
    for i in tl.static_range(1, COUNT):
        total += values[i] * values[i]
    return total


# --- the chains ---


@triton.jit
def chains_of(rows, chains, first_row, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Of a program's lanes [BLOCK, LANES] the replica, row and place among all chains, which part of a chain they have, whether
    they write, and the counters of row and chain."""
    program = tl.cast(tl.program_id(0), tl.int64)
    size = tl.cast(rows, tl.int64) * chains
    blocks = tl.cdiv(size, BLOCK)
    replica = program // blocks
    # Of full shape at once: one that is broadcast later would have a layout of its own, and compile for long.
    slot = tl.reshape(tl.arange(0, BLOCK * LANES), (BLOCK, LANES))
    lane = slot % LANES
    own = program % blocks * BLOCK + slot // LANES
    valid = (own < size) & (lane == 0)
    own = tl.minimum(own, size - 1)  # lanes beyond repeat the last chain
    row = own // chains
    number = (own - row * chains).to(tl.uint32)
    counter = (first_row + row).to(tl.uint32)
    own += replica * size
    return replica, row, own, lane, valid, counter, number


@triton.jit
def uniforms_of(key, counter, number, use, time, fresh, v0, v1, v2, v3):
    """log v' and v of a transition, and the counter's four draws that they come from, made where the sequence enters them."""
    if (time % 2 == 0) | fresh:
        block = (time // 2).to(tl.uint32) + 0 * number
        v0, v1, v2, v3 = uniform4(key, counter, block, number, use)
    even = time % 2 == 0
    return log_unit(tl.where(even, v0, v2)), tl.where(even, v1, v3), v0, v1, v2, v3


@triton.jit
def momenta_of(key, counter, number, use, time, fresh, n0, n1, n2, n3, L: tl.constexpr):
    """The L normals of a transition and, after them, the last four draws that they come from."""
    u = ()
    for l in tl.static_range(L):
        i = time * L + l
        if (i % 4 == 0) | (fresh & (l == 0)):
            block = (i // 4).to(tl.uint32) + 0 * number
            n0, n1, n2, n3 = normals4(key, counter, block, number, use)
        u = u + (tl.where(i % 4 < 2, tl.where(i % 4 == 0, n0, n1), tl.where(i % 4 == 2, n2, n3)),)
    return u + (n0, n1, n2, n3)


# Sizes and counters change from call to call, and nothing is gained by a kernel compiled for a multiple of 16 of them.
COUNTS = (
    "rows", "chains", "kept", "transitions", "leapfrogs", "thinning", "first_transition", "first_row", "momentum_stream",
    "acceptance_stream", "x_step", "table_step", "bias_step", "variance_step",
)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def chains_kernel(
    seed, replicas, x, z_start, step_start, log_scale, table, bias, variance, draws, densities, step_out, acceptance,
    divergences, rows, chains, kept, transitions, leapfrogs, thinning, jitter, target, first_transition, first_row,
    momentum_stream, acceptance_stream, x_step, table_step, bias_step, variance_step,
    L: tl.constexpr, D: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr, LIKELIHOOD: tl.constexpr, WALK: tl.constexpr, ADAPT: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """BLOCK chains of one replica, LANES lanes each; arrays as in reference.run, ``divergences`` int32."""
    replica, row, own, lane, valid, counter, number = chains_of(rows, chains, first_row, BLOCK, LANES)

    key = tl.load(seed)
    use = 256 * tl.load(replicas + replica)
    momentum_use = (momentum_stream + use).to(tl.uint32)
    acceptance_use = (acceptance_stream + use).to(tl.uint32)
    table += replica * table_step
    if LANES == 2 and STEPS > 0:
        table += lane * ((STEPS + 1) // 2 * UNROLL * (L + 1 + D))
    bias += replica * bias_step
    precisions, constant = variances_of(variance + replica * variance_step, D, LIKELIHOOD)
    constant -= 0.5 * L * LOG_2PI
    x_d = ()
    for d in tl.static_range(D):
        x_d = x_d + (tl.load(x + replica * x_step + row * D + d),)
    z = ()
    scale = ()
    for l in tl.static_range(L):
        z = z + (tl.load(z_start + own * L + l),)
        scale = scale + (exp(tl.load(log_scale + (replica * rows + row) * L + l)),)

    eps = tl.load(step_start + own)
    if ADAPT:
        mu = tl.log(10.0 * eps)
        averaged = tl.log(eps)
        missed = tl.zeros((BLOCK, LANES), tl.float32)
    value = tl.zeros((BLOCK, LANES), tl.float32)
    gradient = ()
    if not WALK:
        gradient = zeros_of(L, BLOCK, LANES)
    accepted = tl.zeros((BLOCK, LANES), tl.float64)
    diverged = tl.zeros((BLOCK, LANES), tl.int32)
    # The counters' last four draws, each used once.
    n0, n1, n2, n3 = zeros_of(4, BLOCK, LANES)
    v0, v1, v2, v3 = zeros_of(4, BLOCK, LANES)
    # Transition -1 takes one step of length 0, and takes it always: so the start is evaluated by the code of all others.
    for t in range(-1, transitions):
        time = (tl.cast(first_transition, tl.int64) + t).to(tl.uint64)
        log_v, w, v0, v1, v2, v3 = uniforms_of(key, counter, number, acceptance_use, time, t < 0, v0, v1, v2, v3)
        jittered = eps * (1.0 + jitter * (2.0 * w - 1.0))
        drawn = momenta_of(key, counter, number, momentum_use, time, t < 0, n0, n1, n2, n3, L)
        n0, n1, n2, n3 = drawn[L], drawn[L + 1], drawn[L + 2], drawn[L + 3]
        u = ()
        h = ()
        for l in tl.static_range(L):
            u = u + (drawn[l],)
            h = h + (tl.where(t < 0, 0.0, jittered * scale[l]),)

        # A proposal, and what log pi + kinetic energy loses by it.
        if WALK:
            moved = ()
            for l in tl.static_range(L):
                moved = moved + (z[l] + h[l] * u[l],)
            sums = decode(moved, table, bias, L, D, STEPS, UNROLL, ACTIVATION, False, BLOCK, LANES)
            new_value = log_density_of(sums, moved, x_d, precisions, L, D, OUTPUT, LIKELIHOOD)
            slope = ()
            gain = new_value - value
        else:
            before = squares_of(u, L)
            moved = z
            slope = gradient
            kicked = ()
            for l in tl.static_range(L):
                kicked = kicked + (u[l] + 0.5 * h[l] * gradient[l],)
            u = kicked
            sums = zeros_of(D + D * L, BLOCK, LANES)
            steps = tl.where(t < 0, 1, leapfrogs)
            for k in range(0, steps):
                there = ()
                for l in tl.static_range(L):
                    there = there + (moved[l] + h[l] * u[l],)
                moved = there
                sums = decode(moved, table, bias, L, D, STEPS, UNROLL, ACTIVATION, True, BLOCK, LANES)
                slope = gradient_of(sums, moved, x_d, precisions, L, D, ACTIVATION, OUTPUT, LIKELIHOOD)
                part = tl.where(k + 1 < steps, 1.0, 0.5)
                kicked = ()
                for l in tl.static_range(L):
                    kicked = kicked + (u[l] + part * h[l] * slope[l],)
                u = kicked
            new_value = log_density_of(sums, moved, x_d, precisions, L, D, OUTPUT, LIKELIHOOD)
            gain = (new_value - value) - 0.5 * (squares_of(u, L) - before)

        accept = (log_v < gain) | (t < 0)  # never where gain is not a number
        value = tl.where(accept, new_value, value)
        new_z = ()
        new_gradient = ()
        for l in tl.static_range(L):
            new_z = new_z + (tl.where(accept, moved[l], z[l]),)
            if not WALK:
                new_gradient = new_gradient + (tl.where(accept, slope[l], gradient[l]),)
        z = new_z
        gradient = new_gradient
        if t >= 0:
            probability = tl.where(gain == gain, exp(tl.minimum(gain, 0.0)), 0.0)
            accepted += probability.to(tl.float64)
            diverged += tl.where(gain >= -DIVERGENCE, 0, 1)
            if ADAPT:
                count = tl.cast(t + 1, tl.float32)
                rate = 1.0 / (count + T0)
                weight = tl.exp2(tl.log2(count) * -KAPPA)
                missed = (1.0 - rate) * missed + rate * (target - probability)
                log_step = mu - tl.sqrt(count) / GAMMA * missed
                averaged = weight * log_step + (1.0 - weight) * averaged
                eps = exp(log_step)
            if (t + 1) % thinning == 0:
                place = own * kept + t // thinning
                tl.store(densities + place, value + constant, mask=valid)
                for l in tl.static_range(L):
                    tl.store(draws + place * L + l, z[l], mask=valid)

    if ADAPT:
        eps = exp(averaged)
    tl.store(step_out + own, eps, mask=valid)
    tl.store(acceptance + own, (accepted / tl.maximum(transitions, 1)).to(tl.float32), mask=valid)
    tl.store(divergences + own, diverged, mask=valid)


class Paired(NamedTuple):
    """table: gpu_narrow.pack's, the two units of a pair side by side in words of 64 bits, [R or 1, pairs, L + 1 + D]; float32
    [R or 1, D, L] without a hidden layer. A lane that has the second half of the steps reads as many as the first has."""

    table: Tensor
    steps: int


def pair(packed: gpu_narrow.Packed) -> Paired:
    if not packed.hidden:
        return Paired(packed.table, 0)
    steps = packed.hidden // (2 * packed.unroll)
    padding = steps % 2 * 2 * packed.unroll
    table = torch.nn.functional.pad(packed.table, (0, 0, 0, padding))
    table = table.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
    return Paired(table.view(torch.int64)[..., 0], steps)


def candidates(chains: int, values: int, activation: str) -> list[tuning.Configuration]:
    """(warps, chains or halves of chains a thread, lanes of a chain); the first is the fixed choice."""
    if chains < FEW:
        fixed = (1, 1, 2)
    else:  # two chains of a thread share its loads, where these count and registers are left
        fixed = (1, 2 if chains >= MANY and values <= 4 and activation in CHEAP else 1, 1)
    others = [(1, 1, 1), (1, 2, 1), (4, 1, 1), (4, 2, 1), (1, 1, 2)]
    return [{"warps": w, "per_thread": p, "lanes": n} for w, p, n in dict.fromkeys((fixed, *others))]


class Prepared(NamedTuple):
    """What a kernel of chains needs of a call's data and decoder."""

    tensors: tuple[Tensor, Tensor, Tensor]  # table, bias, variance
    steps: tuple[int, ...]  # from one replica to the next, of x and of these
    options: dict[str, Any]


def prepare(x: Tensor, decoder: Decoder) -> Prepared:
    outputs, latent_dim = x.shape[-1], decoder.weights[0].shape[-1]
    packed = gpu_narrow.pack(decoder)
    table, steps = pair(packed)
    variance = decoder.variance.expand(-1, outputs if decoder.likelihood == "gaussian" else -1).contiguous()
    tensors = table, packed.bias, variance
    options = {
        "L": latent_dim, "D": outputs, "STEPS": steps, "UNROLL": packed.unroll, "ACTIVATION": packed.activation,
        "OUTPUT": decoder.activations[-1], "LIKELIHOOD": decoder.likelihood,
    }  # fmt: skip
    return Prepared(tensors, (step_of(x), *map(step_of, tensors)), options)


def choose(
    kernel: str, decoder: Decoder, prepared: Prepared, chains: int, launch: Callable[[tuning.Configuration], None],
    **problem: Any,
) -> tuning.Configuration:  # fmt: skip
    """The configuration for so many chains; ``problem``: what else it may depend on."""
    known = {
        "widths": "-".join(map(str, decoder.widths)), "activations": "-".join(decoder.activations),
        "likelihood": decoder.likelihood, **problem, "chains": chains,
    }  # fmt: skip
    options = prepared.options
    return tuning.choose(kernel, known, candidates(chains, options["L"] + options["D"], options["ACTIVATION"]), launch)


def block_of(configuration: tuning.Configuration) -> int:
    """Chains of a program."""
    lanes = (64 if gpu.amd() else 32) * configuration["warps"]
    return lanes * configuration["per_thread"] // configuration["lanes"]


def run(
    x: Tensor, z: Tensor, step: Tensor, log_scale: Tensor, decoder: Decoder, noise: Noise, settings: Settings
) -> Result:  # fmt: skip
    """As ``kernels.chains.reference.run`` on its ``log_joint``; x [R or 1, N, D], float32."""
    replicas, rows, chains, latent_dim = z.shape
    result = Result(
        z.new_empty((replicas, rows, chains, settings.kept, latent_dim)),
        z.new_empty((replicas, rows, chains, settings.kept)),
        z.new_empty((replicas, rows, chains)),
        z.new_empty((replicas, rows, chains)),
        torch.empty((replicas, rows, chains), dtype=torch.int32, device=z.device),
    )
    if not step.numel():
        return result._replace(divergences=result.divergences.long())
    x, z, step, log_scale = x.contiguous(), z.contiguous(), step.contiguous(), log_scale.contiguous()
    prepared = prepare(x, decoder)

    def launch(configuration: tuning.Configuration) -> None:
        block, lanes = block_of(configuration), configuration["lanes"]
        gpu.launch(
            chains_kernel, (replicas * triton.cdiv(rows * chains, block),),
            noise.seed, noise.replicas, x, z, step, log_scale, *prepared.tensors, *result,
            rows, chains, settings.kept, settings.transitions, settings.steps, settings.thinning,
            float(settings.jitter), float(settings.target), settings.first_transition, settings.first_row, *noise.streams,
            *prepared.steps, **prepared.options, WALK=settings.method == "random-walk", ADAPT=settings.target > 0, BLOCK=block,
            LANES=lanes, num_warps=configuration["warps"],
        )  # fmt: skip

    with gpu.device_of(x):
        adapts = settings.target > 0
        launch(choose("chains", decoder, prepared, step.numel(), launch, method=settings.method, adapt=adapts))
    return result._replace(divergences=result.divergences.long())
