"""``python -m benchmarks [what ...]``: measure, print, write benchmarks/results/<what>.json and pictures of the speeds.

W1 to W9 are speeds on the CPU beside every peer (all of them by default); the other names are what the methods reach.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def same_threads() -> None:
    """Before torch and JAX start: as many threads for both, and torch's must not spin while JAX's work."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(len(processors))))
        if threads < len(processors):  # JAX takes as many as it may run on
            os.sched_setaffinity(0, processors[:threads])


if __name__ == "__main__":
    same_threads()

from benchmarks import (  # noqa: E402
    accuracy,
    cpu,
    digits,
    exact_likelihood,
    inference,
    nonlinear,
    plots,
    proposals,
    report,
    robustness,
    smooth_knn,
)
from libi_fast.kernels import cpu as native  # noqa: E402

OTHERS = {
    "linear_jtex": lambda: accuracy.linear("LinearJTEx"),
    "gaussian": lambda: accuracy.linear("Gaussian"),
    "exact_likelihood": exact_likelihood.run,
    "nonlinear": nonlinear.run,
    "smooth_knn_of_models": smooth_knn.run,
    "robustness": robustness.run,
    "digits": digits.run,
    "proposals": proposals.run,
    "inference": inference.run,
}
KNOWN = [*cpu.NAMES, *cpu.ALIASES, *OTHERS]


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where ours was wrong somewhere."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="*", help=f"any of: {', '.join(KNOWN)} (default: {' '.join(cpu.NAMES)})")
    parser.add_argument(
        "--sweep", action="store_true", help="instead, over N, S, L and D around W2 and W3; with W8, over replicas"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run")
    parser.add_argument("--peers", nargs="+", help="only kinds whose names begin so: JAX, torch.compile ...")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of results (default: %(default)s)")
    options = parser.parse_args(arguments)
    unknown = [w for w in options.what if w not in KNOWN]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(KNOWN)}")
    chosen = dict.fromkeys(cpu.ALIASES.get(w, w) for w in options.what or cpu.NAMES)
    if options.sweep:
        if options.what not in ([], ["W8"], ["training"]):
            parser.error("--sweep goes with nothing else, or with W8")
        return sweep(options, "W8_replicas" if options.what else "sweep")
    measured = {}
    for name in chosen:
        if name in OTHERS:
            results = OTHERS[name]()
            print(f"{name}: {results}\n-> {report.write(name, results, options.out)}", flush=True)
            continue
        results = cpu.measure(name, options.quick, options.peers)
        for case, found in results.items():
            report.print_case(case, found)
        print(f"-> {report.write(name, results, options.out)}", flush=True)
        measured |= results
    if measured:
        report.print_summary(measured)
        machine = report.machine()
        drawn, dates = plots.measured_on(options.out, cpu.NAMES, machine)
        picture = plots.cpu(drawn, plots.caption(machine, dates), options.out / f"cpu-{native.isa()}.png")
        print(f"-> {picture}" if picture else "nothing to draw")
    return int(any("refused" in found for found in measured.values()))


def sweep(options: argparse.Namespace, name: str) -> int:
    found = (cpu.sweep if name == "sweep" else cpu.sweep_replicas)(options.quick, options.peers)
    report.print_sweep(found)
    machine = report.machine()
    print(f"-> {report.write(name, found, options.out)}")
    axes = () if name == "sweep" else ("replicas", "ms an epoch, best")
    picture = plots.sweep(found, plots.caption(machine, {machine["date"]}), options.out / f"{name}.png", *axes)
    print(f"-> {picture}")
    points = [p for factors in found.values() for points in factors.values() for p in points]
    return int(any("refused" in p for p in points))


if __name__ == "__main__":
    sys.exit(main())
