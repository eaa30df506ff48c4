"""Models: closed forms against scipy and quadrature, recognising decoders, sampling."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import libi_fast as lf
from libi_fast.models.networks import ACTIVATIONS, build, chain, describe, recognise

F64 = torch.float64


def linear_model(d: int = 4, latent_dim: int = 2, layers: int = 1) -> lf.LatentVariableModel:
    widths = [latent_dim, *[3] * (layers - 1), d]
    parts = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    variance = torch.linspace(0.3, 1.2, d, dtype=F64)
    return lf.LatentVariableModel(nn.Sequential(*parts), lf.DiagonalGaussian(variance), latent_dim).double()


# --- closed forms ---


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_exact_log_likelihood_against_scipy(layers: int) -> None:
    model = linear_model(layers=layers)
    x = 3 * torch.randn(50, 4, dtype=F64)
    with torch.no_grad():
        mean = model.decode(torch.zeros(1, 2, dtype=F64))[0]
        weight = (model.decode(torch.eye(2, dtype=F64)) - mean).T.numpy()
    covariance = weight @ weight.T + np.diag(model.likelihood.variance.numpy())  # type: ignore[attr-defined,operator]
    expected = stats.multivariate_normal(mean.numpy(), covariance).logpdf(x.numpy())
    np.testing.assert_allclose(lf.exact_log_likelihood(model, x).numpy(), expected, rtol=1e-11)
    found_mean, found_covariance = lf.linear_gaussian_marginal(model)
    np.testing.assert_allclose(found_mean.numpy(), mean.numpy(), rtol=1e-12)
    np.testing.assert_allclose(found_covariance.numpy(), covariance, rtol=1e-12, atol=1e-14)
    single = lf.exact_log_likelihood(model.float(), x.float())
    assert single.dtype == F64
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-4)


def test_exact_log_likelihood_of_jtex() -> None:
    """chol(A A' + B) z with noise s2 - B: p(x) = N(0, A A' + s2 I) whatever B is (the paper's bivariate example)."""
    a = torch.tensor([[0.75, 0.25], [1.5, -1.0]], dtype=F64)
    x = torch.randn(30, 2, dtype=F64)
    expected = stats.multivariate_normal(np.zeros(2), (a @ a.T).numpy() + 0.01 * np.eye(2)).logpdf(x.numpy())
    for b in ([0.006, 0.006], [0.001, 0.009], [0.0, 0.0]):
        decoder = lf.JTExMap(b).double()
        with torch.no_grad():
            decoder.a.copy_(a)
            decoder.b.copy_(torch.tensor(b, dtype=F64))
        variance = 0.01 - torch.tensor(b, dtype=F64)
        model = lf.LatentVariableModel(decoder, lf.DiagonalGaussian(variance), 2)
        np.testing.assert_allclose(lf.exact_log_likelihood(model, x).numpy(), expected, rtol=1e-9)


def grid(model: lf.LatentVariableModel, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Codes of a fine grid [G, 2], log p(x, z) there [N, G], and the area of a cell."""
    axis = torch.linspace(-7, 7, 401, dtype=F64)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
        return z, model.log_prob(x[:, None], z[None]) + log_prior, float(axis[1] - axis[0]) ** 2


def test_exact_posterior_by_quadrature() -> None:
    model = linear_model()
    x = torch.randn(3, 4, dtype=F64)
    z, joint, area = grid(model, x)
    evidence = torch.logsumexp(joint, -1) + math.log(area)
    torch.testing.assert_close(lf.exact_log_likelihood(model, x), evidence, rtol=1e-9, atol=1e-9)
    share = torch.softmax(joint, -1)
    mean = share @ z
    mean_found, covariance = lf.exact_posterior(model, x)
    torch.testing.assert_close(mean_found, mean, rtol=1e-8, atol=1e-8)
    for row in range(3):
        centred = z - mean[row]
        torch.testing.assert_close(covariance, (share[row, :, None] * centred).T @ centred, rtol=1e-7, atol=1e-8)


def test_closest_mean_field_by_quadrature() -> None:
    """KL[q || p(z | x)] on a grid: no nearby mean-field Gaussian comes closer."""
    model = linear_model()
    x = torch.randn(1, 4, dtype=F64)
    z, joint, area = grid(model, x)
    best = lf.closest_mean_field(model, x)

    def divergence(mean: Tensor, log_std: Tensor) -> float:
        log_q = torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum(-1)
        return float((log_q.exp() * (log_q - torch.log_softmax(joint[0], -1) + math.log(area))).sum() * area)

    mean, log_std = best.mean[0], best.log_std[0]
    least = divergence(mean, log_std)
    for _ in range(20):
        assert divergence(mean + 0.05 * torch.randn(2, dtype=F64), log_std + 0.05 * torch.randn(2, dtype=F64)) > least
    posterior_mean, covariance = lf.exact_posterior(model, x)
    torch.testing.assert_close(best.mean, posterior_mean)
    p = torch.distributions.MultivariateNormal(posterior_mean[0], covariance)
    q = torch.distributions.MultivariateNormal(mean, torch.diag(torch.exp(2 * log_std)))
    assert abs(least - float(torch.distributions.kl_divergence(q, p))) < 1e-7


def test_closed_forms_refuse_what_they_cannot_do() -> None:
    x = torch.zeros(2, 4)
    curved = lf.LatentVariableModel(lf.mlp(2, [3], 4), lf.Gaussian(1.0), 2)
    binary = lf.LatentVariableModel(nn.Linear(2, 4), lf.Bernoulli(), 2)
    for function in (lf.exact_log_likelihood, lf.exact_posterior, lf.closest_mean_field):
        with pytest.raises(lf.InputError, match="linear decoder"):
            function(curved, x)
        with pytest.raises(lf.InputError, match="Gaussian likelihood"):
            function(binary, x)
        hooked_model = lf.LatentVariableModel(nn.Linear(2, 4), lf.Gaussian(1.0), 2)
        hooked_model.decoder.register_forward_hook(lambda m, args, output: output**3)
        with pytest.raises(lf.InputError, match="linear decoder"):
            function(hooked_model, x)


def test_kl_from_the_prior() -> None:
    q = lf.models.model.MeanField(torch.randn(5, 3, dtype=F64), 0.5 * torch.randn(5, 3, dtype=F64))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(q.mean, q.log_std.exp()), normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(q.kl_from_prior(), expected)


# --- likelihoods ---


def test_log_prob_against_scipy() -> None:
    x, output = torch.rand(6, 3, dtype=F64), torch.randn(4, 6, 3, dtype=F64)
    for variance in (0.4, torch.tensor([0.1, 1.0, 5.0], dtype=F64)):
        for learned in (False, True):
            likelihood = lf.DiagonalGaussian(variance, learned=learned).double()
            scale = np.sqrt(torch.as_tensor(variance, dtype=F64).numpy())
            expected = stats.norm.logpdf(x.numpy(), output.numpy(), scale).sum(-1)
            np.testing.assert_allclose(likelihood.log_prob(x, output).detach().numpy(), expected, rtol=1e-6)
    x = (x > 0.5).double()
    expected = stats.bernoulli.logpmf(x.numpy(), torch.sigmoid(output).numpy()).sum(-1)
    np.testing.assert_allclose(lf.Bernoulli().log_prob(x, output).numpy(), expected, rtol=1e-10)
    extreme = lf.Bernoulli().log_prob(torch.tensor([[1.0], [0.0]]), torch.tensor([[200.0], [200.0]]))
    assert extreme.tolist() == [0.0, -200.0]


@pytest.mark.parametrize(
    "likelihood", [lf.Gaussian(0.3), lf.DiagonalGaussian(torch.tensor([0.2, 0.5], dtype=F64)), lf.Bernoulli()]
)
def test_likelihoods_come_back_from_their_configuration(likelihood: lf.Likelihood) -> None:
    from libi_fast.models.likelihoods import likelihood_from_config

    again = likelihood_from_config(likelihood.config())
    assert again.config() == likelihood.config()
    x, output = torch.rand(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64)
    torch.testing.assert_close(again.log_prob(x, output), likelihood.log_prob(x, output), rtol=0, atol=0)


# --- recognising decoders ---


class Renamed(nn.Sequential):
    """A subclass may do anything in forward."""

    def forward(self, z: Tensor) -> Tensor:
        return 2 * super().forward(z)


class Louder(nn.Linear):
    def forward(self, z: Tensor) -> Tensor:
        return 2 * super().forward(z)


def hooked(kind: str) -> nn.Module:
    module = lf.mlp(2, [4], 3)
    target = module if kind.startswith("outer") else module[0]
    if "pre" in kind:
        target.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    else:
        target.register_forward_hook(lambda m, args, output: 2 * output)
    return module


REFUSED = {
    "dropout": lambda: nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)),
    "leaky slope": lambda: nn.Sequential(nn.Linear(2, 4), nn.LeakyReLU(0.2), nn.Linear(4, 3)),
    "elu alpha": lambda: nn.Sequential(nn.Linear(2, 4), nn.ELU(0.5), nn.Linear(4, 3)),
    "softplus beta": lambda: nn.Sequential(nn.Linear(2, 4), nn.Softplus(beta=2.0), nn.Linear(4, 3)),
    "tanh gelu": lambda: nn.Sequential(nn.Linear(2, 4), nn.GELU("tanh"), nn.Linear(4, 3)),
    "two activations": lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.ReLU(), nn.Linear(4, 3)),
    "activation first": lambda: nn.Sequential(nn.Tanh(), nn.Linear(2, 3)),
    "no linear map": lambda: nn.Sequential(nn.Tanh()),
    "empty": lambda: nn.Sequential(),
    "subclass of Sequential": lambda: Renamed(nn.Linear(2, 3)),
    "nested subclass": lambda: nn.Sequential(Renamed(nn.Linear(2, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "subclass of Linear": lambda: nn.Sequential(Louder(2, 4), nn.Tanh(), nn.Linear(4, 3)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)),
    "forward hook": lambda: hooked("inner"),
    "forward pre-hook": lambda: hooked("inner pre"),
    "outer hook": lambda: hooked("outer"),
    "outer pre-hook": lambda: hooked("outer pre"),
    "function": lambda: nn.Bilinear(2, 2, 3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_recognise_refuses(name: str) -> None:
    assert recognise(REFUSED[name](), "gaussian") is None


@pytest.mark.parametrize("name", ["forward hook", "outer pre-hook", "subclass of Sequential", "weight norm", "leaky slope"])
def test_what_is_refused_is_evaluated_as_it_is(name: str) -> None:
    """The likelihood follows the module's own forward, hooks and all."""
    model = lf.LatentVariableModel(REFUSED[name](), lf.Gaussian(0.5), 2).double()
    x = torch.randn(4, 3, dtype=F64)
    with torch.no_grad():
        found = lf.log_likelihood(model, x, None, 30, seed=1).log_likelihood
        z = lf.philox_normal(1, 4, 60, dtype=F64).reshape(4, 30, 2)
        output = model.decoder(z.reshape(-1, 2)).reshape(4, 30, 3)
        expected = torch.logsumexp(model.likelihood.log_prob(x[:, None], output), -1) - math.log(30)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recognise_takes_every_activation(activation: str) -> None:
    module = lf.mlp(2, [4, 5], 3, activation)
    recognised = recognise(module, "gaussian")
    assert recognised is not None
    layers, tensors = recognised
    assert layers.activations == (activation, activation, "identity")
    assert [tuple(t.shape) for t in tensors] == [(1, 4, 2), (1, 4), (1, 5, 4), (1, 5), (1, 3, 5), (1, 3)]
    z, h = torch.randn(6, 2), torch.randn(6, 2)
    h = layers.decoder(tensors, torch.ones(1, 1)).run(z[None])[-1][1][0]
    torch.testing.assert_close(h, module(z))


def test_a_module_used_twice_comes_twice() -> None:
    act, square = nn.Tanh(), nn.Linear(4, 4)
    module = nn.Sequential(nn.Linear(2, 4), act, square, act, square, act, nn.Linear(4, 3))
    pairs = chain(module)
    assert pairs is not None
    assert [name for _, name in pairs] == ["tanh", "tanh", "tanh", "identity"]
    assert pairs[1][0] is pairs[2][0] is square


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(2, 3, bias=False),
        lf.JTExMap([0.1, 0.2]),
        lf.mlp(2, [4, 5], 3, "silu"),
        lf.mlp(2, [4], 3, "leaky_relu", bias=False),
        nn.Sequential(lf.JTExMap([0.1, 0.2]), lf.Cube()),
        nn.Sequential(nn.Sequential(nn.Linear(2, 4), nn.GELU()), nn.Linear(4, 3), nn.Identity()),
    ],
)
def test_describe_and_build(module: nn.Module) -> None:
    description = describe(module)
    assert description is not None
    again = build(description)
    assert describe(again) == description
    again.load_state_dict(module.state_dict())  # the same names: a saved run finds its weights
    z = torch.randn(5, 2)
    torch.testing.assert_close(again(z), module(z), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["dropout", "leaky slope", "elu alpha", "subclass of Sequential", "nested subclass", "subclass of Linear",
             "weight norm", "spectral norm", "forward hook", "outer pre-hook"],
)  # fmt: skip
def test_describe_refuses_what_build_could_not_make(name: str) -> None:
    assert describe(REFUSED[name]()) is None


