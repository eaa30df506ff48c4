"""Draws from p(z | x): closed forms, simulation-based calibration, the integrator, and what happens to bad input."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import curved, unknown
from scipy import stats
from torch import Tensor, nn

import libi_fast as lf
from libi_fast import posterior
from libi_fast.data import GaussianExample, LinearJTEx, wine
from libi_fast.kernels import cpu as native
from libi_fast.kernels.chains import reference
from libi_fast.kernels.chains.reference import Settings
from libi_fast.metrics.convergence import effective_sample_size
from libi_fast.models.laplace import log_joint_and_gradient
from libi_fast.models.networks import recognise_model
from libi_fast.ops import chains as op
from libi_fast.ops import importance

F64 = torch.float64
CHAINS = ("hmc", "mala", "random-walk")


def jtex() -> tuple[lf.LatentVariableModel, Tensor]:
    data = LinearJTEx(seed=3, dtype=F64)
    model = data.model()
    model.decoder.a.data.copy_(torch.tensor([[0.75, 0.25], [1.5, -1.0]]))
    return model, data.test[:30]


def gaussian() -> tuple[lf.LatentVariableModel, Tensor]:
    data = GaussianExample(seed=3, dtype=F64)
    model = data.model()
    model.decoder.weight.data.copy_(data.truth.weight)
    return model, data.test[:30]


def wines() -> tuple[lf.LatentVariableModel, Tensor]:
    """Probabilistic PCA with 3 latents of standardised data, at its maximum likelihood (Tipping & Bishop 1999)."""
    x = wine(dtype=F64).train
    x = (x - x.mean(0)) / x.std(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    noise = values[:-3].mean()
    decoder = nn.Linear(3, x.shape[1], dtype=F64)
    decoder.weight.data = vectors[:, -3:] * (values[-3:] - noise).sqrt()
    decoder.bias.data.zero_()
    return lf.LatentVariableModel(decoder, lf.Gaussian(float(noise)), 3), x[:30]


# --- known answers ---


@pytest.mark.parametrize("method", CHAINS)
@pytest.mark.parametrize("problem", [jtex, gaussian, wines])
def test_chains_have_the_closed_forms_moments(problem: Callable[[], Any], method: str) -> None:
    model, x = problem()
    mean, covariance = lf.exact_posterior(model, x)
    thinning = {"hmc": 1, "mala": 4, "random-walk": 10}[method]
    found = lf.sample_posterior(model, x, 4000, method, seed=5, chains=8, thinning=thinning)
    sd = covariance.diagonal().sqrt()
    assert ((found.mean - mean).abs() <= 4 * sd / found.effective_sample_size.sqrt()).all()
    z = (found.z - mean[:, None]) / sd
    products = (z[..., :, None] * z[..., None, :]).unflatten(1, (8, -1)).flatten(3)
    correlation = covariance / (sd[:, None] * sd)
    spread = (1 + correlation.square()).sqrt() / effective_sample_size(products, "mean").sqrt().unflatten(1, (len(sd), -1))
    assert ((products.mean((1, 2)).unflatten(1, (len(sd), -1)) - correlation).abs() <= 4 * spread).all()
    assert found.r_hat.max() < 1.02 and found.divergences.sum() == 0 and not found.failed.any()
    if method == "hmc":
        assert found.r_hat.max() < 1.01


@pytest.mark.parametrize("problem", [jtex, gaussian, wines])
def test_resampling_has_the_closed_forms_moments(problem: Callable[[], Any]) -> None:
    model, x = problem()
    mean, covariance = lf.exact_posterior(model, x)
    q = lf.FullCovariance(mean, torch.linalg.cholesky(1.3 * covariance).expand(len(x), -1, -1))
    mean_field = lf.MeanField(mean, (1.5 * covariance.diagonal().sqrt()).log().expand_as(mean))
    for proposal in (q, mean_field):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lf.ParetoWarning)  # mean-field is poor on these; its moments are right all the same
            found = lf.sample_posterior(model, x, 2000, "sir", proposal, seed=5, num_candidates=20_000)
        sd, size = covariance.diagonal().sqrt(), found.effective_sample_size[:, None]
        assert ((found.mean - mean).abs() <= 4 * sd / size.sqrt()).all()
        scale = sd[:, None] * sd
        assert ((found.covariance - covariance).abs() <= 6 * scale * (2 / size[..., None]).sqrt()).all()
        drawn = 2000 / (1 + 2000 / size)  # draws repeat candidates
        assert ((found.z.mean(1) - mean).abs() <= 4 * sd / drawn.sqrt()).all()
    exact = lf.exact_log_likelihood(model, x)
    assert (lf.sample_posterior(model, x, 1, "sir", q, seed=1).log_likelihood - exact).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("method", [*CHAINS, "sir"])
def test_ranks_are_uniform(method: str, likelihood: str) -> None:
    """Simulation-based calibration (Talts et al. 2018): the rank of the code that x was made of among independent draws."""
    torch.manual_seed(2)
    noise = lf.Gaussian(0.1) if likelihood == "gaussian" else lf.Bernoulli()
    decoder = lf.mlp(2, [10], 3 if likelihood == "gaussian" else 12)
    for p in decoder.parameters():
        p.data *= 2
    model = lf.LatentVariableModel(decoder, noise, 2)
    draws, bins, count = 99, 20, 1000
    z = lf.philox_normal(11, count, 2, stream=200)
    output = model.decode(z).detach()
    x = noise.sample(output, (lf.philox_normal if likelihood == "gaussian" else lf.philox_uniform)(12, *output.shape))
    options: dict[str, Any] = {"num_candidates": 20_000} if method == "sir" else {"chains": draws}
    if method in ("mala", "random-walk"):
        options["warmup"] = 500
    found = lf.sample_posterior(model, x, draws, method, seed=13, **options)
    ranks = (found.z < z[:, None]).sum(1)
    for column in ranks.T:
        counts = np.histogram(column.numpy(), bins=bins, range=(0, draws + 1))[0]
        assert stats.chisquare(counts).pvalue > 0.01


# --- the integrator ---


def leapfrog(model: lf.LatentVariableModel, x: Tensor, z: Tensor, u: Tensor, step: float, steps: int):
    density = log_joint_and_gradient(model, x)
    value, gradient = density(slice(None), z[None])
    settings = Settings("hmc", 1, steps)
    h = torch.full_like(z[None], step)
    new_z, new_value, _, new_u = reference._propose(density, slice(None), z[None], gradient, u[None], h, settings)
    energy = 0.5 * (new_u.square() - u.square()).sum(-1) - (new_value - value)
    return new_z[0], new_u[0], energy[0]


def test_energy_error_is_of_second_order() -> None:
    model = curved().double()
    x = model.sample(50, seed=1).detach()
    z, u = torch.randn(2, 50, 4, 2, dtype=F64)
    errors = [leapfrog(model, x, z, u, 0.08 / k, 8 * k)[2].abs().mean() for k in (1, 2, 4)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_leapfrogs_are_reversible() -> None:
    model = curved().double()
    x = model.sample(50, seed=1).detach()
    z, u = torch.randn(2, 50, 4, 2, dtype=F64)
    there, momentum, _ = leapfrog(model, x, z, u, 0.1, 20)
    back, again, _ = leapfrog(model, x, there, -momentum, 0.1, 20)
    assert (there - z).abs().mean() > 0.3
    assert (back - z).abs().max() < 1e-10 and (again + u).abs().max() < 1e-10


# --- any decoder, blocks, shards, files ---


@pytest.mark.parametrize("method", CHAINS)
def test_any_other_decoder_takes_the_same_steps(method: str) -> None:
    model = curved().double()
    x = model.sample(5, seed=1).detach()
    options: dict[str, Any] = {"seed": 3, "warmup": 20, "chains": 3, "step_size": 0.1}
    fused = lf.sample_posterior(model, x, 30, method, **options)
    any_other = lf.sample_posterior(unknown(model), x, 30, method, **options)
    assert (fused.z - any_other.z).abs().max() < 1e-4  # warm-up's steps near the edge of stability multiply roundings
    assert (fused.log_density - any_other.log_density).abs().max() < 1e-3


def test_any_other_decoder_draws_the_same_candidates() -> None:
    model = curved().double()
    x = model.sample(5, seed=1).detach()
    fused = lf.sample_posterior(model, x, 30, "sir", seed=3)
    any_other = lf.sample_posterior(unknown(model), x, 30, "sir", seed=3)
    for name in ("z", "log_density", "mean", "covariance", "effective_sample_size", "log_likelihood", "pareto_k"):
        torch.testing.assert_close(getattr(fused, name), getattr(any_other, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["hmc", "sir"])
def test_blocks_shards_and_files_move_no_bit(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = curved()
    x = model.sample(11, seed=1).detach()
    options: dict[str, Any] = {"seed": 3, "warmup": 40, "num_candidates": 100}
    whole = lf.sample_posterior(model, x, 32, method, **options)
    monkeypatch.setattr(posterior, "VALUES_AT_ONCE", 500)
    streamed = lf.sample_posterior(model, x, 32, method, out=tmp_path / "z.npy", **options)
    shard = lf.sample_posterior(model, x[7:], 32, method, first_row=7, **options)
    for name in ("z", "log_density", "mean", "covariance", "effective_sample_size"):
        assert torch.equal(getattr(whole, name), getattr(streamed, name))
        assert torch.equal(getattr(whole, name)[7:], getattr(shard, name))
    assert np.array_equal(np.load(tmp_path / "z.npy"), whole.z.numpy())
    assert np.array_equal(np.load(tmp_path / "z.log_density.npy"), whole.log_density.numpy())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts what is mapped privately on Linux alone")
def test_draws_in_a_file_take_no_memory(tmp_path: Path) -> None:
    """40 MB of draws in 38 blocks, by a process that may take 24 MB more than it has after two."""
    program = """
