"""LiBI's choices: constraints, mutual information, and what steps 1 and 2 maximise."""

import contextlib
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import libi_fast as lf
from libi_fast import figures
from libi_fast.models.laplace import laplace, local_frame, local_log_likelihood, log_ratios
from libi_fast.models.likelihoods import Likelihood
from libi_fast.ops.henze_zirkler import whiten
from libi_fast.ops.importance import gaussian
from libi_fast.ops.random import as_seed
from libi_fast.ops.training import safe_exp
from libi_fast.reproduce.references import cubic_log_likelihood, cubic_maximum_likelihood
from libi_fast.training.constraints import Step1, constraint_from_config
from libi_fast.training.distributed import Rows
from libi_fast.training.replicas import Replicas, make_system

S2 = 1.5  # of the univariate example: x = theta z + eps, eps ~ N(0, S2 - theta^2), so p(x) = N(0, S2) for every theta


class Tied(Likelihood):
    """Gaussian noise of variance S2 - theta^2, theta the weight of the decoder."""

    name = "tied"

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    @property
    def variance(self):
        return (S2 - self.decoder.weight.square().reshape(1)).clamp_min(1e-3)

    def log_prob(self, x, output):
        return gaussian(x, output, self.variance)

    def sample(self, output, noise):
        return output + self.variance.sqrt() * noise

    def information(self, output):
        return (1 / self.variance).expand_as(output)


class Start(nn.Linear):
    """A restart begins at theta = 0.5."""

    def reset_parameters(self):
        with torch.no_grad():
            self.weight.fill_(0.5)


def univariate(theta=0.5):
    decoder = Start(1, 1, bias=False).double()
    model = lf.LatentVariableModel(decoder, Tied(decoder), 1)
    with torch.no_grad():
        decoder.weight.fill_(theta)
    return model, lf.MeanFieldGaussian(nn.Linear(1, 2).double())


def information(theta):
    return 0.5 * math.log(S2 / (S2 - theta**2))  # paper, appendix C


# --- mutual information ---


@pytest.mark.parametrize("theta", [0.1, 0.7, 1.1, 1.2])
def test_univariate_information_is_its_closed_form(theta):
    found = lf.mutual_information(univariate(theta)[0], seed=1)
    assert float(found.value) == pytest.approx(information(theta), abs=0.05)
    assert abs(float(found.value) - information(theta)) < 4 * float(found.standard_error) + float(
        (0.5 / found.effective_sample_size).mean()
    )


def test_linear_information_is_its_closed_form_and_high_rather_than_low():
    model = lf.LatentVariableModel(nn.Linear(2, 3).double(), lf.DiagonalGaussian(torch.tensor([0.1, 0.2, 1e-4])), 2)
    exact = float(lf.exact_mutual_information(model))
    many = lf.mutual_information(model, 20_000, 64, seed=2)
    assert abs(float(many.value) - exact) < 4 * float(many.standard_error) + 0.01
    few = lf.mutual_information(model, 20_000, 1, seed=2)  # E[-log p] of one sample: KL[proposal || posterior] above
    wider = 1.5
    bias = 2 * 0.5 * (wider - 1 - math.log(wider))
    assert float(few.value) == pytest.approx(exact + bias, abs=4 * float(few.standard_error))


def test_information_of_a_bernoulli_model_by_enumeration():
    torch.manual_seed(3)
    model = lf.LatentVariableModel(nn.Linear(1, 3).double(), lf.Bernoulli(), 1)
    with torch.no_grad():
        model.decoder.weight.mul_(3)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    nodes = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    prior = torch.softmax(-0.5 * nodes[:, 0].square(), 0)
    with torch.no_grad():
        given = model.log_prob(x[:, None], nodes)  # [8, nodes]
        marginal = (given.exp() * prior).sum(1, keepdim=True).log()
        exact = float((given.exp() * prior * (given - marginal)).sum())
    found = lf.mutual_information(model, 20_000, 64, seed=1)
    assert abs(float(found.value) - exact) < 4 * float(found.standard_error) + 0.01


