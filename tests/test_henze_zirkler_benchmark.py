"""W5, the benchmark of Henze-Zirkler, at tiny sizes: which peers are tried, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as entry
from benchmarks import cpu, henze_zirkler, peak
from benchmarks.workloads import Form


@pytest.fixture(autouse=True)
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "rates", lambda: {"multiply-add": 1e11, "exp2": 1e10, "by": "a test"})


def test_quick_takes_small_sizes_and_only_the_chosen_peers(tmp_path: Path) -> None:
    assert entry.main(["henze_zirkler", "--quick", "--peers", "torch eager", "--out", str(tmp_path)]) == 0
    measured = json.loads((tmp_path / "W5.json").read_text())["results"]
    assert list(measured) == [f"W5, {name}" for name in henze_zirkler.QUICK]
    for found in measured.values():
        assert all(name.startswith("torch eager") and form["best ms"] > 0 for name, form in found["forms"].items())
        assert found["ratio"] > 0 and 0 < found["ours"]["share of the bound"] < 1
        assert found["ours"]["error"]["of torch in float32"]["mean gradients"] > 0


def test_every_peer_of_torch_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes half a minute, and is not what is tested."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for case in henze_zirkler.cases(quick=True):
        names = []
        for form in case.forms():
            if not form.name.startswith("JAX"):
                assert case.error(form.check(*case.few))["allowed"], form.name
            names.append(form.name)
        assert len(set(names)) == len(names)
        kinds = {cpu.kind_of(name) for name in names}
        assert kinds - {"JAX"} == {"torch eager", "torch.compile"}
        assert ("JAX" in kinds) == (importlib.util.find_spec("jax") is not None)


def test_every_peer_of_torch_on_a_gpu_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, without the compiler, at the sizes that are tried first."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name, problem in henze_zirkler.ON_GPU_QUICK.items():
        case = henze_zirkler.case(name, *problem, backend="reference")
        names = []
        for form in case.forms():
            if form.name != "KeOps":
                assert case.error(form.check(*case.few))["allowed"], form.name
            names.append(form.name)
        kinds = {cpu.kind_of(name) for name in names} - {"KeOps"}
        assert len(set(names)) == len(names) and {"torch.compile"} < kinds
        method, *shape = problem
        assert henze_zirkler.cycles_on_gpu(torch.randn(shape), method) > 0


def test_products_are_the_same_sums() -> None:
    y = torch.randn(2, 30, 3, dtype=torch.float64)
    for a, b in zip(henze_zirkler.by_products(y, 1.2, y[:, 4:9]), henze_zirkler.by_coordinate(y, 1.2, y[:, 4:9]), strict=True):
        torch.testing.assert_close(a, b)


def test_a_peer_that_fails_or_is_wrong_does_not_end_the_run() -> None:
    case = henze_zirkler.cases(quick=True)[0]
    good = next(case.forms())

    def fails() -> None:
        raise MemoryError("too large")

    def wrong() -> tuple[torch.Tensor, ...]:
        return tuple(1.1 * t for t in good.run())

    forms = [Form("broken, 1", "ieee", fails, fails), Form("wrong, 1", "ieee", wrong, wrong), good]
    found = cpu.measure_case(case._replace(forms=lambda: iter(forms)), None, 1, None)
    assert "too large" in found["forms"]["broken, 1"]["failed"]
    assert "other numbers" in found["forms"]["wrong, 1"]["refused"] and found["forms"]["wrong, 1"]["error"]["value"] > 0.05
    assert found["peer"] == good.name and found["ratio"] > 0


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_a_wrong_ours_means_no_speed_and_a_non_zero_exit(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ten times torch's error is within the tolerance, and still too much."""
    right = henze_zirkler.differentiated

    def off(z: torch.Tensor, method: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        value, slope = right(z, method, backend)
        if backend == "reference":
            return value, slope
        return (value * 1.0005, slope) if what == "value" else (value, slope * 1.0005)

    monkeypatch.setattr(henze_zirkler, "differentiated", off)
    assert entry.main(["W5", "--quick", "--peers", "torch eager", "--out", str(tmp_path)]) == 1
    measured = json.loads((tmp_path / "W5.json").read_text())["results"]
    assert all(found["refused"] and "best ms" not in found["ours"] and not found["forms"] for found in measured.values())