import re, resource, sys, warnings
import torch
import libi_fast as lf
from libi_fast import posterior
torch.set_num_threads(1)
posterior.VALUES_AT_ONCE = 2**18
model = lf.LatentVariableModel(lf.mlp(1, [4], 2), lf.Gaussian(0.5), 1)
x = model.sample(1200, seed=0).detach()
run = lambda x, **more: lf.sample_posterior(model, x, 4096, "random-walk", seed=1, chains=64, warmup=8, **more)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    run(x[:64])
    taken = 1024 * int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])
    resource.setrlimit(resource.RLIMIT_DATA, (taken + 24 * 2**20,) * 2)
    found = run(x, out=sys.argv[1])
print(found.z.numel(), found.log_density.numel())
"""
    path = tmp_path / "z.npy"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(1200 * 4096)] * 2
    assert path.stat().st_size > 19e6 and (tmp_path / "z.log_density.npy").stat().st_size > 19e6


def test_seed_none_follows_torch() -> None:
    model = curved()
    x = model.sample(2, seed=1).detach()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(lf.sample_posterior(model, x, 4, warmup=5).z)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_starts_and_first_scales_come_from_the_proposal() -> None:
    model, x = gaussian()
    mean, covariance = lf.exact_posterior(model, x)
    mean_field = lf.closest_mean_field(model, x)
    full = lf.FullCovariance(mean, torch.linalg.cholesky(covariance).expand(len(x), -1, -1))
    for proposal in (mean_field, full):
        found = lf.sample_posterior(model, x, 1000, proposal=proposal, seed=2, warmup=40)
        assert found.r_hat.max() < 1.05 and found.divergences.sum() == 0
    far = lf.sample_posterior(model, x, 4, "random-walk", proposal=(mean + 5, mean * 0 - 9), seed=2, warmup=0, step_size=1e-9)
    assert (far.z - mean[:, None] - 5).abs().max() < 0.01
    torch.testing.assert_close(far.scale, torch.full_like(mean, math.exp(-9)))
    spread = lf.sample_posterior(model, x, 4, "random-walk", full, seed=2, warmup=0, step_size=1e-9)
    assert spread.scale is not None
    off = (spread.scale / covariance.diagonal().sqrt()).log() * math.sqrt(2 * (posterior.SCALE_DRAWS - 1))
    assert off.abs().max() < 4.5 and 0.8 < off.std() < 1.2  # of 60, in standard errors


@pytest.mark.parametrize("out", [None, "z.npy"])
def test_data_of_no_rows(out: str | None, tmp_path: Path) -> None:
    model = curved()
    for method in ("hmc", "sir"):
        for any_model in (model, unknown(model)):
            found = lf.sample_posterior(any_model, torch.empty(0, 3), 8, method, seed=1, out=out and tmp_path / out)
            assert found.z.shape == (0, 8, 2) and found.log_density.shape == (0, 8)
            assert found.mean.shape == (0, 2) and found.covariance.shape == (0, 2, 2)


def test_model_keeps_its_mode_and_gradients() -> None:
    model = curved().train()
    x = model.sample(2, seed=1).detach()
    found = lf.sample_posterior(unknown(model), x, 4, seed=1, warmup=4)
    assert model.training and not found.z.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("likelihood", [lf.Gaussian(0.1), lf.Bernoulli()])
def test_inference_mode(likelihood: lf.Likelihood) -> None:
    """Gradients to codes are taken all the same, though x was made in it."""
    model = unknown(lf.LatentVariableModel(lf.mlp(2, [10], 3), likelihood, 2))
    x = torch.rand(2, 3)
    expected = lf.sample_posterior(model, x, 8, seed=1, warmup=4)
    with torch.inference_mode():
        found = lf.sample_posterior(model, x + 0, 8, seed=1, warmup=4)
    assert torch.equal(found.z, expected.z) and not found.z.is_inference()


def test_arviz_agrees() -> None:
    arviz = pytest.importorskip("arviz")
    model = curved()
    x = model.sample(3, seed=1).detach()
    found = lf.sample_posterior(model, x, 400, "mala", seed=1)
    data = found.to_arviz()
    assert data.posterior["z"].dims == ("chain", "draw", "row", "latent")
    assert data.sample_stats["lp"].shape == (4, 100, 3)
    assert np.allclose(arviz.rhat(data)["z"], found.r_hat, atol=1e-4)
    assert np.allclose(arviz.ess(data)["z"], found.effective_sample_size, rtol=1e-3)
    assert np.allclose(data.posterior["z"][1, 7, 2], found.z[2, 107])


@pytest.mark.parametrize("backend", ["reference", *(["cpu"] if native.available() else [])])
@pytest.mark.parametrize("rows", [0, 3])
def test_operators_pass_opcheck(rows: int, backend: str) -> None:
    """Schemas, and shapes and strides of fake tensors, of strided inputs too."""
    model = curved().double()
    x = model.sample(3, seed=1).detach()[None, :rows]
    recognised = recognise_model(model, x)
    assert recognised is not None
    layers, parameters, variance = recognised
    rest = ([p.detach() for p in parameters], variance, ",".join(layers.activations), list(layers.has_bias),
            layers.likelihood, torch.tensor(5), torch.arange(1))  # fmt: skip
    z, log_scale = torch.randn(1, rows, 2, 4, dtype=F64).mT, torch.zeros(1, rows, 2, dtype=F64)
    step = torch.full((4, rows, 1), 0.3, dtype=F64).permute(2, 1, 0)
    for settings in (Settings("hmc", 6, 2, 2), Settings("mala", 4, target=0.6), Settings("random-walk", 2, thinning=3)):
        torch.library.opcheck(torch.ops.libi_fast.chains.default, (x, z, step, log_scale, *rest, *settings, backend))
    *candidates, _ = importance.Settings(70, tail=5)
    arguments = (x, z[:, :, 0], log_scale, *rest, *candidates, 9, backend)
    torch.library.opcheck(torch.ops.libi_fast.resampling.default, arguments)


# --- what goes wrong ---


def test_a_decoder_that_gives_nan_somewhere() -> None:
    """Chains that start there are flagged and stay; proposals that go there are refused; other rows keep their bits."""
    model = curved()
    x = model.sample(6, seed=1).detach()
    mean = torch.zeros(6, 2)
    mean[2] = 9
    options: dict[str, Any] = {"seed": 4, "warmup": 30, "chains": 3}
    broken = unknown(model, broken=lambda z: z[:, 0] > 6)
    with pytest.warns(lf.DivergenceWarning, match="1 of 6 data points have chains that started"):
        found = lf.sample_posterior(broken, x, 30, proposal=(mean, mean * 0 - 1), **options)
    assert found.failed[2].all() and found.failed.sum() == 3 and found.log_density[2].isnan().all()
    assert found.z.isfinite().all()
    others = torch.arange(6) != 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lf.DivergenceWarning)
        clean = lf.sample_posterior(broken, x, 30, proposal=(mean * 0, mean * 0 - 1), **options)
    assert torch.equal(found.z[others], clean.z[others])


def test_failed_chains_leave_their_row_its_step_size() -> None:
    """About half of a row's chains start where the decoder gives NaN, and reject all: the others sample as if alone."""
    model = curved()
    x = model.sample(4, seed=1).detach()
    mean = torch.zeros(4, 2)
    mean[2, 0] = 6
    options: dict[str, Any] = {"proposal": (mean, mean * 0 - 1), "seed": 4, "chains": 8, "warmup": 80, "leapfrogs": 4}
    with pytest.warns(lf.DivergenceWarning):
        found = lf.sample_posterior(unknown(model, broken=lambda z: z[:, 0] > 6), x, 80, **options)
    assert found.failed is not None and found.step_size is not None and found.scale is not None
    failed = found.failed[2]
    assert 4 <= failed.sum() < 8 and found.failed.sum() == failed.sum()
    whole = lf.sample_posterior(unknown(model), x, 80, **options)
    assert whole.step_size is not None and whole.scale is not None
    assert ((found.step_size / whole.step_size).log().abs() < math.log(2)).all()
    assert ((found.scale / whole.scale).log().abs() < math.log(2)).all()
    moved = (found.z[2].unflatten(0, (8, -1)).diff(dim=1) != 0).any(-1)
    assert moved[~failed].float().mean() > 0.5 and not moved[failed].any()


