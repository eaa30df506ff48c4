"""What every way of training shares: fit, evaluate, sample, encode, save, load."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from libi_fast.data import Standardizer
from libi_fast.errors import InputError, ParetoWarning
from libi_fast.estimators import LogLikelihood, log_likelihood
from libi_fast.models.model import LatentVariableModel, MeanField, evaluation_mode
from libi_fast.models.networks import describe
from libi_fast.models.proposals import Proposal
from libi_fast.ops.random import as_seed
from libi_fast.training import distributed
from libi_fast.training.batches import Batches, as_rows, forget_pages
from libi_fast.training.distributed import Rows
from libi_fast.training.fused import Objective
from libi_fast.training.objectives import elbo_terms
from libi_fast.training.options import FitOptions
from libi_fast.training.replicas import Replicas, System, make_system
from libi_fast.training.run import Phase, Run, Stage, Terms, total
from libi_fast.training.start import start_std, whiten_codes

BLOCK = 2**22  # numbers of data evaluated at once, and rows at most
BLOCK_ROWS = 2**16


def fit_decoder(run: Run, epochs: int) -> Phase:
    """Train the generative model alone, on the codes as they are."""

    def on_frozen_codes(rows: Rows, step: int) -> Terms:
        with torch.no_grad():
            z = run.replicas.codes(rows.values)
        return {"reconstruction": -rows.mean(run.replicas.log_prob(rows.values, z))}

    return Phase("warm-up", epochs, ("model.",), on_frozen_codes, decay=False, objective=Objective("reconstruction"))


@torch.no_grad()
def elbo_at_start(run: Run) -> Tensor:
    """-ELBO of the training rows as things stand, [R]."""

    def terms() -> Terms:
        rows = run.train
        return elbo_terms(run.replicas, rows, run.noise(rows, 1, run.step))

    return total(run.in_blocks(terms))


class Method:
    """Base of LiBI, VAE and IWAE.

    Args:
        model: a ``LatentVariableModel``, or a factory of one called once a restart.
        inference: a ``MeanFieldGaussian``, ``FullCovarianceGaussian`` or ``MixtureGaussian``, or a factory.
    """

    name = ""
    weights: tuple[str, ...] = ()  # settings that are numbers in the objective: they may differ between replicas of one batch

    def __init__(self, model: Any, inference: Any, encoder: Any = None, **settings: Any):
        if inference is None:
            raise TypeError(f"{type(self).__name__} needs inference=lf.MeanFieldGaussian(network)")
        self._sources = (model, inference, encoder)
        self.settings = settings
        self.history: list[dict[str, Any]] = []
        self.data: dict[str, Any] = {}  # notes on the data, from the run folder
        self.training: dict[str, Any] = {}  # the arguments of fit
        self.restart_states: list[dict[str, Tensor]] = []  # as state(), where fit was asked to keep them
        self.standardizer: Standardizer | None = None
        self.columns: list[str] | None = None
        self.system = make_system(model, inference, encoder, 0, fresh=False)

    @property
    def model(self) -> LatentVariableModel:
        return self.system.model

    # --- training ---

    def fit(
        self, train: Any, validation: Any = None, *, epochs: int = 30_000, restarts: int = 1, survivors: int | None = None,
        seed: int = 0, batch_size: int | None = None, learning_rate: float = 0.01, tolerance: float | None = None,
        patience: int = 200, standardize: bool = False, columns: list[str] | None = None, early_stopping: bool = False,
        warm_start: bool = False, autocast: str | None = None, memory: int = 2**30, keep_restarts: bool = False,
        checkpoint: str | PathLike[str] | None = None, checkpoint_seconds: float = 30.0, resume: bool = False,
        log_dir: str | PathLike[str] | None = None, progress: bool = True,
    ) -> Method:  # fmt: skip
        """Train; the modules passed to the constructor end up with the best restart's parameters.

        Args:
            train: [N, D] tensor or array, a Dataset, or a DataLoader (its batches are rows, or tuples whose first item is).
                With ``batch_size``, a memory-mapped array may be larger than memory: rows are read as they are needed.
            validation: [M, D]; selects among restarts (and LiBI's repeats). None selects on (a look at) train.
            epochs: passes over train, in all; restarts: trained side by side, each from parameters of its own.
            survivors: restarts that train to the end; the others are dropped half by half within the first quarter of the
                first main phase, those with the worst held-out objectives first (successive halving). None keeps all.
            seed: 0 .. 2^64 - 1; governs initial parameters, noise and the order of minibatches.
            batch_size: rows a minibatch; None is full batch.
            learning_rate: Adam's; constant, then cosine decay over the second half.
            tolerance: stop early once the objective's mean over ``patience`` epochs falls by no more than this (nats a row).
            standardize: train on columns of mean 0 and sd 1; results stay in the data's own units.
            early_stopping: end each phase where its held-out objective was lowest. For flexible networks on few rows; on the
                paper's small models the last step is better (50 noisy looks find a transient that suits the validation rows).
            warm_start: begin from the modules' present parameters (one restart only).
            autocast: 'bfloat16' is the type of the networks' matrix products and what follows them; log-weights, statistics,
                parameters and Adam stay in float32.
            memory: bytes that activations and gradients may take, about; restarts that need more are worked on in blocks of 16
                or a multiple. More than 16 are always filled up to such a multiple, and the result has the same bits in
                any blocks (on the CPU with up to 2 threads; a network with dropout draws other masks).
            keep_restarts: keep what every restart that was left ended with in ``restart_states``, to choose by something else.
            checkpoint: a file that is replaced every ``checkpoint_seconds`` at the end of an epoch and deleted once training
                has ended. resume: go on from it where it exists; on the same machine and as many threads the result has the
                bits of a run that was never cut off.
            log_dir: a folder for TensorBoard's event files (needs the package tensorboard).
            progress: show a bar.

        On the CPU small networks of known layers train by a compiled kernel, in full batch: faster, the same to rounding.

        Under torch.distributed (torchrun) every process calls this with the same arguments and trains on its part of each
        batch, with the draws, the codes' statistics and the result of one process; a DataLoader gives each process its own
        part.

        Returns:
            self.

        Raises:
            InputError: data, sizes or settings that do not fit; TypeError: wrong types;
            FloatingPointError: every restart became non-finite (phase, epoch, restart and term named). A single restart that
            does so is warned about and noted in ``history``, and the others go on.
        """
        from libi_fast.training.grid import train_batches

        options = FitOptions(
            epochs=epochs, restarts=restarts, survivors=survivors, seed=seed, batch_size=batch_size,
            learning_rate=learning_rate, tolerance=tolerance, patience=patience, standardize=standardize, columns=columns,
            early_stopping=early_stopping, warm_start=warm_start, autocast=autocast, memory=memory,
            keep_restarts=keep_restarts, checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, resume=resume,
            log_dir=log_dir, progress=progress,
        )  # fmt: skip
        train_batches([[[self]]], [(train, validation)], options)
        return self

    @property
    def label(self) -> str:
        return type(self).__name__

    def codes_a_row(self, rows: int) -> float:
        """How many codes of a row training decodes at once, for planning memory."""
        return self.settings.get("num_samples", 1)

    def weight(self, name: str, replicas: Replicas) -> Any:
        """One of ``weights``: of each replica [R] in a grid, else this method's own number."""
        return replicas.own.get(name, self.settings[name])

    def _systems(self, restarts: int, seed: int) -> list[System]:
        """The systems training begins with."""
        return [make_system(*self._sources, (seed + 1_000_003 * r) % 2**63, fresh=True) for r in range(restarts)]

    def _stages(self, run: Run, epochs: int) -> list[Stage]:
        """The method's program, which leaves the best parameters of every replica and their held-out objectives (lower is
        better) in ``run.best`` and ``run.scores``. It depends on settings and arguments alone."""
        raise NotImplementedError

    def _start(self, run: Run, epochs: int) -> tuple[list[Stage], int]:
        """The start of methods that train both models at once, by their settings ``whiten`` and ``warm_up``; epochs left."""
        if run.options.warm_start:
            return [], epochs
        warm_up = min(self.settings["warm_up"], epochs // 6)
        stages: list[Stage] = []
        if self.settings["whiten"]:
            stages += [lambda run: whiten_codes(run.replicas, "inference.", run.train.values)]
        if warm_up:
            stages += [fit_decoder(run, warm_up), lambda run: start_std(run.replicas, lambda: elbo_at_start(run))]
        return stages, epochs - warm_up

    def _check_epochs(self, epochs: int) -> None:
        """Raise InputError for too few epochs."""

    def _check_batches(self, batches: Batches) -> None:
        """Raise InputError for batches too small for the method."""

    @torch.no_grad()
    def _check_inference(self, x: Tensor) -> None:
        try:
            with evaluation_mode(self.system):
                q = self.system.inference(x)
                codes = self.system.codes(x)
        except RuntimeError as error:
            raise InputError(f"the inference network does not take rows of {x.shape[1]} columns: {error}") from error
        expected = (len(x), self.model.latent_dim)
        parts = {"mean": q.mean, "log_std": q.log_std} if isinstance(q, MeanField) else {"mean": q.expectation()}
        for label, value in {**parts, "encoder": codes}.items():
            if value.shape != expected:
                raise InputError(
                    f"the inference model's {label} has shape {tuple(value.shape)} for {len(x)} rows; latent_dim = "
                    f"{self.model.latent_dim} wants {expected}"
                )

    def _inward(self, x: Tensor, standardizer: Standardizer | None) -> Tensor:
        """Data as the model sees it: standardised where that was asked for, in the model's dtype."""
        return (x if standardizer is None else standardizer.transform(x)).to(self.model.dtype)

    # --- use ---

    def _rows(self, x: Any, start: int = 0) -> Tensor:
        like = torch.empty(0, dtype=torch.float64, device=self.model.device)
        rows = as_rows(x, like, f"x, from row {start} on," if start else "x")
        if self.standardizer is not None:
            expected = len(self.standardizer.mean)
            if rows.shape[1] != expected:
                raise InputError(f"x has {rows.shape[1]} columns, but the model was trained on {expected}")
        return self._inward(rows, self.standardizer)

    @torch.no_grad()
    def log_likelihood(
        self, x: Any, num_samples: int = 5000, variance_inflation: float = 2.0, seed: int | None = 0, first_row: int = 0,
        **options: Any,
    ) -> LogLikelihood:  # fmt: skip
        """Importance-sampled log p(x) of every row as the paper reports it (Eq 48), in the data's own units.

        Rows are taken in blocks, so a memory-mapped array may be larger than memory. Under torch.distributed every process
        passes the same rows, does its part of them and returns the whole, with the draws of one process.

        Args, Returns, Raises: as :func:`libi_fast.log_likelihood` with q(z|x) as the proposal.
        """
        shift = 0.0 if self.standardizer is None else self.standardizer.log_abs_det
        key = as_seed(seed, self.model.device)
        results = []
        for start, rows in self._blocks(x):
            with evaluation_mode(self.system), warnings.catch_warnings():
                warnings.simplefilter("ignore", ParetoWarning)  # k is returned, for all blocks of rows together
                q = self._posterior(rows)
                own = {**options, "seed": key, "first_row": first_row + start}
                result = log_likelihood(self.model, rows, q, num_samples, variance_inflation, **own)
            results.append(torch.stack([v for v in result if v is not None], 1))
        empty = torch.empty(0, 4 if options.get("pareto") is not False else 3, dtype=self.model.dtype, device=self.model.device)
        columns = distributed.gather_rows(torch.cat([*results, empty])).unbind(1)
        shape = columns[3] if len(columns) > 3 else None
        return LogLikelihood(columns[0] - shift, columns[1], columns[2], shape)

    def _blocks(self, x: Any) -> Iterator[tuple[int, Tensor]]:
        """This process's rows as (index of the first, rows as the model sees them)."""
        part = distributed.shard(len(x) if hasattr(x, "__len__") else 0)
        size = max(1, min(BLOCK_ROWS, BLOCK // max(1, math.prod(getattr(x, "shape", (0,))[1:]))))
        if part.stop - part.start <= size and not distributed.active():
            yield 0, self._rows(x)
            return
        for start in range(part.start, part.stop, size):
            yield start, self._rows(x[start : min(start + size, part.stop)], start)
            forget_pages(x)

    def _posterior(self, rows: Tensor) -> MeanField | Proposal:
        try:
            return self.system.inference(rows)
        except RuntimeError as error:
            raise InputError(f"the inference network does not take rows of {rows.shape[1]} columns: {error}") from error

    @torch.no_grad()
    def posterior(self, x: Any) -> Any:
        """q(z|x) of every row: of a mean-field model mean and log_std, [N, L], else a :class:`libi_fast.Proposal`."""
        with evaluation_mode(self.system):
            return self._posterior(self._rows(x))

    def codes(self, x: Any) -> Tensor:
        """The posterior means, [N, L]."""
        return self.posterior(x).expectation()

    def sample(self, n: int, seed: int | None = None) -> Tensor:
        """n draws from p(x), [n, D], in the data's own units."""
        with evaluation_mode(self.system):
            draws = self.model.sample(n, seed)
        return draws if self.standardizer is None else self.standardizer.inverse(draws.double()).to(draws.dtype)

    # --- keeping ---

    def config(self) -> dict[str, Any]:
        """A JSON-able account of the method: everything but the weights."""
        network = self.system.inference.network
        return {
            "method": self.name,
            "settings": {k: [c.config() for c in v] if k == "constraints" else v for k, v in self.settings.items()},
            "model": self.model.config(),
            "inference": describe(network) or {"custom": type(network).__name__},
            "inference_model": self.system.inference.config(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "columns": self.columns,
            "standardizer": None if self.standardizer is None else self.standardizer.to_config(),
        }

    def state(self) -> dict[str, Tensor]:
        """Every tensor of generative and inference model, by name."""
        return {k: v.detach().contiguous() for k, v in self._kept().state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Raises InputError where names or shapes do not fit."""
        try:
            self._kept().load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"weights do not fit the model: {' '.join(str(error).split())}") from error

    def _kept(self) -> System:
        return System(self.system.model, self.system.inference)

    def save(self, folder: Any, force: bool = False) -> None:
        """Write a run folder (config.json, weights.safetensors, metrics.jsonl); ``lf.load(folder)`` reads it back.

        Raises:
            InputError: the folder exists and ``force`` is not set.
        """
        from libi_fast import runs

        runs.save(self, folder, force=force)
