r"""Epochs of training (reference.py) in Triton: one program a replica, for all epochs of a call.

A replica's epochs follow one another in one program, so no launch waits for another and no two programs touch one address. Its
parameters stand in a row of a table, layer by layer as [units, inputs + bias], beside Adam's moments. A block of points goes
through both networks and back, layer by layer through a workspace in memory that the caches hold, units in rows and points in
lanes; a row of ones stands behind the last unit, so that a bias is a weight like the others. Products are sums of outer
products: of 64 units by 32 points a thread has 16 sums, and a step of the loop 5 loads. What all points take part in, codes,
whitened codes and the statistic's slopes, has its own place there (henze_zirkler/gpu_whitening.py states the maths).

Bound of an epoch of 500 points and two codes: 250,000 exponentials of pairs at 16 a cycle and 8.5 instructions a pair in 128
lanes are 17,000 cycles of a multiprocessor; 2-50-4 and 2-50-2 forward and twice back another 8000. 1600 replicas on 132
multiprocessors of 1.8 GHz: 0.2 ms, if several programs a multiprocessor hide what each of them waits.
"""
# mypy: disable-error-code="assignment, misc, var-annotated"
# In Triton's language a loop that is unrolled may grow a tuple.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu
from libi_fast.kernels.henze_zirkler.gpu import DISTANT, near
from libi_fast.kernels.henze_zirkler.gpu_whitening import (
    TILE,
    eliminated,
    factored,
    in_points,
    place,
    standardised,
    width_of,
)
from libi_fast.kernels.importance.gpu_formulas import (
    LOG_2PI,
    activation,
    activation_slope,
    exp,
    log_prob,
    sigmoid,
    to_output,
)
from libi_fast.kernels.random.gpu import log_unit, normals4
from libi_fast.kernels.training import reference
from libi_fast.kernels.training.reference import Adam, Network, Problem

WIDEST = 64  # units of a layer
LINES = 768  # of both networks' workspaces at most: more layers that wide, and registers spill
CODES = 4  # latents at most
JOINT = 8  # rows of a map chol(A A' + B) at most
MOST_ROWS = 4096  # whose pairs one program goes through
ROWS = 32  # points of a block of the networks: of 64 Triton 3.6 spills
BLOCK = 128  # points of a block of the moments
WARPS = 4
REGISTERS = 255  # two programs a multiprocessor; left to itself the assembler may choose 168, and spill
LATER = tl.constexpr(1 - reference.BETA1)
DECAY, FRESH = tl.constexpr(reference.BETA2), tl.constexpr(1 - reference.BETA2)
CLIP = tl.constexpr(reference.CLIP)
LINEAR_FROM = tl.constexpr(reference.LINEAR_FROM)
ROOT_FLOOR = tl.constexpr(reference.ROOT_FLOOR)

# --- what a kernel is compiled for: networks as text, layers parted by semicolons, fields by commas ---


@triton.constexpr_function
def layers(net):
    return net.count(";") + 1


@triton.constexpr_function
def part(net, layer, name):
    """One field of a layer. columns: inputs and, where there is one, the bias; offset: where the layer's parameters begin."""
    names = ("inputs", "units", "columns", "offset", "joint", "activation")
    value = net.split(";")[layer].split(",")[names.index(name)]
    return value if name == "activation" else int(value)


@triton.constexpr_function
def height(net, layer):
    """Rows of a tile that holds a layer's units."""
    return 1 << (part(net, layer, "units") - 1).bit_length()


@triton.constexpr_function
def width(net, layer):
    return 1 << (part(net, layer, "inputs") - 1).bit_length()


@triton.constexpr_function
def inputs_at(net, layer):
    """Lines of the workspace before a layer's inputs; of the last layer + 1, before the outputs."""
    return sum(part(net, i, "inputs") + 1 for i in range(layer))


@triton.constexpr_function
def slopes_at(net, layer):
    outputs = inputs_at(net, layers(net)) + part(net, layers(net) - 1, "units")
    return outputs + sum(part(net, i, "units") for i in range(layer))


@triton.constexpr_function
def lines_of(net):
    """Of the whole workspace of a network, with room for two deltas."""
    return slopes_at(net, layers(net)) + 2 * max(max(part(net, i, "units"), part(net, i, "inputs")) for i in range(layers(net)))


@triton.constexpr_function
def joint_width(net, layer):
    """Rows of the tile of a map chol(A A' + B), which Triton does not take smaller."""
    return max(2, height(net, layer))


# --- small matrices in double ---


@triton.jit
def times(a, b):
    return tl.sum(a[:, :, None] * b[None, :, :], 1)


@triton.jit
def safe_exp(u):
    """Value and slope of reference.safe_exp; NaN stays NaN."""
    slope = tl.exp(tl.where(u > LINEAR_FROM, LINEAR_FROM, u))
    return tl.where(u > LINEAR_FROM, slope * (1.0 + u - LINEAR_FROM), slope), slope


