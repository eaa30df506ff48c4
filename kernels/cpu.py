"""The compiled library, through ctypes: found when first asked for, and never required.

`available()` says whether it serves here and `why_unavailable()` why not. The functions below take CPU tensors that
the operators have checked, give the kernels as many threads as torch has now (`torch.get_num_threads()`), and return
new tensors. `LIBI_FAST_ISA=generic|v3|v4`, read when the library is loaded, asks for a lower instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # also first for its OpenMP runtime, which the library then shares
from torch import Tensor

from libi_fast.kernels.annealing import reference as annealing_reference
from libi_fast.kernels.chains.reference import METHODS, Noise, Result
from libi_fast.kernels.chains.reference import Settings as ChainSettings
from libi_fast.kernels.importance.reference import ACTIVATIONS, GRADIENTS, Draws
from libi_fast.kernels.training import reference as training_reference

_ABI_VERSION = 6
_ACTIVATIONS = list(ACTIVATIONS)  # numbered as in kernels/importance/cpu_layers.hpp; GRADIENTS as in cpu_backward.cpp
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
    "henze_zirkler_characteristic": [*[_Pointer] * 2, _Int64, _Int, *[_Int64] * 3, _Double, _Int, _Int, *[_Pointer] * 2],
    "smooth_knn": [_Pointer, *[_Int64] * 5, _Pointer, _Int64, _Int, _Pointer],
}


class _Importance(ctypes.Structure):
    """``Importance`` of entry_points.hpp."""

    _fields_ = [
        *((name, _Int64) for name in ("replicas", "rows", "samples", "layers")),
        ("widths", _Pointer), ("activations", _Pointer), ("variances", _Int64), ("tail", _Int64),
        ("x", _Pointer), ("mean", _Pointer), ("log_scale", _Pointer), ("x_stride", _Int64),
        *((name, _Pointer) for name in ("weights", "biases", "weight_strides", "bias_strides", "variance")),
        ("variance_stride", _Int64), ("seed", ctypes.c_uint64), ("replica_ids", _Pointer),
        *((name, _Int64) for name in ("first_row", "repetition", "stream", "threads")),
        *((name, _Pointer) for name in ("log_likelihood", "effective", "top")),
        ("kind", _Int64),
        *((name, _Pointer) for name in ("grad", "to_x", "to_variance", "to_mean", "to_log_scale", "to_weights", "to_biases")),
    ]  # fmt: skip


class _Resampling(ctypes.Structure):
    """``Resampling`` of entry_points.hpp."""

    _fields_ = [
        ("on", _Importance), ("draws", _Int64), ("stream", _Int64),
        *((name, _Pointer) for name in ("mean", "covariance", "z", "log_density")),
    ]  # fmt: skip


class _Chains(ctypes.Structure):
    """``Chains`` of entry_points.hpp."""

    _fields_ = [
        ("on", _Importance),
        *((name, _Int64) for name in ("method", "transitions", "leapfrogs", "thinning", "first_transition")),
        *((name, _Int64) for name in ("momentum_stream", "acceptance_stream")),
        ("jitter", _Double), ("target", _Double),
        *((name, _Pointer) for name in ("z", "step", "draws", "log_density", "step_out", "acceptance", "divergences")),
    ]  # fmt: skip


class _Annealing(ctypes.Structure):
    """``Annealing`` of entry_points.hpp."""

    _fields_ = [
        ("on", _Importance),
        *((name, _Int64) for name in ("temperatures", "leapfrogs", "first_transition", "momentum_stream", "acceptance_stream")),
        *((name, _Double) for name in ("jitter", "rate", "target")),
        *((name, _Pointer) for name in ("betas", "z", "step")), ("windows", _Int64), ("scale_tril", _Pointer),
        *((name, _Pointer) for name in ("last", "log_weights", "acceptance", "steps", "path")),
    ]  # fmt: skip


class _Network(ctypes.Structure):
    """``Network`` of entry_points.hpp."""

    _fields_ = [
        ("layers", _Int64), ("widths", _Pointer), ("activations", _Pointer), ("trained", _Int64), ("diagonals", _Pointer),
        *((name, _Pointer) for name in (
            "weights", "weight_means", "weight_squares", "biases", "bias_means", "bias_squares",
        )),
    ]  # fmt: skip


class _Training(ctypes.Structure):
    """``Training`` of entry_points.hpp."""

    _fields_ = [
        *((name, _Int64) for name in ("replicas", "rows", "columns", "latents")),
        ("x", _Pointer), ("set", _Pointer), ("encoder", _Network), ("decoder", _Network),
        ("objective", _Int64), ("variances", _Int64), ("variance", _Pointer), ("weights", _Pointer), ("hz_beta", _Double),
        ("closed", _Int64), ("samples", _Int64), ("seed", ctypes.c_uint64), ("replica_ids", _Pointer),
        *((name, _Int64) for name in ("repetition", "stream", "epochs")), ("rates", _Pointer), ("rises", _Pointer),
        ("steps", _Int64), ("epsilon", _Double), ("usual", _Pointer), ("threads", _Int64), ("terms", _Pointer),
    ]  # fmt: skip


_SIGNATURES |= {name: [ctypes.POINTER(_Importance)] for name in ("importance", "importance_backward")}
_SIGNATURES |= {"resampling": [ctypes.POINTER(_Resampling)], "chains": [ctypes.POINTER(_Chains)]}
_SIGNATURES |= {"annealing": [ctypes.POINTER(_Annealing)], "training": [ctypes.POINTER(_Training)]}
_SUFFIX = {torch.float32: "_f32", torch.float64: "_f64", torch.int64: ""}


def _candidates() -> list[Path]:
    """Where the library may lie: an editable install keeps it in site-packages, away from this file. LIBI_FAST_LIBRARY names
    another build, such as one with a sanitizer."""
    if chosen := os.environ.get("LIBI_FAST_LIBRARY"):
        return [Path(chosen)]
    package = sys.modules.get(__package__ or "")
    folders = [Path(__file__).parent, *(Path(p) for p in getattr(package, "__path__", []))]
    suffix = ".dll" if sys.platform == "win32" else ".so"
    return [folder / f"libi_kernels{suffix}" for folder in dict.fromkeys(folders)]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    path = next((p for p in _candidates() if p.is_file()), None)
    if path is None:
        if chosen := os.environ.get("LIBI_FAST_LIBRARY"):
            return None, f"LIBI_FAST_LIBRARY names {chosen}, which is no file"
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


class _Call:
    """Keeps alive the tensors and arrays that a kernel's pointers point into."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def _tensor(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _integers(self, values: Sequence[int]) -> Any:
        return self._array(_Int64, values)

    def _tensors(self, tensors: Sequence[Tensor | None]) -> Any:
        return self._array(_Pointer, [self._tensor(t) for t in tensors])

    def _array(self, kind: Any, values: Sequence[Any]) -> Any:
        self._kept.append((kind * len(values))(*values))
        return ctypes.cast(self._kept[-1], _Pointer)


