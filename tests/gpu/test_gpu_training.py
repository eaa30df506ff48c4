"""Training in Triton against the reference: every objective, kind of layer and branch of the kernel."""

import math

import pytest
import torch
from training_problems import (
    F32,
    F64,
    cases,
    check_rows_that_are_not_there_do_no_harm,
    check_the_others_are_as_they_were,
    distance,
    fresh,
    network,
    problem,
    trained,
)

import libi_fast as lf
from libi_fast.errors import InputError
from libi_fast.kernels import gpu as launching
from libi_fast.kernels.training import gpu, reference
from libi_fast.ops import training as op

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter


def run(p, adam, rates, rises):
    """On the device of the tests, from and to the CPU."""
    device = "cpu" if launching.interpreted() else "cuda"
    there = p.on(device)
    moments = [[t.to(device) for t in of] for of in (adam.means, adam.squares)]
    usual = adam.usual.to(device)
    terms = op.train(there, adam._replace(means=moments[0], squares=moments[1], usual=usual), rates, rises, backend="triton")
    for ours, theirs in ((p.parameters, there.parameters), (adam.means, moments[0]), (adam.squares, moments[1])):
        for mine, found in zip(ours, theirs, strict=True):
            mine.copy_(found)
    adam.usual.copy_(usual)
    return terms.cpu()


def doubled(tensors):
    return [t.double() for t in tensors]


# What the interpreter is given to run: it takes a second for what a GPU does in a microsecond.
FEW = {
    ("LinearJTEx", "joint"), ("LinearJTEx", "closed elbo"), ("Gaussian", "closed elbo over phi"), ("CubicJTEx", "joint"),
    ("CubicJTEx", "elbo"), ("LinearJTEx", "closed elbo over theta"), ("deep", "elbo over phi"), ("deep", "reconstruction"),
    ("one code", "joint"), ("one code", "elbo of three draws"), ("widest", "joint"),
}  # fmt: skip
CHOSEN = [pair for pair in [*cases(), ("widest", "joint")] if pair in FEW or not launching.interpreted()]


@pytest.mark.parametrize(("system", "objective"), CHOSEN)
def test_epochs_are_the_references(system, objective):
    truth = trained(reference.run, problem(system, objective), 2)
    ours, theirs = (trained(form, problem(system, objective, F32), 2) for form in (run, reference.run))
    far = distance(doubled(theirs[1].parameters), truth[1].parameters)
    assert distance(doubled(ours[1].parameters), truth[1].parameters) < 1e-4 + 3 * far
    far = distance(doubled(theirs[2].means + theirs[2].squares), truth[2].means + truth[2].squares)
    assert distance(doubled(ours[2].means + ours[2].squares), truth[2].means + truth[2].squares) < 1e-5 + 3 * far
    assert torch.allclose(ours[0].double(), truth[0], rtol=2e-5, atol=1e-6)
    assert torch.allclose(ours[2].usual.double(), truth[2].usual, rtol=1e-5)
    moved = zip(ours[1].parameters, problem(system, objective).parameters, strict=True)
    assert all(float((a.double() - b).abs().max()) > 1e-3 for a, b in moved)


@pytest.mark.skipif(launching.interpreted(), reason="minutes in the interpreter")
@pytest.mark.parametrize("system", ["LinearJTEx", "CubicJTEx", "Mobius", "deep"])
@pytest.mark.parametrize("objective", ["joint", "elbo"])
def test_a_hundred_epochs_keep_to_the_truth(system, objective):
    """1e-4, or where rounding grows from epoch to epoch not much further than the reference in float32."""
    truth = trained(reference.run, problem(system, objective))[1].parameters
    p = problem(system, objective, F32)
    ours, theirs = (doubled(trained(form, p)[1].parameters) for form in (run, reference.run))
    assert distance(ours, truth) < 1e-4 + 3 * distance(theirs, truth)