@triton.jit
def whole(tile):
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def joint_map(a, b, D: tl.constexpr, WIDTH: tl.constexpr):
    """M = chol(A A' + B) and M^-1, with ones on the diagonal past D; b points to B's diagonal."""
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    diagonal = tl.load(b + i, mask=i < D, other=1.0)
    square = times(a, tl.trans(a)) + tl.where(i == j, diagonal, 0.0)
    pivots, inverse = eliminated(square, i, j, D)
    inverse = inverse / tl.sqrt(pivots)
    return times(square, tl.trans(inverse)), inverse


@triton.jit
def joint_map_gradient(g, a, m, inverse, WIDTH: tl.constexpr):
    """The gradient in A: (S + S') A with S = M^-T P M^-1, P the lower triangle of M' g, its diagonal halved."""
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    p = times(tl.trans(m), tl.where(i >= j, g, 0.0))
    p = tl.where(i > j, p, tl.where(i == j, 0.5 * p, 0.0))
    s = times(tl.trans(inverse), times(p, inverse))
    return times(s + tl.trans(s), a)


# --- networks ---


@triton.jit
def activated(a, unit, NET: tl.constexpr, l: tl.constexpr):
    """Activations and their slopes."""
    if part(NET, l, "activation") == "sigmoid_cube_root":
        half = (part(NET, l, "units") + 1) // 2
        bounded = sigmoid(a)
        square = a * a
        root = exp(log_unit(square + ROOT_FLOOR) * (-1.0 / 3.0))
        h = tl.where(unit < half, bounded, a * root)
        fall = root * (1.0 - (2.0 / 3.0) * (square / (square + ROOT_FLOOR)))
        slope = tl.where(unit < half, bounded * (1.0 - bounded), fall)
    else:
        h = activation(a, part(NET, l, "activation"))
        slope = activation_slope(a, h, part(NET, l, "activation"))
    return h, slope


@triton.jit
def ones(work, NET: tl.constexpr, ROWS: tl.constexpr):
    """The row behind each layer's inputs."""
    for l in tl.static_range(layers(NET)):
        tl.store(
            work + (inputs_at(NET, l) + part(NET, l, "inputs")) * ROWS + tl.arange(0, ROWS), tl.full((ROWS,), 1.0, tl.float32)
        )


@triton.jit
def forward(work, table, maps, NET: tl.constexpr, ROWS: tl.constexpr):
    """From the inputs in the workspace to the outputs there, and the slopes of each layer's."""
    n = tl.arange(0, ROWS)[None, :]
    for l in tl.static_range(layers(NET)):
        unit = tl.arange(0, height(NET, l))[:, None]
        known = unit < part(NET, l, "units")
        w = (maps if part(NET, l, "joint") else table) + part(NET, l, "offset") + unit * part(NET, l, "columns")
        below = work + inputs_at(NET, l) * ROWS + n
        a = tl.zeros((height(NET, l), ROWS), tl.float32)
        for k in range(0, part(NET, l, "columns")):
            a += tl.load(w + k, mask=known, other=0.0) * tl.load(below + k * ROWS)
        h, slope = activated(a, unit, NET, l)
        tl.store(work + (inputs_at(NET, l + 1) + unit) * ROWS + n, h, mask=known)
        if part(NET, l, "activation") != "identity":
            tl.store(work + (slopes_at(NET, l) + unit) * ROWS + n, slope, mask=known)
        tl.debug_barrier()


@triton.jit
def take_in(work, x, n, first, table, maps, NET: tl.constexpr, ROWS: tl.constexpr):
    """Rows [width, ROWS] of the data from ``first`` on go through the encoder. Past the last row stand copies of it: their
    gradients are 0, which times a number out of range would be none."""
    D: tl.constexpr = part(NET, 0, "inputs")
    column, lane = tl.arange(0, width(NET, 0))[:, None], tl.arange(0, ROWS)[None, :]
    here = tl.load(x + tl.minimum(first + lane, n - 1) * D + column, mask=column < D, other=0.0)
    tl.store(work + column * ROWS + lane, here, mask=column < D)
    tl.debug_barrier()
    forward(work, table, maps, NET, ROWS)
    return here


@triton.jit
def slopes_of(work, unit, n, NET: tl.constexpr, l: tl.constexpr, ROWS: tl.constexpr):
    slope = 1.0
    if part(NET, l, "activation") != "identity":
        at = work + (slopes_at(NET, l) + unit) * ROWS + n
        slope = tl.load(at, mask=unit < part(NET, l, "units"), other=0.0)
    return slope


