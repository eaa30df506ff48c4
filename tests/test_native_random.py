"""The C++ random numbers: known answers, addressing, Box-Muller's accuracy, and the same bits everywhere."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from common import check_same_bits_for_any_number_of_threads, check_same_bits_for_instruction_set

from libi_fast.kernels import cpu

if not cpu.available() and not shutil.which("g++"):
    pytest.skip(f"no compiled library: {cpu.why_unavailable()}", allow_module_level=True)

ZERO = torch.tensor([0])
SEED = 0x299F31D0A4093822  # key words a4093822, 299f31d0


def test_library_is_built_where_a_compiler_is() -> None:
    assert cpu.available(), cpu.why_unavailable()
    assert cpu.isa() in ("generic", "v3", "v4")


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (SEED, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(seed: int, counter: tuple[int, int, int, int], expected: str) -> None:
    row, block, repetition, last = counter
    words = cpu.philox_words(seed, torch.tensor([last >> 8]), row, 1, block, 1, repetition, last & 0xFF)
    assert " ".join(f"{word:08x}" for word in words.flatten().tolist()) == expected


def test_a_part_equals_the_part_of_the_whole() -> None:
    replicas = torch.tensor([3, 0, 2**24 - 1])
    whole = cpu.philox_normal(7, replicas, 0, 40, 0, 131, 5, 2, torch.float32)
    parts = [(0, 1, 0, 1), (17, 9, 3, 50), (39, 1, 130, 1), (1, 39, 5, 2), (4, 3, 64, 67)]
    for first_row, rows, first_draw, draws in parts:
        part = cpu.philox_normal(7, replicas, first_row, rows, first_draw, draws, 5, 2, torch.float32)
        expected = whole[:, first_row : first_row + rows, first_draw : first_draw + draws]
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
    single = cpu.philox_normal(7, replicas[1:2], 0, 40, 0, 131, 5, 2, torch.float32)
    torch.testing.assert_close(single[0], whole[1], rtol=0, atol=0)


def test_the_last_counters_and_what_lies_past_them() -> None:
    assert cpu.philox_words(1, ZERO, 2**32 - 2, 2, 2**32 - 3, 3, 2**32 - 1, 255).shape == (1, 2, 3, 4)
    assert cpu.philox_uniform(1, ZERO, 0, 1, 2**34 - 5, 5, 0, 0, torch.float32).shape == (1, 1, 5)
    for bad in [
        (ZERO, 2**32 - 1, 2, 0, 1, 0, 0),
        (ZERO, 0, 1, 2**34 - 4, 5, 0, 0),
        (ZERO, 0, 1, 0, 1, 2**32, 0),
        (ZERO, 0, 1, 0, 1, 0, 256),
        (ZERO + 2**24, 0, 1, 0, 1, 0, 0),
        (ZERO - 1, 0, 1, 0, 1, 0, 0),
        (ZERO, -1, 1, 0, 1, 0, 0),
    ]:
        with pytest.raises(ValueError, match="range"):
            cpu.philox_uniform(1, *bad, torch.float32)


def test_empty() -> None:
    for replicas, rows, draws in [(0, 3, 4), (2, 0, 4), (2, 3, 0)]:
        out = cpu.philox_normal(1, torch.arange(replicas), 0, rows, 0, draws, 0, 0, torch.float64)
        assert out.shape == (replicas, rows, draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms(dtype: torch.dtype) -> None:
    words = cpu.philox_words(3, ZERO, 0, 64, 0, 1024, 0, 1).flatten().numpy()
    got = cpu.philox_uniform(3, ZERO, 0, 64, 0, 4096, 0, 1, dtype).flatten().numpy()
    value = ((words >> 8).astype(got.dtype) + got.dtype.type(0.5)) * got.dtype.type(2**-24)
    np.testing.assert_array_equal(got, np.minimum(value, np.nextafter(got.dtype.type(1), got.dtype.type(0))))
    assert got.min() > 0
    assert got.max() < 1


def exact_normals(w0: np.ndarray, w1: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Box-Muller with u and t rounded as the contract says, and all that follows in float64. (For float64 draws this
    is a second evaluation, no exact one: their bound is wider.)"""
    u = (w0.astype(dtype) * dtype(2**-32) + dtype(2**-33)).astype(np.float64)
    t = ((w1 & 0x3FFFFFFF).astype(dtype) * dtype(2**-30)).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u))
    small, large = t * (np.pi / 2), (1 - t) * (np.pi / 2)
    cosine = np.where(t > 0.5, np.sin(large), np.cos(small))
    sine = np.where(t > 0.5, np.cos(large), np.sin(small))
    quadrant = w1 >> 30
    first = np.choose(quadrant, [cosine, -sine, -cosine, sine])
    second = np.choose(quadrant, [sine, cosine, -sine, -cosine])
    return radius * first, radius * second


