"""Henze-Zirkler in Triton, in all its forms, against the reference in float64: value and gradient."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from common import points
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels import gpu as launching
from libi_fast.kernels.henze_zirkler import characteristic, gpu, gpu_characteristic, gpu_whitening, reference
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic

IGNORED = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
EXACT = [  # replicas, points, dimensions, beta
    (1, 2, 1, None),
    (3, 33, 1, None),
    (2, 130, 2, None),
    (1, 64, 2, 30.0),
    (2, 50, 3, None),
    (2, 45, 4, 0.3),
    (2, 70, 8, None),
    (1, 40, 8, 5.0),
    (1, 60, 16, None),
]
LINEAR = [  # method, replicas, points, dimensions
    ("random", 3, 33, 1),
    ("random", 2, 130, 2),
    ("random", 1, 50, 3),
    ("random", 2, 40, 8),
    ("random", 1, 2, 1),
    ("quadrature", 3, 33, 1),
    ("quadrature", 2, 70, 2),
    ("sliced", 2, 40, 3),
    ("sliced", 1, 33, 8),
]
METHODS = ["exact", "quadrature", "random", "sliced"]


def options(method: str) -> dict[str, Any]:
    return {"method": method, "num_frequencies": 70, "num_slices": 3}


def solve(z: Tensor, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    value = henze_zirkler_statistic(leaf, backend=backend, **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def fused(z: Tensor, device: torch.device, **options: Any) -> tuple[Tensor, Tensor]:
    value, slope = solve(z.to(device), "triton", **options)
    assert value.dtype == slope.dtype == torch.float32 and slope.shape == z.shape
    return value.cpu(), slope.cpu()


def check(z: Tensor, device: torch.device, **options: Any) -> tuple[Tensor, Tensor]:
    """z float32, on the CPU. A few roundings of the sum over pairs, of which the statistic is a small difference, and of the
    slopes in units of the points' standard deviations, where their terms are at most 1 or so."""
    found, slope = fused(z, device, **options)
    value, gradient = solve(z.double(), "reference", **options)
    n, d = z.shape[-2:]
    beta = options.get("beta") or reference.default_beta(n, 1 if options.get("method") == "sliced" else d)
    size = value.abs() + 1 + n * (1 + 2 * beta**2) ** (-d / 2)
    unit = z.double().std(-2, correction=0, keepdim=True)
    error, of_slope = (found - value).abs() / size, ((slope - gradient) * unit).abs().amax((-2, -1))
    largest = (gradient * unit).abs().amax((-2, -1))
    print("value:", float(error.max()), "gradient:", of_slope.tolist(), "of", largest.tolist())
    assert (error <= 5e-7).all()
    assert (of_slope <= 2e-6 * largest + 1e-7).all()
    return found, slope


def sample(replicas: int, n: int, d: int) -> Tensor:
    """Skewed, of many scales and away from 0, so that the gradient is no rounding."""
    return torch.stack([points(n, d, "skewed") * 10.0 ** torch.linspace(-3, 3, d) + 2 for _ in range(replicas)]).float()


@pytest.mark.parametrize(("replicas", "n", "d", "beta"), EXACT)
def test_exact(device, replicas, n, d, beta):
    z = sample(replicas, n, d)
    found, _ = check(z, device, beta=beta)
    assert torch.equal(henze_zirkler_statistic(z.to(device), beta=beta, backend="triton").cpu(), found)  # no gradient


@pytest.mark.parametrize("d", [5, 8, 16])
def test_differences_in_many_dimensions(device, d, monkeypatch):
    """As large values of beta take them, where no two points would meet and nothing be seen."""
    monkeypatch.setattr(gpu, "FAR", 0.0)
    check(sample(1, 60, d), device)


@pytest.mark.parametrize(("method", "replicas", "n", "d"), LINEAR)
def test_linear_forms(device, method, replicas, n, d):
    z = sample(replicas, n, d)
    found, _ = check(z, device, **options(method))
    assert torch.equal(henze_zirkler_statistic(z.to(device), backend="triton", **options(method)).cpu(), found)


