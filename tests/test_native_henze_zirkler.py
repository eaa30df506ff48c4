"""The C++ Henze-Zirkler, exact and at linear cost: exactness, the same bits for any threads and registers, far points, NaN."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import points, results_of_instruction_sets
from torch import Tensor

from libi_fast.kernels import cpu as native
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic

if not native.available():
    pytest.skip(f"no compiled library: {native.why_unavailable()}", allow_module_level=True)


SIZES = [(2, 1), (15, 1), (16, 2), (17, 2), (100, 3), (500, 2), (511, 8), (513, 4), (700, 9), (300, 17), (2500, 2), (2100, 8)]
LINEAR = [
    *(("quadrature", n, d) for n, d in ((2, 1), (65, 1), (1500, 1), (20, 2), (300, 2), (2500, 2), (20, 3), (300, 3))),
    *(("random", n, d) for n, d in ((2, 1), (9, 2), (300, 3), (1100, 8), (64, 33))),
    *(("sliced", n, d) for n, d in ((2, 1), (9, 2), (300, 3), (1100, 8), (64, 33))),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def options(method: str, count: int = 70) -> dict[str, Any]:
    return {"method": method, "num_frequencies": count, "num_slices": count // 8}


def whole(z: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = z.clone().requires_grad_()
    value = henze_zirkler_statistic(leaf, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def condition(z: Tensor) -> float:
    """The largest condition number of the replicas' correlations that are not singular."""
    numbers = [float(torch.linalg.cond(torch.corrcoef(r.mT).reshape(r.shape[1], -1))) for r in z]
    return max([c for c in numbers if c < 1e14], default=1)


@pytest.mark.parametrize("kind", ["normal", "skewed", "correlated"])
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_against_the_reference(n: int, d: int, kind: str) -> None:
    z = torch.stack([points(n, d, kind) for _ in range(3)])
    value, gradient = whole(z, backend="reference")
    found, slope = whole(z, backend="cpu")
    # Two whitenings: each is as exact as the correlations' condition lets it be.
    limit = 1e-11 + 1e-14 * condition(z)
    torch.testing.assert_close(found, value, rtol=limit, atol=limit)
    assert float((slope - gradient).abs().max()) <= limit * max(float(gradient.abs().max()), 1e-3)
    without = henze_zirkler_statistic(z, backend="cpu")
    torch.testing.assert_close(without, found, rtol=1e-11, atol=1e-11)
    check_in_float32(z.float(), backend="cpu")


@pytest.mark.parametrize("kind", ["normal", "skewed", "correlated"])
@pytest.mark.parametrize(("method", "n", "d"), LINEAR)
def test_linear_forms_against_the_reference(method: str, n: int, d: int, kind: str) -> None:
    z = torch.stack([points(n, d, kind) for _ in range(3)])
    for count in (70, 400):
        value, gradient = whole(z, backend="reference", **options(method, count))
        found, slope = whole(z, backend="cpu", **options(method, count))
        # Nodes are each replica's own here, and of all together there: quadratures agree to their tolerance.
        tolerance = (1e-11 if method == "random" else 1e-9) + 1e-14 * condition(z)
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)
        assert float((slope - gradient).abs().max()) <= tolerance * max(float(gradient.abs().max()), 1e-2)
        without = henze_zirkler_statistic(z, backend="cpu", **options(method, count))
        assert torch.equal(without, found)
    check_in_float32(z.float(), backend="cpu", **options(method))


def check_in_float32(z: Tensor, **options: Any) -> None:
    """At most twice the reference's error in float32, and a few roundings."""
    exact, exact_slope = whole(z.double(), **options)
    ours, slope = whole(z, **options)
    theirs, their_slope = whole(z, **(options | {"backend": "reference"}))
    error, their_error = (float((v - exact).abs().max()) for v in (ours, theirs))
    assert error <= 2 * their_error + 2e-6 * max(1, float(exact.abs().max()))
    error, their_error = (float((g - exact_slope).abs().max()) for g in (slope, their_slope))
    assert error <= 2 * their_error + 2e-6 * float(exact_slope.abs().max()) + 1e-7


@pytest.mark.parametrize(("n", "d"), [(500, 2), (1500, 2), (4000, 2), (6000, 8)])
def test_in_float32_is_at_least_half_as_exact_as_torch(n: int, d: int) -> None:
    z = points(n, d, "skewed", torch.float32)
    value, gradient = whole(z.double(), backend="cpu")
    found, slope = whole(z, backend="cpu")
    torchs, their_slope = whole(z, backend="reference")
    assert float((found - value).abs()) <= 2 * float((torchs - value).abs()) + 2e-6 * float(value)
    assert float((slope - gradient).abs().max()) <= 2 * float((their_slope - gradient).abs().max())