@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_the_gradient_of_information_is_that_of_the_exact_one(kind):
    """For Gaussian noise by draws that move with theta, for Bernoulli data by the score function."""
    torch.manual_seed(0)
    decoder = nn.Linear(1, 2).double()
    model = lf.LatentVariableModel(decoder, lf.Gaussian(0.3) if kind == "gaussian" else lf.Bernoulli(), 1)
    n = 20_000
    z = lf.philox_normal(1, n, 1, dtype=torch.float64)
    draw = lf.philox_normal if kind == "gaussian" else lf.philox_uniform
    noise = draw(2, n, 2, dtype=torch.float64)
    inner = lf.philox_normal(3, n, 128, dtype=torch.float64).unflatten(-1, (128, 1))  # the bias falls as 1 / 128
    if kind == "gaussian":  # matched moments leave a linear model no sampling error
        z, noise = whiten(torch.cat((z, noise), -1)[None])[0][0].split([1, 2], -1)
    ratios, _ = log_ratios(model, z, noise, inner)
    (found,) = torch.autograd.grad(ratios.mean(), decoder.weight)
    if kind == "gaussian":
        exact = 0.5 * torch.logdet(torch.eye(1).double() + decoder.weight.mT @ decoder.weight / 0.3)
    else:
        x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 2)
        nodes = torch.linspace(-8, 8, 2001, dtype=torch.float64)[:, None]
        prior = torch.softmax(-0.5 * nodes[:, 0].square(), 0)
        given = model.log_prob(x[:, None], nodes)
        exact = (given.exp() * prior * (given - (given.exp() * prior).sum(1, keepdim=True).log())).sum()
    (expected,) = torch.autograd.grad(exact, decoder.weight)
    assert torch.allclose(found, expected, atol=5e-3 if kind == "gaussian" else 0.02)


def test_a_likelihood_without_fisher_information_says_so():
    class Plain(Likelihood):
        def log_prob(self, x, output):
            return -(x - output).abs().sum(-1)

        def sample(self, output, noise):
            return output + noise

    model = lf.LatentVariableModel(nn.Linear(1, 2), Plain(), 1)
    with pytest.raises(NotImplementedError, match="Fisher information"):
        lf.mutual_information(model)
    with pytest.raises(lf.InputError, match="at least 2 points"):
        lf.mutual_information(univariate()[0], num_points=1)


# --- the constraint binds ---


def fixed_noise(weight=1.0):
    """x = theta z + eps, eps ~ N(0, 0.25): the likelihood of N(0, 1) data has its optimum at theta^2 = 0.75, I = 0.69."""
    model = lf.LatentVariableModel(nn.Linear(1, 1, bias=False).double(), lf.Gaussian(0.25), 1)
    return model, lf.MeanFieldGaussian(nn.Linear(1, 2).double())


@pytest.mark.parametrize("step1", ["joint", "importance", "quadrature"])
def test_a_bound_above_the_optimum_moves_the_information_to_it(step1):
    x = lf.philox_normal(5, 400, 1, dtype=torch.float64)
    reached = []
    for constraints in ([], [lf.MutualInformation(at_least=0.4)], [lf.MutualInformation(at_least=1.2)]):
        libi = lf.LiBI(*fixed_noise(), repeats=1, step1=step1, constraints=constraints)
        libi.fit(x, epochs=600, seed=1, progress=False)
        reached.append(float(lf.exact_mutual_information(libi.model)))
    unconstrained, below, above = reached
    assert 0.55 < unconstrained < 0.9
    assert below == pytest.approx(unconstrained, abs=0.01), "a bound that holds anyway changes nothing"
    assert above == pytest.approx(1.2, abs=0.05)


