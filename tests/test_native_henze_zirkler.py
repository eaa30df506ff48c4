"""The C++ sums of the Henze-Zirkler statistic: exactness, the same bits for any threads and registers, far points, NaN."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from common import points, results_of_instruction_sets
from torch import Tensor

from libi_fast.kernels import cpu as native
from libi_fast.kernels.henze_zirkler import reference
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic

if not native.available():
    pytest.skip(f"no compiled library: {native.why_unavailable()}", allow_module_level=True)


SIZES = [(2, 1), (15, 1), (16, 2), (17, 2), (100, 3), (500, 2), (511, 8), (513, 4), (700, 9), (300, 17), (2500, 2), (2100, 8)]


def whole(z: Tensor, **options: str) -> tuple[Tensor, Tensor]:
    leaf = z.clone().requires_grad_()
    value = henze_zirkler_statistic(leaf, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("kind", ["normal", "skewed", "correlated"])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_against_the_reference(n: int, d: int, kind: str) -> None:
    z = torch.stack([points(n, d, kind) for _ in range(3)])
    value, gradient = whole(z, backend="reference")
    found, slope = whole(z, backend="cpu")
    torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-11)
    assert float((slope - gradient).abs().max()) <= 1e-11 * max(float(gradient.abs().max()), 1e-3)
    without = henze_zirkler_statistic(z, backend="cpu")
    torch.testing.assert_close(without, found, rtol=1e-11, atol=1e-11)
    # The sums themselves, in float32: at most twice the reference's error in float32, and a few roundings.
    y, beta = reference.whiten(z)[0], reference.default_beta(n, d)
    y = y.float().contiguous()
    exact = reference.pair_sums(y.double(), beta, True)
    ours, torchs = native.henze_zirkler_pairs(y, beta, True), reference.pair_sums(y, beta, True)
    for true, found, theirs in zip(exact, ours, torchs, strict=True):
        assert true is not None and found is not None and theirs is not None
        size = true.abs().amax()
        assert float((found - true).abs().max()) <= 2 * float((theirs - true).abs().max()) + 2e-7 * float(size)


@pytest.mark.parametrize(("n", "d"), [(500, 2), (1500, 2), (4000, 2), (6000, 8)])
def test_in_float32_is_at_least_half_as_exact_as_torch(n: int, d: int) -> None:
    z = points(n, d, "skewed", torch.float32)
    value, gradient = whole(z.double(), backend="cpu")
    found, slope = whole(z, backend="cpu")
    torchs, their_slope = whole(z, backend="reference")
    assert float((found - value).abs()) <= 2 * float((torchs - value).abs()) + 2e-6 * float(value)
    assert float((slope - gradient).abs().max()) <= 2 * float((their_slope - gradient).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("replicas", "n", "d"), [(9, 100, 2), (2, 600, 3), (1, 2500, 2), (1, 2100, 9)])
def test_threads_move_no_bit(replicas: int, n: int, d: int, dtype: torch.dtype) -> None:
    y = torch.randn(replicas, n, d, dtype=dtype)
    before = torch.get_num_threads()
    try:
        for gradient in (True, False):
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(native.henze_zirkler_pairs(y, 2.0, gradient))
            for pairs, sums in results[1:]:
                assert torch.equal(pairs, results[0][0])
                assert sums is None or torch.equal(sums, results[0][1])
    finally:
        torch.set_num_threads(before)


def test_far_points_nan_and_infinity() -> None:
    for dtype in (torch.float32, torch.float64):
        for d in (1, 2, 9):
            y = 1e4 * torch.arange(40, dtype=dtype)[:, None].expand(3, 40, d).contiguous()
            y[1, 3, 0], y[2, 5, 0] = math.nan, math.inf
            pairs, sums = native.henze_zirkler_pairs(y, 1.0, True)
            assert sums is not None
            assert float(pairs[0]) == 40  # each point meets itself, and exactly nothing else
            torch.testing.assert_close(sums[0, :, :d], y[0], rtol=1e-6, atol=0)
            assert bool(pairs[1:].isnan().all())
    pairs, sums = native.henze_zirkler_pairs(torch.zeros(0, 5, 2), 1.0, True)
    assert sums is not None
    assert pairs.shape == (0,)
    assert sums.shape == (0, 5, 3)
    with pytest.raises(ValueError, match="size"):
        native.henze_zirkler_pairs(torch.zeros(2, 0, 2), 1.0, True)


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """To the bit with a fused multiply-add, v3 and v4; generic to rounding."""
    program = """
import sys, torch
from libi_fast.kernels import cpu
torch.manual_seed(0)
y = [torch.randn(2, n, d, dtype=t) for n, d in ((100, 2), (600, 3), (2100, 9)) for t in (torch.float32, torch.float64)]
torch.save((cpu.isa(), [cpu.henze_zirkler_pairs(x, 1.5, True) for x in y]), sys.argv[1])
"""
    results = results_of_instruction_sets(program, tmp_path)
    for name, result in results.items():
        for (pairs, sums), (others, other_sums) in zip(results["generic"], result, strict=True):
            tolerance = 1e-12 if sums.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(pairs, others, rtol=tolerance, atol=0, msg=name)
            torch.testing.assert_close(sums, other_sums, rtol=tolerance, atol=100 * tolerance, msg=name)
    if {"v3", "v4"} <= set(results):
        for one, other in zip(results["v3"], results["v4"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
