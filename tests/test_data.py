"""Data sets, users' files, splits and standardisation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

import libi_fast as lf
from libi_fast import data
from libi_fast.errors import InputError

LINEAR_GAUSSIAN = [data.LinearJTEx, data.GaussianExample]


# --- synthetic sets ---


@pytest.mark.parametrize(("make", "bound"), [(data.LinearJTEx, -2.9708), (data.GaussianExample, 7.8644)])
def test_entropy_bound_is_the_papers_ceiling(make, bound):
    truth = make(train=1, validation=1, test=1).truth
    assert truth.entropy_bound() == pytest.approx(bound, abs=5e-5)
    d = len(truth.weight)
    assert truth.entropy_bound() == pytest.approx(-multivariate_normal(np.zeros(d), truth.covariance).entropy(), abs=1e-9)


@pytest.mark.parametrize("make", LINEAR_GAUSSIAN)
def test_log_likelihood_is_the_closed_form(make):
    d = make(seed=3, dtype=torch.float64)
    covariance = d.truth.weight @ d.truth.weight.T + torch.diag(d.noise_variance)
    expected = multivariate_normal(np.zeros(d.test.shape[1]), covariance).logpdf(d.test)
    torch.testing.assert_close(d.truth.log_likelihood(d.test), torch.from_numpy(expected), rtol=1e-6, atol=1e-6)


def test_linear_jtex_marginal_does_not_depend_on_b():
    a = torch.tensor([[0.75, 0.25], [1.5, -1.0]], dtype=torch.float64)
    expected = a @ a.T + 0.01 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(data.LinearJTEx().truth.covariance, expected)


@pytest.mark.parametrize("make", LINEAR_GAUSSIAN)
def test_expected_log_likelihood_is_the_mean_over_many_draws(make):
    d = make(seed=1, train=1, validation=1, test=200_000, dtype=torch.float64)
    dim = d.test.shape[1]
    mean, covariance = 0.1 * torch.ones(dim, dtype=torch.float64), 1.5 * d.truth.covariance
    sampled = multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(d.test)
    error = sampled.std() / len(sampled) ** 0.5
    assert abs(d.truth.expected_log_likelihood(mean, covariance) - sampled.mean()) < 4 * error
    assert d.truth.expected_log_likelihood(mean, covariance) < d.truth.entropy_bound()


def test_expected_log_likelihood_refuses_what_is_not_a_covariance():
    truth = data.LinearJTEx().truth
    with pytest.raises(InputError, match="positive definite"):
        truth.expected_log_likelihood(torch.zeros(2), -torch.eye(2))
    with pytest.raises(InputError, match="expected mean"):
        truth.expected_log_likelihood(torch.zeros(3), torch.eye(3))


@pytest.mark.parametrize("make", LINEAR_GAUSSIAN)
def test_a_seed_means_the_same_data(make):
    one, two, other = make(seed=5), make(seed=5), make(seed=6)
    assert torch.equal(one.train, two.train) and torch.equal(one.test_codes, two.test_codes)
    assert not torch.equal(one.train, other.train)
    # A larger split begins with a smaller one's rows, and sizes do not move the other splits.
    larger = make(seed=5, train=700, test=900)
    assert torch.equal(larger.test[:500], one.test) and torch.equal(larger.validation, one.validation)
    rows = torch.cat([one.train, one.validation, one.test])
    assert len(torch.unique(rows, dim=0)) == 1500


@pytest.mark.parametrize("make", LINEAR_GAUSSIAN)
def test_rows_are_the_codes_through_the_truth_plus_noise(make):
    d = make(seed=2, train=20_000, dtype=torch.float64)
    noise = d.train - d.train_codes @ d.truth.weight.T
    torch.testing.assert_close(noise.var(0), d.noise_variance, rtol=0.05, atol=0)
    torch.testing.assert_close(torch.cov(d.train_codes.T), torch.eye(2, dtype=torch.float64), rtol=0, atol=0.05)
    assert abs(torch.corrcoef(torch.cat([noise, d.train_codes], 1).T).fill_diagonal_(0)).max() < 0.05


@pytest.mark.parametrize("size", [0, -1, 2**31])
def test_split_sizes_are_checked(size):
    with pytest.raises(InputError, match="test: expected between"):
        data.LinearJTEx(test=size)


# --- real sets ---


def test_digits_are_dequantised_and_split():
    d, again = data.digits(dtype=torch.float64), data.digits(dtype=torch.float64)
    assert [len(d.train), len(d.validation), len(d.test)] == [1079, 359, 359]
    assert d.train.shape[1] == 64 and len(d.columns) == 64 and d.truth is None
    rows = torch.cat([d.train, d.validation, d.test])
    assert rows.min() > 0 and rows.max() < 1
    assert torch.equal(d.test, again.test)
    from sklearn.datasets import load_digits

    pixels = (rows * 17).floor()
    key = torch.tensor(load_digits().data, dtype=torch.float64)
    assert torch.equal(pixels[_row_order(pixels)], key[_row_order(key)])


def _row_order(x: torch.Tensor) -> list[int]:
    return sorted(range(len(x)), key=lambda i: x[i].tolist())


def test_wine_keeps_its_units():
    d = data.wine(dtype=torch.float64)
    assert d.columns[0] == "alcohol" and d.train.shape == (106, 13)
    assert 10 < d.train[:, 0].mean() < 15


# --- split and load ---


def test_split_is_a_seeded_partition():
    split = data.Split(seed=1)
    parts = split.indices(1000)
    assert [len(p) for p in parts] == [600, 200, 200]
    assert sorted(torch.cat(parts).tolist()) == list(range(1000))
    assert all(torch.equal(a, b) for a, b in zip(parts, data.Split(seed=1).indices(1000), strict=True))
    assert not torch.equal(parts[0], data.Split(seed=2).indices(1000)[0])
    assert all(len(p) for p in split.indices(4))
    with pytest.raises(InputError, match="3 row"):
        split.indices(3)
    with pytest.raises(InputError, match="shares above 0"):
        data.Split(validation=0.5, test=0.5)


def test_load_knows_names_and_files(tmp_path):
    assert torch.equal(data.load("linearjtex", seed=4).train, data.LinearJTEx(4).train)
    assert data.load("Gaussian").truth is not None
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "\n".join(f"{i},{i * i}" for i in range(10)))
    d = data.load(path, seed=1, dtype=torch.float64)
    assert d.columns == ["a", "b"] and [len(d.train), len(d.validation), len(d.test)] == [6, 2, 2]
    assert sorted(torch.cat([d.train, d.validation, d.test])[:, 0].tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("source", "message"), [("nope", "LinearJTEx, CubicJTEx, Gaussian, Mobius, digits, wine"), ("no/f.csv", "not found")]
)
def test_load_refuses_unknown_names_and_missing_files(source, message):
    with pytest.raises(InputError, match=message):
        data.load(source)


# --- files ---


def write(path, frame: pd.DataFrame) -> None:
    {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".npy": lambda: np.save(path, frame.to_numpy()),
        ".npz": lambda: np.savez(path, x=frame.to_numpy()),
        ".parquet": lambda: frame.to_parquet(path),
    }[path.suffix]()


@pytest.mark.parametrize("suffix", data.READABLE)
def test_every_kind_of_file_reads_exactly(tmp_path, suffix):
    frame = pd.DataFrame({"a": [0.1, 1 / 3, 2e-300], "b": [1.0, -2.5, 3e17]})
    path = tmp_path / f"t{suffix}"
    write(path, frame)
    table = data.load_table(path)
    assert np.array_equal(table.values, frame.to_numpy()) and table.values.dtype == np.float64
    assert table.columns == (["a", "b"] if suffix in (".csv", ".parquet") else ["x1", "x2"])


@pytest.mark.parametrize("suffix", data.READABLE)
def test_save_table_round_trip(tmp_path, suffix):
    values = torch.tensor([[0.1, 2.0], [1 / 3, -4.0]])
    path = tmp_path / f"t{suffix}"
    data.save_table(path, values, ["height (cm)", "b,c"])
    table = data.load_table(path)
    assert np.array_equal(table.values.astype(np.float32), values.numpy())
    assert table.columns == (["x1", "x2"] if suffix == ".npy" else ["height (cm)", "b,c"])
    with pytest.raises(InputError, match="exists; pass --force"):
        data.save_table(path, values, ["a", "b"])
    data.save_table(path, values[:1], ["a", "b"], force=True)
    assert len(data.load_table(path, min_rows=1).values) == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_csv_without_header_is_all_data(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("1,2\n3,4\n")
    table = data.load_table(path)
    assert table.values.tolist() == [[1, 2], [3, 4]] and table.columns == ["x1", "x2"] and not table.named


def test_csv_with_byte_order_mark_spaces_and_blank_lines(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("\ufeffa, b\n1, 2\n\n3, 4\n".encode())
    table = data.load_table(path)
    assert table.values.tolist() == [[1, 2], [3, 4]] and table.columns == ["a", "b"]


CSV_ERRORS = [
    ("", "is empty"),
    ("\n\n", "blank lines only"),
    ("a,b\n", "no data"),
    ("a,b\n1,2\n", r"1 row\(s\); at least 2"),
    ("a,b\n1,2\n3,oops\n", "row 2, column 'b': 'oops' is not a number"),
    ("a,b\n1,2\nnan,4\n", "row 2, column 'a' is NaN or missing"),
    ("a,b\n1,2\n3,\n", "row 2, column 'b' is NaN or missing"),
    ("a,b\n1,2\n3\n", "row 2, column 'b' is NaN or missing"),
    ("a,b\n1,inf\n3,4\n", "row 1, column 'b' is infinite"),
    ("1,2\n3,-inf\n", "row 2, column 'x2' is minus infinity"),
    ("a,b\n1,2\n3,4,5\n", "not a table of comma-separated values"),
    ("a,b\n1,2,3\n4,5,6\n", "not a table of comma-separated values"),
    (",a\n0,1\n1,2\n", "column 1 has no name"),
    ("a,b\n1,2\n2020-01-01,4\n", "row 2, column 'a': '2020-01-01' is not a number"),
    ("a,b\n1;2\n3;4\n", "row 1, column 'a': '1;2' is not a number"),
    ("a\n1e400\n2\n", "row 1, column 'a' is infinite"),
]


@pytest.mark.parametrize(("text", "message"), CSV_ERRORS)
def test_bad_csv(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        data.load_table(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_csv_that_is_not_text(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(b"a,b\n\xff\xfe\x00,1\n")
    with pytest.raises(InputError, match="not a table"):
        data.load_table(path)


ARRAY_ERRORS = [
    (np.zeros(5), "got shape"),
    (np.zeros((2, 2, 2)), "got shape"),
    (np.zeros((0, 3)), "no data"),
    (np.zeros((3, 0)), "no data"),
    (np.zeros((1, 3)), "1 row"),
    (np.array([[1.0, 2.0], [3.0, np.nan]]), "row 2, column 'x2' is NaN"),
    (np.array([[1.0, 2.0], [np.inf, 3.0]]), "row 2, column 'x1' is infinite"),
    (np.array([["a", "b"], ["c", "d"]]), "dtype <U1"),
    (np.array([[1j, 2j], [3j, 4j]]), "dtype complex128"),
    (np.array([[1, "a"], [None, 2]], dtype=object), "never unpickled"),
]


@pytest.mark.parametrize(("array", "message"), ARRAY_ERRORS)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_bad_arrays(tmp_path, array, message, suffix):
    path = tmp_path / f"bad{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez(path, x=array)
    with pytest.raises(InputError, match=message):
        data.load_table(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet"])
@pytest.mark.parametrize("damage", ["garbage", "truncated"])
def test_damaged_binary_files(tmp_path, suffix, damage):
    path = tmp_path / f"bad{suffix}"
    write(path, pd.DataFrame(np.arange(2000.0).reshape(-1, 2), columns=["a", "b"]))
    path.write_bytes(b"not what the ending says" if damage == "garbage" else path.read_bytes()[:-400])
    with pytest.raises(InputError, match="not a readable"):
        data.load_table(path)


def test_npz_needs_a_key_where_it_is_ambiguous(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, a=np.zeros((2, 2)), b=np.ones((2, 2)))
    with pytest.raises(InputError, match="none is named x"):
        data.load_table(path)
    with pytest.raises(InputError, match="no array named 'c'; it holds: a, b"):
        data.load_table(path, key="c")
    assert data.load_table(path, key="b").values.sum() == 4
    (tmp_path / "t.csv").write_text("1,2\n3,4\n")
    with pytest.raises(InputError, match="a key chooses"):
        data.load_table(tmp_path / "t.csv", key="b")


def test_bad_parquet(tmp_path):
    path = tmp_path / "bad.parquet"
    pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}).to_parquet(path)
    with pytest.raises(InputError, match="row 1, column 'b': 'x' is not a number"):
        data.load_table(path)
    pd.DataFrame({"a": pd.to_datetime(["2020-01-01", "2020-01-02"])}).to_parquet(path)
    with pytest.raises(InputError, match="column 'a' holds datetime64"):
        data.load_table(path)
    pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}).to_parquet(path)
    with pytest.raises(InputError, match="row 2, column 'a' is NaN or missing"):
        data.load_table(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("t.txt", r"supported: \.csv, \.npy, \.npz, \.parquet"), ("t", "without ending"), ("gone.csv", "file not found")],
)
def test_files_that_cannot_be_read(tmp_path, name, message):
    if "gone" not in name:
        (tmp_path / name).write_text("1,2\n3,4\n")
    with pytest.raises(InputError, match=message):
        data.load_table(tmp_path / name)


def test_a_folder_is_not_a_table(tmp_path):
    (tmp_path / "f.csv").mkdir()
    with pytest.raises(InputError, match="not a file"):
        data.load_table(tmp_path / "f.csv")


def test_numbers_whose_square_overflows_float32_are_named(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n3,1e300\n5,6\n7,8\n")
    with pytest.raises(InputError, match=r"row 2, column 'b' is 1e\+300, beyond 1e\+18"):
        data.load(path)


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    import builtins

    path = tmp_path / "t.csv"
    path.write_text("1,2\n3,4\n")
    real = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas" or name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    monkeypatch.setattr("importlib.import_module", lambda name: without_pandas(name))
    for call in (lambda: data.load_table(path), data.digits, data.wine):
        with pytest.raises(InputError, match=r"pip install 'libi-fast\[full\]'"):
            call()


def test_select_matches_columns_by_name():
    table = data.Table(np.array([[1.0, 2.0]]), ["b", "a"], named=True)
    assert table.select(["a", "b"]).values.tolist() == [[2.0, 1.0]]
    assert table.select(["x1", "x2"]).values.tolist() == [[1.0, 2.0]]  # the training data had no names
    assert data.Table(table.values, ["x1", "x2"], named=False).select(["a", "b"]).values.tolist() == [[1.0, 2.0]]
    with pytest.raises(InputError, match=r"2 column\(s\), but the model was trained on 3; missing: 'c'"):
        table.select(["a", "b", "c"])
    with pytest.raises(InputError, match="column\\(s\\) 'c' of the training data are missing; found 'b'"):
        table.select(["a", "c"])


# --- standardisation ---


def test_standardizer_centres_scales_and_inverts():
    x = torch.tensor([[1.0, 1e6], [3.0, 1e6 + 1], [8.0, 1e6 + 3]])
    s = data.Standardizer.fit(x)
    y = s.transform(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(2))
    torch.testing.assert_close(s.inverse(y), x, rtol=1e-6, atol=0)
    again = data.Standardizer.from_config(s.to_config())
    assert torch.equal(again.mean, s.mean) and torch.equal(again.scale, s.scale)


def test_log_abs_det_changes_the_units_of_a_log_likelihood():
    truth = data.GaussianExample().truth
    x = data.GaussianExample(seed=1, dtype=torch.float64).train * 3 + 1
    s = data.Standardizer.fit(x)
    covariance = np.asarray(truth.covariance)
    # The law of y = (x - mean) / scale when x ~ N(1, 9 covariance), by hand.
    scale, mean = s.scale.numpy(), s.mean.numpy()
    law_of_y = multivariate_normal((1 - mean) / scale, 9 * covariance / np.outer(scale, scale))
    of_y = law_of_y.logpdf(s.transform(x).numpy())
    of_x = multivariate_normal(np.ones(4), 9 * covariance).logpdf(x.numpy())
    np.testing.assert_allclose(of_y - s.log_abs_det, of_x, rtol=1e-6)


def test_standardizer_refuses_constant_columns_by_name():
    x = torch.tensor([[1.0, 0.1, 7.0], [2.0, 0.1, 7.0], [4.0, 0.1, 7.0]])
    with pytest.raises(InputError, match=r"2 constant column\(s\) in the training rows: 'b', 'c'"):
        data.Standardizer.fit(x, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 2), "1 row"),
        (torch.zeros(3), "expected"),
        (torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), "row 2, column 'x2' is nan"),
    ],
)
def test_standardizer_refuses_bad_data(x, message):
    with pytest.raises(InputError, match=message):
        data.Standardizer.fit(x)


@pytest.mark.parametrize(
    "config", [{}, {"mean": [0.0], "scale": ["a"]}, {"mean": [0.0], "scale": [0.0]}, {"mean": 0.0, "scale": 1.0}]
)
def test_standardizer_refuses_damaged_configs(config):
    with pytest.raises(InputError):
        data.Standardizer.from_config(config)
    with pytest.raises(InputError, match="2 columns, as in training"):
        data.Standardizer(torch.zeros(2), torch.ones(2)).transform(torch.zeros(4, 3))


# --- the paper's ground truths ---


def test_linear_jtex_has_the_papers_objective_at_the_truth_and_at_the_vaes_optimum():
    """L = KL[p || p_theta] + min_q KL[q || p_theta(z|x)], population values: 0.532 at the truth, 0.196 at the VAE's optimum."""
    d = data.LinearJTEx(dtype=torch.float64)
    model, truth = d.model(), d.truth

    def objective(a):
        with torch.no_grad():
            model.decoder.a.copy_(torch.as_tensor(a).view(2, 2))
        kl = truth.entropy_bound() - truth.expected_log_likelihood(*lf.linear_gaussian_marginal(model))
        return kl + float(lf.mean_field_gap(model)), kl

    a = np.array([0.75, 0.25, 1.5, -1.0])
    at_truth, kl = objective(a)
    assert kl == pytest.approx(0, abs=1e-10)
    assert at_truth == pytest.approx(0.532, abs=5e-4)
    starts = (a + 0.1 * np.random.default_rng(0).standard_normal((4, 4))).tolist()
    found = min((minimize(lambda v: objective(v)[0], s, method="BFGS") for s in starts), key=lambda r: r.fun)
    assert found.fun == pytest.approx(0.196, abs=5e-4)
    assert truth.entropy_bound() - objective(found.x)[1] == pytest.approx(-3.133, abs=5e-4)


