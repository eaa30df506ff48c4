"""Random numbers: Random123's known answers, one sequence on every backend, and its distribution."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels import cpu
from libi_fast.kernels.random import reference
from libi_fast.ops import random

NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason=f"no library: {cpu.why_unavailable()}"))
BACKENDS = ["reference", NATIVE]
KINDS = [lf.philox_uniform, lf.philox_normal]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
both_kinds = pytest.mark.parametrize("draw", KINDS, ids=["uniform", "normal"])
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(seed: int, counter: tuple[int, ...], expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor(c) for c in counter)
    found = reference.philox((c0, c1, c2, c3), random.as_seed(seed))
    assert " ".join(f"{int(word):08x}" for word in found) == expected
    # The same through the counter's layout: (row, block, repetition, stream + 256 * replica).
    replicas = torch.tensor([counter[3] >> 8])
    whole = reference.words(random.as_seed(seed), replicas, counter[0], 1, counter[1], 1, counter[2], counter[3] & 255)
    assert " ".join(f"{int(word):08x}" for word in whole.flatten()) == expected


@pytest.mark.skipif(not cpu.available(), reason="no compiled library")
@both_types
@pytest.mark.parametrize("seed", [0, 2**64 - 1, 0x123456789ABCDEF])
def test_reference_and_compiled_library_agree(seed: int, dtype: torch.dtype) -> None:
    common = {"replicas": torch.tensor([0, 2**24 - 1]), "first_row": 2**31, "first_draw": 6, "repetition": 3, "stream": 7}
    common["dtype"] = dtype
    expected, found = (lf.philox_uniform(seed, 50, 1001, backend=b, **common) for b in ("reference", "cpu"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expected, found = (lf.philox_normal(seed, 50, 1001, backend=b, **common).numpy() for b in ("reference", "cpu"))
    single = dtype == torch.float32
    allowed = np.maximum((4 if single else 8) * np.spacing(np.abs(expected)), 3e-7 if single else 2e-15)
    assert (np.abs(found - expected) <= allowed).all()


@both_backends
@both_kinds
@both_types
def test_any_part_equals_the_part_of_the_whole(draw: Callable[..., Tensor], dtype: torch.dtype, backend: str) -> None:
    common = {"repetition": 2, "stream": 1, "dtype": dtype, "backend": backend}
    whole = draw(11, 9, 30, replicas=3, **common)
    assert whole.shape == (3, 9, 30)
    parts = [(0, 1, 0, 1), (3, 4, 1, 7), (8, 1, 29, 1), (0, 9, 3, 2), (2, 5, 4, 8), (5, 2, 13, 17), (1, 0, 2, 3), (0, 2, 9, 0)]
    for first_row, rows, first_draw, draws in parts:
        part = draw(11, rows, draws, replicas=3, first_row=first_row, first_draw=first_draw, **common)
        expected = whole[:, first_row : first_row + rows, first_draw : first_draw + draws]
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
    for replica in range(3):
        part = draw(11, 9, 30, replicas=torch.tensor([replica]), **common)
        torch.testing.assert_close(part[0], whole[replica], rtol=0, atol=0)
    torch.testing.assert_close(draw(11, 9, 30, **common), whole[0], rtol=0, atol=0)  # without replicas: replica 0


@both_backends
@both_kinds
def test_every_part_of_the_counter_and_key_matters(draw: Callable[..., Tensor], backend: str) -> None:
    changes = [{}, {"first_row": 1}, {"first_draw": 4}, {"repetition": 1}, {"stream": 1}, {"replicas": torch.tensor([1])}]
    changes += [{"first_row": 256}, {"repetition": 256}, {"replicas": torch.tensor([256])}]
    found = [draw(5, 1, 8, backend=backend, **change).flatten() for change in changes]
    found += [draw(seed, 1, 8, backend=backend).flatten() for seed in (6, 5 + 2**32, 5 + 2**63)]
    for a, b in itertools.combinations(found, 2):
        assert not bool((a == b).any())


@both_types
def test_uniforms_never_reach_zero_or_one(dtype: torch.dtype) -> None:
    edges = torch.tensor([0, 255, 256, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1])
    value = reference.to_uniform(edges, dtype)
    assert value.dtype == dtype
    assert float(value.min()) == 2.0**-25
    assert float(value.max()) < 1
    exact = ((edges >> 8).double() + 0.5) * 2.0**-24
    # ((word >> 8) + 1/2) 2^-24 has 25 bits, so float32 may round it once.
    assert float((value.double() - exact).abs().max()) <= (2.0**-25 if dtype == torch.float32 else 0)


@both_types
def test_normals_of_extreme_words_are_finite(dtype: torch.dtype) -> None:
    edges = [0, 1, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 1]
    pairs = torch.tensor(list(itertools.product(edges, edges)))
    value = reference.to_normal(torch.cat((pairs, pairs), -1), dtype)
    assert bool(torch.isfinite(value).all())
    radius = torch.linalg.norm(value[:, :2].double(), dim=-1)
    expected = torch.sqrt(-2 * torch.log((pairs[:, 0].double() + 0.5) * 2.0**-32))
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6  # sqrt(-2 log u) as u nears 1 keeps half the digits
    torch.testing.assert_close(radius, expected, rtol=1e-6, atol=tolerance)
    cosine, sine = (value[:, 0].double() / radius.clamp_min(1e-12), value[:, 1].double() / radius.clamp_min(1e-12))
    angle = 2 * np.pi * pairs[:, 1].double() * 2.0**-32
    large = expected > 1e-2
    torch.testing.assert_close(cosine[large], angle.cos()[large], rtol=0, atol=1e-6)
    torch.testing.assert_close(sine[large], angle.sin()[large], rtol=0, atol=1e-6)


@both_backends
@both_types
@pytest.mark.parametrize("shape", [(1, 200_000), (200_000, 1), (400, 500)], ids=["one-row", "one-draw", "square"])
def test_distribution(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    uniform = lf.philox_uniform(21, *shape, dtype=dtype, backend=backend).double().flatten().numpy()
    normal = lf.philox_normal(22, *shape, dtype=dtype, backend=backend).double().flatten().numpy()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    n = normal.size
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((normal**power).mean() - moment) < 4.5 * np.sqrt(variance / n)


@both_backends
def test_neighbours_are_independent(backend: str) -> None:
    draws = 100_000
    base = lf.philox_normal(31, 2, draws, backend=backend)
    others = {
        "next row": base[1],
        "next draw": base[0].roll(1),
        "next pair": base[0].roll(2),
        "next block": base[0].roll(4),
        "next seed": lf.philox_normal(32, 1, draws, backend=backend)[0],
        "next repetition": lf.philox_normal(31, 1, draws, repetition=1, backend=backend)[0],
        "next stream": lf.philox_normal(31, 1, draws, stream=1, backend=backend)[0],
        "next replica": lf.philox_normal(31, 1, draws, replicas=torch.tensor([1]), backend=backend)[0, 0],
    }
    for name, other in others.items():
        for power in (1, 2):  # squares as well: Box-Muller's radius must not leak from lane to lane
            pair = torch.stack((base[0] ** power, other**power)).double()
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 4.5 / draws**0.5, (name, power)


@both_kinds
def test_without_a_seed_torch_manual_seed_governs(draw: Callable[..., Tensor]) -> None:
    torch.manual_seed(4)
    first, second = draw(None, 3, 5), draw(None, 3, 5)
    after = torch.rand(3)
    torch.manual_seed(4)
    again = draw(None, 3, 5), draw(None, 3, 5)
    torch.testing.assert_close(again, (first, second), rtol=0, atol=0)
    assert not torch.equal(first, second)
    torch.testing.assert_close(torch.rand(3), after, rtol=0, atol=0)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    draw(7, 3, 5)
    assert torch.equal(torch.get_rng_state(), before), "a given seed must leave torch's generator alone"


def test_a_seed_may_be_a_tensor() -> None:
    for seed in (0, 12, 2**63 - 1):
        torch.testing.assert_close(lf.philox_normal(torch.tensor(seed), 2, 6), lf.philox_normal(seed, 2, 6), rtol=0, atol=0)
    # 2^64 - 1 and int64's -1 are the same 64 bits.
    torch.testing.assert_close(lf.philox_normal(torch.tensor(-1), 2, 6), lf.philox_normal(2**64 - 1, 2, 6), rtol=0, atol=0)


def test_an_integer_seed_keeps_its_64_bits() -> None:
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1, 0x8000000000000401):
        key = random.as_seed(seed)
        assert (key.dtype, key.shape) == (torch.int64, ())
        assert int(key) % 2**64 == seed


def test_a_seed_from_the_host_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for seed in (None, torch.tensor(3)):
        with pytest.raises(lf.InputError, match="pass the seed as an int64 tensor on the GPU"):
            random.as_seed(seed, "cuda")
        assert random.as_seed(seed).device.type == random.as_seed(seed, "cpu").device.type == "cpu"


@both_backends
def test_the_last_indices_serve(backend: str) -> None:
    last = lf.philox_uniform(
        1, 2, 5, replicas=torch.tensor([2**24 - 1]), first_row=2**32 - 2, first_draw=2**34 - 5, repetition=2**32 - 1,
        stream=255, backend=backend,
    )  # fmt: skip
    assert last.shape == (1, 2, 5)
    assert bool(((last > 0) & (last < 1)).all())


@both_backends
@both_kinds
@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (lf.InputError, "seed", {"seed": -1}),
        (lf.InputError, "seed", {"seed": 2**64}),
        (TypeError, "seed", {"seed": 1.0}),
        (TypeError, "seed", {"seed": True}),
        (lf.InputError, "seed", {"seed": torch.tensor([1])}),
        (lf.InputError, "seed", {"seed": torch.tensor(1.0)}),
        (lf.InputError, "row", {"first_row": 2**32}),
        (lf.InputError, "row", {"first_row": 2**32 - 1}),  # the second of two rows lies past the end
        (lf.InputError, "first_row", {"first_row": -1}),
        (TypeError, "first_row", {"first_row": 0.5}),
        (lf.InputError, "draw", {"first_draw": 2**34 - 1}),
        (lf.InputError, "repetition", {"repetition": 2**32}),
        (lf.InputError, "stream", {"stream": 256}),
        (lf.InputError, "replica", {"replicas": torch.tensor([0, 2**24])}),
        (lf.InputError, "replica", {"replicas": torch.tensor([-1])}),
        (lf.InputError, "replicas", {"replicas": torch.tensor([0.0])}),
        (lf.InputError, "replicas", {"replicas": 2**24 + 1}),
        (lf.InputError, "rows", {"rows": -1}),
        (lf.InputError, "draws", {"draws": -3}),
        (TypeError, "draws", {"draws": 3.0}),
        (TypeError, "dtype", {"dtype": torch.float16}),
    ],
)
def test_bad_input(draw: Callable[..., Tensor], error: type, message: str, change: dict, backend: str) -> None:
    arguments = {"seed": 0, "rows": 2, "draws": 3, "backend": backend} | change
    with pytest.raises(error, match=message):
        draw(**arguments)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(lf.InputError, match="nonsense"):
        lf.philox_normal(0, 1, 1, backend="nonsense")
    with pytest.raises(lf.InputError, match="backend 'triton' was asked for philox, but"):
        lf.philox_normal(0, 1, 1, device="cpu", backend="triton")
    with pytest.raises(lf.InputError, match="nonsense"), lf.use_backend("nonsense"):
        pass


def test_use_backend_is_undone_also_after_an_error() -> None:
    from libi_fast.ops import _library as lib

    with pytest.raises(ZeroDivisionError), lf.use_backend("reference"):
        assert lib.current_backend() == "reference"
        raise ZeroDivisionError
    assert lib.current_backend() == ""


@both_backends
def test_opcheck(backend: str) -> None:
    seed = random.as_seed(3)
    for kind in ("uniform", "normal"):
        arguments = (seed, torch.arange(2), 1, 3, 2, 5, 0, 0, kind, torch.float64, backend)
        torch.library.opcheck(torch.ops.libi_fast.philox.default, arguments)


def test_compile_and_vmap() -> None:
    def twice(seed: Tensor) -> Tensor:
        return 2 * lf.philox_normal(seed, 3, 5)

    seeds = torch.tensor([4, 9])
    expected = torch.stack([twice(s) for s in seeds])
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.stack([compiled(s) for s in seeds]), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.func.vmap(twice)(seeds), expected, rtol=0, atol=0)