def test_where_the_likelihood_is_flat_the_bound_alone_decides():
    """The univariate example: every theta has the same p(x), so importance-weighted likelihood leaves I to the constraint."""
    x = math.sqrt(S2) * lf.philox_normal(5, 400, 1, dtype=torch.float64)
    libi = lf.LiBI(
        *univariate(), repeats=1, step1="quadrature", warm_up=0, constraints=[lf.MutualInformation(at_least=1.0)]
    )  # fmt: skip
    libi.fit(x, epochs=10, progress=False)
    libi.fit(x, epochs=600, warm_start=True, progress=False)
    with torch.no_grad():
        libi.model.decoder.weight.fill_(0.4)
    libi.fit(x, epochs=900, warm_start=True, progress=False)
    assert information(libi.model.decoder.weight.item()) == pytest.approx(1.0, abs=0.05)


@dataclass(frozen=True)
class Small(lf.Constraint):
    """The decoder's mean square on the codes of x stays below a bound."""

    bound: float = 0.2
    name = "size"
    tolerance = 0.05

    def violation(self, step):
        assert step.x.shape[-1] == 1 and step.z.shape[-1] == 1
        assert step.log_prob(step.x, step.z).shape == step.z.shape[:2]
        return (step.decode(step.z).square().mean((-1, -2)) - self.bound).clamp_min(0)


def test_a_constraint_of_a_users_own_holds_and_is_in_the_history(tmp_path):
    x = lf.philox_normal(5, 400, 1, dtype=torch.float64)
    free = lf.LiBI(*fixed_noise(), repeats=1).fit(x, epochs=300, restarts=2, progress=False)
    assert free.model.decode(free.codes(x)).square().mean() > 0.5
    libi = lf.LiBI(*fixed_noise(), repeats=1, constraints=[Small(), Small(bound=0.9)])
    libi.fit(x, epochs=600, restarts=2, progress=False)
    assert 0.1 < libi.model.decode(libi.codes(x)).square().mean() < 0.25
    last = [h for h in libi.history if h["phase"] == "step 1"][-1]
    assert last["size 1"] == [1.0, 1.0]  # exp(0): the second constraint of that name holds with room
    libi.save(tmp_path / "run")
    with pytest.warns(UserWarning, match="without the constraints of your own: Small, Small"):
        again = lf.load(tmp_path / "run")
    assert again.settings["constraints"] == ()


