"""Table 1 beside the paper's, for the terminal and for HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from libi_fast.reproduce.pieces import LIKELIHOOD, OWN, SELECTIONS, TRUTH
from libi_fast.reproduce.protocol import METHODS
from libi_fast.reproduce.published import LABELS, LOG_LIKELIHOOD, SMOOTH_KNN, TABLE1


class Mean(NamedTuple):
    """Of a number a data set: mean, standard deviation over the data sets (divisor n - 1), standard error of the mean."""

    mean: float
    deviation: float
    error: float

    def __str__(self) -> str:
        """Both to about two digits of the error, four decimals at most."""
        if not 0 < self.error < math.inf:
            return number(self.mean)
        decimals = min(4, max(0, 1 - math.floor(math.log10(self.error))))
        return f"{self.mean:.{decimals}f}±{self.error:.{decimals}f}"


class Table(NamedTuple):
    """title, header, rows of text as wide as the header, and what is to be known to read it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str


def mean_of(values: Sequence[float | None]) -> Mean | None:
    """None where there is no number."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    n = len(known)
    mean = math.fsum(known) / n
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (n - 1)) if n > 1 else math.nan
    return Mean(mean, deviation, deviation / math.sqrt(n))


def number(value: float) -> str:
    """Three decimals, four where it is small, none where it is large."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    return f"{value:.0f}" if size >= 1000 else f"{value:.{1 if size >= 100 else 3 if size >= 0.01 or not size else 4}f}"


def shown(value: Mean | None) -> str:
    return "" if value is None else str(value)


def cell(result: Mapping[str, Any], selection: str, *names: str) -> Mean | None:
    """A number of :func:`libi_fast.reproduce.measure.of_method` over the data sets of a piece's result."""

    def number_of(one: Any) -> float | None:
        for name in names:
            one = None if one is None else one.get(name)
        return one

    return mean_of([number_of(one) for one in _sets(result, selection)])


def _sets(result: Mapping[str, Any], selection: str) -> list[dict[str, Any] | None]:
    """None where every restart became non-finite."""
    return result["selections"][selection]["sets"]


def labelled(method: str, result: Mapping[str, Any], selection: str) -> str:
    """The method's name, and on how many data sets it ended where that is not all."""
    ended = [one is not None for one in _sets(result, selection)]
    return LABELS[method] if all(ended) else f"{LABELS[method]} (ended on {sum(ended)} of {len(ended)})"


Results = Mapping[str, Mapping[str, Any]]
"""{method: a piece's result}, and under TRUTH the ground truth's, of one data set."""

COLUMNS: dict[str, str] = {  # of Table 1: what is shown under each heading
    "LL as published": "importance-sampled",
    "LL, exact": "exact",
    "minus the truth's": "minus truth",
    "minus max. likelihood": "minus maximum likelihood",
    "on endless data": "on endless data",
    "S-kNN": "smooth k-NN",
    "energy distance": "energy distance",
}
OF_TRUTH = {"exact": "log-likelihood", "smooth k-NN": "smooth k-NN", "energy distance": "energy distance"}


def table1(dataset: str, results: Results, selection: str = OWN) -> Table:
    """One data set's half of the paper's Table 1 beside ours."""
    truth = results[TRUTH]["sets"]
    header = ["", "paper: LL", "paper: S-kNN", *COLUMNS]
    rows = []
    for method in METHODS:
        if method not in results:
            continue
        printed = TABLE1.get((method, dataset), {})
        theirs = [f"{p.mean:.2f}±{p.spread:.2f}" if (p := printed.get(k)) else "" for k in (LOG_LIKELIHOOD, SMOOTH_KNN)]
        ours = [shown(cell(results[method], selection, key)) for key in COLUMNS.values()]
        rows.append([labelled(method, results[method], selection), *theirs, *ours])
    of_truth = {
        key: shown(mean_of([one[OF_TRUTH[key]] for one in truth])) if key in OF_TRUTH else "" for key in COLUMNS.values()
    }
    rows.append(["ground truth", "", "", *of_truth.values()])
    best = [one["log-likelihood of maximum likelihood"] for one in truth]
    gaps = [b - one["log-likelihood"] for b, one in zip(best, truth, strict=True)]
    neighbours = [one["smooth k-NN of maximum likelihood"] for one in truth]
    of_best = {"exact": shown(mean_of(best)), "minus truth": shown(mean_of(gaps)), "smooth k-NN": shown(mean_of(neighbours))}
    rows.append(["maximum likelihood", "", "", *(of_best.get(key, "") for key in COLUMNS.values())])
    how = {
        OWN: "by each method's own objective on validation rows", LIKELIHOOD: "by exact likelihood on validation rows",
    }  # fmt: skip
    return Table(f"{dataset}: restarts and settings chosen {how[selection]}", header, rows, CAPTION)


