"""Philox4x32-10 in Triton (kernels/random/reference.py): `normals4` for other kernels, and a kernel that fills an array.

A counter is drawn once and gives four draws. About 35 instructions a normal draw: an H200 issues 9e11 a second of them and
writes 1.2e12; uniform numbers wait for memory.

The normals' logarithm and cosines are polynomials (Cephes'), as in the C++ kernels: Triton's own bring in a range reduction of
many instructions for arguments that do not occur here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu


@triton.jit
def log_unit(x):
    """log x of a normal float32 x > 0, about 1 ulp: x = 2^k m, m in [sqrt 1/2, sqrt 2)."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    e = k.to(tl.float32)
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    small = (p * f) * square + e * -2.12194440e-4
    return (f + (small - 0.5 * square)) + e * 0.693359375


@triton.jit
def box_muller(radius_word, angle_word):
    """Two standard normals of two uint32 words, cosine first."""
    uniform = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    radius = tl.sqrt(-2.0 * log_unit(uniform))
    turn = (angle_word & 0x3FFFFFFF).to(tl.float32) * 9.313225746154785e-10  # 2^-30 of a quarter
    far = turn > 0.5  # measured from the nearer end of the quarter, which is exact
    y = tl.where(far, 1.0 - turn, turn) * 1.57079632679489662
    z = y * y
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * y + y
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * (z * z) - 0.5 * z + 1.0
    # Odd quarters turn (c, s) into (-s, c), and every second quarter pair changes both signs.
    odd = (angle_word & 0x40000000) != 0
    swap = far != odd
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    cosine = tl.where(odd, -cosine, cosine)
    negative = (angle_word & 0x80000000) != 0
    radius = tl.where(negative, -radius, radius)
    return radius * cosine, radius * sine


@triton.jit
def normals4(key, row, block, repetition, last):
    """The four standard normals of a counter of uint32 values; key is the 64-bit seed."""
    w0, w1, w2, w3 = tl.philox(key, row, block, repetition, last)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def uniform4(key, row, block, repetition, last):
    """The four uniform numbers of a counter (reference.to_uniform), as `normals4`."""
    w0, w1, w2, w3 = tl.philox(key, row, block, repetition, last)
    return uniform_of(w0), uniform_of(w1), uniform_of(w2), uniform_of(w3)


@triton.jit
def uniform_of(word):
    value = ((word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08  # 2^-24
    return tl.minimum(value, 0.99999994039535522461)  # 1 - 2^-24


TILE = 256  # counters of a program
WARPS = 4


# Only `count` shapes the stores: a kernel for each alignment of the others would be compiled in vain.
@triton.jit(do_not_specialize=["rows", "first_row", "first_draw", "repetition", "stream"])
def fill_kernel(
    seed, replicas, out, rows, count, blocks, first_row, first_draw, repetition, stream,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """ROWS x BLOCKS counters of one replica -> four draws each in out [R, rows, count]. ALIGNED: first_draw and count are
    multiples of 4, so that a counter's draws are one store of 16 bytes."""
    program = tl.program_id(0)
    columns = tl.cdiv(blocks, BLOCKS)
    bands = tl.cdiv(rows, ROWS)
    local = tl.cast(program // columns % bands, tl.int64) * ROWS + tl.arange(0, ROWS)
    replica = tl.cast(program // columns // bands, tl.int64)
    first = tl.cast(program % columns, tl.int64) * BLOCKS

    row = (first_row + local).to(tl.uint32)[:, None]
    block = (tl.cast(first_draw, tl.int64) // 4 + first + tl.arange(0, BLOCKS)).to(tl.uint32)[None, :]
    last = (stream + 256 * tl.load(replicas + replica)).to(tl.uint32)
    key, repeated = tl.load(seed), tl.cast(repetition, tl.uint32)
    if KIND == "normal":
        d0, d1, d2, d3 = normals4(key, row + 0 * block, block + 0 * row, repeated, last)
    else:
        d0, d1, d2, d3 = uniform4(key, row + 0 * block, block + 0 * row, repeated, last)
    draws = tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (ROWS, 4 * BLOCKS))

    place = 4 * first + tl.arange(0, 4 * BLOCKS)
    if ALIGNED:
        width = tl.cast(count // 4, tl.int64) * 4  # says that rows begin at multiples of 4
        inside = place < width
    else:
        width = tl.cast(count, tl.int64)
        place -= tl.cast(first_draw, tl.int64) % 4
        inside = (place >= 0) & (place < width)
    line = (replica * rows + local) * width
    tl.store(out + line[:, None] + place[None, :], draws, mask=(local < rows)[:, None] & inside[None, :])


def draws(
    kind: str, seed: Tensor, replicas: Tensor, first_row: int, rows: int, first_draw: int, count: int, repetition: int,
    stream: int,
) -> Tensor:  # fmt: skip
    """float32 [R, rows, count] as reference.draws: uniform numbers equal in every bit, normal ones to 4 ulp or 3e-7.

    ``kind`` is "uniform" or "normal"; the seed is read on the device, so a captured launch follows it.
    """
    out = torch.empty(replicas.shape[0], rows, count, device=seed.device)
    if not out.numel():
        return out
    blocks = (first_draw + count + 3) // 4 - first_draw // 4
    width = min(TILE, triton.next_power_of_2(blocks))
    height = TILE // width
    programs = replicas.shape[0] * triton.cdiv(rows, height) * triton.cdiv(blocks, width)
    with gpu.device_of(seed):
        gpu.launch(
            fill_kernel, (programs,), seed, replicas.to(seed.device), out, rows, count, blocks, first_row, first_draw,
            repetition, stream, KIND=kind, ALIGNED=first_draw % 4 == 0 and count % 4 == 0, ROWS=height, BLOCKS=width,
            num_warps=WARPS,
        )  # fmt: skip
    return out
