r"""The gradients of gpu_wide: a chunk's samples are drawn and decoded again, then, with share_s = grad v_s of each line,

    delta_last = share d log p / d a_last      delta_i = (delta_{i+1} W_{i+1}) act'(a_i)      to W_i = delta_i' h_{i-1}

and the slope delta_1 W_1 of each code goes to the proposal (gpu_formulas.proposal_path). delta takes the place of what it is
computed from: of the last pre-activations, then of each layer's slopes.

Sums over lines go to buffers and are added in order: of a parameter, over SPLITS parts of the lines, to which chunk after chunk
adds; of a row, over pieces of its samples. No two programs add to one address, and no sum depends on the card.

Bound: three times the forward's flops, besides the last layer's activations in memory five times (kept, made delta, read by two
products): 16 kB a line for 784 outputs.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu
from libi_fast.kernels.importance.gpu_formulas import (
    activation,
    activation_slope,
    exp,
    proposal_path,
    to_data,
    to_output,
    to_variance,
)
from libi_fast.kernels.importance.gpu_narrow import problem_of, step
from libi_fast.kernels.importance.gpu_wide import (
    COUNTS,
    Call,
    Chunk,
    Plan,
    Tile,
    Workspace,
    choose,
    decode,
    grid,
    groups,
    log_weights_of,
    options,
    padded,
    place_of,
    prepare,
    product,
    replicas_of,
)
from libi_fast.kernels.importance.reference import Decoder, Draws

PIECE = 256  # samples of a row that one program sums
PROGRAMS = 256  # of a weight's gradient, as far as its tiles do not make more
MOST_SPLITS = 64


@triton.jit(do_not_specialize=[*COUNTS, "tiles"])
def shares_kernel(
    base, partial, grad, log_likelihood, v, share, rows, lines, first, height, width, log_samples, tiles, LINES: tl.constexpr
):  # fmt: skip
    """v_s and the row's gradient times v_s of each line -> v, share [R, lines] (reference.shares)."""
    programs = tl.cdiv(lines, LINES)
    replica = tl.cast(tl.program_id(0) // programs, tl.int64)
    line = tl.program_id(0) % programs * LINES + tl.arange(0, LINES)
    inside = line < height * width
    row = replica * rows + first + line // width
    value = tl.load(log_likelihood + row, mask=inside, other=-float("inf"))
    log_weights = log_weights_of(base, partial, replica, line, inside, lines, tiles)
    weight = tl.where(tl.abs(value) == float("inf"), 0.0, exp(log_weights - value - log_samples))
    tl.store(v + replica * lines + line, weight, mask=line < lines)
    tl.store(share + replica * lines + line, weight * tl.load(grad + row, mask=inside, other=0.0), mask=line < lines)


@triton.jit
def piece_of(height, width, columns, PIECE: tl.constexpr, COLUMNS: tl.constexpr):
    """(replica, local row, first sample, index of the piece, columns) of a program."""
    pieces = tl.cdiv(width, PIECE)
    program = tl.program_id(0)
    column = program % columns * COLUMNS + tl.arange(0, COLUMNS)
    piece = program // columns % (height * pieces)
    replica = tl.cast(program // columns // (height * pieces), tl.int64)
    return replica, piece // pieces, piece % pieces * PIECE, replica * height * pieces + piece, column


@triton.jit(do_not_specialize=[*COUNTS, "x_step", "variance_step", "size"])
def delta_kernel(
    kept, delta, share, x, variance, sums, size, lines, first, height, width, outputs, pitch, x_step, variance_step,
    OUTPUT: tl.constexpr, LIKELIHOOD: tl.constexpr, WANT_X: tl.constexpr, WANT_VARIANCE: tl.constexpr,
    PIECE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pre-activations kept [R, lines, pitch] -> delta there, which may be the same memory; sums over a piece of a row's samples
    -> sums [3, R, height * pieces, outputs]: of delta, and where wanted of the gradients to x and to the variance."""
    columns = tl.cdiv(pitch, COLUMNS)
    replica, local, begin, piece, column = piece_of(height, width, columns, PIECE, COLUMNS)
    known = column < outputs
    row = tl.cast(first + local, tl.int64)
    target = tl.load(x + replica * x_step + row * outputs + column, mask=known, other=0.0)[None, :]
    precision = tl.full((COLUMNS,), 1.0, tl.float32)
    if LIKELIHOOD == "gaussian":
        precision = 1.0 / tl.load(variance + replica * variance_step + column, mask=known, other=1.0)
    sum_delta = tl.zeros((COLUMNS,), tl.float32)
    sum_x = tl.zeros((COLUMNS,), tl.float32)
    sum_variance = tl.zeros((COLUMNS,), tl.float32)
    for start in range(begin, tl.minimum(begin + PIECE, width), LINES):
        sample = start + tl.arange(0, LINES)
        line = replica * lines + local * width + sample
        drawn = sample < width
        inside = drawn[:, None] & (column < pitch)[None, :]
        a = tl.load(kept + line[:, None] * pitch + column[None, :], mask=inside, other=0.0)
        weight = tl.load(share + line, mask=drawn, other=0.0)[:, None]
        weight = tl.where(known[None, :], weight, 0.0)
        o = activation(a, OUTPUT)
        e = to_output(target, o, precision[None, :], LIKELIHOOD)
        if WANT_X:
            sum_x += tl.sum(weight * to_data(o, e, LIKELIHOOD), 0)
        if WANT_VARIANCE:
            sum_variance += tl.sum(weight * to_variance(e, precision[None, :]), 0)
        e = weight * e * activation_slope(a, o, OUTPUT)
        sum_delta += tl.sum(e, 0)
        tl.debug_barrier()  # several threads hold an element of a tile smaller than the program: all must have read it
        tl.store(delta + line[:, None] * pitch + column[None, :], e.to(delta.dtype.element_ty), mask=inside)
    place = sums + piece * outputs + column
    tl.store(place, sum_delta, mask=known)
    if WANT_X:
        tl.store(place + size, sum_x, mask=known)
    if WANT_VARIANCE:
        tl.store(place + 2 * tl.cast(size, tl.int64), sum_variance, mask=known)


@triton.jit(do_not_specialize=["lines", "count"])
def down_kernel(
    delta, weight, slope, sums, lines, count, depth, pitch, weight_step,
    SLOPE: tl.constexpr, PRECISION: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """delta [R, lines, depth] times a layer's weight (here transposed, [R or 1, in, out]) -> slope [R, lines, pitch]; with
    SLOPE multiplied by the slopes that it held, and the columns' sums over a tile of the first ``count`` lines -> sums
    [R, tiles of lines, pitch]."""
    replica, line, _, column = place_of(lines, tl.cdiv(pitch, COLUMNS), LINES, COLUMNS)
    delta += replica * lines * depth
    value = product(delta, weight + replica * weight_step, line, column, depth, PRECISION, LINES, COLUMNS, DEPTH)
    place = (replica * lines + line)[:, None] * pitch + column[None, :]
    inside = (column < pitch)[None, :]
    if SLOPE:
        value *= tl.load(slope + place, mask=inside, other=0.0).to(tl.float32)
        value = tl.where((line < count)[:, None], value, 0.0)
        block = replica * (lines // LINES) + tl.program_id(0) // tl.cdiv(pitch, COLUMNS) % (lines // LINES)
        tl.store(sums + block * pitch + column, tl.sum(value, 0), mask=column < pitch)
    tl.store(slope + place, value.to(slope.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["lines", "count", "splits"])
def weight_kernel(
    delta, h, total, lines, count, splits, out_pitch, in_pitch,
    PRECISION: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add delta' h over a split of the first ``count`` lines to total [splits, R, out_pitch, in_pitch]; LINES x COLUMNS is a
    tile of the weight, and DEPTH lines are taken at a time."""
    columns = tl.cdiv(in_pitch, COLUMNS)
    tiles = tl.cdiv(out_pitch, LINES) * columns
    program = tl.program_id(0)
    row = program % tiles // columns * LINES + tl.arange(0, LINES)
    column = program % columns * COLUMNS + tl.arange(0, COLUMNS)
    split = program // tiles % splits
    replica = tl.cast(program // tiles // splits, tl.int64)
    replicas = tl.num_programs(0) // tiles // splits
    each = tl.cdiv(tl.cdiv(count, splits), DEPTH) * DEPTH
    end = tl.minimum(count, (split + 1) * each)
    place = total + (split * replicas + replica) * out_pitch * in_pitch + row[:, None] * in_pitch + column[None, :]
    inside = (row < out_pitch)[:, None] & (column < in_pitch)[None, :]
    value = tl.load(place, mask=inside, other=0.0)
    for start in range(split * each, end, DEPTH):
        line = start + tl.arange(0, DEPTH)
        at = replica * lines + line
        a = tl.load(
            delta + at[None, :] * out_pitch + row[:, None], mask=(line < end)[None, :] & (row < out_pitch)[:, None], other=0.0
        )
        b = tl.load(
            h + at[:, None] * in_pitch + column[None, :], mask=(line < end)[:, None] & (column < in_pitch)[None, :], other=0.0
        )
        value = tl.dot(a, b, value, input_precision=PRECISION)
    tl.store(place, value, mask=inside)


@triton.jit(do_not_specialize=[*COUNTS, "size"])
def proposal_kernel(
    noise, slope, v, share, mean, log_scale, sums, size, rows, lines, first, height, width, latents, pitch,
    KIND: tl.constexpr, PIECE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """slope [R, lines, pitch] of each code -> the gradients to mean and log_scale, over a piece of a row's samples
    -> sums [2, R, height * pieces, L] (reference.proposal_gradient)."""
    columns = tl.cdiv(latents, COLUMNS)
    replica, local, begin, piece, column = piece_of(height, width, columns, PIECE, COLUMNS)
    known = column < latents
    row = (replica * rows + first + local) * latents + column
    centre = tl.load(mean + row, mask=known, other=0.0)[None, :]
    scale = exp(tl.load(log_scale + row, mask=known, other=0.0))[None, :]
    sum_mean = tl.zeros((COLUMNS,), tl.float32)
    sum_scale = tl.zeros((COLUMNS,), tl.float32)
    for start in range(begin, tl.minimum(begin + PIECE, width), LINES):
        sample = start + tl.arange(0, LINES)
        drawn = sample < width
        local_line = local * width + sample
        line = replica * lines + local_line
        inside = drawn[:, None] & known[None, :]
        eps = tl.load(
            noise + (replica * height * width + local_line)[:, None] * latents + column[None, :], mask=inside, other=0.0
        )
        to_z = tl.load(slope + line[:, None] * pitch + column[None, :], mask=inside, other=0.0)
        weight = tl.load(v + line, mask=drawn, other=0.0)[:, None]
        part = tl.load(share + line, mask=drawn, other=0.0)[:, None]
        path = proposal_path(to_z, part, weight, centre + scale * eps, eps, scale, KIND)
        to_scale = path * eps * scale
        if KIND == "reparameterized":
            to_scale += part
        sum_mean += tl.sum(path, 0)
        sum_scale += tl.sum(to_scale, 0)
    place = sums + piece * latents + column
    tl.store(place, sum_mean, mask=known)
    tl.store(place + size, sum_scale, mask=known)


# --- a call ---


class Sums(NamedTuple):
    """What chunk after chunk adds to. weights [splits, R, out, in] and biases [R, out] of each layer with its padding; x and
    variance are None where nobody reads them."""

    x: Tensor | None
    mean: Tensor
    log_scale: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    variance: Tensor | None

    @staticmethod
    def of(call: Call, wanted: tuple[bool, bool]) -> Sums:
        new = call.mean.new_zeros
        replicas, n, _ = call.mean.shape
        outputs = call.x.shape[-1]
        pitches = [call.latent_pitch, *(layer.pitch for layer in call.layers)]
        weights = []
        for into, out in itertools.pairwise(pitches):
            tiles = triton.cdiv(out, call.tile.lines) * triton.cdiv(into, call.tile.columns) * replicas
            weights.append(new((max(1, min(MOST_SPLITS, PROGRAMS // tiles)), replicas, out, into)))
        return Sums(
            new((replicas, n, outputs)) if wanted[0] else None, torch.zeros_like(call.mean), torch.zeros_like(call.mean),
            weights, [new((replicas, pitch)) for pitch in pitches[1:-1]] + [new((replicas, outputs))],
            new((replicas, outputs)) if wanted[1] else None,
        )  # fmt: skip


class Lines(NamedTuple):
    """Of a chunk, [R, lines] or [R, lines, ...]."""

    v: Tensor
    share: Tensor
    delta: Tensor  # of the last layer
    to_z: Tensor

    @staticmethod
    def of(call: Call, space: Workspace) -> Lines:
        same = call.dtype == space.kept.dtype
        delta = space.kept if same else torch.empty_like(space.kept, dtype=call.dtype)
        return Lines(
            torch.empty_like(space.base), torch.empty_like(space.base), delta,
            torch.empty_like(space.z, dtype=torch.float32),
        )  # fmt: skip


def by_piece(chunk: Chunk, values: int, replicas: int) -> tuple[int, dict[str, int]]:
    """Programs that each sum a piece of a row's samples in a tile of columns, and their tile."""
    columns = min(128, triton.next_power_of_2(values))
    lines = min(2048 // columns, triton.next_power_of_2(chunk.width), PIECE)
    programs = replicas * chunk.height * triton.cdiv(chunk.width, PIECE) * triton.cdiv(values, columns)
    return programs, {"PIECE": PIECE, "LINES": lines, "COLUMNS": columns, "num_warps": 4}


def through_the_output(call: Call, chunk: Chunk, space: Workspace, lines: Lines, sums: Sums) -> None:
    """Pre-activations of the last layer -> delta; the gradients of its bias, of x and of the variance."""
    outputs, replicas = call.x.shape[-1], call.replicas
    pitch = call.layers[-1].pitch
    programs, tile = by_piece(chunk, pitch, replicas)
    pieces = triton.cdiv(chunk.width, PIECE)
    parts = call.x.new_empty((3, replicas, chunk.height, pieces, outputs))
    gpu.launch(
        delta_kernel, (programs,), space.kept, lines.delta, lines.share, call.x, call.variance, parts, parts[0].numel(),
        lines.share.shape[1], chunk.rows.start, chunk.height, chunk.width, outputs, pitch, step(call.x), step(call.variance),
        OUTPUT=call.layers[-1].activation, LIKELIHOOD=call.likelihood, WANT_X=sums.x is not None,
        WANT_VARIANCE=sums.variance is not None, **tile,
    )  # fmt: skip
    sums.biases[-1].add_(parts[0].sum((1, 2)))
    if sums.x is not None:
        sums.x[:, chunk.rows] += parts[1].sum(2)
    if sums.variance is not None:
        sums.variance.add_(parts[2].sum((1, 2)))


def through_the_layers(call: Call, chunk: Chunk, space: Workspace, lines: Lines, transposed: list[Tensor], sums: Sums) -> None:
    """delta of the last layer -> the gradients of all weights and of the other biases, and to_z."""
    replicas, count = call.replicas, lines.share.shape[1]
    inputs, targets = [space.z, *space.hidden], [lines.to_z, *space.slopes]
    delta = lines.delta
    for i in reversed(range(len(call.layers))):
        h, below, total = inputs[i], targets[i], sums.weights[i]
        tiles = triton.cdiv(total.shape[2], call.tile.lines) * triton.cdiv(total.shape[3], call.tile.columns)
        gpu.launch(
            weight_kernel, (replicas * total.shape[0] * tiles,), delta, h, total, count, chunk.lines, total.shape[0],
            total.shape[2], total.shape[3], **options(call, limited=False),
        )  # fmt: skip
        parts = delta.new_empty((replicas, count // call.tile.lines, below.shape[-1]), dtype=torch.float32)
        gpu.launch(
            down_kernel, (grid(call, count, below.shape[-1]),), delta, transposed[i], below, parts, count, chunk.lines,
            delta.shape[-1], below.shape[-1], step(transposed[i]), SLOPE=i > 0, **options(call),
        )  # fmt: skip
        if i:
            sums.biases[i - 1].add_(parts.sum(1))
        delta = below


def through_the_proposal(call: Call, chunk: Chunk, noise: Tensor, lines: Lines, kind: str, sums: Sums) -> None:
    replicas, n, latents = call.mean.shape
    programs, tile = by_piece(chunk, latents, replicas)
    parts = call.x.new_empty((2, replicas, chunk.height, triton.cdiv(chunk.width, PIECE), latents))
    gpu.launch(
        proposal_kernel, (programs,), noise, lines.to_z, lines.v, lines.share, call.mean, call.log_scale, parts,
        parts[0].numel(), n, lines.share.shape[1], chunk.rows.start, chunk.height, chunk.width, latents, call.latent_pitch,
        KIND=kind, **tile,
    )  # fmt: skip
    sums.mean[:, chunk.rows] += parts[0].sum(2)
    sums.log_scale[:, chunk.rows] += parts[1].sum(2)


def backward(
    grad: Tensor, log_likelihood: Tensor, x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws,
    num_samples: int, kind: str, precision: str, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """As reference.backward; a gradient to x or variance that is not ``wanted`` is zero."""
    replicas, n, _ = mean.shape
    outputs = x.shape[-1]
    parts = groups(decoder, replicas, precision, True)
    if len(parts) > 1:
        arguments = (grad, log_likelihood, x, mean, log_scale, decoder, draws, num_samples, kind, precision, wanted)
        results = [backward(*replicas_of(part, *arguments)) for part in parts]
        return joined(results)
    grad, log_likelihood = grad.contiguous(), log_likelihood.contiguous()
    wants = (wanted[0], wanted[1] and decoder.likelihood == "gaussian")

    def run(tile: Tile, chunks: int | None = None) -> Sums:
        call = prepare(x, mean, log_scale, decoder, draws, num_samples, precision, tile)
        sums = Sums.of(call, wants)
        if not replicas * n:
            return sums
        plan = Plan.of(call, Workspace.values(decoder, tile, True))
        space = Workspace.of(call, plan.lines, True)
        lines = Lines.of(call, space)
        transposed = [padded(w.mT, tile).to(call.dtype) for w in decoder.weights]
        for chunk in itertools.islice(plan.chunks(call), chunks):
            noise = decode(call, chunk, space, True)
            gpu.launch(
                shares_kernel, (replicas * triton.cdiv(plan.lines, 1024),), space.base, space.partial, grad, log_likelihood,
                lines.v, lines.share, n, plan.lines, chunk.rows.start, chunk.height, chunk.width, math.log(num_samples),
                space.partial.shape[1], LINES=1024, num_warps=4,
            )  # fmt: skip
            through_the_output(call, chunk, space, lines, sums)
            through_the_layers(call, chunk, space, lines, transposed, sums)
            through_the_proposal(call, chunk, noise, lines, kind, sums)
        return sums

    problem = problem_of(decoder, replicas, n, num_samples) | {"precision": precision, "kind": kind, "wants": wants}
    sums = run(choose("importance.wide.backward", problem, precision, lambda tile: run(tile, 1)))
    pairs = zip(decoder.weights, sums.weights, sums.biases, strict=True)
    shapes = [(total.sum(0)[:, : w.shape[1], : w.shape[2]], bias[:, : w.shape[1]]) for w, total, bias in pairs]
    to_variance = decoder.variance.new_zeros((replicas, *decoder.variance.shape[1:]))
    if sums.variance is not None:
        to_variance = sums.variance if decoder.variance.shape[-1] == outputs else sums.variance.sum(-1, keepdim=True)
    to_x = mean.new_zeros(()).expand(replicas, n, outputs) if sums.x is None else sums.x
    return to_x, sums.mean, sums.log_scale, [w for w, _ in shapes], [b for _, b in shapes], to_variance


def joined(results: list[Any]) -> Any:
    """The gradients of groups of replicas, in order."""
    to_x, to_mean, to_scale, weights, biases, to_variance = zip(*results, strict=True)
    lists = [[torch.cat(layer) for layer in zip(*parts, strict=True)] for parts in (weights, biases)]
    return torch.cat(to_x), torch.cat(to_mean), torch.cat(to_scale), *lists, torch.cat(to_variance)
