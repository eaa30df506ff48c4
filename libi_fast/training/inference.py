"""Learning the inference model of a fixed generative model: LiBI's step 2, and :func:`fit_inference` for any model.

By a lower bound, q(z | x) covers what of p(z | x) it can without leaving it: it is too narrow, and its importance weights have
heavy tails. By draws from p(z | x), maximising E log q(z | x) (the forward Kullback-Leibler divergence), q covers all of it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from libi_fast.errors import DivergenceWarning, InputError, ParetoWarning
from libi_fast.models.laplace import local_frame
from libi_fast.models.model import InferenceModel, LatentVariableModel, MeanFieldGaussian, evaluation_mode
from libi_fast.models.proposals import Defensive, laplace_mixture
from libi_fast.ops import _library as lib
from libi_fast.posterior import sample_posterior
from libi_fast.training.batches import Batches
from libi_fast.training.distributed import Rows
from libi_fast.training.fused import Objective
from libi_fast.training.method import Method, elbo_at_start
from libi_fast.training.objectives import elbo_terms, importance_terms, posterior_terms, simulated_terms
from libi_fast.training.replicas import Replicas
from libi_fast.training.run import VALIDATION_DRAWS, VALIDATION_SAMPLES, Phase, Run, Stage, Terms, total
from libi_fast.training.start import copy_encoder, start_std

OBJECTIVES = ("elbo", "importance", "posterior", "elbo+posterior")
SAMPLERS = ("simulated", "sir", "hmc", "simulated+sir", "simulated+hmc")
SAMPLER = "simulated+sir"  # on CubicJTEx (seeds 0 to 4) the best: it covers rows that the model finds improbable
PAIRS = 1024  # simulated ones of a step, at least
KEPT = 64  # posterior draws of a row
A_STEP = 8  # of which a step takes so many
MOST_VALUES = 2**26  # of all rows' and replicas' draws
CHAINS = 16
INFLATION = 2.0  # of the proposal of 'sir', on Laplace's variance


def check_objective(label: str, objective: Any, sampler: Any, simulated_std: Any) -> None:
    """Raise InputError for a name that is not known, and for a setting that would be ignored."""
    for name, choice, known in ((label, objective, OBJECTIVES), ("sampler", sampler, SAMPLERS)):
        if choice not in known:
            raise InputError(f"{name} must be one of {', '.join(map(repr, known))}, got {choice!r}")
    lib.check_positive("simulated_std", simulated_std)
    if simulated_std < 1:  # then weights have no bound
        raise InputError(f"simulated_std must be at least 1, got {simulated_std}")
    if simulated_std != 1 and not ("posterior" in objective and "simulated" in sampler):
        raise InputError("simulated_std is of 'posterior' with a sampler that simulates; others would ignore it")


def check_mean_field(inference: Any, what: str) -> None:
    """Raise InputError where importance-weighted training would meet another q."""
    if not isinstance(inference, MeanFieldGaussian):
        raise InputError(f"{what} takes a MeanFieldGaussian, got {type(inference).__name__}")


def check_batches(batches: Batches, objective: str, sampler: str) -> None:
    """Raise InputError where draws could not be kept beside their rows."""
    if "posterior" in objective and sampler != "simulated" and (batches.loader is not None or batches.source is not None):
        raise InputError(
            f"sampler={sampler!r} keeps draws of every row: pass train as a tensor or array in memory, or sampler='simulated'"
        )


def inference_stages(
    run: Run, epochs: int, objective: str, sampler: str, importance_samples: int = 8, kept: int = KEPT, copies: int = 1,
    simulated_std: float = 1.0, start: Callable[[Run, Callable[[], Tensor]], None] | None = None,
    end: Callable[[Run, Tensor], None] | None = None,
) -> list[Stage]:  # fmt: skip
    """Train "inference." by one of OBJECTIVES over so many epochs. ``start(run, value)`` sets q up, and may put
    ``copies`` of every replica in its place; ``value()`` [R] is to be minimised. ``end(run, value)`` gets what it ended at, by
    held-out rows where they are looked at."""
    first = epochs // 2 if objective == "elbo+posterior" else epochs
    stages: list[Stage] = []
    chosen = sampler.split("+")
    drawn = chosen[-1] if chosen[-1] != "simulated" else ""
    if objective == "posterior" and drawn:
        stages += [lambda run: keep_draws(run, drawn, kept, copies)]

    def bound(rows: Rows, samples: int, step: int) -> Terms:
        if objective == "importance":
            return importance_terms(run, rows, max(samples, importance_samples), "doubly-reparameterized", step)
        return elbo_terms(run.replicas, rows, run.noise(rows, samples, step))

    def likelihood(rows: Rows, step: int, std: float = 1.0) -> Terms:
        terms: Terms = {}
        if "simulated" in chosen:
            terms |= simulated_terms(run, max(PAIRS, rows.total), rows, step, std)
        if drawn:
            terms |= posterior_terms(run.replicas, rows, draws_of(run, rows, step))
        return {name: term / len(chosen) for name, term in terms.items()}

    @torch.no_grad()
    def by_draws() -> Tensor:
        with evaluation_mode(run.replicas.template):
            return total(run.in_blocks(lambda: likelihood(run.train, run.step)))

    @torch.no_grad()
    def at_start() -> Tensor:
        return by_draws() if objective == "posterior" else elbo_at_start(run)

    # Held-out draws cost as much as those that are learned from.
    looks = "posterior" not in objective or run.options.early_stopping or not drawn
    if start is not None:
        stages += [lambda run: start(run, at_start)]
    if objective != "posterior":
        stages += [
            Phase(
                "step 2", first, ("inference.",), lambda rows, step: bound(rows, 1, step),
                lambda: bound(run.validation, VALIDATION_SAMPLES, VALIDATION_DRAWS),
                objective=None if objective == "importance" else Objective("elbo"),
            )
        ]  # fmt: skip
    if objective == "elbo+posterior" and drawn:
        stages += [lambda run: keep_draws(run, drawn, kept)]
    if "posterior" in objective:
        name = "step 2" if objective == "posterior" else "step 2, posterior"
        stages += [
            Phase(
                name, epochs - first if objective == "elbo+posterior" else epochs, ("inference.",),
                lambda rows, step: likelihood(rows, step, simulated_std),
                # Judged by pairs as wide as the prior: weights of wider ones depend on the q that is judged.
                (lambda: likelihood(run.validation, VALIDATION_DRAWS)) if looks else None,
            )
        ]  # fmt: skip
    if end is not None:
        stages += [lambda run: end(run, run.objective if looks else by_draws())]
    if "posterior" in objective and drawn:
        stages += [forget_draws]
    return stages


def draws_of(run: Run, rows: Rows, step: int) -> Tensor:
    """Some of the draws that are kept of these rows, others in every step, [R, n, s, L]; of held-out rows all."""
    if step == VALIDATION_DRAWS:
        return run.replicas.own["held-out draws"]
    z = run.replicas.own["draws"]
    where = places_of(rows)
    number = (A_STEP * step + torch.arange(min(A_STEP, z.shape[2]))) % z.shape[2]
    return z[:, where][:, :, number]


def places_of(rows: Rows) -> slice | Tensor:
    """Where these rows are among all."""
    return slice(rows.first, rows.first + rows.values.shape[-2]) if rows.places is None else rows.places


@torch.no_grad()
def keep_frames(run: Run, rows: Rows, means: str, scales: str | None = None) -> None:
    """Mean and scale of p(z | x) around the mode of most mass that is reached from several starts, of every row and replica's
    own model."""
    found = []
    for r, model in enumerate(_models(run.replicas)):
        x = rows.values if rows.values.dim() == 2 else rows.values[r]
        found.append(local_frame(model, x, laplace_mixture(model, x).heaviest()))
    run.replicas.own[means] = torch.stack([mean for mean, _ in found])
    if scales is not None:
        run.replicas.own[scales] = torch.stack([scale for _, scale in found])


@torch.no_grad()
def keep_draws(run: Run, sampler: str, kept: int, copies: int = 1) -> None:
    """Draws from p(z | x) of every training row (and held-out row, if it is looked at), of every replica's own model; so many
    that there is room for ``copies`` of them."""
    replicas = run.replicas
    every = run.train.values.shape[-2] + run.validation.values.shape[-2]
    size = copies * replicas.count * every * replicas.template.model.latent_dim
    kept = min(kept, max(CHAINS, MOST_VALUES // size // CHAINS * CHAINS))
    for name, rows in (("draws", run.train), ("held-out draws", run.validation))[: 1 + run.options.early_stopping]:
        found = []
        for r, model in enumerate(_models(replicas)):
            x = rows.values if rows.values.dim() == 2 else rows.values[r]
            seed = (int(run.seed) + 1_000_003 * (int(replicas.own["ids"][r]) + 1)) % 2**63
            found.append(_draws(model, x, sampler, kept, seed))
        replicas.own[name] = torch.stack(found)


def forget_draws(run: Run) -> None:
    forget(run, "draws", "held-out draws")


def forget(run: Run, *names: str) -> None:
    for name in names:
        run.replicas.own.pop(name, None)


def _draws(model: LatentVariableModel, x: Tensor, sampler: str, count: int, seed: int) -> Tensor:
    """[N, count, L]; chains start from Laplace's approximations, and 'sir' draws its candidates from them."""
    with warnings.catch_warnings():
        # Draws of a few rows that are not quite right cost q little.
        warnings.simplefilter("ignore", DivergenceWarning)
        warnings.simplefilter("ignore", ParetoWarning)
        laplace = laplace_mixture(model, x)
        if sampler == "hmc":
            return sample_posterior(model, x, count, "hmc", laplace, seed, chains=CHAINS).z
        proposal = Defensive(laplace.inflated(INFLATION))
        return sample_posterior(model, x, count, "sir", proposal, seed).z


