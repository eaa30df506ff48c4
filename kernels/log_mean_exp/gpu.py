"""log_mean_exp and its gradient (kernels/log_mean_exp/reference.py) in Triton.

Bound: memory. Forward reads 4 bytes a number, backward reads 4 and writes 4. With 5000 numbers a row forward issues 13
instructions a number (counted in sm_90 code), half of what an H200 can issue while it reads 4.8 TB/s; such a rate, at 0.8 us
from request to arrival, needs 29 KB in flight an SM. A program is two warps that ask for 1024 numbers at a time (4 KB, 16
numbers a thread in loads of 16 bytes); at 40 registers 25 programs, 100 KB, fit an SM. Larger programs would fill more of
their last step with nothing.

Forward keeps a pivot (the largest number so far) and the sum of exp(x - pivot) in each of LANES lanes, so that a step of a long
row needs no exchange between threads; lanes, and the spans that a row is cut into when rows are few, are merged at the end in
an order that depends on shapes alone. The pivot is kept finite: inf - inf would be NaN. So rows of -inf have the sum 0, +inf
and NaN reach the sum through exp, and each stays in its row.

Strides are free: where rows, not samples, are neighbours in memory (a transpose), a tile spans rows. A row's bits depend on the
tile, so on shapes and strides.
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu, tuning
from libi_fast.kernels.random.gpu import log_unit

PROGRAMS = 2048  # of forward, where rows are few: 15 an SM, 60 KB in flight
SHAPES = dict.fromkeys([(2, 16), *itertools.product((1, 2, 4, 8), (8, 16, 32))])  # (warps, numbers a thread), the fixed first
CANDIDATES = [{"warps": warps, "per_thread": per_thread} for warps, per_thread in SHAPES]
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def weight(x, pivot):
    """exp(x - pivot); the difference comes first, since it is exact where weights are large."""
    return tl.exp2((x - pivot) * 1.4426950408889634)


@triton.jit
def finite(pivot):
    return tl.minimum(tl.maximum(pivot, LOWEST), -LOWEST)


@triton.jit
def merge(pivot, total):
    """Pivots and sums [ROWS, LANES] -> [ROWS]."""
    top = tl.max(pivot, 1)
    return top, tl.sum(total * weight(pivot, top[:, None]), 1)


@triton.jit
def log_mean(pivot, total, samples):
    mean = tl.div_rn(total, tl.cast(samples, tl.float32))
    value = tl.where(mean < float("inf"), pivot + log_unit(mean), mean)  # the mean itself where it is inf or NaN
    return tl.where(mean == 0.0, -float("inf"), value)


# Only strides shape the loads: rows and samples are neighbours where theirs is 1.
@triton.jit(do_not_specialize=["rows", "samples", "spans", "steps"])
def forward_kernel(
    x, out, rows, samples, spans, steps, row_step, sample_step,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One span, ``steps`` tiles long, of ROWS rows -> out [rows]; with SPLIT pivot and sum -> out [2, rows, spans]. VECTOR
    divides samples and row_step."""
    TILE: tl.constexpr = DEEP * LANES
    program = tl.program_id(0)
    row = tl.cast(program // spans, tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    span = program % spans
    first = tl.cast(span, tl.int64) * steps * TILE
    left = tl.cast(samples, tl.int64) - first
    within = (tl.arange(0, DEEP)[:, None] * LANES + tl.arange(0, LANES)[None, :])[None, :, :]
    line = row * (row_step // VECTOR * VECTOR)
    place = x + first * sample_step + line[:, None, None] + within.to(tl.int64) * sample_step

    pivot = tl.full((ROWS, LANES), LOWEST, tl.float32)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for step in range(0, tl.minimum(steps, tl.cdiv(left, TILE)).to(tl.int32)):
        begin = tl.cast(step, tl.int64) * TILE
        count = tl.minimum(left - begin, TILE).to(tl.int32) // VECTOR * VECTOR
        inside = valid[:, None, None] & (within < count)
        values = tl.load(place + begin * sample_step, mask=inside, other=-float("inf"))
        top = finite(tl.maximum(pivot, tl.max(values, 1)))
        total = total * weight(pivot, top) + tl.sum(weight(values, top[:, None, :]), 1)
        pivot = top
    pivot, total = merge(pivot, total)
    if SPLIT:
        tl.store(out + row * spans + span, pivot, mask=valid)
        tl.store(out + (rows + row) * spans + span, total, mask=valid)
    else:
        tl.store(out + row, log_mean(pivot, total, samples), mask=valid)


@triton.jit(do_not_specialize=["rows", "samples", "spans"])
def finish_kernel(sums, out, rows, samples, spans, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Merge the spans of ROWS rows: sums [2, rows, spans] -> out [rows]."""
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    span = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (span < spans)
    pivot = tl.load(sums + row[:, None] * spans + span, mask=inside, other=LOWEST)
    total = tl.load(sums + (rows + row)[:, None] * spans + span, mask=inside, other=0.0)
    pivot, total = merge(pivot, total)
    tl.store(out + row, log_mean(pivot, total, samples), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "samples"])
def backward_kernel(
    grad, x, out, grad_x, rows, samples, inverse, row_step, sample_step,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """One tile -> grad_x [rows, samples]; inverse = 1 / samples. A tile with a row whose out is +inf reads its rows again, to
    count those who share."""
    samples = samples // VECTOR * VECTOR
    row_step = row_step // VECTOR * VECTOR
    columns = tl.cdiv(samples, SAMPLES)
    program = tl.program_id(0)
    row = tl.cast(program // columns, tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    sample = tl.cast(program % columns, tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    inside = valid[:, None] & (sample < samples)[None, :]
    line = x + row[:, None] * row_step
    values = tl.load(line + sample[None, :] * sample_step, mask=inside, other=-float("inf"))
    level = tl.load(out + row, mask=valid, other=0.0)
    slope = tl.load(grad + row, mask=valid, other=0.0)

    infinite = tl.abs(level) == float("inf")
    sharing = tl.zeros((ROWS,), tl.int64)
    if tl.max((level == float("inf")).to(tl.int32), 0) > 0:
        for begin in range(0, columns):
            other = tl.cast(begin, tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
            others = tl.load(line + other[None, :] * sample_step, mask=valid[:, None] & (other < samples)[None, :], other=0.0)
            sharing += tl.sum((others == float("inf")).to(tl.int32), 1)
    slope *= tl.where(infinite, 1.0 / tl.maximum(sharing, 1).to(tl.float32), inverse)
    share = tl.where(infinite[:, None], (values == float("inf")).to(tl.float32), weight(values, level[:, None]))
    tl.store(grad_x + row[:, None] * samples + sample[None, :], slope[:, None] * share, mask=inside)


# --- launchers ---


def _flat(x: Tensor) -> tuple[Tensor, bool, int]:
    """x [..., S] as [rows, S], without a copy where one step leads from row to row; whether rows are nearer neighbours than
    samples; the most numbers of a load."""
    flat = x.reshape(-1, x.shape[-1])
    row_step, sample_step = flat.stride()
    return flat, 0 < row_step < sample_step, 4 if flat.shape[1] % 4 == 0 and row_step % 4 == 0 else 1


def forward(x: Tensor) -> Tensor:
    """As reference.forward, float32 [..., S] -> [...]."""
    flat, tall, vector = _flat(x)
    rows, samples = flat.shape
    out = x.new_empty(rows)

    def run(configuration: tuning.Configuration) -> None:
        size = 32 * configuration["warps"] * configuration["per_thread"]
        columns = triton.next_power_of_2(samples)
        if tall:
            height, lanes = min(size // 4, triton.next_power_of_2(rows)), 1
        else:
            height, lanes = max(1, size // columns), 1 if columns <= size else size // 4
        deep = size // (height * lanes)
        blocks, tiles = triton.cdiv(rows, height), triton.cdiv(samples, deep * lanes)
        steps = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, blocks)))
        spans = triton.cdiv(tiles, steps)
        sums = out if spans == 1 else x.new_empty(2, rows, spans)
        gpu.launch(
            forward_kernel, (blocks * spans,), flat, sums, rows, samples, spans, steps, *flat.stride(), VECTOR=vector,
            ROWS=height, DEEP=deep, LANES=lanes, SPLIT=spans > 1, num_warps=configuration["warps"],
        )  # fmt: skip
        if spans > 1:
            columns = triton.next_power_of_2(spans)
            height = max(1, 512 // columns)
            gpu.launch(
                finish_kernel, (triton.cdiv(rows, height),), sums, out, rows, samples, spans, ROWS=height, COLUMNS=columns,
                num_warps=4,
            )  # fmt: skip

    if rows:
        with gpu.device_of(x):
            run(tuning.choose("log_mean_exp.forward", {"rows": rows, "samples": samples, "tall": tall}, CANDIDATES, run))
    return out.reshape(x.shape[:-1])


def backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """As reference.backward: the gradient [..., S] of x, contiguous."""
    flat, tall, vector = _flat(x)
    rows, samples = flat.shape
    grad, out = grad.reshape(-1).contiguous(), out.reshape(-1).contiguous()
    grad_x = x.new_empty(x.shape)

    def run(configuration: tuning.Configuration) -> None:
        size = 32 * configuration["warps"] * configuration["per_thread"]
        lines = min(32, triton.next_power_of_2(rows)) if tall else 1  # reads along rows, writes along samples
        columns = min(triton.next_power_of_2(samples), size // lines)
        height = size // columns
        gpu.launch(
            backward_kernel, (triton.cdiv(rows, height) * triton.cdiv(samples, columns),), grad, flat, out, grad_x, rows,
            samples, 1.0 / samples, *flat.stride(), VECTOR=vector, ROWS=height, SAMPLES=columns,
            num_warps=configuration["warps"],
        )  # fmt: skip

    if rows:
        with gpu.device_of(x):
            run(tuning.choose("log_mean_exp.backward", {"rows": rows, "samples": samples, "tall": tall}, CANDIDATES, run))
    return grad_x
