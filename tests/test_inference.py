"""Learning q(z | x) of a fixed model by draws from p(z | x): closed forms, modes, the three kinds of q, seeds, folders."""

from __future__ import annotations

import json
import math

import pytest
import torch
from common import in_one_process, in_two_processes, of_processes
from torch import Tensor, nn
from torch.distributions import Normal
from torch.utils.data import DataLoader, TensorDataset

import libi_fast as lf
from libi_fast.models.proposals import FullCovariance
from libi_fast.training.distributed import Rows
from libi_fast.training.inference import keep_draws
from libi_fast.training.objectives import elbo_terms
from libi_fast.training.options import FitOptions
from libi_fast.training.replicas import Replicas, make_system

F64 = torch.float64
KINDS = ("mean-field", "full-covariance", "mixture")
COMPONENTS = 3


def inference(
    kind: str, columns: int = 3, latent_dim: int = 2, hidden: tuple[int, ...] = (6,), dtype=F64
) -> lf.MeanFieldGaussian:
    full = latent_dim * (latent_dim + 3) // 2
    width = {"mean-field": 2 * latent_dim, "full-covariance": full, "mixture": COMPONENTS * (1 + full)}[kind]
    network = lf.mlp(columns, hidden, width).to(dtype)
    if kind == "mixture":
        return lf.MixtureGaussian(network, COMPONENTS)
    return {"mean-field": lf.MeanFieldGaussian, "full-covariance": lf.FullCovarianceGaussian}[kind](network)


def linear_model(dtype=F64) -> lf.LatentVariableModel:
    torch.manual_seed(1)
    return lf.LatentVariableModel(nn.Linear(2, 3).to(dtype), lf.Gaussian(0.3), 2)


def small_model(dtype=F64) -> lf.LatentVariableModel:
    return lf.LatentVariableModel(lf.mlp(2, [5], 3).to(dtype), lf.Gaussian(0.2), 2)


def as_full(q) -> FullCovariance:
    return FullCovariance(q.mean, torch.diag_embed(q.log_std.exp())) if isinstance(q, lf.MeanField) else q


# --- what it converges to ---


@pytest.mark.parametrize(("sampler", "std"), [("simulated", 1.0), ("simulated", 2.0), ("hmc", 1.0), ("sir", 1.0)])
def test_full_covariance_finds_the_exact_posterior_of_a_linear_model(sampler, std):
    model = linear_model()
    x = model.sample(300, seed=2)
    q = inference("full-covariance", hidden=())
    lf.fit_inference(model, q, x, sampler=sampler, simulated_std=std, epochs=250, learning_rate=0.05, progress=False)
    with torch.no_grad():
        found = q(x)
    mean, covariance = lf.exact_posterior(model, x)
    scale = covariance.diagonal().sqrt()
    # About 300 x 64 draws know a mean to 0.007 standard deviations and a variance to 0.01 of it; as linear functions of x
    # they are known less well at the rows far out.
    assert ((found.mean - mean) / scale).abs().mean() < 0.03
    relative = (found.scale_tril @ found.scale_tril.mT - covariance) / (scale[:, None] * scale)
    assert relative.abs().mean() < 0.03 and relative.abs().max() < 0.1


