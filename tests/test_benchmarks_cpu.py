"""The benchmarks of the CPU, at tiny sizes: what is refused, what is written, and which names there are."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

import libi_fast as lf
from benchmarks import __main__ as entry
from benchmarks import annealing, cases, chains, cpu, digits, log_mean_exp, memory, peak, plots, report, smooth_knn, workloads
from benchmarks.workloads import Form

EAGER = ["torch eager"]
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """The machine's rates take a second to measure, and are not what is tested here."""
    rates = {"multiply-add": 1e11, "exp2": 1e10, "tanh": 1e10, "sqrt": 1e10, "by": "a test"}
    monkeypatch.setattr(peak, "rates", lambda: rates)


def tiny(name: str) -> cases.Case:
    w = workloads.WORKLOADS[name]
    return cases.importance(name, w._replace(rows=6, samples=24), {"": [(2, 1), (6, 1)]}, few=True)


def with_forms(case: cases.Case, *forms: Form) -> cases.Case:
    return case._replace(forms=lambda: iter(forms))


def eager(case: cases.Case) -> Form:
    return next(f for f in case.forms() if f.name.startswith("torch eager"))


# --- what is refused ---


@pytest.mark.parametrize("name", ["W2", "W3", "W4a", "W4b"])
def test_a_wrong_peer_is_refused_and_the_others_are_timed(name, capsys):
    case = tiny(name)
    good = eager(case)
    wrong = good._replace(name="wrong, 1", check=lambda *few: tuple(1.01 * f + 0.01 for f in good.check(*few)))
    biased = good._replace(name="biased, 1", run=lambda: tuple(f + 1e4 for f in good.run()))
    nothing = good._replace(name="not a number, 1", check=lambda *few: tuple(f * float("nan") for f in good.check(*few)))

    def fails() -> None:
        raise MemoryError("too large")

    broken = good._replace(name="broken, 1", run=fails)
    found = cpu.measure_case(with_forms(case, wrong, biased, nothing, broken, good), None, 1, None)
    forms = found["forms"]
    assert "other numbers" in forms["wrong, 1"]["refused"] and forms["wrong, 1"]["error"]["value"] > 1e-4
    assert "whole run" in forms["biased, 1"]["refused"] and "refused" in forms["not a number, 1"]
    assert "too large" in forms["broken, 1"]["failed"]
    assert all("best ms" not in forms[n] for n in ("wrong, 1", "biased, 1", "not a number, 1", "broken, 1"))
    assert found["peer"] == good.name and found["ratio"] > 0 and found["ours"]["share of the bound"] > 0
    printed = capsys.readouterr().out
    assert "wrong, 1: refused" in printed and "too large" in printed


def test_ours_is_refused_when_wrong_and_nothing_is_timed():
    case = tiny("W2")
    found = cpu.measure_case(case._replace(right=lambda: {"value": 1.0, "gradients": None, "allowed": False}), None, 1, None)
    assert found["refused"] and found["forms"] == {} and "best ms" not in found["ours"]


def test_ours_may_not_be_twice_as_far_as_torch():
    case = tiny("W4b")
    torchs = case.torch_error()
    for key in ("mean value", "mean gradients"):
        far = {**torchs, key: 3 * max(torchs[key], cases.ULP), "rows": 100}
        assert not cpu.judged(case._replace(right=lambda far=far: far))["allowed"]
    judged = cpu.judged(case._replace(right=lambda: torchs))
    assert judged["allowed"] and judged["of torch in float32"]["mean value"] == torchs["mean value"]


