"""The C++ smooth k-NN statistic: against the reference for every k and alpha, the same bits for any threads, NaN, bad sizes."""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from common import check_same_bits_for_any_number_of_threads, points, results_of_instruction_sets
from torch import Tensor

from libi_fast.kernels import cpu
from libi_fast.kernels.smooth_knn import reference
from libi_fast.ops.smooth_knn import smooth_knn

if not cpu.available():
    pytest.skip(f"no compiled library: {cpu.why_unavailable()}", allow_module_level=True)

ALPHAS: list[list[float]] = [[0.01], [0.1], [1.0], [5.0], [100.0], [1.0, 50.0, 0.3]]
SIZES = [(2, 2, 1), (5, 4, 2), (2, 30, 3), (16, 16, 2), (21, 26, 3), (64, 65, 9), (100, 100, 2)]


def pooled(replicas: int, n1: int, n2: int, d: int, kind: str = "normal") -> Tensor:
    z = points(replicas * (n1 + n2), d, kind).reshape(replicas, n1 + n2, d)
    z[:, n1:] += 0.3
    return z


def expected(z: Tensor, n1: int, k: int, alphas: Sequence[float]) -> Tensor:
    return reference.forward(z[:, :n1].double(), z[:, n1:].double(), k, alphas, False)[0]


def error(z: Tensor, n1: int, k: int, alphas: Sequence[float]) -> float:
    true = expected(z, n1, k, alphas)
    return float(((cpu.smooth_knn(z, n1, k, alphas).double() - true).abs() / true.abs().clamp_min(1)).max())


