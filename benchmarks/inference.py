"""LiBI's step 2 by draws from p(z | x) against the ELBO: importance-sampled minus exact log-likelihood of test rows, paired.

On each data set step 1 is fitted once, and q is learned from its encoder for that model in every way: three kinds of q, of the
paper's network with its last layer as wide as each needs, by three objectives. The values are importance-sampled as published
(S = 5000, variance doubled), with q as it is, and with a tenth of the prior.

Step 1 has fewer restarts and epochs than ``python -m benchmarks nonlinear``, which asks how near the truth it comes: here the
exact value is that of the fitted model, whatever it is. The settings were chosen on the data sets of seeds 0 to 4 (and
Gaussian's of 100 to 104, an earlier table's, where Adam's jumps came to light); those of SEEDS were used for this table alone.
"""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import libi_fast as lf
from benchmarks import report
from benchmarks.accuracy import mean_and_error
from libi_fast.errors import ParetoWarning
from libi_fast.training.grid import train_batches
from libi_fast.training.inference import InferenceFit
from libi_fast.training.options import FitOptions

SEEDS = range(105, 110)
STEP1: dict[str, dict[str, Any]] = {
    "CubicJTEx": {"epochs": 12_000, "restarts": 24, "survivors": 3},
    "Mobius": {"epochs": 6000, "restarts": 8, "survivors": 2},
    "LinearJTEx": {"epochs": 3000, "restarts": 3},
    "Gaussian": {"epochs": 6000, "restarts": 3},
}  # of both steps: step 1 has two thirds of the epochs
STEP2: dict[str, dict[str, Any]] = {
    "CubicJTEx": {"epochs": 3000, "learning_rate": 0.01},
    "Mobius": {"epochs": 1500, "learning_rate": 0.01},
    "LinearJTEx": {"epochs": 1000, "learning_rate": 0.01},
    "Gaussian": {"epochs": 1000, "learning_rate": 0.01},
}
KINDS = {"mean-field": 1, "full covariance": 1, "2 Gaussians": 2}
OBJECTIVES = ("elbo", "posterior", "elbo+posterior")  # the last of mean-field alone
SAMPLER = "simulated+sir"
WORKERS = 2
SAMPLES, INFLATION = 5000, 2.0
ROWS = 200  # of each test set
KEPT = Path("build", "inference")  # what is done, so that a run that was cut off goes on
TARGET = 0.05  # nats
GAP, PAIRED = "importance-sampled minus exact LL", "minus that by the ELBO"
PLAIN, DEFENSIVE = "the same, variance not doubled", "the same, a tenth of the prior"
RELIABLE = "share of rows with Pareto k < 0.7"


class LikelihoodOnly(lf.LiBI):
    """Step 1 alone."""

    def _step2(self, run: Any, epochs: int, first: bool) -> list[Any]:
        return []


def of_kind(kind: str, mean_field: lf.MeanFieldGaussian) -> Any:
    """An inference model with the network of a mean-field one, its last layer as wide as it needs."""
    network = copy.deepcopy(mean_field.network)
    layers = network if isinstance(network, nn.Sequential) else nn.Sequential(network)
    last, latent_dim = layers[-1], mean_field.network[-1].out_features // 2 if len(layers) > 1 else network.out_features // 2
    widths = {"mean-field": 2 * latent_dim, "full covariance": latent_dim * (latent_dim + 3) // 2}
    full = 1 + widths["full covariance"]
    width = widths.get(kind, KINDS[kind] * full)
    new = nn.Linear(last.in_features, width, dtype=last.weight.dtype)
    made = nn.Sequential(*layers[:-1], new)
    if kind == "mean-field":
        return lf.MeanFieldGaussian(made)
    return lf.FullCovarianceGaussian(made) if kind == "full covariance" else lf.MixtureGaussian(made, KINDS[kind])


def learned(fitted: list[Any], sets: list[Any], kind: str, objective: str, sampler: str, options: dict[str, Any]) -> list[Any]:
    """q of every data set, from the encoder of its step 1; all of them side by side."""
    torch.manual_seed(0)
    start = of_kind(kind, fitted[0].system.inference)
    row = [
        InferenceFit(
            f.model, copy.deepcopy(start), Encoder(f.system.inference), objective=objective, sampler=sampler, num_samples=64
        )
        for f in fitted
    ]  # fmt: skip
    train_batches(
        [[row]], [(d.train, d.validation) for d in sets], FitOptions(**options, seed=0, warm_start=True, progress=False)
    )
    return [r.system.inference for r in row]


class Encoder(nn.Module):
    """The mean of a mean-field q."""

    def __init__(self, q: lf.MeanFieldGaussian):
        super().__init__()
        network = copy.deepcopy(q.network)
        self.network = network if isinstance(network, nn.Sequential) else nn.Sequential(network)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).chunk(2, -1)[0]


def measure(model: lf.LatentVariableModel, x: Tensor, q: Any, exact: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ParetoWarning)  # the table says it
        for label, proposal, inflation in (
            (GAP, q(x), INFLATION),
            (PLAIN, q(x), 1.0),
            (DEFENSIVE, lf.Defensive(q(x)), INFLATION),
        ):
            result = lf.log_likelihood(model, x, proposal, SAMPLES, inflation, seed=0)
            found[label] = (result.log_likelihood - exact).mean().item()
            if label == GAP:
                found[RELIABLE] = (result.pareto_k < 0.7).double().mean().item()
    return found


