"""Training by the compiled kernel: the same fits as by torch's operators, used where it serves and nowhere else."""

import copy

import pytest
import torch
from torch import nn

import libi_fast as lf
from libi_fast.kernels import cpu
from libi_fast.ops import training as op
from libi_fast.training import run as engine

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no compiled library")

F64 = torch.float64


@pytest.fixture
def calls(monkeypatch):
    """How many epochs each call of the kernel took."""
    found = []

    def train(problem, adam, rates, rises):
        found.append(len(rates))
        return original(problem, adam, rates, rises)

    original = op.train
    monkeypatch.setattr(engine.op, "train", train)
    return found


def both(method, train, validation, calls, **options):
    """Fitted by the kernel, and by torch."""
    fitted = []
    for by_torch in (False, True):
        one, before = copy.deepcopy(method), len(calls)
        if by_torch:
            with lf.use_backend("reference"):
                one.fit(train, validation, progress=False, **options)
            assert len(calls) == before
        else:
            one.fit(train, validation, progress=False, **options)
            assert len(calls) > before
        fitted.append(one)
    return fitted


def largest_difference(one, other):
    pairs = zip(one.state().values(), other.state().values(), strict=True)
    return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in pairs)


METHODS = {
    "libi": lambda d: lf.LiBI(d.model(), d.inference(), repeats=2, warm_up=8, hz_weight=2.0),
    "vae": lambda d: lf.VAE(d.model(), d.inference(), beta=0.5, whiten=True, warm_up=8),
    "annealing": lambda d: lf.VAE(d.model(), d.inference(), anneal=True, num_samples=2),
    "lagging": lambda d: lf.LaggingVAE(d.model(), d.inference(), segments=3),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["LinearJTEx", "CubicJTEx", "Gaussian", "Mobius"])
def test_every_method_of_the_paper_fits_as_by_torch(name, method, calls):
    d = lf.data.load(name, seed=0, dtype=F64)
    options = {"epochs": 30, "restarts": 4, "survivors": 2}
    ours, theirs = both(METHODS[method](d), d.train[:40], d.validation[:20], calls, **options)
    assert largest_difference(ours, theirs) < 1e-7
    records = [[(h["phase"], h.get("epoch"), sorted(h)) for h in fitted.history] for fitted in (ours, theirs)]
    assert records[0] == records[1]
    assert ours.history[-1]["objective"] == pytest.approx(theirs.history[-1]["objective"], rel=1e-6)


def test_an_encoder_of_its_own_bernoulli_data_and_early_stopping(calls):
    x = torch.rand(50, 6, dtype=F64)
    model = lf.LatentVariableModel(lf.mlp(2, [5], 6).double(), lf.Bernoulli(), 2)
    q, h = lf.MeanFieldGaussian(lf.mlp(6, [5], 4).double()), lf.mlp(6, [5], 2).double()
    libi = lf.LiBI(model, q, encoder=h, repeats=1, warm_up=5)
    ours, theirs = both(libi, x[:30], x[30:], calls, epochs=24, restarts=2, early_stopping=True)
    assert largest_difference(ours, theirs) < 1e-7


def test_convergence_is_seen_in_the_same_epoch(calls):
    d = lf.data.LinearJTEx(seed=0, train=40, validation=20, dtype=F64)
    vae = lf.VAE(d.model(), d.inference())
    ours, theirs = both(vae, d.train, d.validation, calls, epochs=200, tolerance=5.0, patience=7)
    assert [h.get("epoch") for h in ours.history] == [h.get("epoch") for h in theirs.history]
    assert ours.history[-2]["epoch"] < 190
    assert largest_difference(ours, theirs) < 1e-7


