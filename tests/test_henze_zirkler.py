"""The Henze-Zirkler statistic: against pingouin and a direct evaluation, its invariances, its gradient, its memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pingouin
import pytest
import torch
from common import points
from scipy import stats
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels import cpu as native
from libi_fast.kernels.henze_zirkler import reference
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic

COMPILED = pytest.mark.skipif(not native.available(), reason="no compiled library")


@pytest.fixture(autouse=True, params=["reference", pytest.param("cpu", marks=COMPILED)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with lf.use_backend(request.param):
        yield request.param


def direct(z: np.ndarray, beta: float | None = None) -> float:
    """The paper's formula as printed, over all n x n pairs; S^{-1/2} by eigenvectors."""
    n, d = z.shape
    if beta is None:
        beta = (1 / math.sqrt(2)) * ((2 * d + 1) * n / 4) ** (1 / (d + 4))
    centred = z - z.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / n)
    y = centred @ vectors / np.sqrt(values) @ vectors.T
    between = ((y[:, None] - y[None]) ** 2).sum(-1)
    first = np.exp(-(beta**2) / 2 * between).sum() / n**2
    single = np.exp(-(beta**2) / (2 * (1 + beta**2)) * (y**2).sum(-1)).mean()
    return n * (first - 2 * (1 + beta**2) ** (-d / 2) * single + (1 + 2 * beta**2) ** (-d / 2))


@pytest.mark.parametrize("kind", ["normal", "skewed", "correlated"])
@pytest.mark.parametrize(("n", "d"), [(20, 2), (100, 2), (500, 2), (50, 3), (300, 5), (400, 10), (13, 10)])
def test_against_pingouin(n: int, d: int, kind: str) -> None:
    z = points(n, d, kind)
    expected = pingouin.multivariate_normality(z.numpy())
    found = lf.henze_zirkler(z)
    assert abs(float(found.statistic) - expected.hz) <= 1e-9 * max(1, expected.hz)
    assert abs(float(found.p_value) - expected.pval) <= 1e-9
    assert found.p_value.requires_grad is False


@pytest.mark.parametrize("kind", ["normal", "skewed"])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (3, 1), (40, 1), (700, 1), (200, 10), (2000, 2)])
@pytest.mark.parametrize("beta", [None, 0.3, 2.0])
def test_against_all_pairs(n: int, d: int, kind: str, beta: float | None) -> None:
    z = points(n, d, kind)  # n = 2000: several blocks of rows
    found = lf.henze_zirkler(z, beta=beta)
    expected = direct(z.numpy(), beta)
    assert abs(float(found.statistic) - expected) <= 1e-9 * max(1, expected)
    single = lf.henze_zirkler(z.float(), beta=beta).statistic
    assert abs(float(single) - expected) <= 2e-4 * max(1, expected) * math.sqrt(n)
    chosen = reference.default_beta(n, d) if beta is None else beta
    mean, variance = reference.null_distribution(n, d, chosen)
    lognormal = stats.lognorm(math.sqrt(math.log1p(variance / mean**2)), scale=mean**2 / math.sqrt(variance + mean**2))
    assert abs(float(found.p_value) - lognormal.sf(expected)) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("beta", [1e-10, 1e-5, 25.0, 1e3, 1e6, 1e10])
@pytest.mark.parametrize("method", ["exact", "quadrature"])
def test_both_ends_of_beta(method: str, beta: float, dtype: torch.dtype) -> None:
    """Where two points coincide they meet at any beta."""
    z = points(60, 2, "skewed", dtype)
    z = torch.cat((z, z[:7]))
    leaf = z.clone().requires_grad_()
    found = henze_zirkler_statistic(leaf, method=method, beta=beta)
    (gradient,) = torch.autograd.grad(found, leaf)
    wide = z.double().clone().requires_grad_()
    (slope,) = torch.autograd.grad(henze_zirkler_statistic(wide, beta=beta, backend="reference"), wide)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert abs(float(found) - direct(z.double().numpy(), beta)) <= tolerance
    assert float((gradient - slope).abs().max()) <= tolerance * float(slope.abs().max()) + 1e-9


@pytest.mark.parametrize("d", [1, 2, 5])
def test_null_moments_against_simulation(d: int) -> None:
    n, draws = 200, 400
    z = lf.philox_normal(5, draws, n * d, dtype=torch.float64).reshape(draws, n, d)
    found = henze_zirkler_statistic(z).numpy()
    mean, variance = reference.null_distribution(n, d, reference.default_beta(n, d))
    # The moments are those of the limit: allow 1/n beside the simulation's own error.
    assert abs(found.mean() - mean) < 4 * found.std() / math.sqrt(draws) + 1 / n
    assert abs(found.var() / variance - 1) < 0.35


