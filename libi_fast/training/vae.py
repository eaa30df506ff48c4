"""The rivals that maximise a bound: VAE (beta, annealing) and IWAE."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.ops import importance as op
from libi_fast.ops.random import Stream
from libi_fast.training.method import VALIDATION_SAMPLES, Method, Run, elbo_terms


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

    def _train(self, run: Run, epochs: int) -> tuple[dict[str, Tensor], Tensor]:
        s, replicas = self.settings, run.replicas
        latent_dim = self.model.latent_dim
        parameters = replicas.group("model.", "inference.")

        def loss_with(beta: Any) -> Any:
            def loss(x: Tensor, step: int) -> dict[str, Tensor]:
                return elbo_terms(replicas, x, run.noise(len(x), s["num_samples"], latent_dim, step), beta())

            return loss

        epochs = run.start_whole(s["whiten"], s["warm_up"], epochs)
        if s["anneal"]:
            # Its own phase without decay, so that beta has risen before the rate falls.
            rising = epochs // 2
            run.phase("annealing", rising, parameters, loss_with(lambda: s["beta"] * run.fraction), decay=False)
            epochs -= rising
        scores = run.phase(
            "elbo", epochs, parameters, loss_with(lambda: s["beta"]),
            lambda: elbo_terms(replicas, run.validation, run.validation_noise(latent_dim), s["beta"]),
        )  # fmt: skip
        return replicas.snapshot(), scores


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

    def _bound(self, run: Run, x: Tensor, samples: int, repetition: int) -> Tensor:
        """-log-likelihood bound, [R]."""
        replicas = run.replicas
        q = replicas.posterior(x)
        names = [k for k in replicas.parameters if k.startswith("model.")]

        def log_prob(leaves: Any, rows: Tensor, z: Tensor) -> Tensor:
            parameters = {**replicas.parameters, **dict(zip(names, leaves, strict=True))}
            return replicas.with_parameters(parameters, "log_prob", (rows[0, :, None], z), (None, 0))

        settings = op.Settings(samples, self.settings["gradient"], repetition=repetition, stream=Stream.TRAINING)
        widest = max(max(replicas.parameters[k].shape[1:], default=1) for k in names)
        estimate = op.importance_streamed(
            x[None], q.mean, q.log_std, log_prob, [replicas.parameters[k] for k in names], run.seed, run.ids, settings,
            max(widest, x.shape[-1]),
        )  # fmt: skip
        return -estimate.log_likelihood.mean(-1)

    def _train(self, run: Run, epochs: int) -> tuple[dict[str, Tensor], Tensor]:
        def loss(x: Tensor, step: int) -> dict[str, Tensor]:
            return {"bound": self._bound(run, x, self.settings["num_samples"], step)}

        epochs = run.start_whole(self.settings["whiten"], self.settings["warm_up"], epochs)
        scores = run.phase(
            "bound", epochs, run.replicas.group("model.", "inference."), loss,
            lambda: {"bound": self._bound(run, run.validation, VALIDATION_SAMPLES, 2**32 - 1)},
        )  # fmt: skip
        return run.replicas.snapshot(), scores