@triton.jit
def backward(
    work, table, maps, gradients, NET: tl.constexpr, MAPS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """From the gradients in the last layer before its activation, in the workspace's first delta: those in the maps are added
    to ``gradients``, where MAPS; those in the inputs come back [width, ROWS], where INPUTS."""
    delta = work + slopes_at(NET, layers(NET)) * ROWS
    other = delta + (lines_of(NET) - slopes_at(NET, layers(NET))) // 2 * ROWS
    n = tl.arange(0, ROWS)[None, :]
    back = 0.0
    for l in tl.static_range(layers(NET) - 1, -1, -1):
        unit, input = tl.arange(0, height(NET, l))[:, None], tl.arange(0, width(NET, l))[:, None]
        below = work + inputs_at(NET, l) * ROWS + n
        if MAPS:
            to = gradients + part(NET, l, "offset")
            if part(NET, l, "units") < part(NET, l, "inputs"):
                known = input < part(NET, l, "inputs")
                for m in range(0, part(NET, l, "units")):
                    d = tl.load(delta + m * ROWS + n)
                    at = to + m * part(NET, l, "columns")
                    g = tl.sum(tl.load(below + input * ROWS, mask=known, other=0.0) * d, 1)[:, None]
                    tl.store(at + input, tl.load(at + input, mask=known, other=0.0) + g, mask=known)
                    if part(NET, l, "columns") > part(NET, l, "inputs"):
                        bias = at + part(NET, l, "inputs")
                        tl.store(bias, tl.load(bias) + whole(d))
            else:
                known = unit < part(NET, l, "units")
                for k in range(0, part(NET, l, "columns")):
                    d = tl.load(delta + unit * ROWS + n, mask=known, other=0.0)
                    g = tl.sum(d * tl.load(below + k * ROWS), 1)[:, None]
                    at = to + unit * part(NET, l, "columns") + k
                    tl.store(at, tl.load(at, mask=known, other=0.0) + g, mask=known)
        if l > 0 or INPUTS:
            w = (maps if part(NET, l, "joint") else table) + part(NET, l, "offset") + input
            known = input < part(NET, l, "inputs")
            back = tl.zeros((width(NET, l), ROWS), tl.float32)
            for m in range(0, part(NET, l, "units")):
                back += tl.load(w + m * part(NET, l, "columns"), mask=known, other=0.0) * tl.load(delta + m * ROWS + n)
        if l > 0:
            back *= slopes_of(work, input, n, NET, l - 1, ROWS)
            tl.store(other + input * ROWS + n, back, mask=input < part(NET, l, "inputs"))
            tl.debug_barrier()
            delta, other = other, delta
    return back


@triton.jit
def store_joint_map(table, map, inverse, diagonal, D: tl.constexpr, WIDTH: tl.constexpr):
    """Work out a map that is no parameter itself; its inverse and itself in double stand at ``inverse``."""
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (i < D) & (j < D)
    a = tl.load(table + i * D + j, mask=inside, other=0.0).to(tl.float64)
    m, back = joint_map(a, diagonal, D, WIDTH)
    tl.store(map + i * D + j, m.to(tl.float32), mask=inside)
    tl.store(inverse + i * WIDTH + j, back)
    tl.store(inverse + WIDTH * WIDTH + i * WIDTH + j, m)


@triton.jit
def to_joint_parameter(gradient, table, inverse, D: tl.constexpr, WIDTH: tl.constexpr):
    """The gradient in such a map becomes that in its parameter."""
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (i < D) & (j < D)
    at = inverse + i * WIDTH + j
    a = tl.load(table + i * D + j, mask=inside, other=0.0).to(tl.float64)
    g = tl.load(gradient + i * D + j, mask=inside, other=0.0).to(tl.float64)
    g = joint_map_gradient(g, a, tl.load(at + WIDTH * WIDTH), tl.load(at), WIDTH)
    tl.debug_barrier()
    tl.store(gradient + i * D + j, g.to(tl.float32), mask=inside)


@triton.jit
def joint_maps(table, maps, inverses, diagonals, NET: tl.constexpr, JOINT: tl.constexpr):
    for l in tl.static_range(layers(NET)):
        if part(NET, l, "joint"):
            offset = part(NET, l, "offset")
            store_joint_map(
                table + offset, maps + offset, inverses + l * (2 * JOINT * JOINT), diagonals + l * JOINT,
                part(NET, l, "units"), joint_width(NET, l),
            )  # fmt: skip


@triton.jit
def joint_parameters(gradients, table, inverses, NET: tl.constexpr, JOINT: tl.constexpr):
    for l in tl.static_range(layers(NET)):
        if part(NET, l, "joint"):
            offset = part(NET, l, "offset")
            to_joint_parameter(
                gradients + offset, table + offset, inverses + l * (2 * JOINT * JOINT), part(NET, l, "units"),
                joint_width(NET, l),
            )  # fmt: skip


# --- objectives ---


@triton.jit
def score(work, x, precision, unit, known, share, NET: tl.constexpr, LIKELIHOOD: tl.constexpr, ROWS: tl.constexpr):
    """Of the outputs in the workspace the sum of -log p(x | outputs), without the Gaussian's constant; ``share`` times its
    gradient before the last activation comes to stand in the first delta."""
    n = tl.arange(0, ROWS)[None, :]
    outputs = tl.load(work + (inputs_at(NET, layers(NET)) + unit) * ROWS + n, mask=known, other=0.0)
    value = tl.where(known, -log_prob(x, outputs, precision, LIKELIHOOD), 0.0)
    delta = tl.where(known, to_output(x, outputs, precision, LIKELIHOOD) * -share, 0.0)
    delta *= slopes_of(work, unit, n, NET, layers(NET) - 1, ROWS)
    place = work + (slopes_at(NET, layers(NET)) + unit) * ROWS + n
    tl.store(place, delta, mask=unit < part(NET, layers(NET) - 1, "units"))
    tl.debug_barrier()
    return whole(value).to(tl.float64)


@triton.jit
def products(a, b, n, L: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ABOUT_FIRST: tl.constexpr):
    """sum_i a_ik b_ij [WIDTH, WIDTH] and sum_i b_ij [1, WIDTH], of tiles of L columns; ABOUT_FIRST: less the first point's."""
    j = tl.arange(0, WIDTH)[None, :]
    pivot = tl.zeros((1, WIDTH), tl.float64)
    if ABOUT_FIRST:
        pivot = tl.load(b + j * TILE, mask=j < L, other=0.0).to(tl.float64)
    total = tl.zeros((BLOCK, WIDTH), tl.float64)
    sums = ()
    for k in tl.static_range(L):
        sums = sums + (tl.zeros((BLOCK, WIDTH), tl.float64),)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)[:, None]
        inside = i < n
        here = tl.load(b + place(i, j, L * TILE, 0, True), mask=inside & (j < L), other=0.0).to(tl.float64)
        here = tl.where(inside, here - pivot, 0.0)
        total += here
        grown = ()
        for k in tl.static_range(L):
            other = tl.load(a + place(i, k, L * TILE, 0, True), mask=inside, other=0.0).to(tl.float64)
            if ABOUT_FIRST:
                other -= tl.load(a + k * TILE).to(tl.float64)
            grown = grown + (sums[k] + other * here,)
        sums = grown
    row = tl.arange(0, WIDTH)[:, None]
    second = tl.zeros((WIDTH, WIDTH), tl.float64)
    for k in tl.static_range(L):
        second = tl.where(row == k, tl.sum(sums[k], 0)[None, :], second)
    return second, tl.sum(total, 0)[None, :]