def singular_data() -> dict[str, Tensor]:
    z = points(40, 3)
    line = torch.arange(40, dtype=torch.float64)
    return {
        "duplicate column": torch.cat((z, z[:, :1]), 1),
        "scaled copy": torch.cat((z, 1e6 * z[:, :1] + 3), 1),
        "sum of two columns": torch.cat((z, z[:, :1] + z[:, 1:2]), 1),
        "constant 0": torch.cat((z, torch.zeros(40, 1)), 1),
        "constant 0.1": torch.cat((z, torch.full((40, 1), 0.1, dtype=torch.float64)), 1),
        "constant 1e6": torch.cat((z, torch.full((40, 1), 1e6, dtype=torch.float64)), 1),
        "constant 1e6 + 0.1": torch.cat((z, torch.full((40, 1), 1e6 + 0.1, dtype=torch.float64)), 1),
        "one constant column": torch.full((40, 1), 0.1, dtype=torch.float64),
        "all points equal": torch.full((7, 3), -2.3, dtype=torch.float64),
        "n = d": points(4, 4),
        "n < d": points(3, 10),
        "n = 2, d = 2": points(2, 2),
        "on a line": torch.stack((line, 0.1 * line), 1),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", singular_data())
def test_singular_data_give_4n(name: str, dtype: torch.dtype) -> None:
    z = singular_data()[name].to(dtype).requires_grad_()
    found = lf.henze_zirkler(z)
    assert float(found.statistic) == 4 * len(z)
    assert float(found.p_value) < 1e-3 or len(z) < 8
    found.statistic.backward()
    assert z.grad is not None
    assert bool((z.grad == 0).all())


def test_pingouin_gives_4n_as_well() -> None:
    z = singular_data()["duplicate column"].numpy()
    assert pingouin.multivariate_normality(z).hz == 4 * len(z)


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("kind", ["normal", "skewed"])
def test_affine_invariance(d: int, kind: str) -> None:
    z = points(300, d, kind)
    plain = henze_zirkler_statistic(z)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    mixing = torch.randn(d, d, dtype=torch.float64) + 2 * torch.eye(d)
    units = torch.logspace(-8, 8, d, dtype=torch.float64) if d > 1 else torch.tensor([1e-8], dtype=torch.float64)
    for name, moved in {
        "shift": z + torch.linspace(-50, 100, d),
        "scale": 1e5 * z,
        "tiny": 1e-150 * z,
        "huge": 1e150 * z,
        "rotation": z @ rotation,
        "map": z @ mixing,
        "units from 1e-8 to 1e8": z * units,
        "reflection": -z,
        "order": z[torch.randperm(len(z))],
    }.items():
        found = henze_zirkler_statistic(moved)
        assert abs(float(found / plain) - 1) < 1e-9, name


def test_an_offset_of_100_in_float32() -> None:
    z = points(500, 2, dtype=torch.float32)
    for scale in (1.0, 3.0):
        plain, moved = henze_zirkler_statistic(z), henze_zirkler_statistic(scale * z + 100)
        # float32 keeps 17 bits of a coordinate near 100; the reference value is that of the same rounded points.
        exact = henze_zirkler_statistic((scale * z + 100).double())
        assert abs(float(moved / exact) - 1) < 1e-4
        assert abs(float(moved / plain) - 1) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_replicas_equal_the_loop(dtype: torch.dtype) -> None:
    z = points(7 * 60, 3, dtype=dtype).reshape(7, 60, 3) ** 3
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    whole = lf.henze_zirkler(z)
    torch.testing.assert_close(whole.statistic, torch.stack([lf.henze_zirkler(r).statistic for r in z]), **tolerance)
    torch.testing.assert_close(whole.p_value, torch.stack([lf.henze_zirkler(r).p_value for r in z]), **tolerance)
    nested = lf.henze_zirkler(z[:6].reshape(2, 3, 60, 3)).statistic
    torch.testing.assert_close(nested, whole.statistic[:6].reshape(2, 3), **tolerance)
    assert lf.henze_zirkler(z[:0]).statistic.shape == (0,)

    def gradient(t: Tensor) -> Tensor:
        leaf = t.clone().requires_grad_()
        return torch.autograd.grad(henze_zirkler_statistic(leaf).sum(), leaf)[0]

    torch.testing.assert_close(gradient(z), torch.stack([gradient(r) for r in z]), **tolerance)
    torch.testing.assert_close(gradient(z.permute(0, 2, 1).contiguous().mT), gradient(z), **tolerance)  # strided


def test_replicas_are_taken_apart_whatever_their_number() -> None:
    """Blocks of pairs shrink with the number of replicas; nothing may fall between two blocks."""
    z = points(130, 2)
    many = henze_zirkler_statistic(z.expand(70, 130, 2).contiguous())  # 70 * 130^2 pairs: more than one block
    torch.testing.assert_close(many, many[:1].expand(70), rtol=0, atol=0)
    assert abs(float(many[0]) - direct(z.numpy())) < 1e-10


def test_one_replica_of_nan_leaves_the_others_alone() -> None:
    z = points(3 * 50, 2).reshape(3, 50, 2)
    bad = z.clone()
    bad[1, 7, 0] = math.nan
    bad.requires_grad_()
    found = henze_zirkler_statistic(bad)
    torch.testing.assert_close(found[[0, 2]], henze_zirkler_statistic(z)[[0, 2]], rtol=1e-14, atol=0)
    assert bool(found[1].isnan())
    grad = torch.autograd.grad(found[[0, 2]].sum(), bad)[0]
    assert bool(torch.isfinite(grad[[0, 2]]).all())
    bad.data[1, 7, 0] = math.inf
    assert not bool(torch.isfinite(henze_zirkler_statistic(bad)[1]))


@pytest.mark.parametrize("kind", ["normal", "skewed", "correlated"])
@pytest.mark.parametrize(("n", "d"), [(5, 1), (8, 2), (12, 3)])
def test_gradcheck(n: int, d: int, kind: str) -> None:
    z = points(2 * n, d, kind).reshape(2, n, d).requires_grad_()
    assert torch.autograd.gradcheck(henze_zirkler_statistic, z)
    assert torch.autograd.gradcheck(lambda t: henze_zirkler_statistic(t, beta=0.7), z)
    assert torch.autograd.gradcheck(henze_zirkler_statistic, (z.detach() * 20 + 5).requires_grad_())


@pytest.mark.parametrize("n", [200, 1500])
def test_gradient_against_autograd_through_all_pairs(n: int) -> None:
    z = points(n, 2, "skewed").requires_grad_()
    b2 = reference.default_beta(n, 2) ** 2
    centred = z - z.mean(0)
    y = torch.linalg.solve_triangular(torch.linalg.cholesky(centred.mT @ centred / n), centred.mT, upper=False).mT
    between = (y[:, None] - y[None]).square().sum(-1)
    single = (-b2 / (2 * (1 + b2)) * y.square().sum(-1)).exp().mean()
    value = n * ((-b2 / 2 * between).exp().mean() - 2 / (1 + b2) * single + 1 / (1 + 2 * b2))
    expected = torch.autograd.grad(value, z)[0]
    found = torch.autograd.grad(henze_zirkler_statistic(z), z)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_affine_invariance_of_the_gradient(d: int) -> None:
    """HZ(z M + c) = HZ(z): no derivative along shifts (rows of the gradient sum to 0) or along linear maps (g' z = 0)."""
    z = (points(200, d, "skewed") * 3 + 10).requires_grad_()
    grad = torch.autograd.grad(henze_zirkler_statistic(z), z)[0]
    centred = (z - z.mean(0)).detach()
    size = float(grad.abs().sum())
    assert size > 1e-3
    assert float(grad.sum(0).abs().max()) < 1e-12 * size
    assert float((grad.mT @ centred).abs().max()) < 1e-12 * size * float(centred.abs().max())
    # A steeper unit makes a flatter gradient: d HZ / d (s z) = (1/s) d HZ / d z.
    scaled = (1000 * z.detach()).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(henze_zirkler_statistic(scaled), scaled)[0], grad / 1000, rtol=1e-9, atol=0)


