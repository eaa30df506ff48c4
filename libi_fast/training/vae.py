"""The rivals that maximise a bound: VAE (beta, annealing), VAE with a lagging inference network, and IWAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from libi_fast.errors import InputError
from libi_fast.ops import _library as lib
from libi_fast.ops import importance as op
from libi_fast.training.distributed import Rows
from libi_fast.training.fused import Objective
from libi_fast.training.inference import check_mean_field
from libi_fast.training.method import Method
from libi_fast.training.objectives import elbo_terms, importance_terms
from libi_fast.training.run import VALIDATION_DRAWS, VALIDATION_SAMPLES, Loss, Phase, Run, Stage, Terms, rungs
from libi_fast.training.schedule import Schedule


def _check_elbo(beta: float, num_samples: int) -> None:
    lib.check_positive("beta", beta)
    lib.check_count("num_samples", num_samples, 1)


def _elbo(run: Run, method: Method, rise: Callable[[], float] = lambda: 1.0) -> tuple[Loss, Callable[[], Terms]]:
    """The loss -ELBO, its beta times ``rise()``, and the same on held-out rows."""

    def loss(rows: Rows, step: int) -> Terms:
        noise = run.noise(rows, method.settings["num_samples"], step)
        return elbo_terms(run.replicas, rows, noise, method.weight("beta", run.replicas) * rise())

    def held_out() -> Terms:
        return elbo_terms(run.replicas, run.validation, run.validation_noise(), method.weight("beta", run.replicas))

    return loss, held_out


def _known(run: Run, method: Method, rise: Callable[[float], float] = lambda fraction: 1.0) -> Objective:
    """The same loss for a compiled kernel."""
    return Objective("elbo", lambda: [method.weight("beta", run.replicas)], rise, samples=method.settings["num_samples"])


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
    weights = ("beta",)

    def __init__(
        self, model: Any, inference: Any, beta: float = 1.0, anneal: bool = False, num_samples: int = 1,
        whiten: bool = False, warm_up: int = 0,
    ):  # fmt: skip
        _check_elbo(beta, num_samples)
        super().__init__(model, inference, beta=beta, anneal=anneal, num_samples=num_samples, whiten=whiten, warm_up=warm_up)

    def _stages(self, run: Run, epochs: int) -> list[Stage]:
        both = ("model.", "inference.")
        stages, epochs = self._start(run, epochs)
        if self.settings["anneal"]:
            # Its own phase without decay, so that beta has risen before the rate falls.
            rising, _ = _elbo(run, self, lambda: run.fraction)
            known = _known(run, self, lambda fraction: fraction)
            stages += [Phase("annealing", epochs // 2, both, rising, decay=False, fixed=True, objective=known)]
            epochs -= epochs // 2
        loss, held_out = _elbo(run, self)
        elbo = Phase("elbo", epochs, both, loss, held_out, halving=True, objective=_known(run, self))
        return [*stages, elbo, Run.judge, Run.consider]


class LaggingVAE(Method):
    """VAE whose inference network catches up before theta moves (He et al. 2019), as the paper's rival: training is cut into
    segments, in each of which first phi alone learns, then theta and phi.

    Args:
        model, inference: see :class:`Method`.
        segments: how many (the paper: 5 to 90, by data set). inference_share: of a segment's epochs, phi alone.
        beta, num_samples, whiten, warm_up: as for :class:`VAE`.

    Raises:
        InputError: segments below 1, a share outside (0, 1); and as VAE.
    """

    name = "lagging"
    weights = ("beta",)

    def __init__(
        self, model: Any, inference: Any, segments: int = 30, inference_share: float = 0.5, beta: float = 1.0,
        num_samples: int = 1, whiten: bool = False, warm_up: int = 0,
    ):  # fmt: skip
        if segments < 1:
            raise InputError(f"segments must be at least 1, got {segments}")
        if not 0 < inference_share < 1:
            raise InputError(f"inference_share must lie between 0 and 1, got {inference_share}")
        _check_elbo(beta, num_samples)
        super().__init__(
            model, inference, segments=segments, inference_share=inference_share, beta=beta, num_samples=num_samples,
            whiten=whiten, warm_up=warm_up,
        )  # fmt: skip

    def _check_epochs(self, epochs: int) -> None:
        segments = self.settings["segments"]
        left = epochs - min(self.settings["warm_up"], epochs // 6)
        if left < 2 * segments:
            raise InputError(f"{segments} segments of two parts need at least {2 * segments} epochs after warm-up, got {left}")

    def _stages(self, run: Run, epochs: int) -> list[Stage]:
        s = self.settings
        stages, epochs = self._start(run, epochs)
        (loss, held_out), known = _elbo(run, self), _known(run, self)
        drops = rungs(run.restarts, run.options.survivors or run.restarts, s["segments"])
        for segment in range(s["segments"]):
            if segment in drops:
                stages += [_keep(drops[segment])]
            begin, end = (epochs * k // s["segments"] for k in (segment, segment + 1))
            alone = min(max(1, round(s["inference_share"] * (end - begin))), end - begin - 1)
            # The schedule of one long phase, whose rate falls over its second half, in steps of a segment.
            rate = Schedule(epochs, 1.0, None, 1).rate_at(max(begin, epochs // 10))
            last = segment + 1 == s["segments"]
            stages += [
                Phase("inference network", alone, ("inference.",), loss, decay=False, rate=rate, objective=known),
                Phase("elbo", end - begin - alone, ("model.", "inference."), loss, held_out, last, rate, objective=known),
            ]
        return [*stages, Run.judge, Run.consider]


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
        check_mean_field(self.system.inference, "IWAE")

    def _stages(self, run: Run, epochs: int) -> list[Stage]:
        def bound(rows: Rows, samples: int, repetition: int) -> Terms:
            return importance_terms(run, rows, samples, self.settings["gradient"], repetition)

        stages, epochs = self._start(run, epochs)
        phase = Phase(
            "bound", epochs, ("model.", "inference."),
            lambda rows, step: bound(rows, self.settings["num_samples"], step),
            lambda: bound(run.validation, VALIDATION_SAMPLES, VALIDATION_DRAWS), halving=True,
        )  # fmt: skip
        return [*stages, phase, Run.judge, Run.consider]


def _keep(count: int) -> Stage:
    """Go on with each cell's ``count`` best restarts."""
    return lambda run: run.keep(run.best_of(run.objective, run.restarts, count))
