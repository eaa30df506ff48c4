"""Annealed importance sampling: exact likelihoods, unbiased weights, bounds from both sides, and what happens to bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from common import curved, unknown
from torch import Tensor, nn

import libi_fast as lf
from libi_fast import annealed
from libi_fast.kernels.annealing import reference
from libi_fast.kernels.annealing.reference import Settings
from libi_fast.kernels.chains.reference import Density, Noise, reference_normal, reference_uniform
from libi_fast.models.laplace import log_joint_and_gradient
from libi_fast.ops.random import Stream

F64 = torch.float64


def linear() -> lf.LatentVariableModel:
    """x = W z + b + noise, its posterior about half as wide as the prior."""
    torch.manual_seed(1)
    decoder = nn.Linear(2, 3, dtype=F64)
    return lf.LatentVariableModel(decoder, lf.DiagonalGaussian(torch.tensor([0.3, 0.5, 0.4])), 2)


def truth(name: str) -> lf.LatentVariableModel:
    """The generating model of one of the paper's data sets."""
    data = lf.data.load(name, seed=100, dtype=F64)
    if name != "LinearJTEx":
        return data.truth.model
    decoder = nn.Linear(2, 2, bias=False, dtype=F64)
    decoder.weight.data = data.truth.weight
    return lf.LatentVariableModel(decoder, lf.DiagonalGaussian(data.truth.noise_variance), 2).requires_grad_(False)


def wide(model: lf.LatentVariableModel, x: Tensor) -> lf.MeanField:
    """A proposal for each row, off the posterior's centre."""
    q = lf.closest_mean_field(model, x)
    return lf.MeanField(q.mean + 0.3, q.log_std + 0.4)


# --- known answers ---


@pytest.mark.parametrize("from_q", [False, True], ids=["prior", "q"])
def test_weights_are_unbiased(from_q: bool) -> None:
    """E[w] = p(x) whatever the number of temperatures: with 4 here, which is far too few for a tight bound."""
    model = linear()
    x = model.sample(4, seed=1)
    found = lf.annealed_log_likelihood(model, x, wide(model, x) if from_q else None, 20_000, 4, 2, seed=2)
    error = found.log_likelihood - lf.exact_log_likelihood(model, x)
    assert (error.abs() < 4 * found.standard_error).all() and found.standard_error.max() < 0.03
    assert found.log_weights.var(-1).min() > 0.02


@pytest.mark.parametrize("from_q", [False, True], ids=["prior", "q"])
def test_reverse_weights_are_unbiased_for_the_reciprocal(from_q: bool) -> None:
    model, count = linear(), 20_000
    x = model.sample(1, seed=1)
    mean, covariance = lf.exact_posterior(model, x)
    z = mean + lf.philox_normal(3, count, 2, dtype=F64) @ torch.linalg.cholesky(covariance).mT
    x = x.expand(count, -1)
    proposal, temperatures = wide(model, x) if from_q else None, torch.linspace(0, 1, 9)
    options: dict[str, Any] = {"chains": 1, "temperatures": temperatures, "leapfrogs": 2, "seed": 2}
    found = lf.bidirectional_gap(model, x=x, z=z, proposal=proposal, **options)
    ratio = (lf.exact_log_likelihood(model, x) - found.upper).exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / math.sqrt(count) < 0.1
    assert ratio.log().var() > 0.02


def test_the_end_is_the_posterior() -> None:
    model = linear()
    x = model.sample(3, seed=1)
    found = lf.annealed_log_likelihood(model, x, None, 4000, 50, 5, seed=2)
    mean, covariance = lf.exact_posterior(model, x)
    weights = torch.softmax(found.log_weights, -1)[..., None]
    size = 1 / weights.square().sum(1)
    centre = (weights * found.z).sum(1)
    spread = (weights * (found.z - mean[:, None]).square()).sum(1)
    assert ((centre - mean).abs() < 4 * (covariance.diagonal() / size).sqrt()).all()
    assert ((spread / covariance.diagonal() - 1).abs() < 6 * (2 / size).sqrt()).all()


def check_bounds(name: str, rows: int, temperatures: int) -> tuple[lf.BidirectionalGap, Tensor]:
    model = truth(name)
    found = lf.bidirectional_gap(model, rows, temperatures=temperatures, seed=4)
    exact = lf.exact_log_likelihood(model, found.x) if name == "LinearJTEx" else lf.quadrature_log_likelihood(model, found.x)
    for value, error, sign in ((found.lower, found.lower_error, 1), (found.upper, found.upper_error, -1)):
        beyond = sign * (value - exact)  # of the bound on its wrong side
        assert beyond.mean() < 3 * beyond.std() / math.sqrt(rows)
        assert (beyond < 5 * error + 1e-3).double().mean() > 0.9
    return found, exact


