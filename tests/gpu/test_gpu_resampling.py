"""Sampling importance resampling in Triton against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from problems import RESAMPLED, Problem, fused, problem, resampled_exactly, resampling_uniforms
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels.importance import gpu_resampling

IGNORED = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter


def resampled(p: Problem, device: torch.device, count: int) -> dict[str, Tensor]:
    p = p.to(device, torch.float32)

    def uniforms(rows: slice) -> Tensor:
        return resampling_uniforms(p.to("cpu", torch.float32), count, torch.float32)(rows).to(device)

    results = gpu_resampling.forward_and_resample(
        p.x, p.mean, p.log_scale, p.decoder, p.draws(), p.num_samples, p.tail, p.precision, uniforms, count
    )
    return dict(zip(RESAMPLED, (r.cpu() for r in results), strict=True))


def check(p: Problem, device: torch.device, count: int) -> dict[str, Tensor]:
    """Every draw is the sample that float64 takes: none of these numbers lies within rounding of a boundary."""
    found, truth = resampled(p, device, count), resampled_exactly(p, count)
    for name, value in truth.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    return found


@pytest.fixture
def small_pieces(monkeypatch):
    """Several blocks of rows, steps of the running sum and turns of choosing at sizes an interpreter can do."""
    monkeypatch.setattr(gpu_resampling, "HELD", 512)
    monkeypatch.setattr(gpu_resampling, "STEP", 64)
    monkeypatch.setattr(gpu_resampling, "DRAWS", 16)


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 4, 8])
def test_latents(device, small_pieces, latent_dim):
    """Every grouping of draws, narrow and wide decoders, ragged samples and draws, blocks of rows, replicas."""
    p = problem([latent_dim, 6, 3], "sigmoid", rows=5, num_samples=151, replicas=2, own=2, tail=4)
    check(p, device, 35)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_more_latents_than_registers_hold(device, small_pieces, likelihood):
    check(problem([11, 20, 7], "softplus", likelihood, rows=3, num_samples=130, tail=2), device, 10)


@pytest.mark.parametrize("num_samples", [1, 2, 64, 65])
@pytest.mark.parametrize("count", [0, 1, 17])
def test_few_samples_and_draws(device, small_pieces, num_samples, count):
    check(problem([2, 4, 2], rows=3, num_samples=num_samples, tail=1), device, count)


def test_the_sums_are_those_of_importance_to_the_bit(device):
    p = problem([2, 6, 2], rows=4, num_samples=200, tail=5)
    found, sums = resampled(p, device, 3), fused(p, device)
    assert all(torch.equal(found[name], sums[name].cpu()) for name in RESAMPLED[:3])


def test_blocks_of_rows_move_no_bit(device, small_pieces, monkeypatch):
    p = problem([3, 6, 2], rows=7, num_samples=150, tail=3)
    whole, part = resampled(p, device, 20), resampled(p.rows(slice(2, 5)), device, 20)
    monkeypatch.setattr(gpu_resampling, "HELD", 2**20)
    together = resampled(p, device, 20)
    for name in RESAMPLED:
        assert torch.equal(whole[name], together[name]) and torch.equal(whole[name][:, 2:5], part[name]), name


def test_frequencies_are_the_weights(device):
    """One row, few samples, many draws: how often each is chosen against its weight (chi-square, 4 standard deviations)."""
    p = problem([1, 1], rows=1, num_samples=8)
    found, draws = resampled(p, device, 20_000), p.draws()
    noise = draws.noise(slice(0, 1), slice(0, 8), 1, torch.float64)
    z = (p.mean[:, :, None].double() + p.log_scale[:, :, None].double().exp() * noise)[0, 0, :, 0]
    top = resampled(p._replace(tail=8), device, 0)["top"][0, 0].double()
    counts = (found["z"][0, 0, :, 0].double()[:, None] - z).abs().argmin(1).bincount(minlength=8)
    expected = 20_000 * top.softmax(0)
    usual = expected > 5
    chi = ((counts.sort(descending=True).values - expected).square() / expected)[usual].sum()
    assert chi < usual.sum() + 4 * math.sqrt(2 * int(usual.sum()))


def test_a_narrow_posterior_under_a_wide_proposal_keeps_its_covariance(device):
    p = problem([1, 1], rows=1, num_samples=20_000, diagonal=False, bias=False)
    p.decoder.weights[0].fill_(1)
    p.decoder.variance.fill_(1e-4)
    p.x.fill_(1), p.mean.zero_(), p.log_scale.zero_()
    found = resampled(p, device, 5)
    size = float(found["effective_sample_size"])
    assert size > 100
    assert abs(float(found["mean"]) - 1) < 4 * 1e-2 / math.sqrt(size)
    assert abs(float(found["covariance"]) / 1e-4 - 1) < 4 * math.sqrt(2 / size)


@IGNORED
def test_rows_that_are_lost_harm_no_other(device):
    p = problem([2, 4, 2], rows=4, num_samples=40, tail=2)
    whole = resampled(p, device, 6)
    for value in (1e30, math.nan):
        p.x[0, 1] = value
        found = resampled(p, device, 6)
        for name in RESAMPLED:
            assert torch.equal(found[name][:, [0, 2, 3]], whole[name][:, [0, 2, 3]]), name
        assert found["mean"][0, 1].isnan().all() and found["covariance"][0, 1].isnan().all()
        assert torch.equal(found["z"][0, 1], found["z"][0, 1, :1].expand(6, -1))  # the first sample
        assert torch.isfinite(found["z"]).all()


def test_no_rows(device):
    found = resampled(problem([2, 4, 2], rows=0, tail=3), device, 5)
    assert found["z"].shape == (1, 0, 5, 2) and found["covariance"].shape == (1, 0, 2, 2) and found["top"].shape == (1, 0, 3)


@pytest.mark.filterwarnings("ignore::libi_fast.ParetoWarning")  # the prior proposes
@pytest.mark.parametrize("latent_dim", [2, 9])
def test_sample_posterior(device, latent_dim):
    """As a user calls it: the same draws as in float64 on the CPU."""
    torch.manual_seed(0)
    model = lf.LatentVariableModel(lf.mlp(latent_dim, [6], 3), lf.DiagonalGaussian(0.3), latent_dim=latent_dim)
    x = torch.rand(3, 3)

    def draw(backend: str, where: torch.device | str, dtype: torch.dtype) -> lf.PosteriorSamples:
        moved, data = model.to(where, dtype), x.to(where, dtype)
        return lf.sample_posterior(moved, data, num_samples=12, method="sir", num_candidates=300, seed=3, backend=backend)

    found, truth = draw("triton", device, torch.float32), draw("reference", "cpu", torch.float64)
    torch.testing.assert_close(found.z.cpu().double(), truth.z, rtol=1e-4, atol=1e-5)