def test_built_in_constraints_are_saved_and_loaded(tmp_path):
    constraint = lf.MutualInformation(at_least=0.5, tolerance=0.2, num_points=32)
    libi = lf.LiBI(*fixed_noise(), repeats=1, constraints=[constraint], step1="importance", step2="importance", hz_beta=1.0)
    libi.fit(lf.philox_normal(5, 60, 1, dtype=torch.float64), epochs=12, progress=False).save(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = lf.load(tmp_path / "run")
    assert {**again.settings, "constraints": tuple(again.settings["constraints"])} == libi.settings
    assert constraint_from_config({"custom": "Small"}) is None


def test_the_penalty_is_exp_of_the_violation_over_its_tolerance():
    class Fixed(lf.Constraint):
        name, tolerance = "fixed", 0.5

        def violation(self, step):
            return torch.full((2,), 0.7, dtype=torch.float64)

    model, inference = fixed_noise()
    libi = lf.LiBI(model, inference, constraints=[Fixed()])
    replicas = Replicas([make_system(model, inference, None, s, True) for s in range(2)])
    rows = Rows.whole(torch.zeros(5, 1, dtype=torch.float64))

    class Run:
        pass

    Run.replicas, Run.seed = replicas, as_seed(1)
    taken = {"fixed": torch.zeros(2)}
    terms = libi._constrained(taken, Run, rows, replicas.codes(rows.values), 0)
    assert terms["fixed"] is taken["fixed"], "a term of that name is not replaced"
    assert terms["fixed 0"].tolist() == pytest.approx([math.exp(1.4)] * 2)
    assert float(safe_exp(torch.tensor(1.4))) == pytest.approx(math.exp(1.4))


def test_a_constraints_draws_are_new_in_every_step_and_those_of_a_restart_alone():
    model, inference = fixed_noise()
    x = torch.zeros(5, 1, dtype=torch.float64)

    def draws(replicas, step, use=0):
        context = Step1(replicas, Rows.whole(x), replicas.codes(x), as_seed(1), step)
        return context.draws(4, 3, use=use)

    three = Replicas([make_system(model, inference, None, s, True) for s in range(3)])
    first = draws(three, 7)
    assert not torch.equal(first, draws(three, 8)) and not torch.equal(first, draws(three, 7, use=1))
    assert len({tuple(r.flatten().tolist()) for r in first}) == 3
    three.select(torch.tensor([2]))
    assert torch.equal(draws(three, 7)[0], first[2])


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (lf.InputError, "at_least", lambda: lf.MutualInformation(at_least=0.0)),
        (lf.InputError, "tolerance", lambda: lf.MutualInformation(at_least=1.0, tolerance=-1.0)),
        (lf.InputError, "2 points", lambda: lf.MutualInformation(at_least=1.0, num_points=1)),
        (TypeError, "lf.Constraint objects, got int", lambda: lf.LiBI(*fixed_noise(), constraints=[3])),
        (TypeError, "must be a list", lambda: lf.LiBI(*fixed_noise(), constraints=lf.MutualInformation(at_least=1.0))),
        (lf.InputError, "Rewarding.tolerance must be positive", lambda: lf.LiBI(*fixed_noise(), constraints=[Rewarding()])),
        (lf.InputError, "step1 must be one of", lambda: lf.LiBI(*fixed_noise(), step1="exact")),
        (lf.InputError, "step2 must be one of", lambda: lf.LiBI(*fixed_noise(), step2="mcmc")),
        (lf.InputError, "hz_method must be one of", lambda: lf.LiBI(*fixed_noise(), hz_method="fast")),
        (lf.InputError, "hz_beta", lambda: lf.LiBI(*fixed_noise(), hz_beta=0.0)),
        (lf.InputError, "num_samples", lambda: lf.LiBI(*fixed_noise(), num_samples=0)),
        (lf.InputError, "encoder=None", lambda: lf.LiBI(*fixed_noise(), encoder=nn.Linear(1, 1), step1="importance")),
        (
            lf.InputError, "latent_dim is 3",
            lambda: lf.LiBI(lf.LatentVariableModel(nn.Linear(3, 4), lf.Gaussian(1.0), 3), lf.MeanFieldGaussian(nn.Linear(4, 6)),
                            step1="quadrature"),
        ),
    ],
)  # fmt: skip
def test_bad_choices_are_named(error, message, make):
    with pytest.raises(error, match=message):
        make()


class Rewarding(lf.Constraint):
    tolerance = -1.0


@pytest.mark.parametrize("violation", [lambda s: s.z.sum(), lambda s: s.z.sum(-1), lambda s: 3.0])
def test_a_violation_of_another_shape_is_named(violation):
    class Odd(lf.Constraint):
        pass

    Odd.violation = lambda self, step: violation(step)
    with pytest.raises(lf.InputError, match=r"Odd.violation must be \[R\] = \(8,\), got"):
        lf.LiBI(*fixed_noise(), repeats=1, constraints=[Odd()]).fit(
            torch.randn(30, 1).double(), epochs=12, restarts=2, progress=False
        )


def test_a_resumed_run_knows_a_changed_constraint_of_a_users_own():
    assert Small().config() == Small().config() != Small(bound=0.3).config()


def test_a_decoder_without_a_jacobian_is_named():
    class Branching(nn.Linear):
        def forward(self, z):
            return super().forward(z) if bool(z.sum() == z.sum()) else z

    model = lf.LatentVariableModel(Branching(2, 3), lf.Gaussian(1.0), 2)
    with pytest.raises(lf.InputError, match="decoder's Jacobian"):
        lf.mutual_information(model)


# --- Laplace's approximation and local quadrature ---