class Wavy(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z + 0.3 * torch.sin(1.5 * z)


def test_wider_pairs_make_q_right_at_rows_that_the_model_finds_improbable():
    model = lf.LatentVariableModel(Wavy(), lf.Gaussian(1e-3), 2)
    z = 5.0 * nn.functional.normalize(torch.randn(500, 2, generator=torch.Generator().manual_seed(1)))
    x = model.decode(z)
    fit = {}
    for std in (1.0, 2.0):
        torch.manual_seed(0)
        q = lf.MeanFieldGaussian(lf.mlp(2, [30], 4, "relu"))
        lf.fit_inference(model, q, x, sampler="simulated", simulated_std=std, epochs=400, progress=False)
        with torch.no_grad():
            near = model.sample_joint(2000, seed=3)
            fit[std] = [q(rows).log_prob(codes[:, None]).mean().item() for rows, codes in (near, (x, z))]
    assert fit[2.0][1] > fit[1.0][1] + 4.0, "far out"
    assert fit[2.0][0] > fit[1.0][0] - 0.5, "where the mass is"


@pytest.mark.parametrize("std", [1.0, 2.0])
def test_q_is_judged_by_pairs_as_wide_as_the_prior(std):
    """At the exact posterior the objective is that posterior's entropy, and any other q's is higher."""
    noise = 0.49
    decoder = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        decoder.weight.copy_(torch.eye(2))
    model = lf.LatentVariableModel(decoder, lf.Gaussian(noise), 2)
    x, judged = model.sample(20_000, seed=2), {}
    variance = noise / (1 + noise)
    for name, slope, log_std in (("exact", 1 / (1 + noise), 0.5 * math.log(variance)), ("prior", 0.0, 0.0)):
        network = nn.Linear(2, 4).double()
        with torch.no_grad():
            network.weight.zero_()[:2].copy_(slope * torch.eye(2))
            network.bias.copy_(torch.tensor([0.0, 0.0, log_std, log_std]))
        q = lf.MeanFieldGaussian(network)
        history = lf.fit_inference(
            model, q, x, x, sampler="simulated", simulated_std=std, epochs=1, learning_rate=1e-12, progress=False
        )  # fmt: skip
        (judged[name],) = history[-1]["objective"]
    assert judged["exact"] == pytest.approx(math.log(2 * math.pi * math.e * variance), abs=0.03)
    assert judged["prior"] == pytest.approx(math.log(2 * math.pi) + 1, abs=0.03)


def test_mean_field_has_the_marginal_variances_and_by_the_elbo_the_conditional_ones():
    """The two divergences' closed forms on a correlated posterior (Bishop 2006, Eqs 10.13 and 10.17)."""
    model = linear_model()
    x = model.sample(300, seed=2)
    mean, covariance = lf.exact_posterior(model, x)
    expected = {"posterior": covariance.diagonal(), "elbo": 1 / torch.linalg.inv(covariance).diagonal()}
    assert (expected["posterior"] / expected["elbo"]).max() > 1.2, "the posterior must be correlated"
    for method, variance in expected.items():
        q = inference("mean-field", hidden=())
        lf.fit_inference(model, q, x, method=method, epochs=250, learning_rate=0.05, progress=False)
        with torch.no_grad():
            found = q(x)
        assert torch.allclose(found.log_std.exp().square().mean(0), variance, rtol=0.05)
        assert ((found.mean - mean) / covariance.diagonal().sqrt()).abs().mean() < 0.03


class Square(nn.Module):
    """z -> z^2: p(z | x) has modes at both roots."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, z: Tensor) -> Tensor:
        return self.factor * z * z


@pytest.mark.parametrize("sampler", ["simulated", "hmc"])
def test_a_mixture_covers_both_modes_where_the_elbo_stays_in_one(sampler):
    model = lf.LatentVariableModel(Square(), lf.Gaussian(0.05), 1)
    x = model.sample(200, seed=3)
    x = x[x[:, 0] > 0.5]
    below = {}
    for method in ("elbo", "posterior", "elbo+posterior"):
        torch.manual_seed(0)
        network = lf.mlp(1, [10], 2 * 3).to(F64)
        with torch.no_grad():  # both components begin at the positive root
            network[-1].weight.mul_(0.1)
            network[-1].bias.copy_(torch.tensor([0.0, 0.0, 0.9, -1.5, 1.1, -1.5]))
        q = lf.MixtureGaussian(network, 2)
        lf.fit_inference(model, q, x, method=method, sampler=sampler, epochs=300, learning_rate=0.03, progress=False)
        with torch.no_grad():
            found = q(x)
            each = Normal(found.mean[..., 0], found.scale_tril[..., 0, 0]).cdf(torch.zeros((), dtype=F64))
            below[method] = (found.log_weights.exp() * each).sum(-1)
    assert below["elbo"].max() < 0.01
    for method in ("posterior", "elbo+posterior"):
        assert (below[method] - 0.5).abs().max() < 0.15, method


def test_importance_weights_are_reliable_after_posterior_draws_and_not_after_the_elbo():
    """A correlated posterior and mean-field q: reverse KL is too narrow by the factor above, and Pareto k says so."""
    torch.manual_seed(0)
    decoder = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.0, 0.95], [0.95, 1.0]]))
    model = lf.LatentVariableModel(decoder, lf.Gaussian(0.02), 2)
    x = model.sample(100, seed=3)
    exact = lf.exact_log_likelihood(model, x)
    gap = {}
    for method in ("elbo", "posterior"):
        q = inference("mean-field", columns=2, hidden=())
        lf.fit_inference(model, q, x, method=method, epochs=250, learning_rate=0.05, progress=False)
        with torch.no_grad():
            gap[method] = (lf.log_likelihood(model, x, q(x), 2000, seed=0, pareto=False).log_likelihood - exact).mean().item()
    assert abs(gap["posterior"]) < 0.02 < 0.1 < -gap["elbo"]


# --- the objectives ---


@pytest.mark.parametrize("kind", KINDS)
def test_log_q_of_many_replicas_is_each_ones_own(kind):
    model = small_model()
    replicas = Replicas([make_system(model, inference(kind), None, seed, True) for seed in range(3)])
    x, z = torch.randn(7, 3, dtype=F64), torch.randn(3, 7, 4, 2, dtype=F64)
    together = replicas.log_q(x, z)
    assert replicas._mapped, "one batch, not one after another"
    for r in range(3):
        q = make_system(model, inference(kind), None, r, True).inference(x)
        assert torch.allclose(together[r], as_full(q).log_prob(z[r]), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_mean_of_q(kind):
    model, q = small_model(), inference(kind)
    x = torch.randn(6, 3, dtype=F64)
    libi = lf.LiBI(model, q)
    found = as_full(q(x))
    noise, uniform = torch.randn(6, 200_000, 2, dtype=F64), torch.rand(6, 200_000, dtype=F64)
    draws = found.draw(noise, uniform)
    assert torch.allclose(libi.codes(x), draws.mean(1), atol=0.02)
    assert torch.allclose(found.standard_deviations(), draws.std(1), rtol=0.02)


@pytest.mark.parametrize("decoder", ["linear", "network"])
@pytest.mark.parametrize("kind", ["full-covariance", "mixture"])
def test_elbo_of_general_q_is_below_the_exact_likelihood_by_the_divergence(kind, decoder):
    """Against log p(x, z) - log q(z | x) of plain draws of q."""
    model = linear_model() if decoder == "linear" else small_model()
    q = inference(kind)
    x = torch.randn(5, 3, dtype=F64)
    replicas = Replicas([make_system(model, q, None, 0, False)])
    with torch.no_grad():
        noise = lf.philox_normal(1, 5, 2 * 40_000, dtype=F64).unflatten(-1, (-1, 2))
        terms = elbo_terms(replicas, Rows.whole(x), lambda: noise[None])
        found = as_full(q(x))
        z = found.draw(lf.philox_normal(2, 5, 2 * 40_000, dtype=F64).view(5, -1, 2), lf.philox_uniform(3, 5, 40_000, dtype=F64))
        prior = Normal(0, 1).log_prob(z).sum(-1)
        values = {"reconstruction": -model.log_prob(x[:, None], z), "kl": found.log_prob(z) - prior}
    for name, value in values.items():
        error = value.std(1).mean().item() / math.sqrt(40_000 * 5)
        assert terms[name].item() == pytest.approx(value.mean().item(), abs=6 * error + 1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_elbo_counts_every_part_of_q(kind):
    """Against finite differences with the same noise: weights of a mixture included."""
    model, q = small_model(), inference(kind)
    x = torch.randn(5, 3, dtype=F64)
    noise = torch.randn(1, 5, 8, 2, dtype=F64)

    def bound() -> Tensor:
        replicas = Replicas([make_system(model, q, None, 0, False)])
        terms = elbo_terms(replicas, Rows.whole(x), lambda: noise)
        value = torch.stack(list(terms.values())).sum()
        names = [n for n in replicas.parameters if n == "inference.network.2.bias"]
        return value, torch.autograd.grad(value, replicas.parameters[names[0]])[0][0]

    _, gradient = bound()
    bias = q.network[-1].bias
    for i in range(len(bias)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[i] += sign * 1e-5
            values.append(bound()[0].item())
            with torch.no_grad():
                bias[i] -= sign * 1e-5
        assert gradient[i].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7)


# --- in LiBI ---


def data(dtype=torch.float32):
    return lf.data.LinearJTEx(seed=3, train=60, validation=40, test=20, dtype=dtype)


@pytest.mark.parametrize("step2", ["elbo", "posterior", "elbo+posterior"])
@pytest.mark.parametrize("kind", KINDS)
def test_libi_trains_every_q_by_every_step_2(kind, step2, tmp_path):
    d = data()
    libi = lf.LiBI(d.model(), inference(kind, columns=2, dtype=torch.float32), step2=step2, repeats=2)
    libi.fit(d.train, d.validation, epochs=90, restarts=2, progress=False)
    phases = [h["phase"] for h in libi.history]
    assert ("step 2, posterior" in phases) == (step2 == "elbo+posterior")
    (record,) = [h for h in libi.history if h["phase"].startswith("step 2")][-1:]
    assert set(record) >= ({"kl", "reconstruction"} if step2 == "elbo" else {"posterior"})
    before = libi.log_likelihood(d.test, num_samples=50)
    assert torch.isfinite(before.log_likelihood).all()
    libi.save(tmp_path / "run")
    again = lf.load(tmp_path / "run")
    assert type(again.system.inference) is type(libi.system.inference)
    assert again.settings["step2"] == step2
    assert torch.equal(again.log_likelihood(d.test, num_samples=50).log_likelihood, before.log_likelihood)
    assert torch.equal(again.codes(d.test), libi.codes(d.test))
    assert len(lf.aggregated_posterior(again.posterior(d.test)).z) == len(d.test)


def test_a_run_folder_of_before_says_nothing_of_q_and_is_mean_field(tmp_path):
    d = data()
    libi = lf.LiBI(d.model(), inference("mean-field", columns=2, dtype=torch.float32), repeats=1)
    libi.fit(d.train, epochs=6, progress=False)
    libi.save(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["method"]["inference_model"], config["method"]["settings"]["sampler"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert torch.equal(lf.load(tmp_path / "run").codes(d.test), libi.codes(d.test))


def test_step_1_moves_one_component_of_a_mixture_and_step_2_all():
    d = data()
    q = inference("mixture", columns=2, dtype=torch.float32)
    libi = lf.LiBI(d.model(), q, repeats=1, step2="posterior")
    step1, step2, found = libi._step1, libi._step2, {}

    def look(when):
        return lambda run: found.update({when: run.replicas.parameters["inference.network.2.bias"][0].clone()})

    def first(run, epochs, is_first):
        stages = step1(run, epochs, is_first)
        at = 1 + next(i for i, s in enumerate(stages) if getattr(s, "name", "") == "candidates") + 1  # the best one is kept
        return [*stages[:at], look("start"), *stages[at:]]

    libi._step1 = first
    libi._step2 = lambda run, epochs, is_first: [look("step 1"), *step2(run, epochs, is_first), look("step 2")]
    libi.fit(d.train, d.validation, epochs=90, progress=False)
    means, _ = q.places(2)
    moved = found["step 1"] != found["start"]
    assert moved.nonzero()[:, 0].tolist() == means[0].tolist()
    assert (found["step 1"][:COMPONENTS].exp() == torch.tensor([1.0, 0.0, 0.0])).all()
    assert (found["step 2"] != found["step 1"]).all() and found["step 2"][:COMPONENTS].abs().max() < 10
    assert found["step 2"][means].std(0).min() > 1e-3


def test_a_mixture_begins_as_white_as_a_single_gaussian():
    d = data()
    found = {}
    for kind in KINDS:
        libi = lf.LiBI(d.model(), inference(kind, columns=2, dtype=torch.float32), repeats=1, warm_up=0)
        stages = libi._stages

        def first(run, epochs, stages=stages, kind=kind):
            def look(run):
                z = run.replicas.codes(run.train.values)[0]
                found[kind] = torch.cov(z.T, correction=0)

            every = stages(run, epochs)
            at = next(i for i, s in enumerate(every) if hasattr(s, "loss"))
            return [*every[:at], look, *every[at:]]

        libi._stages = first
        libi.fit(d.train, d.validation, epochs=6, progress=False)
    for covariance in found.values():
        assert torch.allclose(covariance, torch.eye(2), atol=1e-3)


@pytest.mark.parametrize("networks", [1, 2])
def test_an_encoder_of_its_own_starts_every_component(networks):
    d = data()
    for kind in KINDS:
        q, h = inference(kind, columns=2, dtype=torch.float32), lf.mlp(2, [6], 2)
        libi = lf.LiBI(d.model(), q, encoder=h, step2="posterior", repeats=1, inference_restarts=networks)
        libi.fit(d.train, d.validation, epochs=60, progress=False)
        assert torch.isfinite(libi.log_likelihood(d.test, num_samples=50).log_likelihood).all()


def test_the_model_stays_as_it_is_and_q_begins_where_the_encoder_is():
    model = small_model()
    x = model.sample(50, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    encoder = inference("mean-field")
    for kind in KINDS:
        q = inference(kind)
        lf.fit_inference(model, q, x, encoder=encoder.network, epochs=3, learning_rate=1e-9, progress=False)
        with torch.no_grad():
            # Components of a mixture begin a standard deviation apart, so that they can part.
            centre = as_full(q(x)).centres().mean(1)
            shift = centre - encoder(x).mean
        assert shift.std(0).max() < 1e-5, "the same codes, but for one shift of a mixture's"
        if kind != "mixture":
            assert shift.abs().max() < 1e-5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


# --- seeds, shards, interruptions ---


@pytest.mark.parametrize("sampler", ["simulated", "hmc", "sir", "simulated+sir"])
def test_same_seed_same_q_and_another_seed_another(sampler):
    model = small_model()
    x = model.sample(60, seed=1)

    def fitted(seed):
        torch.manual_seed(0)
        q = inference("mixture")
        lf.fit_inference(model, q, x, sampler=sampler, num_samples=16, epochs=5, batch_size=20, seed=seed, progress=False)
        return torch.cat([p.detach().flatten() for p in q.parameters()])

    one = fitted(1)
    torch.rand(5)
    assert torch.equal(fitted(1), one)
    assert not torch.equal(fitted(2), one)


def test_minibatches_meet_the_draws_of_their_own_rows():
    """Each row's posterior is narrow and far from the others': a mistaken row would cost many nats."""
    decoder = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        decoder.weight.fill_(1.0)
    model = lf.LatentVariableModel(decoder, lf.Gaussian(1e-4), 1)
    x = torch.linspace(-2, 2, 50, dtype=F64)[:, None]
    q = lf.FullCovarianceGaussian(nn.Linear(1, 2).double())
    with torch.no_grad():
        q.network.weight.copy_(torch.tensor([[1.0], [0.0]]))
        q.network.bias.copy_(torch.tensor([0.0, math.log(0.01)]))
    history = lf.fit_inference(
        model, q, x, sampler="hmc", num_samples=16, epochs=2, batch_size=7, learning_rate=1e-9, progress=False
    )  # fmt: skip
    entropy = math.log(0.01) + 0.5 * math.log(2 * math.pi * math.e)
    for record in history:
        if record["phase"] == "step 2":
            assert record["posterior"][0] == pytest.approx(entropy, abs=0.1)


def test_draws_are_of_each_replicas_own_model():
    models = [small_model() for _ in range(2)]
    q = inference("full-covariance")
    replicas = Replicas([make_system(m, q, None, 0, False) for m in models])

    class Stub:
        seed = torch.tensor(5)
        options = FitOptions()
        train = validation = Rows.whole(models[0].sample(8, seed=1))

    Stub.replicas = replicas
    keep_draws(Stub, "hmc", 64)
    draws = replicas.own["draws"]
    assert draws.shape == (2, 8, 64, 2)
    for r, model in enumerate(models):
        exact = lf.sample_posterior(model, Stub.train.values, 4000, seed=9)
        off = (draws[r].mean(1) - exact.mean) / exact.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        assert off.abs().mean() < 0.35


@of_processes
def _fit(rank, world, result, sampler):
    d = data(F64)
    wide = {"simulated_std": 2.0} if "simulated" in sampler else {}
    libi = lf.LiBI(d.model(), inference("mixture", columns=2), step2="posterior", sampler=sampler, repeats=1, **wide)
    libi.fit(d.train, d.validation, epochs=60, progress=False)
    result.append((rank, [p.tolist() for p in libi.state().values()]))


@pytest.mark.parametrize("sampler", ["simulated+sir"])
def test_two_processes_learn_one_q(sampler):
    alone = in_one_process(_fit, sampler)
    together = in_two_processes(_fit, sampler)
    assert together[0][1] == together[1][1], "the processes agree to the bit"
    for one, two in zip(alone[0][1], together[0][1], strict=True):
        torch.testing.assert_close(torch.tensor(one, dtype=F64), torch.tensor(two, dtype=F64), rtol=1e-6, atol=1e-8)


def test_settings_train_side_by_side_as_each_alone():
    sets = [lf.data.LinearJTEx(seed=s, train=60, validation=40, test=20, dtype=F64) for s in (3, 4)]
    methods = [
        lf.LiBI(sets[0].model(), inference("mixture", columns=2), hz_weight=w, step2="posterior", sampler="sir", repeats=1)
        for w in (1.0, 3.0)
    ]
    grid = lf.fit_grid(methods, sets, epochs=30, restarts=2, progress=False)
    alone = lf.LiBI(*methods[1]._sources[:2], hz_weight=3.0, step2="posterior", sampler="sir", repeats=1)
    alone.fit(sets[1].train, sets[1].validation, epochs=30, restarts=2, progress=False)
    for name, value in alone.state().items():
        assert torch.allclose(grid[1][1].state()[name], value, atol=1e-7), name


def test_early_stopping_looks_at_draws_of_held_out_rows():
    model = small_model()
    q = inference("full-covariance")
    history = lf.fit_inference(
        model, q, model.sample(60, seed=1), model.sample(30, seed=2), epochs=60, early_stopping=True, progress=False
    )  # fmt: skip
    looks = [h["validation"][0] for h in history if h["phase"] == "step 2"]
    assert history[-1]["objective"][0] == min(looks) < looks[0]


# --- mistakes ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step2": "kl"}, "step2 must be one of 'elbo', 'importance', 'posterior', 'elbo\\+posterior', got 'kl'"),
        ({"sampler": "nuts"}, "sampler must be one of 'simulated', 'sir', 'hmc', .*, got 'nuts'"),
        ({"step2": "importance"}, "step2='importance' takes a MeanFieldGaussian, got MixtureGaussian"),
        ({"step1": "importance"}, "step1='importance' takes a MeanFieldGaussian, got MixtureGaussian"),
        ({"step2": "posterior", "simulated_std": 0.0}, "simulated_std must be"),
        ({"step2": "posterior", "simulated_std": 0.9}, "simulated_std must be at least 1"),
        ({"step2": "elbo", "simulated_std": 2.0}, "simulated_std is of 'posterior' with a sampler that simulates"),
    ],
)
def test_settings_of_libi_that_do_not_fit_are_named(settings, message):
    with pytest.raises(lf.InputError, match=message):
        lf.LiBI(small_model(), inference("mixture"), **settings)


def test_other_mistakes_are_named():
    model, q = small_model(), inference("mixture")
    x = torch.randn(30, 3, dtype=F64)
    with pytest.raises(lf.InputError, match="IWAE takes a MeanFieldGaussian, got MixtureGaussian"):
        lf.IWAE(model, q)
    with pytest.raises(lf.InputError, match="method must be one of"):
        lf.fit_inference(model, q, x, method="forward")
    with pytest.raises(lf.InputError, match="method='importance' takes a MeanFieldGaussian"):
        lf.fit_inference(model, q, x, method="importance")
    with pytest.raises(lf.InputError, match="num_samples must be a multiple of the 16 chains of 'hmc', got 20"):
        lf.fit_inference(model, q, x, sampler="hmc", num_samples=20)
    with pytest.raises(lf.InputError, match="simulated_std is of 'posterior' with a sampler that simulates"):
        lf.fit_inference(model, q, x, sampler="sir", simulated_std=1.5)
    with pytest.raises(lf.InputError, match="simulated_std must be"):
        lf.fit_inference(model, q, x, simulated_std=float("nan"))
    with pytest.raises(lf.InputError, match="num_samples must be at least 1"):
        lf.fit_inference(model, q, x, num_samples=0)
    with pytest.raises(TypeError, match="q must be a MeanFieldGaussian, FullCovarianceGaussian or MixtureGaussian, got Linear"):
        lf.fit_inference(model, nn.Linear(3, 4), x)
    with pytest.raises(TypeError, match="model must be a LatentVariableModel, got Linear"):
        lf.fit_inference(nn.Linear(2, 3), q, x)
    with pytest.raises(lf.InputError, match="3 values a row but the data has 2 columns"):
        lf.fit_inference(model, q, x[:, :2])
    with pytest.raises(lf.InputError, match="share their architecture"):
        lf.fit_inference(model, q, x, encoder=lf.mlp(3, [7], 4).double(), epochs=2, progress=False)
    loader = DataLoader(TensorDataset(x), 10)
    with pytest.raises(lf.InputError, match="sampler='sir' keeps draws of every row"):
        lf.fit_inference(model, q, loader, sampler="sir")
    lf.fit_inference(model, q, loader, sampler="simulated", epochs=2, progress=False)  # which needs no rows
    with pytest.raises(lf.InputError, match="each of 3 components as many values"):
        lf.fit_inference(model, lf.MixtureGaussian(lf.mlp(3, [5], 16).double(), 3), x, epochs=2)
