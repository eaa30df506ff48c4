"""Random numbers in Triton: the reference's bits wherever the counter begins, and normals to the rounding of float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels.random import gpu, reference
from libi_fast.ops import _library as lib
from libi_fast.ops.random import as_seed

CONVERT = {"uniform": reference.to_uniform, "normal": reference.to_normal}
both_kinds = pytest.mark.parametrize("kind", CONVERT)
# (replicas, first_row, rows, first_draw, count, repetition, stream)
PLACES = {
    "aligned": ([0], 0, 3, 0, 16, 0, 0),
    "several programs": ([0, 1], 4, 2, 8, 2052, 1, 1),
    "ragged, from the middle of a counter": ([7, 2], 5, 3, 6, 1029, 16, 2),
    "within one counter": ([0], 1, 2, 5, 2, 1, 3),
    "across two counters": ([0], 0, 2, 3, 2, 0, 0),
    "narrow rows": ([1, 0, 2], 2**31 - 150, 300, 1, 1, 3, 7),
    "narrow aligned rows": ([3], 16, 300, 4, 4, 2, 0),
    "the last indices": ([2**24 - 1, 0], 2**32 - 9, 9, 2**34 - 1030, 1030, 2**32 - 1, 255),
    "past 2^31 in everything": ([2**23], 2**31, 5, 2**33 + 4, 40, 2**31, 128),
}


def both(kind: str, seed: int, place: tuple, device: torch.device) -> tuple[Tensor, Tensor]:
    replicas, *rest = place
    arguments = (as_seed(seed), torch.tensor(replicas), *rest)
    expected = reference.draws(CONVERT[kind], *arguments, torch.float32)
    found = gpu.draws(kind, *(a.to(device) if isinstance(a, Tensor) else a for a in arguments))
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    return found.cpu(), expected


def check_normals(found: Tensor, expected: Tensor) -> None:
    allowed = np.maximum(4 * np.spacing(expected.abs().numpy()), 3e-7)
    share = np.abs((found - expected).numpy()) / allowed
    print("largest share of the error allowed:", share.max())
    assert (share <= 1).all()


@pytest.mark.parametrize("seed", [0, 2**64 - 1, 2**63 + 11, 0x123456789ABCDEF])
@pytest.mark.parametrize("place", PLACES)
def test_uniform_numbers_equal_the_reference(place: str, seed: int, device: torch.device) -> None:
    found, expected = both("uniform", seed, PLACES[place], device)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("place", PLACES)
def test_normal_numbers_are_the_reference_to_rounding(place: str, device: torch.device) -> None:
    check_normals(*both("normal", 2**63 + 5, PLACES[place], device))


def test_many_normal_numbers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TILE", 2048)  # fewer, larger programs: the interpreter's time is a program's
    found, expected = both("normal", 3, ([0], 0, 1, 0, 400_000, 0, 0), device)
    check_normals(found, expected)
    assert stats.kstest(found.flatten().double().numpy(), "norm").pvalue > 1e-3


@both_kinds
@pytest.mark.parametrize(("rows", "count"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_draw(kind: str, rows: int, count: int, device: torch.device) -> None:
    found, expected = both(kind, 1, ([0, 1], 2, rows, 3, count, 0, 0), device)
    assert found.shape == expected.shape == (2, rows, count)
    none = gpu.draws(kind, as_seed(1, device), torch.empty(0, dtype=torch.int64, device=device), 0, 3, 0, 5, 0, 0)
    assert none.shape == (0, 3, 5)


@triton.jit
def store_uniform(words, out):
    lanes = tl.arange(0, 4)
    tl.store(out + lanes, gpu.uniform_of(tl.load(words + lanes).to(tl.uint32)))


@pytest.mark.parametrize("word", [0, 255, 256, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1])
def test_uniform_numbers_never_reach_zero_or_one(word: int, device: torch.device) -> None:
    out = torch.empty(4, device=device)
    store_uniform[(1,)](torch.full((4,), word, dtype=torch.int64, device=device), out)
    assert torch.equal(out.cpu(), reference.to_uniform(torch.full((4,), word), torch.float32))
    assert bool(((out > 0) & (out < 1)).all())


@pytest.mark.parametrize("draw", [lf.philox_uniform, lf.philox_normal], ids=["uniform", "normal"])
def test_the_operator(draw, device: torch.device) -> None:
    def check(found: Tensor, expected: Tensor) -> None:
        if draw is lf.philox_uniform:
            assert torch.equal(found.cpu(), expected)
        else:
            check_normals(found.cpu(), expected)

    common = {"first_row": 3, "first_draw": 6, "repetition": 2, "stream": lf.Stream.DATA}
    for replicas in (None, 2, torch.tensor([5, 0])):
        expected = draw(2**64 - 7, 4, 9, replicas=replicas, backend="reference", **common)
        there = replicas.to(device) if isinstance(replicas, Tensor) else replicas
        found = draw(2**64 - 7, 4, 9, replicas=there, device=device, backend="triton", **common)
        assert found.device.type == device.type
        check(found, expected)
        seed = torch.tensor(-7, device=device)  # the same 64 bits, on the device
        check(draw(seed, 4, 9, replicas=there, backend="triton", **common), expected)
    whole = draw(5, 6, 40, device=device, backend="triton")
    part = draw(5, 2, 11, first_row=3, first_draw=7, device=device, backend="triton")
    assert torch.equal(part, whole[3:5, 7:18]), "a part must be the part of the whole, in every bit"


def test_float64_is_left_to_the_reference(device: torch.device) -> None:
    with pytest.raises(lf.InputError, match=r"asked for philox, but it draws float32, got torch\.float64"):
        lf.philox_normal(0, 2, 3, dtype=torch.float64, device=device, backend="triton")
    expected = lf.philox_normal(0, 2, 3, dtype=torch.float64, backend="reference")
    torch.testing.assert_close(lf.philox_normal(0, 2, 3, dtype=torch.float64, device=device).cpu(), expected)


@both_kinds
def test_opcheck(kind: str, device: torch.device) -> None:
    arguments = (as_seed(3, device), torch.arange(2, device=device), 1, 3, 2, 5, 0, 0, kind, torch.float32, "triton")
    torch.library.opcheck(torch.ops.libi_fast.philox.default, arguments)


def test_a_captured_graph_draws_anew_from_a_new_seed(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    seed = as_seed(1, device)
    lf.philox_normal(seed, 3, 10, backend="triton")  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert lib.capturing(device)
        found = lf.philox_normal(seed, 3, 10, backend="triton")
        filled = as_seed(2**63 + 4, device)
        with pytest.raises(lf.InputError, match="captured"):
            as_seed(None, device)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(found, lf.philox_normal(value, 3, 10, device=device, backend="triton"))
    assert int(filled) == 2**63 + 4 - 2**64
