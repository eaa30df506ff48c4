"""``libi-fast reproduce``: closed forms, references, published numbers in their cells, resuming, a self-contained report."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import libi_fast as lf
from libi_fast import figures, reproduce
from libi_fast.cli import REPRODUCED, main
from libi_fast.data.synthetic import GaussianTruth
from libi_fast.errors import InputError
from libi_fast.reproduce import closed_forms, measure, pictures, pieces, published, references, report, tables
from libi_fast.reproduce.protocol import METHODS, PROTOCOLS, find

SMOKE = PROTOCOLS["smoke"]
TINY = dataclasses.replace(SMOKE, datasets=("LinearJTEx",))


def small(folder, *methods):
    """A folder of the tiny protocol with these methods done."""
    made = pieces.Folder(folder, TINY)
    assert pieces.run(made, [TINY.piece("LinearJTEx", m) for m in methods], progress=False, say=lambda text: None)
    return made


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return small(tmp_path_factory.mktemp("run"), "VAE", "beta-VAE", "LiBI")


# --- closed forms ---


def test_the_worked_example_is_the_papers():
    found = closed_forms.worked_example()
    assert found["objective at the truth"] == pytest.approx(published.OBJECTIVE_AT_TRUTH, abs=5e-4)
    assert found["objective at the optimum"] == pytest.approx(published.OBJECTIVE_AT_OPTIMUM, abs=5e-4)
    assert found["log-likelihood of the optimum"] == pytest.approx(-3.133, abs=5e-4)


def test_a_converged_vae_on_linear_jtex_is_as_wrong_whatever_beta():
    """The log-likelihood on endless data at the objective's optimum, and the paper's smooth k-NN of it."""
    data, optimum = lf.data.LinearJTEx(100), closed_forms.worked_example()["log-likelihood of the optimum"]
    betas = (0.5, 1.0, 2.0, 5.0)
    grid = lf.fit_grid(
        [lf.VAE(data.model(), data.inference(), beta=beta) for beta in betas], [data], epochs=8000, restarts=3, progress=False
    )
    for (vae,) in grid:
        reached = data.truth.expected_log_likelihood(*lf.linear_gaussian_marginal(vae.model))
        assert reached == pytest.approx(optimum, abs=0.02)
        assert 1.5 < measure.smooth_knn_statistic(data.truth.sample, vae.sample, 500, 2) < 1.8


def test_figure_1_is_of_models_with_one_law_of_x():
    grids = closed_forms.grids(points=4)
    assert grids["gap"].shape == grids["information"].shape == (4, 4)
    a = closed_forms.true_a()
    laws = [lf.linear_gaussian_marginal(closed_forms.bivariate(a, (b1, 0.006)))[1] for b1 in grids["b"].tolist()]
    for law in laws:
        torch.testing.assert_close(law, lf.data.LinearJTEx().truth.covariance)
    assert (grids["information"][1:] > grids["information"][:-1]).all()  # less noise in x1


def test_the_information_of_the_univariate_example_has_no_constant():
    theta = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    for t, value in zip(theta, closed_forms.univariate_information(theta, 1.0), strict=True):
        linear = torch.nn.Linear(1, 1, bias=False).double()
        torch.nn.init.constant_(linear.weight, float(t))
        model = lf.LatentVariableModel(linear, lf.Gaussian(1 - float(t) ** 2), 1)
        assert float(value) == pytest.approx(float(lf.exact_mutual_information(model)), abs=1e-6)


# --- references ---


def test_the_likelihood_of_cubic_models_is_that_by_quadrature():
    data = lf.data.CubicJTEx(3, test=6)
    model = data.truth.model
    found = references.cubic_log_likelihood(data.test.double(), data.truth.noise_variance, model.decoder[0].weight)
    torch.testing.assert_close(found, lf.quadrature_log_likelihood(model, data.test.double()), rtol=0, atol=1e-8)
    assert references.nearly_exact(model, data.test) == pytest.approx(float(found.mean()), abs=1e-8)


@pytest.mark.parametrize("name", ["LinearJTEx", "Gaussian", "CubicJTEx", "Mobius"])
def test_maximum_likelihood_is_a_maximum_of_the_training_rows(name):
    data = lf.data.load(name, seed=4)
    model = references.maximum_likelihood(data)
    at_best = references.nearly_exact(model, data.train)
    if isinstance(data.truth, GaussianTruth):
        assert at_best > float(data.truth.log_likelihood(data.train.double()).mean())
    else:
        assert at_best > references.nearly_exact(data.truth.model, data.train)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 if name == "Mobius" else 6):  # whose likelihoods take a second each
        moved = references.in_double(model)
        for parameter in moved.parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += 1e-3 * step * parameter.abs().clamp_min(0.1)
        assert references.nearly_exact(moved, data.train) < at_best


def test_the_network_of_mobius_stands_for_the_map():
    z, truth = torch.randn(1000, 2, dtype=torch.float64), lf.data.Mobius(0, 10, 10, 10).truth
    x = torch.view_as_real((torch.view_as_complex(z) + (1 + 4j)) / (torch.view_as_complex(z) + (7 + 4j)))
    torch.testing.assert_close(references.MobiusMap()(z).detach(), x)
    assert (truth.decode(z) - x).square().mean().sqrt() < 0.2 * truth.noise_variance[0].sqrt()


# --- published numbers ---


@pytest.mark.parametrize(
    ("method", "dataset", "likelihood", "neighbours"),
    [
        ("VAE", "LinearJTEx", (-3.15, 0.04), (1.62, 0.12)),
        ("lagging", "CubicJTEx", (-30.64, 39.17), (7.07, 1.24)),
        ("LiBI", "Gaussian", (7.85, 0.05), (0.10, 0.08)),
        ("beta-VAE", "Mobius", (1.92, 0.06), (0.27, 0.14)),
    ],
)
def test_published_numbers_land_in_their_cells(method, dataset, likelihood, neighbours):
    printed = published.TABLE1[method, dataset]
    assert printed[published.LOG_LIKELIHOOD] == likelihood and printed[published.SMOOTH_KNN] == neighbours
    assert len(published.TABLE1) == len(published.METHODS) * len(published.DATASETS)


def test_other_seeds_are_other_data_sets():
    chosen = find("quick", 105)
    assert chosen.seeds == (105, 106, 107, 108, 109) and find("quick").seeds == (100, 101, 102, 103, 104)
    assert not torch.equal(chosen.data("LinearJTEx")[0].train, find("quick").data("LinearJTEx")[0].train)


def test_the_paper_protocol_has_the_papers_grid():
    sizes = {(p.dataset, p.method): len(p.grid) for p in PROTOCOLS["paper"].pieces()}
    assert sizes["Gaussian", "LiBI"] == 4 * 2 * 2 * 2 and sizes["Mobius", "LiBI"] == 3 * 2 * 2 * 2
    assert [sizes["LinearJTEx", m] for m in METHODS[:4]] == [1, 3, 4, 4]
    for protocol in PROTOCOLS.values():
        for piece in (*protocol.pieces(), *protocol.ablations("LinearJTEx")):
            piece.methods(SMOKE.data(piece.dataset)[0])  # every setting is one that its method knows


# --- pieces ---


def test_a_piece_holds_what_the_table_shows(done):
    results = report.collect(done)["LinearJTEx"]
    table = tables.table1("LinearJTEx", results)
    assert [row[0] for row in table.rows] == [
        *(published.LABELS[m] for m in ("VAE", "beta-VAE", "LiBI")), "ground truth", "maximum likelihood"
    ]  # fmt: skip
    assert all(len(row) == len(table.header) for row in table.rows)
    assert table.rows[0][1:3] == ["-3.15±0.04", "1.62±0.12"]
    one = results["LiBI"]["selections"][pieces.OWN]["sets"][0]
    truth = results[pieces.TRUTH]["sets"][0]
    assert one["minus truth"] == pytest.approx(one["exact"] - truth["log-likelihood"])
    assert one["minus maximum likelihood"] == pytest.approx(one["exact"] - truth["log-likelihood of maximum likelihood"])


def test_a_mean_is_shown_as_precisely_as_it_is_known():
    shown = {(-0.0061, 0.0187): "-0.006±0.019", (-50.49, 46.72): "-50±47", (1.8891, 0.0362): "1.889±0.036",
             (0.00004, 0.00002): "0.0000±0.0000", (7.5, 0.0): "7.500", (7.5, float("nan")): "7.500"}  # fmt: skip
    for (mean, error), text in shown.items():
        assert str(tables.Mean(mean, 1.0, error)) == text


def test_the_table_has_the_rows_that_are_wanted(done):
    assert set(report.collect(done)["LinearJTEx"]) == {"VAE", "beta-VAE", "LiBI", pieces.TRUTH}
    assert set(report.collect(done, ["VAE", "ours"])["LinearJTEx"]) == {"VAE", pieces.TRUTH}  # ours is not done


def test_restarts_are_chosen_by_either_rule(done):
    piece = TINY.piece("LinearJTEx", "beta-VAE")
    found = pieces.read_result(done, piece)
    exact = found["validation"]["exact"]  # [setting][draw][restart]
    best = [sum(max(restarts) for restarts in row) for row in exact]
    chosen = found["selections"][pieces.LIKELIHOOD]
    assert chosen["setting"] == best.index(max(best))
    assert chosen["restarts"] == [r.index(max(r)) for r in exact[chosen["setting"]]]
    assert found["selections"][pieces.OWN]["restarts"] == [0, 0]
    sampled = [sum(row) for row in found["validation"]["importance-sampled"]]
    assert found["selections"][pieces.OWN]["setting"] == sampled.index(max(sampled))


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    folder = small(tmp_path, "VAE")
    before = {p.name: p.read_bytes() for p in folder.path.iterdir()}
    piece = TINY.piece("LinearJTEx", "VAE")

    def never(*ignored, **also):
        raise AssertionError("trained again")

    monkeypatch.setattr(pieces, "fit_grid", never)
    assert pieces.run(folder, [piece], progress=False)
    assert {p.name: p.read_bytes() for p in folder.path.iterdir()} == before
    folder.file(piece.name, "json").unlink()  # cut off between training and the end of measuring
    again = pieces.result_of(folder, piece)
    assert again["selections"] == json.loads(before[f"{piece.name}.json"])["selections"]
    assert not list(folder.path.glob("*.part")) and not list(folder.path.glob("*.checkpoint"))


def test_measuring_goes_on_from_the_settings_that_are_done(tmp_path, monkeypatch):
    """Of the paper's grids it takes longer than a command may have."""
    folder = small(tmp_path, "beta-VAE")
    piece = TINY.piece("LinearJTEx", "beta-VAE")
    before = json.loads(folder.file(piece.name, "json").read_text())
    folder.file(piece.name, "json").unlink()
    measured, real = [], references.nearly_exact
    monkeypatch.setattr(references, "nearly_exact", lambda model, x: (measured.append(1), real(model, x))[1])
    restarts = len(TINY.seeds) * piece.training["restarts"]
    assert pieces._result(folder, piece, False, late=lambda: True) is None
    assert len(measured) == restarts and pieces.read_result(folder, piece) is None
    again = pieces._result(folder, piece, False, late=lambda: True)  # the last setting's
    assert len(measured) == 2 * restarts
    assert again["selections"] == before["selections"] and again["validation"] == before["validation"]
    assert not list(folder.path.glob("*.validation.*"))


