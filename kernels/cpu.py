"""The compiled library, through ctypes: found when first asked for, and never required.

`available()` says whether it serves here and `why_unavailable()` why not. The functions below take CPU tensors that
the operators have checked, give the kernels as many threads as torch has now (`torch.get_num_threads()`), and return
new tensors. `LIBI_FAST_ISA=generic|v3|v4`, read when the library is loaded, asks for a lower instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # also first for its OpenMP runtime, which the library then shares
from torch import Tensor

_ABI_VERSION = 3
_MASK = 2**64 - 1
_ERRORS = {
    1: "a size is negative, zero where it must not be, or too large",
    2: "a row, block, repetition (2**32), replica (2**24) or stream (256) is out of the counter's range",
    3: "out of memory",
}
_Pointer, _Int64, _Int, _Double = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_DRAWS = [ctypes.c_uint64, _Pointer, *[_Int64] * 7, _Int]  # LIBI_DRAWS in entry_points.hpp
_SIGNATURES = {
    "philox_words": [*_DRAWS, _Pointer],
    "philox_uniform": [*_DRAWS, _Pointer],
    "philox_normal": [*_DRAWS, _Pointer],
    "log_mean_exp": [_Pointer, _Int64, _Int64, _Int, _Pointer],
    "log_mean_exp_backward": [_Pointer, _Pointer, _Pointer, _Int64, _Int64, _Int, _Pointer],
    "henze_zirkler": [_Pointer, _Int64, _Int64, _Int64, _Double, _Int, _Int, _Pointer, _Pointer],
    "henze_zirkler_characteristic": [
        _Pointer,
        _Pointer,
        _Int64,
        _Int,
        _Int64,
        _Int64,
        _Int64,
        _Double,
        _Int,
        _Int,
        _Pointer,
        _Pointer,
    ],
    "smooth_knn": [_Pointer, *[_Int64] * 5, _Pointer, _Int64, _Int, _Pointer],
}
_SUFFIX = {torch.float32: "_f32", torch.float64: "_f64", torch.int64: ""}


def _candidates() -> list[Path]:
    """Where the library may lie: an editable install keeps it in site-packages, away from this file."""
    package = sys.modules.get(__package__ or "")
    folders = [Path(__file__).parent, *(Path(p) for p in getattr(package, "__path__", []))]
    suffix = ".dll" if sys.platform == "win32" else ".so"
    return [folder / f"libi_kernels{suffix}" for folder in dict.fromkeys(folders)]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    path = next((p for p in _candidates() if p.is_file()), None)
    if path is None:
        return None, "it was not built with libi_fast: no working C++ compiler, or an error that `pip install -v` shows"
    try:
        library = ctypes.CDLL(str(path))
        found = int(library.libi_abi_version())
        if found != _ABI_VERSION:
            return None, f"{path.name} has ABI version {found}, expected {_ABI_VERSION}: install libi_fast again"
        library.libi_isa.restype = ctypes.c_char_p
        for name, argtypes in _SIGNATURES.items():
            for suffix in [""] if name == "philox_words" else ["_f32", "_f64"]:
                function = getattr(library, f"libi_{name}{suffix}")
                function.argtypes, function.restype = argtypes, _Int
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    if library.libi_isa_refused():
        message = f"LIBI_FAST_ISA asks for an instruction set this machine lacks; using {library.libi_isa().decode()}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return library, None


def available() -> bool:
    """Whether the compiled library is installed and loads."""
    return _load()[0] is not None


def why_unavailable() -> str | None:
    """One line saying why the compiled library does not serve, or None where it does."""
    return _load()[1]


def isa() -> str:
    """The instruction set in use: "v4" (AVX-512), "v3" (AVX2), "generic", or "none" without the library."""
    library = _load()[0]
    return "none" if library is None else library.libi_isa().decode()


def openmp() -> bool:
    """Whether the library was built with OpenMP, and so uses torch's number of threads."""
    library = _load()[0]
    return library is not None and bool(library.libi_openmp())


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"libi_fast's compiled library is not available: {reason}")
    if dtype not in _SUFFIX:
        raise TypeError(f"{name}: dtype is {dtype}, expected torch.float32 or torch.float64")
    error = getattr(library, f"libi_{name}{_SUFFIX[dtype]}")(*arguments)
    if error:
        raise ValueError(f"{name}: {_ERRORS.get(error, f'error {error}')}")