class _ImportanceCall(_Call):
    """The arguments of an importance kernel."""

    def __init__(
        self, x: Tensor, mean: Tensor | None, log_scale: Tensor, decoder: Any, draws: Draws, num_samples: int, tail: int
    ):  # fmt: skip
        super().__init__()
        like = log_scale if mean is None else mean
        self.dtype = like.dtype
        replicas, rows, latents = like.shape
        layers = len(decoder.weights)
        # Kernels read as far as these shapes say. Where replicas share a tensor its first size is 1.
        per_row = (replicas, rows)
        self._expect("x", x, (replicas, rows, decoder.widths[-1]), True)
        if mean is not None:
            self._expect("mean", mean, (*per_row, latents))
        self._expect("log_scale", log_scale, (*per_row, latents))
        for i, (weight, bias, out, into) in enumerate(
            zip(decoder.weights, decoder.biases, decoder.widths[1:], [latents, *decoder.widths[1:]], strict=False)
        ):
            self._expect(f"weight {i}", weight, (replicas, out, into), True)
            if bias is not None:
                self._expect(f"bias {i}", bias, (replicas, out), True)
        if decoder.likelihood == "gaussian":
            each = decoder.variance.shape[-1]
            self._expect("variance", decoder.variance, (replicas, each if each == 1 else decoder.widths[-1]), True)
        if draws.replicas.shape != (replicas,):
            raise ValueError(f"replicas has shape {tuple(draws.replicas.shape)}, expected {(replicas,)}")
        variance = decoder.variance.contiguous()
        self._struct = _Importance(
            replicas, rows, num_samples, layers,
            widths=self._integers(decoder.widths),
            activations=self._integers([_ACTIVATIONS.index(name) for name in decoder.activations]),
            variances=variance.shape[-1] if decoder.likelihood == "gaussian" else 0,
            tail=tail,
            x=self._tensor(x), mean=self._tensor(mean), log_scale=self._tensor(log_scale), x_stride=_stride(x),
            weights=self._tensors(decoder.weights), biases=self._tensors(decoder.biases),
            weight_strides=self._integers([_stride(w) for w in decoder.weights]),
            bias_strides=self._integers([0 if b is None else _stride(b) for b in decoder.biases]),
            variance=self._tensor(variance), variance_stride=_stride(variance),
            seed=int(draws.seed) & _MASK, replica_ids=self._tensor(draws.replicas.to("cpu", torch.int64)),
            first_row=draws.first_row, repetition=draws.repetition, stream=draws.stream, threads=torch.get_num_threads(),
        )  # fmt: skip

    def _expect(self, name: str, tensor: Tensor, shape: tuple[int, ...], shared: bool = False) -> None:
        fits = tensor.shape == shape or (shared and tensor.shape == (1, *shape[1:]))
        if not fits or tensor.dtype != self.dtype or tensor.device.type != "cpu":
            found = f"{tuple(tensor.shape)}, {tensor.dtype}, {tensor.device.type}"
            raise ValueError(f"importance: {name} is {found}; expected {shape}, {self.dtype}, cpu")

    def run(self, name: str, **tensors: Tensor | Sequence[Tensor | None] | None) -> None:
        for field, value in tensors.items():
            pointer = self._tensor(value) if value is None or isinstance(value, Tensor) else self._tensors(value)
            setattr(self._struct, field, pointer)
        _call(name, self.dtype, ctypes.byref(self._struct))


