"""The workloads W1 to W9 on the CPU, beside every peer at its best.

All in one process: peers are checked and tried one by one, then the fastest three of each kind and ours are timed in turns
(a kind that is far slower, and would take long, keeps the time of its trial).
A form that returns other numbers is refused and gets no time; where ours is wrong, nothing of the workload gets one. Memory
is that of one form in a process of its own (memory.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks import annealing, cases, chains, henze_zirkler, log_mean_exp, report, smooth_knn, training
from benchmarks.cases import Case
from benchmarks.timing import ROUNDS, finish, interleaved, seconds
from benchmarks.workloads import Form, Workload

NAMES = ("W1", "W2", "W3", "W4a", "W4b", "W5", "W6", "W7", "W8", "W9")
ALIASES = {"log_mean_exp": "W1", "henze_zirkler": "W5", "smooth_knn": "W6", "chains": "W7", "training": "W8", "annealing": "W9"}
FINALISTS = 3  # of each kind
FEW = 20  # rows
TRY_LIMIT = 240.0  # seconds of checking, compiling and trying one form above which larger chunks of its kind are left out
FAR = 5.0  # times the fastest of all: a form so slow is not timed in turns, if all its calls would take LONG
LONG = 20.0  # seconds
HOPELESS = 4.0  # times the fastest of its kind: one call is enough to know


def cases_of(name: str, quick: bool) -> list[Case]:
    if name in ("W7", "W9"):
        return (chains if name == "W7" else annealing).cases(quick)
    if name == "W8":
        return training.cases(quick)
    if name == "W6":
        return smooth_knn.cases(400 if quick else smooth_knn.REPETITIONS)
    if name == "W5":
        return henze_zirkler.cases(quick)
    w = Workload.on_cpu(name)
    if name == "W1":
        return [log_mean_exp.case(w._replace(rows=256, samples=500) if quick else w)]
    return [cases.importance(name, w.tried(), {"": cases.QUICK[name]}, few=True) if quick else cases.importance(name, w)]


def measure(name: str, quick: bool = False, peers: list[str] | None = None) -> dict[str, Any]:
    """-> {case: what was measured of it}."""
    remembered = not quick and name not in ("W5", "W8")  # their memory would take as long as all else
    return {
        case.name: measure_case(case, peers, rounds=3 if quick else ROUNDS, memory_of=name if remembered else None)
        for case in cases_of(name, quick)
    }


def measure_case(case: Case, peers: list[str] | None, rounds: int, memory_of: str | None) -> dict[str, Any]:
    """``peers``: how the names of the kinds to try begin, all if None; ``memory_of``: the workload, where memory is wanted."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 256  # each chunk's shape is one; beyond the limit torch would go on uncompiled
    torch._dynamo.config.accumulated_recompile_limit = 1024
    result: dict[str, Any] = {"size": case.size, "ours": {"error": judged(case)}, "forms": {}}
    result["absent"] = absent(case.name, peers)
    if not result["ours"]["error"]["allowed"]:
        return result | {"refused": "ours is wrong"}
    print(f"\n{case.name}: {case.size}", flush=True)
    good = tried(case, peers, result["forms"])
    runs = {"libi_fast": (case.ours, 1.0)} | {f.name: (f.run, f.share) for f in finalists(good, result["forms"], rounds)}
    times = interleaved({n: run for n, (run, _) in runs.items()}, rounds, warm=1)
    for name, (_, share) in runs.items():
        scaled = {k: v / share if k.endswith("ms") else v for k, v in times[name].items()}
        entry = result["ours"] if name == "libi_fast" else result["forms"][name]
        entry |= scaled | {"interleaved": True}
    ours = result["ours"]
    best_of = {kind_of(n): n for n in sorted(runs, key=lambda n: -result["forms"].get(n, ours)["best ms"])}
    if case.worth is not None:
        milliseconds = {name: result["forms"].get(name, ours)["best ms"] for name in best_of.values()}
        for name, found in case.worth({name: runs[name][0] for name in milliseconds}, milliseconds).items():
            result["forms"].get(name, ours).update(found)
    if memory_of:
        for name in best_of.values():
            entry = ours if name == "libi_fast" else result["forms"][name]
            entry |= memory(memory_of, case.name, name)
    result["bound"] = case.bound()
    within = result["bound"].get("seconds")
    ours["share of the bound"] = None if within is None else 1e3 * within / ours["best ms"]
    return result | compared_to_fastest(ours, result["forms"])


