r"""Decoders with at most one hidden layer and at most 8 latents and outputs together: a sample stays in registers.

    a_j = b_j + sum_l W_jl z_l      h_j = act(a_j)      o_d = c_d + sum_j V_dj h_j          (o = c + V z without a hidden layer)

A block holds [rows, samples] and loops over hidden units, whose parameters it loads as scalars. tanh and sigmoid are affine in
h = 1 / (1 + 2^a) once scales are folded into the parameters (`pack`), and two units share one reciprocal:
1/y = y' rsqrt(y y')^2. That leaves L + D FMA and 1.5 special-function instructions a sample and unit.

Forward cuts samples into spans of fixed length, whose sums are merged in order. Backward recomputes a sample's values, reduces
the parameters' gradients over a block, and adds them to accumulators that a program keeps for all its blocks; the number of
programs depends on shapes alone. So results do not depend on the card, and no two programs add to one address.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu, tuning
from libi_fast.kernels.importance.gpu_formulas import (
    activation,
    activation_slope,
    exp,
    log_constant,
    log_prob,
    merge,
    prior_over_proposal,
    proposal_path,
    to_data,
    to_output,
    to_variance,
)
from libi_fast.kernels.importance.reference import Decoder, Draws
from libi_fast.kernels.random.gpu import log_unit, normals4

WIDEST = 8  # latents and outputs together: backward reduces as many sums for every hidden unit
ACCUMULATORS = 4096  # gradients of the hidden layer that a program can keep
SHORTEST = 2048  # samples of a span
SPANS = 64  # of a row at most: what is kept of a row does not grow with its samples
PROGRAMS = 4096  # of backward, shared by the replicas
SLAB = 2**24  # log-weights held at once where they are asked for


def takes(decoder: Decoder) -> bool:
    """Whether these kernels serve the decoder; the rule looks at its shape alone."""
    latent_dim, outputs = decoder.weights[0].shape[-1], decoder.weights[-1].shape[-2]
    if len(decoder.weights) > 2 or latent_dim + outputs > WIDEST:
        return False
    hidden = decoder.weights[0].shape[-2] if len(decoder.weights) == 2 else 0
    return hidden == 0 or triton.next_power_of_2(hidden) * (latent_dim + 1 + outputs) <= ACCUMULATORS


Keep = Callable[[slice, slice, int, Tensor], None]
"""(replicas, rows, first sample, their log-weights [R, rows, samples])"""

# --- parameters in the order in which the kernels read them ---

LOG2_E = 1.4426950408889634
# act(a) = shift + out h with h = 1 / (1 + 2^(in a)): (in, out, shift)
LOGISTIC = {"tanh": (2 * LOG2_E, -2.0, 1.0), "sigmoid": (-LOG2_E, 1.0, 0.0)}


class Packed(NamedTuple):
    """table [R or 1, units, L + 1 + D]: W_j, b_j, V_.j of each hidden unit, or [R or 1, D, L] without a hidden layer;
    bias [R or 1, D]; hidden: units with padding, 0 without a hidden layer; unroll divides hidden / 2."""

    table: Tensor
    bias: Tensor
    hidden: int
    unroll: int
    activation: str


def _common(*tensors: Tensor) -> list[Tensor]:
    replicas = max(t.shape[0] for t in tensors)
    return [t.expand(replicas, *t.shape[1:]) for t in tensors]


def pack(decoder: Decoder) -> Packed:
    """Units are padded with zeros to a whole number of loop steps."""
    biases = [w.new_zeros(1, w.shape[1]) if b is None else b for w, b in zip(decoder.weights, decoder.biases, strict=True)]
    if len(decoder.weights) == 1:
        weight, bias = _common(decoder.weights[0], biases[0])
        return Packed(weight.contiguous(), bias.contiguous(), 0, 1, "identity")
    first, last, b, c = _common(*decoder.weights, *biases)
    name = decoder.activations[0]
    table = torch.cat((first, b[..., None], last.mT), -1)
    if name in LOGISTIC:
        inner, outer, shift = LOGISTIC[name]
        c = c + shift * last.sum(-1)
        table = table * _column_scales(table, last.shape[1], inner, outer)
        name = "logistic"
    units = table.shape[1]
    unroll = min((5, 4, 3, 2, 1), key=lambda u: (-units % (2 * u), -u))  # least padding, then longest
    padding = -units % (2 * unroll)
    table = torch.nn.functional.pad(table, (0, 0, 0, padding)) if padding else table.contiguous()
    return Packed(table, c.contiguous(), units + padding, unroll, name)


def _column_scales(table: Tensor, outputs: int, inner: float, outer: float) -> Tensor:
    """Built on the device: a copy from the host would wait for it, and cannot be captured in a graph."""
    column = torch.arange(table.shape[-1], device=table.device)
    return torch.where(column < table.shape[-1] - outputs, inner, outer).to(table.dtype)


def unpack(decoder: Decoder, packed: Packed, to_table: Tensor, to_bias: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the packed parameters -> of the decoder's: the transpose of `pack`. In ``to_table`` a logistic unit's
    pre-activation counts in units of ln 2."""
    latent_dim, outputs = decoder.weights[0].shape[-1], decoder.weights[-1].shape[-2]
    if not packed.hidden:
        return [to_table], [to_bias]
    to_table = to_table[:, : decoder.weights[0].shape[-2]]
    first, b, last = to_table.split((latent_dim, 1, outputs), -1)
    last = last.mT
    name = decoder.activations[0]
    if name in LOGISTIC:
        inner, outer, shift = LOGISTIC[name]
        first, b = inner * math.log(2) * first, inner * math.log(2) * b
        last = outer * last + shift * to_bias[..., None]
    return [first, last], [b[..., 0], to_bias]


