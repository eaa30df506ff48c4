"""Philox4x32-10 in Triton (kernels/random/reference.py): `normals4` for other kernels, and a kernel that fills an array.

The normals' logarithm and cosines are polynomials (Cephes'), as in the C++ kernels: Triton's own bring in a range reduction of
many instructions for arguments that do not occur here.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
