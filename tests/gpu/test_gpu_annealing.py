"""Fused annealed importance sampling against the reference in float64, temperature by temperature."""

from __future__ import annotations

import pytest
import torch
from problems import _moved, problem
from torch import Tensor

from libi_fast.kernels.annealing import gpu, reference
from libi_fast.kernels.annealing.reference import Result, Settings
from libi_fast.kernels.chains import gpu as chains_gpu
from libi_fast.kernels.chains.reference import Noise, log_joint, reference_normal, reference_uniform
from libi_fast.kernels.importance.reference import ACTIVATIONS

TIE = 1e-3  # where log u and the log of the acceptance probability are as close, rounding may decide
IGNORED = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
SEED = 2**62 + 12345
SIZES = [  # a program of 32, 16 and 64 lanes, two lanes a chain
    {"warps": 1, "per_thread": 1, "lanes": 1},
    {"warps": 1, "per_thread": 1, "lanes": 2},
    {"warps": 1, "per_thread": 2, "lanes": 1},
]  # fmt: skip


class Case(dict):
    """The arguments of a call but its settings, on the CPU in float32 (betas in float64)."""

    def solve(self, run, device: str | torch.device, dtype: torch.dtype, settings: Settings) -> Result:
        arguments = {name: _moved(value, device, dtype) for name, value in self.items()} | {"betas": self["betas"]}
        replicas = arguments.pop("replicas")
        noise = Noise(torch.tensor(SEED, device=device), replicas, (6, 7), reference_normal, reference_uniform)
        return Result(*(t.cpu() for t in run(*arguments.values(), noise, settings)))

    def fused(self, device: torch.device, settings: Settings) -> Result:
        return self.solve(gpu.run, device, torch.float32, settings)

    def exact(self, settings: Settings) -> Result:
        return self.solve(run_reference, "cpu", torch.float64, settings)

    def changed(self, **changes) -> Case:
        return Case({**self, **changes})

    def rows(self, rows: slice) -> Case:
        return self.changed(**{name: self[name][:, rows] for name in ("x", "z", "step", "scale_tril", "mean", "log_scale")})


def run_reference(x, z, betas, step, scale_tril, mean, log_scale, decoder, noise: Noise, settings: Settings) -> Result:
    def density(rows: slice, at: Tensor):
        return log_joint(decoder, x[:, rows, None], at)

    return reference.run(density, z, betas, step, scale_tril, mean, log_scale, noise, settings, decoder.widest)


def case(widths: list[int], *options: str, chains: int = 3, temperatures: int = 10, step: float = 0.3, **more) -> Case:
    p = problem(widths, *options, **{"rows": 2, **more})
    replicas, rows, latent_dim = p.mean.shape
    z = p.mean[:, :, None] + p.log_scale[:, :, None].exp() * torch.randn(replicas, rows, chains, latent_dim)
    steps = step * (0.8 + 0.4 * torch.rand(replicas, rows, temperatures))
    betas = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64).square()[None]
    scale_tril = torch.diag_embed(p.log_scale.exp())[:, :, None] + 0.2 * torch.randn(replicas, rows, 2, latent_dim, latent_dim)
    return Case(
        x=p.x, z=z, betas=betas, step=steps, scale_tril=scale_tril, mean=p.mean, log_scale=p.log_scale, decoder=p.decoder,
        replicas=p.replicas,
    )  # fmt: skip


