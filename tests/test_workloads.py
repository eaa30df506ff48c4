"""The workloads' peers return our numbers, and the runner keeps what it measured: on the CPU, at tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import gpu, workloads
from benchmarks.gpu import Step
from benchmarks.workloads import WORKLOADS, Problem

NAMES = ["W2", "W3", "W4a", "W4b"]


def tiny(name: str) -> Problem:
    w = WORKLOADS[name]
    return Problem.of(w._replace(rows=5, samples=12, variance=w.variance and 0.1), "cpu")


def solved(p: Problem) -> tuple[torch.Tensor, ...]:
    return workloads.ours(p.double(), backend="reference")()


@pytest.mark.parametrize("name", NAMES)
def test_torch_peers_return_our_numbers(name):
    p = tiny(name)
    noise, truth = workloads.noise_of(p), solved(p)
    for form in workloads.torch_forms(p, "ieee", "torch eager", [24, 10**6]):
        found = form.check(p, noise)
        assert len(found) == len(truth) == (7 + 2 * (len(p.pairs) - 2) if p.workload.backward else 1)
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=float(3e-5 * b.abs().max()))
        assert workloads.error(found, truth, p, "ieee")["allowed"]
        assert form.run()[0].shape == (5,)


@pytest.mark.parametrize("kind", ["torch.compile", "torch.compile by coordinate"])
@pytest.mark.parametrize("name", ["W2", "W4a"])
def test_compiled_peers_come_with_noise_inside(name, kind, monkeypatch):
    """Without the compiler: what is compiled returns our numbers, and draws its own when it runs."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    p = tiny(name)
    noise, truth = workloads.noise_of(p), solved(p)
    forms = list(workloads.torch_forms(p, "ieee", kind, [24, 10**6]))
    names = [f"{kind}, {rows} rows{where}" for where in ("", ", noise inside") for rows in (1, 5)]
    assert [f.name for f in forms] == names
    for form in forms:
        assert workloads.error(form.check(p, noise), truth, p, "ieee")["allowed"]
        first, second = form.run()[0], form.run()[0]
        assert first.shape == (5,) and bool((first != second).all())
    (only,) = workloads.torch_forms(p, "ieee", "torch.compile unrolled", [24])
    assert only.name == "torch.compile unrolled, 1 rows"


def test_by_coordinate():
    p = tiny("W2")
    w = p.workload
    arguments = (p.pairs, p.x, p.mean, p.log_std, workloads.noise_of(p), w.likelihood, w.variance)
    torch.testing.assert_close(workloads.by_lanes(*arguments), workloads.log_likelihood(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_jax_peers_return_our_numbers(name):
    from benchmarks import jax_forms

    p = tiny(name)
    noise, truth = workloads.noise_of(p), solved(p)
    forms = list(jax_forms.forms(p, "ieee", [24]))
    assert len(forms) == (2 if p.workload.narrow else 1)
    for form in forms:
        for a, b in zip(form.check(p, noise), truth, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=float(3e-5 * b.abs().max()))
        assert form.run()[0].shape == (5,)


def test_a_chunk_divides_the_rows():
    w = WORKLOADS["W2"]
    assert [workloads.rows_of(lines, w) for lines in (1, 2**20, 2**40)] == [1, 200, w.rows]


def test_a_wrong_answer_is_not_allowed():
    p = tiny("W4a")
    truth = solved(p)
    wrong = tuple(t * 1.2 for t in truth)
    assert workloads.error(truth, truth, p, "ieee")["allowed"]
    assert not workloads.error((wrong[0], *truth[1:]), truth, p, "ieee")["allowed"]
    assert not workloads.error((truth[0], *wrong[1:]), truth, p, "ieee")["allowed"]
    assert not workloads.error((truth[0] * float("nan"), *truth[1:]), truth, p, "ieee")["allowed"]
    value = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert workloads.agree(value, value, "ieee")["allowed"] and not workloads.agree(value + 1, value, "ieee")["allowed"]


# --- the runner ---


def step(name: str, code: str, limit: float = 60, **more) -> Step:
    return Step(name, ("{python}", "-c", code, "{out}"), limit, **more)


FINE = "import json, sys; json.dump({'summary': [], 'figure': 1}, open(sys.argv[1], 'w'))"
SLOW = FINE + "; import time; time.sleep(60)"


def result(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_complete_steps_are_kept_until_sources_change(tmp_path, monkeypatch):
    steps = [step("one", FINE), step("two", FINE)]
    assert gpu.run_all(steps, tmp_path, 300, False, False) == 0
    assert result(tmp_path, "one")["status"] == "complete" and result(tmp_path, "two")["figure"] == 1
    broken = [step("one", "raise SystemExit(1)"), *steps[1:]]
    assert gpu.run_all(broken, tmp_path, 300, False, False) == 0, "nothing runs again"
    assert gpu.run_all(broken, tmp_path, 300, True, False) == 1, "a trial's result is not the real one"
    assert gpu.run_all(steps, tmp_path, 300, False, True) == 0
    monkeypatch.setattr(gpu, "digest", lambda: "other")
    assert gpu.run_all(broken, tmp_path, 300, False, False) == 1


def test_a_step_that_is_cut_off_keeps_what_it_measured(tmp_path):
    code = gpu.run_all([step("one", SLOW, limit=2), step("two", FINE)], tmp_path, 300, False, False)
    assert code == 1 and result(tmp_path, "one")["status"] == "cut off" and result(tmp_path, "one")["figure"] == 1
    assert result(tmp_path, "two")["status"] == "complete", "the others go on"


def test_time_that_runs_out_is_not_a_failure(tmp_path):
    assert gpu.run_all([step("one", FINE), step("two", SLOW, limit=600)], tmp_path, 1, False, False) == 2
    assert not (tmp_path / "two.json").exists()


def test_failures_count_where_they_should(tmp_path):
    bad = "print('why'); raise SystemExit(4)"
    assert gpu.run_all([step("one", bad, counts=False)], tmp_path, 300, False, False) == 0
    assert result(tmp_path, "one")["exit code"] == 4 and "why" in result(tmp_path, "one")["output"]
    assert gpu.run_all([step("install", bad), step("two", FINE)], tmp_path, 300, False, False) == 1
    assert not (tmp_path / "two.json").exists(), "nothing is measured without an installation"


def test_the_table(tmp_path):
    row = {"precision": "ieee", "median ms": 5.0, "peer": "torch eager", "ratio": 4.0, "share of bound": 0.5, "peak bytes": 10}
    (tmp_path / "W2.json").write_text(json.dumps({"summary": [row, {**row, "ratio": None, "peer": None}]}))
    printed = gpu.table(tmp_path).splitlines()
    assert "4.00" in printed[1] and "50%" in printed[1] and "none" in printed[2]


def test_unknown_steps_and_no_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "W2,W9"])
    assert "unknown: W9" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.main(["--only", "W2"]) == 3
        assert "no GPU" in capsys.readouterr().out


def test_every_step_exists():
    names = [s.name for s in gpu.steps()]
    assert names[0] == "install" and names[-10:] == ["sanitize", "W1", "W2", "W3", "W4a", "W4b", "W5", "W6", "W7", "W8"]
    assert {"test_gpu_only", "test_gpu_random", "test_gpu_importance_wide", "test_gpu_smooth_knn"} <= set(names[1:-9])
    assert all(s.limit <= 540 and s.command[0] == "{python}" for s in gpu.steps()) and sys.executable
    assert len(gpu.digest()) == 16
