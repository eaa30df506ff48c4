"""log_mean_exp in Triton against the reference in float64: every tile and split, infinities, strides, autograd."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from common import far_apart
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels import gpu as launching
from libi_fast.kernels import tuning
from libi_fast.kernels.log_mean_exp import gpu, reference

INF, NAN = math.inf, math.nan
EPS = 2.0**-24  # float32's half unit in the last place
TILE = 1024  # numbers of a program at a time


class Way(NamedTuple):
    """A shape, the number of programs that the launcher may use, and what it makes of them."""

    shape: tuple[int, ...]
    programs: int
    rows_a_tile: int
    spans: int
    tiles_a_span: int
    vector: int


WAYS = {
    "no dimension but samples": Way((7,), 9, 128, 1, 1, 1),
    "one sample": Way((1500, 1), 9, TILE, 1, 1, 1),
    "one row of one sample": Way((1, 1), 9, TILE, 1, 1, 1),
    "several rows a tile": Way((37, 100), 9, 8, 1, 1, 4),
    "several rows a tile, odd": Way((2, 3, 5, 13), 9, 64, 1, 1, 1),
    "a row fills the tile": Way((3, TILE), 9, 1, 1, 1, 4),
    "spans of one tile, the last ragged": Way((3, 2 * TILE + 5), 9, 1, 3, 1, 1),
    "spans of one tile, in loads of 16 bytes": Way((3, 3 * TILE + 8), 12, 1, 4, 1, 4),
    "spans of two tiles, the last of one number": Way((4, 4 * TILE + 1), 12, 1, 3, 2, 1),
    "spans of three tiles, the last of two": Way((2, 5 * TILE), 4, 1, 2, 3, 4),
    "no split, several steps, ragged": Way((9, 2 * TILE + 5), 9, 1, 1, 3, 1),
    "no split, several steps, whole": Way((9, 3 * TILE), 9, 1, 1, 3, 4),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    way = WAYS[request.param]
    monkeypatch.setattr(gpu, "PROGRAMS", way.programs)
    with launching.recorded() as launches:
        gpu.forward(torch.empty(way.shape, device="meta"))
    spans, tiles = launches[0].args[4:6]
    found = launches[0].options
    assert (found["ROWS"], spans, tiles, found["VECTOR"]) == way[2:]
    assert len(launches) == (1 if spans == 1 else 2)
    return way


def solve(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """out, the gradient that comes in, and the gradient of x."""
    out = gpu.forward(x)
    grad = torch.linspace(-2, 2, out.numel(), device=x.device).reshape(out.shape)
    return out, grad, gpu.backward(grad, x, out)


def check(x: Tensor) -> tuple[Tensor, Tensor]:
    """out and the gradient of x, compared with float64: a dozen roundings are allowed, and three more of d for exp(d) as
    exp2(d log2 e)."""
    out, grad, grad_x = solve(x)
    assert out.dtype == grad_x.dtype == torch.float32 and grad_x.is_contiguous()
    exact, level, found = x.cpu().double(), out.cpu().double(), grad_x.cpu().double()
    torch.testing.assert_close(level, reference.forward(exact), rtol=4 * EPS, atol=16 * EPS, equal_nan=True)

    truth = reference.backward(grad.cpu().double(), exact, level)
    assert found.shape == truth.shape
    assert torch.equal(found.isnan(), truth.isnan())
    distance = (exact - level[..., None]).abs().nan_to_num(0, 0)
    allowed = ((3 * distance + 12) * EPS * truth.abs() + 1e-37).nan_to_num(0)
    error = (found - truth).abs().nan_to_num(0)
    print("largest share of the error allowed:", float((error / allowed).nan_to_num(0).max()) if error.numel() else 0)
    assert (error <= allowed).all()
    return out, grad_x


@pytest.mark.parametrize(("spread", "offset"), [(3.0, 0.0), (40.0, -1.6e6)], ids=["near", "peaked and far"])
def test_every_tile_and_split(way, spread, offset, device):
    check((spread * torch.randn(way.shape) + offset).to(device))


def test_rows_of_equal_numbers_give_the_number(way, device):
    for value in (2.5, -1e6, 3.4028234663852886e38, -3.4028234663852886e38):
        x = torch.full(way.shape, value, device=device)
        assert torch.equal(gpu.forward(x), x[..., 0])


def test_a_constant_shift_moves_the_result_by_it(way, device):
    """Eighths, which a float32 near 2^17 holds exactly."""
    x = (24 * torch.randn(way.shape)).round().div(8).to(device)
    shift = 2.0**17
    assert torch.equal((x + shift) - shift, x)
    plain, _ = check(x)
    moved, _ = check(x + shift)
    assert ((moved.double() - shift) - plain.double()).abs().max() <= shift * EPS + 16 * EPS


SPECIAL = [
    [-INF, -INF, -INF],
    [INF, 0.0, 0.0],
    [INF, INF, INF],
    [INF, -INF, INF],
    [NAN, 0.0, 0.0],
    [NAN, INF, -INF],
    [0.0, 3.4e38, -3.4e38],
]


@pytest.mark.parametrize(("width", "programs"), [(3, 1), (100, 1), (2 * TILE + 5, 1), (2 * TILE + 5, 2048)])
@pytest.mark.parametrize("filler", [-INF, 1.0])
def test_infinities_and_nan_stay_in_their_rows(width, programs, filler, device, monkeypatch):
    """Rows of special values among plain ones, placed at a row's beginning, middle and end."""
    monkeypatch.setattr(gpu, "PROGRAMS", programs)
    plain = torch.randn(2 * len(SPECIAL) + 1, width)
    x = plain.clone()
    for row, values in enumerate(SPECIAL):
        x[2 * row + 1] = filler
        x[2 * row + 1, [0, width // 2, width - 1]] = torch.tensor(values)
    out, grad_x = check(x.to(device))
    torch.testing.assert_close(out.cpu(), reference.forward(x), equal_nan=True)
    for row in range(0, 2 * len(SPECIAL), 2):
        assert torch.isfinite(out[row]) and torch.isfinite(grad_x[row]).all()
    before_out, _, before_grad = solve(plain.to(device))
    assert torch.equal(out[::2], before_out[::2]) and torch.equal(grad_x[::2], before_grad[::2])


def test_rows_that_are_all_infinite_or_nan(way, device):
    for value in (INF, -INF, NAN):
        out, grad_x = check(torch.full(way.shape, value, device=device))
        torch.testing.assert_close(out, torch.full_like(out, value), equal_nan=True)
        assert torch.equal(grad_x.isnan(), torch.full_like(grad_x, value).isnan())


# Views, and whether they can be read where they lie.
VIEWS = {
    "transposed": (lambda: torch.randn(70, 300).mT, True),
    "transposed, few rows, several spans": (lambda: torch.randn(3000, 3).mT, True),
    "transposed, few samples": (lambda: torch.randn(3, 600).mT, True),
    "transposed, one row": (lambda: torch.randn(40, 1).mT, True),
    "samples first": (lambda: torch.randn(40, 6, 50).permute(1, 2, 0), True),
    "samples in the middle": (lambda: torch.randn(6, 40, 5).mT, False),
    "every third sample": (lambda: torch.randn(30, 300)[:, ::3], True),
    "every second row of a tile, in loads of 16 bytes": (lambda: torch.randn(30, 100)[::2, :64], True),
    "long rows, cut": (lambda: torch.randn(3, 5000)[:, 1:3001], True),
    "one row expanded": (lambda: torch.randn(1, 2100).expand(5, -1), True),
    "one sample expanded": (lambda: torch.randn(7, 1).expand(-1, 50), True),
    "rows and samples expanded": (lambda: torch.randn(1, 1).expand(4, 50), True),
    "an unaligned beginning": (lambda: torch.randn(8 * 64 + 1)[1:].view(8, 64), True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_strided_inputs(name, device):
    make, in_place = VIEWS[name]
    x = make()
    storage = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0).to(device)
    there = storage.as_strided(x.shape, x.stride(), x.storage_offset())
    with launching.recorded() as launches:
        gpu.forward(there)
    assert (launches[0].args[0].untyped_storage().data_ptr() == there.untyped_storage().data_ptr()) == in_place
    check(there)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 2000), (0, 1)])
