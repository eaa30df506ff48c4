"""Run folders: whole or not at all, bit-identical when read back, and honest about damage."""

from __future__ import annotations

import json
import stat

import pytest
import torch

import libi_fast as lf
from libi_fast import data, runs
from libi_fast.errors import InputError

METHODS = {"libi": lf.LiBI, "vae": lf.VAE, "iwae": lf.IWAE}


def fitted(kind: str = "vae", standardize: bool = True, epochs: int = 18) -> lf.Method:
    d = data.LinearJTEx(seed=1, train=40, validation=20, test=1)
    model = lf.LatentVariableModel(lf.mlp(2, [3], 2), lf.DiagonalGaussian(torch.ones(2), learned=True), 2)
    method = METHODS[kind](model, inference=lf.MeanFieldGaussian(lf.mlp(2, [3], 4)))
    return method.fit(d.train, d.validation, epochs=epochs, seed=3, standardize=standardize, columns=["a", "b"], progress=False)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("standardize", [True, False])
def test_round_trip_is_bit_identical(tmp_path, kind, standardize):
    method = fitted(kind, standardize)
    runs.save(method, tmp_path / "deep" / "run", data={"name": "here"})
    again = runs.load(tmp_path / "deep" / "run")
    x = data.LinearJTEx(seed=2, test=9).test
    for name in ("log_likelihood", "standard_error", "pareto_k"):
        assert torch.equal(
            getattr(again.log_likelihood(x, num_samples=50), name),
            getattr(method.log_likelihood(x, num_samples=50), name),
        )
    assert torch.equal(again.sample(7, seed=1), method.sample(7, seed=1))
    assert torch.equal(again.codes(x), method.codes(x))
    assert again.columns == ["a", "b"] and again.config() == method.config()
    assert again.history == method.history