def _models(replicas: Replicas) -> Any:
    """Each replica's generative model."""
    for r in range(replicas.count):
        model = copy.deepcopy(replicas.template.model)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.copy_(replicas.parameters[f"model.{name}"][r])
        yield model


class _Codes(nn.Module):
    """The first L outputs of a network."""

    def __init__(self, network: nn.Module, latent_dim: int):
        super().__init__()
        self.network, self.latent_dim = network, latent_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[..., : self.latent_dim]


class InferenceFit(Method):
    """Training of q alone, from where it stands; see :func:`fit_inference`."""

    name = "inference"

    def __init__(self, model: Any, inference: Any, encoder: Any = None, **settings: Any):
        super().__init__(model, inference, encoder, **settings)

    @property
    def label(self) -> str:
        return "inference model"

    def _check_batches(self, batches: Batches) -> None:
        check_batches(batches, self.settings["objective"], self.settings["sampler"])

    def codes_a_row(self, rows: int) -> float:
        return A_STEP

    def _stages(self, run: Run, epochs: int) -> list[Stage]:
        s = self.settings

        def start(run: Run, value: Callable[[], Tensor]) -> None:
            copy_encoder(run.replicas, run.replicas.template.model.latent_dim)
            start_std(run.replicas, value)

        has_encoder = run.replicas.template.encoder is not None
        stages = inference_stages(
            run, epochs, s["objective"], s["sampler"], kept=s["num_samples"], simulated_std=s["simulated_std"],
            start=start if has_encoder else None,
        )  # fmt: skip
        return [*stages, Run.judge, Run.consider]