def test_divergences_are_counted_and_told() -> None:
    model = curved()
    x = model.sample(6, seed=1).detach()
    with pytest.warns(lf.DivergenceWarning, match="6 of 6 data points have divergent transitions"):
        found = lf.sample_posterior(model, x, 40, seed=4, warmup=0, step_size=1e5)
    assert (found.divergences == 40).all() and found.acceptance_rate.max() == 0


def test_resampling_warns_of_heavy_tails() -> None:
    model, x = gaussian()
    with pytest.warns(lf.ParetoWarning):
        lf.sample_posterior(model, x, 10, "sir", seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nuts"}, "method must be one of 'sir', 'hmc', 'mala', 'random-walk', got 'nuts'"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_samples": 10}, "num_samples must be a multiple of the 4 chains, got 10"),
        ({"chains": 0}, "chains must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"leapfrogs": 0}, "leapfrogs must be at least 1"),
        ({"thinning": 0}, "thinning must be at least 1"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"step_size": -0.1}, "step_size must be positive"),
        ({"step_size": math.nan}, "step_size must be positive"),
        ({"target_acceptance": 0.0}, "target_acceptance must be positive"),
        ({"target_acceptance": 1.0}, "target_acceptance must lie in"),
        ({"jitter": 1.0}, "jitter must lie in"),
        ({"jitter": -0.1}, "jitter must lie in"),
        ({"method": "sir", "num_candidates": 0}, "num_candidates must be at least 1"),
        ({"method": "sir", "num_candidates": 2**32}, "num_candidates must lie in"),
        ({"method": "sir", "variance_inflation": 0.0}, "variance_inflation must be positive"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"first_row": 2**32}, "first_row must lie in"),
        ({"proposal": (torch.zeros(3, 2), torch.zeros(3, 2))}, "proposal mean must have shape"),
        ({"x": torch.full((2, 3), math.nan)}, "x holds nan at row 0"),
        ({"x": torch.zeros(2, 4)}, "x does not fit the model"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"warmup": 2**32 - 1}, "warmup and counted transitions"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3), "num_samples": 8, "warmup": 2} | options
    with pytest.raises(lf.InputError, match=message.replace("(", r"\(")):
        lf.sample_posterior(curved(), **arguments)


def test_settings_of_chains_are_checked() -> None:
    for settings, message in (
        (Settings("hmc", 3, first_transition=-1), "first_transition must be at least 0, got -1"),
        (Settings("hmc", -3), "transitions must lie in"),
        (Settings("hmc", 3, target=1.0), "target_acceptance must lie in"),
    ):
        with pytest.raises(lf.InputError, match=message):
            op.check_settings(settings, 2)


WRONG: list[dict[str, Any]] = [
    {"x": torch.zeros(2, 3, dtype=F64)}, {"x": "data"}, {"chains": 2.0}, {"step_size": "big"}, {"model": nn.Linear(2, 3)},
    {"out": 3}, {"jitter": "half"}, {"jitter": None},
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG)
def test_wrong_types(options: dict[str, Any]) -> None:
    arguments = {"model": curved(), "x": torch.zeros(2, 3), "num_samples": 8} | options
    with pytest.raises(TypeError):
        lf.sample_posterior(**arguments)
