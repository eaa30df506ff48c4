"""Exact likelihoods by quadrature: against closed forms, scipy, and themselves on finer cells."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from torch import nn

import libi_fast as lf


def linear(inputs, outputs, variance):
    model = lf.LatentVariableModel(nn.Linear(inputs, outputs).double(), lf.Gaussian(variance).double(), inputs)
    return model, model.sample(6, seed=0)


@pytest.mark.parametrize(("latent_dim", "outputs"), [(1, 1), (1, 4), (2, 2), (2, 1), (2, 5)])
@pytest.mark.parametrize("variance", [1.0, 1e-3, 1e-7])
def test_linear_models_have_their_closed_form(latent_dim, outputs, variance):
    model, x = linear(latent_dim, outputs, variance)
    found = lf.quadrature_log_likelihood(model, x)
    assert torch.allclose(found, lf.exact_log_likelihood(model, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["CubicJTEx", "Mobius"])
def test_the_truths_agree_with_scipy_around_the_code(name):
    d = lf.data.load(name, 3, dtype=torch.float64)
    truth = d.truth
    rows = [0, 1, int(d.test_codes.square().sum(1).argmax())]  # the last lies furthest out
    exact = truth.log_likelihood(d.test[rows])
    for i, row in enumerate(rows):
        centre = d.test_codes[row].numpy()

        def density(z, x=d.test[row], shift=float(exact[i])):
            z = torch.as_tensor(z).reshape(-1, 2)
            prior = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
            return (truth.model.log_prob(x, z) + prior - shift).exp().numpy()

        wide = 0.5 if name == "Mobius" else 1.5
        found = scipy.integrate.cubature(density, centre - wide, centre + wide, rtol=1e-8, max_subdivisions=200_000)
        assert found.status == "converged"
        assert float(np.log(found.estimate)) == pytest.approx(0, abs=1e-6)


def test_several_modes_and_a_curve_of_codes_are_all_found():
    """x = |z| + noise: the codes of one x lie on a circle; the radius of a Gaussian has a known density."""

    class Radius(nn.Module):
        def forward(self, z):
            return z.square().sum(-1, keepdim=True).sqrt()

    model = lf.LatentVariableModel(Radius(), lf.Gaussian(1e-4).double(), 2)
    x = torch.tensor([[0.3], [1.0], [4.0]], dtype=torch.float64)

    def density(radius, value):
        return radius * math.exp(-0.5 * radius**2 - 0.5 * (value - radius) ** 2 / 1e-4) / math.sqrt(2e-4 * math.pi)

    found = lf.quadrature_log_likelihood(model.double(), x)
    for one, value in zip(found.tolist(), x[:, 0].tolist(), strict=True):
        expected = scipy.integrate.quad(density, max(0, value - 0.1), value + 0.1, args=(value,), epsabs=1e-13)[0]
        assert one == pytest.approx(math.log(expected), abs=1e-6)


def test_bernoulli_against_gauss_hermite():
    model = lf.LatentVariableModel(lf.mlp(2, [6], 5).double(), lf.Bernoulli(), 2)
    x = (torch.rand(4, 5, dtype=torch.float64) < 0.5).double()
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z = torch.cartesian_prod(*[torch.from_numpy(nodes)] * 2)
    log_weights = torch.from_numpy(np.log(np.outer(weights, weights)).reshape(-1) - math.log(2 * math.pi))
    expected = torch.logsumexp(model.log_prob(x[:, None], z) + log_weights, 1)
    assert torch.allclose(lf.quadrature_log_likelihood(model, x), expected, rtol=0, atol=1e-7)


def test_codes_far_out_in_the_prior_are_followed():
    model = lf.LatentVariableModel(nn.Linear(1, 1).double(), lf.Gaussian(0.01).double(), 1)
    with torch.no_grad():
        model.decoder.weight.fill_(1.0)
    x = torch.tensor([[0.0], [12.0], [30.0]], dtype=torch.float64)
    assert torch.allclose(lf.quadrature_log_likelihood(model, x), lf.exact_log_likelihood(model, x), rtol=0, atol=1e-8)
    with pytest.raises(lf.InputError, match="row 3 of x has its codes beyond 36"):
        lf.quadrature_log_likelihood(model, torch.cat([x, x[:1] + 1000]))


def test_the_model_keeps_its_dtype_and_a_row_its_value():
    d = lf.data.Mobius(0, test=20)
    model = d.model()
    x = d.test
    before = [p.clone() for p in model.parameters()]
    whole = lf.quadrature_log_likelihood(model, x)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(before, model.parameters(), strict=True))
    assert whole.dtype == torch.float64
    assert torch.allclose(lf.quadrature_log_likelihood(model, x[7:8]), whole[7:8], rtol=0, atol=1e-7)


def test_bad_input_is_named():
    model, x = linear(2, 3, 0.1)
    with pytest.raises(lf.InputError, match="row 2"):
        lf.quadrature_log_likelihood(model, torch.where(torch.arange(6)[:, None] == 2, math.nan, x))
    with pytest.raises(lf.InputError, match="latent_dim is 3"):
        lf.quadrature_log_likelihood(linear(3, 3, 0.1)[0], x)
    with pytest.raises(lf.InputError, match="tolerance"):
        lf.quadrature_log_likelihood(model, x, 0.0)
    with pytest.raises(lf.InputError, match="shape"):
        lf.quadrature_log_likelihood(model, x[0])

    class Steps(nn.Module):
        def forward(self, z):
            return (z.sum(-1, keepdim=True) * 3).floor()

    with pytest.raises(lf.InputError, match="does not settle"):
        lf.quadrature_log_likelihood(lf.LatentVariableModel(Steps(), lf.Gaussian(1e-6), 1), torch.zeros(1, 1))


@pytest.mark.parametrize(("name", "bound"), [("CubicJTEx", -4.053), ("Mobius", 1.926)])
def test_population_values(name, bound):
    truth = lf.data.load(name).truth
    assert truth.entropy_bound() == pytest.approx(bound, abs=0.003)
    values = truth.log_likelihood(truth.sample(300, seed=11))
    assert abs(values.mean().item() - truth.entropy_bound()) < 3 * values.std().item() / math.sqrt(300)