def test_training_curves_colour_the_network_that_was_kept():
    choice = {"restart": 1, "objective": [0.0, -1.0]}
    networks = [3.0, 1.0, 2.0, None, 5.0, 4.0]  # three of each restart; one became non-finite
    assert figures._chosen("step 2", 6, choice, networks) == 5
    assert figures._chosen("step 1", 2, choice, networks) == 1
    assert figures._chosen("candidates", 6, choice, networks) == -1


def test_a_draw_on_which_no_restart_stayed_finite_is_said_to_be_one(tmp_path, monkeypatch):
    folder = small(tmp_path, "VAE")
    piece = TINY.piece("LinearJTEx", "VAE")
    states = pieces.trained(folder, piece, progress=False)
    states[0][1] = []
    monkeypatch.setattr(pieces, "trained", lambda *ignored: states)
    folder.file(piece.name, "json").unlink()
    found = pieces.result_of(folder, piece)
    for selection in pieces.SELECTIONS:
        first, second = found["selections"][selection]["sets"]
        assert first is not None and second is None
    results = report.collect(folder)["LinearJTEx"]
    row = tables.table1("LinearJTEx", results).rows[0]
    assert row[0] == "VAE (ended on 1 of 2)" and row[4] == tables.number(first["exact"])
    assert tables.codes("LinearJTEx", results).rows[0][0] == row[0]


