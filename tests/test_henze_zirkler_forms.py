"""Henze-Zirkler at linear cost: quadrature against all pairs, random frequencies, slices, several processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from common import in_one_process, in_two_processes, of_processes, points
from scipy import stats
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels import cpu as native
from libi_fast.kernels.henze_zirkler import characteristic, reference
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic, null_quantile
from libi_fast.training import distributed

FORMS: list[dict[str, Any]] = [
    {"method": "quadrature"},
    {"method": "random", "num_frequencies": 50},
    {"method": "sliced", "num_slices": 5},
]
NAMES = [str(form["method"]) for form in FORMS]


COMPILED = pytest.mark.skipif(not native.available(), reason="no compiled library")


@pytest.fixture(autouse=True, params=["reference", pytest.param("cpu", marks=COMPILED)])
def backend_in_one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """The many small products here only wait for each other in two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with lf.use_backend(request.param):
        yield
    torch.set_num_threads(before)


def sample(n: int, d: int, kind: str) -> Tensor:
    """[n, d] in float64; beside the kinds of ``points``: heavy-tailed (Cauchy), offset, on a lattice."""
    z = points(n, d, kind)
    if kind == "heavy":
        z = z / torch.randn(n, 1, dtype=torch.float64)
    if kind == "offset":
        z = z + 100
    return z.round() if kind == "lattice" else z


def naive(z: Tensor, beta: float) -> float:
    """The formula as printed, over all pairs."""
    n, d = z.shape
    y, b2 = reference.whiten(z[None])[0][0], beta * beta
    between = (y[:, None] - y[None]).square().sum(-1)
    single = (-b2 / (2 * (1 + b2)) * y.square().sum(-1)).exp().mean()
    return float(n * ((-b2 / 2 * between).exp().mean() - 2 * (1 + b2) ** (-d / 2) * single + (1 + 2 * b2) ** (-d / 2)))


