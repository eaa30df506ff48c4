r"""The exact statistic (reference.py) and its gradient in Triton, from one pass over the pairs; nothing of size n x n is held.

Points are scaled, u = y b sqrt(log2(e) / 2), so that k_ij = 2^-|u_i - u_j|^2, and with K_i = sum_j k_ij, e_i =
2^(-|u_i|^2 / (1 + b^2)), T_i = sum_j k_ij (u_i - u_j):

    HZ = sum_i K_i / n - 2 (1+b^2)^{-d/2} sum_i e_i + n (1+2b^2)^{-d/2}
    slope in y_i = (-2 b^2/n T_i + 2 b^2 (1+b^2)^{-d/2-1} e_i u_i) / (b sqrt(log2(e) / 2))

Bound: of each ordered pair an exponential, which takes a scheduler 8 cycles a warp, and instructions, one a cycle. From
differences 3 d + 2: d subtractions, d for the square, the exponential, K, d for T. From products, 2 u_i.u_j - |u_i|^2
- |u_j|^2, 2 d + 3, but rounding then grows with b^2. So d = 2 waits for the exponentials (65,536 points: 1.1 ms of an H200's
528 schedulers at 1.8 GHz), d = 8 for 19 instructions from products, 42% of that bound. Compiled for sm_90 a step has, with its
loads and the loop, 8.5 a pair at d = 2 (96 registers), 20.8 at d = 8 (183) and 40.5 at d = 16 (190). A pair's two orders could
share an exponential, 11 instructions in place of 16 at d = 2, were it not for sums across threads in every step.

A tile is ROWS points by 32, a thread has one column of it: K and T stay in each thread for a split's columns, and meet in the
end. So a step loads a column once for all rows of a thread. Splits' sums are float32, and merged in double in order.
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
from libi_fast.kernels.henze_zirkler.gpu_whitening import (
    BLOCK,
    TILE,
    Whitened,
    carried_back,
    double,
    halves,
    moments,
    place,
    whiten,
    width_of,
)

WIDEST = 16  # dimensions
FAR = 4.0  # beta from which rounding of |u_i - u_j|^2 by products would be felt; up to 4 dimensions differences serve
PROGRAMS = 2048  # of the pairs, where points are few: 8 a place on an H200
LONGEST = 128  # tiles of a split: as many terms are added in float32
SHORTEST = 8
DISTANT = tl.constexpr(1e18)  # coordinates of no point: its square is finite, and 2^ of minus it is 0


@triton.jit
def near(u, row, first, end, D: tl.constexpr, DIRECT: tl.constexpr, GRADIENT: tl.constexpr):
    """Of points ``row`` [ROWS, 1] with the tiles from first to end: K and T (with GRADIENT) in each thread's column [ROWS, 32],
    and the points' own columns, twice as large for products."""
    C: tl.constexpr = D if DIRECT else D + 1
    mine = u + row.to(tl.int64) // TILE * (C * TILE) + row % TILE
    here = ()
    sums = ()
    for c in tl.static_range(D):
        here = here + (tl.load(mine + c * TILE) * (1.0 if DIRECT else 2.0),)
        if GRADIENT:
            sums = sums + (tl.zeros((row.shape[0], TILE), tl.float32),)
    square = 0.0
    if not DIRECT:
        square = tl.load(mine + D * TILE)
    total = tl.zeros((row.shape[0], TILE), tl.float32)
    at = u + tl.cast(first, tl.int64) * (C * TILE) + tl.arange(0, TILE)[None, :]
    for _ in range(first, end):
        there = ()
        for c in tl.static_range(D):
            there = there + (tl.load(at + c * TILE),)
        if DIRECT:
            between = ()
            for c in tl.static_range(D):
                between = between + (here[c] - there[c],)
            exponent = between[0] * -1.0 * between[0]  # Triton's unary minus would be a subtraction
            for c in tl.static_range(1, D):
                exponent -= between[c] * between[c]
        else:
            between = there
            exponent = square + tl.load(at + D * TILE)
            for c in tl.static_range(D):
                exponent += here[c] * there[c]
        k = tl.exp2(exponent)
        total += k
        if GRADIENT:
            grown = ()
            for c in tl.static_range(D):
                grown = grown + (sums[c] + k * between[c],)
            sums = grown
        at += C * TILE
    return total, sums, here


