"""What is trained: methods, settings and epochs of each protocol, cut into pieces (a method on the five draws of a data set).

Settings were chosen on the data sets of seeds 0 to 4; those of FINAL_SEEDS serve the final table alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import libi_fast as lf
from libi_fast.data.synthetic import SyntheticDataset
from libi_fast.errors import InputError
from libi_fast.reproduce import published
from libi_fast.reproduce.published import DATASETS

FINAL_SEEDS = tuple(range(100, 100 + published.SETS))
METHODS = (*published.METHODS, "ours")
LINEAR = ("LinearJTEx", "Gaussian")

# The paper leaves the start open. Without this one the bounds do not converge where the noise variance is 1e-6.
START = {"whiten": True, "warm_up": 300}
PUBLISHED_LIBI = {"step1": "joint", "step2": "elbo", "candidates": 2}
OURS = {"step1": "quadrature", "step2": "posterior", "repeats": 1, "candidates": 2, "finalists": 1}
# What is changed of LiBI as published: of its settings, and of its training.
ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "codes not whitened": ({"whiten": False}, {}),
    "no warm-up": ({"warm_up": 0}, {}),
    "one candidate a restart": ({"candidates": 1}, {}),
    "one restart": ({}, {"restarts": 1, "survivors": 1}),
    "no halving": ({}, {"survivors": None}),
    "six repeats": ({"repeats": 6}, {}),
    "step 1 ends by quadrature": ({"step1": "quadrature", "likelihood_share": 0.05, "finalists": 1}, {}),
    "step 2 by draws": ({"step2": "posterior", "finalists": 1}, {}),
    "step 2 by draws, of four networks": ({"step2": "posterior", "finalists": 1, "inference_restarts": 4}, {}),
    "step 2 by draws, of wider pairs": ({"step2": "posterior", "finalists": 1, "simulated_std": 2.0}, {}),
}
KINDS: dict[str, Callable[..., Any]] = {
    "VAE": lf.VAE, "beta-VAE": lf.VAE, "annealing": lf.VAE, "lagging": lf.LaggingVAE, "LiBI": lf.LiBI, "ours": lf.LiBI,
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """One method on the draws of one data set: what is trained, measured and kept as a whole.

    Attributes:
        dataset, method: names. grid: keyword arguments of the method, a setting each. training: of ``fit_grid``.
    """

    dataset: str
    method: str
    grid: tuple[dict[str, Any], ...]
    training: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.dataset}.{self.method}"

    @property
    def cost(self) -> float:
        """In units that only order pieces."""
        weight = {"LinearJTEx": 1.0, "Gaussian": 1.0, "CubicJTEx": 2.0, "Mobius": 4.0}[self.dataset]
        kind = {"LiBI": 3.0, "ours": 10.0}.get(self.method, 3.0 if self.method in ABLATIONS else 1.0)
        return weight * kind * len(self.grid) * self.training["epochs"] * self.training["restarts"]

    def methods(self, data: SyntheticDataset, device: str = "cpu") -> list[Any]:
        """The methods of the grid, with fresh modules of the paper's architectures for ``data``."""
        model, q = data.model().to(device), data.inference().to(device)
        kind = KINDS.get(self.method, lf.LiBI)  # ablations are of LiBI
        return [kind(model, q, **settings) for settings in self.grid]


@dataclass(frozen=True)
class Protocol:
    """How much is done.

    Attributes:
        name: on the command line. seeds: of the data sets. rows: of train, validation and test each.
        grid, training: from (data set, method) to settings, and to arguments of ``fit_grid``.
        samples: of importance sampling. repetitions: of the smooth k-NN statistic. seed: of the training.
    """

    name: str
    grid: Callable[[str, str], Sequence[dict[str, Any]]]
    training: Callable[[str, str], dict[str, Any]]
    seeds: tuple[int, ...] = FINAL_SEEDS
    rows: int = 500
    samples: int = published.SAMPLES
    repetitions: int = published.REPETITIONS
    seed: int = 0
    datasets: tuple[str, ...] = DATASETS

    def piece(self, dataset: str, method: str) -> Piece:
        return Piece(dataset, method, tuple(self.grid(dataset, method)), self.training(dataset, method))

    def pieces(self) -> list[Piece]:
        return [self.piece(dataset, method) for dataset in self.datasets for method in METHODS]

    def ablations(self, dataset: str) -> list[Piece]:
        """LiBI in its setting of this protocol's grid, with one thing changed in each."""
        setting, training = self.grid(dataset, "LiBI")[0], self.training(dataset, "LiBI")
        return [
            Piece(dataset, name, ({**setting, **change},), {**training, **of_training})
            for name, (change, of_training) in ABLATIONS.items()
        ]

    def data(self, dataset: str) -> list[SyntheticDataset]:
        """The draws of a data set."""
        kind = {"LinearJTEx": lf.data.LinearJTEx, "CubicJTEx": lf.data.CubicJTEx, "Gaussian": lf.data.GaussianExample,
                "Mobius": lf.data.Mobius}[dataset]  # fmt: skip
        return [kind(seed, self.rows, self.rows, self.rows) for seed in self.seeds]


