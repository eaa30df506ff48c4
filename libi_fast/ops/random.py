"""Counter-based random numbers: the same on every backend, device, block size and number of processes."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels.random import reference
from libi_fast.ops import _library as lib


class Stream(IntEnum):
    """What a random number is for; the counter's last word keeps uses apart."""

    PROPOSAL = 0
    RESAMPLING = 1
    MOMENTUM = 2
    ACCEPTANCE = 3
    DATA = 4
    INITIALISATION = 5
    TRAINING = 6
    MODEL_SAMPLE = 7
    FREQUENCIES = 8
    CONSTRAINTS = 9
    MIXTURE = 10  # which component of a mixture a sample comes from
    ANNEALING_START = 11
    ANNEALING_MOMENTUM = 12
    ANNEALING_ACCEPTANCE = 13
    SIMULATION = 14  # codes of the pairs that an inference model learns from
    SIMULATION_NOISE = 30  # and the noise of their data


INDEX_LIMIT = 2**32
REPLICA_LIMIT = 2**24
_CONVERT = {"uniform": reference.to_uniform, "normal": reference.to_normal}


def _reference(seed, replicas, first_row, rows, first_draw, draws, repetition, stream, kind, dtype):
    return reference.draws(_CONVERT[kind], seed, replicas, first_row, rows, first_draw, draws, repetition, stream, dtype)


def _native(seed, replicas, first_row, rows, first_draw, draws, repetition, stream, kind, dtype):
    function = native.philox_uniform if kind == "uniform" else native.philox_normal
    key = int(seed) & (2**64 - 1)
    return function(key, replicas, first_row, rows, first_draw, draws, repetition, stream, dtype)


def _triton(seed, replicas, first_row, rows, first_draw, draws, repetition, stream, kind, dtype):
    from libi_fast.kernels.random import gpu

    return gpu.draws(kind, seed, replicas, first_row, rows, first_draw, draws, repetition, stream)


def _float32_only(*args: Any) -> str | None:
    return None if args[-1] == torch.float32 else f"it draws float32, got {args[-1]}"


_philox = lib.define(
    "philox",
    "(Tensor seed, Tensor replicas, SymInt first_row, SymInt rows, SymInt first_draw, SymInt draws, SymInt repetition, "
    "int stream, str kind, ScalarType dtype, str backend) -> Tensor",
    {"reference": _reference, "cpu": _native, "triton": _triton},
    lambda seed, replicas, first_row, rows, first_draw, draws, repetition, stream, kind, dtype: seed.new_empty(
        (replicas.shape[0], rows, draws), dtype=dtype
    ),
    limits={"triton": _float32_only},
)


def drawing(kind: str, backend: str = "") -> Callable[..., Tensor]:
    """ "uniform" or "normal" numbers as kernels' references ask for them."""

    def draw(seed, replicas, first_row, rows, first_draw, draws, repetition, stream, dtype):
        return _philox(seed, replicas, first_row, rows, first_draw, draws, repetition, stream, kind, dtype, backend)

    return draw


