"""Grids of settings, data sets and restarts: each cell is the fit of its own, whatever runs beside it and in which blocks."""

import copy
import warnings
from itertools import chain, product

import numpy as np
import pytest
import torch
from common import in_one_process, in_two_processes, of_processes
from torch import nn

import libi_fast as lf
from libi_fast.training import grid as grids
from libi_fast.training.checkpoint import Checkpoint
from libi_fast.training.run import Run, rungs

SETS = [lf.data.Mobius(seed=s, train=50, validation=30, test=10, dtype=torch.float64) for s in (1, 2)]
OPTIONS = {"epochs": 36, "restarts": 3, "seed": 5, "progress": False}


def parts(dtype=torch.float64):
    model = lf.LatentVariableModel(lf.mlp(2, [6], 2).to(dtype), lf.Gaussian(0.01), 2)
    return model, lf.MeanFieldGaussian(lf.mlp(2, [6], 4).to(dtype))


METHODS = {
    "libi": [lf.LiBI(*parts(), repeats=2, hz_weight=1.0), lf.LiBI(*parts(), repeats=2, hz_weight=9.0, mean_tolerance=0.5)],
    "vae": [lf.VAE(*parts(), beta=1.0), lf.VAE(*parts(), beta=3.0), lf.VAE(*parts(), anneal=True)],
    "lagging": [lf.LaggingVAE(*parts(), segments=4, beta=b) for b in (1.0, 2.0)],
    "iwae": [lf.IWAE(*parts())],
}
# The reproduction's own variant, shortened.
OURS = {
    "step1": "quadrature", "step2": "posterior", "repeats": 1, "candidates": 2, "warm_up": 2, "decoder_precision": 2.0,
    "inference_restarts": 2, "sampler": "simulated", "simulated_std": 1.5,
}  # fmt: skip


def state_of(method):
    return torch.cat([v.flatten() for v in method.state().values()])


@pytest.mark.parametrize(
    "options", [{}, {"survivors": 1}, {"batch_size": 25}, {"standardize": True}], ids=lambda o: next(iter(o), "")
)
def test_a_cell_is_the_fit_of_its_own(options):
    methods = [m for group in METHODS.values() for m in (group[-1:] if options else group)]
    if not options or "survivors" in options:
        methods += [lf.LiBI(*parts(), **OURS)]
    before = [state_of(m) for m in methods]
    fitted = lf.fit_grid(methods, SETS, **OPTIONS, **options)
    assert all(torch.equal(a, state_of(m)) for a, m in zip(before, methods, strict=True)), "the methods passed are left alone"
    for method, row in zip(methods, fitted, strict=True):
        for data, cell in zip(SETS, row, strict=True):
            alone = copy.deepcopy(method).fit(data.train, data.validation, **OPTIONS, **options)
            assert torch.allclose(state_of(alone), state_of(cell), rtol=1e-6, atol=1e-8)
            assert alone.history[-1]["restart"] == cell.history[-1]["restart"]
            assert [h["phase"] for h in alone.history] == [h["phase"] for h in cell.history]
            for one, two in zip(alone.history, cell.history, strict=True):
                assert one.keys() == two.keys()
            assert torch.allclose(alone.sample(5, seed=1), cell.sample(5, seed=1), rtol=1e-5)


def test_methods_that_differ_in_weights_alone_share_a_batch(monkeypatch):
    seen = []
    original = Run.__init__
    monkeypatch.setattr(
        Run, "__init__", lambda self, *a, **k: (original(self, *a, **k), seen.append((self.replicas.count, self.cells)))[0]
    )
    lf.fit_grid([m for group in METHODS.values() for m in group], SETS, epochs=12, restarts=2, progress=False)
    # LiBI's restarts begin with 4 candidates; annealing has a program of its own.
    assert seen == [(2 * 2 * 2 * 4, 4), (2 * 2 * 2, 4), (2 * 2, 2), (2 * 2 * 2, 4), (2 * 2, 2)]