@pytest.mark.parametrize("name", ["LinearJTEx", "Mobius", "CubicJTEx"])
def test_bounds_hold_the_exact_likelihood(name: str) -> None:
    found, exact = check_bounds(name, 30, 200)
    most = 0.6 if name == "CubicJTEx" else 0.2
    assert (found.lower - exact).mean().abs() < most and -0.1 < found.gap.mean() < 2 * most
    torch.testing.assert_close(found.gap, found.upper - found.lower)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LinearJTEx", "Mobius", "CubicJTEx"])
def test_a_thousand_temperatures_suffice(name: str) -> None:
    found, exact = check_bounds(name, 80, 1000)
    print(
        f"{name}: lower - exact {(found.lower - exact).mean():.4f} (largest of a row {(found.lower - exact).abs().max():.3f}), "
        f"upper - exact {(found.upper - exact).mean():.4f}, gap {found.gap.mean():.4f}"
    )
    assert (found.lower - exact).mean().abs() < 0.05 and found.gap.mean() < 0.1


def test_lower_bounds_agree() -> None:
    """bidirectional_gap's is annealed_log_likelihood's."""
    model = curved()
    options: dict[str, Any] = {"chains": 3, "temperatures": 20, "seed": 5}
    gap = lf.bidirectional_gap(model, 4, **options)
    x, z = model.sample_joint(4, 5)
    assert torch.equal(gap.x, x) and torch.equal(gap.z, z) and torch.equal(x, model.sample(4, 5))
    found = lf.annealed_log_likelihood(model, x, **options)
    assert torch.equal(gap.lower, found.log_likelihood) and torch.equal(gap.lower_error, found.standard_error)
    again = lf.bidirectional_gap(model, x=x, z=z, **options)
    assert all(torch.equal(a, b) for a, b in zip(gap, again, strict=True))


# --- the algorithm ---