def test_the_gap_and_the_information_of_a_linear_model_are_their_integrals():
    d = data.LinearJTEx(dtype=torch.float64)
    model = d.model()
    with torch.no_grad():
        model.decoder.a.copy_(torch.tensor([[0.75, 0.25], [1.5, -1.0]]))
    mean, covariance = (t.numpy() for t in lf.exact_posterior(model, d.test[:1]))
    q = lf.closest_mean_field(model, d.test[:1])
    law = multivariate_normal(mean[0], covariance)
    z = q.mean + q.log_std.exp() * torch.randn(200_000, 2, dtype=torch.float64)
    log_q = torch.distributions.Normal(q.mean, q.log_std.exp()).log_prob(z).sum(-1)
    assert float((log_q - torch.from_numpy(law.logpdf(z.numpy()))).mean()) == pytest.approx(0.532, abs=0.01)
    x, codes = d.test, d.test_codes
    draws = model.log_prob(x, codes).detach() - lf.exact_log_likelihood(model, x)
    expected = float(lf.exact_mutual_information(model))
    assert abs(float(draws.mean()) - expected) < 4 * float(draws.std()) / len(draws) ** 0.5
    b = torch.tensor([0.006, 0.006])
    closed = 0.5 * (torch.logdet(d.truth.covariance) - (0.01 - b).double().log().sum())  # the paper's appendix C
    assert expected == pytest.approx(float(closed), rel=1e-6)