@triton.jit
def turned(row, i, j):
    """A row as a column."""
    return tl.sum(tl.where(i == j, row, 0.0), 1)[:, None]


@triton.jit
def penalties(
    z, u, slope, out, small, n, constants, weights,
    L: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The three terms of codes z, in tiles of L columns as u (whitened), slope and out (their gradient in z). small: room for
    matrices; constants: as `constants_of` made them."""
    count = tl.cast(n, tl.float64)
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (i < L) & (j < L)
    map, mixed, excess = small, small + L * L, small + 2 * L * L
    shift, carried, centre = small + 3 * L * L, small + 3 * L * L + L, small + 3 * L * L + 2 * L

    second, total = products(z, z, n, L, WIDTH, BLOCK, True)
    off = total / count
    covariance = second / count - turned(off, i, j) * off
    mean = off + tl.load(z + j * TILE, mask=j < L, other=0.0).to(tl.float64)
    factor, singular = factored(covariance, mean, i, j, L)
    beyond = tl.where(inside, covariance - tl.where(i == j, 1.0, 0.0), 0.0)
    spread, by_spread = safe_exp(whole(beyond * beyond) / tl.load(weights + 1))
    about, by_about = safe_exp(tl.sum(tl.sum(tl.where(j < L, mean * mean, 0.0), 1), 0) / tl.load(weights + 2))
    tl.store(map + i * L + j, factor, mask=inside)
    tl.store(shift + j, mean, mask=j < L)
    tl.store(excess + i * L + j, beyond * (4.0 * by_spread / (count * tl.load(weights + 1))), mask=inside)
    tl.store(centre + j, mean * (2.0 * by_about / (count * tl.load(weights + 2))), mask=j < L)
    tl.debug_barrier()

    scale = tl.load(constants)
    for first in range(0, n, BLOCK):
        point = first + tl.arange(0, BLOCK)[:, None]
        whitened = standardised(z, map, shift, point, j, point < n, L * TILE, 0, True, L) * scale
        tl.store(u + place(point, j, L * TILE, 0, True), tl.where(point < n, whitened.to(tl.float32), DISTANT), mask=j < L)
    tl.debug_barrier()

    kernels = tl.cast(0.0, tl.float64)
    once = tl.cast(0.0, tl.float64)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        known = row < n
        sums, met, here = near(u, row, 0, tl.cdiv(n, TILE), L, True, True)
        kernels += whole(tl.where(known, tl.sum(sums, 1)[:, None], 0.0).to(tl.float64))
        square = here[0].to(tl.float64) * here[0].to(tl.float64)
        for c in tl.static_range(1, L):
            square += here[c].to(tl.float64) * here[c].to(tl.float64)
        single = tl.exp2((-square * tl.load(constants + 1)).to(tl.float32)).to(tl.float64)
        once += whole(tl.where(known, single, 0.0))
        for c in tl.static_range(L):
            g = tl.load(constants + 2) * tl.sum(met[c], 1)[:, None].to(tl.float64)
            g += tl.load(constants + 3) * single * here[c].to(tl.float64)
            tl.store(slope + place(row, c, L * TILE, 0, True), g.to(tl.float32), mask=known)
    tl.debug_barrier()
    value = kernels / count - tl.load(constants + 4) * once + tl.load(constants + 5)
    value = tl.where(singular > 0, 4.0 * count, value.to(tl.float32).to(tl.float64))
    normality, by_normality = safe_exp(value)

    moment, steep = products(u, slope, n, L, WIDTH, BLOCK, False)
    mirrored = tl.where(i <= j, moment, tl.trans(moment)) / (scale * scale * count)
    tl.store(mixed + i * L + j, times(mirrored, factor), mask=inside)
    tl.store(carried + j, tl.sum(turned(steep / count, i, j) * factor, 0)[None, :], mask=j < L)
    tl.debug_barrier()
    by_statistic = tl.where(singular > 0, 0.0, tl.load(weights) * by_normality)
    for first in range(0, n, BLOCK):
        point = first + tl.arange(0, BLOCK)[:, None]
        known = (point < n) & (j < L)
        g = in_points(u, slope, map, mixed, carried, point, j, L * TILE, L * TILE, L) * by_statistic
        g += tl.load(centre + j, mask=j < L, other=0.0)
        for k in tl.static_range(L):
            centred = tl.load(z + place(point, k, L * TILE, 0, True), mask=point < n, other=0.0).to(tl.float64)
            g += tl.load(excess + k * L + j, mask=j < L, other=0.0) * (centred - tl.load(shift + k))
        tl.store(out + place(point, j, L * TILE, 0, True), g.to(tl.float32), mask=known)
    tl.debug_barrier()
    return tl.load(weights) * normality, spread, about


@triton.jit
def noise_of(key, row, draw, repetition, last, code, L: tl.constexpr):
    """Normals of sample ``draw`` of each row for codes 0 to L - 1."""
    first = draw * L
    block = (first // 4).to(tl.uint32) + row * 0
    n0, n1, n2, n3 = normals4(key, row, block, repetition, last)
    place = code + first % 4
    noise = tl.where(place == 0, n0, tl.where(place == 1, n1, tl.where(place == 2, n2, n3)))
    if L == 3:
        n0, n1, n2, n3 = normals4(key, row, block + 1, repetition, last)
        noise = tl.where(place < 4, noise, tl.where(place == 4, n0, n1))
    return noise


# --- the kernel ---


# Counts shape no loads: a kernel for each alignment of theirs would be compiled in vain.
@triton.jit(do_not_specialize=[
    "n", "epochs", "replicas", "steps", "repetition", "stream", "samples", "points", "parameters", "moving", "room",
    "double_room",
])  # fmt: skip
def train_kernel(
    x, dataset, table, means, squares, usual, variance, weights, schedule, constants, diagonals, floats, doubles, seed, ids,
    out, n, epochs, replicas, steps, repetition, stream, samples, points, parameters, moving, room, double_room, epsilon,
    OBJECTIVE: tl.constexpr, LIKELIHOOD: tl.constexpr, CLOSED: tl.constexpr, ENCODER: tl.constexpr, DECODER: tl.constexpr,
    MOVES_ENCODER: tl.constexpr, MOVES_DECODER: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr, JOINT: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """All epochs of one replica -> its parameters and Adam's state in place, terms in out [epochs, R, 4]."""
    D: tl.constexpr = part(ENCODER, 0, "inputs")
    ELBO: tl.constexpr = OBJECTIVE == "elbo"
    Q: tl.constexpr = inputs_at(ENCODER, layers(ENCODER))  # lines before the encoder's outputs
    TO_Q: tl.constexpr = slopes_at(ENCODER, layers(ENCODER))
    replica = tl.cast(tl.program_id(0), tl.int64)
    x += tl.load(dataset + replica) * n * D
    table += replica * parameters
    means += replica * moving
    squares += replica * moving
    weights += replica * 3
    tiles = L * tl.cast(points, tl.int64)
    floats += replica * room
    doubles += replica * double_room
    z, u, slope, to_codes, encoder = floats, floats + tiles, floats + 2 * tiles, floats + 3 * tiles, floats + 4 * tiles
    decoder = encoder + lines_of(ENCODER) * ROWS
    maps = decoder + lines_of(DECODER) * ROWS
    gradients = maps + parameters
    of_encoder, of_decoder = doubles, doubles + layers(ENCODER) * (2 * JOINT * JOINT)
    small = of_decoder + layers(DECODER) * (2 * JOINT * JOINT)
    key, last = tl.load(seed), (stream + 256 * tl.load(ids + replica)).to(tl.uint32)

    lane = tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, width(ENCODER, 0))[:, None]  # of data
    code = tl.arange(0, WIDTH)[:, None]
    share = 1.0 / n
    constant = tl.cast(0.0, tl.float64)
    precision = 1.0
    if LIKELIHOOD == "gaussian":
        spreads = tl.load(variance + column, mask=column < D, other=1.0)
        precision = 1.0 / spreads
        constant = 0.5 * whole(tl.where(column < D, log_unit(spreads) + LOG_2PI, 0.0)).to(tl.float64)
    ones(encoder, ENCODER, ROWS)
    ones(decoder, DECODER, ROWS)

    for epoch in range(0, epochs):
        joint_maps(table, maps, of_encoder, diagonals, ENCODER, JOINT)
        joint_maps(table, maps, of_decoder, diagonals + layers(ENCODER) * JOINT, DECODER, JOINT)
        for first in range(0, moving, STEP):
            place_of = first + tl.arange(0, STEP)
            tl.store(gradients + place_of, tl.zeros((STEP,), tl.float32), mask=place_of < moving)
        rise = tl.load(schedule + 4 * epoch)
        again = tl.cast(repetition + epoch, tl.uint32)
        second_term = tl.cast(0.0, tl.float64)
        third_term = tl.cast(0.0, tl.float64)
        fourth_term = tl.cast(0.0, tl.float64)
        tl.debug_barrier()
        if OBJECTIVE == "joint":
            for first in range(0, n, ROWS):
                row = first + lane
                take_in(encoder, x, n, first, table, maps, ENCODER, ROWS)
                codes = tl.load(encoder + (Q + code) * ROWS + lane, mask=code < L, other=0.0)
                tl.store(z + place(row, code, L * TILE, 0, True), codes, mask=(row < n) & (code < L))
            tl.debug_barrier()
            second_term, third_term, fourth_term = penalties(
                z, u, slope, to_codes, small, n, constants, weights, L, WIDTH, PAIRS, BLOCK
            )

        misfit = constant * n
        kl = tl.cast(0.0, tl.float64)
        weight = (tl.load(weights) * rise * share).to(tl.float32)
        spread = tl.zeros((WIDTH, 1), tl.float32)  # of the outputs by each code, in closed form
        total = tl.zeros((WIDTH, ROWS), tl.float32)  # of q's variances
        if ELBO and CLOSED:
            for d in range(0, D):
                w = tl.load((maps if part(DECODER, 0, "joint") else table) + part(DECODER, 0, "offset")
                            + d * part(DECODER, 0, "columns") + code, mask=code < L, other=0.0)  # fmt: skip
                spread += w * w / tl.load(variance + d)
        for first in range(0, n, ROWS):
            row = first + lane
            inside = (row < n) & (column < D)
            known = (row < n) & (code < L)
            here = take_in(encoder, x, n, first, table, maps, ENCODER, ROWS)
            q = tl.load(encoder + (Q + code) * ROWS + lane, mask=code < L, other=0.0)
            to_codes_here = tl.zeros((WIDTH, ROWS), tl.float32)
            if ELBO:
                log_std = tl.load(encoder + (Q + L + code) * ROWS + lane, mask=code < L, other=0.0)
                std = exp(log_std)
                to_codes_here = tl.where(known, weight * q, 0.0)
                to_log_std = tl.where(known, weight * (std * std - 1.0), 0.0)
                kl += whole(tl.where(known, 0.5 * (q * q + std * std - 1.0) - log_std, 0.0)).to(tl.float64)
            if ELBO and not CLOSED:
                for s in range(0, samples):
                    moved = std * noise_of(key, tl.minimum(row, n - 1).to(tl.uint32), s, again, last, code, L)
                    tl.store(decoder + code * ROWS + lane, q + moved, mask=code < L)
                    tl.debug_barrier()
                    forward(decoder, table, maps, DECODER, ROWS)
                    misfit += (
                        score(decoder, here, precision, column, inside, share / samples, DECODER, LIKELIHOOD, ROWS) / samples
                    )
                    back = backward(decoder, table, maps, gradients, DECODER, MOVES_DECODER, True, ROWS)
                    back = tl.where(known, back, 0.0)
                    to_codes_here += back
                    to_log_std += back * moved
                    tl.debug_barrier()  # before the next draw takes this one's place
            else:
                tl.store(decoder + code * ROWS + lane, q, mask=code < L)
                tl.debug_barrier()
                forward(decoder, table, maps, DECODER, ROWS)
                misfit += score(decoder, here, precision, column, inside, share, DECODER, LIKELIHOOD, ROWS)
                back = backward(decoder, table, maps, gradients, DECODER, MOVES_DECODER, OBJECTIVE != "reconstruction", ROWS)
                if OBJECTIVE != "reconstruction":
                    to_codes_here += tl.where(known, back, 0.0)
                if OBJECTIVE == "joint":
                    to_codes_here += tl.load(to_codes + place(row, code, L * TILE, 0, True), mask=known, other=0.0)
                if ELBO:
                    variances = tl.where(known, std * std, 0.0)
                    total += variances
                    to_log_std += share * variances * spread
                    misfit += 0.5 * whole(variances * spread).to(tl.float64)
            if MOVES_ENCODER:
                to_q = encoder + TO_Q * ROWS
                unit = tl.arange(0, height(ENCODER, layers(ENCODER) - 1))[:, None]
                others = (unit >= (2 * L if ELBO else L)) & (unit < part(ENCODER, layers(ENCODER) - 1, "units"))
                tl.store(to_q + unit * ROWS + lane, tl.zeros((unit.shape[0], ROWS), tl.float32), mask=others)
                to_codes_here *= slopes_of(encoder, code, lane, ENCODER, layers(ENCODER) - 1, ROWS)
                tl.store(to_q + code * ROWS + lane, to_codes_here, mask=code < L)
                if ELBO:
                    to_log_std *= slopes_of(encoder, L + code, lane, ENCODER, layers(ENCODER) - 1, ROWS)
                    tl.store(to_q + (L + code) * ROWS + lane, to_log_std, mask=code < L)
                tl.debug_barrier()
                backward(encoder, table, maps, gradients, ENCODER, True, False, ROWS)
            tl.debug_barrier()  # before the next block's points take these ones' place
        if ELBO:
            second_term = kl * weight
            if CLOSED and MOVES_DECODER:
                by_code = share * tl.sum(total, 1)[:, None]
                for d in range(0, D):
                    at = part(DECODER, 0, "offset") + d * part(DECODER, 0, "columns") + code
                    w = tl.load((maps if part(DECODER, 0, "joint") else table) + at, mask=code < L, other=0.0)
                    g = tl.load(gradients + at, mask=code < L, other=0.0) + w * by_code / tl.load(variance + d)
                    tl.store(gradients + at, g, mask=code < L)
                tl.debug_barrier()

        if MOVES_ENCODER:
            joint_parameters(gradients, table, of_encoder, ENCODER, JOINT)
        if MOVES_DECODER:
            joint_parameters(gradients, table, of_decoder, DECODER, JOINT)
        tl.debug_barrier()
        square = tl.cast(0.0, tl.float64)
        for first in range(0, moving, STEP):
            at = first + tl.arange(0, STEP)
            g = tl.load(gradients + at, mask=at < moving, other=0.0).to(tl.float64)
            square += tl.sum(g * g, 0)
        norm = tl.sqrt(square).to(tl.float32)
        typical = tl.load(usual + replica)
        if steps + epoch == 0:
            typical = norm
        limit = tl.where(typical > 0.0, CLIP * typical, float("inf"))
        factor = limit / norm
        factor = tl.where(factor > 1.0, 1.0, factor)  # NaN stays
        kept = tl.where(norm > limit, limit, norm)
        tl.debug_barrier()  # every thread has read what changes now
        tl.store(usual + replica, typical + tl.load(schedule + 4 * epoch + 3) * (kept - typical))
        size, root = tl.load(schedule + 4 * epoch + 1), tl.load(schedule + 4 * epoch + 2)
        for first in range(0, moving, STEP):
            at = first + tl.arange(0, STEP)
            inside = at < moving
            g = tl.load(gradients + at, mask=inside, other=0.0) * factor
            mean = tl.load(means + at, mask=inside, other=0.0)
            mean += LATER * (g - mean)
            second = DECAY * tl.load(squares + at, mask=inside, other=0.0) + FRESH * g * g
            tl.store(means + at, mean, mask=inside)
            tl.store(squares + at, second, mask=inside)
            p = tl.load(table + at, mask=inside, other=0.0) - size * mean / (tl.sqrt(second) * root + epsilon)
            tl.store(table + at, p, mask=inside)
        told = out + (tl.cast(epoch, tl.int64) * replicas + replica) * 4
        tl.store(told, (misfit * share).to(tl.float32))
        tl.store(told + 1, second_term.to(tl.float32))
        tl.store(told + 2, third_term.to(tl.float32))
        tl.store(told + 3, fourth_term.to(tl.float32))
        tl.debug_barrier()