def test_laplace_is_the_exact_posterior_of_a_linear_model_from_any_code():
    model = lf.LatentVariableModel(nn.Linear(2, 3).double(), lf.DiagonalGaussian(torch.tensor([0.1, 0.2, 1e-6])), 2)
    x = torch.randn(6, 3, dtype=torch.float64)
    mean, covariance = lf.exact_posterior(model, x)
    found, scale = laplace(model, x, torch.randn(6, 2, dtype=torch.float64))
    assert torch.allclose(found, mean, atol=1e-8)
    assert torch.allclose(scale @ scale.mT, covariance.expand(6, 2, 2), atol=1e-12)


def test_laplace_of_a_bernoulli_model_moves_to_the_mode():
    torch.manual_seed(1)
    model = lf.LatentVariableModel(lf.mlp(2, [4], 9).double(), lf.Bernoulli(), 2)
    x = (torch.rand(5, 9, dtype=torch.float64) < 0.5).double()
    z = torch.zeros(5, 2, dtype=torch.float64)
    for _ in range(60):
        z, scale = laplace(model, x, z)
    z.requires_grad_()
    joint = model.log_prob(x, z) - 0.5 * z.square().sum(-1)
    (slope,) = torch.autograd.grad(joint.sum(), z)
    assert slope.abs().max() < 1e-6
    assert (torch.linalg.det(scale) < 1).all()


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("variance", [1.0, 1e-6])
def test_local_quadrature_is_exact_for_linear_models_with_its_gradient(latent_dim, variance):
    model = lf.LatentVariableModel(nn.Linear(latent_dim, 3).double(), lf.Gaussian(variance), latent_dim)
    x = model.sample(5, seed=1)
    found = local_log_likelihood(model, x, torch.randn(5, latent_dim, dtype=torch.float64))
    exact = lf.exact_log_likelihood(model, x)
    assert torch.allclose(found, exact, atol=1e-5)
    weight, bias = model.decoder.weight, model.decoder.bias
    law = torch.distributions.MultivariateNormal(bias, weight @ weight.mT + variance * torch.eye(3, dtype=torch.float64))
    gradients = [torch.autograd.grad(v.mean(), weight)[0] for v in (found, law.log_prob(x))]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4 * gradients[1].abs().max())


@pytest.mark.parametrize(("name", "error"), [("Mobius", 1e-4), ("CubicJTEx", 0.02)])
def test_local_quadrature_of_the_paper_s_sets(name, error):
    """Against the adaptive one over the whole plane; CubicJTEx's posteriors have flat tops, and a few rows err by some 0.1."""
    d = lf.data.load(name, 3, dtype=torch.float64)
    x, z = d.test[:100], d.test_codes[:100] + 0.02
    gap = local_log_likelihood(d.truth.model, x, z) - d.truth.log_likelihood(x)
    assert gap.abs().mean() < error and gap.abs().median() < error / 4
    single = local_log_likelihood(d.truth.model.float(), x.float(), z.float())
    d.truth.model.double()
    assert (single - (gap + d.truth.log_likelihood(x))).abs().median() < 2e-3


# --- step 1 by likelihoods ---


@pytest.mark.parametrize("step1", ["importance", "quadrature"])
def test_step_1_by_the_likelihood_reaches_that_of_exact_maximum_likelihood(step1):
    """LinearJTEx in float64: the optimum of the likelihood is the sample covariance's."""
    d = lf.data.LinearJTEx(seed=3, train=200, validation=100, dtype=torch.float64)
    libi = lf.LiBI(d.model(), d.inference(), repeats=1, step1=step1, num_samples=32)
    libi.fit(d.train, d.validation, epochs=1200, restarts=1, seed=1, progress=False)
    covariance = d.train.T @ d.train / len(d.train)
    best = torch.distributions.MultivariateNormal(torch.zeros(2).double(), covariance).log_prob(d.train).mean().item()
    reached = lf.exact_log_likelihood(libi.model, d.train).mean().item()
    assert best - 0.02 < reached < best + 1e-9
    selection = libi.history[-1]
    held_out = lf.exact_log_likelihood(libi.model, d.validation).mean().item()
    if step1 == "quadrature":  # restarts are judged by the held-out likelihood itself
        assert -min(selection["objective"]) == pytest.approx(held_out, abs=1e-4)