CAPTION = (
    "Test rows, nats a row; ours mean ± standard error over the data sets, the paper's mean ± its printed spread. "
    "S-kNN and energy distance: between p(x) and the model; in the truth's row between two samples of p(x), the same ones."
)

CODES = {
    "Henze-Zirkler": ("henze_zirkler", "henze_zirkler_95"),
    "||mean||^2": ("mean_norm2", "mean_norm2_95"),
    "||Cov - I||^2": ("covariance_error", "covariance_error_95"),
    "energy distance to the prior": ("energy_distance", "energy_distance_95"),
}


def codes(dataset: str, results: Results, selection: str = OWN) -> Table:
    """What q is worth: its importance-sampled value against the exact one, its aggregated posterior against the prior, beside
    what 95% of samples of the prior stay below."""
    rows, limits = [], [""] * len(CODES)
    for method in METHODS:
        if method not in results:
            continue
        gap = cell(results[method], selection, "importance-sampled minus exact")
        reliable = cell(results[method], selection, "rows with Pareto k below 0.7")
        row = [labelled(method, results[method], selection), shown(gap), "" if reliable is None else f"{reliable.mean:.0%}"]
        for i, (value, limit) in enumerate(CODES.values()):
            row.append(shown(cell(results[method], selection, "codes", value)))
            limits[i] = next((number(one["codes"][limit]) for one in _sets(results[method], selection) if one), limits[i])
        rows.append(row)
    rows.append(["95% of samples of the prior stay below", "", "", *limits])
    header = ["", "IS minus exact LL", "rows with Pareto k < 0.7", *CODES]
    return Table(f"{dataset}: the inference model", header, rows, "Of one draw of q(z | x) a test row.")


def ablations(dataset: str, published: Mapping[str, Any], changed: Results) -> Table:
    """LiBI with one thing changed, minus LiBI as published, on the same draws: both restarts chosen by their own objective."""
    keys = {"exact LL": "exact", "S-kNN": "smooth k-NN", "IS minus exact LL": (gap := "importance-sampled minus exact")}
    base = published["selections"][OWN]["sets"]
    values = [shown(cell(published, OWN, key)) for key in keys.values()]
    rows = [["published", *values, values[-1], _seconds(published)]]
    for name, result in changed.items():
        sets = result["selections"][OWN]["sets"]
        pairs = [(a, b) for a, b in zip(sets, base, strict=True) if a is not None and b is not None]
        paired = [mean_of([a[key] - b[key] for a, b in pairs]) for key in keys.values()]
        rows.append([name, *map(shown, paired), shown(cell(result, OWN, gap)), _seconds(result)])
    caption = (
        "Below the first row: paired differences to it, mean ± standard error over the data sets; in the last columns, values."
    )
    header = ["", *keys, "its value", "seconds of training"]
    return Table(f"{dataset}: LiBI with one thing changed", header, rows, caption)


def _seconds(result: Mapping[str, Any]) -> str:
    return f"{result['seconds']['training']:.0f}"


def times(results: Mapping[str, Results]) -> Table:
    """Seconds, and the settings that were chosen."""
    rows = []
    for dataset, of_methods in results.items():
        for method, result in of_methods.items():
            if method == TRUTH:
                rows.append([dataset, "ground truth", "", "", "", f"{result['seconds']:.0f}"])
                continue
            identity, seconds = result["identity"], result["seconds"]
            training = ", ".join(f"{k} {v}" for k, v in identity["training"].items())
            chosen = result["selections"][OWN]["settings"]
            settings = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in chosen.items())
            count = str(len(identity["grid"]))
            rows.append(
                [dataset, LABELS[method], settings, count, training, f"{seconds['training']:.0f} + {seconds['measuring']:.0f}"]
            )
    header = ["data set", "method", "setting chosen", "of", "training", "seconds: training + measuring"]
    return Table("Settings and times", header, rows, "")


def all_tables(results: Mapping[str, Results]) -> list[Table]:
    """Of every data set: Table 1 by either selection, and the codes."""
    tables = [table1(dataset, of, selection) for selection in SELECTIONS for dataset, of in results.items()]
    return [*tables, *(codes(dataset, of) for dataset, of in results.items())]