@pytest.mark.parametrize("alphas", ALPHAS, ids=str)
@pytest.mark.parametrize(("n1", "n2", "d"), SIZES)
def test_against_the_reference(n1: int, n2: int, d: int, alphas: list[float]) -> None:
    others = n1 + n2 - 1
    z = pooled(2, n1, n2, d, "skewed" if d > 2 else "normal")
    ks = {1, 2, 3, 10, others // 2, others // 2 + 1, others - 1, others} if others < 100 else {2, 10, others - 9}
    for k in sorted(ks):
        if k <= others:
            assert error(z, n1, k, alphas) < 1e-10
            assert error(z.float(), n1, k, alphas) < 3e-6


@pytest.mark.parametrize(("n1", "n2", "k", "alpha"), [(200, 290, 35, 1.0), (300, 290, 530, 3.0), (305, 310, 303, 1.0)])
def test_long_rows(n1: int, n2: int, k: int, alpha: float) -> None:
    """So long that polynomials are found again in segments, or k is more than an exponent holds."""
    z = pooled(1, n1, n2, 2).float()
    assert error(z.double(), n1, k, [alpha]) < 1e-10
    assert error(z, n1, k, [alpha]) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("k", [1, 2, 7, 20, 38, 39])
def test_ties_clusters_and_offsets(k: int, dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 3e-6
    same = torch.zeros(2, 40, 2, dtype=dtype)
    assert float(cpu.smooth_knn(same, 18, k, [1.0]).abs().max()) < tolerance
    z = pooled(2, 20, 20, 2).to(dtype)
    for moved in (z + 100, torch.cat((z[:, :20], z[:, 20:] + 1e5), 1), 1e-3 * z, 1e4 * z):
        for alpha in (0.5, 20.0, 1e6):
            assert error(moved, 20, k, [alpha]) < tolerance


def test_float32_over_many_repetitions() -> None:
    z = pooled(40, 100, 100, 2).float()
    for k in (1, 10):
        true = expected(z, 100, k, [1.0])
        found = cpu.smooth_knn(z, 100, k, [1.0]).double()
        assert float((found - true).abs().max()) < 3e-6
        assert abs(float((found - true).mean())) < 3e-7


def digest() -> str:
    torch.manual_seed(3)
    hashed = hashlib.sha256()
    for n1, n2, d, k, alphas in [
        (30, 41, 2, 10, [1.0]),
        (9, 8, 3, 1, [1.0, 40.0]),
        (50, 50, 2, 60, [2.0]),
        (40, 30, 2, 9, [90.0]),
    ]:
        for dtype in (torch.float32, torch.float64):
            z = torch.randn(7, n1 + n2, d, dtype=dtype)
            hashed.update(cpu.smooth_knn(z, n1, k, alphas).numpy().tobytes())
    return hashed.hexdigest()


def test_threads_move_no_bit() -> None:
    check_same_bits_for_any_number_of_threads(digest)


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """To the bit with a fused multiply-add, v3 and v4; generic to rounding."""
    program = """
import sys, torch
from libi_fast.kernels import cpu
torch.manual_seed(0)
z = [torch.randn(5, 71, 2, dtype=t) for t in (torch.float32, torch.float64)]
settings = [(1, [1.0]), (10, [1.0, 0.2]), (50, [2.0]), (9, [90.0])]
torch.save((cpu.isa(), [cpu.smooth_knn(x, 30, *s) for x in z for s in settings]), sys.argv[1])
"""
    results = results_of_instruction_sets(program, tmp_path)
    for result in results.values():
        for value, other in zip(results["generic"], result, strict=True):
            tolerance = 1e-11 if value.dtype == torch.float64 else 3e-6
            torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)
    if {"v3", "v4"} <= set(results):
        assert all(torch.equal(one, other) for one, other in zip(results["v3"], results["v4"], strict=True))


def test_a_repetition_does_not_touch_another() -> None:
    """NaN and infinity stay where they are; far points, which take double, leave the next repetition as it was."""
    for dtype in (torch.float32, torch.float64):
        z = pooled(6, 11, 14, 2).to(dtype)
        for k in (1, 4, 23, 24):
            plain = cpu.smooth_knn(z, 11, k, [1.0])
            bad = z.clone()
            bad[1, 3, 0], bad[2, 20, 1], bad[4] = math.nan, math.inf, 1e3 * bad[4]
            found = cpu.smooth_knn(bad, 11, k, [1.0])
            assert bool(found[[1, 2]].isnan().all())
            assert torch.equal(found[[0, 3, 5]], plain[[0, 3, 5]])
            assert bool(found[4].isfinite())
        huge = 1e30 * z if dtype == torch.float32 else 1e200 * z  # squares beyond the range: no promise but to end
        assert cpu.smooth_knn(huge, 11, 4, [1.0]).shape == (6,)


def test_empty_and_bad_sizes() -> None:
    z = torch.zeros(2, 10, 2)
    assert cpu.smooth_knn(z[:0], 5, 3, [1.0]).shape == (0,)
    for n1, k in [(1, 3), (9, 3), (5, 0), (5, 10), (-1, 2), (10, 2)]:
        with pytest.raises(ValueError, match="size"):
            cpu.smooth_knn(z, n1, k, [1.0])
    with pytest.raises(ValueError, match="size"):
        cpu.smooth_knn(z, 5, 3, [])
    with pytest.raises(ValueError, match="out of memory"):  # a square of 2^46 numbers
        cpu._call("smooth_knn", z.dtype, 0, 1, 2**23, 2, 1, 3, (ctypes.c_double * 1)(1.0), 1, 1, z.data_ptr())
    with pytest.raises(TypeError, match="float16"):
        cpu.smooth_knn(z.half(), 5, 3, [1.0])


def test_the_operator() -> None:
    """Automatic without gradients; with them the reference gives value and gradient. Strides and broadcasting."""
    a, b = points(3 * 20, 2).reshape(3, 20, 2), points(17, 2)
    value = smooth_knn(a, b, 5, backend="cpu")
    assert torch.equal(smooth_knn(a, b, 5), value)
    torch.testing.assert_close(value, smooth_knn(a, b, 5, backend="reference"), rtol=1e-11, atol=1e-11)
    strided = a.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(smooth_knn(strided, b.repeat_interleave(2, 0)[::2], 5), value)
    leaf = a[:, :6].clone().requires_grad_()
    for backend in (None, "cpu"):
        assert torch.autograd.gradcheck(lambda x, name=backend: smooth_knn(x, b[:5], 3, (0.7, 4.0), backend=name), leaf)
    grads = [torch.autograd.grad(smooth_knn(leaf, b, 3, backend=name).sum(), leaf)[0] for name in ("cpu", "reference")]
    assert torch.equal(*grads)