# --- launcher ---


def refusal(problem: Problem) -> str | None:
    """Why the kernel does not take the problem, or None."""
    networks, rows = (problem.encoder, problem.decoder), problem.x.shape[1]
    widest = max(w for network in networks for w in network.widths)
    joint = max((len(d) for network in networks for d in network.diagonals if d is not None), default=0)
    if problem.x.dtype != torch.float32:
        return f"it computes in float32, got {problem.x.dtype}"
    if problem.latent_dim > CODES or widest > WIDEST or joint > JOINT or rows > MOST_ROWS:
        return (
            f"it takes at most {CODES} latents, {WIDEST} units a layer, {JOINT} rows of chol(A A' + B) and {MOST_ROWS} points, "
            f"got {problem.latent_dim}, {widest}, {joint} and {rows}"
        )
    lines = sum(lines_of(described(network, 0)) for network in networks)
    return f"it takes {LINES} lines of activations, slopes and gradients of a point, got {lines}" if lines > LINES else None


def described(network: Network, first: int) -> str:
    """What the kernel is compiled for; ``first``: where the network's parameters begin in the table."""
    lines = []
    for bias, diagonal, name, inputs, units in zip(
        network.biases, network.diagonals, network.activations, network.widths[:-1], network.widths[1:], strict=True
    ):
        columns = inputs + (bias is not None)
        lines.append(f"{inputs},{units},{columns},{first},{int(diagonal is not None)},{name}")
        first += units * columns
    return ";".join(lines)