@pytest.mark.parametrize("hz_method", ["quadrature", "random", "sliced"])
def test_every_form_of_the_statistic_trains(hz_method):
    d = lf.data.LinearJTEx(seed=3, train=100, validation=40, test=10)
    libi = lf.LiBI(d.model(), d.inference(), repeats=1, hz_method=hz_method, hz_beta=1.5)
    libi.fit(d.train, d.validation, epochs=60, restarts=2, progress=False)
    z = libi.codes(d.train)
    exact = float(lf.henze_zirkler(z, beta=1.5).statistic)
    if hz_method == "quadrature":
        term = libi.step1_terms(Replicas([libi.system]), Rows.whole(d.train))["henze_zirkler"]
        assert term.item() == pytest.approx(math.exp(exact), rel=1e-4)
    assert math.isfinite(exact)


def test_finalists_are_those_of_the_highest_likelihood_and_end_in_one():
    d = lf.data.LinearJTEx(seed=3, train=100, validation=60, test=10)
    options = {"step1": "quadrature", "repeats": 1, "warm_up": 2, "candidates": 1, "likelihood_share": 0.2}
    libi = lf.LiBI(d.model(), d.inference(), finalists=1, **options)
    libi.fit(d.train, d.validation, epochs=90, restarts=4, seed=1, progress=False)
    selection = libi.history[-1]
    assert len(selection["objective"]) == 1
    phases = {r["phase"]: r["epoch"] for r in libi.history if "epoch" in r}
    assert phases["step 1"] < phases["step 1, joint"] / 3
    assert max(r["epoch"] for r in libi.history if r["phase"] == "step 2") == 29
    shorter = lf.LiBI(d.model(), d.inference(), repeats=1, warm_up=2, candidates=1, step1_share=1 / 3)
    shorter.fit(d.train, d.validation, epochs=90, restarts=1, seed=1, progress=False)
    assert max(r["epoch"] for r in shorter.history if r["phase"] == "step 2") == 59
    for wrong in ({"finalists": 0}, {"likelihood_share": 1.0}, {"likelihood_share": 0.0}, {"step1_share": 0.0}):
        with pytest.raises(lf.InputError, match=next(iter(wrong))):
            lf.LiBI(d.model(), d.inference(), **wrong)


def blind_libi(rows=40):
    """CubicJTEx at its truth, and an encoder that maps every row to 0: it sees nothing of p(x)."""
    d = lf.data.CubicJTEx(seed=2, train=rows, validation=20, test=10)
    libi = lf.LiBI(d.model(), d.inference(), step1="quadrature", repeats=1)
    with torch.no_grad():
        libi.model.decoder[0].a.copy_(torch.tensor([[0.75, 0.25], [1.5, -1.0]]))
        for parameter in libi.system.inference.parameters():
            parameter.zero_()
    return d, libi


def keep_frames(replicas, rows, model):
    mean, scale = local_frame(model, rows.values, lf.laplace_mixture(model, rows.values).heaviest())
    replicas.own |= {name: t.expand(replicas.count, *t.shape).clone() for name, t in (("means", mean), ("scales", scale))}
    replicas.own["held-out means"] = replicas.own["means"].clone()


def test_integrals_are_around_modes_where_codes_are_poor():
    d, libi = blind_libi()
    replicas, rows = Replicas([libi.system]), Rows.whole(d.train)

    def integrals(held_out):
        return libi._integrals(replicas, rows, replicas.codes(rows.values), held_out)[0]

    exact, blind = d.truth.log_likelihood(d.train), integrals(False)
    keep_frames(replicas, rows, libi.model)
    assert (blind - exact).abs().mean() > 1
    for held_out in (False, True):
        assert (integrals(held_out) - exact).abs().mean() < 0.05