def test_the_folder_is_readable_without_the_package(tmp_path):
    runs.save(fitted(), tmp_path / "run", data={"name": "here", "rows": 40})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["format_version"] == 1 and config["libi_fast"] and config["method"]["method"] == "vae"
    assert config["data"] == {"name": "here", "rows": 40} and config["method"]["columns"] == ["a", "b"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["epoch"] == 0
    assert (tmp_path / "run" / "figures" / "training.png").stat().st_size > 1000
    assert {p.name for p in (tmp_path / "run").iterdir()} == set(runs.OURS)
    mode = (tmp_path / "ordinary").mkdir() or (tmp_path / "ordinary").stat().st_mode
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == stat.S_IMODE(mode)


def test_numbers_that_are_not_finite_are_null_in_metrics(tmp_path):
    method = fitted()
    method.history = [{"phase": "p", "epoch": 0, "loss": [float("nan"), 1.0, torch.tensor(float("inf"))]}]
    runs.save(method, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"phase": "p", "epoch": 0, "loss": [null, 1.0, null]}\n'
    runs.load(tmp_path / "run")


def test_modules_of_ones_own_are_passed_to_load(tmp_path):
    class Own(torch.nn.Linear):
        pass

    model = lf.LatentVariableModel(Own(2, 2), lf.Gaussian(0.1), 2)
    method = lf.VAE(model, inference=lf.MeanFieldGaussian(lf.mlp(2, [], 4)))
    x = data.LinearJTEx(train=20, validation=5, test=5)
    method.fit(x.train, x.validation, epochs=2, progress=False)
    method.save(tmp_path / "run")
    with pytest.raises(InputError, match="decoder was a module of your own"):
        runs.load(tmp_path / "run")
    again = runs.load(tmp_path / "run", decoder=Own(2, 2))
    assert torch.equal(again.sample(3, seed=0), method.sample(3, seed=0))


# --- what is there stays there ---


def test_an_existing_run_is_replaced_only_by_force(tmp_path):
    folder = tmp_path / "run"
    runs.save(fitted(), folder)
    before = contents(folder)
    with pytest.raises(InputError, match="exists; pass --force"):
        runs.save(fitted(epochs=2), folder)
    assert contents(folder) == before
    (folder / "notes.txt").write_text("mine")
    runs.save(fitted(epochs=2), folder, force=True)
    assert (folder / "notes.txt").read_text() == "mine"  # what is not ours moves over
    assert (
        contents(folder)[(folder / "metrics.jsonl").relative_to(folder)]
        != before[(folder / "metrics.jsonl").relative_to(folder)]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_of_someone_else_is_never_replaced(tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "config.json").write_text('{"format": "something else"}')
    for force in (False, True):
        with pytest.raises(InputError, match="not written by libi_fast"):
            runs.save(fitted(), folder, force=force)
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a folder"):
        runs.save(fitted(), tmp_path / "file", force=True)
    with pytest.raises(InputError, match="cannot make a folder in"):
        runs.save(fitted(), tmp_path / "file" / "run")


def test_an_empty_folder_and_a_link_serve(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    runs.save(fitted(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and runs.is_run(tmp_path / "empty")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_interrupted_save_leaves_no_half_folder(tmp_path, existing, interruption):
    folder = tmp_path / "run"
    if existing:
        runs.save(fitted(), folder)
    before = contents(tmp_path)

    class Interrupting(list):
        def __iter__(self):
            yield {"epoch": 0}
            raise interruption("in the middle of metrics.jsonl")

    method = fitted()
    method.history = Interrupting([1])
    with pytest.raises(interruption):
        runs.save(method, folder, force=True)
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == existing


def test_the_old_folder_comes_back_when_the_swap_fails(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    runs.save(fitted(), folder)
    before = contents(tmp_path)
    rename = runs.Path.rename

    def failing(self, target):
        if self.name.startswith(".run-new-"):
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(runs.Path, "rename", failing)
    with pytest.raises(OSError, match="no space left"):
        runs.save(fitted(epochs=2), folder, force=True)
    assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["run"]


# --- damage ---


def edit(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
    "no metrics": (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl is missing"),
    "config cut": (lambda f: (f / "config.json").write_text('{"format": '), "config.json: not readable JSON"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: not readable JSON"),
    "config of another": (lambda f: (f / "config.json").write_text("[]"), "not the configuration of a libi_fast run"),
    "newer": (lambda f: edit(f / "config.json", lambda c: c.update(format_version=99)), "written by a newer libi_fast"),
    "no version": (lambda f: edit(f / "config.json", lambda c: c.pop("format_version")), "format_version is missing"),
    "no method": (lambda f: edit(f / "config.json", lambda c: c.pop("method")), "'method' is missing"),
    "no model": (
        lambda f: edit(f / "config.json", lambda c: c["method"].pop("model")),
        "config.json: damaged settings",
    ),
    "strange method": (
        lambda f: edit(f / "config.json", lambda c: c["method"].update(method="gan")),
        "config.json: unknown method 'gan'",
    ),
    "strange setting": (
        lambda f: edit(f / "config.json", lambda c: c["method"]["settings"].update(speed=9)),
        "config.json: damaged settings",
    ),
    "strange dtype": (
        lambda f: edit(f / "config.json", lambda c: c["method"].update(dtype="float99")),
        "config.json: damaged settings",
    ),
    "wider decoder": (
        lambda f: edit(f / "config.json", lambda c: c["method"]["model"]["decoder"][-1].update(out=3)),
        r"weights.safetensors: 'model.decoder.2.weight' has shape \(2, 3\), but config.json describes \(3, 3\)",
    ),
    "standardisation": (
        lambda f: edit(f / "config.json", lambda c: c["method"]["standardizer"].update(scale=[0.0, 1.0])),
        "config.json: mean and scale",
    ),
    "weights cut": (
        lambda f: (f / "weights.safetensors").write_bytes((f / "weights.safetensors").read_bytes()[:-20]),
        "weights.safetensors: damaged",
    ),
    "weights empty": (lambda f: (f / "weights.safetensors").write_bytes(b""), "weights.safetensors: damaged"),
    "metrics cut": (
        lambda f: (f / "metrics.jsonl").write_text('{"a": 1}\n{"b"'),
        "metrics.jsonl: line 2 is not readable",
    ),
    "metrics strange": (lambda f: (f / "metrics.jsonl").write_text("3\n"), "metrics.jsonl: line 1 is not a record"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    runs.save(fitted(), folder)
    return contents(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, saved, damage):
    for name, content in saved.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    runs.load(tmp_path)
    break_it, message = DAMAGES[damage]
    break_it(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        runs.load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_missing_unexpected_or_not_finite(tmp_path, saved):
    from safetensors.torch import load_file, save_file

    for name, content in saved.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "weights.safetensors"
    state = load_file(path)
    name = next(iter(state))
    for change, message in [
        ({k: v for k, v in state.items() if k != name}, "is missing"),
        ({**state, "extra": torch.zeros(1)}, "'extra' is not part of the method"),
        ({**state, name: state[name] * float("nan")}, "not finite"),
    ]:
        save_file(change, path)
        with pytest.raises(InputError, match=message):
            runs.load(tmp_path)


@pytest.mark.parametrize(("make", "message"), [(lambda p: None, "not found"), (lambda p: p.write_text("x"), "but a file")])
def test_not_a_folder(tmp_path, make, message):
    make(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        runs.load(tmp_path / "run")
