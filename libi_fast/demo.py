"""``libi-fast demo``: LiBI beside a converged VAE on LinearJTEx, the paper's smallest example of what goes wrong.

p(x) is Gaussian whatever the decoder, so the likelihood of every model here is known exactly. The VAE gives up
likelihood for posteriors that its mean-field q can match; LiBI fits the decoder first, and q to it afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libi_fast import console, figures, runs
from libi_fast.data import LinearJTEx
from libi_fast.ops.henze_zirkler import henze_zirkler
from libi_fast.ops.random import Stream, philox_normal

PICTURE, RESULTS = "demo.png", "results.json"
FOLDERS = {"LiBI": "libi", "VAE": "vae"}
OURS = frozenset({*FOLDERS.values(), PICTURE, RESULTS})
TRUTH = "ground truth"
NUM_SAMPLES = 5000
TRAINING: dict[str, Any] = {"epochs": 6000, "restarts": 5, "learning_rate": 0.01}  # more epochs change no digit shown


@dataclass
class Outcome:
    """What the demo says of one method; log-likelihoods are nats, means over the test rows.

    Attributes:
        exact: in closed form.
        gap, gap_error: mean and standard error, over rows, of exact minus the ground truth's on the same row.
        population: what exact would be on endless test data.
        importance, importance_error: the estimate (S = 5000, q's variance doubled) and its Monte Carlo error.
        effective_sample_size: of that estimate, the median row's.
        hz, hz_p_value: the Henze-Zirkler test of one draw of q(z | x) a test row (the true codes, for the truth).
        code_mean, code_covariance: |mean| and ||Cov - I||_F of the same.
    """

    exact: float
    gap: float
    gap_error: float
    population: float
    importance: float | None
    importance_error: float | None
    effective_sample_size: float | None
    hz: float
    hz_p_value: float
    code_mean: float
    code_covariance: float


def run(out: str | PathLike[str], seed: int = 0, force: bool = False, progress: bool = True) -> dict[str, Outcome]:
    """Trains both, prints the table, and writes two run folders, results.json and demo.png to ``out``.

    Args:
        out: the folder. seed: of the data and the training. force: replace an earlier demo. progress: show bars.

    Returns:
        An Outcome for "LiBI", "VAE" and "ground truth".

    Raises:
        InputError: ``out`` exists and is not an earlier demo, or is one without ``force``; a missing optional package.
    """
    console.require_tables()
    runs.check_target(out, _is_demo, force=force)
    start = time.perf_counter()
    data = LinearJTEx(seed)
    with _one_thread():
        methods = _train(data, seed, progress)
    outcomes, panels = {}, []
    for name, method in methods.items():
        q = method.posterior(data.test)
        noise = philox_normal(seed, *q.mean.shape, stream=Stream.MODEL_SAMPLE, repetition=2)
        codes = q.mean + q.log_std.exp() * noise
        outcomes[name] = _outcome(data, method, codes)
        samples = method.sample(len(data.test), seed=seed)
        panels.append(figures.Panel(name, samples, *_marginal(method), codes))
    outcomes[TRUTH] = _outcome(data, None, data.test_codes)
    picture = figures.data_and_codes(data.test, data.test_codes, data.truth.covariance, panels)
    with runs.replacing(out, OURS, _is_demo, force=force) as folder:
        notes = {"name": data.name, "rows": {"train": 500, "validation": 500, "test": 500}, "seed": seed}
        for name, method in methods.items():
            runs.save(method, folder / FOLDERS[name], data=notes)
        results = {name: asdict(outcome) for name, outcome in outcomes.items()}
        (folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        figures.save(picture, folder / PICTURE)
    _print(outcomes, len(data.test), f"{time.perf_counter() - start:.0f} s; picture: {Path(out) / PICTURE}")
    return outcomes


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more threads, and on a busy machine wait for them: ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(data: LinearJTEx, seed: int, progress: bool) -> dict[str, Any]:
    import libi_fast as lf

    torch.manual_seed(seed)
    # One repeat (the paper's R = 1): with five restarts it reaches the truth, and more would share the same epochs.
    kinds: dict[str, Any] = {
        "LiBI": partial(lf.LiBI, repeats=1),
        "VAE": partial(lf.VAE, whiten=True, warm_up=300),  # the start from which it converges in these epochs
    }
    methods: dict[str, Any] = {}
    for name, kind in kinds.items():
        # The decoder has the truth's form with A unknown; noise and B are held, as in the paper.
        decoder = lf.JTExMap([0.006, 0.006])
        model = lf.LatentVariableModel(decoder, lf.DiagonalGaussian(data.noise_variance), data.latent_dim)
        q = lf.MeanFieldGaussian(lf.mlp(2, [], 2 * data.latent_dim))
        methods[name] = kind(model, inference=q)
    for method in methods.values():
        method.fit(data.train, data.validation, **TRAINING, seed=seed, columns=data.columns, progress=progress)
    return methods


def _marginal(method: Any) -> tuple[Tensor, Tensor]:
    from libi_fast.models.linear_gaussian import linear_gaussian_marginal

    return linear_gaussian_marginal(method.model)


def _outcome(data: LinearJTEx, method: Any | None, codes: Tensor) -> Outcome:
    """``method`` None is the ground truth."""
    from libi_fast.models.linear_gaussian import gaussian_log_density

    truth = data.truth.log_likelihood(data.test)
    estimate = None
    if method is None:
        exact, population = truth, data.truth.entropy_bound()
    else:
        mean, covariance = _marginal(method)
        exact = gaussian_log_density(data.test, mean, covariance)
        population = data.truth.expected_log_likelihood(mean, covariance)
        estimate = method.log_likelihood(data.test, num_samples=NUM_SAMPLES, variance_inflation=2.0, seed=0)
    gap = exact - truth
    n = len(gap)
    normality = henze_zirkler(codes.double())
    moments = torch.cov(codes.double().T, correction=0)
    return Outcome(
        exact=float(exact.mean()),
        gap=float(gap.mean()),
        gap_error=float(gap.std() / n**0.5),
        population=population,
        importance=None if estimate is None else float(estimate.log_likelihood.double().mean()),
        importance_error=None if estimate is None else float(estimate.standard_error.double().norm() / n),
        effective_sample_size=None if estimate is None else float(estimate.effective_sample_size.median()),
        hz=float(normality.statistic),
        hz_p_value=float(normality.p_value),
        code_mean=float(codes.double().mean(0).norm()),
        code_covariance=float(torch.linalg.matrix_norm(moments - torch.eye(codes.shape[1]))),
    )


def _print(outcomes: dict[str, Outcome], rows: int, caption: str) -> None:
    def both(value: float | None, error: float | None) -> str:
        return "" if value is None else f"{value:.3f} +- {error:.3f}"

    def whole(value: float | None) -> str:
        return "" if value is None else f"{value:.0f}"

    lines: list[tuple[str, Any]] = [  # short enough for 80 columns
        ("exact log-likelihood", lambda o: f"{o.exact:.3f}"),
        ("  truth on the same rows", lambda o: f"{o.exact - o.gap:.3f}"),
        ("  gap +- s.e. over rows", lambda o: "" if o is outcomes[TRUTH] else both(o.gap, o.gap_error)),
        ("  on endless test data", lambda o: f"{o.population:.3f}"),
        (f"importance, S = {NUM_SAMPLES}", lambda o: both(o.importance, o.importance_error)),
        ("  median effective size", lambda o: whole(o.effective_sample_size)),
        ("codes: HZ (p-value)", lambda o: f"{o.hz:.2f} ({o.hz_p_value:.2g})"),
        ("codes: |mean|", lambda o: f"{o.code_mean:.3f}"),
        ("codes: |Cov - I|_F", lambda o: f"{o.code_covariance:.3f}"),
    ]
    console.print_table(
        f"LinearJTEx, {rows} test rows, nats per row",
        ["", *outcomes],
        [[label, *(show(o) for o in outcomes.values())] for label, show in lines],
        caption,
    )


def _is_demo(folder: Path) -> bool:
    """An earlier demo: its two run folders are there."""
    return all(runs.is_run(folder / name) for name in FOLDERS.values())