def test_build_and_mlp_refuse_bad_input() -> None:
    with pytest.raises(lf.InputError, match="unknown layer 'conv'"):
        build([{"layer": "conv"}])
    with pytest.raises(lf.InputError, match=r"activation must be one of.*'swish'"):
        lf.mlp(2, [3], 2, "swish")
    with pytest.raises(lf.InputError, match="width must be at least 1"):
        lf.mlp(2, [0], 2)


def test_jtex_map() -> None:
    decoder = lf.JTExMap([0.1, 0.2])
    weight = decoder.weight
    torch.testing.assert_close(weight @ weight.T, decoder.a @ decoder.a.T + torch.diag(decoder.b.float()))
    assert float(weight[0, 1].detach()) == 0
    z = torch.randn(4, 2)
    torch.testing.assert_close(decoder(z), (weight @ z.T).T)


# --- sampling ---


def check_moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Within 4.5 standard errors of a Gaussian's mean and covariance."""
    n = len(draws)
    assert bool(((draws.mean(0) - mean).abs() < 4.5 * (covariance.diagonal() / n).sqrt()).all())
    spread = (covariance.square() + torch.outer(covariance.diagonal(), covariance.diagonal())).div(n).sqrt()
    assert bool(((draws.T.cov() - covariance).abs() < 4.5 * spread).all())


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
def test_samples_have_the_model_s_moments(dtype: torch.dtype) -> None:
    model = linear_model()
    mean, covariance = lf.linear_gaussian_marginal(model)
    draws = model.to(dtype).sample(100_000, seed=3)
    assert draws.dtype == dtype
    assert not draws.requires_grad
    check_moments(draws.double(), mean, covariance)
    z = (draws.double() - mean) @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    for column in z.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3


