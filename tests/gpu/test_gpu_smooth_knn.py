"""The smooth k-NN statistic in Triton against the reference in float64: P itself, every form, and what an operator promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from common import far_apart
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels import gpu as launching
from libi_fast.kernels.smooth_knn import gpu, reference

NAN, INF = math.nan, math.inf
SINGLE, DOUBLE = 3e-6, 1e-10
# What float32 does not serve overflows in it before it is marked, and numpy says so in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def samples(replicas: int, n1: int, n2: int, d: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(replicas, n1, d, dtype=dtype), torch.randn(replicas, n2, d, dtype=dtype) + 0.3


def truth(a: Tensor, b: Tensor, k: int, alphas: Sequence[float]) -> Tensor:
    return reference.forward(a.cpu().double(), b.cpu().double(), k, alphas, False)[0]


def check(a: Tensor, b: Tensor, k: int, alphas: Sequence[float], tolerance: float = SINGLE) -> Tensor:
    found, expected = gpu.forward(a, b, k, alphas), truth(a, b, k, alphas)
    assert found.dtype == a.dtype and found.shape == expected.shape and found.device == a.device
    error = (found.cpu().double() - expected).abs() / expected.abs().clamp_min(1)
    print("error:", error.tolist())
    assert (error <= tolerance).all()  # a NaN is not
    return found


class Spy:
    """What the launches left behind: which repetitions float32 left to float64, and weight (P - k / (n-1)) at [j, i] of the
    first repetition, where its rows took one turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.marked: list[bool] = []
        self.excess: list[Tensor] = []
        original = launching.launch

        def launch(kernel, grid, *args, **options):
            original(kernel, grid, *args, **options)
            slots, rows = args[11], options["ROWS"]
            self.excess.append(args[6][: slots * rows].reshape(slots, rows).cpu())
            if not options["TILTED"]:
                self.marked = args[3].isnan().tolist()

        monkeypatch.setattr(launching, "launch", launch)


@pytest.fixture
def spy(monkeypatch) -> Spy:
    return Spy(monkeypatch)


# (n1, n2, d), k, alphas; whether float32 serves
CASES = [
    ((3, 2, 2), 2, [4.0], True),
    ((5, 9, 8), 1, [1.0], True),
    ((21, 26, 3), 1, [1.0], True),
    ((30, 4, 2), 2, [1.0, 2.0, 0.7], True),
    ((20, 23, 2), 10, [1.0], True),
    ((9, 7, 2), 12, [1.0], True),  # three are not chosen
    ((20, 19, 2), 25, [2.0], True),
    ((18, 18, 2), 16, [2.0], True),
    ((9, 7, 2), 1, [100.0], False),
    ((9, 12, 2), 10, [100.0], False),
    ((9, 7, 2), 13, [100.0, 1.0], False),
    ((8, 11, 2), 3, [1e-3], False),
    ((2, 2, 1), 2, [0.1], False),  # a deviation that is small beside k
]


@pytest.mark.parametrize(("sizes", "k", "alphas", "single"), CASES, ids=str)
def test_against_the_reference(sizes, k, alphas, single, device, spy):
    replicas = 2 if single else 1
    a, b = (t.to(device) for t in samples(replicas, *sizes))
    check(a, b, k, alphas)
    assert spy.marked == [not single] * replicas


@pytest.mark.parametrize(("k", "alphas"), [(1, [1.0]), (2, [100.0, 0.5]), (10, [1.0]), (13, [30.0])], ids=str)
def test_float64(k, alphas, device):
    a, b = (t.to(device) for t in samples(1, 8, 9, 3, torch.float64))
    check(a, b, k, alphas, DOUBLE)