def judged(case: Case) -> dict[str, Any]:
    """Ours is right if it is within the tolerance, and its root mean square error is not twice that of torch's own float32
    (largest errors are a matter of luck; of a few rows, as in quick runs, so is the mean, and eight times pass)."""
    error, by_torch = case.right(), case.torch_error()
    known = [k for k in ("mean value", "mean gradients") if error.get(k) is not None]
    times = 2 if error.get("rows", FEW) >= FEW else 8
    near = all(error[k] <= max(times * by_torch[k], cases.ULP) for k in known)
    return {**error, "of torch in float32": {k: by_torch[k] for k in known}, "allowed": bool(error["allowed"] and near)}


def absent(case: str, peers: list[str] | None) -> dict[str, str]:
    needed = {"JAX": "jax"} | ({"BlackJAX": "blackjax", "NumPyro": "numpyro"} if case.startswith("W7") else {})
    missing = {kind: name for kind, name in needed.items() if importlib.util.find_spec(name) is None and wanted(kind, peers)}
    return {kind: f"{name} is not installed: pip install 'libi-fast[bench]'" for kind, name in missing.items()}


def kind_of(name: str) -> str:
    return name.split(",")[0]


def wanted(name: str, peers: list[str] | None) -> bool:
    return peers is None or any(kind_of(name).startswith(part) for part in peers)


def tried(case: Case, peers: list[str] | None, entries: dict[str, Any]) -> list[Form]:
    """Check and time each form; what went wrong with it is in ``entries``."""
    good: list[Form] = []
    late: set[str] = set()
    least: dict[str, float] = {}
    for form in case.forms():
        kind = kind_of(form.name)
        if not wanted(form.name, peers):
            continue
        entry = entries.setdefault(form.name, {})
        if kind in late:
            entry["left out"] = "a smaller chunk took too long"
            report.print_tried(form.name, entry)
            continue
        start = time.perf_counter()
        try:
            why, times = try_form(case, form, entry, least.get(kind))
            if why is not None:
                entry["refused"] = why
        except Exception as error:  # whatever a peer does wrong is a result
            entry["failed"] = f"{type(error).__name__}: {error}"[:300]
        entry["seconds of trying"] = time.perf_counter() - start
        if entry["seconds of trying"] > TRY_LIMIT:
            late.add(kind)
        if "refused" not in entry and "failed" not in entry:
            least[kind] = min(least.get(kind, times[0]), *times)
            entry |= {"best ms": 1e3 * min(times) / form.share, "calls": len(times)}
            if form.share < 1:
                entry["scaled from this share"] = form.share
            good.append(form)
        report.print_tried(form.name, entry)
    return good


def try_form(case: Case, form: Form, entry: dict[str, Any], least: float | None) -> tuple[str | None, list[float]]:
    """-> why it is refused, if so, and the seconds of one or two calls after the first; ``least``: the fastest of its kind."""
    entry["error"] = case.error(form.check(*case.few))
    if not entry["error"]["allowed"]:
        return "it returns other numbers", []
    value = form.run()
    finish(value)
    if case.whole is not None:
        entry["whole run"] = case.whole(value)
        if not entry["whole run"]["allowed"]:
            return "a whole run returns other numbers", []
    del value
    times = [seconds(form.run)]
    if least is None or times[0] < HOPELESS * least:
        times.append(seconds(form.run))
    return None, times


def finalists(good: list[Form], entries: dict[str, Any], rounds: int) -> list[Form]:
    by_kind: dict[str, list[Form]] = {}
    fastest = min((entries[f.name]["best ms"] for f in good), default=0.0)
    good = [f for f in good if entries[f.name]["best ms"] < max(FAR * fastest, 1e3 * LONG / rounds / f.share)]
    for form in sorted(good, key=lambda f: entries[f.name]["best ms"]):
        by_kind.setdefault(kind_of(form.name), []).append(form)
    return [form for kind in by_kind.values() for form in kind[:FINALISTS]]