@pytest.mark.parametrize("method", ["exact", "random", "quadrature"])
def test_every_split(device, method, monkeypatch):
    """Several splits of the points and spans of their moments, of one and of several tiles, the last ones ragged."""
    z = sample(1, 290, 2)  # ten tiles
    whole, slope = fused(z, device, **options(method))
    monkeypatch.setattr(gpu, "PROGRAMS", 1)
    monkeypatch.setattr(gpu_characteristic, "PROGRAMS", 1)
    monkeypatch.setattr(gpu_characteristic, "ADDED", type(gpu_characteristic.ADDED)(2))
    monkeypatch.setattr(gpu_whitening, "NUMBERS", 128)
    for longest, spans in ((4, 3), (1, 2)):
        monkeypatch.setattr(gpu, "SHORTEST", min(2, longest))
        monkeypatch.setattr(gpu, "LONGEST", longest)
        monkeypatch.setattr(gpu_characteristic, "LONGEST", longest)
        monkeypatch.setattr(gpu_whitening, "SPANS", spans)
        with launching.recorded() as launches:
            there = torch.empty(1, 290, 2, device="meta")
            if method == "exact":
                gpu.forward(there, 1.0, True)
            else:
                gpu_whitening.whiten(there, 1.0, 0.0)
        steps = [launch.args[5:7] for launch in launches if launch.kernel.__name__ == "moments_kernel"]
        assert steps[0] == {3: (3, 2), 2: (2, 3)}[spans]
        splits = [launch.args[4] for launch in launches if launch.kernel.__name__ == "pairs_kernel"]
        assert splits == ([{4: 3, 1: 10}[longest]] if method == "exact" else [])
        found, moved = check(z, device, **options(method))
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(moved, slope, rtol=0, atol=1e-5 * float(slope.abs().max()))


