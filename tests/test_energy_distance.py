"""The energy distance: against scipy and a double loop, its gradient, blocks and memory."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import points
from scipy import stats
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.metrics import energy, energy_distance


def double_loop(a: Tensor, b: Tensor) -> float:
    def mean(x: Tensor, y: Tensor) -> float:
        return sum(math.dist(p, q) for p in x.tolist() for q in y.tolist()) / (len(x) * len(y))

    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


@pytest.mark.parametrize("kind", ["normal", "skewed"])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (1, 5, 2), (20, 31, 1), (20, 31, 2), (13, 7, 10)])
def test_against_a_double_loop(n: int, m: int, d: int, kind: str) -> None:
    a, b = points(n, d, kind), points(m, d, kind) + 0.3
    assert abs(float(energy_distance(a, b)) - double_loop(a, b)) < 1e-13


@pytest.mark.parametrize("shift", [0.0, 0.5, 10.0])
def test_against_scipy(shift: float) -> None:
    a, b = points(300, 1), 1.2 * points(211, 1) + shift
    expected = stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy()) ** 2  # scipy's is the root
    assert abs(float(energy_distance(a, b)) - expected) < 1e-12


def test_zero_for_equal_samples_and_never_negative() -> None:
    a = points(200, 3).requires_grad_()
    found = energy_distance(a, a.detach())
    assert float(found.detach()) == 0
    assert float(torch.autograd.grad(found, a)[0].abs().max()) < 1e-15
    shuffled = torch.stack([energy_distance(a.detach(), a.detach()[torch.randperm(200)]) for _ in range(20)])
    assert bool((shuffled >= 0).all())
    assert float(shuffled.max()) < 1e-14
    assert float(energy_distance(torch.zeros(4, 1), torch.ones(3, 1))) == 2  # two points 1 apart


def test_units_and_symmetries() -> None:
    a, b = points(40, 3), points(25, 3, "skewed")
    plain = float(energy_distance(a, b))
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    assert abs(float(energy_distance(b, a)) - plain) < 1e-13
    assert abs(float(energy_distance(a @ rotation + 7, b @ rotation + 7)) - plain) < 1e-12
    assert abs(float(energy_distance(1000 * a, 1000 * b)) - 1000 * plain) < 1e-9
    assert abs(float(energy_distance(a.repeat(3, 1), b)) - plain) < 1e-13  # a V-statistic sees the distribution alone


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32(offset: float) -> None:
    a, b = points(500, 2, dtype=torch.float32) + offset, points(400, 2, dtype=torch.float32) + offset + 0.1
    exact_a, exact_b = a.double().requires_grad_(), b.double()
    a.requires_grad_()
    found, exact = energy_distance(a, b), energy_distance(exact_a, exact_b)
    assert found.dtype == torch.float32
    assert abs(float(found) - float(exact)) < 1e-7
    torch.testing.assert_close(
        torch.autograd.grad(found, a)[0].double(), torch.autograd.grad(exact, exact_a)[0], rtol=1e-6, atol=1e-9
    )
    near = energy_distance((exact_a.detach() - offset).float(), (exact_b - offset).float())
    assert abs(float(found) - float(near)) < 1e-5


@pytest.mark.parametrize("d", [1, 3])
def test_gradcheck(d: int) -> None:
    a, b = points(2 * 5, d).reshape(2, 5, d).requires_grad_(), points(4, d).requires_grad_()  # b is shared
    assert torch.autograd.gradcheck(energy_distance, (a, b))
    assert torch.autograd.gradcheck(lambda y: energy_distance(a.detach() + 50, y + 50), b)


def test_gradient_of_coinciding_points() -> None:
    """Equal points pull nowhere: the sum of unit vectors leaves them out."""
    a, b = torch.tensor([[0.0], [0.0], [1.0]], requires_grad=True), torch.tensor([[0.0], [2.0]])
    (grad,) = torch.autograd.grad(energy_distance(a, b), a)
    torch.testing.assert_close(grad, torch.tensor([[-1 / 9], [-1 / 9], [-4 / 9]]))


def test_blocks_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = points(3 * 50, 2).reshape(3, 50, 2).requires_grad_(), points(3 * 37, 2).reshape(3, 37, 2).requires_grad_()
    value = energy_distance(a, b)
    gradients = torch.autograd.grad(value.sum(), (a, b))
    torch.testing.assert_close(value, torch.stack([energy_distance(x, y) for x, y in zip(a, b, strict=True)]))
    assert energy_distance(a[:, None], b).shape == (3, 3)
    assert energy_distance(a[:0], b[:0]).shape == (0,)
    for budget in (1, 3 * 37 * 7, 3 * 50 * 49):
        monkeypatch.setattr(energy, "PAIR_BUDGET", budget)
        blocks = energy_distance(a, b)
        torch.testing.assert_close(blocks, value, rtol=0, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad(blocks.sum(), (a, b)), gradients, rtol=0, atol=1e-15)


def test_memory_is_not_n_by_m() -> None:
    """6,000 x 6,000 pairs are 288 MB in float64, and there are three such sums."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    program = """
import torch
from libi_fast.metrics import energy_distance
torch.set_num_threads(1)
def level(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
a, b = torch.randn(6000, 2, requires_grad=True), torch.randn(6000, 2)
before = level("VmRSS")
energy_distance(a, b).backward()
print(level("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 150


def test_second_derivatives_say_so() -> None:
    with pytest.raises(NotImplementedError, match="energy_distance has no second derivative"):
        torch.autograd.functional.hessian(lambda x: energy_distance(x, points(4, 2)), points(5, 2))


@pytest.mark.parametrize(
    ("error", "message", "a", "b"),
    [
        (InputError, "a must have at least 2 dim", torch.zeros(5), torch.zeros(5, 1)),
        (
            InputError,
            r"b must hold at least 1 point of at least 1 dimension, got shape \(0, 2\)",
            torch.zeros(5, 2),
            torch.zeros(0, 2),
        ),
        (
            InputError,
            r"a must hold at least 1 point of at least 1 dimension, got shape \(5, 0\)",
            torch.zeros(5, 0),
            torch.zeros(5, 0),
        ),
        (InputError, "a has points of 2 dimensions but b of 3", torch.zeros(5, 2), torch.zeros(5, 3)),
        (InputError, "leading dimensions do not broadcast", torch.zeros(2, 5, 2), torch.zeros(3, 5, 2)),
        (InputError, "b holds nan at row 0, column 0", torch.zeros(5, 2), torch.full((5, 2), math.nan)),
        (TypeError, "a must be float32 or float64, got int64", torch.zeros(5, 2).long(), torch.zeros(5, 2)),
        (TypeError, r"a must be a torch\.Tensor, got ndarray", np.zeros((5, 2)), torch.zeros(5, 2)),
        (TypeError, "b is torch.float64 but a is torch.float32", torch.zeros(5, 2), torch.zeros(5, 2).double()),
    ],
)
def test_bad_input(error: type, message: str, a: Any, b: Any) -> None:
    with pytest.raises(error, match=message):
        energy_distance(a, b)