def table_of(networks: Sequence[Network]) -> Tensor:
    """Parameters [R, count], each layer's as [units, inputs + bias]."""
    parts = []
    for network in networks:
        for weight, bias in zip(network.weights, network.biases, strict=True):
            parts.append((weight if bias is None else torch.cat((weight, bias[..., None]), -1)).flatten(1))
    return torch.cat(parts, 1)


def take_back(networks: Sequence[Network], table: Tensor) -> None:
    """The table's first numbers into the tensors that they were made of."""
    at = 0
    for network in networks:
        for weight, bias in zip(network.weights, network.biases, strict=True):
            units, inputs = weight.shape[1:]
            columns = inputs + (bias is not None)
            part = table[:, at : at + units * columns].unflatten(1, (units, columns))
            at += units * columns
            weight.copy_(part[..., :inputs])
            if bias is not None:
                bias.copy_(part[..., -1])


def constants_of(n: int, d: int, beta: float, device: torch.device) -> Tensor:
    """Of the statistic (henze_zirkler/gpu.py): the scale of its points, and what e, T, e u and the sums are multiplied by."""
    b2, scale = beta * beta, beta * math.sqrt(0.5 * math.log2(math.e))
    values = [
        scale, 1 / (1 + b2), -2 * b2 / n / scale, 2 * b2 * (1 + b2) ** (-d / 2 - 1) / scale, 2 * (1 + b2) ** (-d / 2),
        n * (1 + 2 * b2) ** (-d / 2),
    ]  # fmt: skip
    return torch.tensor(values, dtype=torch.float64).to(device)