# --- settings ---


def one_setting(dataset: str, method: str) -> list[dict[str, Any]]:
    """Of the paper's grid one setting a method."""
    grids: dict[str, list[dict[str, Any]]] = {
        "VAE": [{"beta": 1.0, **START}],
        "beta-VAE": [{"beta": 2.0, **START}],
        "annealing": [{"beta": 1.0, "anneal": True, **START}],
        "lagging": [{"segments": published.SEGMENTS[dataset][0], **START}],
        "LiBI": [{"hz_weight": 1.0, "covariance_tolerance": 0.2, "mean_tolerance": 0.2, "repeats": 1, **PUBLISHED_LIBI}],
        "ours": [{**OURS, **OURS_OF[dataset]}],
    }
    return grids[method]


def full_grid(dataset: str, method: str) -> list[dict[str, Any]]:
    """The paper's."""
    grids: dict[str, list[dict[str, Any]]] = {
        "VAE": [{"beta": 1.0, **START}],
        "beta-VAE": [{"beta": beta, **START} for beta in published.BETAS],
        "annealing": [{"beta": beta, "anneal": True, **START} for beta in published.ANNEALED_BETAS],
        "lagging": [{"segments": segments, **START} for segments in published.SEGMENTS[dataset]],
        "LiBI": [
            {"hz_weight": w, "covariance_tolerance": c, "mean_tolerance": m, "repeats": r, **PUBLISHED_LIBI}
            for r in published.REPEATS
            for w in published.HZ_WEIGHTS[dataset]
            for c in published.TOLERANCES
            for m in published.TOLERANCES
        ],
        "ours": [{**OURS, **OURS_OF[dataset]}],
    }
    return grids[method]


# Epochs of both steps, restarts, and those that go on to the end of step 1's joint part.
OURS_TRAINING = {
    "LinearJTEx": (3000, 10, 5), "CubicJTEx": (8000, 20, 8), "Gaussian": (4500, 10, 5), "Mobius": (9600, 10, 4),
}  # fmt: skip
OURS_OF: dict[str, dict[str, Any]] = {
    "LinearJTEx": {"likelihood_share": 0.2},
    "CubicJTEx": {"likelihood_share": 0.12, "likelihood_rate": 0.3, "step1_share": 1 / 2, "inference_restarts": 4},
    "Gaussian": {"likelihood_share": 0.2},
    "Mobius": {
        "likelihood_share": 0.15, "likelihood_rate": 0.3, "decoder_precision": 100.0, "step1_share": 1 / 6,
        "inference_restarts": 3, "simulated_std": 2.0,
    },
}  # fmt: skip
QUICK_EPOCHS = {"LinearJTEx": 20_000, "CubicJTEx": 20_000, "Gaussian": 20_000, "Mobius": 16_000}


def of_ours(dataset: str) -> dict[str, Any]:
    return dict(zip(("epochs", "restarts", "survivors"), OURS_TRAINING[dataset], strict=True))


def quick_training(dataset: str, method: str) -> dict[str, Any]:
    if method == "ours":
        return of_ours(dataset)
    return {"epochs": QUICK_EPOCHS[dataset], "restarts": published.RESTARTS, "survivors": 4}


def paper_training(dataset: str, method: str) -> dict[str, Any]:
    if method == "ours":
        return of_ours(dataset)
    return {"epochs": published.EPOCHS, "restarts": published.RESTARTS}


def smoke_training(dataset: str, method: str) -> dict[str, Any]:
    return {"epochs": 40, "restarts": 2, "survivors": 1 if method == "ours" else 2}


def smoke_grid(dataset: str, method: str) -> list[dict[str, Any]]:
    """The quick protocol's, and for one method two settings."""
    grid = [{**settings, **({} if method == "lagging" else {"warm_up": 2})} for settings in one_setting(dataset, method)]
    if method == "lagging":
        grid = [{"segments": 5}]
    return [{**grid[0], "beta": beta} for beta in published.BETAS[:2]] if method == "beta-VAE" else grid


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("quick", one_setting, quick_training, repetitions=2000),
        Protocol("paper", full_grid, paper_training),
        Protocol(
            "smoke",
            smoke_grid,
            smoke_training,
            seeds=(0, 1),
            rows=30,
            samples=50,
            repetitions=3,
            datasets=("LinearJTEx", "CubicJTEx"),  # Mobius takes minutes of quadrature
        ),
    )
}


def find(name: str, first_seed: int | None = None) -> Protocol:
    """The protocol, on other data sets where a first seed is given. Raises InputError for an unknown name, a seed below 0."""
    if name not in PROTOCOLS:
        raise InputError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if first_seed is None:
        return protocol
    if first_seed < 0:
        raise InputError(f"the first seed must be at least 0, got {first_seed}")
    return dataclasses.replace(protocol, seeds=tuple(range(first_seed, first_seed + len(protocol.seeds))))
