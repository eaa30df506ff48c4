"""The C++ log_mean_exp: exactness against float64, the infinities and NaN, long rows, and the same bits everywhere."""

from __future__ import annotations

import hashlib
import math
import shutil

import pytest
import torch
from common import check_same_bits_for_any_number_of_threads, check_same_bits_for_instruction_set
from torch import Tensor

from libi_fast.kernels import cpu

if not cpu.available() and not shutil.which("g++"):
    pytest.skip(f"no compiled library: {cpu.why_unavailable()}", allow_module_level=True)

INF, NAN = math.inf, math.nan
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def exact(x: Tensor) -> Tensor:
    return torch.logsumexp(x.double(), -1) - math.log(x.shape[-1])


def rows_of(kind: str, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    noise = torch.randn(64, samples, generator=generator)
    scale, shift = {"unit": (1, 0), "wide": (40, 0), "peaked": (30, -1.6e6), "large": (1, 1e3), "equal": (0, 0)}[kind]
    return scale * noise + shift


@pytest.mark.parametrize("samples", [1, 2, 15, 63, 64, 65, 1000, 1024, 1025, 5000, 65536, 65537, 200_001])
@pytest.mark.parametrize("kind", ["unit", "wide", "peaked", "large", "equal"])
def test_float32_error_is_at_most_twice_torchs(kind: str, samples: int) -> None:
    x = rows_of(kind, samples)
    reference = exact(x)
    ours = (cpu.log_mean_exp(x).double() - reference).abs()
    torchs = (torch.logsumexp(x, -1) - math.log(samples)).double().sub(reference).abs()
    half_ulp = reference.abs() * 2**-24 + 1e-7  # no float32 answer can be closer; log itself is good to 1e-7
    assert (ours <= torch.maximum(2 * torchs.max(), half_ulp)).all(), (ours.max(), torchs.max())


@pytest.mark.parametrize("samples", [1, 7, 64, 5000, 70_000])
@pytest.mark.parametrize("kind", ["unit", "wide", "peaked", "large", "equal"])
def test_float64(kind: str, samples: int) -> None:
    x = rows_of(kind, samples).double()
    torch.testing.assert_close(cpu.log_mean_exp(x), exact(x), rtol=4e-16, atol=4e-15)


@BOTH
def test_infinities_and_nan(dtype: torch.dtype) -> None:
    big = torch.finfo(dtype).max
    for samples in (1, 3, 100, 70_000):
        for special, filler, expected in [
            (-INF, -INF, -INF),
            (INF, 0.0, INF),
            (INF, -INF, INF),
            (NAN, 0.0, NAN),
            (NAN, INF, NAN),
            (NAN, -INF, NAN),
            (0.0, -INF, -math.log(samples)),
            (big, -big, big),
            (-big, -INF, -big),
        ]:
            for place in {0, samples // 2, samples - 1}:
                x = torch.full((2, samples), filler, dtype=dtype)
                x[1, place] = special
                torch.testing.assert_close(float(cpu.log_mean_exp(x)[1]), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@BOTH
def test_gradient(dtype: torch.dtype) -> None:
    for samples in (1, 5, 64, 5000, 70_000):
        x = (3 * torch.randn(9, samples, generator=torch.Generator().manual_seed(1))).to(dtype)
        grad = torch.linspace(-2, 2, 9, dtype=dtype)
        got = cpu.log_mean_exp_backward(grad, x, cpu.log_mean_exp(x))
        expected = (grad.double()[:, None] * torch.softmax(x.double(), -1)).to(dtype)
        tolerance = 2e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=torch.finfo(dtype).tiny)


@BOTH
def test_gradient_of_infinite_rows(dtype: torch.dtype) -> None:
    x = torch.tensor([[-INF, -INF, -INF], [INF, 0, INF], [0, INF, -INF], [0, -INF, 0]], dtype=dtype)
    got = cpu.log_mean_exp_backward(torch.ones(4, dtype=dtype), x, cpu.log_mean_exp(x))
    expected = torch.tensor([[0, 0, 0], [0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]], dtype=dtype)
    torch.testing.assert_close(got, expected)
    assert cpu.log_mean_exp_backward(torch.ones(1), torch.tensor([[NAN, 0.0]]), torch.tensor([NAN])).isnan().all()


@BOTH
def test_empty(dtype: torch.dtype) -> None:
    x = torch.empty(0, 5, dtype=dtype)
    assert cpu.log_mean_exp(x).shape == (0,)
    assert cpu.log_mean_exp_backward(torch.empty(0, dtype=dtype), x, torch.empty(0, dtype=dtype)).shape == (0, 5)
    with pytest.raises(ValueError, match="size"):
        cpu.log_mean_exp(torch.empty(3, 0, dtype=dtype))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float16"):
        cpu.log_mean_exp(torch.zeros(2, 3, dtype=torch.float16))


def digest() -> str:
    hashed = hashlib.sha256()
    for rows, samples in [(1, 300_001), (3, 70_000), (200, 513), (64, 5000)]:
        for dtype in (torch.float32, torch.float64):
            x = (20 * cpu.philox_normal(9, torch.tensor([0]), 0, rows, 0, samples, 0, 0, dtype)[0]).contiguous()
            out = cpu.log_mean_exp(x)
            hashed.update(out.numpy().tobytes())
            hashed.update(cpu.log_mean_exp_backward(torch.ones_like(out), x, out).numpy().tobytes())
    return hashed.hexdigest()


def test_same_bits_for_any_number_of_threads() -> None:
    check_same_bits_for_any_number_of_threads(digest)


@pytest.mark.parametrize("isa", ["generic", "v3", "v4"])
def test_same_bits_for_every_instruction_set(isa: str) -> None:
    check_same_bits_for_instruction_set(isa, "test_native_log_mean_exp", digest)