def test_a_grid_of_weights_and_data_sets_is_its_cells(calls):
    sets = [lf.data.LinearJTEx(seed=s, train=40, validation=20, dtype=F64) for s in (0, 1)]
    methods = [lf.LiBI(sets[0].model(), sets[0].inference(), hz_weight=w, repeats=1, warm_up=5) for w in (1.0, 10.0)]
    options = {"epochs": 40, "restarts": 2, "progress": False}
    grid = lf.fit_grid(methods, sets, **options)
    assert calls
    for method, row in zip(methods, grid, strict=True):
        for d, cell in zip(sets, row, strict=True):
            alone = copy.deepcopy(method).fit(d.train, d.validation, **options)
            assert largest_difference(cell, alone) < 1e-9


def test_replicas_that_are_no_numbers_are_named_and_the_others_go_on(calls):
    d = lf.data.LinearJTEx(seed=0, train=40, validation=20, dtype=F64)
    vae = lf.VAE(d.model(), d.inference())
    fit = {"epochs": 30, "restarts": 3, "progress": False}
    reset = nn.Linear.reset_parameters
    made = []

    def broken(self):
        reset(self)
        made.append(self)
        if len(made) == 2:
            with torch.no_grad():
                self.weight.fill_(float("nan"))

    nn.Linear.reset_parameters = broken
    try:
        with pytest.warns(UserWarning, match="epoch 0: reconstruction, kl of restart 1"):
            vae.fit(d.train, d.validation, **fit)
    finally:
        nn.Linear.reset_parameters = reset
    assert calls and torch.isfinite(torch.cat([v.flatten() for v in vae.state().values()])).all()


class Frozen(nn.Linear):
    """A layer of a class of its own is not one that is known."""


def variants():
    d = lf.data.LinearJTEx(seed=0, train=40, validation=20)
    x = d.train

    def vae(model=None, inference=None, **settings):
        return lf.VAE(model or d.model(), inference or d.inference(), **settings)

    frozen = d.inference()
    frozen.network.bias.requires_grad_(False)
    learned = lf.LatentVariableModel(nn.Linear(2, 2), lf.Gaussian(0.1, learned=True), 2)
    return {
        "minibatches": (vae(), {"batch_size": 10}),
        "autocast": (vae(), {"autocast": "bfloat16"}),
        "a learned variance": (vae(learned), {}),
        "a parameter that is held": (vae(inference=frozen), {}),
        "a module that is not known": (vae(inference=lf.MeanFieldGaussian(Frozen(2, 4))), {}),
        "a q that is not mean-field": (vae(inference=lf.FullCovarianceGaussian(nn.Linear(2, 5))), {}),
        "importance weights": (lf.IWAE(d.model(), d.inference()), {}),
        "a statistic at random frequencies": (lf.LiBI(d.model(), d.inference(), repeats=1, warm_up=0, hz_method="random"), {}),
    }, x  # fmt: skip


@pytest.mark.parametrize("name", list(variants()[0]))
def test_what_the_kernel_does_not_know_trains_by_torch(name, calls):
    cases, x = variants()
    method, options = cases[name]
    method.fit(x, epochs=12, progress=False, **options)
    in_step2 = name == "a statistic at random frequencies"  # whose ELBO it does know
    assert bool(calls) == in_step2


def test_a_layer_used_twice_trains_by_torch(calls):
    shared = nn.Linear(3, 3)
    model = lf.LatentVariableModel(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), shared, nn.Tanh(), shared), lf.Gaussian(0.1), 2)
    lf.VAE(model, lf.MeanFieldGaussian(nn.Linear(3, 4))).fit(torch.randn(20, 3), epochs=5, progress=False)
    assert not calls


def test_calls_end_where_something_happens(calls):
    """Reports and rungs of halving among them; and no call goes on so long that it could not be interrupted."""
    d = lf.data.LinearJTEx(seed=0, train=30, validation=20)
    lf.VAE(d.model(), d.inference()).fit(d.train, d.validation, epochs=400, restarts=8, survivors=2, progress=False)
    assert sum(calls) == 400 and max(calls) <= 8
    calls.clear()
    lf.VAE(d.model(), d.inference()).fit(d.train, d.validation, epochs=30_000, restarts=2, progress=False)
    assert sum(calls) == 30_000 and max(calls) == 600