def test_descent_makes_points_more_normal() -> None:
    z = points(100, 2, "skewed").requires_grad_()
    optimiser = torch.optim.Adam([z], lr=0.02)
    start = lf.henze_zirkler(z)
    for _ in range(60):
        optimiser.zero_grad()
        henze_zirkler_statistic(z).backward()
        optimiser.step()
    end = lf.henze_zirkler(z)
    assert float(end.statistic) < 0.3 * float(start.statistic)
    assert float(end.p_value) > float(start.p_value)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_p_values_are_uniform_under_the_null(d: int) -> None:
    draws, n = 300, 120
    z = lf.philox_normal(17, draws, n * d, dtype=torch.float64).reshape(draws, n, d)
    p = lf.henze_zirkler(z).p_value.numpy()
    # The lognormal is an approximation, yet 300 draws must not see that.
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.02 < (p < 0.05).mean() < 0.09


def test_power_against_what_is_not_normal() -> None:
    uniform = lf.philox_uniform(1, 300, 2)
    assert float(lf.henze_zirkler(uniform).p_value) < 1e-3
    ring = torch.linspace(0, 2 * math.pi, 300)
    assert float(lf.henze_zirkler(torch.stack((ring.cos(), ring.sin()), 1)).p_value) < 1e-6


def test_memory_is_not_n_by_n(backend: str) -> None:
    """n = 20,000 would need 3.2 GB for its pairs in float64."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    program = """
