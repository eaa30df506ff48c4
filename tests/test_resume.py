"""Training that is cut off and goes on: the same bits as training that never was."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import libi_fast as lf
from libi_fast.training.checkpoint import Checkpoint
from libi_fast.training.run import Run


class Cut(BaseException):
    """Stands for kill -9: nothing between here and the test may catch it."""


ROWS = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))


def system(dropout=False):
    model = lf.LatentVariableModel(lf.mlp(2, [5], 3), lf.Gaussian(0.1), 2)
    network = lf.mlp(3, [5], 4)
    if dropout:
        network.insert(2, nn.Dropout(0.1))
    return model, lf.MeanFieldGaussian(network)


def system_of_mixture():
    return system()[0], lf.MixtureGaussian(lf.mlp(3, [5], 12), 2)


def loader():
    rows = TensorDataset(ROWS)
    return DataLoader(rows, 20, shuffle=True, generator=torch.Generator().manual_seed(5))


CASES = {
    "libi": (lambda: lf.LiBI(*system(), repeats=2), {"epochs": 66, "restarts": 2}),
    "libi with an encoder": (lambda: lf.LiBI(*system(), encoder=lf.mlp(3, [5], 2), repeats=2, candidates=1), {"epochs": 66}),
    "vae, annealed, minibatches, dropout": (
        lambda: lf.VAE(*system(dropout=True), anneal=True),
        {"epochs": 30, "restarts": 2, "batch_size": 17},
    ),
    "vae, early stopping, tolerance": (
        lambda: lf.VAE(*system(), warm_up=5),
        {"epochs": 60, "early_stopping": True, "tolerance": 0.02, "patience": 5},
    ),
    "libi, a mixture by posterior draws": (
        lambda: lf.LiBI(*system_of_mixture(), step2="elbo+posterior", sampler="hmc", repeats=2, warm_up=3),
        {"epochs": 54, "restarts": 2, "batch_size": 17},
    ),
    "libi, by quadrature, several networks": (
        lambda: lf.LiBI(*system(), step1="quadrature", repeats=1, warm_up=3, finalists=1, inference_restarts=2),
        {"epochs": 36, "restarts": 2},
    ),
    "iwae, a loader": (lambda: lf.IWAE(*system()), {"epochs": 30, "train": loader}),
}


def outcome(method):
    return {k: v.clone() for k, v in method.state().items()}, method.history


def fit(make, arguments, **more):
    method = make()
    arguments = dict(arguments)
    train = arguments.pop("train", lambda: ROWS)()
    return outcome(method.fit(train, ROWS[:20] + 0.1, progress=False, **arguments, **more))


@pytest.mark.parametrize("case", CASES)
def test_training_cut_off_at_any_epoch_goes_on_to_the_same_bits(case, tmp_path, monkeypatch):
    make, arguments = CASES[case]
    whole, history = fit(make, arguments)
    file = tmp_path / "run.checkpoint"
    writes = 0
    original = Checkpoint.write

    def write(self, state):
        nonlocal writes
        original(self, state)
        writes += 1
        if writes % 13 == 0 or (state["inside"] is None and writes % 13 > 1):  # within phases and between stages
            raise Cut

    monkeypatch.setattr(Checkpoint, "write", write)
    for cuts in range(100):
        torch.manual_seed(cuts)  # the state of the process outside must not matter
        try:
            again, again_history = fit(make, arguments, checkpoint=file, checkpoint_seconds=0.0, resume=True)
            break
        except Cut:
            assert file.exists()
    assert cuts >= 2
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert repr(again_history) == repr(history)
    assert not file.exists(), "a run that has ended leaves no checkpoint"


PROGRAM = """
import sys; sys.path.insert(0, {folder!r})
import torch; torch.set_num_threads(1)
from test_resume import CASES, fit
state, history = fit(*CASES["libi"], checkpoint={file!r}, checkpoint_seconds=0.0, resume=True)
torch.save(state, {result!r})
"""


def test_kill_9_and_resume(tmp_path):
    file, result = tmp_path / "run.checkpoint", tmp_path / "state.pt"

    def start(file=file, result=result):
        program = PROGRAM.format(folder=os.path.dirname(__file__), file=str(file), result=str(result))
        return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)

    killed = start()
    until = time.monotonic() + 60
    while not file.exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert file.exists() and not result.exists(), "it was killed in the middle"
    for process in (start(), start(tmp_path / "other.checkpoint", tmp_path / "whole.pt")):
        assert process.communicate(timeout=60) and process.returncode == 0
    found, whole = torch.load(result), torch.load(tmp_path / "whole.pt")
    assert all(torch.equal(whole[k], found[k]) for k in whole)


def cut_off(file, make=CASES["libi"][0], **arguments):
    """A checkpoint of a run that did not end."""

    def stop(run, progress):
        run.checkpoint.write(run.state(progress.state()))
        raise Cut

    original, Run.save_if_due = Run.save_if_due, stop
    try:
        with pytest.raises(Cut):
            fit(make, {"epochs": 12, **arguments}, checkpoint=file)
    finally:
        Run.save_if_due = original


def test_a_checkpoint_is_neither_overwritten_nor_taken_for_another_run(tmp_path):
    file = tmp_path / "run.checkpoint"
    cut_off(file)
    make = CASES["libi"][0]
    with pytest.raises(lf.InputError, match="resume=True"):
        fit(make, {"epochs": 12}, checkpoint=file)
    for changed, arguments in {"epochs": {"epochs": 13}, "seed": {"epochs": 12, "seed": 1}}.items():
        with pytest.raises(lf.InputError, match=changed):
            fit(make, arguments, checkpoint=file, resume=True)
    with pytest.raises(lf.InputError, match="the data"):
        fit(make, {"epochs": 12, "train": lambda: ROWS + 1}, checkpoint=file, resume=True)
    with pytest.raises(lf.InputError, match="method"):
        fit(lambda: lf.LiBI(*system(), repeats=2, hz_weight=2.0), {"epochs": 12}, checkpoint=file, resume=True)
    assert fit(make, {"epochs": 12}, checkpoint=file, resume=True)[0].keys() == fit(make, {"epochs": 12})[0].keys()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(content, tmp_path):
    file = tmp_path / "run.checkpoint"
    cut_off(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    with pytest.raises(lf.InputError, match=r"run\.checkpoint"):
        fit(CASES["libi"][0], {"epochs": 12}, checkpoint=file, resume=True)


def test_a_crash_while_the_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "run.checkpoint"
    cut_off(file)
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(Cut()))
    with pytest.raises(Cut):
        fit(CASES["libi"][0], {"epochs": 12}, checkpoint=file, checkpoint_seconds=0.0, resume=True)
    assert file.read_bytes() == before


def test_training_that_diverges_names_its_last_good_checkpoint(tmp_path):
    class Fuse(nn.Module):
        """NaN from its 30th call on."""

        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(2, 3), 0

        def forward(self, z):
            self.calls += 1
            return self.linear(z) * (float("nan") if self.calls > 30 else 1.0)

    file = tmp_path / "run.checkpoint"
    method = lf.VAE(lf.LatentVariableModel(Fuse(), lf.Gaussian(1.0), 2), system()[1])
    with pytest.raises(FloatingPointError, match=r"elbo, epoch \d+: reconstruction of restart 0; .*good checkpoint is .*run"):
        method.fit(ROWS, epochs=100, checkpoint=file, checkpoint_seconds=0.0, progress=False)
    state = torch.load(file, weights_only=True)["state"]
    assert all(torch.isfinite(v).all() for v in state["parameters"].values())
