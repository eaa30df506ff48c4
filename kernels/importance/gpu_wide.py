r"""Decoders of any width and depth: layer after layer, over chunks of samples whose activations lie in a workspace.

A line is one sample of one row: line = (row - the chunk's first) * width + sample - the chunk's first. A chunk goes through

    noise -> z and log prior - log proposal -> h_1 = act(z W_1' + b_1) -> ... -> partial log p(x | h V' + c) -> sums of each row

where the last product's tiles of lines x outputs are reduced to one number a line before they leave the chip. The workspace is
bounded, whatever the numbers of rows and samples. gpu_wide_backward has the gradients.

Every matrix is padded with zeros to whole tiles, so that no product masks a load; what padding columns hold is finite and
meets zeros. A line's value does not depend on its place in a tile, and a row's samples are merged in blocks of fixed size.

Bound: 2 sum(in * out) flops a line (414 kflop for 50-200-200-784), of which tiles of 64 x 64 x 16 keep 90%, and the
likelihood's 15 to 20 instructions an output. A hidden layer crosses memory twice: 3.2 kB a line, a tenth of the time in
float32.

precision: what the products are computed in, with float32 sums. Relative error of a product's terms: ieee 6e-8, tf32x3 about
1e-6, tf32 5e-4, bf16 4e-3. AMD's matrix units have no tf32: float32 serves there.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from libi_fast.kernels import gpu, tuning
from libi_fast.kernels.importance.gpu_formulas import (
    activation,
    activation_slope,
    exp,
    log_constant,
    log_prob,
    merge,
    prior_over_proposal,
)
from libi_fast.kernels.importance.gpu_narrow import Keep, finish, problem_of, step
from libi_fast.kernels.importance.reference import Decoder, Draws, blocks
from libi_fast.kernels.random import gpu as random
from libi_fast.kernels.random.gpu import log_unit

WORKSPACE = 2**26  # values of a chunk's buffers together: a chunk takes the GPU longer than its launches take the host
MERGED = 1024  # samples of a row that are merged at once; a multiple of every tile's lines


class Tile(NamedTuple):
    """A program's part of a product: lines x columns, in steps of depth."""

    lines: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int  # of a thread at most: where half of a multiprocessor's suffice, two programs share it


# The first is the fixed choice. Matrix units: two programs on a multiprocessor, so that one's likelihood hides behind the
# other's products; a larger tile reads less from the cache, and then has the multiprocessor for itself.
TILES = {
    "ieee": [Tile(64, 64, 16, 4, 3, 255), Tile(128, 64, 16, 8, 3, 128), Tile(128, 128, 16, 8, 3, 255)],
    "tf32x3": [Tile(64, 64, 32, 4, 2, 255), Tile(128, 64, 32, 8, 2, 255)],
    "tf32": [Tile(128, 64, 32, 8, 3, 128), Tile(128, 128, 32, 8, 3, 255), Tile(128, 64, 32, 4, 3, 255)],
    "bf16": [Tile(128, 64, 32, 8, 4, 128), Tile(128, 128, 32, 8, 4, 255), Tile(128, 64, 64, 8, 3, 128)],
}


def _up(value: int, step: int) -> int:
    return triton.cdiv(value, step) * step


# --- what a call needs on the device, padded to whole tiles ---


class Layer(NamedTuple):
    """weight [R or 1, rows, depth] and bias [R or 1, rows], float32; depth and rows cover the padded inputs and outputs.
    pitch: outputs with the padding that the next product needs."""

    weight: Tensor
    bias: Tensor
    pitch: int
    activation: str


class Call(NamedTuple):
    """The arguments of a call, contiguous, and the layers in the products' format."""

    x: Tensor
    mean: Tensor
    log_scale: Tensor
    variance: Tensor  # [R or 1, D], empty for Bernoulli
    layers: list[Layer]
    draws: Draws
    likelihood: str
    num_samples: int
    precision: str  # of tl.dot
    dtype: torch.dtype  # of the products' operands
    tile: Tile

    @property
    def replicas(self) -> int:
        return self.mean.shape[0]

    @property
    def latent_pitch(self) -> int:
        return _up(self.mean.shape[-1], self.tile.depth)