@pytest.mark.parametrize("name", ["W1", "W2", "W6", "W7", "W9"])
def test_a_wrong_ours_means_a_non_zero_exit(name, monkeypatch, tmp_path, capsys):
    if name == "W1":
        right = log_mean_exp.lf.log_mean_exp
        monkeypatch.setattr(log_mean_exp.lf, "log_mean_exp", lambda x: right(x) + 0.1)
    elif name == "W2":
        real = workloads.ours

        def shifted(p, *rest, backend=None, **more):
            call = real(p, *rest, backend=backend, **more)
            return call if backend == "reference" else lambda: tuple(f + 0.1 for f in call())

        monkeypatch.setattr(workloads, "ours", shifted)
    elif name == "W7":
        sampler = chains.ours

        def moved(task):
            (z, *rest), *others = sampler(task)().chunks[0], "nctl"
            return lambda: chains.Drawn([(z + 0.1 * task.scale[:, None, None], *rest)], *others)

        monkeypatch.setattr(chains, "ours", moved)
    elif name == "W9":
        annealed = annealing.ours
        monkeypatch.setattr(annealing, "ours", lambda task: lambda: annealed(task)()._replace(log_weight=torch.zeros(8, 4)))
    else:
        statistic = smooth_knn.lf.smooth_knn
        off = {None: 0.1, "reference": 0.0}
        monkeypatch.setattr(
            smooth_knn.lf, "smooth_knn", lambda *a, backend=None, **k: statistic(*a, backend=backend, **k) + off[backend]
        )
    assert entry.main([name, "--quick", "--peers", "torch eager", "--out", str(tmp_path)]) == 1
    measured = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    assert all(m["refused"] and "best ms" not in m["ours"] for m in measured.values())
    assert "no speed is quoted" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


# --- peers ---


def test_less_than_a_row_at_a_time():
    case = cases.importance("W3", workloads.WORKLOADS["W3"]._replace(rows=4, samples=24), {"": [(1, 3), (2, 1)]}, few=True)
    names = []
    for form in case.forms():
        if form.name.startswith("torch eager"):
            names.append(form.name)
            assert case.error(form.check(*case.few))["allowed"] and form.run()[0].shape == (4,)
    assert names == ["torch eager, 1 rows, 1/3 of the samples", "torch eager, 2 rows"]


def test_unrolled_by_hidden_unit():
    p = workloads.Problem.of(workloads.WORKLOADS["W2"]._replace(rows=5, samples=12, variance=0.1), "cpu")
    for likelihood in ("gaussian", "bernoulli"):
        arguments = (p.pairs, p.x, p.mean, p.log_std, workloads.noise_of(p), likelihood, 0.1)
        torch.testing.assert_close(workloads.unrolled(*arguments), workloads.log_likelihood(*arguments), rtol=1e-5, atol=1e-5)


@needs_jax
@pytest.mark.parametrize(("name", "kind"), [("W2", "JAX by coordinate"), ("W4a", "JAX natural")])
def test_every_variant_of_jax(name, kind):
    from benchmarks.jax_forms import Variant, forms

    case = tiny(name)
    p = workloads.Problem.of(workloads.WORKLOADS[name]._replace(rows=6, samples=24), "cpu")
    variants = (Variant(), Variant("rbg", True), Variant("unsafe_rbg", False, True), Variant("threefry2x32", True, True))
    found = [f for f in forms(p, "ieee", [48], variants) if f.name.startswith(kind)]
    assert [f.name for f in found] == [
        f"{kind}, 2 rows", f"{kind}, 2 rows, rbg, latents first", f"{kind}, 2 rows, unsafe_rbg, Python loop",
        f"{kind}, 2 rows, latents first, Python loop",
    ]  # fmt: skip
    shapes = [t.shape for t in workloads.ours(p)()]
    for form in found:
        assert case.error(form.check(*case.few))["allowed"]
        whole = form.run()
        assert [tuple(t.shape) for t in whole] == [tuple(s) for s in shapes] and case.whole(whole)["allowed"]


@pytest.mark.parametrize("k", smooth_knn.KS)
def test_peers_of_smooth_knn(k):
    (case,) = (c for c in smooth_knn.cases(20) if c.name == f"W6, k = {k}")
    seen = set()
    for form in case.forms():
        kind = cpu.kind_of(form.name)
        if kind not in seen and kind != "torch.compile":
            assert case.error(form.check(*(t[:20] for t in case.few)))["allowed"], form.name
            seen.add(kind)
    assert {"torch eager"} <= seen if k == 1 else {"torch eager log-domain", "torch eager linear-domain"} <= seen
    assert ("JAX" in seen) == (importlib.util.find_spec("jax") is not None)


