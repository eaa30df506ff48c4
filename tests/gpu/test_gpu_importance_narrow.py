"""The fused importance-weighted log-likelihood of narrow decoders against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from problems import Problem, check, exact, fused, problem

import libi_fast as lf
from libi_fast.kernels import tuning
from libi_fast.kernels.importance import gpu_narrow
from libi_fast.kernels.importance.reference import ACTIVATIONS, GRADIENTS


@pytest.fixture
def small_pieces(monkeypatch):
    """Several spans, items of a program and slabs of log-weights at sizes an interpreter can do."""
    monkeypatch.setattr(gpu_narrow, "SHORTEST", 64)
    monkeypatch.setattr(gpu_narrow, "PROGRAMS", 2)
    monkeypatch.setattr(gpu_narrow, "SLAB", 128)


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_likelihood_and_gradient(device, activation, likelihood, kind):
    check(problem([2, 6, 3], activation, likelihood, kind=kind, num_samples=10, tail=2), device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_activations(device, activation):
    check(problem([2, 4, 2], "tanh", "gaussian", output=activation), device)


@pytest.mark.parametrize(("hidden", "latent_dim"), [(1, 1), (13, 2), (1, 4), (13, 7), (0, 2), (0, 7), (1, 3)])
def test_shapes(device, small_pieces, hidden, latent_dim):
    """Every grouping of draws, ragged rows and samples, several spans, programs and items each, padded units."""
    widths = [latent_dim, hidden, 8 - latent_dim] if hidden else [latent_dim, 8 - latent_dim]
    p = problem(widths, "sigmoid", rows=5, num_samples=151, replicas=2, own=2, tail=4, bias=hidden != 1)
    assert gpu_narrow.takes(p.decoder)
    check(p, device)


@pytest.mark.parametrize("own", [1, 3])
def test_replicas(device, small_pieces, own):
    """Parameters of each replica, or shared by all; every replica has its own draws."""
    p = problem([2, 4, 2], "elu", "bernoulli", rows=2, replicas=3, own=own, diagonal=False)
    found = check(p._replace(x=p.x[:1].expand(3, -1, -1)), device)
    assert found["log_likelihood"].unique().numel() == 6


def test_data_shared_by_replicas(device):
    p = problem([2, 4, 2], rows=3, replicas=2)
    check(p._replace(x=p.x[:1]), device)


@pytest.mark.parametrize("num_samples", [1, 2, 2049])
def test_few_and_many_samples(device, num_samples):
    check(problem([2, 2, 2], "relu", rows=2, num_samples=num_samples, tail=min(5, num_samples)), device)


def test_what_is_kept_of_a_row_does_not_grow_with_its_samples(device, small_pieces, monkeypatch):
    assert [gpu_narrow._span(s) for s in (1, 64, 65, 64 * 64, 64 * 64 + 1, 64 * 200)] == [64, 64, 64, 64, 128, 256]
    monkeypatch.setattr(gpu_narrow, "SPANS", 2)
    check(problem([2, 4, 2], rows=2, num_samples=300, tail=4), device)


def test_gradients_nobody_reads_are_zero_and_move_no_other(device):
    p = problem([2, 4, 2])
    whole, part = fused(p, device), fused(p._replace(wanted=(False, False, True)), device)
    assert not part["to_x"].any() and not part["to_variance"].any()
    for name in whole.keys() - {"to_x", "to_variance"}:
        assert torch.equal(whole[name], part[name]), name


def test_no_rows(device):
    found = fused(problem([2, 4, 2], rows=0, tail=3), device)
    assert found["log_likelihood"].shape == (1, 0) and found["top"].shape == (1, 0, 3)
    assert found["to_weight_0"].shape == (1, 4, 2) and not found["to_weight_0"].any()


def test_a_row_gives_the_same_bits_in_any_company(device, small_pieces):
    p = problem([3, 6, 2], rows=9, num_samples=150, tail=3)
    whole, part = fused(p, device), fused(p.rows(slice(4, 7)), device)
    for name in ("log_likelihood", "effective_sample_size", "top", "to_x", "to_mean", "to_log_scale"):
        assert torch.equal(whole[name][:, 4:7], part[name]), name


def test_the_size_of_slabs_moves_no_bit(device, small_pieces, monkeypatch):
    p = problem([2, 6, 2], rows=3, num_samples=150, tail=3)
    before = fused(p, device)
    monkeypatch.setattr(gpu_narrow, "SLAB", 2**20)
    after = fused(p, device)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_strided_inputs(device):
    p = problem([2, 4, 3], rows=4)
    wide = torch.stack((p.mean, p.mean + 1), -1)[..., 0]
    assert not wide.is_contiguous()
    strided = p._replace(mean=wide, x=p.x.mT.contiguous().mT, grad=torch.stack((p.grad, p.grad), -1)[..., 0])
    a, b = fused(p, device), fused(strided, device)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_rows_that_are_lost_harm_no_other(device):
    """A row that no sample explains has likelihood zero and no gradient; a NaN stays in its row and in what all rows share."""
    p = problem([2, 4, 2], rows=4)
    p.x[0, 1] = 1e30
    found = check_finite_rows(p, device, [0, 2, 3])
    assert found["log_likelihood"][0, 1] == -float("inf") and found["effective_sample_size"][0, 1] == 0
    assert not found["to_mean"][0, 1].any() and torch.isfinite(found["to_weight_0"]).all()
    p.x[0, 1] = float("nan")
    found = check_finite_rows(p, device, [0, 2, 3])
    assert found["log_likelihood"][0, 1].isnan() and found["to_mean"][0, 1].isnan().all()
    assert found["to_weight_0"].isnan().all()


def check_finite_rows(p: Problem, device: torch.device, rows: list[int]) -> dict[str, torch.Tensor]:
    found, truth = fused(p, device), exact(p)
    for name in ("log_likelihood", "effective_sample_size", "to_mean", "to_log_scale", "to_x"):
        torch.testing.assert_close(found[name][:, rows].cpu().double(), truth[name][:, rows], rtol=1e-4, atol=1e-5)
    return found


def test_far_from_the_data_the_pivot_keeps_the_sum(device):
    """Log-weights near -1e4, where exp alone would give zero."""
    p = problem([2, 6, 2], rows=2, num_samples=300)
    p = p._replace(decoder=p.decoder._replace(variance=torch.full((1, 2), 1e-4)))
    assert exact(p)["log_likelihood"].max() < -100
    check(p, device)


# --- as a user calls it ---


def user_model(noise: lf.DiagonalGaussian | lf.Bernoulli, seed: int = 0) -> lf.LatentVariableModel:
    torch.manual_seed(seed)
    return lf.LatentVariableModel(lf.mlp(2, [6], 3), noise, latent_dim=2)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("noise", [lf.DiagonalGaussian(0.3, learned=True), lf.Bernoulli()], ids=["gaussian", "bernoulli"])
def test_log_likelihood(device, noise, gradient):
    def solve(backend: str, where: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        model = user_model(noise).to(where, dtype)
        x = torch.rand(5, 3, generator=torch.Generator().manual_seed(1)).to(where, dtype).requires_grad_()
        mean = x[:, :2].sin()
        estimate = lf.log_likelihood(
            model, x, proposal=(mean, mean.cos() - 1), num_samples=70, seed=3, gradient=gradient, backend=backend
        )
        inputs = [x, *model.parameters()]
        grads = torch.autograd.grad(estimate.log_likelihood.sum(), inputs)
        return [t.detach().cpu().double() for t in (*estimate, *grads) if isinstance(t, torch.Tensor)]

    found = solve("triton", device, torch.float32)
    truth = solve("reference", torch.device("cpu"), torch.float64)
    assert len(found) == len(truth) > 6
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_float64_is_refused_by_name(device):
    model = user_model(lf.Bernoulli()).to(device, torch.float64)
    x = torch.rand(2, 3, dtype=torch.float64, device=device)
    with pytest.raises(lf.InputError, match=r"'triton' was asked for importance, but it computes in float32"):
        lf.log_likelihood(model, x, proposal=(x[:, :2], x[:, :2]), num_samples=4, backend="triton")


def test_tuning_moves_results_by_rounding_alone(device, monkeypatch, tmp_path):
    p = problem([2, 6, 2], num_samples=150, tail=3)
    fixed = check(p, device)
    monkeypatch.setenv("LIBI_FAST_TUNE", "1")
    monkeypatch.setenv("LIBI_FAST_TUNING_FILE", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(gpu_narrow, "_candidates", lambda fixed: [{"warps": 1, "per_thread": n} for n in (8, 2)])
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: -next(order) if run() is not None else 0)
    order = iter(range(8))
    tuned = check(p, device)
    assert order.__next__() == 4  # two kernels, two candidates each, the second taken
    assert not torch.equal(fixed["to_weight_0"], tuned["to_weight_0"])
    torch.testing.assert_close(fixed["top"], tuned["top"], rtol=1e-6, atol=1e-6)
