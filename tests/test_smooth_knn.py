"""The smooth k-NN statistic: against enumeration and mpmath, its null distribution, gradient, and what an operator promises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from common import points
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels.smooth_knn import reference
from libi_fast.ops.smooth_knn import smooth_knn


def distances(z: Tensor) -> Tensor:
    return (1e-5 + (z[..., :, None, :] - z[..., None, :, :]).square().sum(-1)).sqrt()


def enumerated(distance: Tensor, k: int, alpha: float) -> Tensor:
    """P of D [N, N] by going through all sets of k other points."""
    n = len(distance)
    probabilities = torch.zeros_like(distance)
    for i in range(n):
        for chosen in itertools.combinations([j for j in range(n) if j != i], k):
            probabilities[i, list(chosen)] += (-alpha * distance[i, list(chosen)].sum()).exp()
    return probabilities * k / probabilities.sum(1, keepdim=True)


def standardised(probabilities: Tensor, n1: int) -> Tensor:
    """The published formulas as printed, for P [N, N]."""
    n = len(probabilities)
    n2 = n - n1
    count = probabilities[:n1, n1:].sum() + probabilities[n1:, :n1].sum()
    mean, variance = published_moments(probabilities, n1, n2)
    return -(count - mean) / (1e-5 + variance).sqrt()


def published_moments(probabilities: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    n = n1 + n2
    chi1, chi2 = n1 * n2 / (n * (n - 1)), 4 * (n1 - 1) * (n2 - 1) / ((n - 2) * (n - 3))
    total = probabilities.sum()
    sums = probabilities.sum(0) + probabilities.sum(1)
    products = probabilities.square().sum() + (probabilities * probabilities.mT).sum()
    variance = chi1 * (1 - chi2) * sums.square().sum() + chi1 * chi2 * products + chi1 * (chi2 - 4 * chi1) * total**2
    return 2 * total * chi1, variance


def symmetric_polynomial(weights: list[Any], k: int) -> Any:
    values = [mpmath.mpf(1)] + [mpmath.mpf(0)] * k
    for w in weights:
        values = [values[0]] + [values[m] + w * values[m - 1] for m in range(1, k + 1)]
    return values[k]


def exact(log_weights: Tensor, k: int, j: int) -> float:
    """P_j = w_j e_{k-1}(w without j) / e_k(w), in numbers whose exponents have no bound."""
    weights = [mpmath.exp(mpmath.mpf(float(x))) for x in log_weights]
    return float(weights[j] * symmetric_polynomial(weights[:j] + weights[j + 1 :], k - 1) / symmetric_polynomial(weights, k))


# --- values ---


@pytest.mark.parametrize("alpha", [0.3, 1.0, 20.0])
@pytest.mark.parametrize("k", range(1, 8))
def test_against_enumeration(k: int, alpha: float) -> None:
    z = points(8, 2)
    expected = enumerated(distances(z), k, alpha)
    found = reference.neighbours(distances(z)[None], k, alpha)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for n1 in (2, 4, 5):
        value = float(smooth_knn(z[:n1], z[n1:], k, alpha))
        assert abs(value - float(standardised(expected, n1))) < 1e-10


@pytest.mark.parametrize(
    ("k", "alpha"), [(1, 50), (2, 1), (10, 1), (10, 50), (50, 100), (59, 100), (60, 100), (110, 100), (118, 30)]
)
def test_against_many_digits(k: int, alpha: float) -> None:
    distance = distances(points(120, 2))
    found = reference.neighbours(distance[None], k, alpha)[0]
    assert bool(torch.isfinite(found).all())
    others = torch.arange(120) != 77
    log_weights, row = -alpha * distance[77, others], found[77, others]
    # The most uncertain neighbours, the surest, and the unlikeliest.
    chosen = [*(row - 0.5).abs().argsort()[:3].tolist(), int(row.argmax()), int(row.argmin())]
    for j in chosen:
        assert abs(float(row[j]) - exact(log_weights, k, j)) < 1e-13


@pytest.mark.parametrize(("n1", "n2"), [(4, 4), (3, 5), (2, 6), (2, 2), (5, 4)])
def test_moments_over_all_assignments_of_labels(n1: int, n2: int) -> None:
    """The published mean and variance, and the statistic, with P fixed and the labels permuted."""
    n = n1 + n2
    z = points(n, 2, "skewed")
    probabilities = reference.neighbours(distances(z)[None], min(2, n - 1), 1.5)[0]
    counts, values = [], []
    for first in itertools.combinations(range(n), n1):
        rest = [i for i in range(n) if i not in first]
        counts.append(probabilities[list(first)][:, rest].sum() + probabilities[rest][:, list(first)].sum())
        values.append(smooth_knn(z[list(first)], z[rest], min(2, n - 1), 1.5))
    mean, variance = published_moments(probabilities, n1, n2)
    torch.testing.assert_close(torch.stack(counts).mean(), mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.stack(counts).var(correction=0), variance, rtol=1e-11, atol=0)
    statistic = torch.stack(values)
    assert abs(float(statistic.mean())) < 1e-12
    torch.testing.assert_close(statistic.var(correction=0), variance / (1e-5 + variance), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("n1", "n2", "k", "alpha"), [(30, 30, 1, 1.0), (40, 25, 10, 1.0), (60, 60, 10, 50.0), (70, 70, 100, 5.0)]
)
def test_the_centred_formulas_equal_the_published_ones(n1: int, n2: int, k: int, alpha: float) -> None:
    z = points(n1 + n2, 3)
    z[n1:] += 0.3
    expected = standardised(reference.neighbours(distances(z)[None], k, alpha)[0], n1)
    assert abs(float(smooth_knn(z[:n1], z[n1:], k, alpha)) - float(expected)) < 1e-10 * max(1, abs(float(expected)))


def test_several_alphas_average_the_probabilities() -> None:
    z = points(40, 2)
    mean = torch.stack([reference.neighbours(distances(z)[None], 5, alpha)[0] for alpha in (0.5, 2, 30)]).mean(0)
    found = smooth_knn(z[:18], z[18:], 5, (0.5, 2, 30))
    assert abs(float(found) - float(standardised(mean, 18))) < 1e-11
    torch.testing.assert_close(smooth_knn(z[:18], z[18:], 5, [2.0, 2.0]), smooth_knn(z[:18], z[18:], 5, 2))
    torch.testing.assert_close(smooth_knn(z[:18], z[18:], 5, torch.tensor([0.5, 2, 30])), found)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("alpha", [1e-3, 1.0, 50.0, 1e3, 1e6])
@pytest.mark.parametrize("k", [1, 2, 10, 24, 25, 26, 48, 49])
def test_finite_for_every_k_and_alpha(k: int, alpha: float, dtype: torch.dtype) -> None:
    z = points(50, 2, dtype=dtype).requires_grad_()
    found = smooth_knn(z[:25], z[25:], k, alpha)
    (grad,) = torch.autograd.grad(found, z)
    assert bool(torch.isfinite(found))
    assert bool(torch.isfinite(grad).all())
    probabilities = reference.neighbours(distances(z.detach().double())[None], k, alpha)[0]
    torch.testing.assert_close(probabilities.sum(1), torch.full((50,), float(k), dtype=torch.float64), rtol=1e-12, atol=0)
    assert float(probabilities.min()) > -1e-14
    assert float(probabilities.max()) < 1 + 1e-14
    if k == 49:  # everyone is everyone's neighbour
        assert abs(float(found.detach())) < 1e-9
        assert float(grad.abs().max()) == 0


def test_large_alpha_counts_the_nearest_neighbours() -> None:
    z = points(60, 2)
    nearest = distances(z).fill_diagonal_(math.inf).topk(5, largest=False).indices
    hard = torch.zeros(60, 60, dtype=torch.float64).scatter_(1, nearest, 1.0)
    assert abs(float(smooth_knn(z[:30], z[30:], 5, 1e5)) - float(standardised(hard, 30))) < 1e-3


@pytest.mark.parametrize("k", [1, 3, 15])
def test_equal_and_far_points(k: int) -> None:
    """Ties, and clusters so far apart that their weights are 0 to each other."""
    same = torch.zeros(20, 2, dtype=torch.float64)
    assert abs(float(smooth_knn(same[:8], same[8:], k))) < 1e-9
    z = points(20, 2)
    far = smooth_knn(z, z + 1e5, k)
    apart = torch.zeros(40, 40, dtype=torch.float64)
    for block in (slice(0, 20), slice(20, 40)):
        apart[block, block] = reference.neighbours(distances(z)[None], k, 1.0)[0]
    assert abs(float(far) - float(standardised(apart, 20))) < 1e-6


def test_an_offset_of_100_in_float32() -> None:
    a, b = points(60, 2, dtype=torch.float32) + 100, points(60, 2, dtype=torch.float32) + 100.2
    for k, alpha in [(1, 1.0), (10, 1.0), (10, 50.0)]:
        exact = smooth_knn(a.double(), b.double(), k, alpha)
        assert abs(float(smooth_knn(a, b, k, alpha)) - float(exact)) < 1e-6 * max(1, abs(float(exact)))


# --- meaning ---


@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (10, 1.0), (10, 10.0)])
def test_null_distribution(k: int, alpha: float) -> None:
    draws = 300
    found = smooth_knn(torch.randn(draws, 40, 2), torch.randn(draws, 50, 2), k, alpha)
    assert abs(float(found.mean())) < 3 * float(found.std()) / math.sqrt(draws)
    assert abs(float(found.std()) - 1) < 0.15


def test_power_against_a_shift() -> None:
    a, b = torch.randn(50, 60, 2), torch.randn(50, 60, 2)
    found = torch.stack([smooth_knn(a, b + shift) for shift in (0.0, 0.5, 1.0, 3.0)]).mean(1)
    assert bool((found.diff() > 1).all())
    assert float(found[-1]) > 10
    assert float(smooth_knn(a, 2 * b).mean()) > 3  # and a scale


def test_symmetries() -> None:
    a, b = points(30, 3), points(21, 3) + 0.4
    plain = smooth_knn(a, b, 7, 2.0)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    for name, found in {
        "samples exchanged": smooth_knn(b, a, 7, 2.0),
        "order": smooth_knn(a[torch.randperm(30)], b[torch.randperm(21)], 7, 2.0),
        "shift": smooth_knn(a + 50, b + 50, 7, 2.0),
        "rotation": smooth_knn(a @ rotation, b @ rotation, 7, 2.0),
        "strides": smooth_knn(a.mT.contiguous().mT, b.repeat_interleave(2, 0)[::2], 7, 2.0),
    }.items():
        assert abs(float(found - plain)) < 1e-11, name


# --- gradients ---


@pytest.mark.parametrize("alphas", [1.0, (0.7, 5.0)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4, 6, 8, 9])
def test_gradcheck(k: int, alphas: float | Sequence[float]) -> None:
    a, b = points(2 * 6, 2).reshape(2, 6, 2).requires_grad_(), points(4, 2).requires_grad_()  # 9 others; b is shared
    assert torch.autograd.gradcheck(lambda x, y: smooth_knn(x, y, k, alphas), (a, b))
    assert torch.autograd.gradcheck(lambda y: smooth_knn(a.detach() + 50, y + 50, k, alphas), b)


@pytest.mark.parametrize(("k", "size"), [(1, 1e-12), (10, 1e-10)])
def test_gradient_against_autograd_through_the_formulas(k: int, size: float) -> None:
    """k = 1 is a softmax; else e_k by its recursion, whose logarithm has P as its gradient."""
    z = points(40, 2).requires_grad_()
    logits = -1.5 * distances(z)[~torch.eye(40, dtype=torch.bool)].reshape(40, 39)
    if k == 1:
        rows = torch.softmax(logits, 1)
    else:
        polynomial = [torch.ones(40, dtype=torch.float64)] + [torch.zeros(40, dtype=torch.float64)] * k
        for weight in logits.exp().unbind(1):
            polynomial = [polynomial[0]] + [polynomial[m] + weight * polynomial[m - 1] for m in range(1, k + 1)]
        (rows,) = torch.autograd.grad(polynomial[k].log().sum(), logits, create_graph=True)
    probabilities = torch.zeros(40, 40, dtype=torch.float64).masked_scatter(~torch.eye(40, dtype=torch.bool), rows)
    value = standardised(probabilities, 15)
    found = smooth_knn(z[:15], z[15:], k, 1.5)
    torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-11)
    expected, gradient = (torch.autograd.grad(v, z)[0] for v in (value, found))
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=size)


@pytest.mark.parametrize(("k", "alpha"), [(10, 50.0), (50, 100.0), (100, 20.0)])
def test_gradient_at_large_k_and_alpha(k: int, alpha: float) -> None:
    a, b = points(60, 2).requires_grad_(), points(60, 2)
    direction = torch.randn_like(a)
    (grad,) = torch.autograd.grad(smooth_knn(a, b, k, alpha), a)
    with torch.no_grad():
        ends = smooth_knn(torch.stack((a + 1e-6 * direction, a - 1e-6 * direction)), b, k, alpha)
    slope = float(ends[0] - ends[1]) / 2e-6
    assert abs(float((grad * direction).sum()) - slope) < 1e-5 * max(1, abs(slope))


def test_descent_brings_samples_together() -> None:
    a, b = points(40, 2) + 1.5, points(40, 2)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([shift], lr=0.1)
    start = float(smooth_knn(a, b))
    for _ in range(40):
        optimiser.zero_grad()
        smooth_knn(a + shift, b).backward()
        optimiser.step()
    assert start > 5
    assert float(smooth_knn(a + shift.detach(), b)) < 1
    assert float((shift.detach() + 1.5).abs().max()) < 0.6


# --- batches ---


@pytest.mark.parametrize("k", [1, 5, 20])
def test_repetitions_equal_the_loop(k: int) -> None:
    a, b = points(6 * 15, 2).reshape(6, 15, 2), points(6 * 12, 2).reshape(6, 12, 2)
    whole = smooth_knn(a, b, k)
    torch.testing.assert_close(whole, torch.stack([smooth_knn(x, y, k) for x, y in zip(a, b, strict=True)]), rtol=0, atol=1e-12)
    nested = smooth_knn(a.reshape(2, 3, 15, 2), b.reshape(2, 3, 12, 2), k)
    torch.testing.assert_close(nested, whole.reshape(2, 3), rtol=0, atol=1e-12)
    table = smooth_knn(a[:, None], b[:2], k)  # each against each
    torch.testing.assert_close(table[3, 1], smooth_knn(a[3], b[1], k), rtol=0, atol=1e-12)
    assert table.shape == (6, 2)
    assert smooth_knn(a[0], b, k).shape == (6,)
    assert smooth_knn(a[:0], b[:0], k).shape == (0,)


@pytest.mark.parametrize("k", [1, 5, 25])
def test_block_size_moves_nothing(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = points(7 * 15, 2).reshape(7, 15, 2).requires_grad_(), points(7 * 15, 2).reshape(7, 15, 2)

    def both() -> tuple[Tensor, Tensor]:
        value = smooth_knn(a, b, k, (1.0, 20.0))
        return value.detach(), torch.autograd.grad(value.sum(), a)[0]

    whole = both()
    for pairs, coefficients in [(1, 1), (2 * 900, 30 * (k + 1) * 17), (3 * 900, 2**20)]:
        monkeypatch.setattr(reference, "PAIR_BUDGET", pairs)
        monkeypatch.setattr(reference, "POLYNOMIAL_BUDGET", coefficients)
        torch.testing.assert_close(both(), whole, rtol=0, atol=1e-12)


def test_one_repetition_of_nan_leaves_the_others_alone() -> None:
    """Under vmap no check looks at the values."""
    a, b = points(3 * 12, 2).reshape(3, 12, 2), points(3 * 12, 2).reshape(3, 12, 2)
    bad = a.clone()
    bad[1, 7, 0] = math.nan
    found = torch.func.vmap(lambda x, y: smooth_knn(x, y, 4))(bad, b)
    assert bool(found[1].isnan())
    torch.testing.assert_close(found[[0, 2]], smooth_knn(a, b, 4)[[0, 2]], rtol=0, atol=1e-12)


def test_float32_against_float64() -> None:
    a, b = points(5 * 50, 2).reshape(5, 50, 2).float(), (points(5 * 50, 2) + 0.3).reshape(5, 50, 2).float()
    for k in (1, 10, 90):
        single, double = smooth_knn(a, b, k), smooth_knn(a.double(), b.double(), k)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-6)


# --- what an operator promises ---


def test_vmap_equals_the_loop() -> None:
    a, b = points(3 * 4 * 9, 2).reshape(3, 4, 9, 2), points(8, 2)

    def value(x: Tensor, y: Tensor) -> Tensor:
        return smooth_knn(x, y, 4, (1.0, 3.0))

    gradient = torch.func.grad(lambda x, y: value(x, y).square().sum(), argnums=(0, 1))
    for dim in (0, 1):
        looped = torch.stack([value(x, b) for x in a.unbind(dim)])
        torch.testing.assert_close(torch.func.vmap(value, (dim, None))(a, b), looped, rtol=1e-12, atol=1e-12)
        mapped = torch.func.vmap(gradient, (dim, None))(a, b)
        for part, expected in zip(mapped, zip(*(gradient(x, b) for x in a.unbind(dim)), strict=True), strict=True):
            torch.testing.assert_close(part, torch.stack(expected), rtol=1e-10, atol=1e-12)
    both = torch.func.vmap(value)(a, b.expand(3, 8, 2))
    torch.testing.assert_close(both, value(a, b), rtol=1e-12, atol=1e-12)
    nested = torch.func.vmap(torch.func.vmap(gradient, (0, None)), (0, None))(a, b)
    torch.testing.assert_close(nested[0], torch.func.vmap(gradient, (0, None))(a, b)[0], rtol=1e-10, atol=1e-12)
    outside = torch.func.grad(lambda x: torch.func.vmap(value, (0, None))(x, b).sum())(a)
    torch.testing.assert_close(outside, torch.func.grad(lambda x: value(x, b).sum())(a), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return 3 * smooth_knn(2 * x, y, 4, (1.0, 3.0))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (12, 17):
        a, b = points(n, 2).requires_grad_(), points(9, 2).requires_grad_()
        value, expected = compiled(a, b), loss(a, b)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, (a, b)), torch.autograd.grad(expected, (a, b)))


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient: bool) -> None:
    a, b = points(2 * 9, 2).reshape(2, 9, 2), points(2 * 7, 2).reshape(2, 7, 2)
    torch.library.opcheck(torch.ops.libi_fast.smooth_knn.default, (a, b, 3, [1.0, 4.0], gradient, "reference"))
    torch.library.opcheck(torch.ops.libi_fast.smooth_knn.default, (a.float(), b.float(), 1, [1.0], gradient, ""))
    strided = a.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    torch.library.opcheck(torch.ops.libi_fast.smooth_knn.default, (strided, b[:1].expand(2, 7, 2), 3, [1.0], gradient, ""))


def test_what_is_not_supported_says_so() -> None:
    a, b = points(6, 2).requires_grad_(), points(5, 2)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda x: smooth_knn(x, b, 3), (a.detach(),), (torch.ones(6, 2, dtype=torch.float64),))
    with pytest.raises(NotImplementedError, match="smooth_knn has no second derivative"):
        torch.autograd.functional.hessian(lambda x: smooth_knn(x, b, 3), a.detach())
    first = torch.autograd.grad(smooth_knn(a, b, 3), a, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="smooth_knn has no second derivative"):
        first.square().sum().backward()


Z = torch.eye(5)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (InputError, "a must have at least 2 dim", (torch.zeros(5), Z)),
        (InputError, r"b must hold at least 2 points of at least 1 dimension, got shape \(1, 5\)", (Z, Z[:1])),
        (InputError, r"a must hold at least 2 points.*\(0, 5\)", (Z[:0], Z)),
        (InputError, r"a must hold at least 2 points of at least 1 dimension, got shape \(5, 0\)", (Z[:, :0], Z[:, :0])),
        (InputError, "a has points of 5 dimensions but b of 4", (Z, Z[:, :4])),
        (InputError, "leading dimensions do not broadcast", (Z.expand(2, 5, 5), Z.expand(3, 5, 5))),
        (
            InputError,
            "a holds nan at row 3, column 1",
            (Z.index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(math.nan)), Z),
        ),
        (InputError, "b holds -inf at row 0, column 0", (Z, torch.full((5, 5), -math.inf))),
        (InputError, r"k must lie in 1 \.\. 9 \(all points but one\), got 10", (Z, Z, 10)),
        (InputError, r"k must lie in 1 \.\. 9", (Z, Z, 0)),
        (InputError, "alphas must be positive and finite, and at least one, got 0.0", (Z, Z, 3, 0.0)),
        (InputError, "alphas must be positive", (Z, Z, 3, [1.0, -1.0])),
        (InputError, "alphas must be positive", (Z, Z, 3, math.nan)),
        (InputError, "alphas must be positive", (Z, Z, 3, math.inf)),
        (InputError, "alphas must be positive and finite, and at least one", (Z, Z, 3, [])),
        (TypeError, "alphas must be a number or a sequence of numbers, got 'x'", (Z, Z, 3, "x")),
        (TypeError, "alphas must be a number or a sequence of numbers, got None", (Z, Z, 3, None)),
        (TypeError, "k must be an integer, got float", (Z, Z, 3.0)),
        (TypeError, "k must be an integer, got bool", (Z, Z, True)),
        (TypeError, "a must be float32 or float64, got int64", (Z.long(), Z)),
        (TypeError, r"b must be a torch\.Tensor, got ndarray", (Z, np.zeros((5, 5)))),
        (TypeError, "b is torch.float64 but a is torch.float32", (Z, Z.double())),
    ],
)
def test_bad_input(error: type, message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        smooth_knn(*arguments)


def test_a_backend_that_is_not_there() -> None:
    with pytest.raises(InputError, match="nonsense"):
        smooth_knn(Z, Z, 3, backend="nonsense")
    with pytest.raises(
        InputError, match="backend 'triton' was asked for smooth_knn, but "
    ):  # there is no GPU, or Z is not on it
        smooth_knn(Z, Z, 3, backend="triton")
