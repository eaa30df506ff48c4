"""``python -m benchmarks [what ...]``: measure, print, write benchmarks/results/<what>.json."""

from __future__ import annotations

import argparse
import json

from benchmarks import accuracy, exact_likelihood, henze_zirkler, log_mean_exp, nonlinear, report, robustness, smooth_knn

WHAT = {
    "log_mean_exp": log_mean_exp.run,
    "henze_zirkler": henze_zirkler.run,
    "linear_jtex": lambda: accuracy.linear("LinearJTEx"),
    "gaussian": lambda: accuracy.linear("Gaussian"),
    "exact_likelihood": exact_likelihood.run,
    "nonlinear": nonlinear.run,
    "smooth_knn": smooth_knn.run,
    "robustness": robustness.run,
    "digits": accuracy.digits,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="*", default=[], help=f"any of: {', '.join(WHAT)} (default: all)")
    chosen = parser.parse_args().what or list(WHAT)
    unknown = [w for w in chosen if w not in WHAT]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(WHAT)}")
    for name in chosen:
        results = WHAT[name]()
        print(f"{name}\n{json.dumps(results, indent=1)}\n-> {report.write(name, results)}", flush=True)


if __name__ == "__main__":
    main()