# --- helpers on blocks [ROWS, SAMPLES] ---


@triton.jit
def noise_of(key, last, repetition, row, group, L: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr):
    """L blocks of normals. A group is the fewest samples that fill whole Philox blocks, so no word is drawn twice."""
    GROUP: tl.constexpr = 1 if L % 4 == 0 else (2 if L % 2 == 0 else 4)
    DRAWS: tl.constexpr = GROUP * L
    draws = ()
    for i in tl.static_range(DRAWS // 4):
        block = (group * (DRAWS // 4) + i).to(tl.uint32)
        draws = draws + normals4(key, row + 0 * block, block + 0 * row, repetition, last)
    noise = ()
    for l in tl.static_range(L):
        if GROUP == 1:
            eps = draws[l]
        elif GROUP == 2:
            eps = tl.join(draws[l], draws[L + l])
        else:
            eps = tl.join(tl.join(draws[l], draws[2 * L + l]), tl.join(draws[L + l], draws[3 * L + l]))
        noise = noise + (tl.reshape(eps, (ROWS, SAMPLES)),)
    return noise


@triton.jit
def activations_of(a0, a1, ACTIVATION: tl.constexpr):
    """Of a pair of units; two logistic ones share a division."""
    if ACTIVATION == "logistic":
        y0 = 1.0 + tl.exp2(tl.minimum(a0, 60.0))  # their product must not overflow
        y1 = 1.0 + tl.exp2(tl.minimum(a1, 60.0))
        root = tl.rsqrt(y0 * y1)
        reciprocal = root * root
        h0 = y1 * reciprocal
        h1 = y0 * reciprocal
    else:
        h0 = activation(a0, ACTIVATION)
        h1 = activation(a1, ACTIVATION)
    return h0, h1


@triton.jit
def units_of(z, table, j, L: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr):
    """Pre-activations and activations of the hidden units j and j + 1."""
    a0 = tl.load(table + j * (L + 1 + D) + L) + 0.0 * z[0]
    a1 = tl.load(table + (j + 1) * (L + 1 + D) + L) + 0.0 * z[0]
    for l in tl.static_range(L):
        a0 += tl.load(table + j * (L + 1 + D) + l) * z[l]
        a1 += tl.load(table + (j + 1) * (L + 1 + D) + l) * z[l]
    h0, h1 = activations_of(a0, a1, ACTIVATION)
    return a0, a1, h0, h1


@triton.jit
def decode(
    z, table, bias, L: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Outputs before the output's activation."""
    outputs = ()
    for d in tl.static_range(D):
        o = tl.load(bias + d) + 0.0 * z[0]
        if HIDDEN == 0:
            for l in tl.static_range(L):
                o += tl.load(table + d * L + l) * z[l]
        outputs = outputs + (o,)
    if HIDDEN > 0:
        for step in range(0, HIDDEN // (2 * UNROLL)):
            for u in tl.static_range(UNROLL):
                j = step * (2 * UNROLL) + 2 * u
                _, _, h0, h1 = units_of(z, table, j, L, D, ACTIVATION)
                new = ()
                for d in tl.static_range(D):
                    v0 = tl.load(table + j * (L + 1 + D) + L + 1 + d)
                    v1 = tl.load(table + (j + 1) * (L + 1 + D) + L + 1 + d)
                    new = new + (outputs[d] + v0 * h0 + v1 * h1,)
                outputs = new
    return outputs


@triton.jit
def columns_of(pointer, row, valid, COUNT: tl.constexpr):
    """COUNT blocks [ROWS, 1] of a contiguous [N, COUNT]."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(pointer + row * COUNT + i, mask=valid, other=0.0)[:, None],)
    return values


@triton.jit
def variances_of(variance, D: tl.constexpr, LIKELIHOOD: tl.constexpr):
    """1 / variance of each output, and the Gaussian's constant."""
    precisions = ()
    constant = 0.0
    for d in tl.static_range(D):
        if LIKELIHOOD == "gaussian":
            v = tl.load(variance + d)
            precisions = precisions + (1.0 / v,)
            constant += log_constant(v)
        else:
            precisions = precisions + (1.0,)
    return precisions, constant


@triton.jit
def log_weights_of(
    z, noise, x, outputs, precisions, L: tl.constexpr, D: tl.constexpr, LIKELIHOOD: tl.constexpr, OUTPUT: tl.constexpr
):  # fmt: skip
    """Without what is the same for all samples of a row."""
    log_weights = prior_over_proposal(z[0], noise[0], 0.0)
    for l in tl.static_range(1, L):
        log_weights += prior_over_proposal(z[l], noise[l], 0.0)
    for d in tl.static_range(D):
        log_weights += log_prob(x[d], activation(outputs[d], OUTPUT), precisions[d], LIKELIHOOD)
    return log_weights


# --- forward ---

# Sizes and counters change from call to call, and nothing is gained by a kernel compiled for a multiple of 16 of them.
COUNTS = ("rows", "samples", "spans", "first_row", "repetition", "stream", "replica_count")
STEPS = ("x_step", "table_step", "bias_step", "variance_step")


@triton.jit(do_not_specialize=[*COUNTS, *STEPS, "first", "slab_rows", "first_span", "slab_spans"])
def forward_kernel(
    seed, replicas, x, mean, log_scale, table, bias, variance, sums, weights,
    rows, samples, first, slab_rows, first_span, spans, slab_spans, first_row, repetition, stream,
    x_step, table_step, bias_step, variance_step, replica_count,
    L: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr,
    OUTPUT: tl.constexpr, LIKELIHOOD: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Pivot, first and second sum of one span of ROWS rows -> sums [3, spans, R, N]; with KEEP the log-weights of a slab (rows
    first .. first + slab_rows, spans first_span .. first_span + slab_spans) -> weights [R, slab_rows, slab_spans * SPAN]."""
    GROUP: tl.constexpr = 1 if L % 4 == 0 else (2 if L % 2 == 0 else 4)
    blocks = tl.cdiv(slab_rows, ROWS)
    program = tl.program_id(0)
    slab_span = program % slab_spans
    block = (program // slab_spans) % blocks
    replica = tl.cast(program // slab_spans // blocks, tl.int64)
    local = block * ROWS + tl.arange(0, ROWS)
    valid = local < slab_rows
    row = tl.cast(first + local, tl.int64)
    start = tl.cast(first_span + slab_span, tl.int64) * SPAN

    key = tl.load(seed)
    last = (stream + 256 * tl.load(replicas + replica)).to(tl.uint32)
    counter = (first_row + row).to(tl.uint32)[:, None]
    x_d = columns_of(x + replica * x_step, row, valid, D)
    mean_l = columns_of(mean + replica * rows * L, row, valid, L)
    log_scale_l = columns_of(log_scale + replica * rows * L, row, valid, L)
    precisions, constant = variances_of(variance + replica * variance_step, D, LIKELIHOOD)
    scale_l = ()
    total = constant + 0.0 * log_scale_l[0]
    for l in tl.static_range(L):
        scale_l = scale_l + (exp(log_scale_l[l]),)
        total += log_scale_l[l]
    constants = tl.reshape(total, (ROWS,))

    pivot = tl.full((ROWS,), -float("inf"), tl.float32)
    sum_1 = tl.zeros((ROWS,), tl.float32)
    sum_2 = tl.zeros((ROWS,), tl.float32)
    for step in range(0, tl.cdiv(tl.minimum(samples - start, SPAN), SAMPLES)):
        begin = start + step * SAMPLES
        group = (begin // GROUP + tl.arange(0, SAMPLES // GROUP))[None, :]
        noise = noise_of(key, last, tl.cast(repetition, tl.uint32), counter, group, L, ROWS, SAMPLES)
        z = ()
        for l in tl.static_range(L):
            z = z + (mean_l[l] + scale_l[l] * noise[l],)
        outputs = decode(z, table + replica * table_step, bias + replica * bias_step, L, D, HIDDEN, UNROLL, ACTIVATION)
        log_weights = log_weights_of(z, noise, x_d, outputs, precisions, L, D, LIKELIHOOD, OUTPUT)
        sample = begin + tl.arange(0, SAMPLES)
        log_weights = tl.where((sample < samples)[None, :], log_weights, -float("inf"))
        pivot, sum_1, sum_2 = merge(pivot, sum_1, sum_2, log_weights, 1)
        if KEEP:
            width = tl.cast(slab_spans, tl.int64) * SPAN
            line = replica * slab_rows + local.to(tl.int64)
            column = slab_span * SPAN + step * SAMPLES + tl.arange(0, SAMPLES)
            tl.store(weights + line[:, None] * width + column[None, :], log_weights + total, mask=valid[:, None])
    size = tl.cast(replica_count, tl.int64) * rows
    place = sums + tl.cast(first_span + slab_span, tl.int64) * size + replica * rows + row
    tl.store(place, pivot + constants, mask=valid)
    tl.store(place + spans * size, sum_1, mask=valid)
    tl.store(place + 2 * spans * size, sum_2, mask=valid)


@triton.jit(do_not_specialize=["size", "spans"])
def finish_kernel(sums, log_likelihood, effective, size, spans, log_samples, BLOCK: tl.constexpr):
    """Merge the spans of sums [3, spans, size] in order -> log-likelihood and effective sample size [size]."""
    place = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = place < size
    pivot = tl.full((BLOCK,), -float("inf"), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    lowest: tl.constexpr = -3.4028234663852886e38
    for span in range(0, spans):
        at = sums + span * tl.cast(size, tl.int64) + place
        other = tl.load(at, mask=valid, other=0.0)
        top = tl.maximum(tl.maximum(pivot, other), lowest)
        old, new = exp(pivot - top), exp(other - top)
        first = first * old + new * tl.load(at + spans * tl.cast(size, tl.int64), mask=valid, other=1.0)
        second = second * old * old + new * new * tl.load(at + 2 * spans * tl.cast(size, tl.int64), mask=valid, other=1.0)
        pivot = top
    logarithm = tl.where(first == 0.0, -float("inf"), log_unit(tl.maximum(first, 1e-30)))
    logarithm = tl.where(first != first, first, logarithm)
    tl.store(log_likelihood + place, pivot + (logarithm - log_samples), mask=valid)
    tl.store(effective + place, tl.where(first == 0.0, 0.0, first * first / second), mask=valid)


def _candidates(*fixed: tuple[int, int]) -> list[tuning.Configuration]:
    """(warps, samples a thread); the first is the fixed choice."""
    others = itertools.product((1, 2, 4), (8, 4, 2))
    return [{"warps": warps, "per_thread": per_thread} for warps, per_thread in dict.fromkeys((*fixed, *others))]


def _block(samples: int, span: int, latent_dim: int, warps: int, per_thread: int) -> tuple[int, int]:
    """(rows, samples) of a block; samples fill it where there are enough of them."""
    size = 32 * warps * per_thread
    group = 4 // math.gcd(latent_dim, 4)
    columns = min(size, span, max(group, triton.next_power_of_2(samples)))
    return size // columns, columns


def _span(samples: int) -> int:
    """Samples of a program in forward, and of an item in backward."""
    return SHORTEST * triton.next_power_of_2(triton.cdiv(samples, SHORTEST * SPANS))


def problem_of(decoder: Decoder, replicas: int, rows: int, samples: int) -> dict[str, Any]:
    """What the best configuration may depend on."""
    return {
        "widths": "-".join(map(str, decoder.widths)), "activations": "-".join(decoder.activations),
        "likelihood": decoder.likelihood, "replicas": replicas, "rows": rows, "samples": samples,
    }  # fmt: skip


def step(tensor: Tensor) -> int:
    """Values from one replica to the next; 0 where all share."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def forward(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws, num_samples: int, keep: Keep | None
) -> tuple[Tensor, Tensor]:
    """Log-likelihood and effective sample size as reference.forward; ``keep`` is given all log-weights, slab by slab."""
    replicas, n, latent_dim = mean.shape
    outputs = x.shape[-1]
    log_likelihood, effective = mean.new_empty((replicas, n)), mean.new_empty((replicas, n))
    if not replicas * n:
        return log_likelihood, effective
    x, mean, log_scale = x.contiguous(), mean.contiguous(), log_scale.contiguous()
    packed = pack(decoder)
    variance = decoder.variance.expand(-1, outputs if decoder.likelihood == "gaussian" else -1).contiguous()
    span = _span(num_samples)
    spans = triton.cdiv(num_samples, span)
    sums = mean.new_empty((3, spans, replicas, n))
    slab_spans = min(spans, max(1, SLAB // (span * replicas))) if keep else spans
    slab_rows = min(n, max(1, SLAB // (slab_spans * span * replicas))) if keep else n

    def run(configuration: tuning.Configuration, first: int = 0, first_span: int = 0) -> Tensor:
        """The slab that begins there -> its log-weights, if any are kept."""
        height, width = min(slab_rows, n - first), min(slab_spans, spans - first_span)
        rows, columns = _block(num_samples, span, latent_dim, **configuration)
        weights = mean.new_full((replicas, height, width * span), -float("inf")) if keep else sums
        gpu.launch(
            forward_kernel, (replicas * triton.cdiv(height, rows) * width,),
            draws.seed, draws.replicas, x, mean, log_scale, packed.table, packed.bias, variance, sums, weights,
            n, num_samples, first, height, first_span, spans, width, draws.first_row, draws.repetition, draws.stream,
            step(x), step(packed.table), step(packed.bias), step(variance), replicas,
            L=latent_dim, D=outputs, HIDDEN=packed.hidden, UNROLL=packed.unroll, ACTIVATION=packed.activation,
            OUTPUT=decoder.activations[-1], LIKELIHOOD=decoder.likelihood, KEEP=keep is not None, ROWS=rows, SAMPLES=columns,
            SPAN=span, num_warps=configuration["warps"],
        )  # fmt: skip
        return weights

    # As many samples a thread as registers allow: they share the loads of parameters and hide each other's latency.
    fixed = (1, 8 if latent_dim + outputs <= 4 else 4)
    problem = problem_of(decoder, replicas, n, num_samples) | {"kept": keep is not None}
    configuration = tuning.choose("importance.narrow.forward", problem, _candidates(fixed), run)
    for first in range(0, n, slab_rows):
        for first_span in range(0, spans, slab_spans):
            weights = run(configuration, first, first_span)
            if keep:
                start = first_span * span
                keep(slice(0, replicas), slice(first, first + weights.shape[1]), start, weights[..., : num_samples - start])
    finish(sums, num_samples, log_likelihood, effective)
    return log_likelihood, effective


def finish(sums: Tensor, num_samples: int, log_likelihood: Tensor, effective: Tensor) -> None:
    """sums [3, spans, R, N] -> log_likelihood and effective sample size [R, N]."""
    size = log_likelihood.numel()
    gpu.launch(
        finish_kernel, (triton.cdiv(size, 256),), sums, log_likelihood, effective, size, sums.shape[1], math.log(num_samples),
        BLOCK=256, num_warps=2,
    )  # fmt: skip


# --- backward ---


@triton.jit(do_not_specialize=[*COUNTS, *STEPS, "programs"])
def backward_kernel(
    seed, replicas, grad, log_likelihood, x, mean, log_scale, table, bias, variance, to_x, to_mean, to_log_scale, to_hidden,
    to_rest, programs, rows, samples, spans, first_row, repetition, stream, log_samples,
    x_step, table_step, bias_step, variance_step, replica_count,
    L: tl.constexpr, D: tl.constexpr, HIDDEN: tl.constexpr, UNITS: tl.constexpr, UNROLL: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUT: tl.constexpr, LIKELIHOOD: tl.constexpr, KIND: tl.constexpr, WANT_X: tl.constexpr,
    WANT_VARIANCE: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr, SPAN: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program p of P takes the items (row block, span) p, p + P, ... of its replica. Sums over a span -> to_x [spans, R, N, D],
    to_mean, to_log_scale [spans, R, N, L]; over the program's items -> to_hidden [R, P, L + 1 + D, UNITS] and to_rest
    [R, P, REST]: c, then the variance, then V without a hidden layer."""
    GROUP: tl.constexpr = 1 if L % 4 == 0 else (2 if L % 2 == 0 else 4)
    program = tl.program_id(0) % programs
    replica = tl.cast(tl.program_id(0) // programs, tl.int64)
    table += replica * table_step
    bias += replica * bias_step
    key = tl.load(seed)
    last = (stream + 256 * tl.load(replicas + replica)).to(tl.uint32)
    precisions, constant = variances_of(variance + replica * variance_step, D, LIKELIHOOD)
    unit = tl.arange(0, UNITS)
    slot = tl.arange(0, REST)
    rest = tl.zeros((REST,), tl.float32)
    hidden = ()
    if HIDDEN > 0:
        for k in tl.static_range(L + 1 + D):
            hidden = hidden + (tl.zeros((UNITS,), tl.float32),)

    items = tl.cdiv(rows, ROWS) * spans
    for item in range(program, items, programs):
        span = item % spans
        row = tl.cast(item // spans * ROWS + tl.arange(0, ROWS), tl.int64)
        valid = row < rows
        start = tl.cast(span, tl.int64) * SPAN
        counter = (first_row + row).to(tl.uint32)[:, None]
        x_d = columns_of(x + replica * x_step, row, valid, D)
        mean_l = columns_of(mean + replica * rows * L, row, valid, L)
        log_scale_l = columns_of(log_scale + replica * rows * L, row, valid, L)
        grad_n = tl.load(grad + replica * rows + row, mask=valid, other=0.0)[:, None]
        value = tl.load(log_likelihood + replica * rows + row, mask=valid, other=-float("inf"))[:, None]
        lost = tl.abs(value) == float("inf")
        offset = constant - value - log_samples
        scale_l = ()
        sum_mean = ()
        sum_scale = ()
        for l in tl.static_range(L):
            scale_l = scale_l + (exp(log_scale_l[l]),)
            offset += log_scale_l[l]
            sum_mean = sum_mean + (tl.zeros((ROWS,), tl.float32),)
            sum_scale = sum_scale + (tl.zeros((ROWS,), tl.float32),)
        sum_x = ()
        if WANT_X:
            for d in tl.static_range(D):
                sum_x = sum_x + (tl.zeros((ROWS,), tl.float32),)

        for step in range(0, tl.cdiv(tl.minimum(samples - start, SPAN), SAMPLES)):
            begin = start + step * SAMPLES
            group = (begin // GROUP + tl.arange(0, SAMPLES // GROUP))[None, :]
            noise = noise_of(key, last, tl.cast(repetition, tl.uint32), counter, group, L, ROWS, SAMPLES)
            z = ()
            for l in tl.static_range(L):
                z = z + (mean_l[l] + scale_l[l] * noise[l],)
            outputs = decode(z, table, bias, L, D, HIDDEN, UNROLL, ACTIVATION)
            log_weights = log_weights_of(z, noise, x_d, outputs, precisions, L, D, LIKELIHOOD, OUTPUT)
            drawn = (begin + tl.arange(0, SAMPLES) < samples)[None, :] & valid[:, None]
            v = tl.where(drawn & (lost == 0), exp(log_weights + offset), 0.0)
            share = grad_n * v

            delta = ()
            new_x = ()
            for d in tl.static_range(D):
                o = activation(outputs[d], OUTPUT)
                e = to_output(x_d[d], o, precisions[d], LIKELIHOOD)
                if WANT_X:
                    new_x = new_x + (sum_x[d] + tl.sum(share * to_data(o, e, LIKELIHOOD), 1),)
                if WANT_VARIANCE:
                    rest += tl.where(slot == D + d, tl.sum(share * to_variance(e, precisions[d])), 0.0)
                e = share * e * activation_slope(outputs[d], o, OUTPUT)
                rest += tl.where(slot == d, tl.sum(e), 0.0)
                delta = delta + (e,)
            sum_x = new_x

            to_z = ()
            if HIDDEN == 0:
                for l in tl.static_range(L):
                    slope = 0.0 * z[0]
                    for d in tl.static_range(D):
                        slope += delta[d] * tl.load(table + d * L + l)
                        rest += tl.where(slot == 2 * D + d * L + l, tl.sum(delta[d] * z[l]), 0.0)
                    to_z = to_z + (slope,)
            else:
                for l in tl.static_range(L):
                    to_z = to_z + (0.0 * z[0],)
                for j in range(0, HIDDEN, 2):
                    a0, a1, h0, h1 = units_of(z, table, j, L, D, ACTIVATION)
                    to_z, hidden = unit_backward(a0, h0, z, delta, to_z, hidden, unit, table, j, L, D, ACTIVATION)
                    to_z, hidden = unit_backward(a1, h1, z, delta, to_z, hidden, unit, table, j + 1, L, D, ACTIVATION)

            new_mean = ()
            new_scale = ()
            for l in tl.static_range(L):
                slope = to_z[l] * 0.6931471805599453 if ACTIVATION == "logistic" else to_z[l]
                path = proposal_path(slope, share, v, z[l], noise[l], scale_l[l], KIND)
                to_scale = path * noise[l] * scale_l[l]
                if KIND == "reparameterized":
                    to_scale += share
                new_mean = new_mean + (sum_mean[l] + tl.sum(path, 1),)
                new_scale = new_scale + (sum_scale[l] + tl.sum(to_scale, 1),)
            sum_mean = new_mean
            sum_scale = new_scale

        line = (tl.cast(span, tl.int64) * replica_count + replica) * rows + row
        for l in tl.static_range(L):
            tl.store(to_mean + line * L + l, sum_mean[l], mask=valid)
            tl.store(to_log_scale + line * L + l, sum_scale[l], mask=valid)
        if WANT_X:
            for d in tl.static_range(D):
                tl.store(to_x + line * D + d, sum_x[d], mask=valid)

    place = tl.cast(tl.program_id(0), tl.int64)
    tl.store(to_rest + place * REST + slot, rest)
    if HIDDEN > 0:
        for k in tl.static_range(L + 1 + D):
            tl.store(to_hidden + (place * (L + 1 + D) + k) * UNITS + unit, hidden[k])


@triton.jit
def unit_backward(
    a, h, z, delta, to_z, hidden, unit, table, j, L: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Add hidden unit j's part to the gradients of z and of the table."""
    back = tl.load(table + j * (L + 1 + D) + L + 1) * delta[0]
    for d in tl.static_range(1, D):
        back += tl.load(table + j * (L + 1 + D) + L + 1 + d) * delta[d]
    if ACTIVATION == "logistic":
        t = back * (h * h - h)  # d h / d a = -ln 2 h (1 - h); the ln 2 comes later
    else:
        t = back * activation_slope(a, h, ACTIVATION)
    new_z = ()
    new_hidden = ()
    here = unit == j
    for l in tl.static_range(L):
        new_z = new_z + (to_z[l] + tl.load(table + j * (L + 1 + D) + l) * t,)
        new_hidden = new_hidden + (hidden[l] + tl.where(here, tl.sum(t * z[l]), 0.0),)
    new_hidden = new_hidden + (hidden[L] + tl.where(here, tl.sum(t), 0.0),)
    for d in tl.static_range(D):
        new_hidden = new_hidden + (hidden[L + 1 + d] + tl.where(here, tl.sum(delta[d] * h), 0.0),)
    return new_z, new_hidden


def backward(
    grad: Tensor, log_likelihood: Tensor, x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws,
    num_samples: int, kind: str, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """As reference.backward; a gradient to x or variance that is not ``wanted`` is zero."""
    replicas, n, latent_dim = mean.shape
    outputs = x.shape[-1]
    want_x, want_variance = wanted[0], wanted[1] and decoder.likelihood == "gaussian"
    x, mean, log_scale = x.contiguous(), mean.contiguous(), log_scale.contiguous()
    packed = pack(decoder)
    variance = decoder.variance.expand(-1, outputs if decoder.likelihood == "gaussian" else -1).contiguous()
    span = _span(num_samples)
    spans = triton.cdiv(num_samples, span)
    units = triton.next_power_of_2(max(packed.hidden, 1))
    values = 2 * outputs + (0 if packed.hidden else outputs * latent_dim)
    to_mean, to_log_scale = mean.new_empty((spans, *mean.shape)), mean.new_empty((spans, *mean.shape))
    to_x = mean.new_empty((spans, replicas, n, outputs)) if want_x else to_mean
    grad, log_likelihood = grad.contiguous(), log_likelihood.contiguous()

    def run(configuration: tuning.Configuration) -> tuple[Tensor, Tensor]:
        """-> the programs' sums, of the hidden layer and of the rest."""
        rows, columns = _block(num_samples, span, latent_dim, **configuration)
        programs = max(1, min(triton.cdiv(n, rows) * spans, PROGRAMS // replicas))
        to_hidden = mean.new_empty((replicas, programs, latent_dim + 1 + outputs, units)) if packed.hidden else to_mean
        to_rest = mean.new_empty((replicas, programs, triton.next_power_of_2(values)))
        gpu.launch(
            backward_kernel, (replicas * programs,),
            draws.seed, draws.replicas, grad, log_likelihood, x, mean, log_scale, packed.table, packed.bias, variance, to_x,
            to_mean, to_log_scale, to_hidden, to_rest, programs, n, num_samples, spans, draws.first_row, draws.repetition,
            draws.stream,
            math.log(num_samples), step(x), step(packed.table), step(packed.bias), step(variance), replicas,
            L=latent_dim, D=outputs, HIDDEN=packed.hidden, UNITS=units, UNROLL=packed.unroll, ACTIVATION=packed.activation,
            OUTPUT=decoder.activations[-1], LIKELIHOOD=decoder.likelihood, KIND=kind, WANT_X=want_x,
            WANT_VARIANCE=want_variance, ROWS=rows, SAMPLES=columns, SPAN=span, REST=to_rest.shape[-1],
            num_warps=configuration["warps"],
        )  # fmt: skip
        return to_hidden, to_rest

    # Four warps share the accumulators where one warp's registers would not hold them.
    fixed = (1 if packed.hidden == 0 or units * (latent_dim + 1 + outputs) <= 1024 else 4, 4)
    problem = problem_of(decoder, replicas, n, num_samples) | {"kind": kind, "x": want_x, "variance": want_variance}
    to_hidden, to_rest = run(tuning.choose("importance.narrow.backward", problem, _candidates(fixed), run))
    rest = to_rest.sum(1)
    to_bias, to_variance, to_linear = rest[:, :values].split((outputs, outputs, values - 2 * outputs), -1)
    to_table = to_hidden.sum(1).mT if packed.hidden else to_linear.unflatten(-1, (outputs, latent_dim))
    to_weights, to_biases = unpack(decoder, packed, to_table, to_bias)
    if decoder.likelihood != "gaussian":
        to_variance = decoder.variance.new_zeros((replicas, *decoder.variance.shape[1:]))
    elif decoder.variance.shape[-1] == 1:
        to_variance = to_variance.sum(-1, keepdim=True)
    to_data_ = to_x.sum(0) if want_x else mean.new_zeros(()).expand(replicas, n, outputs)
    return to_data_, to_mean.sum(0), to_log_scale.sum(0), to_weights, to_biases, to_variance