@pytest.mark.parametrize("step", [0.005, 0.5])
@pytest.mark.parametrize("count", [1, 19])
def test_integrals_follow_theta(step, count):
    """As Adam moves it, and by a leap after which no row's mass is where it was; of more replicas than fill a block, too."""
    d, libi = blind_libi()
    replicas, rows = Replicas([libi.system] * count), Rows.whole(d.train)
    keep_frames(replicas, rows, libi.model)
    for turn in range(40 if step < 0.1 else 2):  # after a leap nodes are moved where the mass is, and then fitted to it
        with torch.no_grad():
            replicas.parameters["model.decoder.0.a"].mul_(1 - step if step < 0.1 or turn == 0 else 1)
        for start in range(0, count, 16):
            with replicas.block(start, 16) if count > 1 else contextlib.nullcontext():
                found = libi._integrals(replicas, rows, replicas.codes(rows.values), False)
    assert torch.allclose(replicas.own["means"][-1], replicas.own["means"][0], atol=1e-4)
    replicas.load_into(libi.system, replicas.parameters, 0)
    weight = libi.model.decoder[0].weight.detach().double()
    exact = cubic_log_likelihood(d.train.double(), d.noise_variance.double(), weight)
    moved = (exact - d.truth.log_likelihood(d.train)).abs().mean()
    assert (found[-1] - exact).abs().mean() < (0.02 if step < 0.1 else 0.05) < 0.1 < moved


def test_step_1_by_quadrature_ends_at_the_maximum_of_the_likelihood_of_cubic_models():
    d = lf.data.CubicJTEx(seed=4, train=150, validation=50, test=10)
    options = {"step1": "quadrature", "repeats": 1, "candidates": 1, "warm_up": 100, "finalists": 1}
    libi = lf.LiBI(d.model(), d.inference(), likelihood_share=0.5, **options)
    libi.fit(d.train, d.validation, epochs=900, restarts=8, seed=1, progress=False)
    best = cubic_maximum_likelihood(d.train.double(), d.noise_variance.double(), d.truth.model.decoder[0].weight.double())
    factor = torch.linalg.cholesky(best @ best.mT + torch.diag(libi.model.decoder[0].b))
    values = [
        cubic_log_likelihood(d.train.double(), d.noise_variance.double(), w.double()).mean().item()
        for w in (factor, libi.model.decoder[0].weight.detach())
    ]
    assert values[0] - 0.01 < values[1] < values[0] + 1e-9


@pytest.mark.parametrize(("step2", "seed"), [("posterior", 3), ("elbo", 2)])
def test_step_2_keeps_the_best_of_several_networks(step2, seed):
    """theta and what restarts are judged by are those of one network; q is another only where that is better."""
    d = lf.data.CubicJTEx(seed=2, train=80, validation=60, test=10)

    def fitted(count):
        options = {"repeats": 1, "warm_up": 20, "candidates": 2, "step2": step2, "sampler": "simulated"}
        libi = lf.LiBI(d.model(), d.inference(), inference_restarts=count, **options)
        libi.fit(d.train, d.validation, epochs=300, restarts=1, seed=seed, progress=False)
        return libi

    one, several = fitted(1), fitted(4)
    assert one.history[-1]["objective"] == pytest.approx(several.history[-1]["objective"])
    states = one.state(), several.state()
    theta = [k for k in states[0] if k.startswith("model.")]
    assert theta and all(torch.equal(states[0][k], states[1][k]) for k in theta)
    last = [[r for r in m.history if r["phase"] == "step 2"][-1] for m in (one, several)]
    terms = ["simulated"] if step2 == "posterior" else ["reconstruction", "kl"]
    ended = [torch.tensor([record[t] for t in terms]).sum(0) for record in last]
    assert len(ended[0]) == 1 and len(ended[1]) == 4 and ended[1][0] == pytest.approx(ended[0].item(), rel=1e-3)
    (networks,) = (r["objective"] for r in several.history if r["phase"] == "networks")
    assert len(networks) == 4 and torch.tensor(networks).argmin() == ended[1].argmin()
    (axis,) = (a for a in figures.training_curves(several.history).axes if a.get_title() == "step 2")
    kept = [line.get_ydata()[-1] for line in axis.lines if line.get_color() == figures.CURVE_COLOURS[0]]
    assert kept[0] == pytest.approx(ended[1].min().item())
    q = [{k: v for k, v in state.items() if k.startswith("inference.")} for state in states]
    same = all(torch.equal(q[0][k], q[1][k]) for k in q[0])
    assert same == (int(ended[1].argmin()) == 0) == (step2 == "elbo")
    if step2 == "posterior":
        z, noise = torch.randn(2, 4000, 2, generator=torch.Generator().manual_seed(5))
        x = one.model.likelihood.sample(one.model.decode(z), noise)
        values = [m.system.inference(x).log_prob(z[:, None]).mean().item() for m in (one, several)]
        assert values[1] > values[0] + 0.03
    with pytest.raises(lf.InputError, match="inference_restarts"):
        fitted(0)


