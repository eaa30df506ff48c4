"""W8, the benchmark of training, at tiny sizes: its peers take the same steps."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import cpu, training


def test_every_peer_of_torch_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes half a minute, and is not what is tested."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for case in training.cases(quick=True):
        assert cpu.judged(case)["allowed"]
        names = []
        for form in case.forms():
            if not form.name.startswith("JAX"):
                assert case.error(form.check())["allowed"], form.name
            names.append(form.name)
        kinds = {cpu.kind_of(name) for name in names}
        assert kinds - {"JAX"} == {"torch eager", "torch.compile"} and len(set(names)) == len(names)
        assert ("JAX" in kinds) == (importlib.util.find_spec("jax") is not None)


def test_other_steps_are_refused() -> None:
    case = training.cases(quick=True)[0]
    terms, parameters = case.ours()
    assert case.error((terms, parameters))["allowed"]
    assert not case.error((terms * 1.01, parameters))["allowed"]
    assert not case.error((terms, parameters + 0.1 * training.RATE))["allowed"]
    assert not case.error((terms, parameters * torch.nan))["allowed"]
