r"""Whitening of points and the gradient's way back from them (whitening.hpp states the maths), in Triton; every sum in double.

A = L^-1 diag(1/s) is made of the points' moments about the first of them: in double n points cost at most n 1e-16 of a
covariance's digits by that, so one pass serves. A replica is singular where its correlations C have
lambda_min <= 10 d eps lambda_max: where an elimination of C - 10 d eps lambda_max I meets a pivot that is not positive. Power
iteration gives lambda_max (32 products: a few per cent low at worst, where eigenvalues lie close). Nothing is read by the host,
so all of it goes into a CUDA graph.

Whitened points, and all else that has a few numbers a point, lie in tiles [R, tiles, columns, 32]: each column of a tile is one
load of a warp, and the distance from column to column a constant. The tiles are filled up to whole blocks.

Bound: memory and launches. z is read d + 2 times, mostly from the cache, and d^2 multiply-adds a point and pass are double.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu

TILE = tl.constexpr(32)
BLOCK = 128  # points of a program, and of what tiles are filled up to
NUMBERS = 2048  # of a program of the moments at a time
SPANS = 32  # that a replica's points are cut into at most, for their moments: one warp adds them up, one after another
PROGRAMS = 1024  # of the moments
EPS = tl.constexpr(2.0**-23)


@triton.jit
def double(high, low):
    """Of the two floats that ``halves`` made: a launch passes floats alone."""
    return tl.cast(high, tl.float64) + tl.cast(low, tl.float64)


def halves(value: float) -> tuple[float, float]:
    high = torch.tensor(value, dtype=torch.float32).item()
    return high, value - high


@triton.jit
def place(i, column, row_step, column_step, TILED: tl.constexpr):
    """Of column ``column`` of point i in an array of tiles (row_step: numbers of a tile), or of rows."""
    if TILED:
        at = i // TILE * row_step + column * TILE + i % TILE
    else:
        at = i * row_step + tl.cast(column, tl.int64) * column_step
    return at


@triton.jit(do_not_specialize=[
    "n", "a_columns", "spans", "steps", "a_replica_step", "a_row_step", "a_column_step", "b_replica_step", "b_row_step",
    "b_column_step",
])  # fmt: skip
def moments_kernel(
    a, b, out, n, a_columns, spans, steps, a_replica_step, a_row_step, a_column_step, b_replica_step, b_row_step, b_column_step,
    B_COLUMNS: tl.constexpr, TILED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_i a_ic b_ie over one span for one c, or sum_i b_ie for c = a_columns -> out [R, spans, a_columns + 1, B_COLUMNS].
    Rows, unlike tiles, are taken about the first of them."""
    c = tl.program_id(0) % (a_columns + 1)
    span = tl.program_id(0) // (a_columns + 1) % spans
    replica = tl.cast(tl.program_id(0) // (a_columns + 1) // spans, tl.int64)
    a += replica * a_replica_step
    b += replica * b_replica_step
    column = tl.arange(0, WIDTH)[None, :]
    known = column < B_COLUMNS
    a_pivot = tl.cast(0.0, tl.float64)
    b_pivot = tl.zeros((1, WIDTH), tl.float64)
    if not TILED:
        if c < a_columns:
            a_pivot = tl.load(a + place(0, c, 0, a_column_step, False)).to(tl.float64)
        b_pivot = tl.load(b + place(0, column, 0, b_column_step, False), mask=known, other=0.0).to(tl.float64)
    total = tl.zeros((BLOCK, WIDTH), tl.float64)
    for step in range(0, steps):
        i = (tl.cast(span, tl.int64) * steps + step) * BLOCK + tl.arange(0, BLOCK)[:, None]
        inside = i < n
        here = tl.load(b + place(i, column, b_row_step, b_column_step, TILED), mask=inside & known, other=0.0)
        term = tl.where(inside, here.to(tl.float64) - b_pivot, 0.0)
        if c < a_columns:
            other = tl.load(a + place(i, c, a_row_step, a_column_step, TILED), mask=inside, other=0.0)
            term *= other.to(tl.float64) - a_pivot
        total += term
    line = (replica * spans + span) * (a_columns + 1) + c
    tl.store(out + line * B_COLUMNS + column, tl.sum(total, 0)[None, :], mask=known)


@triton.jit
def eliminated(matrix, i, j, D: tl.constexpr):
    """(P, L^-1) of a symmetric matrix L P L', L unit lower triangular, P diagonal, as a column."""
    inverse = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    for k in range(0, D):
        row = tl.sum(tl.where(i == k, matrix, 0.0), 0)[None, :]
        column = tl.sum(tl.where(j == k, matrix, 0.0), 1)[:, None]
        pivot = tl.sum(tl.where(j == k, row, 0.0), 1)[:, None]
        own = tl.sum(tl.where(i == k, inverse, 0.0), 0)[None, :]
        share = tl.where(i > k, column / pivot, 0.0)
        matrix -= share * row
        inverse -= share * own
    return tl.sum(tl.where(i == j, matrix, 0.0), 1)[:, None], inverse


@triton.jit
def factored(covariance, mean, i, j, D: tl.constexpr):
    """Of a covariance [WIDTH, WIDTH] and the mean, a row: A (0 where singular), and whether it is singular."""
    inside = (i < D) & (j < D)
    own = tl.where(i == j, tl.maximum(covariance, 0.0), 0.0)
    row_scale, column_scale = tl.sqrt(tl.sum(own, 0)[None, :]), tl.sqrt(tl.sum(own, 1)[:, None])
    constant = (row_scale <= tl.abs(mean) * (10.0 * EPS)) & (j < D)
    finite = tl.max(tl.max(tl.where(tl.abs(covariance) < float("inf"), 0, 1), 1), 0) == 0  # NaN is not below infinity
    flat = tl.max(tl.max(constant.to(tl.int32), 1), 0) > 0
    eye = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    sound = inside & finite & (flat == 0)
    correlation = tl.where(sound, covariance / tl.where(sound, column_scale * row_scale, 1.0), eye)
    vector = tl.where(j < D, 1.0 + (j * 5 % 11) * 0.1, 0.0).to(tl.float64)  # a direction that is no likely eigenvector's rival
    largest = tl.cast(1.0, tl.float64)
    for _ in range(0, 16):
        moved = tl.sum(correlation * vector, 1)[:, None]
        vector = tl.sum(correlation * moved, 0)[None, :]
        largest = tl.sqrt(tl.sum(tl.sum(vector * vector, 1), 0) / tl.sum(tl.sum(moved * moved, 1), 0))
        vector /= tl.sqrt(tl.sum(tl.sum(vector * vector, 1), 0))
    lowered, _ = eliminated(correlation - eye * largest * (10.0 * D * EPS), i, j, D)
    short = tl.max(tl.max(tl.where(lowered > 0.0, 0, 1), 1), 0) > 0
    pivots, inverse = eliminated(correlation, i, j, D)
    regular = finite & (flat == 0) & (short == 0)
    safe = tl.where(regular & inside, tl.sqrt(pivots) * row_scale, 1.0)
    return tl.where(regular, inverse / safe, 0.0), (finite & (regular == 0)).to(tl.int32)


@triton.jit(do_not_specialize=["n", "spans", "replica_step", "column_step"])
def factor_kernel(
    z, moments, map, shift, singular, n, spans, replica_step, column_step, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Of one replica A [D, D], the mean [D], and whether it is singular (then A = 0)."""
    replica = tl.cast(tl.program_id(0), tl.int64)
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (i < D) & (j < D)
    second = tl.zeros((WIDTH, WIDTH), tl.float64)
    row_mean = tl.zeros((1, WIDTH), tl.float64)
    column_mean = tl.zeros((WIDTH, 1), tl.float64)
    at = moments + replica * spans * ((D + 1) * D)
    for _ in range(0, spans):
        second += tl.load(at + i * D + j, mask=inside, other=0.0)
        row_mean += tl.load(at + D * D + j, mask=j < D, other=0.0)
        column_mean += tl.load(at + D * D + i, mask=i < D, other=0.0)
        at += (D + 1) * D
    count = tl.cast(n, tl.float64)
    row_mean /= count
    covariance = second / count - (column_mean / count) * row_mean
    pivot = tl.load(z + replica * replica_step + place(0, j, 0, column_step, False), mask=j < D, other=0.0)
    mean = pivot.to(tl.float64) + row_mean
    tl.store(shift + replica * D + j, mean, mask=j < D)
    factor, degenerate = factored(covariance, mean, i, j, D)
    tl.store(map + (replica * D + i) * D + j, factor, mask=inside)
    tl.store(singular + replica, degenerate)


@triton.jit
def standardised(z, map, shift, i, column, inside, row_step, column_step, TILED: tl.constexpr, D: tl.constexpr):
    """Columns ``column`` of A (z - mean) of points i, in double."""
    u = tl.zeros((i.shape[0], column.shape[1]), tl.float64)
    for k in range(0, D):
        here = tl.load(z + place(i, k, row_step, column_step, TILED), mask=inside, other=0.0)
        centred = here.to(tl.float64) - tl.load(shift + k)
        u += centred * tl.load(map + column * D + k, mask=column < D, other=0.0)
    return u


@triton.jit(do_not_specialize=["n", "tiles", "replica_step", "row_step", "column_step"])
def points_kernel(
    z, map, shift, out, n, tiles, replica_step, row_step, column_step, scale_high, scale_low, padding,
    D: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """u = scale A (z - mean) of one block -> tiles of D columns, ``padding`` past the last point. NORM: a last column holds
    -|u|^2, -padding past the last point, whose u is then 0."""
    blocks = tiles * TILE // BLOCK
    replica = tl.cast(tl.program_id(0) // blocks, tl.int64)
    i = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = i < n
    at = z + replica * replica_step
    u = standardised(at, map + replica * D * D, shift + replica * D, i, column, inside, row_step, column_step, False, D)
    rounded = (u * double(scale_high, scale_low)).to(tl.float32)
    rounded = tl.where(inside, rounded, 0.0 if NORM else padding)
    C: tl.constexpr = D + NORM
    to = out + replica * tiles * (C * TILE)
    tl.store(to + place(i, column, C * TILE, 0, True), rounded, mask=column < D)
    if NORM:
        exact = tl.where(column < D, rounded, 0.0).to(tl.float64)
        square = tl.sum(exact * exact, 1)[:, None].to(tl.float32)
        tl.store(to + place(i, D, C * TILE, 0, True), -tl.where(inside, square, padding))


@triton.jit(do_not_specialize=["n", "spans"])
def way_back_kernel(
    moments, map, mixed, mean, n, spans, by_scale_high, by_scale_low,
    D: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of one replica, by the moments [R, spans, D + 1, COLUMNS] of u and the slopes g: B A [D, D] for u, and A' mean g [D]."""
    replica = tl.cast(tl.program_id(0), tl.int64)
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (i < D) & (j < D)
    upper = tl.minimum(i, j) * COLUMNS + tl.maximum(i, j)
    b = tl.zeros((WIDTH, WIDTH), tl.float64)
    slope = tl.zeros((1, WIDTH), tl.float64)
    at = moments + replica * spans * ((D + 1) * COLUMNS)
    for _ in range(0, spans):
        b += tl.load(at + upper, mask=inside, other=0.0)
        slope += tl.load(at + D * COLUMNS + j, mask=j < D, other=0.0)
        at += (D + 1) * COLUMNS
    count = tl.cast(n, tl.float64)
    back = double(by_scale_high, by_scale_low)
    b *= back * back / count
    slope /= count
    product = tl.zeros((WIDTH, WIDTH), tl.float64)
    carried = tl.zeros((1, WIDTH), tl.float64)
    for k in range(0, D):
        row = tl.load(map + (replica * D + k) * D + j, mask=j < D, other=0.0)
        product += tl.sum(tl.where(j == k, b, 0.0), 1)[:, None] * row
        carried += tl.sum(tl.where(j == k, slope, 0.0), 1)[:, None] * row
    tl.store(mixed + (replica * D + i) * D + j, product, mask=inside)
    tl.store(mean + replica * D + j, carried, mask=j < D)


@triton.jit
def in_points(u, slope, map, mixed, mean, i, column, u_step, slope_step, D: tl.constexpr):
    """Columns ``column`` of A' g - (B A)' u - A' mean g of points i, in double; u and g in tiles of so many numbers."""
    known = column < D
    total = tl.zeros(i.shape, tl.float64) - tl.load(mean + column, mask=known, other=0.0)
    for k in range(0, D):
        line = k * D + column
        g = tl.load(slope + place(i, k, slope_step, 0, True)).to(tl.float64)
        here = tl.load(u + place(i, k, u_step, 0, True)).to(tl.float64)
        total += g * tl.load(map + line, mask=known, other=0.0) - here * tl.load(mixed + line, mask=known, other=0.0)
    return total


@triton.jit(do_not_specialize=["n", "tiles", "u_columns", "columns"])
def gradient_kernel(
    u, slope, map, mixed, mean, singular, out, n, tiles, u_columns, columns,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A' g - (B A)' u - A' mean g of one block -> out [R, n, D]; 0 where singular."""
    blocks = tl.cdiv(n, BLOCK)
    replica = tl.cast(tl.program_id(0) // blocks, tl.int64)
    i = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    known = column < D
    u += replica * tiles * u_columns * TILE
    slope += replica * tiles * columns * TILE
    total = in_points(
        u, slope, map + replica * D * D, mixed + replica * D * D, mean + replica * D, i, column, u_columns * TILE,
        columns * TILE, D,
    )  # fmt: skip
    value = tl.where(tl.load(singular + replica) > 0, 0.0, total).to(tl.float32)
    tl.store(out + (replica * n + i) * D + column, value, mask=(i < n) & known)


# --- launchers ---


class Whitened(NamedTuple):
    """points: u = scale * y in tiles [R, tiles, d (+ 1), 32]; map: A [R, d, d]; singular [R], int32."""

    points: Tensor
    map: Tensor
    singular: Tensor
    n: int
    scale: float

    @property
    def d(self) -> int:
        return self.map.shape[-1]

    def new(self, columns: int) -> Tensor:
        """Tiles of so many columns."""
        return self.points.new_empty((*self.points.shape[:2], columns, TILE.value))


def width_of(columns: int) -> int:
    return max(2, triton.next_power_of_2(columns))


def moments(a: Tensor, b: Tensor, n: int, a_columns: int, tiled: bool) -> Tensor:
    """[R, spans, a_columns + 1, columns of b], of points [R, n, ...] or tiles; float64."""
    columns = b.shape[2]
    width = width_of(columns)
    block = NUMBERS // width
    programs = triton.cdiv(n, block)
    steps = triton.cdiv(programs, min(programs, SPANS, triton.cdiv(PROGRAMS, b.shape[0] * (a_columns + 1))))
    spans = triton.cdiv(programs, steps)
    out = b.new_empty((b.shape[0], spans, a_columns + 1, columns), dtype=torch.float64)
    gpu.launch(
        moments_kernel, (b.shape[0] * spans * (a_columns + 1),), a, b, out, n, a_columns, spans, steps, *a.stride()[:3],
        *b.stride()[:3], B_COLUMNS=columns, TILED=tiled, WIDTH=width, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def whiten(z: Tensor, scale: float, padding: float, norm: bool = False) -> Whitened:
    """z [R, n, d], float32, any strides."""
    replicas, n, d = z.shape
    sums = moments(z, z, n, d, tiled=False)
    map, shift = sums.new_empty((replicas, d, d)), sums.new_empty((replicas, d))
    singular = torch.empty(replicas, dtype=torch.int32, device=z.device)
    gpu.launch(
        factor_kernel, (replicas,), z, sums, map, shift, singular, n, sums.shape[1], z.stride(0), z.stride(2), D=d,
        WIDTH=width_of(d), num_warps=1,
    )  # fmt: skip
    tiles = triton.cdiv(n, BLOCK) * BLOCK // TILE.value
    points = z.new_empty((replicas, tiles, d + norm, TILE.value))
    gpu.launch(
        points_kernel, (replicas * triton.cdiv(n, BLOCK),), z, map, shift, points, n, tiles, *z.stride(), *halves(scale),
        padding, D=d, NORM=norm, WIDTH=width_of(d), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return Whitened(points, map, singular, n, scale)


def carried_back(whitened: Whitened, slope: Tensor, sums: Tensor) -> Tensor:
    """The gradient [R, n, d] from the slopes in y, tiles whose first d columns they are, and ``moments(points, slope)``."""
    points, map, singular, n, scale = whitened
    replicas, d, columns = points.shape[0], whitened.d, slope.shape[2]
    mixed, mean = map.new_empty((replicas, d, d)), map.new_empty((replicas, d))
    gpu.launch(
        way_back_kernel, (replicas,), sums, map, mixed, mean, n, sums.shape[1], *halves(1 / scale), D=d, COLUMNS=columns,
        WIDTH=width_of(d), num_warps=1,
    )  # fmt: skip
    out = points.new_empty((replicas, n, d))
    gpu.launch(
        gradient_kernel, (replicas * triton.cdiv(n, BLOCK),), points, slope, map, mixed, mean, singular, out, n,
        points.shape[1], points.shape[2], columns, D=d, WIDTH=width_of(d), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out
