r"""The smooth k-nearest-neighbour statistic of reference.py in Triton, all repetitions in one launch.

Lanes are rows i of P, and a program goes through all other points j of its repetition, lanes together:

    f(x) = prod_j (1 + w_j x),   P_j = w_j [x^{k-1}] f(x) / (1 + w_j x) / [x^k] f(x),   w_j = exp(-alpha D_j) k / sum

With odds w that sum to k no coefficient overflows: [x^m] f <= k^m / m!. Where most are chosen, those who are not are found.
Dividing f by a factor cancels where w_j is large. Instead the product of the factors before a point (prefix) meets that of
those after it (suffix); both grow by one factor a point, all terms are positive, and nothing is divided. Points go in blocks of
4: of prefix times suffix, without the block, the 4 highest coefficients are taken, and each point multiplies them with the
three others' factors. Prefixes of a segment of blocks stay in registers; from segment to segment they go through a workspace.
The odds are found anew in each pass: to keep them would cost more.

    1. the sum of exp(-alpha D); 2. prefixes; 3. suffixes and P, whose excess over k / (N-1) goes into a workspace [j, i];
    4. its column sums and products with its transpose, in tiles

At k = 10 these issue 20, 23, 46 and 33 instructions a pair (counted in sm_90 code), 36 of them the 4 k multiply-adds of two
prefixes, suffix and product. 20,000 repetitions of 100 + 100 points, rows padded to 256, are 4.1e9 instructions of a warp:
4.3 ms of an H200's 528 schedulers at 1.8 GHz (k = 1: 2.2 ms). Special functions, two a distance, take 1.7 ms of their pipes. A
program's workspace is 0.37 MB, that of the 264 that run at a time 96 MB, twice the L2 cache; 0.8 MB pass through it a
repetition, 16 GB in all, 3.4 ms beside the rest if all of it came from memory.

Points of the two samples alternate, as evenly as their numbers allow: the roundings of a long product drift from its one end to
the other, which would look like a difference between the samples. Sums that meet their expectation are in float64.

float32 serves where it is not seen in the result: distances are not too long, [x^k] f has not vanished, the statistic's
deviation is not small beside k. Elsewhere NaN marks the repetition, and a second launch does those that are marked, and all of
float64 data, in float64 by the recursions that hold for every alpha: points are chosen with probabilities p_j that sum to about
k, and 1 + w_j x becomes 1 - p_j + p_j x. Where none is marked it only looks. Nothing waits for the device.
"""
# mypy: disable-error-code="assignment, misc, var-annotated"
# In Triton's language a loop that is unrolled may grow a tuple.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu
from libi_fast.kernels.smooth_knn import reference

MOST_CHOSEN, MOST_POINTS, MOST_DIMENSIONS = 16, 1024, 8
LANES, REGISTERS = 512, 128  # rows at work on a multiprocessor, in float32; in float64 half as many have twice as many each
ROWS = 256  # at most, that a program has at a time
WORKSPACE = 2**28  # bytes at most, for all programs
MULTIPROCESSORS = 132  # where there is no GPU to ask

JITTER = tl.constexpr(reference.JITTER)
LOG2_E = tl.constexpr(1.4426950408889634)
# Of float32, as in cpu.cpp: alpha D at most, [x^k] f at least, k / sqrt(variance) at most.
LONGEST, LEAST, STEEPEST = tl.constexpr(16.0), tl.constexpr(1e-12), tl.constexpr(4.0)
NEWTON, BISECTIONS = tl.constexpr(10), tl.constexpr(50)


def refusal(n1: int, n2: int, d: int, k: int) -> str | None:
    """Why this kernel does not take the sizes, or None."""
    n = n1 + n2
    if n > MOST_POINTS:
        return f"it takes at most {MOST_POINTS} points of both samples together, got {n}"
    if d > MOST_DIMENSIONS:
        return f"it takes points of at most {MOST_DIMENSIONS} dimensions, got {d}"
    if min(k, n - 1 - k) > MOST_CHOSEN:
        return f"it takes k up to {MOST_CHOSEN}, or as near to the {n - 1} others, got {k}"
    return None


# --- polynomials: tuples of coefficients, the constant first ---


@triton.jit
def raised(low, high, w, q, TILTED: tl.constexpr):
    """The coefficient of x^m after multiplication by q + w x, from those of x^m and x^(m-1) before; q = 1 unless TILTED."""
    return w * high + (q * low if TILTED else low)


