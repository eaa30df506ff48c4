r"""The statistic by characteristic functions (characteristic.py) in Triton; nothing of size n x frequencies is held.

random, sliced, and quadrature in one dimension: frequencies t_f in d dimensions with weights w_f. The waves' sums over points
first, then the way back,

    slope in y_i = sum_f 2 w_f t_f (s_f cos - (c_f - exp(-|t_f|^2/2)) sin)(t_f.y_i)

with cos and sin taken anew. quadrature in two dimensions: features of both coordinates, whose products' sums over points are
a product of matrices, and so is each coordinate's way back; features are made where they are multiplied.

Bound: instructions. Cosine and sine take 17 (waves.hpp's polynomials of a phase in turns: no range reduction in double). A
point and frequency take d + 19 for the sums and 2 d + 19 for the way back: 1e6 x 16 by 1024 frequencies 86 together, 2.9 ms of
an H200's 528 schedulers at 1.8 GHz; compiled for sm_90 97, with the loads (189 and 183 registers). Quadrature: multiply-adds,
one a product of features in the sums and two on the way back: 1e6 x 2 takes some 104 nodes an axis, 1.3e11 of them, 4.3 ms.
Compiled, a multiply-add comes with half an instruction of features and operands, and 104 nodes fill 4 tiles of 32: about 10 ms.

As in gpu.py a thread has one column of a tile, and the rows' sums stay in it to the end: rows are frequencies in the sums, and
points on the way back. Points past the last lie at 0, where the cosine is 1: so many are taken from the cosines' sums.
"""
# mypy: disable-error-code="assignment, misc, var-annotated"
# In Triton's language a loop that is unrolled may grow a tuple.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu
from libi_fast.kernels.henze_zirkler import characteristic
from libi_fast.kernels.henze_zirkler import gpu as exact
from libi_fast.kernels.henze_zirkler.characteristic import Factor
from libi_fast.kernels.henze_zirkler.gpu_whitening import TILE, Whitened, carried_back, moments, place, whiten

TURN = tl.constexpr(2 * math.pi)
LONGEST = 256  # tiles of a split of the points; as many terms are added in float32
PROGRAMS = 2048  # of the sums
FEATURES = 64  # of a tile of products: 32 nodes
DEPTH = 32  # features that are multiplied at a time on the way back
ADDED = tl.constexpr(16)  # tiles of points whose products are added in float32
SUMS = 2**26  # numbers of the replicas' sums at a time
FURTHEST = 1e6  # beta sqrt(n d): no phase is then longer than 1.4e6 turns, of which float32 holds the half turns


@triton.jit
def waves(phase):
    """(C, r S, sign): cos and sin of a phase in turns are the first two with this sign bit; r = phase - round(2 phase) / 2."""
    shifted = phase * 2.0 + 12582912.0  # 1.5 * 2^23: the half turns are in its lowest bits
    r = phase - (shifted - 12582912.0) * 0.5
    z = r * r
    sine = z * 39.759827085319101 - 76.581172644278724
    sine = sine * z + 81.602476368925180
    sine = sine * z - 41.341680613346515
    sine = sine * z + 6.2831852801544065
    cosine = z * -24.981434467891655 + 60.143889560342147
    cosine = cosine * z - 85.453564760995221
    cosine = cosine * z + 64.939346476210148
    cosine = cosine * z - 19.739208547715783
    cosine = cosine * z + 1.0
    return cosine, sine * r, shifted.to(tl.int32, bitcast=True) << 31