def prepare(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws, num_samples: int, precision: str, tile: Tile
) -> Call:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = []
    for weight, bias, name in zip(decoder.weights, decoder.biases, decoder.activations, strict=True):
        bias = weight.new_zeros(1, weight.shape[1]) if bias is None else bias
        pitch = _up(weight.shape[1], tile.depth)
        padding = _up(pitch, tile.columns) - weight.shape[1]
        layers.append(
            Layer(padded(weight, tile).to(dtype), torch.nn.functional.pad(bias, (0, padding)).contiguous(), pitch, name)
        )
    variance = decoder.variance.expand(-1, x.shape[-1] if decoder.likelihood == "gaussian" else -1)
    dot = "ieee" if precision == "bf16" or (gpu.amd() and precision != "ieee") else precision
    return Call(
        x.contiguous(), mean.contiguous(), log_scale.contiguous(), variance.contiguous(), layers, draws, decoder.likelihood,
        num_samples, dot, dtype, tile,
    )  # fmt: skip


def padded(weight: Tensor, tile: Tile) -> Tensor:
    """[.., rows, depth] -> whole tiles, contiguous."""
    rows, depth = weight.shape[-2:]
    pitch = _up(rows, tile.depth)
    padding = (0, _up(depth, tile.depth) - depth, 0, _up(pitch, tile.columns) - rows)
    return torch.nn.functional.pad(weight, padding).contiguous()


