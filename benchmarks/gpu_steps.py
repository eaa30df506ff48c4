"""The steps of ``python -m benchmarks.gpu`` that run on the GPU, each in a process of its own."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import libi_fast as lf
from benchmarks import chains, henze_zirkler, smooth_knn, training, workloads
from benchmarks.card import Card, copy_bandwidth, finish, interleaved, matmul_precision, matmul_rate, peak_memory, spent
from benchmarks.cases import Case
from benchmarks.gpu import FORMS_LIMIT, sanitizer, write
from benchmarks.workloads import WORKLOADS, Form, Problem, Workload

LINES = [2**16, 2**18, 2**20, 2**22]  # samples of a peer's chunk
CHECKED_ROWS = 4
PEER_PRECISION = {"ieee": "ieee", "tf32x3": "ieee", "tf32": "tf32", "bf16": "bf16"}  # tf32x3 stands in for float32


def versions() -> dict[str, Any]:
    import triton

    jax = None
    if importlib.util.find_spec("jax") is not None:
        import jax as module

        jax = module.__version__
    return {
        "date": datetime.date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__,
        "triton": triton.__version__, "jax": jax,
    }  # fmt: skip


def run(step: str, path: Path, quick: bool) -> int:
    if step == "sanitize":
        return sanitize(path)
    if step == "small":
        small_cases()
        return 0
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    card = Card()
    result: dict[str, Any] = {"versions": versions(), "card": card.about()}
    keep = functools.partial(write, path)
    if step in ("W5", "W6", "W8"):
        measure_cases(cases_on_gpu(step, quick), card, result, lambda: keep(result))
        return 0
    if step == "W7":
        measure_chains(card, result, lambda: keep(result), quick)
        return 0
    workload = WORKLOADS[step].tried() if quick else WORKLOADS[step]
    measure = measure_w1 if step == "W1" else measure_importance
    measure(workload, card, result, lambda: keep(result))
    return 0


# --- W1 ---


def measure_w1(w: Workload, card: Card, result: dict[str, Any], keep: Callable[[], None]) -> None:
    bandwidth = copy_bandwidth()
    x = torch.randn(w.rows, w.samples, device="cuda") * 30
    grad = torch.rand(w.rows, device="cuda")
    leaf = x.clone().requires_grad_()

    def eager(x: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(x, -1) - math.log(w.samples)

    functions = {"libi_fast": lf.log_mean_exp, "torch eager": eager, "torch.compile": torch.compile(eager)}
    truth = eager(x[:64].double())
    result |= {"copy bandwidth B/s": bandwidth, "rows": w.rows, "samples": w.samples, "forms": {}}

    def both(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(function(leaf), leaf, grad)[0]

    slope = torch.softmax(x[:64].double(), -1) * grad[:64, None]
    for name, function in functions.items():
        off = float((function(x)[:64].double() - truth).abs().max())
        off_slope = float((both(function)[:64].double() - slope).abs().max())
        result["forms"][name] = {"error": off, "gradient error": off_slope, "allowed": off < 1e-3 and off_slope < 2e-5}
    keep()
    allowed = {name: f for name, f in functions.items() if result["forms"][name]["allowed"]}
    if "libi_fast" not in allowed:
        raise SystemExit(f"log_mean_exp is wrong on this GPU: {result['forms']['libi_fast']}")
    summary = []
    for what, moved in (("forward", 4 * x.numel()), ("fwd+bwd", 12 * x.numel())):
        forms = {n: functools.partial(f, x) if what == "forward" else functools.partial(both, f) for n, f in allowed.items()}
        times = interleaved(forms)
        ours = times["libi_fast"]
        peer = min((n for n in times if n != "libi_fast"), key=lambda n: times[n]["median ms"])
        summary.append({
            "precision": what, "median ms": ours["median ms"], "peer": peer,
            "ratio": times[peer]["median ms"] / ours["median ms"], "peak bytes": peak_memory(forms["libi_fast"]),
            "share of bound": moved / bandwidth / (ours["median ms"] / 1e3),
        })  # fmt: skip
        result |= {what: times, f"{what} energy": spent(card, forms["libi_fast"]), "summary": summary}
        keep()


# --- W2 to W4b ---


def measure_importance(w: Workload, card: Card, result: dict[str, Any], keep: Callable[[], None]) -> None:
    p = Problem.of(w, "cuda")
    precisions = ["ieee"] if w.narrow else ["ieee", "tf32x3", "tf32", "bf16"]
    few = p.first(CHECKED_ROWS)
    noise = workloads.noise_of(few)
    truth = workloads.ours(few.double(), backend="reference")()  # the same draws, in float64
    result |= {"workload": w._asdict(), "forms": {}, "ours": {}, "summary": [], "checked rows": CHECKED_ROWS}
    result["bound"] = bounds(w, card)
    keep()

    runs: dict[str, Callable[[], Any]] = {}
    for precision in precisions:
        call = workloads.ours(p, precision)
        runs[precision] = call
        start = time.perf_counter()
        values = call()
        finish(values)
        found = workloads.error(workloads.ours(few, precision)(), truth, few, precision)
        result["ours"][precision] = {
            "first call s": time.perf_counter() - start, "error": found, "peak bytes": peak_memory(call),
            **interleaved({"libi_fast": call}, 3)["libi_fast"],
        }  # fmt: skip
        keep()
    result["memory"] = memory(w)
    expected = runs["ieee"]()[0]
    result["graph"] = graph(p)
    keep()

    for peer_precision in dict.fromkeys(PEER_PRECISION[precision] for precision in precisions):
        good = peers(p, peer_precision, few, noise, truth, expected, result, keep)
        mine = {f"libi_fast {q}": runs[q] for q in precisions if PEER_PRECISION[q] == peer_precision}
        with matmul_precision(peer_precision):
            times = interleaved({**mine, **{form.name: form.run for form in good}})
        result["forms"][f"interleaved, {peer_precision}"] = times
        names = [form.name for form in good]
        peer = min(names, key=lambda name: times[name]["median ms"], default=None)
        for name in mine:
            precision = name.split()[1]
            time_ = times[name]["median ms"]
            bound = result["bound"].get(f"{precision} s")
            result["summary"].append({
                "precision": precision, "median ms": time_, "peer": peer,
                "ratio": None if peer is None else times[peer]["median ms"] / time_,
                "share of bound": None if bound is None else 1e3 * bound / time_,
                "peak bytes": result["ours"][precision]["peak bytes"],
            })  # fmt: skip
            result["ours"][precision]["energy"] = spent(card, runs[precision])
        keep()
    result["profile"] = profile(runs["ieee"])
    keep()


# --- W5, W6 and W8 ---


def cases_on_gpu(step: str, quick: bool) -> Iterator[tuple[str, Case, float]]:
    """(name, case, cycles that its bound takes of a multiprocessor: 128 multiplications, 16 special functions a cycle)."""
    if step == "W5":
        for name, problem in (henze_zirkler.ON_GPU_QUICK if quick else henze_zirkler.ON_GPU).items():
            method, *shape = problem
            cycles = henze_zirkler.cycles_on_gpu(torch.empty(shape, device="cuda").normal_(), method)
            yield name, henze_zirkler.case(name, *problem, device="cuda", backend="triton"), cycles
    elif step == "W6":
        repetitions = 100 if quick else smooth_knn.REPETITIONS
        for k, case in zip(smooth_knn.KS, smooth_knn.cases(repetitions, "cuda"), strict=True):
            counts = smooth_knn.counts(repetitions, 2 * smooth_knn.POINTS, k)
            yield f"k={k}", case, max(counts["multiply-add"] / 128, (counts["exp2"] + counts["sqrt"]) / 16)
    else:
        yield from training.on_gpu(quick)


def measure_cases(
    tasks: Iterator[tuple[str, Case, float]], card: Card, result: dict[str, Any], keep: Callable[[], None]
) -> None:
    result |= {"summary": [], "sizes": {}}
    for task in tasks:
        measure_case(*task, card, result, keep)


def measure_case(
    name: str, case: Case, cycles: float, card: Card, result: dict[str, Any], keep: Callable[[], None]
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """-> ours and the peers that return our numbers, and their times; a line of the summary, and all under ``sizes``."""
    start = time.perf_counter()
    finish(case.ours())
    found = result["sizes"][name] = {"size": case.size, "first call s": time.perf_counter() - start, "forms": {}}
    found["error"] = case.right()
    keep()
    if not found["error"]["allowed"]:
        raise SystemExit(f"{case.name} is wrong on this GPU: {found['error']}")
    entries = found["forms"]
    good = {f.name: f.run for f in case.forms() if tried(f, case, entries.setdefault(f.name, {}), keep)}
    runs = {"libi_fast": case.ours, **good}
    times = found["interleaved"] = interleaved(runs)
    matmul_rate("ieee")  # so that the clock is that of work
    clock, processors = card.now()["sm MHz"], torch.cuda.get_device_properties(0).multi_processor_count
    ours, peer = times["libi_fast"], min(good, key=lambda form: times[form]["median ms"], default=None)
    result["summary"].append({
        "precision": name, "median ms": ours["median ms"], "peer": peer,
        "ratio": None if peer is None else times[peer]["median ms"] / ours["median ms"],
        "share of bound": None if clock is None else cycles / (processors * clock * 1e3) / ours["median ms"],
        "peak bytes": peak_memory(case.ours),
    })  # fmt: skip
    found |= {"energy": spent(card, case.ours), "profile": profile(case.ours)}
    keep()
    return runs, times


# --- W7 ---

LEAPFROG = 1015  # instructions of a lane, with its share of a transition (kernels/chains/gpu.py)


def measure_chains(card: Card, result: dict[str, Any], keep: Callable[[], None], quick: bool) -> None:
    result |= {"summary": [], "sizes": {}}
    for rows, transitions in [(8, 40)] if quick else [(100, 1000), (10_000, 1000)]:
        task, name = chains.task_of(rows, chains.CHAINS, transitions, "cuda"), f"N={rows}"
        cycles = task.count * LEAPFROG / 128
        runs, times = measure_case(name, chains.case(task, quick), cycles, card, result, keep)
        result["summary"][-1]["leapfrogs a second"] = 1e3 * task.count / times["libi_fast"]["median ms"]
        if rows <= chains.ROWS:
            best = {form: t["median ms"] for form, t in times.items()}
            result["sizes"][name]["worth"] = chains.effective(task, runs, best)
        keep()


def tried(form: Form, case: Case, entry: dict[str, Any], keep: Callable[[], None]) -> bool:
    """Whether it returns what it should, step by step and, where its noise is its own, in the mean of a whole run."""
    start = time.perf_counter()
    try:
        entry["error"] = case.error(form.check(*case.few))
        value = form.run()
        finish(value)
        if case.whole is not None:
            entry["whole run"] = case.whole(value)
    except (torch.cuda.OutOfMemoryError, RuntimeError) as error:  # too large for the card is a result
        entry["failed"] = str(error)[:300]
        torch.cuda.empty_cache()
    entry["seconds"] = time.perf_counter() - start
    keep()
    return "failed" not in entry and entry["error"]["allowed"] and entry.get("whole run", entry["error"])["allowed"]


def peers(
    p: Problem, precision: str, few: Problem, noise: torch.Tensor, truth: Any, expected: torch.Tensor, result: dict[str, Any],
    keep: Callable[[], None],
) -> list[Form]:  # fmt: skip
    """Those that return our numbers; of each kind the fastest two sizes, so that the last, interleaved rounds are short."""
    best: dict[str, list[tuple[float, Form]]] = {}
    late: set[str] = set()
    for form in all_forms(p, precision):
        kind = form.name.split(",")[0]
        entry = result["forms"].setdefault(f"{form.name}, {precision}", {})
        if kind in late:
            entry["left out"] = "a smaller chunk took too long"
            continue
        start = time.perf_counter()
        try:
            with matmul_precision(precision):
                entry["error"] = workloads.error(form.check(few, noise), truth, few, precision)
                value = form.run()
                finish(value)
                entry["first call s"] = time.perf_counter() - start
                entry["whole run"] = workloads.agree(torch.as_tensor(_numbers(value[0])), expected.cpu(), precision)
                entry["ms"] = interleaved({"it": form.run}, 2)["it"]["best ms"]
                if form.name.startswith("torch"):
                    entry["peak bytes"] = peak_memory(form.run)
        except (torch.cuda.OutOfMemoryError, RuntimeError) as error:  # a chunk too large for the card is a result
            entry["failed"] = str(error)[:300]
            torch.cuda.empty_cache()
        if time.perf_counter() - start > FORMS_LIMIT:
            late.add(kind)
        if "ms" in entry and entry["error"]["allowed"] and entry["whole run"]["allowed"]:
            best.setdefault(kind, []).append((entry["ms"], form))
        keep()
    return [form for kind in best.values() for _, form in sorted(kind, key=lambda pair: pair[0])[:2]]


def all_forms(p: Problem, precision: str) -> Iterator[Form]:
    """Eager in every size; what must be compiled in the middle ones."""
    few = LINES[1:3]
    yield from workloads.torch_forms(p, precision, "torch eager", LINES)
    yield from workloads.torch_forms(p, precision, "torch.compile", few)
    if p.workload.narrow:
        yield from workloads.torch_forms(p, precision, "torch.compile by coordinate", few)
    if importlib.util.find_spec("jax") is not None:
        from benchmarks import jax_forms

        yield from jax_forms.forms(p, precision, few)


def _numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().float().cpu()
    import numpy as np

    return np.array(value)


def bounds(w: Workload, card: Card) -> dict[str, Any]:
    """Seconds that the arithmetic alone takes. Narrow: multiplications and special functions at the clock that the card shows
    under load; wide: the products at the rate that torch's own large product reaches."""
    if not w.narrow:
        rates = {precision: matmul_rate(precision) for precision in ("ieee", "tf32", "bf16")}
        rates["tf32x3"] = rates["tf32"] / 3
        return {f"{q} s": w.flops / rate for q, rate in rates.items()} | {"rates flop/s": rates}
    matmul_rate("ieee")
    clock = card.now()["sm MHz"]
    if clock is None:
        return {}
    latents, hidden, outputs = w.widths
    # An SM: 128 multiplications, 16 special functions a cycle. Of a hidden unit L + D and 1.5; backward decodes twice more and
    # multiplies 2 (L + D) + 1 for its gradients.
    passes = 3 if w.backward else 1
    multiply = hidden * (latents + outputs) * passes + (hidden * (2 * (latents + outputs) + 1) if w.backward else 0)
    cycles = max(multiply / 128, 1.5 * hidden * passes / 16)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return {"ieee s": w.rows * w.samples * cycles / (processors * clock * 1e6), "cycles a sample": cycles, "MHz": clock}