def test_modules_of_a_users_own_share_a_batch_where_they_are_one_object():
    class Scaled(nn.Sequential):
        def __init__(self, scale):
            super().__init__(nn.Linear(2, 2).double())
            self.scale = scale

        def forward(self, z):
            return self.scale * super().forward(z)

    def program(decoder, likelihood):
        return grids._program(lf.VAE(lf.LatentVariableModel(decoder, likelihood, 2), parts()[1]))

    class Laplace(lf.Gaussian):
        pass

    one, noise = Scaled(1.0), lf.Gaussian(0.1)
    assert program(one, noise) == program(one, lf.Gaussian(0.1))
    assert program(one, noise) != program(Scaled(2.0), noise)
    assert program(one, noise) != program(one, lf.Gaussian(0.2))
    assert program(one, noise) != program(one, Laplace(0.1))
    assert program(lf.mlp(2, [3], 2).double(), noise) == program(lf.mlp(2, [3], 2).double(), noise)
    assert program(lf.mlp(2, [3], 2).double(), noise) != program(lf.mlp(2, [3], 2, "relu").double(), noise)


@pytest.mark.parametrize(
    ("name", "method"),
    [*product(["LinearJTEx", "CubicJTEx", "Gaussian", "Mobius"], ["libi", "vae", "iwae"]), ("LinearJTEx", "ours")],
)
def test_blocks_move_no_bit(name, method, monkeypatch):
    kinds = {"Gaussian": "GaussianExample"}
    make = getattr(lf.data, kinds.get(name, name))
    data = [make(seed=s, train=101, validation=33, test=2) for s in (1, 2)]
    kind, settings = {
        "libi": (lf.LiBI, {"repeats": 1}), "ours": (lf.LiBI, OURS), "vae": (lf.VAE, {}), "iwae": (lf.IWAE, {"num_samples": 2}),
    }[method]  # fmt: skip
    methods = [kind(data[0].model(), data[0].inference(), **settings)]
    blocks = []
    original = Run.in_blocks
    monkeypatch.setattr(
        Run,
        "in_blocks",
        lambda self, *a, **k: (blocks.append(-(-self.replicas.count // self.block)), original(self, *a, **k))[1],
    )
    options = {"epochs": 6, "restarts": 17, "progress": False}
    whole = lf.fit_grid(methods, data, **options)
    assert set(blocks) == {1}
    split = lf.fit_grid(methods, data, memory=1, **options)
    assert max(blocks) >= 3
    for one, two in zip(whole[0], split[0], strict=True):
        assert torch.equal(state_of(one), state_of(two))
        assert repr(one.history) == repr(two.history)


def test_a_survivor_is_what_it_had_been_among_all():
    """Successive halving changes who trains on, not how: Adam's moments and the random numbers go with a restart."""
    kept = {}

    def spy(name):
        class Spy(lf.VAE):
            def _stages(self, run, epochs):
                return [
                    *super()._stages(run, epochs),
                    lambda run: kept.update({name: (run.replicas.own["ids"], run.best, run.scores)}),
                ]

        return Spy(*parts())

    for name, options in {"all": {}, "some": {"survivors": 2}}.items():
        spy(name).fit(SETS[0].train, SETS[0].validation, **{**OPTIONS, "restarts": 9}, early_stopping=True, **options)
    ids, best, scores = kept["some"]
    _, every, every_score = kept["all"]
    assert len(ids) == 2
    for name, value in best.items():
        assert torch.allclose(value, every[name][ids], rtol=1e-7, atol=1e-9)
    assert torch.allclose(scores, every_score[ids], rtol=1e-7)
    assert every_score[ids].max() <= every_score.median(), "the better half is kept"


def test_rungs_halve_until_a_quarter_of_the_phase():
    assert rungs(40, 3, 3200) == {100: 20, 200: 10, 400: 5, 800: 3}
    assert rungs(3, 3, 100) == {}
    assert rungs(9, 1, 8) == {1: 2, 2: 1}  # too few epochs for a look at each


def test_dropped_restarts_leave_nan_in_the_records_and_the_figure_is_drawn(tmp_path):
    method = lf.LiBI(*parts(torch.float32), repeats=1, candidates=1)
    x = SETS[0].train.float()
    method.fit(x, epochs=120, restarts=8, survivors=2, progress=False)
    records = np.array([h["reconstruction"] for h in method.history if h["phase"] == "step 1"])
    assert records.shape[1] == 8
    assert (~np.isnan(records[0])).all() and (~np.isnan(records[-1])).sum() == 2
    method.save(tmp_path / "run")
    assert (tmp_path / "run" / "figures" / "training.png").stat().st_size > 1000
    assert lf.load(tmp_path / "run").history[-1] == method.history[-1]


class Cut(BaseException):
    pass


def test_a_grid_that_is_cut_off_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    methods = [METHODS["libi"][0], METHODS["vae"][0], METHODS["vae"][1]]
    options = {**OPTIONS, "restarts": 4, "survivors": 2}
    whole = lf.fit_grid(methods, SETS, **options)
    file, writes, ended = tmp_path / "grid.checkpoint", 0, []
    original = Checkpoint.write

    def write(self, state):
        nonlocal writes
        original(self, state)
        writes += 1
        ended.append(self.path.name)
        if writes % 17 == 0:
            raise Cut

    monkeypatch.setattr(Checkpoint, "write", write)
    cuts = 0
    while True:
        try:
            again = lf.fit_grid(methods, SETS, **options, checkpoint=file, checkpoint_seconds=0.0, resume=True)
            break
        except Cut:
            cuts += 1
            assert list(tmp_path.iterdir())
    assert cuts >= 4 and {"grid.checkpoint.0", "grid.checkpoint.1"} == set(ended)
    for one, two in zip(chain(*whole), chain(*again), strict=True):
        assert torch.equal(state_of(one), state_of(two)) and repr(one.history) == repr(two.history)
    assert not list(tmp_path.iterdir()), "a grid that has ended leaves no checkpoint"


def test_a_cell_that_is_lost_is_named_and_the_others_are_kept():
    class Fragile(nn.Module):
        """NaN for codes of data far from 0."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, z):
            return self.linear(z)

    class Picky(lf.Gaussian):
        def log_prob(self, x, output):
            return super().log_prob(x, output) + 0 * (1e3 - x.abs()).sqrt().sum(-1)

    model = lf.LatentVariableModel(Fragile(), Picky(1.0), 2)
    good, bad = torch.randn(30, 2), torch.randn(30, 2) + 2e3
    before = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        method = lf.VAE(model, parts(torch.float32)[1])
        before = state_of(method)
        (row,) = lf.fit_grid([method], [(bad, bad), (good, good)], epochs=5, restarts=2, progress=False)
    text = " ".join(str(c.message) for c in caught)
    assert "reconstruction of restart 1 of cell 0" in text and "no restart ended" in text
    assert torch.equal(state_of(row[0]), before) and not row[0].training
    assert torch.isfinite(row[1].log_likelihood(good, num_samples=10).log_likelihood).all()


def test_a_batch_that_is_lost_is_named_and_the_others_are_kept():
    class Nowhere(nn.Linear):
        def forward(self, z):
            return super().forward(z) * float("nan")

    lost = lf.VAE(lf.LatentVariableModel(Nowhere(2, 2).double(), lf.Gaussian(1.0), 2), parts()[1])
    with pytest.warns(UserWarning, match="none of 4 is left; the grid's other batches go on"):
        grid = lf.fit_grid([METHODS["vae"][0], lost, METHODS["iwae"][0]], SETS, epochs=5, restarts=2, progress=False)
    assert [bool(row[0].training) for row in grid] == [True, False, True]


def test_frozen_modules_stay_frozen_beside_others():
    decoder = lf.mlp(2, [6], 2).double().requires_grad_(False)
    frozen = lf.VAE(lf.LatentVariableModel(decoder, lf.Gaussian(0.01), 2), parts()[1], beta=2.0)
    grid = lf.fit_grid([METHODS["vae"][0], frozen], SETS, epochs=6, restarts=1, progress=False)
    alone = copy.deepcopy(frozen).fit(SETS[0].train, SETS[0].validation, epochs=6, restarts=1, progress=False)
    assert torch.allclose(state_of(alone), state_of(grid[1][0]), rtol=1e-9)


def test_the_selection_names_the_restarts_that_were_left():
    method = lf.LiBI(*parts(), repeats=1)
    method.fit(SETS[0].train, SETS[0].validation, **{**OPTIONS, "restarts": 8}, survivors=2)
    selection = method.history[-1]
    assert len(selection["restarts"]) == 2 and all(0 <= r < 8 for r in selection["restarts"])
    assert selection["restarts"] == sorted(selection["restarts"])
    records = [h for h in method.history if h["phase"] == "step 1"]
    left = (~np.isnan(records[-1]["reconstruction"])).nonzero()[0].tolist()
    assert left == selection["restarts"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": []}, lf.InputError, "methods and data"),
        ({"data": []}, lf.InputError, "methods and data"),
        ({"data": [SETS[0], (SETS[1].train[:9], SETS[1].validation)]}, lf.InputError, "equal shapes"),
        ({"data": [SETS[0], (SETS[1].train, SETS[1].validation[:9])]}, lf.InputError, "validation rows"),
        ({"data": [SETS[0].train]}, lf.InputError, "pairs"),
        ({"data": [(SETS[0].train, None), (torch.full((60, 2), torch.nan), None)]}, lf.InputError, "nan at row 0"),
        ({"survivors": 9}, lf.InputError, "survivors must be at most restarts"),
        ({"survivors": 0}, lf.InputError, "survivors must be at least 1"),
        ({"memory": 0}, lf.InputError, "memory"),
        ({"autocast": "int8"}, lf.InputError, "autocast"),
        ({"autocast": "bfloat16"}, lf.InputError, "autocast is for float32 models, and this one is torch.float64"),
        ({"epochs": 1.5}, TypeError, "epochs must be an integer, got float"),
        ({"restarts": True}, TypeError, "restarts must be an integer, got bool"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"resume": True}, lf.InputError, "name its file"),
        ({"checkpoint_seconds": float("nan")}, lf.InputError, "checkpoint_seconds"),
        ({"log_dir": __file__}, lf.InputError, "is not a folder"),
        ({"methods": ["vae"]}, TypeError, "methods must hold"),
        ({"data": SETS[0]}, TypeError, "must be lists"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_bad_grids_are_named(change, error, message):
    call = {"methods": METHODS["vae"][:1], "data": SETS, "epochs": 3, "restarts": 2, "progress": False, **change}
    with pytest.raises(error, match=message):
        lf.fit_grid(call.pop("methods"), call.pop("data"), **call)


def test_the_arguments_of_fit_and_of_its_options_are_the_same():
    import inspect
    from dataclasses import fields

    from libi_fast.training.options import FitOptions

    arguments = inspect.signature(lf.VAE.fit).parameters
    assert {f.name: f.default for f in fields(FitOptions)} == {
        k: p.default for k, p in arguments.items() if p.kind is p.KEYWORD_ONLY
    }


@of_processes
def _grid(rank, world, result):
    fitted = lf.fit_grid([METHODS["libi"][0], METHODS["vae"][0]], SETS, **OPTIONS, survivors=2)
    result.append((rank, [state_of(m).tolist() for row in fitted for m in row]))


def test_two_processes_train_a_grid_as_one():
    alone = in_one_process(_grid)
    together = in_two_processes(_grid)
    assert together[0][1] == together[1][1], "the processes agree to the bit"
    for one, two in zip(alone[0][1], together[0][1], strict=True):
        assert np.allclose(one, two, rtol=1e-5, atol=1e-8)


# --- autocast, TensorBoard, data larger than memory ---


def test_autocast_runs_the_networks_in_bfloat16_and_everything_else_in_float32():
    seen = set()

    class Watched(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.add(y.dtype)
            return y

    torch.manual_seed(1)
    x = torch.randn(200, 3) @ torch.randn(3, 3)

    def fitted(**options):
        model = lf.LatentVariableModel(nn.Sequential(Watched(2, 3)), lf.DiagonalGaussian(torch.ones(3), learned=True), 2)
        method = lf.IWAE(model, lf.MeanFieldGaussian(nn.Sequential(Watched(3, 4))))
        return method.fit(x, epochs=300, restarts=2, progress=False, **options)

    full = fitted()
    assert seen == {torch.float32}
    half = fitted(autocast="bfloat16")
    assert seen == {torch.float32, torch.bfloat16}
    assert all(v.dtype == torch.float32 for v in half.state().values())
    reached = [m.log_likelihood(x).log_likelihood.mean().item() for m in (full, half)]
    assert reached[1] == pytest.approx(reached[0], abs=0.05)


def test_scalars_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    method = lf.VAE(*parts(), anneal=True)
    method.fit(SETS[0].train, epochs=40, restarts=3, log_dir=tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        f"{p}/{t}" for p in ("annealing", "elbo") for t in ("reconstruction", "kl", "objective")
    }
    logged = events.Scalars("elbo/objective")
    records = [h for h in method.history if h["phase"] == "elbo"]
    lowest = [min(r + k for r, k in zip(h["reconstruction"], h["kl"], strict=True)) for h in records]
    assert [s.value for s in logged] == pytest.approx(lowest, rel=1e-6)
    assert [s.step for s in logged] == [20 + h["epoch"] for h in records]


def test_batches_of_a_grid_have_tags_of_their_own(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    methods = [METHODS["vae"][0], METHODS["vae"][1], METHODS["iwae"][0]]
    lf.fit_grid(methods, SETS, epochs=4, log_dir=tmp_path, progress=False)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"batch 0/elbo/kl/{cell}" for cell in range(4)} <= tags and "batch 1/bound/bound/1" in tags


def test_memory_is_planned_for_every_code_of_a_row(monkeypatch):
    blocks, seen = {}, []
    original = Run.__init__

    def look(self, *arguments, **options):
        original(self, *arguments, **options)
        seen.append(self.block)

    monkeypatch.setattr(Run, "__init__", look)
    data = lf.data.Mobius(seed=1)
    libi = {
        "joint": {},
        "quadrature": {"step1": "quadrature"},
        "informed": {"constraints": [lf.MutualInformation(at_least=1.0)]},
    }
    methods = {k: lf.LiBI(data.model(), data.inference(), repeats=1, candidates=1, **s) for k, s in libi.items()}
    methods |= {f"vae {n}": lf.VAE(data.model(), data.inference(), num_samples=n) for n in (1, 64)}
    for name, method in methods.items():
        method.fit(data.train[:50], data.validation[:20], epochs=3, memory=2**30, progress=False)
        blocks[name] = seen[-1]
    assert blocks["joint"] > 20 * blocks["quadrature"] and blocks["joint"] > 2 * blocks["informed"]
    assert blocks["vae 1"] > 10 * blocks["vae 64"]


def test_a_memory_mapped_array_trains_as_the_tensor(tmp_path):
    x = np.random.default_rng(0).standard_normal((500, 2)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    options = {"epochs": 4, "batch_size": 64, "progress": False}
    validation = torch.from_numpy(x[:50])
    one = lf.VAE(*parts(torch.float32)).fit(torch.from_numpy(x), validation, **options)
    two = lf.VAE(*parts(torch.float32)).fit(mapped, validation, **options)
    assert torch.equal(state_of(one), state_of(two))
    bad = x.copy()
    bad[321, 1] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(lf.InputError, match="train holds NaN or infinity at row 321"):
        lf.VAE(*parts(torch.float32)).fit(np.load(tmp_path / "bad.npy", mmap_mode="r"), validation, **options)


def test_every_restart_is_kept_where_that_is_asked_for():
    d = lf.data.LinearJTEx(seed=3, train=60, validation=30, test=10)
    vae = lf.VAE(d.model(), d.inference())
    vae.fit(d.train, d.validation, epochs=20, restarts=3, seed=1, progress=False, keep_restarts=True)
    assert len(vae.restart_states) == 3
    best = vae.restart_states[vae.history[-1]["restart"]]
    assert all(torch.equal(value, best[name]) for name, value in vae.state().items())
    weights = [state["model.decoder.a"] for state in vae.restart_states]
    assert not torch.equal(weights[0], weights[1])
    plain = lf.VAE(d.model(), d.inference()).fit(d.train, d.validation, epochs=2, restarts=2, seed=1, progress=False)
    assert plain.restart_states == []