def test_no_rows(shape, device):
    x = torch.empty(shape, device=device, requires_grad=True)
    out = lf.log_mean_exp(x, backend="triton")
    assert out.shape == shape[:-1]
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert gpu.forward(torch.empty(3, 0, device=device).mT).shape == (0,)


def test_the_same_bits_twice(way, device):
    x = (5 * torch.randn(way.shape)).to(device)
    first, second = solve(x), solve(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tall", [False, True])
def test_addresses_past_2_to_the_31(tall, device, tmp_path: Path):
    """Rows, or samples, 2^30 numbers apart: the step fits 32 bits, a product with it does not. On the CPU a sparse file is the
    memory in between."""
    step, count = 2**30 + 3, 5
    size = 2 * step + count
    storage = far_apart(size, device, tmp_path)
    x = storage.as_strided((3, count), (step, 1))
    x.copy_(torch.randn(3, count))
    check(x.mT if tall else x)


def test_more_than_2_to_the_31_numbers(device):
    if device.type != "cuda" or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs a GPU with 24 GiB free")
    rows, samples = 2**15 + 1, 2**16
    x = torch.zeros(rows, samples, device=device)
    x[-1] = 2.0
    out = gpu.forward(x)
    assert not out[:-1].any() and float(out[-1]) == 2.0
    grad_x = gpu.backward(torch.ones_like(out), x, out)
    assert float(grad_x.amin()) == float(grad_x.amax()) == 1 / samples


# --- as a user calls it ---


def test_autograd(way, device):
    x = (3 * torch.randn(way.shape)).to(device).requires_grad_()
    exact = x.detach().cpu().double().requires_grad_()
    weights = torch.linspace(0.5, 2, max(1, x[..., 0].numel())).reshape(x.shape[:-1])
    found = lf.log_mean_exp(x, backend="triton")
    truth = lf.log_mean_exp(exact, backend="reference")
    torch.testing.assert_close(found.detach().cpu().double(), truth.detach(), rtol=4 * EPS, atol=16 * EPS)
    (found.square() * weights.to(device)).sum().backward()
    (truth.square() * weights.double()).sum().backward()
    torch.testing.assert_close(x.grad.cpu().double(), exact.grad, rtol=1e-5, atol=1e-6 * float(exact.grad.abs().max()))


def test_vmap_equals_the_loop(device):
    x = torch.randn(3, 4, 50, device=device)
    mapped = torch.func.vmap(lambda t: lf.log_mean_exp(t, backend="triton"), 1)(x)
    torch.testing.assert_close(mapped, lf.log_mean_exp(x, backend="triton").mT, rtol=4 * EPS, atol=16 * EPS)


def test_float64_is_refused_by_name(device):
    x = torch.zeros(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(lf.InputError, match=r"asked for log_mean_exp, but it computes in float32, got torch\.float64"):
        lf.log_mean_exp(x, backend="triton")
    assert not lf.log_mean_exp(x).any()  # unasked, another backend serves


def test_opcheck(device):
    for x in (torch.randn(2, 3, 4, device=device), torch.randn(4, 3, device=device).mT):
        out = gpu.forward(x)
        torch.library.opcheck(torch.ops.libi_fast.log_mean_exp.default, (x, "triton"))
        torch.library.opcheck(torch.ops.libi_fast.log_mean_exp_backward.default, (torch.ones_like(out), x, out, "triton"))


def test_a_captured_graph_follows_its_input(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    x = torch.randn(3, 5000, device=device)
    solve(x)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solve(x)
    for offset in (0.0, 100.0):
        x.copy_(torch.randn(3, 5000, device=device) + offset)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, solve(x), strict=True))


def test_tuning_moves_results_by_rounding_alone(device, monkeypatch, tmp_path):
    x = torch.randn(3, 3000, device=device)
    fixed, _ = check(x)
    monkeypatch.setenv("LIBI_FAST_TUNE", "1")
    monkeypatch.setenv("LIBI_FAST_TUNING_FILE", str(tmp_path / "tuning.json"))
    measured = []

    def milliseconds(run):
        run()
        measured.append(run)
        return -len(measured)  # the last is the fastest

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(gpu, "CANDIDATES", [{"warps": 2, "per_thread": 16}, {"warps": 1, "per_thread": 8}])
    for _ in range(2):
        tuned, _ = check(x)
    assert len(measured) == 4  # two kernels, two candidates each, once
    torch.testing.assert_close(tuned, fixed, rtol=4 * EPS, atol=16 * EPS)


def test_every_candidate_of_tuning_is_right(device, monkeypatch):
    x = torch.cat((5 * torch.randn(4, 1300), torch.full((1, 1300), INF))).to(device)
    for candidate in gpu.CANDIDATES:
        monkeypatch.setattr(gpu, "CANDIDATES", [candidate])
        check(x)
        check(x.mT)