import sys
import torch
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic
torch.set_num_threads(1)
torch.manual_seed(0)
def level(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
z = torch.randn(20000, 2, dtype=torch.float64, requires_grad=True)
before = level("VmRSS")
henze_zirkler_statistic(z, backend=sys.argv[1]).backward()
print(level("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program, backend], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 200


@pytest.mark.parametrize(
    ("error", "message", "z", "beta"),
    [
        (lf.InputError, "z must have at least 2 dim", torch.zeros(5), None),
        (lf.InputError, "at least 2 points", torch.zeros(1, 2), None),
        (lf.InputError, "at least 2 points", torch.zeros(0, 2), None),
        (lf.InputError, "at least 1 dimension", torch.zeros(5, 0), None),
        (lf.InputError, "z holds nan at row 3, column 1", torch.eye(5).index_put_((torch.tensor(3), torch.tensor(1)), torch.tensor(math.nan)), None),  # noqa: E501
        (lf.InputError, "z holds -inf at row 0, column 0", torch.full((5, 2), -math.inf), None),
        (lf.InputError, "beta must be positive", torch.eye(5), 0.0),
        (lf.InputError, "beta must be positive", torch.eye(5), -1.0),
        (lf.InputError, "beta must be positive", torch.eye(5), math.nan),
        (lf.InputError, "beta must lie in 1e-10 .. 1e10, got 1e-11", torch.eye(5), 1e-11),
        (lf.InputError, "beta must lie in 1e-10 .. 1e10, got 100000000000.0", torch.eye(5), 1e11),
        (TypeError, "z must be float32 or float64, got float16", torch.zeros(5, 2, dtype=torch.float16), None),
        (TypeError, "z must be float32 or float64, got int64", torch.zeros(5, 2, dtype=torch.int64), None),
        (TypeError, "z must be a torch.Tensor, got ndarray", np.zeros((5, 2)), None),
    ],
)  # fmt: skip
def test_bad_input(error: type, message: str, z: Tensor, beta: float | None) -> None:
    with pytest.raises(error, match=message):
        lf.henze_zirkler(z, beta=beta)


def test_a_backend_that_is_not_there() -> None:
    with pytest.raises(lf.InputError, match="nonsense"):
        lf.henze_zirkler(points(5, 2), backend="nonsense")


def test_opcheck(backend: str) -> None:
    z = points(2 * 9, 2).reshape(2, 9, 2)
    beta = reference.default_beta(9, 2)
    for gradient in (False, True):
        torch.library.opcheck(torch.ops.libi_fast.henze_zirkler.default, (z, beta, gradient, backend))


def test_vmap_equals_the_loop() -> None:
    z = points(3 * 4 * 30, 2, "skewed").reshape(3, 4, 30, 2)

    def gradient(t: Tensor) -> Tensor:
        return torch.func.grad(lambda u: henze_zirkler_statistic(u).square().sum())(t)

    for dim in (0, 1):
        looped = torch.stack([henze_zirkler_statistic(t) for t in z.unbind(dim)])
        torch.testing.assert_close(torch.func.vmap(henze_zirkler_statistic, dim)(z), looped, rtol=1e-13, atol=0)
        mapped = torch.func.vmap(gradient, dim)(z)
        torch.testing.assert_close(mapped, torch.stack([gradient(t) for t in z.unbind(dim)]), rtol=1e-11, atol=1e-14)
    nested = torch.func.vmap(torch.func.vmap(gradient))(z)
    torch.testing.assert_close(nested, torch.stack([gradient(t) for t in z]), rtol=1e-11, atol=1e-14)
    both = torch.func.vmap(lambda t: lf.henze_zirkler(t).p_value)(z)
    torch.testing.assert_close(both, lf.henze_zirkler(z).p_value)


def test_compile() -> None:
    def loss(t: Tensor) -> Tensor:
        result = lf.henze_zirkler(2 * t)
        return result.statistic + 0 * result.p_value

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    z = points(50, 2, "skewed").requires_grad_()
    value, expected = compiled(z), loss(z)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(expected, z))


def test_what_is_not_supported_says_so() -> None:
    z = points(9, 2)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(henze_zirkler_statistic, (z,), (torch.ones_like(z),))
    with pytest.raises(NotImplementedError, match="henze_zirkler has no second derivative"):
        torch.autograd.functional.hessian(henze_zirkler_statistic, z)


def test_gradient_around_vmap_equals_the_loop() -> None:
    z = points(30, 2)[None].repeat(3, 1, 1) * torch.randn(3, 30, 2, dtype=torch.float64)
    mapped = torch.func.grad(lambda a: torch.vmap(henze_zirkler_statistic)(a).sum())(z)
    looped = torch.stack([torch.func.grad(henze_zirkler_statistic)(one) for one in z])
    assert torch.allclose(mapped, looped, rtol=1e-12)
    assert mapped.abs().min(1).values.max() > 0