def memory(w: Workload) -> dict[str, int]:
    """Peak bytes of one call at S samples and at 4 S, a few rows."""
    rows = min(w.rows, 256)
    sizes = [w._replace(rows=rows, samples=s) for s in (w.samples, 4 * w.samples)]
    return {f"{rows} x {s.samples}": peak_memory(workloads.ours(Problem.of(s, "cuda"))) for s in sizes}


def graph(p: Problem) -> dict[str, Any]:
    """The call launched by the host, and replayed as a CUDA graph: what launches cost, whole and at 64 rows."""
    found = {}
    for rows in (min(64, p.x.shape[0]), p.x.shape[0]):
        part = p.first(rows)
        seed = torch.zeros((), dtype=torch.int64, device="cuda")
        call = workloads.ours(part, seed=seed)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
            call()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        found[f"{rows} rows"] = interleaved({"eager": call, "graph": captured.replay})
    return found


def profile(call: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels that take the most time of the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        finish(call())
    events = sorted(profiler.key_averages(), key=lambda e: -e.device_time_total)[:10]
    return [{"kernel": e.key[:120], "calls": e.count, "device ms": e.device_time_total / 1e3} for e in events]


# --- compute-sanitizer ---


def sanitize(path: Path) -> int:
    tool = sanitizer()
    if tool is None:
        write(path, {"found": None})
        print("compute-sanitizer is not on this machine")
        return 0
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu", "--step", "small"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    write(path, {"found": tool, "exit code": done.returncode, "tail": done.stdout[-3000:] + done.stderr[-1000:]})
    print(done.stdout[-1500:], done.stderr[-1500:])
    return done.returncode


def small_cases() -> None:
    """One small case of each kernel."""
    x = torch.randn(5, 3000, device="cuda", requires_grad=True)
    lf.log_mean_exp(x).sum().backward()
    lf.log_mean_exp(x[:, :7]).sum().backward()
    lf.philox_uniform(0, 3, 7, first_draw=2, device="cuda")
    for d in (1, 2, 8):
        z = torch.randn(2, 100, d, device="cuda", requires_grad=True)
        for method in ("exact", "random", "sliced", *(["quadrature"] if d < 3 else [])):
            lf.henze_zirkler(z, method=method, num_frequencies=70, num_slices=3).statistic.sum().backward()
    for widths in ((2, 6, 2), (3, 5), (5, 40, 70)):
        for likelihood in ("gaussian", "bernoulli"):
            w = Workload(widths, likelihood, 0.1, 3, 130, True, (3, 130))
            for precision in ("ieee", "bf16"):
                finish(workloads.ours(Problem.of(w, "cuda"), precision)())
    model = lf.LatentVariableModel(lf.mlp(2, [6], 2), lf.Bernoulli(), latent_dim=2).cuda()
    x = torch.rand(3, 2, device="cuda").round()
    lf.log_likelihood(model, x, num_samples=300, seed=0, pareto=True)
    for k, alphas in ((1, 1.0), (4, (1.0, 2.0)), (22, 1.0), (4, 100.0)):
        lf.smooth_knn(*torch.randn(2, 3, 13, 2, device="cuda"), k=k, alphas=alphas)
    d = lf.data.LinearJTEx(seed=0, train=70, validation=40)
    for fit in (
        lf.LiBI(d.model().cuda(), d.inference().cuda(), repeats=1, warm_up=2),
        lf.VAE(d.model().cuda(), d.inference().cuda()),
    ):
        fit.fit(d.train.cuda(), d.validation.cuda(), epochs=4, restarts=2, progress=False)
    for method in ("hmc", "random-walk", "sir"):
        lf.sample_posterior(model, x, 20, method=method, seed=0)
    torch.cuda.synchronize()
