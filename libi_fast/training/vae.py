"""The rivals that maximise a bound: VAE (beta, annealing) and IWAE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from libi_fast.errors import InputError
from libi_fast.ops import importance as op
from libi_fast.training.distributed import Rows
from libi_fast.training.method import Method
from libi_fast.training.objectives import elbo_terms, importance_terms
from libi_fast.training.run import VALIDATION_DRAWS, VALIDATION_SAMPLES, Phase, Run, Stage, Terms


class VAE(Method):
    """Variational autoencoder: maximise E log p(x|z) - beta KL[q(z|x) || p(z)] (Kingma & Welling 2014; Higgins et al. 2017).

    Args:
        model, inference: see :class:`Method`.
        beta: weight of the KL term. anneal: raise it linearly from 0 over the first half of training.
        num_samples: draws of z a row and step.
        whiten, warm_up: start as LiBI can, with white codes and a decoder fitted to them for ``warm_up`` epochs. The plain
            start is better on images; at noise variances of 1e-6 it leaves a VAE unconverged after 30,000 epochs.

    Raises:
        InputError: beta not positive, num_samples below 1.
    """

    name = "vae"

    def __init__(
        self, model: Any, inference: Any, beta: float = 1.0, anneal: bool = False, num_samples: int = 1,
        whiten: bool = False, warm_up: int = 0,
    ):  # fmt: skip
        if not (math.isfinite(beta) and beta > 0):
            raise InputError(f"beta must be positive and finite, got {beta}")
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}")
        super().__init__(model, inference, beta=beta, anneal=anneal, num_samples=num_samples, whiten=whiten, warm_up=warm_up)

    def _stages(self, run: Run, epochs: int) -> list[Stage]:
        s = self.settings
        both = ("model.", "inference.")

        def loss_with(beta: Callable[[], Any]) -> Callable[[Rows, int], Terms]:
            return lambda rows, step: elbo_terms(run.replicas, rows, run.noise(rows, s["num_samples"], step), beta())

        stages, epochs = self._start(run, epochs)
        if s["anneal"]:
            # Its own phase without decay, so that beta has risen before the rate falls.
            rising = epochs // 2
            stages += [Phase("annealing", rising, both, loss_with(lambda: s["beta"] * run.fraction), decay=False)]
            epochs -= rising
        held_out = lambda: elbo_terms(run.replicas, run.validation, run.validation_noise(), s["beta"])  # noqa: E731
        return [*stages, Phase("elbo", epochs, both, loss_with(lambda: s["beta"]), held_out), Run.judge, Run.consider]


class IWAE(Method):
    """Importance-weighted autoencoder: maximise log (1/S) sum p(x, z_s) / q(z_s|x) (Burda et al. 2016).

    Args:
        model, inference: see :class:`Method`.
        num_samples: S, draws of z a row and step. gradient: of q's parameters, see ``log_likelihood``.
        whiten, warm_up: as for :class:`VAE`.
    """

    name = "iwae"

    def __init__(
        self, model: Any, inference: Any, num_samples: int = 8, gradient: str = "doubly-reparameterized",
        whiten: bool = False, warm_up: int = 0,
    ):  # fmt: skip
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}")
        if gradient not in op.GRADIENTS:
            raise InputError(f"gradient must be one of {', '.join(map(repr, op.GRADIENTS))}, got {gradient!r}")
        super().__init__(model, inference, num_samples=num_samples, gradient=gradient, whiten=whiten, warm_up=warm_up)

    def _stages(self, run: Run, epochs: int) -> list[Stage]:
        def bound(rows: Rows, samples: int, repetition: int) -> Terms:
            return importance_terms(run, rows, samples, self.settings["gradient"], repetition)

        stages, epochs = self._start(run, epochs)
        phase = Phase(
            "bound", epochs, ("model.", "inference."),
            lambda rows, step: bound(rows, self.settings["num_samples"], step),
            lambda: bound(run.validation, VALIDATION_SAMPLES, VALIDATION_DRAWS),
        )  # fmt: skip
        return [*stages, phase, Run.judge, Run.consider]