@pytest.mark.parametrize("name", [*reference.ACTIVATIONS])
def test_every_activation_in_both_networks(name):
    ends = []
    for form, dtype in ((reference.run, F64), (run, F32)):
        p = problem("Mobius", "elbo", dtype, replicas=2, rows=33)
        nets = network(2, [2, 5, 4], [name, "identity"]), network(2, [2, 3, 2], ["tanh", name], seed=3)
        encoder, decoder = (net.with_parameters([0.5 * t.to(dtype) for t in net.parameters]) for net in nets)
        ends.append(trained(form, p._replace(encoder=encoder, decoder=decoder), 2))
    expected, found = ends
    assert torch.allclose(found[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    assert distance(doubled(found[1].parameters), expected[1].parameters) < 1e-5


@pytest.mark.parametrize("rows", [2, 33, 64, 129])
@pytest.mark.parametrize("objective", ["joint", "elbo"])
def test_any_number_of_rows(rows, objective):
    expected, found = (
        trained(form, problem("Gaussian", objective, dtype, rows=rows, replicas=2), 2)
        for form, dtype in ((reference.run, F64), (run, F32))
    )
    assert torch.allclose(found[0].double(), expected[0], rtol=1e-4, atol=1e-5)
    # Adam's first steps go whole along gradients that are rounding alone: the mean is judged.
    for a, b in zip(found[1].parameters, expected[1].parameters, strict=True):
        assert float((a.double() - b).abs().mean()) < 2e-4 * float(b.abs().max())


def test_a_gradient_out_of_proportion_is_cut():
    ends = []
    for form, dtype in ((reference.run, F64), (run, F32)):
        p = problem("Mobius", "elbo", dtype)
        adam = fresh(p, steps=50)
        adam.usual.copy_(torch.tensor([1e-6, 1e9, 0.0]))
        ends.append(trained(form, p, 1, adam)[2])
    theirs, ours = ends
    assert distance(doubled(ours.means), theirs.means) < 1e-5
    assert torch.allclose(ours.usual.double(), theirs.usual, rtol=1e-5)
    norms = torch.cat([m.flatten(1) for m in ours.means], 1).norm(dim=1) / (1 - reference.BETA1)
    assert norms[0].item() == pytest.approx(1e-5, rel=1e-3) and norms[1] > 1


@pytest.mark.parametrize("objective", ["joint", "elbo over phi"])
def test_bits_do_not_depend_on_company_or_calls(objective):
    p = problem("one code", objective, F32, replicas=2, rows=33, sets=1)
    whole = trained(run, p, 3)[1].parameters

    alone = p.only(torch.tensor([1]))
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, trained(run, alone, 3)[1].parameters, strict=True))
    _, half, adam = trained(run, p, 1)
    _, both, _ = trained(run, half, 2, adam._replace(steps=1), first=1)
    assert all(torch.equal(a, b) for a, b in zip(whole, both.parameters, strict=True))


def test_singular_codes_cost_4n_and_move_by_the_other_terms_alone():
    ends = []
    for form, dtype in ((reference.run, F64), (run, F32)):
        p = problem("LinearJTEx", "joint", dtype)
        p.encoder.weights[0].zero_()
        ends.append(trained(form, p, 1))
    expected, found = ends
    assert torch.allclose(found[0].double(), expected[0], rtol=1e-5)
    assert found[0][0, 0, 1].item() == pytest.approx(0.5 * math.exp(8) * (1 + 4 * 45 - 8), rel=1e-5)
    assert distance(doubled(found[1].parameters), expected[1].parameters) < 1e-5


def test_a_replica_that_is_no_number_stays_alone():
    p = problem("one code", "joint", F32, rows=20)
    good = trained(run, p, 2)
    p.encoder.weights[0][1, 0, 0] = math.nan
    spoiled = trained(run, p, 2)
    check_the_others_are_as_they_were(good, spoiled)


def test_rows_that_are_not_there_do_no_harm():
    check_rows_that_are_not_there_do_no_harm(run)


def test_no_epochs_and_no_replicas():
    p = problem("LinearJTEx", "joint", F32)
    terms, q, _ = trained(run, p, 0)
    assert terms.shape == (0, 3, 4) and distance(q.parameters, p.parameters) == 0
    none = problem("LinearJTEx", "elbo", F32, replicas=0)
    assert trained(run, none, 3)[0].shape == (3, 0, 2)


@pytest.mark.parametrize(("change", "message"), [
    ({"dtype": F64}, "float32"),
    ({"rows": 5000}, "4096 points"),
    ({"widths": [2, 65, 4]}, "64 units"),
    ({"widths": [2, 60, 60, 60, 60, 4]}, "lines"),
])  # fmt: skip
def test_what_the_kernel_does_not_take_it_refuses(change, message):
    change = dict(change)
    widths = change.pop("widths", None)
    p = problem("Mobius", "elbo", **{"dtype": F32, **change})
    if widths:
        p = p._replace(encoder=network(3, widths, ["tanh"] * (len(widths) - 2) + ["identity"]))
    with pytest.raises(InputError, match=message):
        run(p, fresh(p), [0.01], [1.0])


@pytest.mark.parametrize("method", [
    lambda d, device: lf.LiBI(d.model().to(device), d.inference().to(device), repeats=1, warm_up=4),
    lambda d, device: lf.VAE(d.model().to(device), d.inference().to(device), warm_up=4),
])  # fmt: skip
def test_methods_fit_by_the_kernel(method, monkeypatch, device):
    """The same fit as by torch, as far as few epochs of float32 tell."""
    calls = []
    monkeypatch.setattr(op, "_backend", lambda *_: "triton")
    original = gpu.run
    monkeypatch.setattr(gpu, "run", lambda *args: (calls.append(len(args[2])), original(*args))[1])
    d = lf.data.LinearJTEx(seed=0, train=40, validation=20)
    rows = d.train.to(device), d.validation.to(device)
    options = {"epochs": 6, "restarts": 2, "progress": False}
    ours = method(d, device).fit(*rows, **options)
    assert sum(calls) >= 6
    monkeypatch.setattr(op, "_backend", lambda *_: "reference")
    theirs = method(d, device).fit(*rows, **options)
    pairs = zip(ours.state().values(), theirs.state().values(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-3