@pytest.mark.parametrize(("k", "alpha", "relative"), [(1, 1.0, 3e-6), (10, 1.0, 3e-6), (10, 100.0, 1e-11), (40, 1.0, 3e-6)])
def test_inclusion_probabilities(k, alpha, relative, device, spy):
    n1, n2 = 20, 27
    n = n1 + n2
    a, b = (t.to(device) for t in samples(1, n1, n2))
    gpu.forward(a, b, k, [alpha])
    slots = torch.arange(n)
    before = (slots * n1 + n - 1) // n
    first = ((slots + 1) * n1 + n - 1) // n > before
    point = torch.where(first, before, n1 + slots - before)
    assert sorted(point.tolist()) == list(range(n)) and not (first[:-1] & first[1:]).any()
    z = torch.cat((a, b), 1)[0].cpu().double()[point]
    distance = (1e-5 + (z[:, None] - z).square().sum(-1)).sqrt()[None]
    expected = reference.neighbours(distance, k, alpha)[0]
    chosen = min(k, n - 1 - k)
    found = spy.excess[spy.marked[0]][:n, :n].double().mT + chosen / (n - 1)
    found = found if chosen == k else 1 - found
    off_diagonal = ~torch.eye(n, dtype=torch.bool)
    error = ((found - expected).abs() / (expected + 1e-3))[off_diagonal]
    print("largest relative error:", float(error.max()))
    assert error.max() < relative


@pytest.mark.parametrize(("k", "alphas"), [(1, [1.0]), (3, [1.0, 30.0]), (34, [2.0])], ids=str)
def test_rows_in_several_turns(k, alphas, device, monkeypatch):
    rows = 64 if launching.amd() else 32
    monkeypatch.setattr(gpu, "ROWS", rows)
    a, b = (t.to(device) for t in samples(1, rows + 5, 5))
    check(a, b, k if k < 10 else rows + 2, alphas)


def test_programs_take_repetitions_in_turn(device, monkeypatch, spy):
    """One program, some repetitions left to float64: the same bits as each on its own."""
    a, b = (t.to(device) for t in samples(5, 7, 9))
    a[1] *= 100
    b[3, 2] = 1e4
    apart = [gpu.forward(a[r : r + 1], b[r : r + 1], 3, [1.0]) for r in range(5)]
    monkeypatch.setattr(gpu, "WORKSPACE", 1)
    with launching.recorded() as launches:
        gpu.forward(a, b, 3, [1.0])
    assert [launch.grid for launch in launches] == [(1,), (1,)]
    together = check(a, b, 3, [1.0])
    assert spy.marked == [False, True, False, True, False]
    assert torch.equal(together, torch.cat(apart))
    assert torch.equal(together, gpu.forward(a, b, 3, [1.0]))


@pytest.mark.parametrize("k", [1, 4, 14])
def test_nan_and_infinity_stay_in_their_repetition(k, device):
    a, b = samples(4, 8, 8)
    plain = gpu.forward(a.to(device), b.to(device), k, [1.0])
    a[1, 3, 0], b[2, 7, 1] = NAN, INF
    found = gpu.forward(a.to(device), b.to(device), k, [1.0])
    assert found[1:3].isnan().all()
    assert torch.equal(found[[0, 3]], plain[[0, 3]])


@pytest.mark.parametrize(("k", "alpha"), [(1, 20.0), (5, 20.0), (5, 1e6), (12, 20.0)])
def test_equal_and_far_points(k, alpha, device):
    same = torch.zeros(1, 16, 2, device=device)
    assert abs(float(gpu.forward(same[:, :7], same[:, 7:], k, [1.0]))) < SINGLE
    a, b = (t.to(device) for t in samples(1, 8, 8))
    stacked = torch.cat((a, a + 100, 1e-3 * a, 1e4 * a)), torch.cat((b, b + 1e5, 1e-3 * b, 1e4 * b))
    stacked[1][0, 3] = stacked[0][0, 2]  # a duplicate
    check(*stacked, k, [alpha])


VIEWS = {
    "coordinates first": lambda: torch.randn(2, 3, 8).mT,
    "repetitions last": lambda: torch.randn(8, 3, 2).permute(2, 0, 1),
    "every second point": lambda: torch.randn(2, 16, 3)[:, ::2],
    "one repetition for all": lambda: torch.randn(8, 3).expand(2, 8, 3),
    "an unaligned beginning": lambda: torch.randn(2 * 8 * 3 + 1)[1:].view(2, 8, 3),
}


