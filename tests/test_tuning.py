"""The opt-in choice of launch configurations, with a clock that the test sets."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from libi_fast.kernels import tuning

CANDIDATES = [{"warps": 1}, {"warps": 2}, {"warps": 4}]
COST = {1: 3.0, 2: 1.0, 4: 2.0}
PROBLEM = {"rows": 1000, "widths": "2-50-2", "tail": False}


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Tuning on, with a file of its own; what was measured is in the list."""
    measured = []

    def milliseconds(run):
        run()
        return COST[measured[-1]["warps"]]

    monkeypatch.setenv("LIBI_FAST_TUNE", "1")
    monkeypatch.setenv("LIBI_FAST_TUNING_FILE", str(tmp_path / "deep" / "tuning.json"))
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_machine", lambda: "a GPU, triton 1")
    return measured


def choose(measured, problem=PROBLEM, candidates=CANDIDATES):
    return tuning.choose("kernel", problem, candidates, measured.append)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_asking_the_first_is_taken_and_nothing_runs(tuned, monkeypatch, value):
    monkeypatch.delenv("LIBI_FAST_TUNE") if value is None else monkeypatch.setenv("LIBI_FAST_TUNE", value)
    assert choose(tuned) == CANDIDATES[0]
    assert not tuned and not tuning.path().exists()


def test_the_fastest_is_kept_and_measured_once(tuned):
    assert choose(tuned) == choose(tuned) == {"warps": 2}
    assert tuned == CANDIDATES
    assert json.loads(tuning.path().read_text()) == {
        "a GPU, triton 1": {"kernel rows=1024 widths=2-50-2 tail=False": {"warps": 2}}
    }


def test_sizes_count_by_their_power_of_two(tuned):
    choose(tuned)
    choose(tuned, {**PROBLEM, "rows": 600})
    assert len(tuned) == 3
    choose(tuned, {**PROBLEM, "rows": 1025})
    choose(tuned, {**PROBLEM, "tail": True})
    assert len(tuned) == 9


def test_later_processes_read_the_file(tuned):
    choose(tuned)
    tuning._load.cache_clear()
    assert choose(tuned) == {"warps": 2} and len(tuned) == 3


def test_a_configuration_that_is_no_longer_offered_is_measured_anew(tuned):
    choose(tuned)
    assert choose(tuned, candidates=[CANDIDATES[0], CANDIDATES[2]]) == {"warps": 4}


def test_one_candidate_needs_no_clock(tuned):
    assert choose(tuned, candidates=CANDIDATES[:1]) == CANDIDATES[0] and not tuned


def test_a_broken_file_is_named_and_replaced(tuned):
    tuning.path().parent.mkdir()
    tuning.path().write_text("{")
    with pytest.warns(UserWarning, match=r"tuning.json is not JSON.*measured anew"):
        assert choose(tuned) == {"warps": 2}
    assert "a GPU, triton 1" in json.loads(tuning.path().read_text())


def test_the_default_file_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("LIBI_FAST_TUNING_FILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.path() == tmp_path / "libi_fast" / "tuning.json"


def test_importing_asks_for_no_triton():
    program = "import sys, libi_fast.kernels.tuning; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