@DTYPES
@pytest.mark.parametrize(
    ("method", "replicas", "n", "d"),
    [
        ("exact", 9, 100, 2), ("exact", 2, 600, 3), ("exact", 5, 520, 2), ("exact", 3, 2100, 2),
        ("exact", 1, 2500, 2), ("exact", 1, 2100, 9),
        ("quadrature", 9, 100, 2), ("quadrature", 1, 2500, 2), ("quadrature", 1, 900, 3), ("quadrature", 2, 20000, 1),
        ("random", 9, 100, 2), ("random", 1, 5000, 3), ("random", 2, 3000, 8),
        ("sliced", 9, 100, 2), ("sliced", 1, 5000, 3), ("sliced", 2, 3000, 8),
    ],
)  # fmt: skip
def test_threads_move_no_bit(method: str, replicas: int, n: int, d: int, dtype: torch.dtype) -> None:
    z = torch.randn(replicas, n, d, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            value = henze_zirkler_statistic(z, backend="cpu", **options(method))
            results.append((value, *whole(z, backend="cpu", **options(method))))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    finally:
        torch.set_num_threads(before)


@DTYPES
@pytest.mark.parametrize("method", ["exact", "quadrature", "random", "sliced"])
def test_replicas_do_not_depend_on_each_other(method: str, dtype: torch.dtype) -> None:
    z = torch.randn(5, 130, 2, dtype=dtype) ** 3
    z[3] = 7.5  # singular
    value, slope = whole(z, backend="cpu", **options(method))
    assert float(value[3]) == 4 * 130
    assert not bool(slope[3].any())
    for replica, one, gradient in zip(z, value, slope, strict=True):
        found = whole(replica, backend="cpu", **options(method))
        assert torch.equal(found[0], one)
        assert torch.equal(found[1], gradient)
    strided = z.mT.contiguous().mT
    assert all(torch.equal(a, b) for a, b in zip(whole(strided, backend="cpu", **options(method)), (value, slope), strict=True))


@DTYPES
@pytest.mark.parametrize("method", ["exact", "quadrature", "random", "sliced"])
def test_nan_and_infinity_make_one_replica_nan(method: str, dtype: torch.dtype) -> None:
    for d in (1, 2, 3):
        z = torch.randn(4, 40, d, dtype=dtype)
        clean = whole(z, backend="cpu", **options(method))
        z[1, 3, 0], z[2, 5, d - 1] = math.nan, -math.inf
        value, slope = whole(z, backend="cpu", **options(method))
        assert bool(value[1:3].isnan().all())
        assert bool(slope[1:3].isnan().all())
        assert torch.equal(value[[0, 3]], clean[0][[0, 3]])
        assert torch.equal(slope[[0, 3]], clean[1][[0, 3]])


@DTYPES
def test_points_that_lie_far_apart_do_not_meet(dtype: torch.dtype) -> None:
    """At a large beta each point meets itself, and exactly nothing else."""
    z = torch.arange(40, dtype=dtype)[:, None] * torch.ones(1, 1, dtype=dtype)
    value, slope = whole(z, beta=1e4, backend="cpu")
    whitened = (z.double() - z.double().mean()) / z.double().std(correction=0)
    once = (-0.5e8 / (1 + 1e8) * whitened.square()).exp().sum()
    expected = 1 - 2 * (1 + 1e8) ** -0.5 * once + 40 * (1 + 2e8) ** -0.5
    torch.testing.assert_close(value.double(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("beta", [1e3, 3e6, 3e7, 1e10])
def test_phases_longer_than_float32_can_tell(beta: float, dtype: torch.dtype) -> None:
    """They are noise to float32, but the statistic is near 1 where no two points meet, whatever the noise."""
    z = torch.randn(400, 2, dtype=dtype)
    for backend in ("cpu", "reference"):
        value, slope = whole(z, beta=beta, backend=backend, **options("random", 1024))
        assert abs(float(value) - 1) < 0.2
        assert 1e-3 * beta < float(slope.abs().max()) < 0.1 * beta


def test_slices_with_phases_longer_than_float32_can_tell() -> None:
    z = torch.tensor([-1.7, -0.2, 0.3, 2.0])[:, None]
    found, slope = whole(z, beta=2e6, backend="cpu", method="sliced", num_slices=1)
    exact, gradient = whole(z.double(), beta=2e6, backend="cpu")
    assert abs(float(found) - float(exact)) < 1e-5
    assert float((slope - gradient).abs().max()) < 1e-3


def test_sizes_whose_work_space_overflows() -> None:
    number = torch.zeros(8, dtype=torch.int64)
    at, n, d = number.data_ptr(), 2**31, 2**27  # n d fits, the sums of d^2 over chunks do not
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="henze_zirkler: a size"):
            native._call("henze_zirkler", dtype, at, 1, n, d, 1.0, 1, 1, at, at)
        with pytest.raises(ValueError, match="henze_zirkler_characteristic: a size"):
            native._call("henze_zirkler_characteristic", dtype, at, at, 1, 1, 1, n, d, 1.0, 1, 1, at, at)


def test_sizes_that_are_refused() -> None:
    vectors = torch.zeros(3, 2)
    value, slope = native.henze_zirkler(torch.zeros(0, 5, 2), 1.0, True)
    assert (value.shape, slope.shape) == ((0,), (0, 5, 2))
    value, slope = native.henze_zirkler_characteristic(torch.zeros(0, 5, 2), vectors, 1.0, "random", True)
    assert (value.shape, slope.shape) == ((0,), (0, 5, 2))
    assert float(native.henze_zirkler(torch.ones(1, 1, 2), 1.0, True)[0]) == 4  # one row: singular
    with pytest.raises(ValueError, match="size"):
        native.henze_zirkler(torch.zeros(2, 0, 2), 1.0, True)
    for z, method in ((torch.zeros(2, 0, 2), "random"), (torch.zeros(2, 5, 4), "quadrature")):
        with pytest.raises(ValueError, match="size"):
            native.henze_zirkler_characteristic(z, vectors, 1.0, method, True)
    with pytest.raises(ValueError, match="size"):
        native.henze_zirkler_characteristic(torch.zeros(2, 5, 2), vectors[:0], 1.0, "sliced", True)


PROGRAM = """
import sys, torch
from libi_fast.kernels import cpu
torch.use_deterministic_algorithms(True)  # torch's fresh memory is NaN
torch.manual_seed(0)
results = []
for t in (torch.float32, torch.float64):
    for n, d in ((100, 2), (600, 3), (2100, 9)):
        z = torch.randn(2, n, d, dtype=t)
        results.append(cpu.henze_zirkler(z, 1.5, True))
        for count in (40, 300):
            vectors = torch.nn.functional.normalize(torch.randn(count, d, dtype=t), dim=-1)
            results.append(cpu.henze_zirkler_characteristic(z, vectors, 1.5, "random", True))
            results.append(cpu.henze_zirkler_characteristic(z, vectors[:9], 1.5, "sliced", True))
    for n, d in ((50, 1), (600, 2), (300, 3)):
        z = torch.randn(2, n, d, dtype=t)
        results.append(cpu.henze_zirkler_characteristic(z, z[0, :0], 1.5, "quadrature", True))
torch.save((cpu.isa(), results), sys.argv[1])
"""


def test_instruction_sets_agree(tmp_path: Path) -> None:
    """To the bit with a fused multiply-add, v3 and v4; generic to rounding."""
    results = results_of_instruction_sets(PROGRAM, tmp_path)
    for name, result in results.items():
        for (value, slope), (other, other_slope) in zip(results["generic"], result, strict=True):
            tolerance = 1e-11 if value.dtype == torch.float64 else 1e-4
            torch.testing.assert_close(value, other, rtol=tolerance, atol=0, msg=name)
            torch.testing.assert_close(slope, other_slope, rtol=0, atol=tolerance * float(slope.abs().max()), msg=name)
    if {"v3", "v4"} <= set(results):
        for one, other in zip(results["v3"], results["v4"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_nothing_is_read_before_it_is_written(tmp_path: Path) -> None:
    """Whatever fresh memory holds: glibc fills it with 0x7f, numbers near the largest, or with 0xfe."""
    results = []
    for filler in ("0", "128", "1"):
        path = tmp_path / f"{filler}.pt"
        environment = {**os.environ, "MALLOC_PERTURB_": filler}
        subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, str(path)], env=environment, check=True, timeout=300)
        results.append(torch.load(path)[1])
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("n", [4, 5, 30])
def test_whitening_in_many_dimensions(n: int) -> None:
    """Householder's form and Sturm's sequence: a smallest eigenvalue on either side of the limit."""
    for d in (2, 3, 7, 20):
        z = torch.randn(n * d, d, dtype=torch.float64)
        for gap, singular in ((3e-6, False), (1e-9, True)):
            z[:, -1] = z[:, 0] + gap * torch.randn(n * d, dtype=torch.float64)
            value = henze_zirkler_statistic(z, backend="cpu")
            assert (float(value) == 4 * n * d) == singular
            assert torch.equal(value == 4 * n * d, henze_zirkler_statistic(z, backend="reference") == 4 * n * d)