def test_bernoulli_samples() -> None:
    model = lf.LatentVariableModel(nn.Linear(2, 3, dtype=F64), lf.Bernoulli(), 2)
    with torch.no_grad():
        model.decoder.weight.zero_()
    draws = model.sample(50_000, seed=1)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = torch.sigmoid(model.decoder.bias.detach())
    assert bool(((draws.mean(0) - p).abs() < 4.5 * (p * (1 - p) / 50_000).sqrt()).all())


@pytest.mark.parametrize("likelihood", [lf.Gaussian(0.5), lf.Bernoulli()])
def test_row_i_is_the_same_for_every_n(likelihood: lf.Likelihood) -> None:
    model = lf.LatentVariableModel(lf.mlp(2, [5], 3), likelihood, 2).double()
    long = model.sample(1000, seed=9)
    for n in (1, 2, 63, 999):
        torch.testing.assert_close(model.sample(n, seed=9), long[:n], rtol=1e-13, atol=1e-13)
    assert not torch.equal(model.sample(1000, seed=10), long)
    torch.manual_seed(2)
    first = model.sample(5)
    assert not torch.equal(model.sample(5), first)
    torch.manual_seed(2)
    assert torch.equal(model.sample(5), first)


def test_sample_refuses_bad_input() -> None:
    model = linear_model()
    with pytest.raises(lf.InputError, match="n must be at least 1"):
        model.sample(0)
    with pytest.raises(lf.InputError, match="seed"):
        model.sample(3, seed=-1)


# --- the inference model ---


def test_mean_field_gaussian() -> None:
    network = nn.Linear(3, 4)
    mean, log_std = lf.MeanFieldGaussian(network)(x := torch.randn(5, 3))
    torch.testing.assert_close(torch.cat((mean, log_std), 1), network(x))

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x[:, :2], x[:, 1:]

    mean, log_std = lf.MeanFieldGaussian(Pair())(x)
    torch.testing.assert_close(mean, x[:, :2])
    torch.testing.assert_close(log_std, x[:, 1:])
    with pytest.raises(lf.InputError, match="even width, got 5"):
        lf.MeanFieldGaussian(nn.Linear(3, 5))(x)
    with pytest.raises(TypeError, match="network"):
        lf.MeanFieldGaussian(torch.sin)  # type: ignore[arg-type]
    wild = lf.MeanFieldGaussian(nn.Linear(3, 4))
    with torch.no_grad():
        wild.network.bias[2:] = 1e6
    assert bool(torch.isfinite(wild(x).log_std.exp().square()).all())