def test_out_of_time_no_piece_is_begun(tmp_path, capsys):
    assert reproduce.run("table1", "smoke", tmp_path, seconds=-1.0, progress=False) is None
    assert "0 of 12 pieces are done" in capsys.readouterr().out
    assert reproduce.run("table1", "smoke", tmp_path, seconds=-1.0, progress=False, methods=["ours"]) is None
    assert "0 of 2 pieces are done" in capsys.readouterr().out
    options = {"methods": ["ours"], "datasets": ["CubicJTEx"]}
    assert reproduce.run("table1", "smoke", tmp_path, seconds=-1.0, progress=False, **options) is None
    assert "0 of 1 pieces are done" in capsys.readouterr().out
    assert not (tmp_path / "smoke").exists()


def test_every_piece_is_one_processs():
    every = PROTOCOLS["paper"].pieces()
    for processes in (1, 3, 50):
        parts = pieces.shares(every, processes)
        assert len(parts) == processes
        assert sorted(p.name for part in parts for p in part) == sorted(p.name for p in every)


# --- the command ---


def refused(capsys, arguments, *expected):
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("libi-fast: error: ") and captured.err.count("\n") == 1
    for text in expected:
        assert text in captured.err


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "smoke").mkdir()
    file = tmp_path / "smoke" / "LinearJTEx.VAE.json"
    command = ["reproduce", "figure2", "--protocol", "smoke", "--out", tmp_path, "--quiet"]
    file.write_text("{")
    refused(capsys, command, str(file), "damaged")
    file.write_text(json.dumps({"identity": {"dataset": "LinearJTEx"}}))
    refused(capsys, command, str(file), "other settings")
    refused(capsys, [*command, "--device", "nowhere"], "device 'nowhere'")
    file.write_text(json.dumps({"identity": pieces.identity_of(SMOKE, SMOKE.piece("LinearJTEx", "VAE"), "LinearJTEx")}))
    refused(capsys, [*command, "--first-seed", "7"], "other settings")
    for wrong in ([*command, "--methods", "VAE"], ["reproduce", "table1", "--methods", "VAE", "GAN"]):
        refused(capsys, wrong, "methods are of table1, a list from VAE, beta-VAE")
    for wrong in ([*command, "--datasets", "LinearJTEx"], ["reproduce", "ablations", "--datasets", "MNIST"]):
        refused(capsys, wrong, "datasets are of table1 and ablations, a list from LinearJTEx")
    with pytest.raises(InputError, match="the first seed must be at least 0, got -1"):
        reproduce.run("all", "smoke", tmp_path, first_seed=-1)
    with pytest.raises(InputError, match="unknown protocol 'long'; known: quick, paper, smoke"):
        reproduce.run("all", "long", tmp_path)
    with pytest.raises(InputError, match="unknown result 'table2'; known: table1, figure1"):
        reproduce.run("table2", "smoke", tmp_path)
    assert (reproduce.TABLE1, *reproduce.FIGURES, reproduce.ABLATIONS, reproduce.ALL) == REPRODUCED