@pytest.mark.parametrize("name", VIEWS)
def test_strided_inputs(name, device):
    view = VIEWS[name]()
    storage = view.as_strided((view.untyped_storage().nbytes() // 4,), (1,), 0).to(device)
    there, other = storage.as_strided(view.shape, view.stride(), view.storage_offset()), torch.randn(2, 5, 3).to(device)
    for a, b in ((there, other), (other, there)):
        assert torch.equal(check(a, b, 2, [1.0]), gpu.forward(a.contiguous(), b.contiguous(), 2, [1.0]))


@pytest.mark.parametrize("turned", [False, True])
def test_addresses_past_2_to_the_31(turned, device, tmp_path: Path):
    """Repetitions, or points and coordinates, so far apart that a product of step and index needs 64 bits. On the CPU a sparse
    file is the memory in between."""
    step = 2**30 + 3
    shape, strides = ((1, 2, 3), (1, 1, step)) if turned else ((3, 2, 2), (step, 2, 1))
    size = 2 * step + 8
    storage = far_apart(size, device, tmp_path)
    a = storage.as_strided(shape, strides)
    a.copy_(torch.randn(shape))
    b = torch.randn(shape[0], 4, shape[2]).to(device)
    check(a, b, 1, [1.0])
    check(b, a, 1, [1.0])


def test_everyone_is_chosen_or_nobody_is_there(device):
    a, b = (t.to(device) for t in samples(3, 4, 5))
    assert torch.equal(gpu.forward(a, b, 8, [1.0, 2.0]), torch.zeros(3, device=device))
    for k in (3, 8):
        assert gpu.forward(a[:0], b[:0], k, [1.0]).shape == (0,)


# --- as a user calls it ---


def test_the_operator(device, spy):
    a, b = (t.to(device) for t in samples(3, 6, 8))
    value = lf.smooth_knn(a, b[0], 4, (1.0, 3.0), backend="triton")
    assert len(spy.excess) == 2
    torch.testing.assert_close(value, lf.smooth_knn(a, b[0], 4, (1.0, 3.0), backend="reference"), rtol=SINGLE, atol=SINGLE)
    mapped = torch.func.vmap(lambda x: lf.smooth_knn(x, b[0], 4, (1.0, 3.0), backend="triton"))(a)
    assert torch.equal(mapped, value)
    if device.type == "cuda":
        assert torch.equal(lf.smooth_knn(a, b[0], 4, (1.0, 3.0)), value)


def test_gradients_come_from_the_reference(device, spy):
    a, b = (t.to(device) for t in samples(2, 6, 5))
    slopes = []
    for backend in ("triton", "reference"):
        leaf = a.clone().requires_grad_()
        lf.smooth_knn(leaf, b, 3, backend=backend).sum().backward()
        slopes.append(leaf.grad)
    assert torch.equal(*slopes) and not spy.excess


@pytest.mark.parametrize(
    ("message", "sizes", "k"),
    [
        (r"it takes at most 1024 points of both samples together, got 1025", (1000, 25, 1), 3),
        (r"it takes points of at most 8 dimensions, got 9", (10, 10, 9), 3),
        (r"it takes k up to 16, or as near to the 39 others, got 17", (20, 20, 2), 17),
        (r"it takes k up to 16, or as near to the 39 others, got 22", (20, 20, 2), 22),
    ],
)
def test_sizes_that_the_reference_serves(message, sizes, k, device, spy):
    a, b = (t.to(device) for t in samples(1, *sizes))
    with pytest.raises(lf.InputError, match=f"asked for smooth_knn, but {message}"):
        lf.smooth_knn(a, b, k, backend="triton")
    assert lf.smooth_knn(a[:, :20], b[:, :20], k).isfinite().all()  # unasked
    assert not spy.excess or sizes[0] == 1000


def test_opcheck(device):
    a, b = (t.to(device) for t in samples(2, 4, 5))
    for gradient in (False, True):
        torch.library.opcheck(torch.ops.libi_fast.smooth_knn.default, (a, b.mT.contiguous().mT, 3, [1.0], gradient, "triton"))


def test_a_captured_graph_follows_its_input(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    a, b = (t.to(device) for t in samples(40, 100, 100))
    gpu.forward(a, b, 10, [1.0, 2.0])  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gpu.forward(a, b, 10, [1.0, 2.0])
    for scale in (1.0, 100.0):
        a.copy_(scale * torch.randn(40, 100, 2))
        graph.replay()
        assert torch.equal(found, gpu.forward(a, b, 10, [1.0, 2.0]))