@triton.jit
def times(f, w, q, COUNT: tl.constexpr, TILTED: tl.constexpr):
    """f(x) (q + w x), COUNT coefficients."""
    product = (q * f[0] if TILTED else f[0],)
    for m in tl.static_range(1, COUNT):
        product = product + (raised(f[m], f[m - 1], w, q, TILTED),)
    return product


@triton.jit
def coefficient(f, g, FIRST: tl.constexpr, DEGREE: tl.constexpr):
    """[x^DEGREE] f(x) g(x), where f's coefficients begin at FIRST of the tuple."""
    total = tl.zeros(g[0].shape, g[0].dtype)
    if DEGREE >= 0:
        total = f[FIRST] * g[DEGREE]
        for m in tl.static_range(1, DEGREE + 1):
            total += f[FIRST + m] * g[DEGREE - m]
    return total


@triton.jit
def constant_one(like, COUNT: tl.constexpr):
    zero = tl.zeros(like.shape, like.dtype)
    f = (zero + 1.0,)
    for m in tl.static_range(1, COUNT):
        f = f + (zero,)
    return f


@triton.jit
def left_out(o0, o1, o2, o3, w, FIRST: tl.constexpr, TILTED: tl.constexpr):
    """Of 4 points, whose (w, q) begin at FIRST of the tuple w, each one's w times the coefficient of x^(k-1) of all others'
    product; o0 to o3 are those of x^(k-1) to x^(k-4) without the four."""
    w0, q0, w1, q1 = w[FIRST], w[FIRST + 1], w[FIRST + 2], w[FIRST + 3]
    w2, q2, w3, q3 = w[FIRST + 4], w[FIRST + 5], w[FIRST + 6], w[FIRST + 7]
    t0, t1, t2 = raised(o0, o1, w2, q2, TILTED), raised(o1, o2, w2, q2, TILTED), raised(o2, o3, w2, q2, TILTED)
    u0, u1 = raised(t0, t1, w3, q3, TILTED), raised(t1, t2, w3, q3, TILTED)
    s0, s1, s2 = raised(o0, o1, w0, q0, TILTED), raised(o1, o2, w0, q0, TILTED), raised(o2, o3, w0, q0, TILTED)
    v0, v1 = raised(s0, s1, w1, q1, TILTED), raised(s1, s2, w1, q1, TILTED)
    return (
        w0 * raised(u0, u1, w1, q1, TILTED), w1 * raised(u0, u1, w0, q0, TILTED),
        w2 * raised(v0, v1, w3, q3, TILTED), w3 * raised(v0, v1, w2, q2, TILTED),
    )  # fmt: skip


# --- distances and odds: a slot has a point, its coordinates and after them which sample it is of ---