def _draw(
    name: str,
    seed: int,
    replicas: Tensor,
    counters: tuple[int, int, int, int, int, int],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    replicas = replicas.to(device="cpu", dtype=torch.int64).contiguous()
    if min(shape) < 0:
        raise ValueError(f"{name}: {_ERRORS[1]}")
    out = torch.empty(shape, dtype=dtype)
    threads = torch.get_num_threads()
    _call(name, dtype, seed & _MASK, replicas.data_ptr(), replicas.numel(), *counters, threads, out.data_ptr())
    return out


def philox_words(
    seed: int,
    replicas: Tensor,
    first_row: int,
    rows: int,
    first_block: int,
    blocks: int,
    repetition: int,
    stream: int,
) -> Tensor:
    """The raw words of counter (row, block, repetition, stream + 256 * replica): int64 [replicas, rows, blocks, 4]."""
    counters = (first_row, rows, first_block, blocks, repetition, stream)
    return _draw("philox_words", seed, replicas, counters, (replicas.numel(), rows, blocks, 4), torch.int64)


def philox_uniform(
    seed: int,
    replicas: Tensor,
    first_row: int,
    rows: int,
    first_draw: int,
    draws: int,
    repetition: int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """Uniforms, strictly inside (0, 1): [replicas, rows, draws], from draw `first_draw` of each row's sequence."""
    counters = (first_row, rows, first_draw, draws, repetition, stream)
    return _draw("philox_uniform", seed, replicas, counters, (replicas.numel(), rows, draws), dtype)


def philox_normal(
    seed: int,
    replicas: Tensor,
    first_row: int,
    rows: int,
    first_draw: int,
    draws: int,
    repetition: int,
    stream: int,
    dtype: torch.dtype,
) -> Tensor:
    """Standard normals: [replicas, rows, draws], from draw `first_draw` of each row's sequence."""
    counters = (first_row, rows, first_draw, draws, repetition, stream)
    return _draw("philox_normal", seed, replicas, counters, (replicas.numel(), rows, draws), dtype)


def log_mean_exp(x: Tensor) -> Tensor:
    """log(1/S sum_s exp x_rs) of a contiguous [rows, S]: [rows]."""
    rows, samples = x.shape
    out = torch.empty(rows, dtype=x.dtype)
    _call("log_mean_exp", x.dtype, x.data_ptr(), rows, samples, torch.get_num_threads(), out.data_ptr())
    return out


def log_mean_exp_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """grad_r exp(x_rs - out_r) / S: [rows, S]. Where out is infinite: 0, and +inf entries share grad_r equally."""
    rows, samples = x.shape
    grad, out = grad.contiguous(), out.contiguous()
    result = torch.empty_like(x)
    pointers = (grad.data_ptr(), x.data_ptr(), out.data_ptr())
    threads = torch.get_num_threads()
    _call("log_mean_exp_backward", x.dtype, *pointers, rows, samples, threads, result.data_ptr())
    return result


def henze_zirkler(z: Tensor, beta: float, gradient: bool) -> tuple[Tensor, Tensor]:
    """The exact statistic of [R, n, d] and, if asked for, its gradient [R, n, d] (else [R, 0, d])."""
    replicas, n, d = z.shape
    z = z.contiguous()
    value, slope = z.new_empty(replicas), z.new_empty((replicas, n * gradient, d))
    threads = torch.get_num_threads()
    results = (value.data_ptr(), slope.data_ptr())
    _call("henze_zirkler", z.dtype, z.data_ptr(), replicas, n, d, beta, int(gradient), threads, *results)
    return value, slope


def henze_zirkler_characteristic(z: Tensor, vectors: Tensor, beta: float, method: str, gradient: bool) -> tuple[Tensor, Tensor]:
    """As :func:`henze_zirkler`, by "quadrature" (no vectors), "random" (frequencies [m, d]) or "sliced" (directions [m, d])."""
    replicas, n, d = z.shape
    z, vectors = z.contiguous(), vectors.contiguous()
    value, slope = z.new_empty(replicas), z.new_empty((replicas, n * gradient, d))
    chosen = ("quadrature", "random", "sliced").index(method)
    arguments = (z.data_ptr(), vectors.data_ptr(), len(vectors), chosen, replicas, n, d, beta, int(gradient))
    results = (value.data_ptr(), slope.data_ptr())
    _call("henze_zirkler_characteristic", z.dtype, *arguments, torch.get_num_threads(), *results)
    return value, slope


def smooth_knn(z: Tensor, n1: int, k: int, alphas: Sequence[float]) -> Tensor:
    """The smooth k-nearest-neighbour statistic of pooled points [R, n1 + n2, d], those of the first sample first: [R]."""
    replicas, n, d = z.shape
    z = z.contiguous()
    out = torch.empty(replicas, dtype=z.dtype)
    chosen = (_Double * len(alphas))(*alphas)
    sizes = (replicas, n1, n - n1, d, k)
    _call("smooth_knn", z.dtype, z.data_ptr(), *sizes, chosen, len(alphas), torch.get_num_threads(), out.data_ptr())
    return out
