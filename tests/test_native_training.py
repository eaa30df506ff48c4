"""The compiled training kernel against its reference, in both precisions, for every objective and kind of layer."""

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

from libi_fast.errors import InputError
from libi_fast.kernels import cpu
from libi_fast.kernels.training import reference
from libi_fast.ops import training as op

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no compiled library")


@pytest.mark.parametrize(("system", "objective"), cases())
def test_epochs_are_the_references(system, objective):
    p = problem(system, objective)
    epochs = 100 if objective == "joint" else 20
    expected, found = trained(reference.run, p, epochs), trained(cpu.train, p, epochs)
    assert distance(found[1].parameters, expected[1].parameters) < 1e-10
    assert distance(found[2].means + found[2].squares, expected[2].means + expected[2].squares) < 1e-8
    assert torch.allclose(found[0], expected[0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(found[2].usual, expected[2].usual, rtol=1e-8)
    assert any(float((a - b).abs().max()) > 0.02 for a, b in zip(found[1].parameters, p.parameters, strict=True)), "it moved"


@pytest.mark.parametrize(("system", "objective"), [(s, o) for s, o in cases() if o == "joint"])
def test_in_float32_they_are_as_near_to_the_truth(system, objective):
    """1e-4, or where rounding grows from epoch to epoch not much further than the reference in float32."""
    truth = trained(reference.run, problem(system, objective))[1].parameters
    p = problem(system, objective, F32)
    ours, theirs = (trained(run, p)[1].parameters for run in (cpu.train, reference.run))
    assert distance([t.double() for t in ours], truth) < 1e-4 + 3 * distance([t.double() for t in theirs], truth)


@pytest.mark.parametrize("name", [*reference.ACTIVATIONS])
def test_every_activation_in_both_networks(name):
    p = problem("Mobius", "joint", replicas=2, rows=40)
    p = p._replace(
        encoder=network(2, [2, 7, 2], [name, "identity"]), decoder=network(2, [2, 5, 2], ["tanh", name], seed=3)
    )  # fmt: skip
    expected, found = trained(reference.run, p, 20), trained(cpu.train, p, 20)
    assert distance(found[1].parameters, expected[1].parameters) < 1e-9


@pytest.mark.parametrize("rows", [2, 15, 16, 17, 64, 65, 130])
def test_any_number_of_rows(rows):
    for objective in ("joint", "elbo"):
        p = problem("CubicJTEx", objective, rows=rows)
        expected, found = trained(reference.run, p, 5), trained(cpu.train, p, 5)
        assert distance(found[1].parameters, expected[1].parameters) < 1e-8


def test_a_gradient_out_of_proportion_is_cut():
    p = problem("Mobius", "elbo")
    ends = []
    for run in (reference.run, cpu.train):
        adam = fresh(p, steps=50)
        adam.usual.copy_(torch.tensor([1e-6, 1e9, 0.0]))
        ends.append(trained(run, p, 1, adam)[2])
    (theirs, ours) = ends
    assert distance(ours.means, theirs.means) < 1e-12
    assert torch.allclose(ours.usual, theirs.usual, rtol=1e-12)
    norms = torch.cat([m.flatten(1) for m in ours.means], 1).norm(dim=1) / (1 - reference.BETA1)
    assert norms[0].item() == pytest.approx(1e-5) and norms[1] > 1


@pytest.mark.parametrize("objective", ["joint", "elbo over phi"])
def test_bits_do_not_depend_on_threads_company_or_calls(objective):
    p = problem("Mobius", objective, F32, replicas=5, sets=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = trained(cpu.train, p, 10)[1].parameters
        torch.set_num_threads(3)
        three = trained(cpu.train, p, 10)[1].parameters
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))

    alone = p.only(torch.tensor([3]))
    assert all(torch.equal(a[3:4], b) for a, b in zip(one, trained(cpu.train, alone, 10)[1].parameters, strict=True))

    _, half, adam = trained(cpu.train, p, 4)
    _, whole, _ = trained(cpu.train, half, 6, adam._replace(steps=4), first=4)
    assert all(torch.equal(a, b) for a, b in zip(one, whole._replace(draws=p.draws).parameters, strict=True))


def test_singular_codes_cost_4n_and_move_by_the_other_terms_alone():
    p = problem("LinearJTEx", "joint")
    with torch.no_grad():
        p.encoder.weights[0].zero_()
    expected, found = trained(reference.run, p, 1), trained(cpu.train, p, 1)
    assert torch.allclose(found[0], expected[0], rtol=1e-12)
    assert found[0][0, 0, 1] == pytest.approx(0.5 * math.exp(8) * (1 + 4 * 45 - 8))
    assert distance(found[1].parameters, expected[1].parameters) < 1e-12


@pytest.mark.parametrize("objective", ["joint", "elbo"])
def test_a_replica_that_is_no_number_stays_alone(objective):
    """One thread trains all three, and of their 45 rows the last register is not full."""
    p = problem("Mobius", objective)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        good = trained(cpu.train, p, 5)
        p.decoder.weights[0][1, 0, 0] = math.nan
        spoiled = trained(cpu.train, p, 5)
    finally:
        torch.set_num_threads(before)
    check_the_others_are_as_they_were(good, spoiled)


def test_rows_that_are_not_there_do_no_harm():
    check_rows_that_are_not_there_do_no_harm(cpu.train)


def test_no_epochs_and_no_replicas():
    p = problem("LinearJTEx", "joint")
    terms, q, _ = trained(cpu.train, p, 0)
    assert terms.shape == (0, 3, 4) and distance(q.parameters, p.parameters) == 0
    none = problem("LinearJTEx", "elbo", replicas=0)
    assert trained(cpu.train, none, 3)[0].shape == trained(reference.run, none, 3)[0].shape == (3, 0, 2)


def test_what_does_not_fit_is_refused_before_anything_changes():
    p = problem("Mobius", "elbo")
    for changed, message in (
        (p._replace(dataset=torch.tensor([0, 1, 2])), "outside 0 .. 1"),
        (p._replace(dataset=torch.tensor([-1, 0, 0])), "outside 0 .. 1"),
        (p._replace(encoder=network(3, [2, 5, 3], ["tanh", "identity"])), "a size"),
        (p._replace(decoder=network(3, [2, 5, 3], ["tanh", "identity"])), "a size"),
        (p._replace(x=p.x[:, :0]), "a size"),
        (p._replace(closed=True), "a size"),
        (p._replace(objective="reconstruction"), "a size"),
        (p._replace(samples=0), "a size"),
        (p._replace(encoder=network(2, [2, 50, 4], ["relu", "identity"])), "expected"),
        (p._replace(draws=p.draws._replace(repetition=2**32)), "counter"),
    ):
        before = [t.clone() for t in changed.parameters]
        with pytest.raises(ValueError, match=message):
            cpu.train(changed, fresh(changed), [0.01], [1.0])
        assert distance(changed.parameters, before) == 0
    strided = p._replace(encoder=p.encoder._replace(weights=[w.mT.contiguous().mT for w in p.encoder.weights]))
    with pytest.raises(ValueError, match="contiguous"):
        cpu.train(strided, fresh(strided), [0.01], [1.0])
    with pytest.raises(ValueError, match="usual"):
        cpu.train(p, fresh(p)._replace(usual=torch.zeros(2, dtype=F64)), [0.01], [1.0])


def test_the_operator_takes_the_backend_that_is_asked_for():
    p = problem("LinearJTEx", "joint")
    ours, theirs = (trained(lambda *a, b=b: op.train(*a, backend=b), p, 3) for b in ("cpu", "reference"))
    assert distance(ours[1].parameters, theirs[1].parameters) < 1e-12
    with pytest.raises(InputError, match="holds the codes"):
        op.train(p._replace(objective="reconstruction"), fresh(p), [0.01], [1.0])
    with pytest.raises(InputError, match="'triton' was asked for training, but"):
        op.train(p, fresh(p), [0.01], [1.0], backend="triton")