@pytest.mark.parametrize(
    ("dtype", "ulps", "absolute"), [(np.float32, 4, 3e-7), (np.float64, 8, 2e-15)], ids=["float32", "float64"]
)
def test_normals_against_float64(dtype: type, ulps: int, absolute: float) -> None:
    rows, blocks = 256, 4096
    words = cpu.philox_words(11, ZERO, 0, rows, 0, blocks, 0, 0).reshape(-1, 4).numpy()
    torch_dtype = torch.float32 if dtype is np.float32 else torch.float64
    got = cpu.philox_normal(11, ZERO, 0, rows, 0, 4 * blocks, 0, 0, torch_dtype).reshape(-1, 4).numpy()
    for pair in (0, 2):
        for offset, exact in enumerate(exact_normals(words[:, pair], words[:, pair + 1], dtype)):
            value = got[:, pair + offset]
            error = np.abs(value.astype(np.float64) - exact)
            within = np.maximum(ulps * np.spacing(np.abs(exact).astype(dtype)).astype(np.float64), absolute)
            assert (error <= within).all(), (error / within).max()


def test_normals_at_the_edges() -> None:
    """Words at the edges cannot be asked of Philox; a tiny program calls the header itself."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the program")
    edges = [0, 1, 2, 2**24, 2**31, 2**32 - 256, 2**32 - 1]
    angles = [q * 2**30 + d for q in range(4) for d in (0, 1, 2**28, 2**29 - 1, 2**29, 2**29 + 1, 2**30 - 1)]
    pairs = [(w0, w1) for w0 in edges for w1 in angles]
    got = run_header(compiler, pairs)
    assert max(max(abs(a), abs(b)) for a, b in got) > 6.76  # a 24-bit uniform would stop at 5.89
    mpmath.mp.prec = 120
    for (w0, w1), (first, second) in zip(pairs, got, strict=True):
        u = mpmath.mpf(float(np.float32(np.float32(w0) * np.float32(2**-32) + np.float32(2**-33))))
        t = mpmath.mpf(float(np.float32(w1 & 0x3FFFFFFF) * np.float32(2**-30)))
        radius = mpmath.sqrt(-2 * mpmath.log(u))
        theta = t * mpmath.pi / 2 + (w1 >> 30) * mpmath.pi / 2
        for value, exact in ((first, radius * mpmath.cos(theta)), (second, radius * mpmath.sin(theta))):
            bound = max(4 * float(np.spacing(np.float32(abs(float(exact))))), 3e-7)
            assert np.isfinite(value)
            assert abs(value - float(exact)) <= bound, (w0, w1, value, exact)


def run_header(compiler: str, pairs: list[tuple[int, int]]) -> list[tuple[float, float]]:
    header = Path(cpu.__file__).parent / "random" / "cpu.hpp"
    program = f"""
        #include "{header}"
        #include <cstdio>
        int main() {{
            unsigned a, b;
            while (std::scanf("%u %u", &a, &b) == 2) {{
                float x, y;
                libi::generic::normal_pair(a, b, x, y);
                std::printf("%.9g %.9g\\n", x, y);
            }}
        }}"""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "edges.cpp"), Path(folder, "edges")
        source.write_text(program)
        flags = ["-O2", "-std=c++17", "-ffp-contract=off"]
        subprocess.run([compiler, *flags, str(source), "-o", str(binary)], check=True, timeout=120)
        text = "\n".join(f"{a} {b}" for a, b in pairs)
        lines = subprocess.run([str(binary)], input=text, capture_output=True, text=True, check=True).stdout.split("\n")
    values = [tuple(float(v) for v in line.split()) for line in lines if line]
    return [(a, b) for a, b in values]


def test_moments() -> None:
    normals = cpu.philox_normal(5, ZERO, 0, 1024, 0, 1024, 0, 0, torch.float32).double().flatten()
    n = normals.numel()
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((normals**power).mean()) - mean) < 5 * (variance / n) ** 0.5


def digest() -> str:
    """Of draws of every kind: what must not depend on threads or instruction set."""
    replicas, hashed = torch.tensor([0, 5]), hashlib.sha256()
    for rows, draws in [(1, 100_003), (5000, 7), (64, 1024)]:
        for dtype in (torch.float32, torch.float64):
            for draw in (cpu.philox_uniform, cpu.philox_normal):
                hashed.update(draw(2**40 + 3, replicas, 2, rows, 3, draws, 1, 4, dtype).numpy().tobytes())
    return hashed.hexdigest()


def test_same_bits_for_any_number_of_threads() -> None:
    check_same_bits_for_any_number_of_threads(digest)


@pytest.mark.parametrize("isa", ["generic", "v3", "v4"])
def test_same_bits_for_every_instruction_set(isa: str) -> None:
    check_same_bits_for_instruction_set(isa, "test_native_random", digest)


def test_an_unknown_instruction_set_is_reported() -> None:
    program = "import libi_fast.kernels.cpu as c; print(c.isa())"
    environment = {**os.environ, "LIBI_FAST_ISA": "v9"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "LIBI_FAST_ISA" in done.stderr
    assert done.stdout.split()[-1] in ("generic", "v3", "v4")


def test_loading_changes_neither_subnormals_nor_threads() -> None:
    program = """
import torch
torch.set_num_threads(2)
import libi_fast.kernels.cpu as c
c.philox_normal(0, torch.tensor([0]), 0, 64, 0, 4096, 0, 0, torch.float32)
c.log_mean_exp(torch.zeros(64, 4096))
smallest = torch.full((64,), 1e-38) * 1e-5  # 64: through torch's vector code as well
assert c.available() and torch.get_num_threads() == 2
assert bool((smallest > 0).all()), "subnormals are flushed to zero"
assert float.fromhex("0x1p-1074") > 0 and 2.0**-1022 / 4 > 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