def as_seed(seed: int | Tensor | None, device: torch.device | str | None = None) -> Tensor:
    """A 64-bit seed as an int64 tensor []; None draws one number from torch's default generator.

    Raises:
        InputError: an integer outside 0 .. 2^64 - 1, a tensor that is not one integer; while a CUDA graph is captured, a seed
            that would come from host memory, which the graph's replays could not follow.
    """
    from_host = seed is None or (isinstance(seed, Tensor) and not seed.is_cuda)
    if from_host and device is not None and lib.capturing(torch.device(device)):
        raise InputError("while a CUDA graph is captured, pass the seed as an int64 tensor on the GPU")
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, ())
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim():
            raise InputError(f"seed must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
        if seed.is_meta and device is not None and torch.device(device).type != "meta":
            raise InputError("seed is a meta tensor, which holds no number")
        return seed if device is None else seed.to(device)
    lib.check_index("seed", seed, 2**64)
    # Filled on the device: a copy from the host would wait for it, and cannot be captured in a graph.
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


def as_replicas(replicas: Tensor | int | None, device: torch.device | str | None = None) -> Tensor:
    """Replica indices int64 [R]; an integer R means 0 .. R - 1, None the one replica 0."""
    if isinstance(replicas, Tensor):
        if replicas.dtype != torch.int64 or replicas.dim() != 1:
            raise InputError(f"replicas must be int64 [R], got {replicas.dtype} of shape {tuple(replicas.shape)}")
        if lib.values_known(replicas) and bool(((replicas < 0) | (replicas >= REPLICA_LIMIT)).any()):
            raise InputError(f"replicas must lie in 0 .. {REPLICA_LIMIT - 1}, got {replicas.tolist()[:8]}")
        return replicas
    count = 1 if replicas is None else replicas
    lib.check_index("replicas", count, REPLICA_LIMIT + 1)
    return torch.arange(count, device=device)


def _draw(
    kind: str, seed: Any, rows: int, draws: int, replicas: Any, first_row: int, first_draw: int, repetition: int,
    stream: int, dtype: torch.dtype, device: Any, backend: str | None,
) -> Tensor:  # fmt: skip
    if dtype not in lib.FLOATS:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    for name, value in {"rows": rows, "draws": draws, "first_row": first_row, "first_draw": first_draw}.items():
        lib.check_index(name, value, 4 * INDEX_LIMIT)
    lib.check_index("repetition", repetition, INDEX_LIMIT)
    lib.check_index("stream", stream, 256)
    if first_row + rows > INDEX_LIMIT or first_draw + draws > 4 * INDEX_LIMIT:
        raise InputError("a row index past 2^32 or a draw past 2^34 does not fit the counter")
    key = as_seed(seed, device)
    ids = as_replicas(replicas, key.device)
    if ids.shape[0] * rows * draws >= 2**60:  # 2^63 bytes in float64
        raise InputError(f"replicas x rows x draws, {ids.shape[0]} x {rows} x {draws}, are more numbers than can be addressed")
    result = _philox(
        key, ids, first_row, rows, first_draw, draws, repetition, int(stream), kind, dtype, lib.current_backend(backend)
    )
    return result[0] if replicas is None else result


def philox_uniform(
    seed: int | Tensor | None, rows: int, draws: int, *, replicas: Tensor | int | None = None, first_row: int = 0,
    first_draw: int = 0, repetition: int = 0, stream: int = Stream.PROPOSAL, dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Uniform numbers in (0, 1), [rows, draws], or [R, rows, draws] with ``replicas``.

    Draw i of global row n depends on (seed, n, i, repetition, stream, replica) alone, so a shard draws what the whole would.

    Args:
        seed: 0 .. 2^64 - 1, an int64 tensor [], or None for one number from torch's default generator.
        rows, first_row: the rows first_row .. first_row + rows - 1.
        draws, first_draw: which draws of each row's sequence.
        replicas: int64 [R] of replica indices, or R for 0 .. R - 1.
        repetition: a chain, epoch or repetition number; stream: what the numbers are for.

    Raises:
        InputError: an index that does not fit the counter (2^32; 2^24 for replicas); TypeError: wrong types.

    Source:
        Philox4x32-10, Salmon et al. 2011; see kernels/random/reference.py for the counters.
    """
    return _draw("uniform", seed, rows, draws, replicas, first_row, first_draw, repetition, stream, dtype, device, backend)


def philox_normal(
    seed: int | Tensor | None, rows: int, draws: int, *, replicas: Tensor | int | None = None, first_row: int = 0,
    first_draw: int = 0, repetition: int = 0, stream: int = Stream.PROPOSAL, dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Standard normal numbers by Box-Muller; arguments, shape and errors as in :func:`philox_uniform`."""
    return _draw("normal", seed, rows, draws, replicas, first_row, first_draw, repetition, stream, dtype, device, backend)
