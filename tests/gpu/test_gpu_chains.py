"""The fused chains against the reference in float64, transition by transition."""

from __future__ import annotations

import pytest
import torch
from problems import _moved, problem
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels.chains import gpu, reference
from libi_fast.kernels.chains.reference import METHODS, Noise, Result, Settings, log_joint, reference_normal, reference_uniform
from libi_fast.kernels.importance.reference import ACTIVATIONS, Decoder
from libi_fast.ops.chains import chains_of_layers
from libi_fast.ops.importance import Layers

TRANSITIONS = 20
TIE = 1e-3  # where log u and the log of the acceptance probability are as close, rounding may decide
IGNORED = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
SIZES = [  # a program of 32, 16 and 64 lanes, two lanes a chain
    {"warps": 1, "per_thread": 1, "lanes": 1},
    {"warps": 1, "per_thread": 1, "lanes": 2},
    {"warps": 1, "per_thread": 2, "lanes": 1},
]  # fmt: skip


class Case(dict):
    """The arguments of a call but its settings, on the CPU in float32."""

    def solve(self, run, device: str | torch.device, dtype: torch.dtype, settings: Settings) -> Result:
        x, z, step, log_scale, decoder, replicas = (_moved(self[name], device, dtype) for name in self)
        noise = Noise(torch.tensor(2**62 + 12345, device=device), replicas, (6, 7), reference_normal, reference_uniform)
        return Result(*(t.cpu() for t in run(x, z, step, log_scale, decoder, noise, settings)))

    def fused(self, device: torch.device, settings: Settings) -> Result:
        return self.solve(gpu.run, device, torch.float32, settings)

    def exact(self, settings: Settings) -> Result:
        return self.solve(run_reference, "cpu", torch.float64, settings)

    def changed(self, **changes) -> Case:
        return Case({**self, **changes})

    def rows(self, rows: slice) -> Case:
        return self.changed(**{name: self[name][:, rows] for name in ("x", "z", "step", "log_scale")})


def run_reference(x: Tensor, z: Tensor, step: Tensor, log_scale: Tensor, decoder: Decoder, noise: Noise, settings: Settings):
    def density(rows: slice, at: Tensor):
        return log_joint(decoder, x[:, rows, None], at)

    return reference.run(density, z, step, log_scale, noise, settings, decoder.widest)


def case(widths: list[int], *options: str, chains: int = 3, step: float = 0.3, **more) -> Case:
    p = problem(widths, *options, **{"rows": 2, **more})
    replicas, rows, latent_dim = p.mean.shape
    z = torch.randn(replicas, rows, chains, latent_dim)
    steps = step * (0.8 + 0.4 * torch.rand(replicas, rows, chains))
    return Case(x=p.x, z=z, step=steps, log_scale=0.5 * p.log_scale, decoder=p.decoder, replicas=p.replicas)


def margins(c: Case, settings: Settings, z: Tensor) -> Tensor:
    """|log u - log acceptance probability| of each transition of a reference run that stood at z [R, N, C, T, L] after it;
    each is made again, alone, from where it began. Steps must not adapt."""
    found = []
    for t in range(settings.transitions):
        before = c["z"].double() if t == 0 else z[..., t - 1, :]
        alone = settings._replace(transitions=1, thinning=1, first_transition=settings.first_transition + t)
        probability = c.changed(z=before).exact(alone).acceptance
        draw = (torch.tensor(2**62 + 12345), c["replicas"], settings.first_row, z.shape[1], 2 * alone.first_transition, 1)
        u = torch.stack([reference_uniform(*draw, chain, 7, torch.float64)[..., 0] for chain in range(z.shape[2])], -1)
        found.append((u.log() - probability.log()).abs())
    return torch.stack(found, -1)


def check(c: Case, device: torch.device, settings: Settings) -> Result:
    """Until a tie: the same decisions, states within 1e-4 posterior sd, log pi within rounding. Then, nothing is said."""
    found = c.fused(device, settings)
    every, kept = settings._replace(thinning=1), slice(settings.thinning - 1, None, settings.thinning)
    truth = c.exact(every)
    sure = (margins(c, every, truth.z) > TIE).cumprod(-1).bool()
    assert sure.float().mean() > 0.8
    assert errors(found.z, truth.z[..., kept, :])[sure[..., kept]].max() < 1e-4
    if settings.thinning == 1:
        starts = torch.cat((c["z"][..., None, :], found.z[..., :-1, :]), -2)
        expected = torch.cat((c["z"].double()[..., None, :], truth.z[..., :-1, :]), -2)
        taken, expected = (found.z != starts).any(-1), (truth.z != expected).any(-1)
        assert torch.equal(taken[sure], expected[sure])
    pi = truth.log_density[..., kept]
    torch.testing.assert_close(found.log_density.double()[sure[..., kept]], pi[sure[..., kept]], rtol=2e-5, atol=2e-4)
    whole = sure[..., -1]
    torch.testing.assert_close(found.acceptance.double()[whole], truth.acceptance[whole], rtol=0, atol=2e-4)
    assert torch.equal(found.step, c["step"]) and torch.equal(found.divergences[whole], truth.divergences[whole])
    return found


