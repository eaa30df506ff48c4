"""The command line: what a user types, and what each mistake answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import libi_fast as lf
from libi_fast import data, runs
from libi_fast.cli import OWN_OPTIONS, main
from libi_fast.errors import InputError
from libi_fast.training.run import Run

FAST = ["--epochs", "18", "--hidden", "4", "--num-samples", "50", "--quiet"]


def rows(n: int = 60, seed: int = 0) -> pd.DataFrame:
    x = data.LinearJTEx(seed, train=n).train.double().numpy()
    return pd.DataFrame({"height (cm)": 170 + 10 * x[:, 0], "weight": 70 + 5 * x[:, 1], "age": 40 + x[:, 0] * x[:, 1]})


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.csv"
    rows().to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, table):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["fit", table, "--method", "vae", "--out", str(folder), *FAST]) == 0
    return str(folder)


def refused(capsys, arguments, *expected):
    """The command fails as bad input does: exit code 2, one line on stderr that holds every expected text."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as error:  # argparse's way out
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("libi-fast: error: ") and captured.err.count("\n") == 1, captured.err
    for text in expected:
        assert text in captured.err
    assert captured.out == ""


# --- what works ---


def test_the_command_line_knows_every_method():
    assert list(OWN_OPTIONS) == list(lf.METHODS)


@pytest.mark.parametrize("method", list(lf.METHODS))
def test_fit_evaluate_sample_encode(tmp_path, capsys, table, method):
    folder = str(tmp_path / "run")
    own = ["--segments", "3"] if method == "lagging" else []
    assert main(["fit", table, "--method", method, "--out", folder, *own, *FAST[:-1]]) == 0
    out = capsys.readouterr().out
    for text in (
        "log-likelihood per row, nats",
        "+-",
        "effective sample size",
        "Pareto k < 0.7",
        f"run folder: {folder}",
    ):
        assert text in out
    assert main(["evaluate", folder, table, "--num-samples", "50", "--per-row", str(tmp_path / "rows.csv")]) == 0
    assert "60 rows" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "rows.csv")) == 60
    assert main(["sample", folder, "-n", "5", "-o", str(tmp_path / "new.csv")]) == 0
    new = pd.read_csv(tmp_path / "new.csv")
    assert list(new.columns) == ["height (cm)", "weight", "age"] and len(new) == 5
    assert main(["encode", folder, table, "-o", str(tmp_path / "codes.parquet")]) == 0
    codes = pd.read_parquet(tmp_path / "codes.parquet")
    assert list(codes.columns) == ["z1", "z2", "z1_sd", "z2_sd"] and len(codes) == 60
    assert (codes[["z1_sd", "z2_sd"]] > 0).all(axis=None)


def test_outputs_are_what_python_gives(tmp_path, run, table):
    method = runs.load(run)
    x = torch.from_numpy(rows().to_numpy(copy=True))
    result = method.log_likelihood(x, num_samples=50, seed=4)
    arguments = ["evaluate", run, table, "--num-samples", "50", "--seed", "4", "--per-row", str(tmp_path / "r.npy")]
    assert main(arguments) == 0
    per_row = torch.from_numpy(np.load(tmp_path / "r.npy"))
    assert torch.equal(per_row[:, 0], result.log_likelihood.double())
    assert main(["sample", run, "-n", "4", "-o", str(tmp_path / "s.npy"), "--seed", "7"]) == 0
    assert np.array_equal(np.load(tmp_path / "s.npy"), method.sample(4, seed=7).numpy())
    assert main(["encode", run, table, "-o", str(tmp_path / "e.npz")]) == 0
    assert np.array_equal(np.load(tmp_path / "e.npz")["x"][:, :2], method.codes(x).numpy())