def test_smooth_knn_in_pieces(monkeypatch):
    """The peer for a GPU, without the compiler; the last piece is shorter."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    a, b = torch.randn(2, 3, 12, 2)
    found = smooth_knn.statistic_of(a, b, 5, smooth_knn.in_pieces())
    expected = smooth_knn.lf.smooth_knn(a.double(), b.double(), k=5, backend="reference")
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=smooth_knn.TOLERANCE)


def few_chains() -> chains.Task:
    """A decoder so small that it compiles at once."""
    workload = workloads.WORKLOADS["W2"]._replace(widths=(2, 5, 2), variance=0.1, rows=4)
    p = workloads.Problem.of(workload, "cpu")
    z = p.mean[:, None] + 0.2 * torch.randn(4, 16, 2, generator=torch.Generator().manual_seed(0))
    return chains.Task(p.pairs, 0.1, p.x, z, torch.full((4,), 0.4), torch.full((4, 2), 0.3), 30)


def kinds_of_chains() -> list[str]:
    names = [*chains.KINDS]
    if importlib.util.find_spec("jax") is not None:
        from benchmarks import chains_jax

        names += [f"{kind}, {detail}".removesuffix(", ") for kind, detail in chains_jax.SWEPT if chains_jax.available(kind)]
    return names


@pytest.mark.parametrize("name", kinds_of_chains())
def test_peers_of_chains(name, monkeypatch):
    """From their own noise or ours the reference's states, and a run that agrees with ours, in every layout."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)
    task = few_chains()
    case = chains.case(task)
    if name in chains.KINDS:
        monkeypatch.setattr(chains, "KINDS", {name: chains.KINDS[name]})
        monkeypatch.setattr(chains, "TORCH_ROWS", {"": (2, 4)})
        forms = [f for f in chains.forms(task, False) if f.name.startswith("torch")]
    else:
        from benchmarks import chains_jax
        from benchmarks.chains_jax import Variant

        kind, _, detail = name.partition(", ")
        swept = {(kind, detail): [Variant(2), Variant(4, True, "unsafe_rbg")]}
        forms = list(chains_jax.forms(task, swept))
    assert len(forms) == 2 and all(f.name.startswith(name) for f in forms)
    for form in forms:
        found = form.check(*case.few)
        judged = case.error(found)
        assert judged["allowed"] and judged["followed to the end"] > 0.7, judged
        z, log_density, acceptance = found.standard()
        assert not case.error(chains.Drawn([(1.02 * z, log_density, acceptance)], "nctl", found.noise))["allowed"]
        drawn = form.run()
        assert [t.shape for t in drawn.standard()] == [(4, 16, 30, 2), (4, 16, 30), (4, 16)]
        assert case.whole(drawn)["allowed"]


def test_whole_runs_of_chains_that_are_refused():
    """Whether or not the chains have converged: here they have not, and fresh noise agrees all the same."""
    task = few_chains()
    case = chains.case(task)
    fresh = chains.Sampler("torch eager")
    torch.manual_seed(1)
    for step, agrees in ((1.0, True), (2.0, False)):  # other steps have the same law at last, but another acceptance
        changed = task._replace(step=step * task.step)
        drawn = chains.Drawn([fresh(changed, fresh.drawing(changed))], fresh.axes)
        assert case.whole(drawn)["allowed"] == agrees
    z, log_density, acceptance = case.ours().standard()
    off = torch.randn(z.shape[:2], generator=torch.Generator().manual_seed(0))[..., None, None] * 1e-3
    assert case.whole(chains.Drawn([(z + off, log_density, acceptance)], "nctl"))["allowed"]
    assert not case.whole(chains.Drawn([(z + off + 0.01, log_density, acceptance)], "nctl"))["allowed"]