def compared_to_fastest(ours: dict[str, Any], forms: dict[str, Any]) -> dict[str, Any]:
    timed = {n: f for n, f in forms.items() if "best ms" in f}
    if not timed:
        return {"peer": None, "ratio": None}
    peer = min(timed, key=lambda n: timed[n]["best ms"])
    ratio = timed[peer]["best ms"] / ours["best ms"]
    medians = timed[peer].get("median ms", timed[peer]["best ms"]) / ours["median ms"]
    return {"peer": peer, "ratio": ratio, "ratio of medians": medians}


def memory(workload: str, case: str, form: str) -> dict[str, Any]:
    """Peak bytes of a call, in a process of its own; or why they are not known."""
    command = [sys.executable, "-m", "benchmarks.memory", workload, case, form]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    print(f"memory of {form}: {why}", flush=True)
    return {"peak bytes": None, "memory": why}


# --- sweeps ---

GRID = {  # one factor at a time, around W2 and W3
    "W2": {"N": (50, 500, 2000), "S": (500, 5000, 20_000), "L": (1, 2, 6, 16), "D": (2, 6, 16, 64)},
    "W3": {"N": (5, 20, 80), "S": (500, 5000, 20_000), "L": (10, 50, 200), "D": (100, 784, 1568)},
}
QUICK_GRID = {"W2": {"S": (50, 100), "D": (2, 16)}, "W3": {"N": (1, 2)}}
SWEPT = ("JAX", "torch.compile")  # the two kinds that are fastest at the centre; JAX by coordinate where the decoder is narrow
SWEPT_W8 = ["JAX", "torch eager"]  # torch.compile lies near torch eager (W8.json), and takes minutes where 1600 are compiled
LINES = {"W2": (25_000, 100_000, 500_000), "W3": (500, 1000, 5000)}  # samples of a chunk


def varied(w: Workload, factor: str, value: int) -> Workload:
    if factor == "N":
        return w._replace(rows=value)
    if factor == "S":
        return w._replace(samples=value)
    widths = (value, *w.widths[1:]) if factor == "L" else (*w.widths[:-1], value)
    return w._replace(widths=widths)


def chunks_of(lines: int, w: Workload) -> tuple[int, int]:
    """Rows and parts of a row, of about so many samples."""
    if lines >= w.samples:
        return lines // w.samples, 1
    return 1, max(n for n in range(1, w.samples // lines + 1) if w.samples % n == 0)


def sweep(quick: bool = False, peers: list[str] | None = None) -> dict[str, Any]:
    """-> {workload: {factor: [a point's value, size, milliseconds and so on]}}."""
    found: dict[str, Any] = {}
    measured: dict[Workload, dict[str, Any]] = {}  # every factor passes through the centre
    for name, factors in (QUICK_GRID if quick else GRID).items():
        centre = Workload.on_cpu(name).tried() if quick else Workload.on_cpu(name)
        for factor, values in factors.items():
            for value in values:
                w = varied(centre, factor, value)
                sizes = LINES[name][1:2] if quick else LINES[name]
                chunks = {"": list(dict.fromkeys(chunks_of(lines, w) for lines in sizes))}
                chunks |= {"torch.compile by coordinate": [], "torch.compile unrolled": []}
                kinds = list(SWEPT) if peers is None else peers
                if w not in measured:
                    case = cases.importance(name, w, chunks, few=True)
                    measured[w] = measure_case(case, kinds, rounds=3 if quick else 5, memory_of=None)
                found.setdefault(name, {}).setdefault(factor, []).append({"value": value, **measured[w]})
    return found


def sweep_replicas(quick: bool = False, peers: list[str] | None = None) -> dict[str, Any]:
    """W8's epoch over the number of replicas: {"W8": {system: [a point's value, milliseconds of one epoch and so on]}}."""
    found: dict[str, Any] = {}
    for name in training.NAMES:
        for replicas, epochs in ({1: 2, 2: 2} if quick else training.SWEPT).items():
            case = training.case(name, replicas, 60 if quick else 500, epochs, few=True)
            measured = measure_case(case, peers or SWEPT_W8, rounds=3 if quick else 5, memory_of=None)
            for entry in (measured["ours"], *measured["forms"].values()):
                entry |= {k: v / epochs for k, v in entry.items() if k.endswith("ms")}
            found.setdefault(name, []).append({"value": replicas, **measured})
    return {"W8": found}