def test_at_the_optimum_the_decoder_s_prior_balances_the_likelihood():
    """Of a free linear decoder: the likelihood's slope is the precision times the weight, over the rows; the bias is free."""
    d = lf.data.LinearJTEx(seed=3, train=200, validation=50, dtype=torch.float64)
    model = lf.LatentVariableModel(nn.Linear(2, 2).double(), lf.Gaussian(0.01), 2)
    precision = 40.0
    libi = lf.LiBI(model, d.inference(), repeats=1, step1="quadrature", decoder_precision=precision, finalists=1)
    libi.fit(d.train + 0.5, d.validation + 0.5, epochs=700, restarts=2, seed=1, progress=False)
    weight, bias = (p.detach().clone().requires_grad_() for p in libi.model.decoder.parameters())
    law = torch.distributions.MultivariateNormal(bias, weight @ weight.mT + 0.01 * torch.eye(2, dtype=torch.float64))
    slopes = torch.autograd.grad(law.log_prob(d.train + 0.5).mean(), (weight, bias))
    pull = precision / 200 * weight.detach()
    assert (slopes[0] - pull).norm() < 0.05 * pull.norm()
    assert slopes[1].norm() < 0.05 * pull.norm()
    for wrong in ({"decoder_precision": -1.0}, {"decoder_precision": 1.0, "step1": "joint"}):
        with pytest.raises(lf.InputError, match="decoder_precision"):
            lf.LiBI(model, d.inference(), **wrong)
    loader = torch.utils.data.DataLoader(d.train, batch_size=50)
    with pytest.raises(lf.InputError, match="decoder_precision needs to know"):
        libi.fit(loader, d.validation, epochs=9, progress=False)


def test_several_networks_after_a_step_1_that_learned_one():
    """Networks that are drawn anew begin with a spread that serves; the one that was learned is left as it is."""
    d = lf.data.GaussianExample(seed=1, train=80, validation=60, test=10)
    options = {"repeats": 1, "warm_up": 20, "candidates": 1, "step1": "importance"}
    libi = lf.LiBI(d.model(), d.inference(), inference_restarts=3, **options)
    libi.fit(d.train, d.validation, epochs=120, restarts=1, seed=1, progress=False)
    first = next(r for r in libi.history if r["phase"] == "step 2")
    began = torch.tensor(first["reconstruction"]) + torch.tensor(first["kl"])
    one = lf.LiBI(d.model(), d.inference(), **options)
    one.fit(d.train, d.validation, epochs=120, restarts=1, seed=1, progress=False)
    alone = next(r for r in one.history if r["phase"] == "step 2")
    assert began[0] == pytest.approx(alone["reconstruction"][0] + alone["kl"][0], rel=1e-3)
    # A network that knows nothing is as far from every code as the prior is: with std s it pays some |W|^2 / (2 noise).
    weight = libi.model.decoder.weight.detach()
    assert (began[1:] < 10 * weight.square().sum() / 2e-6).all()
