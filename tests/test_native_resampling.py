"""Sampling importance resampling in C++: against the reference, by its weights, the same bits whatever shares the work."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from common import check_same_bits_for_any_number_of_threads, check_same_bits_for_instruction_set
from problems import RESAMPLED, RESAMPLING_STREAM, Problem, native, problem, resampled_exactly
from torch import Tensor

from libi_fast.kernels import cpu
from libi_fast.kernels.importance import reference

if not cpu.available():
    pytest.skip(f"no compiled library: {cpu.why_unavailable()}", allow_module_level=True)

F32, F64 = torch.float32, torch.float64


def fused(p: Problem, count: int) -> dict[str, Tensor]:
    results = cpu.resampling(p.x, p.mean, p.log_scale, p.decoder, p.draws(), p.num_samples, p.tail, count, RESAMPLING_STREAM)
    return dict(zip(RESAMPLED, results, strict=True))


def check(p: Problem, count: int) -> None:
    p = p.to("cpu", F64)
    found, expected = fused(p, count), resampled_exactly(p, count)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("num_samples", [1, 2, 5, 32, 33, 64, 65, 1025])
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_samples_and_draws(num_samples: int, count: int) -> None:
    check(problem([2, 6, 3], rows=9, num_samples=num_samples, tail=min(3, num_samples)), count)


@pytest.mark.parametrize("rows", [1, 3])
def test_many_samples(rows: int) -> None:
    """Several segments and parts; with fewer rows than threads these are shared out."""
    check(problem([2, 6, 3], rows=rows, num_samples=40_000, tail=600), 300)


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_latents_and_replicas(latent_dim: int, likelihood: str) -> None:
    check(problem([latent_dim, 20, 7], "softplus", likelihood, rows=4, num_samples=130, replicas=2, own=2), 10)


def test_float32_has_the_sums_of_importance_to_the_bit() -> None:
    for num_samples in (20, 200):
        p = problem([2, 50, 2], rows=8, num_samples=num_samples, tail=5)
        found, sums = fused(p, 3), native(p, F32)
        assert all(torch.equal(found[name], sums[name]) for name in RESAMPLED[:3])
        rounded = resampled_exactly(p, 3)
        assert (found["mean"].double() - rounded["mean"]).abs().max() < 1e-5
        assert (found["covariance"].double() - rounded["covariance"]).abs().max() < 1e-5


def test_a_narrow_posterior_under_a_wide_proposal_keeps_its_covariance() -> None:
    """Standard deviations of 1e-3 about a mean of 1, from a proposal of 1: sums about anything but the posterior lose it."""
    p = problem([1, 1], rows=1, num_samples=400_000, diagonal=False, bias=False)
    p.decoder.weights[0].fill_(1)
    p.decoder.variance.fill_(1e-6)
    p.x.fill_(1), p.mean.zero_(), p.log_scale.zero_()
    found = fused(p, 5)
    assert found["effective_sample_size"] > 300
    assert abs(float(found["mean"]) - 1) < 4 * 1e-3 / math.sqrt(300)
    assert float(found["covariance"]) == pytest.approx(1e-6, rel=0.3)
    truth = resampled_exactly(p, 5)["covariance"]
    assert float(found["covariance"]) == pytest.approx(float(truth), rel=1e-3)


def test_draws_come_as_often_as_their_weights_say() -> None:
    from scipy import stats

    p = problem([2, 5, 3], rows=1, num_samples=12).to("cpu", F64)
    count = 20_000
    z = fused(p, count)["z"][0, 0, :, 0]
    noise = p.draws().noise(slice(0, 1), slice(0, 12), 2, F64)
    codes = (p.mean[:, :, None] + p.log_scale[:, :, None].exp() * noise)[0, 0]
    output = p.decoder.run(codes[None])[-1][1][:, None]
    log_weights = p.decoder.log_prob(p.x[:, :, None], output) + reference.log_prior_over_proposal(
        codes, noise[0, 0], p.log_scale[0]
    )  # fmt: skip
    expected = torch.softmax(log_weights[0, 0], -1) * count
    observed = torch.tensor([float(((z - c).abs() < 1e-9).sum()) for c in codes[:, 0]], dtype=F64)
    assert observed.sum() == count
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_fewer_draws_are_the_first_of_more() -> None:
    p = problem([2, 6, 3], num_samples=100)
    assert torch.equal(fused(p, 5)["z"], fused(p, 50)["z"][:, :, :5])


def test_rows_alone_and_rows_without_weight() -> None:
    for num_samples in (10, 100):
        p = problem([2, 6, 3], rows=6, num_samples=num_samples)
        p.x[0, 2] = 1e30  # no sample has any weight
        whole = fused(p, 4)
        assert whole["log_likelihood"][0, 2] == -math.inf and whole["z"].isfinite().all()
        for row in range(6):
            alone = fused(p.rows(slice(row, row + 1)), 4)
            for name in RESAMPLED:
                assert torch.equal(alone[name].nan_to_num(9.0), whole[name][:, row : row + 1].nan_to_num(9.0)), name


def digest() -> str:
    torch.manual_seed(5)
    found = []
    for rows, samples, dtype in ((7, 12, F32), (7, 1500, F32), (7, 100, F64), (1, 35_000, F32), (2, 1500, F64)):
        result = fused(problem([3, 20, 6], "gelu", rows=rows, num_samples=samples, tail=9).to("cpu", dtype), 9)
        found += [t.numpy().tobytes() for t in result.values()]
    return hashlib.sha256(b"".join(found)).hexdigest()


def test_same_bits_for_any_number_of_threads() -> None:
    check_same_bits_for_any_number_of_threads(digest)


@pytest.mark.parametrize("isa", ["v3", "v4"])
def test_same_bits_for_instruction_sets(isa: str) -> None:
    check_same_bits_for_instruction_set(isa, "test_native_resampling", digest)
