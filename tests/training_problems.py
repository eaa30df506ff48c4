"""Small training problems of every kind, for the tests of each backend."""

import itertools
import math

import torch

from libi_fast.kernels.importance.reference import Draws, reference_normal
from libi_fast.kernels.training import reference
from libi_fast.kernels.training.reference import Adam, Network, Problem

F32, F64 = torch.float32, torch.float64
B = torch.tensor([0.006, 0.006], dtype=F64)


def network(replicas, widths, activations, bias=True, joint=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights, biases = [], []
    for inputs, outputs in itertools.pairwise(widths):
        weights.append(torch.randn(replicas, outputs, inputs, dtype=F64, generator=generator) / math.sqrt(inputs))
        draws = 0.1 * torch.randn(replicas, outputs, dtype=F64, generator=generator)
        biases.append(draws if bias and not joint else None)
    return Network(weights, biases, [B if joint else None for _ in weights], activations, True)


# name: rows' columns, latents, likelihood, encoder, decoder
SYSTEMS = {
    "LinearJTEx": (2, 2, "gaussian", ([2, 4], ["identity"]), ([2, 2], ["identity"], True, True)),
    "CubicJTEx": (
        2, 2, "gaussian", ([2, 4, 20, 4], ["sigmoid_cube_root", "relu", "identity"]), ([2, 2], ["cube"], True, True),
    ),
    "Gaussian": (4, 2, "gaussian", ([4, 4], ["identity"]), ([2, 4], ["identity"], False)),
    "Mobius": (2, 2, "gaussian", ([2, 50, 4], ["relu", "identity"]), ([2, 50, 2], ["tanh", "identity"])),
    "deep": (5, 3, "bernoulli", ([5, 9, 6], ["silu", "identity"]), ([3, 40, 30, 5], ["gelu", "elu", "identity"])),
    "widest": (64, 4, "bernoulli", ([64, 64, 8], ["softplus", "identity"]), ([4, 64, 64], ["gelu", "identity"])),
    "one code": (3, 1, "gaussian", ([3, 7, 2], ["softplus", "identity"]), ([1, 3, 3], ["leaky_relu", "sigmoid"])),
}  # fmt: skip
OBJECTIVES = {
    "reconstruction": ("reconstruction", (False, True), False, 1),
    "joint": ("joint", (True, True), False, 1),
    "elbo": ("elbo", (True, True), False, 1),
    "elbo of three draws": ("elbo", (True, True), False, 3),
    "elbo over phi": ("elbo", (True, False), False, 1),
    "closed elbo": ("elbo", (True, True), True, 1),
    "closed elbo over phi": ("elbo", (True, False), True, 1),
    "closed elbo over theta": ("elbo", (False, True), True, 1),
}


def problem(system, objective, dtype=F64, replicas=3, rows=45, sets=2):
    columns, latents, likelihood, encoder, decoder = SYSTEMS[system]
    name, (phi, theta), closed, samples = OBJECTIVES[objective]
    x = torch.randn(sets, rows, columns, dtype=F64, generator=torch.Generator().manual_seed(1))
    variance = torch.linspace(0.05, 0.2, columns, dtype=F64) if likelihood == "gaussian" else torch.empty(0, dtype=F64)
    weights = torch.tensor([1.0, 0.2, 0.3], dtype=F64) * torch.linspace(0.5, 1.5, replicas, dtype=F64)[:, None]
    draws = Draws(torch.tensor(7), torch.arange(replicas) + 4, 0, 11, 6, reference_normal)
    made = Problem(
        name, x if likelihood == "gaussian" else x.sigmoid(), torch.arange(replicas) % sets,
        network(replicas, *encoder)._replace(trained=phi), network(replicas, *decoder, seed=2)._replace(trained=theta),
        likelihood, variance, latents, weights, 1.3, closed, samples, draws,
    )  # fmt: skip
    return copied(made, dtype)


def copied(p, dtype=None):
    """With parameters of its own."""
    dtype = dtype or p.x.dtype

    def of(net):
        return net.with_parameters([t.to(dtype, copy=True) for t in net.parameters])

    return p._replace(x=p.x.to(dtype), encoder=of(p.encoder), decoder=of(p.decoder), variance=p.variance.to(dtype))


def fresh(p, steps=0):
    means, squares = ([torch.zeros_like(t) for t in p.parameters] for _ in range(2))
    return Adam(means, squares, p.x.new_zeros(len(p.dataset)), steps)


def trained(run, p, epochs=100, adam=None, first=0):
    """(terms, parameters, Adam) after so many epochs from a copy of p."""
    q = copied(p)
    adam = fresh(q) if adam is None else adam
    q = q._replace(draws=q.draws._replace(repetition=q.draws.repetition + first))
    terms = run(q, adam, [0.003] * epochs, [1 - 0.002 * (first + e) for e in range(epochs)])
    return terms, q, adam


def distance(ours, theirs):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def cases():
    """(system, objective); in closed form where noise is Gaussian and the decoder linear."""
    systems = [s for s in SYSTEMS if s != "widest"]
    return [(s, o) for s in systems for o in OBJECTIVES if not OBJECTIVES[o][2] or s in ("LinearJTEx", "Gaussian")]


# --- checks that hold for every kernel; ``run``: as reference.run ---


def check_the_others_are_as_they_were(good, spoiled):
    """Of three replicas the second is no number; what `trained` gave before and after."""
    terms, q, adam = spoiled
    assert torch.isnan(terms[:, 1, 0]).all() and torch.isnan(adam.usual[1])
    assert torch.isfinite(terms[:, [0, 2]]).all()
    for ours, theirs in zip(q.parameters, good[1].parameters, strict=True):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])


def check_rows_that_are_not_there_do_no_harm(run):
    """The encoder's standard deviation is e^99 at x = 0, where no row is, and small where they are."""
    ends = []
    for form, dtype in ((reference.run, F64), (run, F32)):
        p = problem("one code", "elbo", dtype, replicas=1, rows=20, sets=1)
        encoder = network(1, [3, 7, 2], ["softplus", "identity"])
        tensors = [0.01 * t.to(dtype) for t in encoder.parameters]
        tensors[0][0, 0] = torch.tensor([-30.0, 0.0, 0.0])  # softplus(99 - 30 x) is 99 at 0, and 0 at x = 4
        tensors[1][0, 0] = 99.0
        tensors[2][0, 1] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0])
        x = p.x.clone()
        x[..., 0] = 4 + 0.01 * x[..., 0]
        ends.append(trained(form, p._replace(x=x, encoder=encoder.with_parameters(tensors)), 3))
    expected, found = ends
    assert torch.isfinite(expected[0]).all()
    assert torch.allclose(found[0].double(), expected[0], rtol=1e-4)