def test_log_likelihoods_are_in_the_datas_own_units(tmp_path, capsys):
    """Scaling every column by 10 costs exactly log 10 nats a column."""
    means = []
    for scale in (1, 10):
        path = tmp_path / f"{scale}.csv"
        (scale * rows()).to_csv(path, index=False)
        per_row = tmp_path / f"{scale}.npy"
        folder = tmp_path / f"run{scale}"
        assert main(["fit", str(path), "--out", str(folder), "--method", "vae", "--dtype", "float64", *FAST]) == 0
        assert main(["evaluate", str(folder), str(path), "--num-samples", "50", "--per-row", str(per_row)]) == 0
        means.append(np.load(per_row)[:, 0].mean())
    assert means[0] - means[1] == pytest.approx(3 * np.log(10), abs=1e-6)


def test_the_same_seed_gives_the_same_run(tmp_path, table):
    for name in ("a", "b"):
        assert main(["fit", table, "--out", str(tmp_path / name), "--restarts", "2", *FAST]) == 0
    for name in (runs.CONFIG, runs.WEIGHTS, runs.METRICS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_named_sets_and_options(tmp_path, capsys):
    folder = str(tmp_path / "digits")
    arguments = ["fit", "digits", "--latent-dim", "3", "--out", folder, "--hidden", "4,5", "--batch-size", "500"]
    assert main([*arguments, "--activation", "relu", "--epochs", "18", "--num-samples", "10"]) == 0
    assert "digits: 359 held-out rows" in capsys.readouterr().out
    config = runs.read_config(folder)
    assert [layer.get("out", layer["layer"]) for layer in config["method"]["model"]["decoder"]] == [
        4,
        "relu",
        5,
        "relu",
        64,
    ]
    assert config["data"]["rows"] == {"train": 1079, "validation": 359, "test": 359}
    assert config["training"]["batch_size"] == 500
    assert main(["evaluate", folder, "digits", "--num-samples", "10"]) == 0
    assert main(["fit", "linearjtex", "--hidden", "", "--noise-variance", "0.1", "--out", str(tmp_path / "l"), *FAST[:2]]) == 0
    assert runs.read_config(tmp_path / "l")["method"]["model"]["likelihood"]["variance"] == [pytest.approx(0.1)]


def test_bernoulli(tmp_path):
    path = tmp_path / "bits.npy"
    np.save(path, np.random.default_rng(0).integers(0, 2, (40, 3)))
    folder = str(tmp_path / "run")
    assert main(["fit", str(path), "--likelihood", "bernoulli", "--out", folder, *FAST]) == 0
    assert main(["sample", folder, "-n", "9", "-o", str(tmp_path / "s.csv")]) == 0
    new = pd.read_csv(tmp_path / "s.csv")
    assert list(new.columns) == ["x1", "x2", "x3"] and set(np.unique(new)) <= {0, 1}


def test_columns_are_matched_by_name_and_one_row_is_enough_to_evaluate(tmp_path, run):
    frame = rows(5, seed=9)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame[["age", "height (cm)", "weight"]].to_csv(tmp_path / "b.csv", index=False)
    for name in "ab":
        assert main(["encode", run, str(tmp_path / f"{name}.csv"), "-o", str(tmp_path / f"{name}.npy")]) == 0
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
    frame[:1].to_csv(tmp_path / "one.csv", index=False)
    assert main(["evaluate", run, str(tmp_path / "one.csv"), "--num-samples", "20"]) == 0


def test_columns_with_large_offsets_keep_their_digits(tmp_path):
    """Seconds since 1970 vary by parts in 10^9: float32 holds no such difference until the mean is taken off."""
    frame = rows()
    frame["time"] = 1.7e9 + np.arange(len(frame)) % 7
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert main(["fit", str(tmp_path / "t.csv"), "--out", str(tmp_path / "run"), *FAST]) == 0
    assert np.isfinite(runs.read_config(tmp_path / "run")["data"]["test"]["log_likelihood"])


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "missing ")) for line in out)
    for name in ("torch", "compiled library", "triton kernels", "GPU", "pandas", "rich"):
        assert any(name in line for line in out)


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    from libi_fast import doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "pandas" else real(name))
    monkeypatch.setattr("libi_fast.kernels.cpu.available", lambda: False)
    monkeypatch.setattr("libi_fast.kernels.cpu.why_unavailable", lambda: "no compiler")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "missing pandas            for .csv and .parquet files: pip install 'libi-fast[full]'" in out
    assert "missing compiled library  no compiler" in out