def test_a_temperature_costs_its_leapfrogs() -> None:
    """T K + 1 evaluations of the density and its gradient, however they are accepted."""
    model = curved()
    x = model.sample(3, seed=1)
    density, calls = log_joint_and_gradient(model, x), [0]

    def counting(rows: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        return density(rows, z)

    noise = Noise(torch.tensor(1), torch.zeros(1, dtype=torch.int64), (12, 13), reference_normal, reference_uniform)
    scale_tril = torch.eye(2).expand(1, 3, 1, 2, 2)
    for temperatures, leapfrogs in ((7, 10), (40, 1)):
        calls[0] = 0
        betas, step = annealed.power_betas(temperatures), torch.full((1, 3, temperatures), 0.3)
        q = torch.zeros(1, 3, 2)
        found = reference.run(
            counting, torch.randn(1, 3, 4, 2), betas[None], step, scale_tril, q, q, noise, Settings(leapfrogs), 10
        )
        assert calls[0] == temperatures * leapfrogs + 1 and 0 < found.acceptance.mean() < 1


def test_the_first_weight_is_importance_samplings() -> None:
    """One temperature: log w = log p(x, z) - log q(z) of the start."""
    model = linear()
    x = model.sample(3, seed=1)
    q = wide(model, x)
    found = lf.annealed_log_likelihood(model, x, q, 5, 1, 1, seed=3)
    noise = torch.stack([
        lf.philox_normal(3, 3, 2, first_draw=2 * annealed.PILOTS, repetition=c, stream=Stream.ANNEALING_START, dtype=F64)
        for c in range(5)
    ], 1)  # fmt: skip
    z = q.mean[:, None] + q.log_std[:, None].exp() * noise
    normal = torch.distributions.Normal(q.mean[:, None], q.log_std[:, None].exp())
    log_joint: Density = log_joint_and_gradient(model, x)
    expected = log_joint(slice(None), z[None])[0][0] - normal.log_prob(z).sum(-1)
    torch.testing.assert_close(found.log_weights, expected)
    torch.testing.assert_close(found.log_likelihood, expected.exp().mean(-1).log())
    weights = expected.exp()
    torch.testing.assert_close(found.standard_error, weights.std(-1) / weights.mean(-1) / math.sqrt(5))


def test_temperatures_are_spaced_by_factors_or_given() -> None:
    betas = annealed.power_betas(1000)
    assert betas[0] == 0 and betas[-1] == 1 and len(betas) == 1001
    assert (betas.diff() > 0).all() and (betas[500:].diff() / betas[500:-1]).max() < 0.0081
    mine = torch.linspace(0, 1, 21) ** 3
    model = curved()
    x = model.sample(3, seed=1)
    one, other = (lf.annealed_log_likelihood(model, x, seed=1, temperatures=t) for t in (mine, 20))
    assert one.step_size.shape == other.step_size.shape == (3, 20)
    assert not torch.equal(one.log_likelihood, other.log_likelihood)


@pytest.mark.parametrize("target", [0.5, 0.65, 0.9])
def test_step_sizes_are_adapted_at_every_temperature(target: float) -> None:
    """Posteriors are 30 times narrower than the prior: steps fall with the temperature, acceptance stays."""
    model = truth("Mobius")
    x = model.sample(20, seed=1)
    found = lf.annealed_log_likelihood(model, x, temperatures=400, target_acceptance=target, seed=1)
    assert (found.acceptance_rate.mean() - target).abs() < 0.1
    assert (found.step_size[:, 20] > 5 * found.step_size[:, -1]).all()


# --- contracts ---


def test_reference_and_kernel_agree() -> None:
    model = linear()
    x = model.sample(3, seed=1)
    options: dict[str, Any] = {"chains": 3, "temperatures": 5, "leapfrogs": 2, "seed": 7}
    found = lf.annealed_log_likelihood(model, x, **options)
    for other in (
        lf.annealed_log_likelihood(model, x, backend="reference", **options),
        lf.annealed_log_likelihood(unknown(model), x, **options),
    ):
        for a, b in zip(found, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_rows_do_not_touch_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any blocks of rows, and a shard of them, have the bits of the whole."""
    model = curved()
    x = model.sample(7, seed=1)
    q = (0.1 * torch.randn(7, 2), -0.2 + 0.1 * torch.randn(7, 2))
    options: dict[str, Any] = {"chains": 5, "temperatures": 30, "seed": 2**63 + 1}
    whole = lf.annealed_log_likelihood(model, x, q, **options)
    shard = lf.annealed_log_likelihood(model, x[3:5], tuple(t[3:5] for t in q), first_row=3, **options)
    monkeypatch.setattr(annealed, "VALUES_AT_ONCE", 1)
    single = lf.annealed_log_likelihood(model, x, q, **options)
    for a, b, c in zip(whole, single, shard, strict=True):
        assert torch.equal(a, b) and torch.equal(a[3:5], c)


def test_runs_have_draws_of_their_own() -> None:
    """Pilots, the counted run and the reverse one take their transitions from one sequence, one after another."""
    taken = []
    op = annealed.op.annealing_of_layers

    def spy(*args: Any) -> Any:
        settings = args[-2]
        taken.append((settings.first_transition, settings.rate > 0))
        return op(*args)

    model = curved()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annealed.op, "annealing_of_layers", spy)
        lf.bidirectional_gap(model, 2, temperatures=20, seed=1)
    assert taken == [(0, True), (20, True), (40, True), (60, False), (80, False)]


def test_an_inference_model_is_asked_for_q() -> None:
    model = curved()
    q = lf.MeanFieldGaussian(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)))
    x = model.sample(4, seed=1)
    options: dict[str, Any] = {"chains": 3, "temperatures": 10, "seed": 1}
    found = lf.annealed_log_likelihood(model, x, q, **options)
    expected = lf.annealed_log_likelihood(model, x, q.eval()(x), **options)
    assert torch.equal(found.log_weights, expected.log_weights) and not found.log_likelihood.requires_grad
    assert torch.equal(lf.bidirectional_gap(model, x=x, z=x[:, :2], proposal=q, **options).lower, expected.log_likelihood)


def test_seeds_and_no_rows() -> None:
    model = curved()
    x = model.sample(2, seed=1)
    options: dict[str, Any] = {"chains": 2, "temperatures": 5}
    torch.manual_seed(3)
    one = lf.annealed_log_likelihood(model, x, **options)
    torch.manual_seed(3)
    assert torch.equal(one.log_weights, lf.annealed_log_likelihood(model, x, **options).log_weights)
    assert not torch.equal(one.log_weights, lf.annealed_log_likelihood(model, x, **options).log_weights)
    empty = lf.annealed_log_likelihood(model, x[:0], **options)
    assert [tuple(t.shape) for t in empty] == [(0,), (0,), (0, 2), (0,), (0, 2, 2), (0, 5)]


def test_model_keeps_its_mode_and_gradients() -> None:
    model = curved().train()
    found = lf.annealed_log_likelihood(unknown(model), model.sample(2, seed=1), chains=2, temperatures=3, seed=1)
    assert model.training and not found.z.requires_grad and all(p.grad is None for p in model.parameters())


# --- what goes wrong ---


def test_a_decoder_that_gives_nan_somewhere() -> None:
    """Chains that start there have no weight, and the row keeps a lower bound; proposals that go there are refused."""
    model = curved()
    x = model.sample(4, seed=1)
    options: dict[str, Any] = {"chains": 40, "temperatures": 6, "leapfrogs": 2, "seed": 3}
    with pytest.warns(lf.DivergenceWarning, match="4 of 4 data points have chains that started"):
        found = lf.annealed_log_likelihood(unknown(model, broken=lambda z: z[:, 0] > 1), x, **options)
    lost = found.log_weights == -math.inf
    assert 0 < lost.double().mean() < 0.4 and found.log_weights[~lost].isfinite().all()
    assert (found.z[~lost][:, 0] <= 1).all() and (found.z[lost][:, 0] > 1).all()
    mean = found.log_weights.exp().mean(-1).log()
    torch.testing.assert_close(found.log_likelihood, mean)
    assert found.standard_error.isfinite().all()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"chains": 0}, "chains must be at least 1"),
    ({"temperatures": 0}, "temperatures must be at least 1"),
    ({"leapfrogs": 0}, "leapfrogs must be at least 1"),
    ({"temperatures": torch.tensor([0.0, 0.5])}, "must rise from 0 to 1"),
    ({"temperatures": torch.tensor([0.1, 1.0])}, "must rise from 0 to 1"),
    ({"temperatures": torch.tensor([0.0, 0.6, 0.5, 1.0])}, "must rise from 0 to 1"),
    ({"temperatures": torch.tensor([0.0, math.nan, 1.0])}, "must rise from 0 to 1"),
    ({"temperatures": torch.ones(1)}, r"shape \[T \+ 1\]"),
    ({"target_acceptance": 0.0}, "target_acceptance must be positive"),
    ({"target_acceptance": 1.0}, "target_acceptance must lie in"),
    ({"jitter": 1.0}, "jitter must lie in"),
    ({"step_size": -1.0}, "step_size must be positive"),
    ({"seed": 2**64}, "seed must lie in"),
    ({"first_row": 2**32}, "first_row must lie in"),
    ({"first_row": 2**32 - 1}, "a row index past"),
    ({"temperatures": 2**31}, "the transitions of all runs"),
    ({"x": torch.full((2, 3), math.nan)}, "x holds nan at row 0"),
    ({"x": torch.full((2, 3), math.inf)}, "x holds inf at row 0"),
    ({"x": torch.zeros(2, 4)}, "x does not fit the model"),
    ({"proposal": (torch.zeros(3, 2), torch.zeros(3, 2))}, "proposal mean must have shape"),
    ({"proposal": (torch.zeros(2, 2), torch.full((2, 2), math.nan))}, "proposal log_std holds nan"),
    ({"backend": "other"}, "backend"),
    ({"backend": "cuda"}, "backend must be one of"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3), "temperatures": 3} | options
    with pytest.raises(lf.InputError, match=message):
        lf.annealed_log_likelihood(curved(), **arguments)
    with pytest.raises(lf.InputError, match=message):
        lf.bidirectional_gap(curved(), **{"z": torch.zeros(2, 2), **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got none of them"),
        ({"num_data": 2, "x": torch.zeros(2, 3), "z": torch.zeros(2, 2)}, "got num_data and x and z"),
        ({"num_data": 2, "x": torch.zeros(2, 3)}, "got num_data and x"),
        ({"x": torch.zeros(2, 3)}, "got x"),
        ({"z": torch.zeros(2, 2)}, "got z"),
        ({"num_data": 0}, "num_data must be at least 1"),
        ({"x": torch.zeros(2, 3), "z": torch.zeros(2, 3)}, r"z must have shape \(2, 2\)"),
        ({"x": torch.zeros(2, 3), "z": torch.full((2, 2), math.nan)}, "z holds nan"),
    ],
)
def test_data_are_simulated_or_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(lf.InputError, match=message):
        lf.bidirectional_gap(curved(), temperatures=3, **options)


WRONG: list[dict[str, Any]] = [
    {"x": torch.zeros(2, 3, dtype=F64)}, {"x": "data"}, {"chains": 2.0}, {"temperatures": 2.0}, {"leapfrogs": True},
    {"temperatures": torch.tensor([0, 1])}, {"step_size": "big"}, {"model": nn.Linear(2, 3)}, {"proposal": "q"},
    {"proposal": lf.FullCovariance(torch.zeros(2, 2), torch.eye(2).expand(2, -1, -1))},
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG)
def test_wrong_types(options: dict[str, Any]) -> None:
    arguments = {"model": curved(), "x": torch.zeros(2, 3), "temperatures": 3} | options
    with pytest.raises(TypeError):
        lf.annealed_log_likelihood(**arguments)
    with pytest.raises(TypeError):
        lf.bidirectional_gap(**{"z": torch.zeros(2, 2), **arguments})