@triton.jit
def signed(value, sign):
    return (value.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def phase_of(rows, at, D: tl.constexpr):
    """Products of the rows' coordinates, a tuple of columns, with those of the tile at ``at``, and these."""
    there = ()
    for c in tl.static_range(D):
        there = there + (tl.load(at + c * TILE),)
    phase = rows[0] * there[0]
    for c in tl.static_range(1, D):
        phase += rows[c] * there[c]
    return phase, there


@triton.jit
def coordinates(at, row, D: tl.constexpr):
    """Of the rows of tiles, a tuple of columns."""
    here = ()
    for c in tl.static_range(D):
        here = here + (tl.load(at + place(row, c, D * TILE, 0, True)),)
    return here


@triton.jit(do_not_specialize=["n", "tiles", "count", "splits", "width"])
def sums_kernel(
    y, turns, out, n, tiles, count, splits, width, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """ROWS frequencies over one split's points: sums of cosines and sines -> out [R, splits, 2, count]."""
    blocks = count // ROWS
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    split = tl.program_id(0) // blocks % splits
    replica = tl.cast(tl.program_id(0) // blocks // splits, tl.int64)
    here = coordinates(turns, row, D)
    cosines = tl.zeros((ROWS, TILE), tl.float32)
    sines = tl.zeros((ROWS, TILE), tl.float32)
    first = split * width
    at = y + (replica * tiles + first) * (D * TILE) + tl.arange(0, TILE)[None, :]
    for _ in range(first, tl.minimum(first + width, tl.cdiv(n, TILE))):
        phase, _there = phase_of(here, at, D)
        cosine, sine, sign = waves(phase)
        cosines += signed(cosine, sign)
        sines += signed(sine, sign)
        at += D * TILE
    to = out + (replica * splits + split) * 2 * count + row
    tl.store(to, tl.sum(cosines, 1)[:, None])
    tl.store(to + count, tl.sum(sines, 1)[:, None])


@triton.jit(do_not_specialize=["tiles", "count"])
def slopes_kernel(
    y, turns, by, out, tiles, count, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The slopes in y of ROWS points -> tiles; by [R, 2, count]: the slopes in the means of cosines and sines."""
    blocks = tiles * TILE // ROWS
    row = tl.cast(tl.program_id(0) % blocks, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    replica = tl.cast(tl.program_id(0) // blocks, tl.int64)
    here = coordinates(y + replica * tiles * (D * TILE), row, D)
    sums = ()
    for c in tl.static_range(D):
        sums = sums + (tl.zeros((ROWS, TILE), tl.float32),)
    at = turns + tl.arange(0, TILE)[None, :]
    by += replica * 2 * count + tl.arange(0, TILE)[None, :]
    for _ in range(0, count // TILE):
        phase, there = phase_of(here, at, D)
        cosine, sine, sign = waves(phase)
        pull = signed(tl.load(by + count) * cosine - tl.load(by) * sine, sign)
        grown = ()
        for c in tl.static_range(D):
            grown = grown + (sums[c] + pull * there[c],)
        sums = grown
        at += D * TILE
        by += TILE
    to = out + replica * tiles * (D * TILE)
    for c in tl.static_range(D):
        tl.store(to + place(row, c, D * TILE, 0, True), tl.sum(sums[c], 1)[:, None] * TURN)


# --- quadrature in two dimensions: features 2 k and 2 k + 1 are node k's cosine and sine ---


@triton.jit
def features(y, turns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of points [ROWS, 1] at nodes [1, COLUMNS / 2]: [ROWS, COLUMNS]."""
    cosine, sine, sign = waves(y * turns)
    # The signs come last: Triton 3.7 for sm_100 fails where what is multiplied was only reshaped.
    return signed(tl.reshape(tl.join(cosine, sine), (ROWS, COLUMNS)), tl.reshape(tl.join(sign, sign), (ROWS, COLUMNS)))


@triton.jit(do_not_specialize=["n", "tiles", "left", "right", "splits", "width"])
def products_kernel(
    y, left_turns, right_turns, out, n, tiles, left, right, splits, width, FEATURES: tl.constexpr
):  # fmt: skip
    """A tile of products of features, summed over one split's points -> out [R, splits, left, right], float64."""
    columns, rows = right // FEATURES, left // FEATURES
    column = tl.program_id(0) % columns
    row = tl.program_id(0) // columns % rows
    split = tl.program_id(0) // columns // rows % splits
    replica = tl.cast(tl.program_id(0) // columns // rows // splits, tl.int64)
    node = tl.arange(0, FEATURES // 2)[None, :]
    left_node = tl.load(left_turns + row * (FEATURES // 2) + node)
    right_node = tl.load(right_turns + column * (FEATURES // 2) + node)
    first = split * width
    last = tl.minimum(first + width, tl.cdiv(n, TILE))
    at = y + (replica * tiles + first) * (2 * TILE) + tl.arange(0, TILE)[:, None]
    total = tl.zeros((FEATURES, FEATURES), tl.float64)
    for start in range(first, last, ADDED):
        part = tl.zeros((FEATURES, FEATURES), tl.float32)
        for _ in range(start, tl.minimum(start + ADDED, last)):
            a = features(tl.load(at), left_node, TILE, FEATURES)
            b = features(tl.load(at + TILE), right_node, TILE, FEATURES)
            part = tl.dot(tl.trans(a), b, part, input_precision="ieee")
            at += 2 * TILE
        total += part.to(tl.float64)
    i = row * FEATURES + tl.arange(0, FEATURES)[:, None]
    j = column * FEATURES + tl.arange(0, FEATURES)[None, :]
    tl.store(out + ((replica * splits + split) * left + i) * right + j, total)


@triton.jit(do_not_specialize=["tiles", "own", "others", "own_step", "others_step", "own_column"])
def pull_kernel(
    y, own_turns, other_turns, by, out, tiles, own, others, own_step, others_step, own_column,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The slopes of ROWS points in one of their two coordinates, own_column, -> its column of tiles; by: the slopes in the
    products' means, at distance own_step from one of its own features to the next."""
    blocks = tiles * TILE // ROWS
    row = tl.cast(tl.program_id(0) % blocks, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    replica = tl.cast(tl.program_id(0) // blocks, tl.int64)
    y += replica * tiles * (2 * TILE)
    mine = tl.load(y + place(row, own_column, 2 * TILE, 0, True))
    other = tl.load(y + place(row, 1 - own_column, 2 * TILE, 0, True))
    by += replica * own * others
    node = tl.arange(0, FEATURES // 2)[None, :]
    feature = tl.arange(0, FEATURES)[None, :] * own_step
    other_node = tl.arange(0, DEPTH // 2)[None, :]
    depth = tl.arange(0, DEPTH)[:, None] * others_step
    total = tl.zeros((ROWS, FEATURES), tl.float32)
    for first in range(0, own, FEATURES):
        pulled = tl.zeros((ROWS, FEATURES), tl.float32)
        for begin in range(0, others, DEPTH):
            made = features(other, tl.load(other_turns + begin // 2 + other_node), ROWS, DEPTH)
            there = tl.load(by + begin * others_step + first * own_step + depth + feature)
            pulled = tl.dot(made, there, pulled, input_precision="ieee")
        turns = tl.load(own_turns + first // 2 + node)
        cosine, sine, sign = waves(mine * turns)
        slope = tl.join(signed(sine * turns * -1.0, sign), signed(cosine * turns, sign))
        total += pulled * tl.reshape(slope, (ROWS, FEATURES))
    to = out + replica * tiles * (2 * TILE)
    tl.store(to + place(row, own_column, 2 * TILE, 0, True), tl.sum(total, 1)[:, None] * TURN)


# --- launchers ---


def refusal(z: Tensor, beta: float, method: str) -> str | None:
    """Why these kernels do not take the call, or None."""
    if method == "quadrature" and z.shape[-1] > 2:
        return f"its quadrature takes at most 2 dimensions, got {z.shape[-1]}"
    if beta * math.sqrt(z.shape[-2] * z.shape[-1]) > FURTHEST:
        return f"it takes phases of up to 1.4e6 turns, and beta is {beta}"
    return exact.refusal(z)


def filled(values: Tensor, count: int) -> Tensor:
    """Zeros appended to the last dimension."""
    return torch.nn.functional.pad(values, (0, count - values.shape[-1]))


def by_waves(whitened: Whitened, factor: Factor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The statistic of each replica, float64, and the slopes in y, tiles."""
    y, n, d = whitened.points, whitened.n, whitened.d
    replicas, tiles = y.shape[:2]
    few = d > 4  # rows of a thread: 16, or 8 and for the way back 4
    count = triton.cdiv(len(factor.weight), 64) * 64
    turns = filled(factor.frequencies.mT / TURN.value, count).unflatten(1, (-1, TILE.value)).transpose(0, 1).contiguous()
    weight = filled(factor.weight.double(), count)
    target = (-0.5 * (turns.double() * TURN.value).square().sum(1)).exp().flatten()  # of frequencies as the points meet them

    rows = 32 if few else 64
    columns = triton.cdiv(n, TILE.value)
    width = min(LONGEST, max(exact.SHORTEST, triton.cdiv(columns, triton.cdiv(PROGRAMS, replicas * (count // rows)))))
    splits = triton.cdiv(columns, width)
    parts = y.new_empty((replicas, splits, 2, count))
    gpu.launch(
        sums_kernel, (replicas * splits * (count // rows),), y, turns, parts, n, tiles, count, splits, width, D=d, ROWS=rows,
        num_warps=4,
    )  # fmt: skip
    difference = parts.sum(1, dtype=torch.float64)
    difference[:, 0] -= columns * TILE.value - n
    difference /= n
    difference[:, 0] -= target
    weighted = weight * difference
    value = n * (weighted * difference).sum((-2, -1))
    if not gradient:
        return value, None
    slope = whitened.new(d)
    rows = 16 if few else 64
    gpu.launch(
        slopes_kernel, (replicas * tiles * TILE.value // rows,), y, turns, (2 * weighted).float(), slope, tiles, count, D=d,
        ROWS=rows, num_warps=4,
    )  # fmt: skip
    return value, slope


def by_products(whitened: Whitened, factors: list[Factor], gradient: bool) -> tuple[Tensor, Tensor | None]:
    """As by_waves, on the grid of two factors' nodes."""
    y, n = whitened.points, whitened.n
    replicas, tiles = y.shape[:2]
    turns, targets, weights = [], [], []
    for factor in factors:
        count = triton.cdiv(len(factor.weight), FEATURES // 2) * (FEATURES // 2)
        turns.append(filled(factor.frequencies[:, 0] / TURN.value, count))
        cosine = (-0.5 * (turns[-1].double() * TURN.value).square()).exp()
        targets.append(torch.stack((cosine, torch.zeros_like(cosine)), -1).flatten())
        weights.append(filled(factor.weight.double(), count).repeat_interleave(2))
    left, right = (2 * len(t) for t in turns)
    pieces = (left // FEATURES) * (right // FEATURES)
    columns = triton.cdiv(n, TILE.value)
    width = min(LONGEST, max(ADDED.value, triton.cdiv(columns, triton.cdiv(PROGRAMS, replicas * pieces))))
    splits = triton.cdiv(columns, width)
    parts = y.new_empty((replicas, splits, left, right), dtype=torch.float64)
    gpu.launch(
        products_kernel, (replicas * splits * pieces,), y, *turns, parts, n, tiles, left, right, splits, width,
        FEATURES=FEATURES, num_warps=8,
    )  # fmt: skip
    difference = parts.sum(1)
    difference[:, ::2, ::2] -= columns * TILE.value - n
    difference = difference / n - targets[0][:, None] * targets[1]
    weighted = weights[0][:, None] * weights[1] * difference
    value = n * (weighted * difference).sum((-2, -1))
    if not gradient:
        return value, None
    by, slope = (2 * weighted).float(), whitened.new(2)
    for own, other in ((0, 1), (1, 0)):
        gpu.launch(
            pull_kernel, (replicas * tiles * TILE.value // 64,), y, turns[own], turns[other], by, slope, tiles,
            2 * len(turns[own]), 2 * len(turns[other]), by.stride(1 + own), by.stride(1 + other), own, ROWS=64,
            FEATURES=FEATURES, DEPTH=DEPTH, num_warps=8, num_stages=1,  # loads ahead would take registers
        )  # fmt: skip
    return value, slope


def statistic(whitened: Whitened, factors: list[Factor], gradient: bool) -> tuple[Tensor, Tensor]:
    """As characteristic.forward, of points that are white already."""
    numbers = math.prod(2 * len(f.weight) for f in factors)
    group = max(1, SUMS // numbers)
    values, slopes = [], []
    for points, map, singular in zip(*(t.split(group) for t in whitened[:3]), strict=True):
        part = whitened._replace(points=points, map=map, singular=singular)
        value, slope = by_waves(part, factors[0], gradient) if len(factors) == 1 else by_products(part, factors, gradient)
        values.append(value.to(points.dtype).masked_fill(singular > 0, 4 * part.n))
        if slope is not None:
            slopes.append(carried_back(part, slope, moments(points, slope, part.n, part.d, tiled=True)))
    replicas, d = whitened.map.shape[:2]
    return torch.cat(values), torch.cat(slopes) if gradient else whitened.points.new_empty((replicas, 0, d))


def forward(z: Tensor, vectors: Tensor, beta: float, method: str, gradient: bool) -> tuple[Tensor, Tensor]:
    """As characteristic.forward, of float32. "random" asks nothing of the host; the others choose nodes by the points."""
    replicas, n, d = z.shape
    if not replicas:
        return z.new_empty(0), z.new_empty((0, n * gradient, d))
    with gpu.device_of(z):
        whitened = whiten(z, 1.0, 0.0)
        if method == "random":
            return statistic(whitened, characteristic.draws(vectors), gradient)
        y = whitened.points.transpose(2, 3).flatten(1, 2)[:, :n]
        if method == "sliced":
            return statistic(whitened, characteristic.lines(y, vectors, beta), gradient)
        factors = characteristic.grid(y, beta)
        if math.prod(2 * len(f.weight) for f in factors) > characteristic.LARGEST_GRID:
            return exact.forward(z, beta, gradient)
        return statistic(whitened, factors, gradient)
