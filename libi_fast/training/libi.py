"""LiBI: Likelihood Before Inference (Yacoby, Pan and Doshi-Velez 2020, Eqs 6-7 and 42-46)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.ops.henze_zirkler import henze_zirkler_statistic
from libi_fast.training import distributed
from libi_fast.training.constraints import moment_errors, safe_exp
from libi_fast.training.method import Method, Run, elbo_terms
from libi_fast.training.optimise import Batches
from libi_fast.training.replicas import Replicas, System, chosen
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
        if not self.settings["warm_up"]:
            return super()._systems(restarts, seed)
        count = self.settings["candidates"]  # one seed a mirrored pair
        pairs = super()._systems(restarts * -(-count // 2), seed)
        return [pairs[r * -(-count // 2) + c // 2] for r in range(restarts) for c in range(count)]

    # --- step 1 ---

    def step1_terms(self, replicas: Replicas, x: Tensor) -> dict[str, Tensor]:
        """The terms of step 1's objective on rows x [B, D], each [R]; with torch.distributed, this process's share of the
        likelihood and the statistics of all processes' codes."""
        s = self.settings
        z = replicas.codes(x)
        log_prob = replicas.log_prob(x, z)
        every = distributed.gather_rows(z)
        off_mean, off_covariance = moment_errors(every)
        return {
            "reconstruction": -log_prob.sum(-1) / every.shape[-2],
            "henze_zirkler": s["hz_weight"] * safe_exp(henze_zirkler_statistic(every)),
            "covariance": safe_exp(off_covariance / s["covariance_tolerance"]),
            "mean": safe_exp(off_mean / s["mean_tolerance"]),
        }

    def _step1(self, run: Run, epochs: int, first: bool) -> Tensor:
        replicas, s = run.replicas, self.settings
        prefix = "inference." if replicas.template.encoder is None else "encoder."

        def step1(name: str, epochs: int, decay: bool) -> Tensor:
            return run.phase(
                name, epochs, [*replicas.group("model."), *replicas.group(prefix)],
                lambda x, step: self.step1_terms(replicas, x), lambda: self.step1_terms(replicas, run.validation), decay,
            )  # fmt: skip

        if first and not run.options["warm_start"]:
            if s["whiten"]:
                whiten_codes(replicas, prefix, run.batches.rows)
            warm_up = min(s["warm_up"], epochs // 6)
            per_restart = replicas.count // run.restarts
            if per_restart > 1:
                mirror_codes(replicas, prefix, per_restart)
            run.fit_decoder(warm_up)
            epochs -= warm_up
            if per_restart > 1:
                scores = step1("candidates", warm_up, False).view(run.restarts, per_restart)
                scores = torch.where(torch.isfinite(scores), scores, math.inf)
                run.keep(scores.argmin(1) + per_restart * torch.arange(run.restarts))
                epochs -= warm_up
        return step1("step 1", epochs, True)

    # --- step 2 ---

    def _step2(self, run: Run, epochs: int, first: bool) -> None:
        replicas, latent_dim = run.replicas, self.model.latent_dim
        if first:
            if replicas.template.encoder is not None:
                copy_encoder(replicas, latent_dim)
            if not run.options["warm_start"]:
                start_std(replicas, run.elbo_at_start, self.settings["initial_std"])
        theta = replicas.group("model.")
        for p in theta:
            p.requires_grad_(False)
        try:
            run.phase(
                "step 2", epochs, replicas.group("inference."),
                lambda x, step: elbo_terms(replicas, x, run.noise(len(x), 1, latent_dim, step)),
                lambda: elbo_terms(replicas, run.validation, run.validation_noise(latent_dim)),
            )  # fmt: skip
        finally:
            for p in theta:
                p.requires_grad_(True)

    def _train(self, run: Run, epochs: int) -> tuple[dict[str, Tensor], Tensor]:
        replicas, repeats = run.replicas, self.settings["repeats"]
        best: dict[str, Tensor] = {}
        scores = torch.empty(0)
        for repeat in range(repeats):
            share = epochs * (repeat + 1) // repeats - epochs * repeat // repeats
            step1 = round(share * STEP1_SHARE)
            first = repeat == 0
            objective = self._step1(run, step1, first)
            self._step2(run, share - step1, first)
            run.history.append({"phase": "repeat", "repeat": repeat, "objective": objective.tolist()})
            if first:
                replicas.drop_encoder()  # step 3: h is the mean of q from here on
                best, scores = replicas.snapshot(), objective
            else:
                better = objective < scores
                best, scores = chosen(better, replicas.snapshot(), best), torch.where(better, objective, scores)
        return best, scores
