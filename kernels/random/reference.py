"""Philox4x32-10 in plain torch: the specification of every random number in the library.

Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".

    key      (seed low word, seed high word)
    counter  (row, block, repetition, stream + 256 * replica)          all uint32
    draw i of a row = lane i % 4 of block i // 4; for codes i = sample * L + latent

uint32 words are held in int64 tensors: torch has no unsigned arithmetic on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LARGEST_BELOW_ONE = {torch.float32: 1 - 2.0**-24, torch.float64: 1 - 2.0**-53}


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in pieces that fit a signed 64-bit integer."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Four words for each counter; the counter's tensors broadcast, ``seed`` is int64 (its 64 bits are the key)."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return c0, c1, c2, c3


def words(
    seed: Tensor,
    replicas: Tensor,
    first_row: int,
    rows: int,
    first_block: int,
    blocks: int,
    repetition: int,
    stream: int,
) -> Tensor:
    """uint32 words [R, rows, blocks, 4] as int64."""
    device = seed.device
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    block = torch.arange(first_block, first_block + blocks, device=device)
    rep = torch.full((), repetition, dtype=torch.int64, device=device)
    last = (stream + 256 * replicas.to(device))[:, None, None]
    return torch.stack(torch.broadcast_tensors(*philox((row, block, rep, last), seed)), -1)


def to_uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """((word >> 8) + 1/2) 2^-24, never 0 or 1: in float32 the top value would round to 1 and is held just below."""
    value = ((word >> 8).to(dtype) + 0.5) * 2.0**-24
    return value.clamp_max(LARGEST_BELOW_ONE[dtype])


def to_normal(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Box-Muller over the pairs of the last dimension [..., 4]: cosine first; the angle's quadrant is its top two bits."""
    radius_word, angle_word = word[..., 0::2], word[..., 1::2]
    uniform = radius_word.to(dtype) * 2.0**-32 + 2.0**-33
    radius = (-2 * uniform.log()).sqrt()
    turn = (angle_word & 0x3FFFFFFF).to(dtype) * 2.0**-30  # of a quarter
    # Measured from the nearer end of the quarter: close to pi/2 the rounded angle has lost what 1 - turn keeps.
    far = turn > 0.5
    angle = torch.where(far, 1 - turn, turn) * (math.pi / 2)
    cosine, sine = torch.where(far, angle.sin(), angle.cos()), torch.where(far, angle.cos(), angle.sin())
    odd = (angle_word & 0x40000000) != 0
    cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    sign = 1 - 2 * (angle_word >> 31).to(dtype)
    return torch.stack((radius * sign * cosine, radius * sign * sine), -1).flatten(-2)


def draws(
    convert, seed: Tensor, replicas: Tensor, first_row: int, rows: int, first_draw: int, count: int, repetition: int,
    stream: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Draws first_draw .. first_draw + count - 1 of each row, [R, rows, count]; ``convert`` is to_uniform or to_normal."""
    if 0 in (replicas.shape[0], rows, count):  # the other sizes may be huge
        return torch.empty((replicas.shape[0], rows, count), dtype=dtype, device=seed.device)
    first_block, last_block = first_draw // 4, (first_draw + count + 3) // 4
    word = words(seed, replicas, first_row, rows, first_block, last_block - first_block, repetition, stream)
    start = first_draw - 4 * first_block
    return convert(word, dtype).flatten(-2)[..., start : start + count].contiguous()