def stepped(c: Case, settings: Settings) -> tuple[Result, Tensor]:
    """The reference one temperature after another, and which chains had no close call. Steps must not adapt."""
    z, log_weights, followed = c["z"].double(), 0.0, True
    for t in range(c["betas"].shape[-1] - 1):
        alone = settings._replace(first_transition=settings.first_transition + t)
        scales = c["scale_tril"][:, :, [2 * t // (c["betas"].shape[-1] - 1)]]
        here = c.changed(z=z, betas=c["betas"][:, t : t + 2], step=c["step"][:, :, t : t + 1], scale_tril=scales).exact(alone)
        draw = (torch.tensor(SEED), c["replicas"], settings.first_row, z.shape[1], 2 * alone.first_transition, 1)
        u = torch.stack([reference_uniform(*draw, chain, 7, torch.float64)[..., 0] for chain in range(z.shape[2])], -1)
        followed = followed & ((u.log() - here.acceptance.log()).abs() > TIE)
        z, log_weights = here.z, log_weights + here.log_weights
    return Result(z, log_weights, here.acceptance, here.steps, here.path), followed


def check(c: Case, device: torch.device, settings: Settings) -> Result:
    found, (truth, followed) = c.fused(device, settings), stepped(c, settings)
    assert followed.double().mean() > 0.8, "too few chains are compared: another seed"
    scale = 1 + truth.log_weights.abs()
    assert ((found.log_weights.double() - truth.log_weights).abs() / scale)[followed].max() < 1e-4
    assert (found.z.double() - truth.z).abs()[followed].max() < 1e-3
    return found


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_likelihoods(device, activation, likelihood):
    check(case([2, 6, 3], activation, likelihood, temperatures=6), device, Settings(4, jitter=0.5))


@pytest.mark.parametrize(("hidden", "latent_dim"), [(1, 1), (13, 2), (1, 4), (13, 7), (0, 2), (0, 7), (1, 3)])
def test_shapes(device, hidden, latent_dim):
    """Every grouping of draws, padded units, replicas, a sequence that begins inside a block of draws."""
    widths = [latent_dim, hidden, 8 - latent_dim] if hidden else [latent_dim, 8 - latent_dim]
    c = case(widths, "sigmoid", rows=3, replicas=2, own=2, step=0.1)
    check(c, device, Settings(3, jitter=0.3, first_transition=5, first_row=7))


def test_back_from_the_posterior(device):
    c = case([2, 6, 2])
    check(c.changed(betas=c["betas"].flip(-1)), device, Settings(4))


@pytest.mark.parametrize("size", SIZES)
def test_programs_move_no_bit(device, monkeypatch, size):
    c = case([2, 9, 2], rows=5, chains=7)
    settings = Settings(3, jitter=0.5)
    before = c.fused(device, settings)
    monkeypatch.setattr(chains_gpu, "candidates", lambda *sizes: [size])
    after = c.fused(device, settings)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_row_gives_the_same_bits_in_any_company(device):
    c, settings = case([2, 5, 2], rows=6), Settings(3, jitter=0.5)
    whole, part = c.fused(device, settings), c.rows(slice(2, 4)).fused(device, settings._replace(first_row=2))
    for a, b in zip(whole[:3], part[:3], strict=True):
        assert torch.equal(a[:, 2:4], b)


def test_the_pilot_adapts_as_the_reference_does(device):
    c, settings = case([2, 6, 2], temperatures=8), Settings(3, rate=0.2, target=0.7)
    found, truth = c.fused(device, settings), c.exact(settings)
    same = (found.z.double() - truth.z).abs().amax(-1) < 1e-3  # no decision was another one
    assert same.double().mean() > 0.8
    torch.testing.assert_close(found.steps.double()[same], truth.steps[same], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.path.double()[same], truth.path[same], rtol=1e-3, atol=1e-3)
    assert not torch.equal(found.steps[..., 0], found.steps[..., -1])


@IGNORED
def test_rows_that_are_lost_harm_no_other(device):
    c, settings = case([2, 4, 2], rows=4), Settings(2)
    before = c.fused(device, settings)
    c["x"][0, 1] = float("nan")
    after = c.fused(device, settings)
    assert after.log_weights[0, 1].isnan().all() and not after.acceptance[0, 1].any()
    assert torch.equal(before.log_weights[:, [0, 2, 3]], after.log_weights[:, [0, 2, 3]])


def test_no_rows(device):
    found = case([2, 4, 2], rows=0).fused(device, Settings(2, rate=0.1, target=0.7))
    assert found.z.shape == (1, 0, 3, 2) and found.steps.shape == (1, 0, 3, 10)