@pytest.mark.parametrize("name", ["LinearJTEx", "CubicJTEx", "Gaussian", "Mobius"])
def test_a_synthetic_sets_rows_are_its_truth_of_its_codes(name):
    d = data.load(name, seed=3)
    z = (d.test - d.truth.decode(d.test_codes.double()).float()) / d.noise_variance.sqrt()
    assert 0.9 < float(z.std()) < 1.1 and abs(float(z.mean())) < 0.15
    again, other = type(d)(seed=3, test=7), data.load(name, seed=4)
    assert torch.equal(again.test, d.test[:7]) and not torch.equal(other.test, d.test)
    assert not torch.equal(d.train, d.validation)
    model, q = d.model(), d.inference()
    assert model.decode(d.test_codes).shape == d.test.shape
    assert q(d.test).mean.shape == d.test_codes.shape
    assert torch.equal(model.likelihood.variance, d.noise_variance)
    assert [p.shape for p in model.decoder.parameters()] == [p.shape for p in d.model().decoder.parameters()]


def test_the_mobius_network_is_the_mobius_map():
    truth = data.Mobius().truth
    z = torch.randn(20_000, 2, dtype=torch.float64)
    c = torch.complex(z[:, 0], z[:, 1])
    exact = torch.view_as_real((c + (1 + 4j)) / (c + (7 + 4j)))
    assert float((truth.decode(z) - exact).square().mean().sqrt()) < 0.5 * 1e-5**0.5


def test_methods_of_every_synthetic_set_are_saved_and_loaded(tmp_path):
    for name in ("CubicJTEx", "Mobius"):
        d = getattr(data, name)(train=40, validation=20, test=20)
        fitted = lf.VAE(d.model(), d.inference()).fit(d.train, d.validation, epochs=2, progress=False)
        fitted.save(tmp_path / name)
        again = lf.load(tmp_path / name)
        assert torch.equal(again.codes(d.test), fitted.codes(d.test))
        assert torch.equal(again.sample(5, seed=0), fitted.sample(5, seed=0))