def fit_inference(
    model: LatentVariableModel, q: InferenceModel, x: Any, validation: Any = None, *, method: str = "posterior",
    sampler: str = SAMPLER, simulated_std: float = 1.0, num_samples: int = KEPT, encoder: nn.Module | None = None,
    epochs: int = 5000, seed: int = 0, batch_size: int | None = None, learning_rate: float = 0.01,
    tolerance: float | None = None, early_stopping: bool = False, checkpoint: str | PathLike[str] | None = None,
    resume: bool = False, progress: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Learn q(z | x) of a model that stays as it is; q is trained in place, from its present parameters.

    By the ELBO q is narrower than p(z | x), and its importance weights have heavy tails; by draws from p(z | x) it is as wide.

    Args:
        model: any fitted ``LatentVariableModel``.
        q: ``MeanFieldGaussian``, ``FullCovarianceGaussian`` or ``MixtureGaussian``.
        x, validation: rows [N, D], as of :meth:`Method.fit`.
        method: 'elbo', the evidence lower bound; 'posterior', E log q(z | x) over draws from p(z | x); 'elbo+posterior', one
            after the other, half the epochs each; 'importance', the importance-weighted bound (of a mean-field q alone).
        sampler: where those draws come from. 'simulated': z ~ p(z) and x ~ p(x | z), at least 1024 pairs in every step, new and
            exact, but of data that the model makes, which may lack rows such as x has where the model is wrong. 'sir', 'hmc':
            draws of the rows of x from ``sample_posterior``, taken once: by resampling among 5000 candidates from a mixture of
            Laplace's approximations with a tenth of the prior (its likelihood must know its Fisher information), or by 16
            chains that start from them. 'simulated+sir', 'simulated+hmc': half the objective each.
        simulated_std: standard deviation of the codes that 'simulated' draws, at least the prior's 1. Above it there are more
            pairs where the model has little mass, so that q is right for rows that it finds improbable too. Weights, which
            are capped, keep the codes' law p(z | x) at every x; what q is judged by is drawn as wide as the prior. A small
            network is worse for it where the mass is.
        num_samples: draws kept of each row, of 'sir' and 'hmc' (a multiple of 16), of which a step takes 8; fewer, where those
            of all rows would take more than 2^26 numbers.
        encoder: a network of q's architecture up to its last layer, whose first L outputs are codes of x: q begins with them
            as its means and with the standard deviation that serves ``method`` best. None: q begins as it is.
        epochs, seed, batch_size, learning_rate, tolerance, early_stopping, checkpoint, resume, progress: as of
            :meth:`Method.fit`.

    Returns:
        The history, a record an entry; the objective is in nats a row.

    Raises:
        InputError: an unknown name, a ``simulated_std`` below 1 or of no use, data or sizes that do not fit, 'hmc' and 'sir' of
        data that are not in memory; TypeError: wrong types; FloatingPointError: training became non-finite.

    Source:
        The sleep phase of wake-sleep (Hinton et al. 1995); inference compilation (Le et al. 2017); Naesseth et al. 2020.
    """
    check_objective("method", method, sampler, simulated_std)
    if method == "importance":
        check_mean_field(q, "method='importance'")
    if not isinstance(q, InferenceModel):
        raise TypeError(f"q must be a MeanFieldGaussian, FullCovarianceGaussian or MixtureGaussian, got {type(q).__name__}")
    if not isinstance(model, LatentVariableModel):
        raise TypeError(f"model must be a LatentVariableModel, got {type(model).__name__}")
    lib.check_count("num_samples", num_samples, 1)
    if "hmc" in sampler and num_samples % CHAINS:
        raise InputError(f"num_samples must be a multiple of the {CHAINS} chains of 'hmc', got {num_samples}")
    if encoder is not None:
        encoder = _Codes(encoder, model.latent_dim)
    fitted = InferenceFit(
        model, q, encoder, objective=method, sampler=sampler, simulated_std=simulated_std, num_samples=num_samples
    )
    fitted.fit(
        x, validation, epochs=epochs, seed=seed, batch_size=batch_size, learning_rate=learning_rate, tolerance=tolerance,
        early_stopping=early_stopping, checkpoint=checkpoint, resume=resume, progress=progress, warm_start=True,
    )  # fmt: skip
    return fitted.history