@pytest.mark.parametrize("release", ["3.7.1", None])
@pytest.mark.parametrize(
    ("reason", "interpreted", "expected"),
    [
        ("torch sees no GPU", False, ("missing", "torch sees no GPU")),
        (None, False, ("ok", "they serve tensors on the GPU")),
        (None, True, ("ok", "interpreted, on CPU tensors")),
    ],
)
def test_doctor_says_whether_triton_kernels_serve(capsys, monkeypatch, reason, interpreted, expected, release):
    monkeypatch.setattr("libi_fast.doctor._version", lambda name: release)
    monkeypatch.setattr("libi_fast.kernels.gpu.why_unavailable", lambda: reason)
    monkeypatch.setattr("libi_fast.kernels.gpu.interpreted", lambda: interpreted)
    assert main(["doctor"]) == 0
    status, text = expected
    assert f"{status:<8}triton kernels    {release + ', ' if release else ''}{text}" in capsys.readouterr().out.splitlines()


def test_doctor_imports_no_triton():
    program = "import sys; from libi_fast import doctor; list(doctor.report()); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


@pytest.mark.slow
def test_demo(tmp_path, capsys, monkeypatch):
    from libi_fast import demo

    monkeypatch.setattr(demo, "TRAINING", {"epochs": 60, "restarts": 2})
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quiet"]) == 0
    text = capsys.readouterr().out
    for word in ("LiBI", "VAE", "ground truth", "exact log-likelihood", "importance, S = 5000", "HZ (p-value)"):
        assert word in text
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert runs.load(out / "libi").name == "libi" and runs.load(out / "vae").name == "vae"
    refused(capsys, ["demo", "--out", out], "exists; pass --force")
    (out / "mine.txt").write_text("mine")
    assert main(["demo", "--out", str(out), "--quiet", "--force"]) == 0
    assert (out / "mine.txt").exists()
    refused(capsys, ["demo", "--out", tmp_path, "--force"], "was not written by libi_fast")


# --- as a user starts it ---


def shell(*arguments, cwd=None, **environment):
    command = [sys.executable, "-m", "libi_fast.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=120, check=False
    )


def test_version_and_help_from_a_shell():
    from importlib.metadata import version

    assert shell("--version").stdout == f"libi-fast {version('libi-fast')}\n"
    assert "evaluate" in shell("--help").stdout


def test_errors_from_a_shell(tmp_path, table):
    for arguments, message in [
        (
            ["fit", "nope", "--out", "r"],
            "unknown data set 'nope'; known: LinearJTEx, CubicJTEx, Gaussian, Mobius, digits, wine",
        ),
        (["fit", "nope.csv", "--out", "r"], "file not found: nope.csv"),
        (["sample", "r", "-n", "3", "-o", "s.csv"], "run folder not found: r"),
    ]:
        result = shell(*arguments, cwd=tmp_path)
        assert result.returncode == 2 and result.stdout == ""
        assert result.stderr.startswith(f"libi-fast: error: {message}") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m libi_fast.cli doctor | head -n 1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0 and result.stderr == "" and result.stdout.startswith("ok")