def test_whitened_points_are_white(device):
    z = sample(2, 70, 3)
    whitened = gpu_whitening.whiten(z.to(device), 1.0, 5.0, norm=True)
    rows = whitened.points.transpose(2, 3).flatten(1, 2).cpu().double()
    y = rows[:, :70, :3]
    assert y.mean(1).abs().max() < 1e-6
    torch.testing.assert_close(y.mT @ y / 70, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(rows[:, :70, 3], -y.square().sum(-1), rtol=1e-7, atol=1e-7)
    assert not rows[:, 70:, :3].any() and bool((rows[:, 70:, 3] == -5).all())


@IGNORED
@pytest.mark.parametrize("method", METHODS)
def test_singular_replicas_and_what_is_not_finite(device, method):
    """4n and a gradient of 0; NaN. Neither moves a bit of the others."""
    n = 40
    z = torch.randn(7, n, 2)
    clean, clean_slope = fused(z, device, **options(method))
    z[1], z[2, :, 1], z[3, :, 1] = 7.5, -3e5, 2 * z[3, :, 0]
    z[4, 3, 0], z[5, 4, 1] = math.nan, -math.inf
    value, slope = fused(z, device, **options(method))
    assert value[1:4].tolist() == [4 * n] * 3 and not slope[1:4].any()
    assert value[4:6].isnan().all() and slope[4:6].isnan().all()
    for replica in (0, 6):
        assert torch.equal(value[replica], clean[replica]) and torch.equal(slope[replica], clean_slope[replica])
    expected = henze_zirkler_statistic(z, backend="reference", **options(method))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("d", [2, 3, 7, 16])
def test_a_smallest_eigenvalue_on_either_side_of_the_limit(device, d):
    n = 10 * d
    z = torch.randn(n, d)
    for gap, singular in ((2e-2, False), (1e-5, True)):
        z[:, -1] = z[:, 0] + gap * torch.randn(n)
        value, slope = fused(z, device)
        assert (float(value) == 4 * n) == singular == (not slope.any())
        assert (float(henze_zirkler_statistic(z, backend="reference")) == 4 * n) == singular


@pytest.mark.parametrize("kind", ["an outlier", "an offset", "a first point far off"])
def test_far_points(device, kind):
    z = torch.randn(1, 60, 2)
    if kind == "an offset":
        z += 1000
    else:
        z[0, 0 if kind.startswith("a first") else 41, 0] = 1e6
    check(z, device)


def test_points_that_lie_far_apart_do_not_meet(device):
    """At a large beta each point meets itself, and exactly nothing else."""
    for d in (1, 5):
        z = torch.randn(40, d)
        z[:, 0] = torch.arange(40.0)
        value, slope = fused(z, device, beta=1e4)
        expected = henze_zirkler_statistic(z.double(), beta=1e4, backend="reference")
        assert abs(float(value) - float(expected)) < 1e-6 and slope.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_twice(device, method):
    z = sample(2, 50, 2)
    for a, b in zip(fused(z, device, **options(method)), fused(z, device, **options(method)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["transposed", "every second point", "points expanded over replicas", "unaligned"])
def test_strided_inputs(device, name):
    make = {
        "transposed": lambda: torch.randn(2, 3, 40).mT,
        "every second point": lambda: torch.randn(2, 80, 3)[:, ::2],
        "points expanded over replicas": lambda: torch.randn(40, 3).expand(2, -1, -1),
        "unaligned": lambda: torch.randn(2 * 40 * 3 + 1)[1:].view(2, 40, 3),
    }[name]
    z = make()
    storage = z.as_strided((z.untyped_storage().nbytes() // 4,), (1,), 0).to(device)
    there = storage.as_strided(z.shape, z.stride(), z.storage_offset())
    for method in ("exact", "random"):
        found, expected = (solve(t, "triton", **options(method)) for t in (there, z.contiguous().to(device)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_no_replicas(device, method):
    z = torch.empty(0, 5, 2, device=device, requires_grad=True)
    value = henze_zirkler_statistic(z, backend="triton", **options(method))
    assert value.shape == (0,)
    value.sum().backward()
    assert z.grad is not None and z.grad.shape == z.shape


def test_a_grid_too_large_is_exact(device, monkeypatch):
    z = sample(1, 50, 2)
    monkeypatch.setattr(characteristic, "LARGEST_GRID", 100)
    for a, b in zip(fused(z, device, method="quadrature"), fused(z, device), strict=True):
        assert torch.equal(a, b)


def test_groups_of_replicas(device, monkeypatch):
    z = sample(3, 40, 2)
    whole = fused(z, device, **options("quadrature"))
    monkeypatch.setattr(gpu_characteristic, "SUMS", 1)
    for a, b in zip(fused(z, device, **options("quadrature")), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("phase", [0.0, 0.124, 0.126, -0.25, 0.251, 0.5, 0.75, 3.1, -1e4 - 0.3, 1.4e6])
def test_waves_against_the_library(device, phase):
    """As the sums of one frequency over one point: phases in turns, near every change of sign."""
    y = torch.zeros(1, 4, 1, 32, device=device)
    y[..., 0, 0] = phase
    out = torch.empty(1, 1, 2, 64, device=device)
    turns = torch.zeros(2, 1, 32, device=device)
    turns[0, 0, 0] = 1.0
    launching.launch(gpu_characteristic.sums_kernel, (1,), y, turns, out, 1, 4, 64, 1, 1, D=1, ROWS=64, num_warps=4)
    angle = 2 * math.pi * torch.tensor(phase).double()  # as float32 holds it
    found = out[0, 0, :, 0].cpu().double()
    assert abs(float(found[0] - 31 - angle.cos())) < 4e-6 and abs(float(found[1] - angle.sin())) < 3e-7


# --- as a user calls it ---


def test_vmap_equals_the_loop(device):
    z = sample(3, 40, 2).to(device)
    for method in ("exact", "random"):
        statistic = functools.partial(henze_zirkler_statistic, backend="triton", **options(method))
        torch.testing.assert_close(torch.func.vmap(statistic)(z), statistic(z), rtol=0, atol=0)


def test_p_values(device):
    z = torch.randn(60, 2)
    found = lf.henze_zirkler(z.to(device), backend="triton")
    expected = lf.henze_zirkler(z.double(), backend="reference")
    torch.testing.assert_close(found.p_value.cpu().double(), expected.p_value, rtol=1e-4, atol=1e-5)


def test_what_is_refused_by_name(device):
    z = torch.randn(30, 3, device=device)
    wide = torch.randn(60, 17, device=device)
    for points_, settings, message in (
        (z.double(), {}, r"it computes in float32, got torch\.float64"),
        (z.double(), options("random"), r"it computes in float32, got torch\.float64"),
        (wide, {}, "it takes at most 16 dimensions, got 17"),
        (wide, options("sliced"), "it takes at most 16 dimensions, got 17"),
        (z, options("quadrature"), "its quadrature takes at most 2 dimensions, got 3"),
        (z, {**options("random"), "beta": 1e6}, r"it takes phases of up to 1\.4e6 turns, and beta is 1000000\.0"),
    ):
        with pytest.raises(lf.InputError, match=message):
            henze_zirkler_statistic(points_, backend="triton", **settings)
        assert henze_zirkler_statistic(points_, **settings).isfinite()  # unasked, another backend serves


def test_opcheck(device):
    z, vectors = torch.randn(2, 20, 2, device=device), torch.randn(5, 2, device=device)
    torch.library.opcheck(torch.ops.libi_fast.henze_zirkler.default, (z, 1.0, True, "triton"))
    arguments = (z, vectors, 1.0, "random", True, "triton")
    torch.library.opcheck(torch.ops.libi_fast.henze_zirkler_characteristic.default, arguments)


@pytest.mark.parametrize("method", ["exact", "random"])
@pytest.mark.parametrize("d", [2, 8])
def test_a_captured_graph_follows_its_points(device, method, d):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    z = torch.randn(3, 500, d, device=device, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        value = henze_zirkler_statistic(z, backend="triton", **options(method))
        return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(2):
        with torch.no_grad():
            z.copy_(torch.randn(3, 500, d, device=device).exp())
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, run(), strict=True))


@pytest.mark.parametrize(("method", "n", "d"), [("exact", 20_000, 2), ("exact", 20_000, 8), ("random", 50_000, 16),
                                                ("quadrature", 20_000, 2)])  # fmt: skip
def test_many_points(device, method, n, d):
    if device.type != "cuda":
        pytest.skip("the interpreter would take hours")
    z = points(n, d, "skewed").float()
    found, slope = (t.double() for t in fused(z, device, method=method))
    value, gradient = solve(z.double().to(device), "reference", method=method)
    assert abs(float(found - value.cpu())) <= 1e-5 * (float(value) + 1)
    assert float((slope - gradient.cpu()).abs().max()) <= 1e-5 * float(gradient.abs().max())
