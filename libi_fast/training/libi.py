"""LiBI: Likelihood Before Inference (Yacoby, Pan and Doshi-Velez 2020, Eqs 6-7 and 42-46)."""

from __future__ import annotations

import math
from typing import Any

from libi_fast.errors import InputError
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic
from libi_fast.training.batches import Batches
from libi_fast.training.constraints import moment_errors, safe_exp
from libi_fast.training.distributed import Rows
from libi_fast.training.method import Method, elbo_at_start, fit_decoder
from libi_fast.training.objectives import elbo_terms
from libi_fast.training.replicas import Replicas, System
from libi_fast.training.run import Phase, Run, Stage, Terms
from libi_fast.training.start import copy_encoder, mirror_codes, start_std, whiten_codes

STEP1_SHARE = 2 / 3  # of a repeat's epochs


class LiBI(Method):
    """Learn the generative model first, under constraints on its codes, then the inference model; repeat, keep the best.

    Step 1 minimises, over the decoder and the encoder z_n = h(x_n),
    ``-(1/N) sum log p(x_n | z_n) + hz_weight exp(HZ({z_n})) + exp(||Cov - I||_F^2 / covariance_tolerance)
    + exp(||mean||^2 / mean_tolerance)``. Step 2 minimises -ELBO over the inference network, the decoder fixed. Step 3 begins
    the next repeat with h = the mean of q.

    Args:
        model, inference: see :class:`Method`.
        encoder: a network of its own for h in the first step 1, of the inference network's architecture up to the last
            layer (L outputs); None uses the mean of q throughout, which is what the repeats do anyway.
        hz_weight, covariance_tolerance, mean_tolerance: the paper's eps_HZ, eps_Sigma, eps_mu.
        repeats: R.
        whiten: start with an encoder whose codes have mean 0 and covariance I (its last layer is rescaled).
        warm_up: epochs of the first step 1 in which the decoder alone learns, on frozen codes.
        candidates: short runs each restart begins with; the one whose held-out objective is best after ``warm_up`` epochs of
            step 1 goes on. They come in pairs whose codes mirror each other: codes of covariance I fall into two classes, of
            either orientation, that no path of full-rank codes joins, and a decoder may be able to serve only one.
        initial_std: q's standard deviation as step 2 begins (the paper leaves it open); None takes each restart's best of a
            geometric grid, because 0.05 is far too wide where the noise variance is 1e-6.

    Raises:
        InputError: a weight or tolerance that is not positive, repeats below 1, fewer rows a batch than the statistics need.
    """

    name = "libi"
    weights = ("hz_weight", "covariance_tolerance", "mean_tolerance")

    def __init__(
        self, model: Any, inference: Any, encoder: Any = None, hz_weight: float = 1.0, covariance_tolerance: float = 0.2,
        mean_tolerance: float = 0.2, repeats: int = 6, whiten: bool = True, warm_up: int = 300,
        candidates: int = 4, initial_std: float | None = None,
    ):  # fmt: skip
        for label, value in {
            "hz_weight": hz_weight,
            "covariance_tolerance": covariance_tolerance,
            "mean_tolerance": mean_tolerance,
        }.items():
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{label} must be positive and finite, got {value}")
        if initial_std is not None and not (math.isfinite(initial_std) and initial_std > 0):
            raise InputError(f"initial_std must be positive and finite, got {initial_std}")
        for label, value, least in (("repeats", repeats, 1), ("warm_up", warm_up, 0), ("candidates", candidates, 1)):
            if value < least:
                raise InputError(f"{label} must be at least {least}, got {value}")
        super().__init__(
            model, inference, encoder, hz_weight=hz_weight, covariance_tolerance=covariance_tolerance,
            mean_tolerance=mean_tolerance, repeats=repeats, whiten=whiten, warm_up=warm_up,
            candidates=candidates, initial_std=initial_std,
        )  # fmt: skip

    def _check_epochs(self, epochs: int) -> None:
        repeats = self.settings["repeats"]
        if epochs < 3 * repeats:
            raise InputError(f"{repeats} repeats of two steps need at least {3 * repeats} epochs, got {epochs}")

    def _check_batches(self, batches: Batches) -> None:
        # Below twice the codes' size the whitened points are all but determined by the whitening.
        least = 2 * self.model.latent_dim + 2
        batches.require(least, f"LiBI's statistics of {self.model.latent_dim}-dimensional codes")

    def _systems(self, restarts: int, seed: int) -> list[System]:
        if not self._candidates_train:
            return super()._systems(restarts, seed)
        count = self.settings["candidates"]  # one seed a mirrored pair
        pairs = super()._systems(restarts * -(-count // 2), seed)
        return [pairs[r * -(-count // 2) + c // 2] for r in range(restarts) for c in range(count)]

    @property
    def _candidates_train(self) -> bool:
        return self.settings["warm_up"] > 0 and self.settings["candidates"] > 1

    # --- step 1 ---

    def step1_terms(self, replicas: Replicas, rows: Rows) -> Terms:
        """The terms of step 1's objective on rows of x, each [R]: this process's shares."""
        hz_weight, covariance_tolerance, mean_tolerance = (self.weight(name, replicas) for name in self.weights)
        z = replicas.codes(rows.values)
        every = rows.gather(z)
        off_mean, off_covariance = moment_errors(every)
        return {
            "reconstruction": -rows.mean(replicas.log_prob(rows.values, z)),
            "henze_zirkler": rows.share(hz_weight * safe_exp(henze_zirkler_statistic(every))),
            "covariance": rows.share(safe_exp(off_covariance / covariance_tolerance)),
            "mean": rows.share(safe_exp(off_mean / mean_tolerance)),
        }

    def _step1(self, run: Run, epochs: int, first: bool) -> list[Stage]:
        s = self.settings
        prefix = "encoder." if first and run.replicas.template.encoder is not None else "inference."

        def phase(name: str, epochs: int, decay: bool = True, halving: bool = False) -> Phase:
            return Phase(
                name, epochs, ("model.", prefix), lambda rows, step: self.step1_terms(run.replicas, rows),
                lambda: self.step1_terms(run.replicas, run.validation), decay, halving=halving,
            )  # fmt: skip

        if not first or run.options.warm_start:
            return [phase("step 1", epochs)]
        warm_up, stages = min(s["warm_up"], epochs // 6), list[Stage]()
        if s["whiten"]:
            stages += [lambda run: whiten_codes(run.replicas, prefix, run.train.values)]
        if self._candidates_train:
            stages += [lambda run: mirror_codes(run.replicas, prefix, s["candidates"])]
        stages += [fit_decoder(run, warm_up)]
        if self._candidates_train:
            stages += [
                phase("candidates", warm_up, False),
                lambda run: run.keep(run.best_of(run.objective, s["candidates"], 1)),
            ]
            epochs -= warm_up
        return [*stages, phase("step 1", epochs - warm_up, halving=True)]

    # --- step 2 ---

    def _step2(self, run: Run, epochs: int, first: bool) -> list[Stage]:
        stages: list[Stage] = []
        if first and run.replicas.template.encoder is not None:
            stages += [lambda run: copy_encoder(run.replicas, self.model.latent_dim)]
        if first and not run.options.warm_start:
            stages += [lambda run: start_std(run.replicas, lambda: elbo_at_start(run), self.settings["initial_std"])]
        phase = Phase(
            "step 2", epochs, ("inference.",),
            lambda rows, step: elbo_terms(run.replicas, rows, run.noise(rows, 1, step)),
            lambda: elbo_terms(run.replicas, run.validation, run.validation_noise()),
        )  # fmt: skip
        return [*stages, phase]

    def _stages(self, run: Run, epochs: int) -> list[Stage]:
        repeats = self.settings["repeats"]
        stages: list[Stage] = []
        for repeat in range(repeats):
            share = epochs * (repeat + 1) // repeats - epochs * repeat // repeats
            step1 = round(share * STEP1_SHARE)
            stages += self._step1(run, step1, repeat == 0)
            stages += [Run.judge]  # theta is judged by step 1's objective, whatever step 2 makes of q
            stages += self._step2(run, share - step1, repeat == 0)
            stages += [_end_repeat(repeat)]
        return stages


def _end_repeat(repeat: int) -> Stage:
    def stage(run: Run) -> None:
        run.note(phase="repeat", repeat=repeat, objective=run.judged)
        run.replicas.drop_encoder()  # step 3: h is the mean of q from here on
        run.consider()

    return stage