def _stride(tensor: Tensor) -> int:
    """From one replica to the next, in a contiguous copy; 0 where all share it."""
    return 0 if tensor.shape[0] == 1 else math.prod(tensor.shape[1:])


def importance(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Any, draws: Any, num_samples: int, tail: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``kernels.importance.reference.forward``; tiles are fixed, so there is no chunk size."""
    shape = mean.shape[:2]
    log_likelihood, effective = mean.new_empty(shape), mean.new_empty(shape)
    top = mean.new_empty((*shape, tail))
    call = _ImportanceCall(x, mean, log_scale, decoder, draws, num_samples, tail)
    call.run("importance", log_likelihood=log_likelihood, effective=effective, top=top)
    return log_likelihood, effective, top


def importance_backward(
    grad: Tensor, log_likelihood: Tensor, x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Any, draws: Any,
    num_samples: int, kind: str, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """As ``kernels.importance.reference.backward``; ``wanted``: x, the variance, parameters (zeros where they are not)."""
    replicas, rows, _ = mean.shape
    make = mean.new_empty if rows else mean.new_zeros
    want_x, want_variance, want_parameters = wanted[0], wanted[1] and decoder.likelihood == "gaussian", wanted[2]
    to_x = make((replicas, rows, x.shape[-1])) if want_x else mean.new_zeros(x.shape)
    to_mean, to_log_scale = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
    make_parameters = make if want_parameters else mean.new_zeros
    to_weights = [make_parameters((replicas, *w.shape[1:])) for w in decoder.weights]
    to_biases = [make_parameters((replicas, w.shape[1])) for w in decoder.weights]
    shape = (replicas, *decoder.variance.shape[1:])
    to_variance = make(shape) if want_variance else mean.new_zeros(shape)
    call = _ImportanceCall(x, mean, log_scale, decoder, draws, num_samples, 0)
    call._expect("grad", grad, (replicas, rows))
    call._expect("log_likelihood", log_likelihood, (replicas, rows))
    call._struct.kind = GRADIENTS.index(kind)
    call.run(
        "importance_backward", grad=grad, log_likelihood=log_likelihood, to_x=to_x if want_x else None,
        to_variance=to_variance if want_variance else None, to_mean=to_mean, to_log_scale=to_log_scale,
        to_weights=to_weights if want_parameters else None, to_biases=to_biases,
    )  # fmt: skip
    return to_x, to_mean, to_log_scale, to_weights, to_biases, to_variance


def resampling(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Any, draws: Draws, num_samples: int, tail: int, count: int, stream: int
) -> tuple[Tensor, ...]:  # fmt: skip
    """As ``kernels.importance.reference.forward_and_resample``, with ``count`` uniform numbers of ``stream``."""
    shape, latents = mean.shape[:2], mean.shape[2]
    estimate = mean.new_empty(shape), mean.new_empty(shape), mean.new_empty((*shape, tail))
    resampled = (
        mean.new_empty((*shape, latents)), mean.new_empty((*shape, latents, latents)),
        mean.new_empty((*shape, count, latents)), mean.new_empty((*shape, count)),
    )  # fmt: skip
    call = _ImportanceCall(x, mean, log_scale, decoder, draws, num_samples, tail)
    for field, tensor in zip(("log_likelihood", "effective", "top"), estimate, strict=True):
        setattr(call._struct, field, tensor.data_ptr())
    struct = _Resampling(call._struct, count, stream, *(t.data_ptr() for t in resampled))
    _call("resampling", mean.dtype, ctypes.byref(struct))
    return *estimate, *resampled


def chains(
    x: Tensor, z: Tensor, step: Tensor, log_scale: Tensor, decoder: Any, noise: Noise, settings: ChainSettings
) -> Result:  # fmt: skip
    """As ``kernels.chains.reference.run`` on its ``log_joint``."""
    replicas, rows, chains, latents = z.shape
    draws = Draws(noise.seed, noise.replicas, settings.first_row, 0, noise.streams[0], noise.normal)
    call = _ImportanceCall(x, None, log_scale, decoder, draws, chains, 0)
    shape = (replicas, rows, chains)
    call._expect("log_scale", log_scale, (replicas, rows, latents))
    call._expect("z", z, (*shape, decoder.widths[0]))
    call._expect("step", step, shape)
    result = Result(
        z.new_empty((*shape, settings.kept, latents)), z.new_empty((*shape, settings.kept)), step.new_empty(shape),
        step.new_empty(shape), torch.empty(shape, dtype=torch.int64),
    )  # fmt: skip
    struct = _Chains(
        call._struct, METHODS.index(settings.method), settings.transitions, settings.leapfrogs, settings.thinning,
        settings.first_transition, *noise.streams, settings.jitter, settings.target, call._tensor(z), call._tensor(step),
        *(t.data_ptr() for t in result),
    )  # fmt: skip
    _call("chains", z.dtype, ctypes.byref(struct))
    return result


def annealing(
    x: Tensor, z: Tensor, betas: Tensor, step: Tensor, scale_tril: Tensor, mean: Tensor, log_scale: Tensor, decoder: Any,
    noise: Noise, settings: annealing_reference.Settings,
) -> annealing_reference.Result:  # fmt: skip
    """As ``kernels.annealing.reference.run`` on chains' ``log_joint``."""
    replicas, rows, chains, latents = z.shape
    temperatures = betas.shape[-1] - 1
    betas = betas.expand(replicas, -1).contiguous()
    draws = Draws(noise.seed, noise.replicas, settings.first_row, 0, noise.streams[0], noise.normal)
    call = _ImportanceCall(x, mean, log_scale, decoder, draws, chains, 0)
    call._expect("mean", mean, (replicas, rows, latents))
    call._expect("z", z, (replicas, rows, chains, decoder.widths[0]))
    call._expect("step", step, (replicas, rows, temperatures))
    windows = scale_tril.shape[2] if scale_tril.dim() == 5 else 0
    call._expect("scale_tril", scale_tril, (replicas, rows, windows, latents, latents))
    if betas.dtype != torch.float64 or betas.device.type != "cpu":
        raise ValueError(f"annealing: betas is {betas.dtype} on {betas.device.type}; expected float64 on the CPU")
    shape, told = (replicas, rows, chains), temperatures if settings.rate > 0 else 0
    result = annealing_reference.Result(
        z.new_empty(z.shape), z.new_empty(shape), z.new_empty(shape), z.new_empty((*shape, told)),
        z.new_empty((*shape, told, latents)),
    )  # fmt: skip
    struct = _Annealing(
        call._struct, temperatures, settings.leapfrogs, settings.first_transition, *noise.streams, settings.jitter,
        settings.rate, settings.target, call._tensor(betas), call._tensor(z), call._tensor(step), windows,
        call._tensor(scale_tril), *(t.data_ptr() for t in result),
    )  # fmt: skip
    _call("annealing", z.dtype, ctypes.byref(struct))
    return result


class _TrainingCall(_Call):
    """The arguments of the training kernels, some of whose tensors are changed in place."""

    def __init__(self, dtype: torch.dtype, replicas: int):
        super().__init__()
        self.dtype, self.replicas = dtype, replicas

    def constant(self, tensor: Tensor, dtype: torch.dtype) -> int | None:
        return self._tensor(tensor.to("cpu", dtype))

    def changed(self, name: str, tensor: Tensor, shape: Sequence[int]) -> int:
        if (
            tensor.shape != tuple(shape)
            or tensor.dtype != self.dtype
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
        ):
            found = f"{tuple(tensor.shape)}, {tensor.dtype}, {tensor.device.type}, strides {tensor.stride()}"
            raise ValueError(f"training: {name} is {found}; expected {tuple(shape)}, {self.dtype}, cpu, contiguous")
        return tensor.data_ptr()

    def network(
        self, network: training_reference.Network, means: Sequence[Tensor | None], squares: Sequence[Tensor | None]
    ) -> _Network:
        """``means`` and ``squares``: Adam's, of each parameter."""
        widths = network.widths
        pointers: dict[str, list[int | None]] = {field[0]: [] for field in _Network._fields_[5:]}
        left = zip(means, squares, strict=True)
        for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
            of_weight = ("weights", "weight_means", "weight_squares"), weight, (self.replicas, widths[i + 1], widths[i])
            of_bias = ("biases", "bias_means", "bias_squares"), bias, (self.replicas, widths[i + 1])
            for names, tensor, shape in (of_weight, of_bias):
                tensors = (None, None, None) if tensor is None else (tensor, *next(left))
                for name, each in zip(names, tensors, strict=True):
                    pointers[name].append(None if each is None else self.changed(name, each, shape))
        diagonals = [None if d is None else self.constant(d, torch.float64) for d in network.diagonals]
        known = list(training_reference.ACTIVATIONS)
        return _Network(
            len(network.weights), self._integers(widths),
            self._integers([known.index(name) for name in network.activations]), network.trained,
            self._array(_Pointer, diagonals), **{name: self._array(_Pointer, each) for name, each in pointers.items()},
        )  # fmt: skip


def train(
    problem: training_reference.Problem, adam: training_reference.Adam, rates: Sequence[float], rises: Sequence[float]
) -> Tensor:
    """As ``kernels.training.reference.run``."""
    p, replicas = problem, len(problem.dataset)
    _, rows, columns = p.x.shape
    call = _TrainingCall(p.x.dtype, replicas)
    networks, before = [], 0
    for network in (p.encoder, p.decoder):
        count = len(network.parameters)
        own = slice(before, before + count)
        none = [None] * count
        networks.append(call.network(network, *((adam.means[own], adam.squares[own]) if network.trained else (none, none))))
        before += count * network.trained
    if replicas and not 0 <= int(p.dataset.min()) <= int(p.dataset.max()) < len(p.x):
        raise ValueError(f"training: dataset names a set outside 0 .. {len(p.x) - 1}")
    terms = torch.empty((len(rates), replicas, 4), dtype=p.x.dtype)
    struct = _Training(
        replicas, rows, columns, p.latent_dim, call.constant(p.x, p.x.dtype), call.constant(p.dataset, torch.int64), *networks,
        list(training_reference.OBJECTIVES).index(p.objective), p.variance.numel(), call.constant(p.variance, p.x.dtype),
        call.constant(p.weights, torch.float64), p.hz_beta, p.closed, p.samples, int(p.draws.seed) & _MASK,
        call.constant(p.draws.replicas, torch.int64), p.draws.repetition, p.draws.stream, len(rates),
        call._array(_Double, rates), call._array(_Double, rises), adam.steps, adam.epsilon,
        call.changed("usual", adam.usual, (replicas,)), torch.get_num_threads(), terms.data_ptr(),
    )  # fmt: skip
    _call("training", p.x.dtype, ctypes.byref(struct))
    return terms[..., : len(p.terms)]