def test_effective_samples_are_of_converged_rows(capsys):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 64, 100, 2, generator=generator)
    z[1, :32] += 3.0  # half of the chains elsewhere
    drawn = chains.Drawn([(z, z[..., 0], z[:, :, 0, 0])], "nctl")
    found = chains.effective(few_chains(), {"libi_fast": lambda: drawn}, {"libi_fast": 500.0})["libi_fast"]
    assert found["rows that converged"] == 2 and found["r-hat"] < 1.01 < 1.5 < found["r-hat of all rows"]
    assert 0.8 < found["effective samples a second"] / (2 * 6400 / 0.5) < 1.2
    assert found["leapfrogs a second"] == 4 * 16 * 30 * 8 / 0.5
    assert "2 of 4 rows" in capsys.readouterr().out


def test_peers_that_are_not_installed_are_listed(monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("jax", "numpyro", "rich") else found(name, *rest)
    )
    assert set(cpu.absent("W7", None)) >= {"JAX", "NumPyro"} and not cpu.absent("W7", ["torch eager"])
    assert entry.main(["W1", "--quick", "--peers", "torch eager", "JAX", "--out", str(tmp_path)]) == 0
    (measured,) = json.loads((tmp_path / "W1.json").read_text())["results"].values()
    assert "libi-fast[bench]" in measured["absent"]["JAX"] and all(n.startswith("torch eager") for n in measured["forms"])
    printed = capsys.readouterr().out
    assert "absent: JAX" in printed and "fastest peer" in printed, "a plain table without rich"


def test_a_part_is_scaled_to_the_whole():
    case = tiny("W3")
    form = eager(case)
    found = cpu.measure_case(with_forms(case, form._replace(share=0.01)), None, 3, None)
    whole = cpu.measure_case(with_forms(case, form), None, 3, None)
    assert found["forms"][form.name]["best ms"] > 20 * whole["forms"][form.name]["best ms"]


# --- names, tables, files ---


def test_aliases_and_what_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = ["log_mean_exp", "W1", "W3", "W4b"]
    other = tmp_path / "cpu-other.png"
    other.write_bytes(b"another machine's")
    assert entry.main([*names, "--quick", "--peers", *EAGER, "--out", str(tmp_path)]) == 0
    (picture,) = set(tmp_path.glob("cpu-*.png")) - {other}
    assert other.read_bytes() == b"another machine's"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["W1.json", "W3.json", "W4b.json", picture.name, other.name])
    content = json.loads((tmp_path / "W3.json").read_text())
    assert {"date", "processor", "threads", "torch", "jax"} <= set(content["machine"])
    measured = content["results"]["W3"]
    assert measured["peer"].startswith("torch eager") and measured["forms"][measured["peer"]]["median ms"] > 0
    assert measured["bound"]["seconds"] > 0 and measured["ours"]["error"]["of torch in float32"]["mean value"] > 0
    assert picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "ours is faster by" in printed and "fastest peer" in printed and printed.count("-> ") == 4


def test_chains_are_measured(tmp_path, capsys):
    assert entry.main(["chains", "--quick", "--peers", *EAGER, "--out", str(tmp_path)]) == 0
    measured = json.loads((tmp_path / "W7.json").read_text())["results"]["W7"]
    for entry_of in (measured["ours"], measured["forms"][measured["peer"]]):
        assert entry_of["leapfrogs a second"] > 0 and entry_of["r-hat of all rows"] > 1
        assert entry_of["rows that converged"] >= entry_of["rows that converged in every run"]
    assert "rows that converged in every run" in capsys.readouterr().out


def test_annealing_is_measured(tmp_path):
    assert entry.main(["annealing", "--quick", "--peers", *EAGER, "--out", str(tmp_path)]) == 0
    measured = json.loads((tmp_path / "W9.json").read_text())["results"]["W9"]
    assert measured["ratio"] > 0 and measured["ours"]["error"]["followed to the end"] > 0.5
    assert measured["forms"][measured["peer"]]["whole run"]["allowed"]