class Chunk(NamedTuple):
    """Samples ``samples`` of rows ``rows``: [R, rows, width] lines."""

    rows: slice
    samples: slice

    @property
    def height(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def width(self) -> int:
        return self.samples.stop - self.samples.start

    @property
    def lines(self) -> int:
        return self.height * self.width


class Plan(NamedTuple):
    """How many lines a replica's part of the workspace has, and the chunks that fill it."""

    lines: int
    row_step: int
    sample_step: int

    @staticmethod
    def of(call: Call, values: int) -> Plan:
        """``values``: of the workspace for each line. Where a row's samples do not fit, whole blocks of them are taken."""
        rows, samples = call.mean.shape[1], call.num_samples
        room = max(1, WORKSPACE // (values * call.replicas * MERGED)) * MERGED
        row_step = max(1, min(rows, room // samples))
        sample_step = min(samples, room)
        return Plan(_up(row_step * sample_step, call.tile.lines), row_step, sample_step)

    def chunks(self, call: Call) -> Iterator[Chunk]:
        for rows in blocks(call.mean.shape[1], self.row_step):
            for samples in blocks(call.num_samples, self.sample_step):
                yield Chunk(rows, samples)


# --- kernels ---

COUNTS = ("rows", "lines", "first", "height", "width", "latents", "outputs")
STEPS = ("x_step", "bias_step", "variance_step")


@triton.jit(do_not_specialize=COUNTS)
def codes_kernel(
    noise, mean, log_scale, z, base, rows, lines, first, height, width, latents, pitch,
    LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """noise [R, height, width, L] -> z [R, lines, pitch] with zeros around, base [R, lines]: log prior - log proposal."""
    programs = tl.cdiv(lines, LINES)
    replica = tl.cast(tl.program_id(0) // programs, tl.int64)
    line = tl.program_id(0) % programs * LINES + tl.arange(0, LINES)
    inside = line < height * width
    row = replica * rows + first + line // width
    total = tl.zeros((LINES,), tl.float32)
    for start in range(0, pitch, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        valid = inside[:, None] & (column < latents)[None, :]
        place = (replica * height * width + line)[:, None] * latents + column[None, :]
        eps = tl.load(noise + place, mask=valid, other=0.0)
        at = row[:, None] * latents + column[None, :]
        s = tl.load(log_scale + at, mask=valid, other=0.0)
        code = tl.load(mean + at, mask=valid, other=0.0) + exp(s) * eps
        code = tl.where(valid, code, 0.0)
        total += tl.sum(prior_over_proposal(code, eps, s), 1)
        place = (replica * lines + line)[:, None] * pitch + column[None, :]
        tl.store(z + place, code.to(z.dtype.element_ty), mask=(line < lines)[:, None] & (column < pitch)[None, :])
    tl.store(base + replica * lines + line, total, mask=line < lines)


@triton.jit
def product(
    a, b, line, column, depth, PRECISION: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """sum_k a[line, k] b[column, k]; ``depth`` is a multiple of DEPTH, and both are padded, so that no load is masked."""
    k = tl.arange(0, DEPTH)
    a_at = a + line[:, None] * depth + k[None, :]
    b_at = b + column[None, :] * depth + k[:, None]
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    for _ in range(0, depth, DEPTH):
        total = tl.dot(tl.load(a_at), tl.load(b_at), total, input_precision=PRECISION)
        a_at += DEPTH
        b_at += DEPTH
    return total


@triton.jit
def place_of(lines, columns, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """(replica, lines, column tile, columns) of a program; neighbours share their lines."""
    program = tl.program_id(0)
    tile = program % columns
    block = program // columns % (lines // LINES)
    replica = tl.cast(program // columns // (lines // LINES), tl.int64)
    return replica, block * LINES + tl.arange(0, LINES), tile, tile * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit(do_not_specialize=["lines", *STEPS])
def layer_kernel(
    h, weight, bias, out, slope, lines, depth, pitch, weight_step, bias_step,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """h [R, lines, depth] -> out = act(h weight' + bias) [R, lines, pitch]; with SLOPE act' there -> slope."""
    replica, line, _, column = place_of(lines, tl.cdiv(pitch, COLUMNS), LINES, COLUMNS)
    h += replica * lines * depth
    a = product(h, weight + replica * weight_step, line, column, depth, PRECISION, LINES, COLUMNS, DEPTH)
    a += tl.load(bias + replica * bias_step + column)[None, :]
    value = activation(a, ACTIVATION)
    place = (replica * lines + line)[:, None] * pitch + column[None, :]
    inside = (column < pitch)[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
    if SLOPE:
        tl.store(slope + place, activation_slope(a, value, ACTIVATION).to(slope.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*COUNTS, *STEPS])
def output_kernel(
    h, weight, bias, x, variance, partial, kept, rows, lines, first, height, width, outputs, depth, pitch,
    x_step, weight_step, bias_step, variance_step,
    OUTPUT: tl.constexpr, LIKELIHOOD: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, LINES: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """log p(x | act(h weight' + bias)) of a tile of columns -> partial [R, tiles, lines]; with KEEP the pre-activations ->
    kept [R, lines, pitch]."""
    tiles = tl.cdiv(pitch, COLUMNS)
    replica, line, tile, column = place_of(lines, tiles, LINES, COLUMNS)
    h += replica * lines * depth
    a = product(h, weight + replica * weight_step, line, column, depth, PRECISION, LINES, COLUMNS, DEPTH)
    a += tl.load(bias + replica * bias_step + column)[None, :]
    if KEEP:
        place = (replica * lines + line)[:, None] * pitch + column[None, :]
        tl.store(kept + place, a, mask=(column < pitch)[None, :])
    o = activation(a, OUTPUT)
    # Lines past the last read its row, and nobody reads what they leave; columns past the last count nothing.
    row = tl.cast(first + tl.minimum(line, height * width - 1) // width, tl.int64)
    valid = (column < outputs)[None, :]
    target = tl.load(x + replica * x_step + row[:, None] * outputs + tl.minimum(column, outputs - 1)[None, :])
    if LIKELIHOOD == "bernoulli":
        # log p = x o - max(o, 0) - log(1 + exp(-|o|)): two outputs share a logarithm.
        factor = tl.where(valid, 1.0 + exp(-tl.abs(o)), 1.0)
        even, odd = tl.split(tl.reshape(factor, (LINES, COLUMNS // 2, 2)))
        value = tl.sum(tl.where(valid, target * o - tl.maximum(o, 0.0), 0.0), 1) - tl.sum(log_unit(even * odd), 1)
    else:
        v = tl.load(variance + replica * variance_step + column, mask=column < outputs, other=1.0)
        terms = log_prob(target, o, (1.0 / v)[None, :], LIKELIHOOD) + log_constant(v)[None, :]
        value = tl.sum(tl.where(valid, terms, 0.0), 1)
    tl.store(partial + (replica * tiles + tile) * lines + line, value)


@triton.jit
def log_weights_of(base, partial, replica, line, valid, lines, tiles):
    """Of these lines, from the parts that codes_kernel and output_kernel left."""
    value = tl.load(base + replica * lines + line, mask=valid, other=0.0)
    for tile in range(0, tiles):
        value += tl.load(partial + (replica * tiles + tile) * lines + line, mask=valid, other=0.0)
    return value


@triton.jit(do_not_specialize=[*COUNTS, "replica_count", "tiles"])
def merge_kernel(
    base, partial, sums, weights, replica_count, rows, lines, first, height, width, tiles,
    KEEP: tl.constexpr, ROWS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Merge a chunk's log-weights into sums [3, R, N]; KEEP: weights [R, height, width]."""
    programs = tl.cdiv(height, ROWS)
    replica = tl.cast(tl.program_id(0) // programs, tl.int64)
    local = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    valid = local < height
    size = tl.cast(replica_count, tl.int64) * rows
    place = sums + replica * rows + first + local
    pivot = tl.load(place, mask=valid, other=-float("inf"))
    first_sum = tl.load(place + size, mask=valid, other=0.0)
    second_sum = tl.load(place + 2 * size, mask=valid, other=0.0)
    for start in range(0, width, SAMPLES):
        sample = start + tl.arange(0, SAMPLES)
        drawn = valid[:, None] & (sample < width)[None, :]
        line = local[:, None] * width + sample[None, :]
        value = log_weights_of(base, partial, replica, line, drawn, lines, tiles)
        value = tl.where(drawn, value, -float("inf"))
        pivot, first_sum, second_sum = merge(pivot, first_sum, second_sum, value, 1)
        if KEEP:
            tl.store(weights + replica * height * width + line, value, mask=drawn)
    tl.debug_barrier()  # several threads hold a row's sums: all must have read them
    tl.store(place, pivot, mask=valid)
    tl.store(place + size, first_sum, mask=valid)
    tl.store(place + 2 * size, second_sum, mask=valid)


# --- a chunk ---


class Workspace(NamedTuple):
    """Buffers of a chunk, [R, lines, ...]; with ``backward`` also what it reads again."""

    z: Tensor
    base: Tensor
    hidden: list[Tensor]
    slopes: list[Tensor]
    partial: Tensor  # [R, tiles, lines]
    kept: Tensor  # [R, lines, D with padding]: the last layer before its activation

    @staticmethod
    def values(decoder: Decoder, tile: Tile, backward: bool) -> int:
        """Of a line, the noise and its gradient included."""
        latents, *hidden, last = (_up(w, tile.depth) for w in decoder.widths)
        tiles = triton.cdiv(last, tile.columns)
        extra = sum(hidden) + 2 * last + latents if backward else 0
        return 2 * latents + sum(hidden) + tiles + 1 + extra

    @staticmethod
    def of(call: Call, lines: int, backward: bool) -> Workspace:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty((call.replicas, *shape), dtype=dtype, device=call.x.device)

        last = call.layers[-1].pitch
        hidden = [new(lines, layer.pitch, dtype=call.dtype) for layer in call.layers[:-1]]
        base = new(lines)
        return Workspace(
            new(lines, call.latent_pitch, dtype=call.dtype), base, hidden,
            [torch.empty_like(h) for h in hidden] if backward else hidden,
            new(triton.cdiv(last, call.tile.columns), lines), new(lines, last) if backward else base,
        )  # fmt: skip


def decode(call: Call, chunk: Chunk, space: Workspace, backward: bool) -> Tensor:
    """Fill the workspace for one chunk; return its noise [R, height, width * L]."""
    replicas, n, latents = call.mean.shape
    lines, draws = space.z.shape[1], call.draws
    noise = random.draws(
        "normal", draws.seed, draws.replicas, draws.first_row + chunk.rows.start, chunk.height,
        chunk.samples.start * latents, chunk.width * latents, draws.repetition, draws.stream,
    )  # fmt: skip
    columns = min(64, triton.next_power_of_2(call.latent_pitch))
    gpu.launch(
        codes_kernel, (replicas * triton.cdiv(lines, 2048 // columns),), noise, call.mean, call.log_scale, space.z, space.base,
        n, lines, chunk.rows.start, chunk.height, chunk.width, latents, call.latent_pitch, LINES=2048 // columns,
        COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    h = space.z
    for layer, out, slope in zip(call.layers[:-1], space.hidden, space.slopes, strict=True):
        gpu.launch(
            layer_kernel, (grid(call, lines, layer.pitch),), h, layer.weight, layer.bias, out, slope, lines, h.shape[-1],
            layer.pitch, step(layer.weight), step(layer.bias), ACTIVATION=layer.activation, SLOPE=backward, **options(call),
        )  # fmt: skip
        h = out
    layer = call.layers[-1]
    gpu.launch(
        output_kernel, (grid(call, lines, layer.pitch),), h, layer.weight, layer.bias, call.x, call.variance, space.partial,
        space.kept, n, lines, chunk.rows.start, chunk.height, chunk.width, call.x.shape[-1], h.shape[-1], layer.pitch,
        step(call.x), step(layer.weight), step(layer.bias), step(call.variance), OUTPUT=layer.activation,
        LIKELIHOOD=call.likelihood, KEEP=backward,
        **options(call, limited=not backward),
    )  # fmt: skip
    return noise


def options(call: Call, limited: bool = True) -> dict[str, Any]:
    """Of a product's launch."""
    tile = call.tile
    limit = {"maxnreg": tile.registers} if limited and not gpu.amd() else {}
    return {
        "PRECISION": call.precision, "LINES": tile.lines, "COLUMNS": tile.columns, "DEPTH": tile.depth,
        "num_warps": tile.warps, "num_stages": tile.stages, **limit,
    }  # fmt: skip


def grid(call: Call, lines: int, columns: int) -> int:
    """Programs of a product."""
    return call.replicas * (lines // call.tile.lines) * triton.cdiv(columns, call.tile.columns)


def merge_chunk(call: Call, chunk: Chunk, space: Workspace, sums: Tensor, keep: bool) -> Tensor:
    """Into sums [3, 1, R, N]; with ``keep`` return the log-weights [R, height, width]."""
    replicas, n, _ = call.mean.shape
    samples = min(MERGED, triton.next_power_of_2(call.num_samples))
    rows = MERGED // samples
    weights = sums.new_empty((replicas, chunk.height, chunk.width)) if keep else sums
    gpu.launch(
        merge_kernel, (replicas * triton.cdiv(chunk.height, rows),), space.base, space.partial, sums, weights, replicas, n,
        space.z.shape[1], chunk.rows.start, chunk.height, chunk.width, space.partial.shape[1],
        KEEP=keep, ROWS=rows, SAMPLES=samples, num_warps=4,
    )  # fmt: skip
    return weights


def choose(kernel: str, problem: dict[str, Any], precision: str, run: Callable[[Tile], Any]) -> Tile:
    candidates = [tile._asdict() for tile in TILES[precision]]
    return Tile(**tuning.choose(kernel, problem, candidates, lambda chosen: run(Tile(**chosen))))


def replicas_of(part: slice, *values: Any) -> list[Any]:
    """These replicas of tensors [R or 1, ...], decoders and draws; other values as they are."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[part] if value.shape[0] > 1 else value
        if isinstance(value, Draws):
            return value._replace(replicas=value.replicas[part])
        if isinstance(value, Decoder):
            weights, biases = [cut(w) for w in value.weights], [None if b is None else cut(b) for b in value.biases]
            return value._replace(weights=weights, biases=biases, variance=cut(value.variance))
        return value

    return [cut(v) for v in values]


def groups(decoder: Decoder, replicas: int, precision: str, backward: bool) -> list[slice]:
    """Replicas that share a workspace, so that each has MERGED lines of it."""
    values = Workspace.values(decoder, TILES[precision][0], backward)
    return list(blocks(replicas, max(1, WORKSPACE // (values * MERGED))))


def forward(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws, num_samples: int, precision: str,
    keep: Keep | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As gpu_narrow.forward."""
    replicas, n, _ = mean.shape
    log_likelihood, effective = mean.new_empty((replicas, n)), mean.new_empty((replicas, n))
    for part in groups(decoder, replicas, precision, False) if n else []:
        kept = keep and functools.partial(keep, part)
        results = log_likelihood, effective
        _forward(*replicas_of(part, x, mean, log_scale, decoder, draws, *results, num_samples, precision, kept))
    return log_likelihood, effective


def _forward(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws, log_likelihood: Tensor, effective: Tensor,
    num_samples: int, precision: str, keep: Callable[[slice, int, Tensor], None] | None,
) -> None:  # fmt: skip
    """Of one group of replicas, into the two results."""
    replicas, n, _ = mean.shape
    sums = mean.new_empty((3, 1, replicas, n))

    def run(tile: Tile, chunks: int | None = None) -> None:
        call = prepare(x, mean, log_scale, decoder, draws, num_samples, precision, tile)
        plan = Plan.of(call, Workspace.values(decoder, tile, False))
        space = Workspace.of(call, plan.lines, False)
        sums.zero_()
        sums[0].fill_(-float("inf"))
        for chunk in itertools.islice(plan.chunks(call), chunks):
            decode(call, chunk, space, False)
            weights = merge_chunk(call, chunk, space, sums, keep is not None)
            if keep and chunks is None:  # not while tiles are tried
                keep(chunk.rows, chunk.samples.start, weights)

    problem = problem_of(decoder, replicas, n, num_samples) | {"precision": precision}
    run(choose("importance.wide.forward", problem, precision, lambda tile: run(tile, 1)))
    finish(sums, num_samples, log_likelihood, effective)