def errors(z: Tensor, truth: Tensor) -> Tensor:
    """In posterior standard deviations, those of the draws of each row."""
    return ((z - truth).abs() / truth.flatten(2, 3).std(2)[:, :, None, None]).amax(-1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_twenty_transitions(device, likelihood, method):
    c = case([2, 3, 3], "tanh", likelihood, chains=5, step=0.9 if method == "hmc" else 1.2)
    found = check(c, device, Settings(method, TRANSITIONS, 2, jitter=0.2))
    assert 0.1 < found.acceptance.mean() < 0.97


@IGNORED
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation):
    check(case([2, 3, 2], activation, step=0.9), device, Settings("hmc", 4, 2))
    check(case([2, 2, 2], "tanh", "gaussian", output=activation, step=1.2), device, Settings("mala", 4))


@pytest.mark.parametrize("method", ["hmc", "random-walk"])
@pytest.mark.parametrize("latent_dim", [1, 2, 3, 4, 5, 7])
def test_latents_and_outputs(device, latent_dim, method):
    """Every place that a transition's draws can have in a counter's four; data and parameters of each replica."""
    c = case([latent_dim, 2, 8 - latent_dim], "softplus", rows=1, replicas=2, own=2, step=0.7, bias=latent_dim != 3)
    check(c, device, Settings(method, 5, 2, first_transition=3, first_row=5))


def test_many_units(device):
    """Both halves of the units in several steps of the loop, the first one longer."""
    check(case([2, 14, 2], "sigmoid", step=1.2), device, Settings("mala", 4))


def test_no_hidden_layer(device):
    check(case([2, 3], "", "bernoulli", output="silu", chains=2, step=1.2), device, Settings("hmc", 8, 2))
    check(case([1, 2], step=0.9), device, Settings("random-walk", 8))


def test_replicas(device):
    """Data and parameters that replicas share; every replica has its own draws."""
    c = case([2, 4, 2], "elu", "bernoulli", replicas=3, diagonal=False, step=0.8)
    c["z"], c["step"], c["x"] = c["z"][:1].expand(3, -1, -1, -1), c["step"][:1].expand(3, -1, -1), c["x"][:1]
    found = check(c, device, Settings("mala", 8))
    assert found.z[:, 0, 0, -1, 0].unique().numel() == 3


@pytest.mark.parametrize("thinning", [2, 3])
def test_thinning(device, thinning):
    check(case([2, 3, 2], step=0.7), device, Settings("hmc", 7, 2, thinning=thinning, jitter=0.5))


@pytest.mark.parametrize("method", METHODS)
def test_steps_that_adapt(device, method):
    """Errors are fed back into the steps 20 sqrt(t) times larger, in the reference's float32 as well: that is the measure."""
    c, settings = case([2, 3, 2], chains=4, step=0.05), Settings(method, 8, 2, jitter=0.1, target=0.7)
    found, truth = c.fused(device, settings), c.exact(settings)
    rounded = c.solve(run_reference, "cpu", torch.float32, settings)
    allowed = 1e-4 + 8 * errors(rounded.z, truth.z).amax((0, 1, 2)).cummax(0).values
    assert allowed.max() < 0.05 and (errors(found.z, truth.z) < allowed).all()
    off = [(one.step / truth.step - 1).abs().max() for one in (found, rounded)]
    assert off[0] < 1e-4 + 8 * off[1] and off[1] < 0.01
    torch.testing.assert_close(found.acceptance.double(), truth.acceptance, rtol=0, atol=2e-3)
    assert not torch.isclose(found.step, c["step"], rtol=0.1).any()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_its_counters_moves_a_chain(device, method, monkeypatch):
    """Programs of any size, a chain in one lane or in two, other rows, other chains: the same bits."""
    settings = Settings(method, 3, 2, jitter=0.3, target=0.8, first_row=3)
    c = case([2, 14, 2], rows=5, chains=5, step=0.6)
    found = []
    for size in SIZES:
        monkeypatch.setattr(gpu, "candidates", lambda *sizes, size=size: [size])
        found.append(c.fused(device, settings))
        part = c.rows(slice(2, 4)).fused(device, settings._replace(first_row=5))
        for whole, some in zip(found[-1], part, strict=True):
            assert torch.equal(whole[:, 2:4], some)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    few = c.changed(z=c["z"][:, :, :2], step=c["step"][:, :, :2]).fused(device, settings)
    assert all(torch.equal(a[:, :, :2], b) for a, b in zip(found[-1], few, strict=True))