def test_the_report_needs_nothing_beside_it(done, monkeypatch):
    def plain(folder):
        return figures.training_curves([])

    monkeypatch.setattr(pictures, "DRAWN", dict.fromkeys(pictures.DRAWN, plain))
    path = report.write(done, report.collect(done))
    page = path.read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 5 and all(s.startswith("data:image/png;base64,") for s in sources)
    for outside in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert outside not in page
    assert page.count("<table>") == page.count("</table>") == 4  # Table 1 by two rules, codes, settings
    for text in ("0.532", "0.196", "-3.15&nbsp;±&nbsp;0.04", "LiBI, published", "setting chosen", "seeds 0 to 1"):
        assert text in page


def test_contours_hold_the_share_of_points_that_they_say():
    points = torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    line = torch.linspace(-5, 5, 101, dtype=torch.float64)
    heights, levels = pictures.density(points, line, line)
    cell = float(line[1] - line[0]) ** 2
    mass = heights / (heights.sum() * cell)
    inside = [float(mass[heights >= level].sum()) * cell for level in levels]
    assert inside == sorted(inside, reverse=True)
    assert inside[0] == pytest.approx(0.95, abs=0.05) and inside[-1] == pytest.approx(0.25, abs=0.08)


@pytest.mark.slow
def test_two_processes_share_the_pieces(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "libi_fast.cli",
        "reproduce", "table1", "--protocol", "smoke", "--out", str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr[-2000:]
    results = json.loads((tmp_path / "smoke" / "table1.json").read_text())["results"]
    assert {m for d in SMOKE.datasets for m in results[d]} == {*METHODS, pieces.TRUTH}
    assert found.stdout.count("of 6): ") == 12 or found.stdout.count("): ") == 12  # each piece once
    assert found.stdout.count("Table 1") <= 1 and found.stdout.count("ground truth") == 2