def schedule_of(rates: Sequence[float], rises: Sequence[float], steps: int, device: torch.device) -> Tensor:
    """[epochs, 4]: the rise, Adam's step, the second moments' root, and a norm's weight in the running mean."""
    lines = []
    for t, (rate, rise) in enumerate(zip(rates, rises, strict=True), steps + 1):
        root = math.sqrt(1 - reference.BETA2**t)
        lines.append((rise, rate / (1 - reference.BETA1**t), 1 / root, max(reference.USUAL, 1 / t)))
    return torch.tensor(lines, dtype=torch.float32).view(-1, 4).to(device)


def diagonals_of(networks: Sequence[Network], device: torch.device) -> Tensor:
    """B of every layer, [layers, JOINT]."""
    lines = [d for network in networks for d in network.diagonals]
    found = torch.zeros((len(lines), JOINT), dtype=torch.float64, device=device)
    for line, d in zip(found, lines, strict=True):
        if d is not None:
            line[: len(d)] = d
    return found


@torch.no_grad()
def run(problem: Problem, adam: Adam, rates: Sequence[float], rises: Sequence[float]) -> Tensor:
    """As reference.run, of float32."""
    p, epochs, device = problem, len(rates), problem.x.device
    _, n, columns = p.x.shape
    replicas, latents = len(p.dataset), p.latent_dim
    out = p.x.new_empty((epochs, replicas, 4))
    if not (epochs and replicas):
        return out[..., : len(p.terms)]
    networks = sorted((p.encoder, p.decoder), key=lambda network: not network.trained)  # what moves comes first
    moving = [network for network in networks if network.trained]
    state = []
    for moments in (adam.means, adam.squares):
        left = iter(moments)
        state.append([network.with_parameters([next(left) for _ in network.parameters]) for network in moving])
    table, means, squares = (table_of(of) for of in (networks, *state))
    first = sum(t[0].numel() for t in networks[0].parameters)
    encoder, decoder = (described(network, 0 if network is networks[0] else first) for network in (p.encoder, p.decoder))
    points = triton.cdiv(n, BLOCK) * BLOCK
    double_room = 2 * JOINT**2 * (layers(encoder) + layers(decoder)) + 3 * latents * (latents + 1)
    room = 4 * latents * points + (lines_of(encoder) + lines_of(decoder)) * ROWS + 2 * table.shape[1]
    limit = {} if gpu.amd() else {"maxnreg": REGISTERS}
    variance = p.variance.expand(columns).contiguous() if p.likelihood == "gaussian" else p.variance
    with gpu.device_of(p.x):
        gpu.launch(
            train_kernel, (replicas,), p.x.contiguous(), p.dataset.to(device), table, means, squares, adam.usual, variance,
            p.weights.to(device, torch.float64).contiguous(), schedule_of(rates, rises, adam.steps, device),
            constants_of(n, latents, p.hz_beta, device), diagonals_of((p.encoder, p.decoder), device),
            p.x.new_empty((replicas, room)), p.x.new_empty((replicas, double_room), dtype=torch.float64),
            p.draws.seed.to(device), p.draws.replicas.to(device), out, n, epochs, replicas, adam.steps, p.draws.repetition,
            p.draws.stream, p.samples, points, table.shape[1], means.shape[1], room, double_room, float(adam.epsilon),
            OBJECTIVE=p.objective, LIKELIHOOD=p.likelihood, CLOSED=p.closed, ENCODER=encoder, DECODER=decoder,
            MOVES_ENCODER=p.encoder.trained, MOVES_DECODER=p.decoder.trained, L=latents, WIDTH=width_of(latents), JOINT=JOINT,
            ROWS=ROWS, PAIRS=64 if latents <= 2 else 32, BLOCK=BLOCK, STEP=32 * WARPS, num_warps=WARPS, **limit,
        )  # fmt: skip
    for of, numbers in ((moving, table), (state[0], means), (state[1], squares)):
        take_back(of, numbers)
    return out[..., : len(p.terms)]