def test_a_run_goes_on_where_another_ended(device):
    """Transitions have their draws wherever a call begins."""
    c = case([3, 4, 2], step=0.6)
    whole = c.fused(device, Settings("hmc", 7, 2, jitter=0.2))
    first = c.fused(device, Settings("hmc", 3, 2, jitter=0.2))
    rest = c.changed(z=first.z[..., -1, :]).fused(device, Settings("hmc", 4, 2, jitter=0.2, first_transition=3))
    torch.testing.assert_close(torch.cat((first.z, rest.z), 3), whole.z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_chain_that_starts_nowhere_stays_there_alone(device, method):
    settings = Settings(method, 5, 2, target=0.8)
    c = case([2, 4, 2], chains=4, step=0.6)
    good = c.fused(device, settings)
    z = c["z"].clone()
    z[0, 1, 2, 0] = float("nan")
    found = c.changed(z=z).fused(device, settings)
    stuck = torch.zeros_like(c["step"], dtype=torch.bool)
    stuck[0, 1, 2] = True
    for a, b in zip(found, good, strict=True):
        assert torch.equal(a[~stuck], b[~stuck])
    assert torch.equal(found.z[stuck].isnan().any(1), torch.tensor([[True, False]]))
    assert (found.z[stuck][..., 1] == z[0, 1, 2, 1]).all() and found.log_density[stuck].isnan().all()
    assert found.acceptance[stuck] == 0 and found.divergences[stuck] == 5 and 0 < found.step[stuck] < c["step"][stuck]


@IGNORED
@pytest.mark.parametrize("method", METHODS)
def test_divergences(device, method):
    """Far too long a step, and one so long that what it leads to is not a number; never taken, always counted."""
    c = case([2, 4, 2], "cube")
    c["step"][..., 0], c["step"][..., 1] = 1e3, 1e25
    settings = Settings(method, 4, 3)
    found, truth = c.fused(device, settings), c.exact(settings)
    assert torch.equal(found.divergences, truth.divergences) and (found.divergences[..., :2] == 4).all()
    assert torch.equal(found.z[:, :, :2], c["z"][:, :, :2, None].expand(-1, -1, -1, 4, -1))


def test_peaked_likelihood(device):
    """Energies near 1e4 whose change is small."""
    c = case([2, 6, 2], step=0.004, rows=2, chains=4)
    c["decoder"] = c["decoder"]._replace(variance=torch.full((1, 2), 1e-4))
    check(c, device, Settings("hmc", 8, 4))


def test_nothing_to_do(device):
    c = case([2, 4, 2])
    none = c.rows(slice(0, 0)).fused(device, Settings("hmc", 4, 2))
    assert none.z.shape == (1, 0, 3, 4, 2) and none.divergences.dtype == torch.int64
    still = c.fused(device, Settings("mala", 0, target=0.8))
    assert still.z.shape == (1, 2, 3, 0, 2) and not still.acceptance.any() and not still.divergences.any()
    torch.testing.assert_close(still.step, c["step"], rtol=1e-6, atol=0)
    assert c.fused(device, Settings("mala", 2, thinning=3)).log_density.shape == (1, 2, 3, 0)


def test_strided_inputs(device):
    c = case([2, 4, 3], rows=3)
    strided = c.changed(**{name: torch.stack((c[name], c[name] + 1), -1)[..., 0] for name in ("x", "z", "step", "log_scale")})
    a, b = (one.fused(device, Settings("mala", 3)) for one in (c, strided))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- as an operator ---


def through_operator(c: Case, device: torch.device, backend: str, dtype: torch.dtype, settings: Settings) -> Result:
    def run(x, z, step, log_scale, decoder, noise, settings):
        layers = Layers(tuple(decoder.activations), (True,) * len(decoder.weights), decoder.likelihood)
        parameters = [t for pair in zip(decoder.weights, decoder.biases, strict=True) for t in pair]
        arguments = (parameters, decoder.variance, noise.seed, noise.replicas, settings, backend)
        return chains_of_layers(x, z, step, log_scale, layers, *arguments)

    return c.solve(run, device, dtype, settings)


def test_operator(device):
    c, settings = case([2, 4, 2], step=0.6), Settings("hmc", 4, 2)
    found = through_operator(c, device, "triton", torch.float32, settings)
    truth = through_operator(c, torch.device("cpu"), "reference", torch.float64, settings)
    torch.testing.assert_close(found.z.double(), truth.z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("widths", "dtype", "reason"),
    [
        ([2, 4, 2], torch.float64, "float32"),
        ([2, 4, 4, 2], torch.float32, "one hidden layer"),
        ([5, 4, 4], torch.float32, "5-4-4"),
    ],
)
def test_refused_by_name(device, widths, dtype, reason):
    with pytest.raises(lf.InputError, match=f"'triton' was asked for chains, but it .*{reason}"):
        through_operator(case(widths), device, "triton", dtype, Settings("mala", 1))
    assert through_operator(case(widths), device, "", dtype, Settings("mala", 1)).z.isfinite().all()