@triton.jit(do_not_specialize=["n", "tiles", "splits", "width"])
def pairs_kernel(
    u, out, n, tiles, splits, width,
    D: tl.constexpr, DIRECT: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS points with the ``width`` tiles of one split -> T (with GRADIENT) and K in tiles [R, splits, tiles, columns, 32]."""
    OUT: tl.constexpr = D + 1 if GRADIENT else 1
    blocks = tl.cdiv(n, ROWS)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks % splits
    replica = tl.cast(tl.program_id(0) // blocks // splits, tl.int64)
    u += replica * tiles * ((D if DIRECT else D + 1) * TILE)
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    first = split * width
    total, sums, here = near(u, row, first, tl.minimum(first + width, tl.cdiv(n, TILE)), D, DIRECT, GRADIENT)

    to = out + (replica * splits + split) * tiles * (OUT * TILE) + row.to(tl.int64) // TILE * (OUT * TILE) + row % TILE
    count = tl.sum(total, 1)[:, None]
    tl.store(to + (OUT - 1) * TILE, count)
    if GRADIENT:
        for c in tl.static_range(D):
            met = tl.sum(sums[c], 1)[:, None]
            tl.store(to + c * TILE, met if DIRECT else 0.5 * here[c] * count - met)


@triton.jit(do_not_specialize=["tiles", "splits", "u_columns"])
def slopes_kernel(
    u, parts, out, tiles, splits, u_columns, single_high, single_low, by_pairs_high, by_pairs_low, by_single_high,
    by_single_low, D: tl.constexpr, GRADIENT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one block -> tiles of the slopes in y (with GRADIENT), K and e."""
    FIRST: tl.constexpr = D if GRADIENT else 0
    blocks = tiles * TILE // BLOCK
    replica = tl.cast(tl.program_id(0) // blocks, tl.int64)
    i = tl.cast(tl.program_id(0) % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    value = tl.zeros((BLOCK, WIDTH), tl.float64)
    at = parts + replica * splits * tiles * ((FIRST + 1) * TILE) + place(i, column, (FIRST + 1) * TILE, 0, True)
    for _ in range(0, splits):
        value += tl.load(at, mask=column <= FIRST, other=0.0).to(tl.float64)
        at += tl.cast(tiles, tl.int64) * ((FIRST + 1) * TILE)
    u += replica * tiles * u_columns * TILE
    points = tl.load(u + place(i, column, u_columns * TILE, 0, True), mask=column < D, other=0.0).to(tl.float64)
    square = tl.sum(points * points, 1)[:, None]
    single = tl.exp2((-square * double(single_high, single_low)).to(tl.float32)).to(tl.float64)
    if GRADIENT:
        slope = double(by_pairs_high, by_pairs_low) * value + double(by_single_high, by_single_low) * single * points
        value = tl.where(column < D, slope, value)
    value = tl.where(column == FIRST + 1, single, value)
    to = out + replica * tiles * ((FIRST + 2) * TILE) + place(i, column, (FIRST + 2) * TILE, 0, True)
    tl.store(to, value.to(tl.float32), mask=column < FIRST + 2)


# --- launchers ---


def refusal(z: Tensor) -> str | None:
    """Why these kernels do not take the points, or None."""
    if z.dtype != torch.float32:
        return f"it computes in float32, got {z.dtype}"
    if z.shape[-1] > WIDEST:
        return f"it takes at most {WIDEST} dimensions, got {z.shape[-1]}"
    return None


def rows_of(d: int, direct: bool) -> int:
    """Points of a program of 4 warps: 16, 8 or 4 a thread, as registers hold their sums and, of differences, these."""
    if d <= 4:
        return 64
    return 32 if d <= 8 and not direct else 16


def pairs(whitened: Whitened, gradient: bool, direct: bool) -> Tensor:
    """[R, splits, tiles, d + 1 or 1, 32]: of every split of the points T (for a gradient) and K."""
    u, n, d = whitened.points, whitened.n, whitened.d
    replicas, tiles = u.shape[:2]
    rows = rows_of(d, direct)
    blocks, columns = triton.cdiv(n, rows), triton.cdiv(n, TILE.value)
    wanted = triton.cdiv(PROGRAMS, replicas * blocks)
    width = min(LONGEST, max(SHORTEST, triton.cdiv(columns, wanted)))
    splits = triton.cdiv(columns, width)
    out = u.new_empty((replicas, splits, tiles, d + 1 if gradient else 1, TILE.value))
    gpu.launch(
        pairs_kernel, (replicas * splits * blocks,), u, out, n, tiles, splits, width, D=d, DIRECT=direct, GRADIENT=gradient,
        ROWS=rows, num_warps=4,
    )  # fmt: skip
    return out


def forward(z: Tensor, beta: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """As reference.forward, of float32."""
    replicas, n, d = z.shape
    if not replicas:
        return z.new_empty(0), z.new_empty((0, n * gradient, d))
    b2 = beta * beta
    scale = beta * math.sqrt(0.5 * math.log2(math.e))
    direct = d <= 4 or beta >= FAR
    with gpu.device_of(z):
        whitened = whiten(z, scale, DISTANT.value, norm=not direct)
        parts = pairs(whitened, gradient, direct)
        own = whitened.new(d + 2 if gradient else 2)
        tiles, columns = own.shape[1:3]
        constants = 1 / (1 + b2), -2 * b2 / n / scale, 2 * b2 * (1 + b2) ** (-d / 2 - 1) / scale
        gpu.launch(
            slopes_kernel, (replicas * tiles * TILE.value // BLOCK,), whitened.points, parts, own, tiles, parts.shape[1],
            whitened.points.shape[2], *(h for c in constants for h in halves(c)), D=d, GRADIENT=gradient,
            WIDTH=width_of(max(d, columns)), BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        sums = moments(whitened.points, own, n, d if gradient else 0, tiled=True)
        near, once = sums[:, :, -1, -2:].sum(1).unbind(-1)
        value = (near / n - 2 * (1 + b2) ** (-d / 2) * once + n * (1 + 2 * b2) ** (-d / 2)).to(z.dtype)
        value = value.masked_fill(whitened.singular > 0, 4 * n)
        return value, carried_back(whitened, own, sums) if gradient else z.new_empty((replicas, 0, d))
