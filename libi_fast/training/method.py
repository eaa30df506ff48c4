"""What every way of training shares: fit, evaluate, sample, encode, save, load."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from libi_fast.data import Standardizer
from libi_fast.errors import InputError
from libi_fast.estimators import LogLikelihood, log_likelihood
from libi_fast.models.model import LatentVariableModel, MeanField, evaluation_mode
from libi_fast.models.networks import describe
from libi_fast.ops.random import Stream, as_replicas, as_seed, philox_normal
from libi_fast.training import distributed
from libi_fast.training.optimise import Batches, Schedule, as_rows, optimise
from libi_fast.training.replicas import Loss, Replicas, System, chosen, make_system, torch_seed
from libi_fast.training.start import start_std, whiten_codes

VALIDATION_SAMPLES = 16


class Run:
    """One call of ``fit``: replicas, data, random numbers and the bar, handed to the method's phases."""

    def __init__(
        self, replicas: Replicas, batches: Batches, validation: Tensor, seed: Tensor, options: dict[str, Any], bar: tqdm
    ):
        self.replicas, self.batches, self.validation, self.seed, self.bar = replicas, batches, validation, seed, bar
        self.options = options
        self.restarts: int = options["restarts"]
        self.history: list[dict[str, Any]] = []
        self.step = 0
        self.fraction = 0.0  # of the present phase's epochs
        self.ids = as_replicas(replicas.count, seed.device)

    def phase(
        self, name: str, epochs: int, parameters: list[Tensor], loss: Loss,
        validate: Callable[[], dict[str, Tensor]] | None = None, decay: bool = True,
    ) -> Tensor:  # fmt: skip
        """Minimise ``loss`` over ``parameters`` for at most ``epochs`` epochs.

        ``validate`` gives the terms on held-out rows. Returns their sum as the phase ends, [R]; with early stopping each
        replica ends where that sum, looked at some 50 times, was lowest.
        """
        o, replicas = self.options, self.replicas
        stop_early = o["early_stopping"] and validate is not None
        best, scores = replicas.snapshot(), torch.full((replicas.count,), math.inf, dtype=replicas.dtype)

        @torch.no_grad()
        def held_out() -> Tensor:
            assert validate is not None
            with evaluation_mode(replicas.template):
                return torch.stack(list(validate().values())).sum(0)

        def record(entry: dict[str, Any]) -> None:
            nonlocal best, scores
            if stop_early:
                value = held_out()
                better = value < scores
                best, scores = chosen(better, replicas.snapshot(), best), torch.where(better, value, scores)
                entry["validation"] = value.tolist()
            self.history.append(entry)

        if epochs >= 1 and parameters:
            schedule = Schedule(epochs, o["learning_rate"], o["tolerance"], o["patience"], decay)
            done = 0

            self.fraction = 0.0

            def tick(objective: float) -> None:
                nonlocal done
                done += 1
                self.fraction = done / epochs
                self.bar.update(1)
                if not math.isnan(objective):
                    self.bar.set_postfix_str(f"{name} {objective:.4g}", refresh=False)

            self.step = optimise(parameters, loss, self.batches, schedule, name, self.step, record, tick)
            self.bar.update(epochs - done)  # converged early: the bar jumps
            if stop_early:
                replicas.restore(best)
        return scores if validate is None else held_out()

    def fit_decoder(self, epochs: int) -> None:
        """Train the generative model alone, on the codes as they are."""

        def on_frozen_codes(x: Tensor, step: int) -> dict[str, Tensor]:
            with torch.no_grad():
                z = self.replicas.codes(x)
            return {"reconstruction": -self.replicas.log_prob(x, z).mean(-1)}

        self.phase("warm-up", epochs, self.replicas.group("model."), on_frozen_codes, decay=False)

    @torch.no_grad()
    def elbo_at_start(self) -> Tensor:
        """-ELBO of the training rows as things stand, [R]."""
        x, latent_dim = self.batches.rows, self.replicas.template.model.latent_dim
        return torch.stack(list(elbo_terms(self.replicas, x, self.noise(len(x), 1, latent_dim, self.step)).values())).sum(0)

    def start_whole(self, whiten: bool, warm_up: int, epochs: int) -> int:
        """The start of methods that train both models at once; returns the epochs left."""
        if self.options["warm_start"]:
            return epochs
        if whiten:
            whiten_codes(self.replicas, "inference.", self.batches.rows)
        warm_up = min(warm_up, epochs // 6)
        if warm_up:
            self.fit_decoder(warm_up)
            start_std(self.replicas, self.elbo_at_start)
        return epochs - warm_up

    def validation_noise(self, latent_dim: int) -> Callable[[], Tensor]:
        """The same draws at every look, so that looks differ by the parameters alone."""
        return self.noise(len(self.validation), VALIDATION_SAMPLES, latent_dim, 2**32 - 1)

    def keep(self, index: Tensor) -> None:
        """Go on with the replicas of ``index`` alone; they keep their random numbers."""
        self.replicas.select(index)
        self.ids = self.ids[index]

    def noise(self, rows: int, samples: int, latent_dim: int, repetition: int) -> Callable[[], Tensor]:
        """Draws standard normal [R, rows, samples, L] for one step; independent between steps and replicas."""

        def draw() -> Tensor:
            draws = philox_normal(
                self.seed, rows, samples * latent_dim, replicas=self.ids, repetition=repetition, stream=Stream.TRAINING,
                dtype=self.replicas.dtype,
            )  # fmt: skip
            return draws.unflatten(-1, (samples, latent_dim))

        return draw


def elbo_terms(
    replicas: Replicas, x: Tensor, noise: Callable[[], Tensor], beta: float | Tensor = 1.0
) -> dict[str, Tensor]:  # fmt: skip
    """The terms of -ELBO, each [R]; x [B, D], noise() [R, B, S, L]. The KL term is in closed form, the reconstruction too
    where the model is linear-Gaussian: at noise variances of 1e-6 draws alone keep a VAE from converging."""
    q = replicas.posterior(x)
    reconstruction = -replicas.expected_log_prob(x, q, noise).mean(-1)
    return {"reconstruction": reconstruction, "kl": beta * q.kl_from_prior().mean(-1)}


class Method:
    """Base of LiBI, VAE and IWAE.

    Args:
        model: a ``LatentVariableModel``, or a factory of one called once a restart.
        inference: a ``MeanFieldGaussian``, or a factory.
    """

    name = ""

    def __init__(self, model: Any, inference: Any, encoder: Any = None, **settings: Any):
        if inference is None:
            raise TypeError(f"{type(self).__name__} needs inference=lf.MeanFieldGaussian(network)")
        self._sources = (model, inference, encoder)
        self.settings = settings
        self.history: list[dict[str, Any]] = []
        self.data: dict[str, Any] = {}  # notes on the data, from the run folder
        self.training: dict[str, Any] = {}  # the arguments of fit
        self.standardizer: Standardizer | None = None
        self.columns: list[str] | None = None
        self.system = make_system(model, inference, encoder, 0, fresh=False)

    @property
    def model(self) -> LatentVariableModel:
        return self.system.model

    # --- training ---

    def fit(
        self, train: Any, validation: Any = None, *, epochs: int = 30_000, restarts: int = 1, seed: int = 0,
        batch_size: int | None = None, learning_rate: float = 0.01, tolerance: float | None = None, patience: int = 200,
        standardize: bool = False, columns: list[str] | None = None, early_stopping: bool = False, warm_start: bool = False,
        progress: bool = True,
    ) -> Method:  # fmt: skip
        """Train; the modules passed to the constructor end up with the best restart's parameters.

        Args:
            train: [N, D] tensor or array, a Dataset, or a DataLoader (its batches are rows, or tuples whose first item is).
            validation: [M, D]; selects among restarts (and LiBI's repeats). None selects on (a look at) train.
            epochs: passes over train, in all; restarts: trained side by side, each from parameters of its own.
            seed: 0 .. 2^64 - 1; governs initial parameters, noise and the order of minibatches.
            batch_size: rows a minibatch; None is full batch.
            learning_rate: Adam's; constant, then cosine decay over the second half.
            tolerance: stop early once the objective's mean over ``patience`` epochs falls by no more than this (nats a row).
            standardize: train on columns of mean 0 and sd 1; results stay in the data's own units.
            early_stopping: end each phase where its held-out objective was lowest. For flexible networks on few rows; on the
                paper's small models the last step is better (50 noisy looks find a transient that suits the validation rows).
            warm_start: begin from the modules' present parameters (one restart only).
            progress: show a bar.

        Returns:
            self.

        Raises:
            InputError: data, sizes or settings that do not fit; TypeError: wrong types;
            FloatingPointError: every restart became non-finite (epoch and term named).
        """
        for label, value in {"epochs": epochs, "restarts": restarts, "patience": patience}.items():
            if value < 1:
                raise InputError(f"{label} must be at least 1, got {value}")
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise InputError(f"learning_rate must be positive and finite, got {learning_rate}")
        if tolerance is not None and not tolerance >= 0:
            raise InputError(f"tolerance must not be negative, got {tolerance}")
        if warm_start and restarts != 1:
            raise InputError("warm_start trains the modules as they are: restarts must be 1")
        if distributed.active():
            raise NotImplementedError(
                "fit runs in one process; under torch.distributed use LiBI.step1_terms and sum_gradients in a loop of your own"
            )
        self._check_epochs(epochs)
        key = as_seed(seed)
        like = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
        # Columns are standardised before they lose digits to the model's dtype.
        as_given = like.double() if standardize else like
        batches = Batches(train, batch_size, int(key) & (2**63 - 1), as_given)
        standardizer = Standardizer.fit(batches.rows, columns) if standardize else None

        def inward(x: Tensor) -> Tensor:
            return self._inward(x, standardizer)

        batches.apply(inward)
        held_out = batches.rows if validation is None else inward(as_rows(validation, as_given, "validation"))
        if held_out.shape[1] != batches.rows.shape[1]:
            raise InputError(f"validation has {held_out.shape[1]} columns but train has {batches.rows.shape[1]}")
        self.model.check(batches.rows)
        self.model.likelihood.check(held_out)
        self._check_inference(batches.rows[:2])
        self._check_batches(batches)
        replicas = Replicas([self.system] if warm_start else self._systems(restarts, int(key)))
        options = {
            "epochs": epochs, "restarts": restarts, "batch_size": batch_size, "learning_rate": learning_rate,
            "tolerance": tolerance, "patience": patience, "early_stopping": early_stopping, "warm_start": warm_start,
        }  # fmt: skip
        # Dropout and the like draw from torch's generator, which the seed governs within training.
        with tqdm(total=epochs, desc=self.label, unit="epoch", disable=not progress) as bar, torch_seed(int(key)):
            run = Run(replicas, batches, held_out, key, options, bar)
            best, scores = self._train(run, epochs)
        if not bool(torch.isfinite(scores).any()):
            raise FloatingPointError(f"{self.label}: no restart ended with a finite validation objective")
        winner = int(torch.where(torch.isfinite(scores), scores, math.inf).argmin())
        replicas.load_into(self.system, best, winner)
        run.history.append({"phase": "selection", "objective": scores.tolist(), "restart": winner})
        self.history, self.standardizer, self.columns = run.history, standardizer, columns
        self.training = {**options, "seed": seed, "standardize": standardize}
        return self

    @property
    def label(self) -> str:
        return type(self).__name__

    def _systems(self, restarts: int, seed: int) -> list[System]:
        """The systems training begins with."""
        return [make_system(*self._sources, (seed + 1_000_003 * r) % 2**63, fresh=True) for r in range(restarts)]

    def _train(self, run: Run, epochs: int) -> tuple[dict[str, Tensor], Tensor]:
        """The method's phases: the best parameters of every replica and their validation objectives [R] (lower is better)."""
        raise NotImplementedError

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
        for label, value in {"mean": q.mean, "log_std": q.log_std, "encoder": codes}.items():
            if value.shape != expected:
                raise InputError(
                    f"the inference model's {label} has shape {tuple(value.shape)} for {len(x)} rows; latent_dim = "
                    f"{self.model.latent_dim} wants {expected}"
                )

    def _inward(self, x: Tensor, standardizer: Standardizer | None) -> Tensor:
        """Data as the model sees it: standardised where that was asked for, in the model's dtype."""
        return (x if standardizer is None else standardizer.transform(x)).to(self.model.dtype)

    # --- use ---

    def _rows(self, x: Any) -> Tensor:
        like = torch.empty(0, dtype=torch.float64, device=self.model.device)
        rows = as_rows(x, like, "x")
        if self.standardizer is not None:
            expected = len(self.standardizer.mean)
            if rows.shape[1] != expected:
                raise InputError(f"x has {rows.shape[1]} columns, but the model was trained on {expected}")
        return self._inward(rows, self.standardizer)

    @torch.no_grad()
    def log_likelihood(
        self, x: Any, num_samples: int = 5000, variance_inflation: float = 2.0, seed: int | None = 0, **options: Any
    ) -> LogLikelihood:
        """Importance-sampled log p(x) of every row as the paper reports it (Eq 48), in the data's own units.

        Args, Returns, Raises: as :func:`libi_fast.log_likelihood` with q(z|x) as the proposal.
        """
        rows = self._rows(x)
        with evaluation_mode(self.system):
            q = self._posterior(rows)
            result = log_likelihood(self.model, rows, q, num_samples, variance_inflation, seed=seed, **options)
        shift = 0.0 if self.standardizer is None else self.standardizer.log_abs_det
        return result._replace(log_likelihood=result.log_likelihood - shift)

    def _posterior(self, rows: Tensor) -> MeanField:
        try:
            return self.system.inference(rows)
        except RuntimeError as error:
            raise InputError(f"the inference network does not take rows of {rows.shape[1]} columns: {error}") from error

    @torch.no_grad()
    def posterior(self, x: Any) -> MeanField:
        """q(z|x) of every row: mean and log_std, [N, L]."""
        with evaluation_mode(self.system):
            return self._posterior(self._rows(x))

    def codes(self, x: Any) -> Tensor:
        """The posterior means, [N, L]."""
        return self.posterior(x).mean

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
            "settings": self.settings,
            "model": self.model.config(),
            "inference": describe(network) or {"custom": type(network).__name__},
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
