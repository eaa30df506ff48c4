"""log_mean_exp: values against scipy, gradients, odd rows, and everything an operator promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels import cpu

INF, NAN = math.inf, math.nan
NATIVE = pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason=f"no library: {cpu.why_unavailable()}"))
both_backends = pytest.mark.parametrize("backend", ["reference", NATIVE])
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def expected_of(x: Tensor) -> Tensor:
    return torch.as_tensor(logsumexp(x.double().numpy(), axis=-1)) - math.log(x.shape[-1])


def random_rows(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 5.0) -> Tensor:
    return spread * torch.randn(*shape, dtype=dtype)


@both_backends
@both_types
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (4, 5), (2, 3, 1000), (2, 5000)])
@pytest.mark.parametrize("offset", [0.0, -1e6, 1e6, -1e4])
def test_against_scipy(shape: tuple[int, ...], offset: float, dtype: torch.dtype, backend: str) -> None:
    x = random_rows(*shape, dtype=dtype) + offset
    found = lf.log_mean_exp(x, backend=backend)
    assert found.dtype == dtype
    assert found.shape == shape[:-1]
    scale = max(1.0, abs(offset))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected_of(x), rtol=tolerance, atol=tolerance * scale)


@both_backends
@given(values=st.lists(st.floats(-700, 700), min_size=1, max_size=40), shift=st.integers(-(2**20), 2**20))
@settings(max_examples=60, deadline=None)
def test_shift_invariance(backend: str, values: list[float], shift: int) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    plain = lf.log_mean_exp(x, backend=backend)
    torch.testing.assert_close(lf.log_mean_exp(x + shift, backend=backend), plain + shift, rtol=1e-14, atol=1e-9)
    assert float(x.max()) - math.log(len(values)) - 1e-9 <= float(plain) <= float(x.max()) + 1e-9


@both_backends
def test_a_mean_and_no_sum(backend: str) -> None:
    torch.testing.assert_close(lf.log_mean_exp(torch.full((3, 17), 2.5), backend=backend), torch.full((3,), 2.5))
    assert float(lf.log_mean_exp(torch.tensor([3.25]), backend=backend)) == 3.25


@both_backends
@both_types
def test_infinite_and_nan_rows(dtype: torch.dtype, backend: str) -> None:
    x = torch.tensor(
        [[-INF, -INF, -INF], [INF, 0, INF], [INF, -INF, 0], [NAN, 0, 1], [NAN, INF, 0], [0, -INF, -INF], [1, 2, 3]],
        dtype=dtype, requires_grad=True,
    )  # fmt: skip
    out = lf.log_mean_exp(x, backend=backend)
    last = float(expected_of(x.detach()[-1]))
    expected = torch.tensor([-INF, INF, INF, NAN, NAN, -math.log(3), last], dtype=dtype)
    torch.testing.assert_close(out, expected, equal_nan=True)
    grad = torch.autograd.grad(out.sum(), x)[0]
    # Nothing to share where no weight is; equal shares among infinite weights; one bad row leaves the others alone.
    torch.testing.assert_close(grad[0], torch.zeros(3, dtype=dtype), rtol=0, atol=0)
    torch.testing.assert_close(grad[1], torch.tensor([0.5, 0, 0.5], dtype=dtype))
    torch.testing.assert_close(grad[2], torch.tensor([1.0, 0, 0], dtype=dtype))
    assert bool(grad[3:5].isnan().all())
    torch.testing.assert_close(grad[5], torch.tensor([1.0, 0, 0], dtype=dtype))
    torch.testing.assert_close(grad[6], torch.softmax(x.detach()[6], -1))


@both_backends
def test_gradient(backend: str) -> None:
    x = random_rows(3, 4, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: lf.log_mean_exp(t, backend=backend), x)
    grad = torch.randn(3, 4, dtype=torch.float64)
    found = torch.autograd.grad(lf.log_mean_exp(x, backend=backend), x, grad)[0]
    torch.testing.assert_close(found, grad[..., None] * torch.softmax(x.detach(), -1), rtol=1e-13, atol=1e-15)


@both_backends
def test_strided_input(backend: str) -> None:
    base = random_rows(6, 8, 10)
    for view in (base.mT, base[::2, :, ::3], base.permute(2, 0, 1), base[:, :1].expand(6, 5, 10), base[0, 0].expand(2, 10)):
        x = view.detach().clone().requires_grad_()
        strided = view.detach().requires_grad_()
        out = lf.log_mean_exp(strided, backend=backend)
        torch.testing.assert_close(out, expected_of(view), rtol=1e-14, atol=1e-14)
        weight = torch.arange(out.numel(), dtype=torch.float64).reshape(out.shape).mT if out.dim() > 1 else out.detach()
        weight = weight.contiguous().reshape(out.shape)
        found = torch.autograd.grad(out, strided, weight)[0]
        dense = torch.autograd.grad(lf.log_mean_exp(x, backend=backend), x, weight)[0]
        torch.testing.assert_close(found, dense, rtol=0, atol=0)


@both_backends
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 1)])
def test_empty_batch(shape: tuple[int, ...], backend: str) -> None:
    x = torch.empty(shape, requires_grad=True)
    out = lf.log_mean_exp(x, backend=backend)
    assert out.shape == shape[:-1]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@both_backends
def test_bad_input(backend: str) -> None:
    for shape in [(0,), (4, 0), (0, 0)]:
        with pytest.raises(lf.InputError, match="log_weights has no samples"):
            lf.log_mean_exp(torch.empty(shape), backend=backend)
    with pytest.raises(lf.InputError, match="log_weights must have at least 1 dim"):
        lf.log_mean_exp(torch.tensor(1.0), backend=backend)
    for dtype in (torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.complex64):
        with pytest.raises(TypeError, match=f"log_weights must be float32 or float64, got {str(dtype)[6:]}"):
            lf.log_mean_exp(torch.zeros(2, 3, dtype=dtype), backend=backend)
    with pytest.raises(TypeError, match=r"log_weights must be a torch\.Tensor, got list"):
        lf.log_mean_exp([1.0, 2.0], backend=backend)  # type: ignore[arg-type]


def test_a_backend_that_is_not_there() -> None:
    with pytest.raises(lf.InputError, match=r"backend must be one of.*'nonsense'"):
        lf.log_mean_exp(torch.zeros(3), backend="nonsense")
    with pytest.raises(lf.InputError, match="'triton' was asked for log_mean_exp, but"):
        lf.log_mean_exp(torch.zeros(3), backend="triton")
    with lf.use_backend("triton"), pytest.raises(lf.InputError, match="'triton' was asked for log_mean_exp, but"):
        lf.log_mean_exp(torch.zeros(3))


def test_the_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cpu, "why_unavailable", lambda: "no compiler was found")
    with pytest.raises(lf.InputError, match="no compiler was found"):
        lf.log_mean_exp(torch.zeros(3), backend="cpu")
    torch.testing.assert_close(lf.log_mean_exp(torch.zeros(3)), torch.tensor(0.0))  # the reference serves unasked


@both_backends
def test_opcheck(backend: str) -> None:
    x = random_rows(2, 3, 4)
    out = lf.log_mean_exp(x, backend=backend)
    torch.library.opcheck(torch.ops.libi_fast.log_mean_exp.default, (x, backend))
    torch.library.opcheck(torch.ops.libi_fast.log_mean_exp_backward.default, (torch.ones_like(out), x, out, backend))
    torch.library.opcheck(torch.ops.libi_fast.log_mean_exp.default, (x.mT, backend))


@both_backends
def test_vmap_equals_the_loop(backend: str) -> None:
    x = random_rows(3, 5, 4, 6)

    def gradient(t: Tensor) -> Tensor:
        return torch.func.grad(lambda u: lf.log_mean_exp(u, backend=backend).square().sum())(t)

    for dim in range(3):
        mapped = torch.func.vmap(lambda t: lf.log_mean_exp(t, backend=backend), dim)(x)
        torch.testing.assert_close(mapped, lf.log_mean_exp(x.movedim(dim, 0), backend=backend), rtol=1e-15, atol=1e-15)
        looped = torch.stack([gradient(t) for t in x.unbind(dim)])
        torch.testing.assert_close(torch.func.vmap(gradient, dim)(x), looped, rtol=1e-15, atol=1e-15)
    # The last dimension mapped: every element must still be reduced over its own samples.
    mapped = torch.func.vmap(lambda t: lf.log_mean_exp(t, backend=backend), 3)(x)
    torch.testing.assert_close(mapped, lf.log_mean_exp(x.movedim(3, 0).contiguous(), backend=backend), rtol=1e-15, atol=1e-15)
    twice = torch.func.vmap(torch.func.vmap(gradient))(x)
    torch.testing.assert_close(twice, torch.stack([torch.stack([gradient(u) for u in t]) for t in x]))


@both_backends
def test_compile(backend: str) -> None:
    def loss(t: Tensor) -> Tensor:
        return (2 * lf.log_mean_exp(t * 3, backend=backend)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in [(4, 6), (5, 9)]:
        x = random_rows(*shape).requires_grad_()
        value, expected = compiled(x), loss(x)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(expected, x))


def test_what_is_not_supported_says_so() -> None:
    x = random_rows(2, 3)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lf.log_mean_exp, (x,), (torch.ones_like(x),))
    with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        lf.log_mean_exp(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    # Second derivatives would silently be zero with once_differentiable alone.
    x.requires_grad_()
    first = torch.autograd.grad(lf.log_mean_exp(x).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="log_mean_exp has no second derivative"):
        first.square().sum().backward()
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.jacrev(torch.func.grad(lambda t: lf.log_mean_exp(t).sum()))(x.detach())