def test_an_interruption_says_that_nothing_was_written(tmp_path, capsys, table, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lf.LiBI, "fit", interrupted)
    assert main(["fit", table, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "libi-fast: interrupted, nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_an_interrupted_fit_goes_on_with_resume(tmp_path, capsys, table, monkeypatch):
    folder, whole, checkpoint = tmp_path / "run", tmp_path / "whole", tmp_path / "run.checkpoint"
    arguments = ["fit", table, *FAST, "--method", "vae"]
    original = Run.save_if_due

    def interrupted(run, progress):
        if progress.epoch == 9:
            run.checkpoint.write(run.state(progress.state()))
            raise KeyboardInterrupt
        original(run, progress)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save_if_due", interrupted)
        assert main([*arguments, "--out", str(folder)]) == 130
    assert f"go on with --resume ({checkpoint})" in capsys.readouterr().err
    assert checkpoint.exists() and not folder.exists()
    assert main([*arguments, "--out", str(folder)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, "--out", str(folder), "--resume"]) == 0
    assert main([*arguments, "--out", str(whole), "--resume"]) == 0, "nothing to go on from: it begins"
    one, two = runs.load(folder).state(), runs.load(whole).state()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not checkpoint.exists()


def test_an_interrupted_evaluation_keeps_the_training(tmp_path, capsys, table, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(lf.LiBI, "log_likelihood", interrupted)
        assert main(["fit", table, "--out", str(tmp_path / "run"), *FAST]) == 130
    assert capsys.readouterr().err == f"libi-fast: interrupted, {tmp_path / 'run'} was written without an evaluation\n"
    assert main(["evaluate", str(tmp_path / "run"), table, "--num-samples", "50"]) == 0


def test_a_bug_keeps_its_traceback(tmp_path, table, monkeypatch):
    monkeypatch.setattr(lf.LiBI, "fit", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["fit", table, "--out", str(tmp_path / "run")])


# --- bad input, from the command line and from Python ---

BAD_FILES = {
    "missing file": (None, "file not found"),
    "empty file": ("", "is empty"),
    "no rows": ("a,b\n", "no data"),
    "text": ("a,b\n1,2\n3,oops\n5,6\n7,8\n", "row 2, column 'b': 'oops' is not a number"),
    "nan": ("a,b\n1,2\nnan,4\n5,6\n7,8\n", "row 2, column 'a' is NaN or missing"),
    "infinity": ("a,b\n1,2\n3,4\n5,inf\n7,8\n", "row 3, column 'b' is infinite"),
    "one row": ("a,b\n1,2\n", "1 row(s); at least 2 are needed"),
    "three rows": ("a,b\n1,2\n3,4\n5,6\n", "3 row(s) cannot be split"),
    "constant column": (
        "a,b\n" + "".join(f"{i},7\n" for i in range(20)),
        "1 constant column(s) in the training rows: 'b'",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, capsys, case):
    text, message = BAD_FILES[case]
    path = tmp_path / "bad.csv"
    if text is not None:
        path.write_text(text)
    refused(capsys, ["fit", path, "--out", tmp_path / "run", *FAST], message, "bad.csv" if "constant" not in case else "")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=re.escape(message)):
        dataset = data.load(path)
        data.Standardizer.fit(dataset.train, dataset.columns)


def test_other_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("1,2\n")
    refused(capsys, ["fit", tmp_path / "t.txt", "--out", tmp_path / "r"], "supported: .csv, .npy, .npz, .parquet")
    np.save(tmp_path / "flat.npy", np.zeros(4))
    refused(capsys, ["fit", tmp_path / "flat.npy", "--out", tmp_path / "r"], "expected an array [rows, columns]")
    np.save(tmp_path / "o.npy", np.array([[None, 1]], dtype=object))
    refused(capsys, ["fit", tmp_path / "o.npy", "--out", tmp_path / "r"], "never unpickled")
    np.savez(tmp_path / "two.npz", a=np.zeros((9, 2)), b=np.zeros((9, 2)))
    refused(capsys, ["fit", tmp_path / "two.npz", "--out", tmp_path / "r"], "choose one with --key")


def test_wrong_columns_at_evaluate(tmp_path, capsys, run):
    frame = rows(5)
    frame[["age", "weight"]].to_csv(tmp_path / "two.csv", index=False)
    for command in (
        ["evaluate", run, tmp_path / "two.csv"],
        ["encode", run, tmp_path / "two.csv", "-o", tmp_path / "c.csv"],
    ):
        refused(capsys, command, "two.csv: 2 column(s), but the model was trained on 3; missing: 'height (cm)'")
    frame.rename(columns={"age": "years"}).to_csv(tmp_path / "renamed.csv", index=False)
    refused(
        capsys,
        ["evaluate", run, tmp_path / "renamed.csv"],
        "column(s) 'age' of the training data are missing; found 'years'",
    )
    np.save(tmp_path / "four.npy", np.zeros((3, 4)))
    refused(capsys, ["evaluate", run, tmp_path / "four.npy"], "4 column(s), but the model was trained on 3")
    refused(capsys, ["evaluate", run, "digits"], "digits: 64 column(s), but the model was trained on 3")
    with pytest.raises(InputError, match="3"):
        runs.load(run).log_likelihood(torch.zeros(3, 4))


def test_bad_rows_at_evaluate(tmp_path, capsys, run):
    frame = rows(5)
    frame.loc[3, "weight"] = np.nan
    frame.to_csv(tmp_path / "nan.csv", index=False)
    refused(capsys, ["evaluate", run, tmp_path / "nan.csv"], "row 4, column 'weight' is NaN or missing")
    with pytest.raises(InputError, match="row 3"):
        runs.load(run).log_likelihood(frame.to_numpy())


def test_a_decoder_that_does_not_fit_the_likelihood(tmp_path, capsys, table):
    import json
    import shutil

    folder = tmp_path / "run"
    assert main(["fit", table, "--out", str(folder), "--noise-variance", "0.1", *FAST]) == 0
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "whole")
    config["method"]["model"]["decoder"][-1]["out"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    refused(capsys, ["evaluate", folder, table], "weights.safetensors", "describes (2, 4)")
    narrow = lf.VAE(
        lf.LatentVariableModel(lf.mlp(2, [], 2), lf.Gaussian(1.0), 2), inference=lf.MeanFieldGaussian(lf.mlp(3, [], 4))
    )
    narrow.columns = list(rows(2).columns)
    narrow.save(tmp_path / "narrow")
    refused(capsys, ["evaluate", tmp_path / "narrow", table], "output has 2 values a row but the data has 3 columns")
    method = lf.VAE(
        lf.LatentVariableModel(lf.mlp(2, [], 5), lf.Gaussian(1.0), 2), inference=lf.MeanFieldGaussian(lf.mlp(3, [], 4))
    )
    with pytest.raises(InputError, match="the decoder's output has 5 values a row but the data has 3 columns"):
        method.fit(torch.randn(9, 3), epochs=1, progress=False)


def test_negative_variance(tmp_path, capsys, table):
    for value in ("-1", "0", "nan", "inf"):
        refused(capsys, ["fit", table, "--out", tmp_path / "run", "--noise-variance", value], "variance")
        with pytest.raises(InputError, match="variance"):
            lf.Gaussian(float(value))
    refused(
        capsys,
        ["fit", table, "--out", tmp_path / "run", "--variance-inflation", "-2"],
        "--variance-inflation",
    )
    assert not list(tmp_path.iterdir())


def test_bernoulli_data_outside_the_unit_interval(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n0,1\n1,0\n0.5,1\n0,1.5\n1,1\n0,0\n")
    arguments = ["fit", path, "--likelihood", "bernoulli", "--out", tmp_path / "run"]
    refused(capsys, arguments, "row 4, column 'b' is 1.5, outside [0, 1]")
    refused(capsys, ["fit", "wine", "--likelihood", "bernoulli", "--out", tmp_path / "run"], "[0, 1]")
    with pytest.raises(InputError, match="needs data in"):
        lf.Bernoulli().check(torch.tensor([[0.5, 1.5]]))


def test_unknown_names_list_the_known_ones(tmp_path, capsys):
    refused(
        capsys,
        ["fit", "mnist", "--out", tmp_path / "r"],
        "'mnist'",
        "LinearJTEx, CubicJTEx, Gaussian, Mobius, digits, wine",
        ".parquet",
    )
    refused(capsys, ["fit", "wine", "--out", tmp_path / "r", "--activation", "swoosh"], "'swoosh'", "tanh")
    refused(capsys, ["fit", "wine", "--out", tmp_path / "r", "--method", "gan"], "'gan'")


def test_a_run_folder_that_exists(tmp_path, capsys, run, table):
    before = {p: p.read_bytes() for p in runs.Path(run).rglob("*") if p.is_file()}
    refused(capsys, ["fit", table, "--out", run, *FAST], "exists; pass --force")
    assert {p: p.read_bytes() for p in runs.Path(run).rglob("*") if p.is_file()} == before
    (tmp_path / "precious.txt").write_text("x")
    refused(capsys, ["fit", table, "--out", tmp_path, "--force", *FAST], "was not written by libi_fast")
    assert (tmp_path / "precious.txt").exists()


def test_a_damaged_run_folder(tmp_path, capsys, table):
    folder = tmp_path / "run"
    assert main(["fit", table, "--out", str(folder), "--method", "vae", *FAST]) == 0
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for command in (
        ["evaluate", folder, table],
        ["sample", folder, "-n", "3", "-o", tmp_path / "s.csv"],
        ["encode", folder, table, "-o", tmp_path / "c.csv"],
    ):
        refused(capsys, command, "weights.safetensors: damaged")
    assert not (tmp_path / "s.csv").exists()


def test_outputs_are_checked_before_the_work(tmp_path, capsys, run, table):
    (tmp_path / "there.csv").write_text("mine")
    for out, message in [
        ("there.csv", "exists; pass --force"),
        ("new.xlsx", "supported: .csv"),
        ("no/folder/new.csv", "does not exist"),
    ]:
        out = tmp_path / out
        refused(capsys, ["sample", run, "-n", "3", "-o", out], message)
        refused(capsys, ["encode", run, table, "-o", out], message)
        refused(capsys, ["evaluate", run, table, "--per-row", out], message)
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert main(["sample", run, "-n", "3", "-o", str(tmp_path / "there.csv"), "--force"]) == 0
    assert len(pd.read_csv(tmp_path / "there.csv")) == 3


def test_a_disk_that_refuses_loses_nothing(tmp_path, capsys, run, monkeypatch):
    target = tmp_path / "s.csv"
    target.write_text("mine")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    refused(capsys, ["sample", run, "-n", "3", "-o", target, "--force"], "No space left on device")
    assert target.read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["s.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fit", "wine"], "--out"),
        (["fit", "wine", "--out", "r", "--epochs", "0"], "at least 1"),
        (["fit", "wine", "--out", "r", "--latent-dim", "two"], "invalid whole number"),
        (["fit", "wine", "--out", "r", "--hidden", "5,x"], "invalid list of widths"),
        (
            ["fit", "wine", "--out", "r", "--beta", "2"],
            "--beta belongs to --method vae or beta-vae or annealing or lagging, not to libi",
        ),
        (["fit", "wine", "--out", "r", "--method", "vae", "--hz-weight", "2"], "--hz-weight belongs to --method libi"),
        (["fit", "wine", "--out", "r", "--likelihood", "bernoulli", "--noise-variance", "1"], "--likelihood gaussian"),
        (["fit", "wine", "--out", "r", "--learning-rate", "-1"], "learning_rate"),
        (["fit", "wine", "--out", "r", "--hz-weight", "-1"], "hz_weight"),
        (["fit", "wine", "--out", "r", "--batch-size", "3"], "at least 6 rows"),
        (["fit", "wine", "--out", "r", "--batch-size", "1000"], "batch_size"),
        (["fit", "wine", "--out", "r", "--seed", "-1"], "at least 0"),
        (["fit", "wine", "--out", "r", "--seed", str(2**64)], "seed"),
        (["sample", "r", "-n", "0", "-o", "s.csv"], "at least 1"),
    ],
)
def test_bad_options(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    refused(capsys, arguments, message)
    assert not list(tmp_path.iterdir())


def test_choices_of_libi_and_survivors_reach_the_run(tmp_path, capsys):
    from libi_fast import cli

    arguments = ["fit", "LinearJTEx", "--out", str(tmp_path / "run"), "--quiet", "--epochs", "30", "--repeats", "1"]
    arguments += ["--restarts", "4", "--survivors", "2", "--step1", "quadrature", "--step2", "importance"]
    arguments += ["--mutual-information", "0.5", "--log-dir", str(tmp_path / "logs"), "--num-samples", "20"]
    assert cli.main(arguments) == 0
    run = lf.load(tmp_path / "run")
    assert run.settings["step1"] == "quadrature" and run.settings["step2"] == "importance"
    assert run.settings["constraints"] == (lf.MutualInformation(at_least=0.5),)
    assert len(run.history[-1]["objective"]) == 2
    assert list((tmp_path / "logs").glob("events*"))
    assert cli.main([*arguments, "--method", "vae", "--force"]) == 2
    assert "belongs to --method libi" in capsys.readouterr().err


def test_torchrun_fits_and_evaluates_as_one_process(tmp_path):
    """Two processes share the rows; the first alone writes and prints."""
    options = ["--quiet", "--epochs", "30", "--repeats", "1", "--num-samples", "20", "--dtype", "float64"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "libi_fast.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for folder, program in {"one": [sys.executable, "-m", "libi_fast.cli"], "two": torchrun}.items():
        for command in (
            ["fit", "LinearJTEx", "--out", str(tmp_path / folder), *options],
            [
                "evaluate",
                str(tmp_path / folder),
                "LinearJTEx",
                "--num-samples",
                "20",
                "--per-row",
                str(tmp_path / f"{folder}.csv"),
            ],
        ):
            done = subprocess.run([*program, *command], env=environment, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
        assert done.stdout.count("rows with Pareto k") == 1
    one, two = (pd.read_csv(tmp_path / f"{name}.csv").values for name in ("one", "two"))
    assert np.allclose(one[:, 0], two[:, 0], rtol=1e-6)


def test_a_large_npy_file_is_evaluated_block_by_block(tmp_path, monkeypatch):
    from libi_fast import cli
    from libi_fast.training import method

    x = lf.data.LinearJTEx(seed=1).test.numpy()
    np.save(tmp_path / "x.npy", x)
    run = ["fit", "LinearJTEx", "--out", str(tmp_path / "run"), "--quiet", "--method", "vae", "--epochs", "5"]
    assert cli.main([*run, "--num-samples", "10"]) == 0
    evaluate = ["evaluate", str(tmp_path / "run"), str(tmp_path / "x.npy"), "--num-samples", "10", "--per-row"]
    assert cli.main([*evaluate, str(tmp_path / "whole.csv")]) == 0
    monkeypatch.setattr(cli, "LARGE_FILE", 1)
    monkeypatch.setattr(method, "BLOCK_ROWS", 64)
    assert cli.main([*evaluate, str(tmp_path / "blocks.csv")]) == 0
    whole, blocks = (pd.read_csv(tmp_path / f"{name}.csv").values[:, :3] for name in ("whole", "blocks"))
    assert np.allclose(whole, blocks, rtol=1e-4, atol=1e-5)
    np.save(tmp_path / "x.npy", x[:, :1])
    assert cli.main([*evaluate, str(tmp_path / "none.csv")]) == 2