def test_forms_that_are_slow_and_far_from_the_fastest_are_not_timed_in_turns():
    times = {"JAX": 500.0, "JAX, other": 600.0, "torch": 3000.0, "torch, short": 1200.0, "torch, scaled": 3000.0}
    forms = [workloads.Form(name, "ieee", list, list, 0.1 if "scaled" in name else 1.0) for name in times]
    entries = {name: {"best ms": ms} for name, ms in times.items()}
    chosen = {f.name for f in cpu.finalists(forms, entries, rounds=15)}
    assert chosen == set(times) - {"torch"}
    assert {f.name for f in cpu.finalists(forms, entries, rounds=3)} == set(times)
    assert cpu.finalists([], {}, rounds=15) == []


def test_estimates_side_by_side_are_in_the_units_of_the_data(monkeypatch):
    monkeypatch.setattr(digits, "SAMPLES", (2000,))
    monkeypatch.setattr(digits, "ANNEALED", {"chains": 16, "temperatures": 100})
    monkeypatch.setattr(digits, "SIMULATED", 10)
    data = lf.data.LinearJTEx(seed=1, train=100, validation=50, test=20)
    torch.manual_seed(0)
    model = lf.LatentVariableModel(torch.nn.Linear(2, 2), lf.Gaussian(0.3, learned=True), 2)
    fitted = lf.VAE(model, lf.MeanFieldGaussian(torch.nn.Linear(2, 4)))
    fitted.fit(100 * data.train, 100 * data.validation, epochs=300, standardize=True, progress=False)
    inward = fitted.standardizer.transform(100 * data.test).float()
    exact = (lf.exact_log_likelihood(model, inward) - fitted.standardizer.log_abs_det).mean().item()
    found = digits.estimates(fitted, 100 * data.test)
    bounds = found.pop("bounds on simulated rows")
    assert [name.split(",")[0] for name in found] == ["importance sampling", "Pareto-smoothed", "annealed"]
    for estimate in found.values():
        assert abs(estimate[digits.LIKELIHOOD] - exact) < 0.1 and 0 < estimate[digits.VOUCHED] <= 1
    assert abs(bounds["upper minus lower"]) < 0.3


def test_other_names(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        entry.main(["W2", "W10", "--out", str(tmp_path)])
    assert "unknown: W10" in capsys.readouterr().err
    assert [cpu.ALIASES[n] for n in ("log_mean_exp", "smooth_knn", "chains", "training")] == ["W1", "W6", "W7", "W8"]
    monkeypatch.setitem(entry.OTHERS, "digits", lambda: {"figure": 1})
    assert entry.main(["digits", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "digits.json").read_text())["results"] == {"figure": 1}


def test_all_speeds_by_default(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(cpu, "measure", lambda name, *rest: asked.append(name) or {})
    assert entry.main(["--out", str(tmp_path)]) == 0
    assert asked == ["W1", "W2", "W3", "W4a", "W4b", "W5", "W6", "W7", "W8", "W9"]


def test_sweep(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert entry.main(["--sweep", "--quick", "--peers", *EAGER, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "sweep.json").read_text())["results"]
    assert [p["value"] for p in found["W2"]["S"]] == [50, 100] and found["W3"]["N"][0]["ratio"] > 0
    assert (tmp_path / "sweep.png").stat().st_size > 10_000 and "one factor at a time" in capsys.readouterr().out


def test_only_this_machines_results_are_drawn(tmp_path):
    machine = {"processor": "one", "date": "2026-01-01"}
    report.write("W1", {"W1": {}}, tmp_path)
    assert plots.measured_on(tmp_path, cpu.NAMES, machine) == ({}, set())
    found, dates = plots.measured_on(tmp_path, cpu.NAMES, report.machine() | {"date": "2020-01-01"})
    assert found == {"W1": {}} and dates == {report.machine()["date"]}


def test_chunks_of_a_sweep():
    w = workloads.WORKLOADS["W3"]._replace(rows=20, samples=5000)
    assert [cpu.chunks_of(n, w) for n in (500, 1000, 5000, 12_000)] == [(1, 10), (1, 5), (1, 1), (2, 1)]


@pytest.mark.skipif(not memory.known(), reason="the system does not say")
def test_memory_of_a_call():
    assert 3.5e7 < memory.peak_of(lambda: torch.ones(10**7).sum(), False) < 8e7
    assert memory.peak_of(lambda: torch.ones(10), True) < 1e7