def with_gradient(z: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = z.clone().requires_grad_()
    value = henze_zirkler_statistic(leaf, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


# --- quadrature ---


@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy", "offset", "lattice", "correlated"])
@pytest.mark.parametrize(("n", "d"), [(20, 1), (300, 1), (3000, 1), (20, 2), (300, 2), (3000, 2), (20, 3), (300, 3)])
@pytest.mark.parametrize("beta", [None, 0.3, 3.0])
def test_quadrature_is_the_exact_statistic(n: int, d: int, kind: str, beta: float | None) -> None:
    z = sample(n, d, kind)
    exact, slope = with_gradient(z, beta=beta)
    found, gradient = with_gradient(z, beta=beta, method="quadrature")
    assert abs(float(found - exact)) < 1e-9
    assert float((gradient - slope).abs().max()) < 1e-9 * float(slope.abs().max()) + 1e-11
    if n <= 300:
        assert abs(float(found) - naive(z, reference.default_beta(n, d) if beta is None else beta)) < 1e-9
    # In float32 no worse than the exact form, but for what whitening in float32 costs both.
    single = z.float()
    exact, slope = with_gradient(single.double(), beta=beta)
    theirs, their_gradient = with_gradient(single, beta=beta, backend="reference")
    ours, our_gradient = with_gradient(single, beta=beta, method="quadrature")
    assert abs(float(ours - exact)) < 2 * abs(float(theirs - exact)) + 1e-6 * max(1, float(exact))
    error, their_error = (float((g - slope).abs().max()) for g in (our_gradient, their_gradient))
    assert error < 2 * their_error + 2e-6 * float(slope.abs().max())


def test_quadrature_of_3000_points_in_3_dimensions() -> None:
    z = sample(3000, 3, "normal")
    exact, slope = with_gradient(z)
    found, gradient = with_gradient(z, method="quadrature")
    assert abs(float(found - exact)) < 1e-9
    assert float((gradient - slope).abs().max()) < 1e-9 * float(slope.abs().max())


def test_past_the_largest_grid_quadrature_is_the_exact_form() -> None:
    z = sample(3000, 3, "heavy")
    assert torch.equal(henze_zirkler_statistic(z, method="quadrature"), henze_zirkler_statistic(z))


def test_quadrature_has_the_p_value_of_the_exact_form() -> None:
    z = points(3 * 80, 2, "skewed").reshape(3, 80, 2) * 0.3
    exact, found = lf.henze_zirkler(z), lf.henze_zirkler(z, method="quadrature")
    torch.testing.assert_close(found.p_value, exact.p_value, rtol=1e-7, atol=1e-9)


# --- every form ---


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_singular_data_give_4n(form: dict[str, Any], dtype: torch.dtype) -> None:
    z = points(40, 2)
    for singular in (
        torch.cat((z, z[:, :1]), 1),
        torch.cat((z, torch.full((40, 1), 0.1, dtype=torch.float64)), 1),
        torch.full((7, 3), -2.3, dtype=torch.float64),
        points(2, 3),
    ):
        both = torch.stack((singular, torch.randn_like(singular) if len(singular) > 3 else singular)).to(dtype)
        value, gradient = with_gradient(both, **form)
        assert float(value[0]) == 4 * len(singular)
        assert bool((gradient[0] == 0).all())
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_gradcheck(form: dict[str, Any], d: int) -> None:
    z = points(2 * 6, d, "skewed").reshape(2, 6, d).requires_grad_()
    for beta in (None, 0.7) if d < 3 else (None,):
        assert torch.autograd.gradcheck(lambda t, b=beta: henze_zirkler_statistic(t, beta=b, **form), z)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_replicas_equal_the_loop(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    z = points(6 * 40, 3).reshape(6, 40, 3) ** 3
    value, gradient = with_gradient(z, **form)
    looped = [with_gradient(r, **form) for r in z]
    torch.testing.assert_close(value, torch.stack([v for v, _ in looped]), rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(gradient, torch.stack([g for _, g in looped]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(henze_zirkler_statistic(z.reshape(2, 3, 40, 3), **form), value.reshape(2, 3))
    torch.testing.assert_close(with_gradient(z.mT.contiguous().mT, **form)[1], gradient)  # strided
    assert lf.henze_zirkler(z[:0], **form).statistic.shape == (0,)
    # Whatever the blocks of rows and groups of replicas.
    monkeypatch.setattr(characteristic, "CHUNK", 7)
    for budget in (3000, 10**5):
        monkeypatch.setattr(characteristic, "BUDGET", budget)
        again, slope = with_gradient(z, **form)
        torch.testing.assert_close(again, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_invariance(form: dict[str, Any]) -> None:
    z = points(300, 3, "skewed")
    plain = float(henze_zirkler_statistic(z, **form))
    maps = {"shift and scale": 1e5 * z + 7, "units": z * torch.logspace(-8, 8, 3, dtype=torch.float64), "order": z.flip(0)}
    if form["method"] == "quadrature":
        maps["map"] = z @ (torch.randn(3, 3, dtype=torch.float64) + 2 * torch.eye(3))
    for name, moved in maps.items():
        assert abs(float(henze_zirkler_statistic(moved, **form)) / plain - 1) < 1e-9, name
    _, gradient = with_gradient(z, **form)
    assert float(gradient.sum(0).abs().max()) < 1e-12 * float(gradient.abs().sum())


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_one_replica_of_nan_leaves_the_others_alone(form: dict[str, Any]) -> None:
    z = points(3 * 50, 2).reshape(3, 50, 2)
    bad = z.clone()
    bad[1, 7, 0] = math.nan
    found, gradient = with_gradient(bad, **form)
    torch.testing.assert_close(found[[0, 2]], henze_zirkler_statistic(z, **form)[[0, 2]], rtol=1e-9, atol=0)
    assert bool(found[1].isnan())
    assert bool(torch.isfinite(gradient[[0, 2]]).all())


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_vmap_compile_opcheck_and_second_derivatives(form: dict[str, Any]) -> None:
    z = points(3 * 4 * 30, 2, "skewed").reshape(3, 4, 30, 2)

    def statistic(t: Tensor) -> Tensor:
        return henze_zirkler_statistic(t, **form)

    def gradient(t: Tensor) -> Tensor:
        return torch.func.grad(lambda u: statistic(u).square().sum())(t)

    torch.testing.assert_close(torch.func.vmap(statistic, 1)(z), statistic(z).mT, rtol=1e-9, atol=1e-10)
    looped = torch.stack([gradient(t) for t in z])
    torch.testing.assert_close(torch.func.vmap(gradient)(z), looped, rtol=1e-8, atol=1e-8)

    def loss(t: Tensor) -> Tensor:
        result = lf.henze_zirkler(2 * t, **form)
        return result.statistic + 0 * result.p_value

    leaf = z[0, 0].clone().requires_grad_()
    value, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf), loss(leaf)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, leaf), torch.autograd.grad(expected, leaf))

    vectors = torch.randn(4, 2, dtype=torch.float64)
    for flag in (False, True):
        arguments = (z[0], vectors, 0.8, form["method"], flag, "reference")
        torch.library.opcheck(torch.ops.libi_fast.henze_zirkler_characteristic.default, arguments)
    with pytest.raises(NotImplementedError, match="henze_zirkler has no second derivative"):
        torch.autograd.functional.hessian(statistic, z[0, 0])
    with pytest.raises(NotImplementedError):
        torch.func.jvp(statistic, (z[0, 0],), (torch.ones_like(z[0, 0]),))


def test_one_seed_for_all_that_vmap_maps() -> None:
    z = points(9, 2)
    with pytest.raises(NotImplementedError, match="one seed for all replicas"):
        torch.func.vmap(lambda s: henze_zirkler_statistic(z, method="random", seed=s))(torch.arange(3))


# --- random frequencies ---


def by_frequencies(z: Tensor, t: Tensor) -> Tensor:
    y = reference.whiten(z[None])[0][0]
    phase = y @ t.mT
    real = phase.cos().mean(0) - (-t.square().sum(1) / 2).exp()
    return len(z) * (real.square() + phase.sin().mean(0).square()).mean()


def test_random_is_its_formula_and_frequencies_extend() -> None:
    z = points(200, 3, "skewed")
    beta = reference.default_beta(200, 3)
    t = beta * lf.philox_normal(5, 300, 3, stream=lf.Stream.FREQUENCIES, dtype=torch.float64)
    for count in (100, 300):
        found = henze_zirkler_statistic(z, method="random", num_frequencies=count, seed=5)
        torch.testing.assert_close(found, by_frequencies(z, t[:count]), rtol=1e-11, atol=0)
    assert found == henze_zirkler_statistic(z, method="random", num_frequencies=300, seed=torch.tensor(5))
    single = henze_zirkler_statistic(z.float(), method="random", num_frequencies=300, seed=5)
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=0)


@pytest.mark.parametrize("d", [2, 6])
def test_random_is_unbiased_and_its_error_falls_with_the_root_of_the_draws(d: int) -> None:
    z = points(80, d, "skewed")
    exact, slope = with_gradient(z)
    spread = {}
    for count in (8, 128):
        runs = [with_gradient(z, method="random", num_frequencies=count, seed=s) for s in range(120)]
        values, gradients = torch.stack([v for v, _ in runs]), torch.stack([g for _, g in runs])
        assert abs(float(values.mean() - exact)) < 4 * float(values.std()) / math.sqrt(120)
        spread[count] = float(values.std())
    assert 2.8 < spread[8] / spread[128] < 5.7  # 4, known to 9%
    # Cholesky's square root is not symmetric, yet the mean over frequencies knows no direction: the same gradient.
    error = (gradients.mean(0) - slope) / (gradients.std(0) / math.sqrt(120))
    assert float(error.abs().max()) < 5
    assert float((error.square()).mean()) < 1.7


@pytest.mark.parametrize(("form", "d"), [(FORMS[1], 2), (FORMS[1], 8), (FORMS[2], 2), (FORMS[2], 30)], ids=str)
def test_p_values_are_uniform_under_the_null(form: dict[str, Any], d: int) -> None:
    draws, n = 300, 150
    z = lf.philox_normal(17, draws, n * d, dtype=torch.float64).reshape(draws, n, d)
    found = lf.henze_zirkler(z, **form)
    assert stats.kstest(found.p_value.numpy(), "uniform").pvalue > 0.01
    mean, variance = found.statistic.mean(), found.statistic.var()
    method, beta = form["method"], reference.default_beta(n, 1 if form["method"] == "sliced" else d)
    count = form["num_frequencies"] if method == "random" else form["num_slices"]
    t = lf.philox_normal(0, count, d, stream=lf.Stream.FREQUENCIES, repetition=int(method == "sliced"), dtype=torch.float64)
    if method == "random":
        moments = characteristic.null_of_draws(beta * t)
    else:
        moments = characteristic.null_of_slices(t / t.norm(dim=1, keepdim=True), n, beta)
    assert abs(float(mean - moments[0])) < 4 * float(variance.sqrt()) / math.sqrt(draws) + 1 / n
    assert abs(float(variance / moments[1]) - 1) < 0.35
    quantile = null_quantile(z[0], 0.95, **form)
    assert 0.02 < float((found.statistic > quantile).double().mean()) < 0.09
    torch.testing.assert_close(found.statistic > quantile, found.p_value < 0.05)


def test_null_moments_agree_with_the_exact_form_s() -> None:
    mean, variance = reference.null_distribution(300, 1, 1.3)
    found = characteristic.null_of_slices(torch.ones(1, 1), 300, 1.3)
    torch.testing.assert_close(torch.stack(found), torch.tensor([mean, variance], dtype=torch.float64), rtol=1e-10, atol=0)
    mean, variance = reference.null_distribution(300, 3, 0.9)
    found = characteristic.null_of_draws(0.9 * torch.randn(2000, 3))
    torch.testing.assert_close(torch.stack(found), torch.tensor([mean, variance], dtype=torch.float64), rtol=0.1, atol=0)


# --- slices ---


@pytest.mark.parametrize("beta", [None, 0.8])
def test_sliced_is_the_mean_of_univariate_statistics(beta: float | None) -> None:
    z = sample(250, 5, "skewed")
    u = lf.philox_normal(3, 7, 5, stream=lf.Stream.FREQUENCIES, repetition=1, dtype=torch.float64)
    y = reference.whiten(z[None])[0][0]
    projected = (y @ (u / u.norm(dim=1, keepdim=True)).mT).mT[..., None]
    found = henze_zirkler_statistic(z, method="sliced", num_slices=7, seed=3, beta=beta)
    torch.testing.assert_close(found, henze_zirkler_statistic(projected, beta=beta).mean(), rtol=0, atol=1e-9)


def test_sliced_sees_a_direction_that_the_full_statistic_cannot_in_64_dimensions() -> None:
    for seed in range(2):
        z = lf.philox_normal(1000 + seed, 512, 64, dtype=torch.float64)
        assert float(lf.henze_zirkler(z, method="sliced", num_slices=1024, beta=0.2).p_value) > 0.05
        z[:, 0] = (3 * z[:, 0]).exp()
        assert float(lf.henze_zirkler(z).p_value) > 0.05
        assert float(lf.henze_zirkler(z, method="sliced", num_slices=1024, beta=0.2).p_value) < 0.01


def test_sliced_has_a_gradient_in_64_dimensions() -> None:
    """The full statistic is 1 for heavy tails as well, and pulls nowhere."""
    z = lf.philox_normal(3, 512, 64, dtype=torch.float64)
    heavy = z / lf.philox_normal(4, 512, 5, dtype=torch.float64).square().mean(1, keepdim=True).sqrt()
    full, none = with_gradient(heavy)
    assert abs(float(full) - 1) < 1e-3
    assert float(none.norm()) < 1e-3
    value, gradient = with_gradient(heavy, method="sliced")
    assert float(value) > 2 * float(henze_zirkler_statistic(z, method="sliced"))
    assert float(gradient.norm()) > 0.1


# --- several processes ---


@of_processes
def _spread(rank: int, world: int, result: Any, z: Tensor) -> None:
    start, stop = (0, 50) if world == 1 else ((0, 17), (17, 50))[rank]  # unequal shards
    leaf = z[:, start:stop].clone().requires_grad_()
    rows = distributed.Rows.own(leaf)
    found = lf.henze_zirkler(leaf, method="random", num_frequencies=64, reduce=distributed.sum_over_processes)
    moment = distributed.sum_over_processes(leaf.square().sum(-2)) / rows.total
    # Each process's use of its own rows and of the sums: gradients come from both sides.
    objective = rows.share(found.statistic.exp()).sum() + rows.mean((leaf * moment[:, None]).square().sum(-1)).sum()
    objective.backward()
    value = distributed.total(objective.detach())
    result.append((rank, found.statistic.tolist(), found.p_value.tolist(), float(value), leaf.grad.tolist()))


def test_two_processes_give_the_statistic_and_gradient_of_one() -> None:
    z = points(2 * 50, 3, "skewed").reshape(2, 50, 3) * 0.5
    alone = in_one_process(_spread, z)
    plain = lf.henze_zirkler(z, method="random", num_frequencies=64)
    assert np.allclose(alone[0][1], plain.statistic.tolist(), rtol=1e-12)
    together = sorted(in_two_processes(_spread, z))
    assert together[0][1:4] == together[1][1:4], "the processes agree to the bit"
    for found, expected in zip(together[0][1:4], alone[0][1:4], strict=True):
        assert np.allclose(found, expected, rtol=1e-9)
    gradient = np.concatenate([np.array(t[4]) for t in together], 1)
    assert np.abs(gradient - np.array(alone[0][4])).max() < 1e-9 * np.abs(gradient).max()


# --- bad input ---


@pytest.mark.parametrize(
    ("error", "message", "d", "options"),
    [
        (lf.InputError, "one of 'exact', 'quadrature', 'random', 'sliced', got 'nonsense'", 2, {"method": "nonsense"}),
        (lf.InputError, "method must be one of", 2, {"method": 3}),
        (lf.InputError, "quadrature serves at most 3 dimensions, got 4", 4, {"method": "quadrature"}),
        (lf.InputError, "num_frequencies must be at least 1, got 0", 2, {"method": "random", "num_frequencies": 0}),
        (lf.InputError, "num_frequencies must lie in", 2, {"method": "random", "num_frequencies": -1}),
        (TypeError, "num_frequencies must be an integer, got float", 2, {"method": "random", "num_frequencies": 10.0}),
        (lf.InputError, "num_slices must be at least 1, got 0", 2, {"method": "sliced", "num_slices": 0}),
        (TypeError, "num_slices must be an integer, got bool", 2, {"method": "sliced", "num_slices": True}),
        (lf.InputError, "seed must lie in", 2, {"method": "random", "seed": -1}),
        (TypeError, "seed must be an integer, got str", 2, {"method": "sliced", "seed": "a"}),
        (lf.InputError, "beta must be positive and finite, got -1", 2, {"method": "random", "beta": -1.0}),
        (lf.InputError, "beta must be positive and finite, got 0", 2, {"method": "sliced", "beta": 0.0}),
        (lf.InputError, "beta must be positive and finite, got inf", 2, {"method": "quadrature", "beta": math.inf}),
        (TypeError, "reduce must be a function of a tensor, got int", 2, {"method": "random", "reduce": 3}),
        (lf.InputError, "need method 'random', got 'exact'", 2, {"reduce": distributed.total}),
        (lf.InputError, "need method 'random', got 'sliced'", 2, {"method": "sliced", "reduce": distributed.total}),
        (lf.InputError, "asked for henze_zirkler_characteristic, but", 2, {"method": "random", "backend": "triton"}),
    ],
)  # fmt: skip
def test_bad_input(error: type, message: str, d: int, options: dict[str, Any]) -> None:
    for function in (lf.henze_zirkler, henze_zirkler_statistic):
        with pytest.raises(error, match=message):
            function(points(9, d), **options)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_bad_points(form: dict[str, Any]) -> None:
    z = torch.eye(5, 2)
    z[3, 1] = math.nan
    with pytest.raises(lf.InputError, match="z holds nan at row 3, column 1"):
        lf.henze_zirkler(z, **form)
    with pytest.raises(lf.InputError, match="at least 2 points"):
        lf.henze_zirkler(torch.zeros(1, 2), **form)
    with pytest.raises(TypeError, match="z must be float32 or float64"):
        lf.henze_zirkler(torch.zeros(5, 2, dtype=torch.float16), **form)