@triton.jit
def arrange(
    a, b, points, n1, n2, slots, a_point, a_coordinate, b_point, b_coordinate, COMPLEMENT: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Points into slots, the samples in turn. Slots beyond have their points at infinity, where odds are 0; with COMPLEMENT,
    where they would not be, a copy of the first."""
    n = n1 + n2
    for begin in range(0, slots, ROWS):
        slot = begin + tl.arange(0, ROWS)
        place = tl.where(slot < n, slot, 0)
        of_a = (place * n1 + n - 1) // n  # before this slot
        first = ((place + 1) * n1 + n - 1) // n > of_a
        at_a = a + of_a.to(tl.int64) * a_point
        at_b = b + (place - of_a).to(tl.int64) * b_point
        for c in tl.static_range(D):
            value = tl.load(at_a + tl.cast(a_coordinate, tl.int64) * c, mask=first, other=0.0)
            value += tl.load(at_b + tl.cast(b_coordinate, tl.int64) * c, mask=first == 0, other=0.0)
            if not COMPLEMENT:
                value = tl.where(slot < n, value, float("inf"))
            tl.store(points + slot * (D + 1) + c, value.to(points.dtype.element_ty), mask=slot < slots)
        tl.store(points + slot * (D + 1) + D, tl.where(first, 0.0, 1.0).to(points.dtype.element_ty), mask=slot < slots)


@triton.jit
def point_of(at, D: tl.constexpr):
    z = ()
    for c in tl.static_range(D):
        z = z + (tl.load(at + c),)
    return z


@triton.jit
def distance_of(z, at, D: tl.constexpr):
    other = point_of(at, D)
    square = (z[0] - other[0]) * (z[0] - other[0]) + JITTER
    for c in tl.static_range(1, D):
        square += (z[c] - other[c]) * (z[c] - other[c])
    return tl.sqrt(square)


@triton.jit
def factor_of(
    z, own, left, at, slope, shift, I: tl.constexpr, COMPLEMENT: tl.constexpr, D: tl.constexpr, TILTED: tl.constexpr
):  # fmt: skip
    """(w, q) of slot I from ``at``: odds, or TILTED p and 1 - p; (0, 1) for a row's own slot and those without a point.
    ``own`` and ``left``: the slot of the row and the first without a point, counted from ``at``."""
    exponent = slope * distance_of(z, at + I * (D + 1), D) + shift
    present = own != I
    if COMPLEMENT:
        present = present & (left > I)
    if TILTED:
        small = tl.exp(-tl.abs(exponent))
        part = 1.0 / (1.0 + small)
        w = tl.where(exponent < 0.0, small * part, part)
        q = tl.where(present, tl.where(exponent < 0.0, part, small * part), 1.0)
    else:
        w = tl.exp2(exponent)
        q = w  # not used
    return tl.where(present, w, 0.0), q


@triton.jit
def scale_odds(z, row, points, n, slots, slope, K: tl.constexpr, D: tl.constexpr):
    """log2 of what makes the odds 2^(slope D) sum to K, and the longest distance."""
    total = tl.zeros(z[0].shape, z[0].dtype)
    longest = tl.zeros(z[0].shape, z[0].dtype)
    at = points
    own = row
    left = n
    for _ in range(0, slots // 4):
        for i in tl.static_range(4):
            distance = distance_of(z, at + i * (D + 1), D)
            total += tl.where((own != i) & (left > i), tl.exp2(slope * distance), 0.0)
            longest = tl.maximum(longest, tl.where(left > i, distance, 0.0))
        at += 4 * (D + 1)
        own -= 4
        left -= 4
    return tl.log2(K / total), longest


@triton.jit
def logit_at(z, at, slope, D: tl.constexpr):
    """slope D in float32, enough for `tilt`."""
    other = point_of(at, D)
    square = tl.full(z[0].shape, JITTER, tl.float32)
    for c in tl.static_range(D):
        difference = (z[c] - other[c]).to(tl.float32)
        square += difference * difference
    return slope * tl.sqrt(square)


@triton.jit
def tilt(z, row, points, n, slope, K: tl.constexpr, D: tl.constexpr):
    """t such that sum_j sigmoid(slope D_j + t) = K within 1/4. P is the same for any t, hence a rough one does. Newton's method
    on the logarithm, then bisection."""
    lowest = tl.full(z[0].shape, float("inf"), tl.float32)
    highest = -lowest
    for slot in range(0, n):
        logit = logit_at(z, points + slot * (D + 1), slope, D)
        lowest = tl.where(row != slot, tl.minimum(lowest, logit), lowest)
        highest = tl.where(row != slot, tl.maximum(highest, logit), highest)
    fair = tl.log(K / (n - 1.0 - K))  # every probability K / (n - 1)
    low = fair - highest
    high = fair - lowest
    t = low
    iteration = 0
    todo = 1
    while (todo > 0) & (iteration < NEWTON + BISECTIONS):
        total = tl.zeros(t.shape, tl.float32)
        variance = tl.zeros(t.shape, tl.float32)
        for slot in range(0, n):
            exponent = logit_at(z, points + slot * (D + 1), slope, D) + t
            small = tl.exp(-tl.abs(exponent))
            part = 1.0 / (1.0 + small)
            total += tl.where(row != slot, tl.where(exponent < 0.0, small * part, part), 0.0)
            variance += tl.where(row != slot, small * part * part, 0.0)
        off = tl.abs(total - K) > 0.25  # a NaN is never to do
        low = tl.where(off & (total < K), t, low)
        high = tl.where(off & (total >= K), t, high)
        newton = t + total * tl.log(K / total) / variance
        good = (newton > low) & (newton < high) & (iteration < NEWTON)
        t = tl.where(off, tl.where(good, newton, 0.5 * (low + high)), t)
        todo = tl.max(off.to(tl.int32), 0)
        iteration += 1
    return t.to(z[0].dtype)


# --- the statistic of one repetition ---


@triton.jit
def find_prefixes(
    z, row, points, prefixes, n, segments, slope, shift, K: tl.constexpr, COMPLEMENT: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr, ROWS: tl.constexpr, TILTED: tl.constexpr,
):  # fmt: skip
    """The polynomial before each segment into the workspace [segments, K, ROWS]; the whole product's coefficient of x^K."""
    f = constant_one(z[0], K + 1)
    place = prefixes + tl.arange(0, ROWS)
    at = points
    own = row
    left = n
    for _ in range(0, segments):
        for m in tl.static_range(0 if TILTED else 1, K):
            tl.store(place + m * ROWS, f[m])
        for i in tl.static_range(4 * S):
            w, q = factor_of(z, own, left, at, slope, shift, i, COMPLEMENT, D, TILTED)
            f = times(f, w, q, K + 1, TILTED)
        place += K * ROWS
        at += 4 * S * (D + 1)
        own -= 4 * S
        left -= 4 * S
    return f[K]


@triton.jit
def add_excess(
    z, row, points, prefixes, excess, n, segments, slope, shift, whole, weight, K: tl.constexpr, COMPLEMENT: tl.constexpr,
    D: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, TILTED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """weight (P - K / (n-1)) of the rows into (or, with ADD, onto) the workspace [slots, ROWS], where a row's own slot does not
    count; the sums of P over either sample, up to a factor of the row."""
    scale = weight / whole
    level = weight * K / (n - 1.0)
    f = constant_one(z[0], K)  # after
    of_a = tl.zeros((ROWS,), tl.float64)
    of_b = tl.zeros((ROWS,), tl.float64)
    last = (segments - 1) * 4 * S
    before_place = prefixes + (segments - 1) * K * ROWS + tl.arange(0, ROWS)
    place = excess + last * ROWS + tl.arange(0, ROWS)
    at = points + last * (D + 1)
    own = row - last
    left = n - last
    for _ in range(0, segments):
        before = constant_one(z[0], 1)
        if TILTED:
            before = (tl.load(before_place),)
        for m in tl.static_range(1, K):
            before = before + (tl.load(before_place + m * ROWS),)
        held = before
        factors = ()
        for block in tl.static_range(S):
            for i in tl.static_range(4):
                w, q = factor_of(z, own, left, at, slope, shift, 4 * block + i, COMPLEMENT, D, TILTED)
                factors = factors + (w, q)
                if block + 1 < S:
                    before = times(before, w, q, K, TILTED)
            if block + 1 < S:
                held = held + before
        total = tl.zeros((ROWS,), z[0].dtype)
        second = tl.zeros((ROWS,), z[0].dtype)
        for block in tl.static_range(S - 1, -1, -1):
            if K == 1 and not TILTED:
                found = (factors[8 * block], factors[8 * block + 2], factors[8 * block + 4], factors[8 * block + 6])
            else:
                o0 = coefficient(held, f, block * K, K - 1)
                o1 = coefficient(held, f, block * K, K - 2)
                o2 = coefficient(held, f, block * K, K - 3)
                o3 = coefficient(held, f, block * K, K - 4)
                found = left_out(o0, o1, o2, o3, factors, 8 * block, TILTED)
            for i in tl.static_range(4):
                f = times(f, factors[8 * block + 2 * i], factors[8 * block + 2 * i + 1], K, TILTED)
                total += found[i]
                second += found[i] * tl.load(at + ((4 * block + i) * (D + 1) + D))
                value = found[i] * scale - level
                if ADD:
                    value += tl.load(place + (4 * block + i) * ROWS)
                tl.store(place + (4 * block + i) * ROWS, value, mask=row < n)
        of_a += total.to(tl.float64) - second.to(tl.float64)
        of_b += second.to(tl.float64)
        before_place -= K * ROWS
        place -= 4 * S * ROWS
        at -= 4 * S * (D + 1)
        own += 4 * S
        left += 4 * S
    return of_a, of_b


@triton.jit
def sums_of(excess, n, slots, ROWS: tl.constexpr, TILE: tl.constexpr):
    """sum_j (sum_i E_ij)^2 and sum_ij E_ij (E_ij + E_ji), i != j."""
    zero = tl.zeros((TILE, TILE), excess.dtype.element_ty)
    pairs = zero
    squares = tl.zeros((TILE,), tl.float64)
    down_one, right_one = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    along, across = down_one * ROWS + right_one, right_one * ROWS + down_one
    for down in range(0, n, TILE):
        column = zero
        for right in range(0, n, TILE):
            inside = (down_one < n - down) & (right_one < n - right) & (right_one - down_one != down - right)
            straight = tl.load(excess + ((right // ROWS * slots + down) * ROWS + right % ROWS) + along, mask=inside, other=0.0)
            turned = tl.load(excess + ((down // ROWS * slots + right) * ROWS + down % ROWS) + across, mask=inside, other=0.0)
            pairs += straight * (straight + turned)
            column += straight
        total = tl.sum(column, 1).to(tl.float64)
        squares += total * total
    return tl.sum(squares, 0), tl.sum(tl.sum(pairs.to(tl.float64), 1), 0)


@triton.jit
def statistic_of(
    a, b, alphas, points, prefixes, excess, n1, n2, count, slots, a_point, a_coordinate, b_point, b_coordinate,
    K: tl.constexpr, COMPLEMENT: tl.constexpr, D: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    TILTED: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    FLOAT: tl.constexpr = points.dtype.element_ty
    n = n1 + n2
    arrange(a, b, points, n1, n2, slots, a_point, a_coordinate, b_point, b_coordinate, COMPLEMENT, D, ROWS)
    tl.debug_barrier()  # other threads wrote what is read now
    weight = (1.0 / tl.cast(count, tl.float64)).to(FLOAT)
    segments = slots // (4 * S)
    between = tl.zeros((ROWS,), tl.float64)
    fine = tl.full((ROWS,), 1, tl.int32)
    for begin in range(0, n, ROWS):
        row = begin + tl.arange(0, ROWS)
        at = points + tl.where(row < n, row, 0) * (D + 1)
        z = point_of(at, D)
        in_b = tl.load(at + D) > 0.5
        expected = tl.where(in_b, n1, n2).to(tl.float64) / (n - 1)
        here = excess + begin * slots
        if SEVERAL:
            for slot in range(0, slots):
                tl.store(here + slot * ROWS + tl.arange(0, ROWS), tl.zeros((ROWS,), FLOAT))
            tl.debug_barrier()
        for index in range(0, count):
            alpha = tl.load(alphas + index).to(FLOAT)
            slope = alpha if COMPLEMENT else -alpha
            if TILTED:
                shift = tilt(z, row, points, n, slope.to(tl.float32), K, D)
            else:
                slope *= LOG2_E
                shift, longest = scale_odds(z, row, points, n, slots, slope, K, D)
                fine = tl.where(alpha * longest <= LONGEST, fine, 0)
            whole = tl.full((ROWS,), 1.0, FLOAT)
            if TILTED or K > 1:
                whole = find_prefixes(z, row, points, prefixes, n, segments, slope, shift, K, COMPLEMENT, D, S, ROWS, TILTED)
                tl.debug_barrier()
            if not TILTED:
                fine = tl.where(whole >= LEAST, fine, 0)
            of_a, of_b = add_excess(
                z, row, points, prefixes, here, n, segments, slope, shift, whole, weight, K, COMPLEMENT, D, S, ROWS, TILTED,
                SEVERAL,
            )  # fmt: skip
            tl.debug_barrier()
            other = tl.where(in_b, of_a, of_b) / (of_a + of_b)
            between += tl.where(row < n, K * (other - expected) / count, 0.0)

    squares, pairs = sums_of(excess, n, slots, ROWS, TILE)
    size, size1, size2 = tl.cast(n, tl.float64), tl.cast(n1, tl.float64), tl.cast(n2, tl.float64)
    chi1 = size1 * size2 / (size * (size - 1.0))
    chi2 = 4.0 * (size1 - 1.0) * (size2 - 1.0) / ((size - 2.0) * (size - 3.0))
    deviation = tl.sqrt(chi1 * (1.0 - chi2) * squares + chi1 * chi2 * pairs + JITTER)
    value = tl.sum(between, 0) / deviation
    if not COMPLEMENT:
        value = -value
    if not TILTED:
        value = tl.where((tl.min(fine, 0) > 0) & (STEEPEST * deviation >= K), value, float("nan"))
    return value


COUNTS = (
    "replicas", "n1", "n2", "count", "slots", "a_replica", "a_point", "a_coordinate", "b_replica", "b_point",
    "b_coordinate",
)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def smooth_knn_kernel(
    a, b, alphas, out, points, prefixes, excess, replicas, n1, n2, count, slots, a_replica, a_point, a_coordinate,
    b_replica, b_point, b_coordinate, K: tl.constexpr, COMPLEMENT: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, TILTED: tl.constexpr, SEVERAL: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """Repetitions in turn, each program in its own part of the workspace; if MARKED only those where out holds NaN."""
    program = tl.cast(tl.program_id(0), tl.int64)
    points += program * slots * (D + 1)
    prefixes += program * (slots // (4 * S) * K * ROWS)
    excess += program * slots * (tl.cdiv(n1 + n2, ROWS) * ROWS)
    for replica in range(tl.program_id(0), replicas, tl.num_programs(0)):
        todo = True
        if MARKED:
            held = tl.load(out + replica)
            todo = held != held
        if todo:
            at = tl.cast(replica, tl.int64)
            value = statistic_of(
                a + at * a_replica, b + at * b_replica, alphas, points, prefixes, excess, n1, n2, count, slots, a_point,
                a_coordinate, b_point, b_coordinate, K, COMPLEMENT, D, S, ROWS, TILE, TILTED, SEVERAL,
            )  # fmt: skip
            tl.store(out + replica, value.to(out.dtype.element_ty))


# --- the launcher ---


def forward(a: Tensor, b: Tensor, k: int, alphas: Sequence[float]) -> Tensor:
    """As reference.forward, the value alone: a [R, n1, d], b [R, n2, d], any strides -> [R]."""
    others = a.shape[1] + b.shape[1] - 1
    chosen = min(k, others - k)
    if chosen == 0 or len(a) == 0:  # everyone is everyone's neighbour; a NaN remains one
        return 0 * (a.sum((1, 2)) + b.sum((1, 2)))
    out = a.new_empty(len(a))
    slopes = torch.cat([a.new_full((1,), alpha, dtype=torch.float64) for alpha in alphas])  # by fills: no copy from the host
    with gpu.device_of(a):
        if a.dtype == torch.float32:
            launch(a, b, slopes, out, chosen, k > chosen, tilted=False)
        launch(a, b, slopes, out, chosen, k > chosen, tilted=True)
    return out


def launch(a: Tensor, b: Tensor, slopes: Tensor, out: Tensor, chosen: int, complement: bool, tilted: bool) -> None:
    """In float32, or tilted in float64."""
    replicas, n1, d = a.shape
    n = n1 + b.shape[1]
    dtype, numbers = (torch.float64, 26) if tilted else (torch.float32, 34)  # that registers hold
    blocks = max(1, min(4 - d // 4 - (chosen > 4), (numbers - 2 * d) // chosen))
    wave = 64 if gpu.amd() else 32
    rows = min(ROWS, max(wave, triton.next_power_of_2(n)))
    slots = triton.cdiv(n, 4 * blocks) * 4 * blocks
    sizes = slots * (d + 1), slots // (4 * blocks) * chosen * rows, slots * triton.cdiv(n, rows) * rows
    # In float64 too: left to itself the assembler takes 168 for a program of one warp, and spills.
    limit = {} if gpu.amd() else {"maxnreg": 255 if tilted else REGISTERS}
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else MULTIPROCESSORS
    fit = WORKSPACE // (sum(sizes) * dtype.itemsize)
    programs = max(1, min(replicas, fit, processors * max(1, LANES // (rows * (1 + tilted)))))
    points, prefixes, excess = (a.new_empty(programs * size, dtype=dtype) for size in sizes)
    gpu.launch(
        smooth_knn_kernel, (programs,), a, b, slopes, out, points, prefixes, excess, replicas, n1, n - n1, len(slopes), slots,
        *a.stride(), *b.stride(), K=chosen, COMPLEMENT=complement, D=d, S=blocks, ROWS=rows, TILE=32 if rows == 256 else 16,
        TILTED=tilted, SEVERAL=len(slopes) > 1, MARKED=tilted and a.dtype == torch.float32, num_warps=rows // wave, **limit,
    )  # fmt: skip