def first_step(name: str) -> tuple[list[Any], list[Any], float]:
    """LiBI's step 1 on every data set, the data sets, and the seconds that it took; from a file once it was made."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    sets = [lf.data.load(name, seed=s) for s in SEEDS]
    for data in sets:
        data.test = data.test[:ROWS]
    libi = LikelihoodOnly(sets[0].model(), sets[0].inference(), repeats=1, candidates=2)
    kept = KEPT / f"{name}.pt"
    if kept.exists():
        seconds, states = torch.load(kept)
        fitted = [copy.deepcopy(libi) for _ in sets]
        for one, state in zip(fitted, states, strict=True):
            one.load_state(state)
    else:
        (fitted,) = lf.fit_grid([libi], sets, **STEP1[name], seed=0, progress=False)
        seconds = time.perf_counter() - start
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save((seconds, [one.state() for one in fitted]), kept)
    return fitted, sets, seconds


def exact_values(name: str, fitted: list[Any], sets: list[Any]) -> list[Tensor]:
    """log p(x) of each model's test rows, float64."""
    kept = KEPT / f"{name}-exact.pt"
    if not kept.exists():
        exact = lf.exact_log_likelihood if name in ("LinearJTEx", "Gaussian") else lf.quadrature_log_likelihood
        found = [exact(in_double(f.model), d.test.double()) for f, d in zip(fitted, sets, strict=True)]
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, kept)
    return torch.load(kept)


def in_double(model: Any) -> Any:
    """What is measured is q, not rounding."""
    return copy.deepcopy(model).double()


def prepare(name: str) -> float:
    fitted, sets, seconds = first_step(name)
    exact_values(name, fitted, sets)
    return seconds


def compare(name: str, kind: str) -> dict[str, Any]:
    """Every objective for one kind of q on the data sets of one name; from a file once it was measured with these settings."""
    kept = KEPT / f"{name}, {kind}.json"
    settings = [STEP1[name], STEP2[name], SAMPLER, SAMPLES, INFLATION, ROWS]
    if kept.exists():
        before, table = json.loads(kept.read_text())
        if before == settings:
            return table
    fitted, sets, _ = first_step(name)
    exact = exact_values(name, fitted, sets)
    table = {}
    for objective in OBJECTIVES if kind == "mean-field" else OBJECTIVES[:2]:
        start = time.perf_counter()
        qs = learned(fitted, sets, kind, objective, SAMPLER, STEP2[name])
        seconds = time.perf_counter() - start
        each = [
            measure(in_double(f.model), d.test.double(), q.double(), e)
            for f, d, q, e in zip(fitted, sets, qs, exact, strict=True)
        ]  # fmt: skip
        row: dict[str, Any] = {label: mean_and_error([f[label] for f in each]) for label in (GAP, PLAIN, DEFENSIVE)}
        row[RELIABLE] = math.fsum(f[RELIABLE] for f in each) / len(each)
        row["parameters of q"] = sum(p.numel() for p in qs[0].parameters())
        row["seconds"] = seconds
        if objective != "elbo":
            base = table[f"{kind}, elbo"][GAP]["each"]
            row[PAIRED] = mean_and_error([a - b for a, b in zip(row[GAP]["each"], base, strict=True)])
        table[f"{kind}, {objective}"] = row
        print(f"{name}, {kind}, {objective}: {row[GAP]['mean']:.4f}, {seconds:.0f} s", flush=True)
    kept.write_text(json.dumps([settings, table]))
    return table


def run(names: Sequence[str] = tuple(STEP1)) -> dict[str, Any]:
    """``names``: the data sets, all by default; they may be done one by one, as what is done lies in KEPT."""
    ways = [(name, kind) for name in names for kind in KINDS]
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:  # one thread each
        seconds = dict(zip(names, pool.map(prepare, names), strict=True))
        found = dict(zip(ways, pool.map(compare, *zip(*ways, strict=True)), strict=True))
    results: dict[str, Any] = {}
    for name in names:
        table = {way: row for kind in KINDS for way, row in found[name, kind].items()}
        report.table(
            f"{name}: {GAP}, nats a row (S = {SAMPLES}, variance doubled)",
            ["q, objective", "mean", "+-", PAIRED, "+-", "k < 0.7"],
            [
                [way, format(row[GAP]["mean"], ".4f"), format(row[GAP]["standard error"], ".4f"),
                 *([format(row[PAIRED][part], ".4f") for part in ("mean", "standard error")] if PAIRED in row else ["", ""]),
                 format(row[RELIABLE], ".0%")]
                for way, row in table.items()
            ],
        )  # fmt: skip
        smallest = next((kind for kind in KINDS if abs(table[f"{kind}, posterior"][GAP]["mean"]) < TARGET), None)
        results[name] = {
            "step 1": STEP1[name], "step 2": STEP2[name], "seconds of step 1": seconds[name],
            f"smallest q within {TARGET} nats": smallest, "ways": table,
        }  # fmt: skip
    settings = {
        "data sets": list(SEEDS),
        "sampler": SAMPLER,
        "test rows of each set": ROWS,
        "samples": SAMPLES,
        "variance inflation": INFLATION,
    }
    return {**settings, **results}
