"""Draws from p(z | x) of every data point: by Markov chains, or by resampling importance-weighted samples."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from libi_fast.errors import DivergenceWarning, InputError
from libi_fast.kernels.importance import reference
from libi_fast.kernels.importance.reference import blocks
from libi_fast.metrics.convergence import effective_sample_size, r_hat
from libi_fast.models.laplace import log_joint_and_gradient
from libi_fast.models.model import LatentVariableModel, MeanField, evaluation_mode
from libi_fast.models.networks import recognise_model
from libi_fast.models.proposals import FullCovariance, Proposal, as_proposal, check_rows, widest_layer
from libi_fast.models.weighted import weighted_tiles
from libi_fast.ops import _library as lib
from libi_fast.ops import chains as op
from libi_fast.ops import importance, random, resampling
from libi_fast.ops.random import Stream, philox_normal, philox_uniform
from libi_fast.pareto import pareto_k, tail_length, warn_where_unreliable

METHODS = ("sir", *op.METHODS)
VALUES_AT_ONCE = 2**24  # of draws: rows are taken in blocks of so many
SCALE_DRAWS = 64  # of a proposal without standard deviations of its own
WINDOW_DRAWS = 256  # at most, of a chain, kept in a window of warm-up


class _Defaults(NamedTuple):
    warmup: int
    target: float  # acceptance rate
    power: float  # step sizes start from latent_dim^-power


# Acceptance rates: Beskos et al. 2013 (raised as Stan does), Roberts & Rosenthal 1998, Roberts, Gelman & Gilks 1997.
_DEFAULTS = {
    "hmc": _Defaults(300, 0.8, 1 / 4),
    "mala": _Defaults(1000, 0.574, 1 / 6),
    "random-walk": _Defaults(2000, 0.234, 1 / 2),
}


@dataclass(frozen=True)
class PosteriorSamples:
    """Draws from p(z | x_n) for each of N data points, S of each, and what is needed to judge them.

    Attributes:
        z: [N, S, L]; of chains, one whole chain after another: ``z.unflatten(1, (chains, -1))``. Not differentiable.
        log_density: [N, S], log p(x, z) of each draw, in nats.
        mean, covariance: [N, L] and [N, L, L], of all draws, failed chains' among them; of 'sir' by the weights of all
            candidates, which is more accurate.
        effective_sample_size: of chains [N, L], bulk, of S draws; of 'sir' [N], Kish's, of the candidates.

        Of chains alone, else None:
        chains: C, how many a data point has.
        acceptance_rate: [N], mean acceptance probability after warm-up.
        r_hat: [N, L], rank-normalised split R-hat; above 1.01 the chains have not converged. NaN for one chain, or chains of
            fewer than 4 draws.
        divergences: [N], transitions after warm-up whose energy error passed 1000 or was not a number.
        failed: [N, C], chains that started where the density is not finite, and never moved.
        step_size: [N], after adaptation, in units of ``scale`` (jitter moves it about that); scale: [N, L], each latent's, the
            square root of the inverse mass matrix's diagonal.

        Of 'sir' alone, else None:
        log_likelihood: [N], importance-weighted. pareto_k: [N], above 0.7 the draws are not to be trusted.
    """

    z: Tensor
    log_density: Tensor
    mean: Tensor
    covariance: Tensor
    effective_sample_size: Tensor
    chains: int | None = None
    acceptance_rate: Tensor | None = None
    r_hat: Tensor | None = None
    divergences: Tensor | None = None
    failed: Tensor | None = None
    step_size: Tensor | None = None
    scale: Tensor | None = None
    log_likelihood: Tensor | None = None
    pareto_k: Tensor | None = None

    def to_arviz(self) -> Any:
        """ArviZ's InferenceData (of ArviZ 1 a DataTree): posterior ``z`` with dimensions (chain, draw, row, latent),
        sample_stats ``lp``. Draws of 'sir' are one chain. ImportError without ArviZ."""
        try:
            import arviz
        except ImportError as error:
            raise ImportError("to_arviz needs ArviZ: pip install arviz") from error
        chains = self.chains or 1
        z = self.z.unflatten(1, (chains, -1)).movedim(0, 2).cpu().numpy()
        lp = self.log_density.unflatten(1, (chains, -1)).movedim(0, 2).cpu().numpy()
        posterior, stats, dims = {"z": z}, {"lp": lp}, {"z": ["row", "latent"], "lp": ["row"]}
        if int(arviz.__version__.split(".")[0]) < 1:
            return arviz.from_dict(posterior=posterior, sample_stats=stats, dims=dims)
        return arviz.from_dict({"posterior": posterior, "sample_stats": stats}, dims=dims)


@dataclass(frozen=True)
class _Chains:
    """The chains of one call, on blocks of rows."""

    model: LatentVariableModel
    x: Tensor
    proposal: Proposal | MeanField
    key: Tensor
    chains: int
    settings: op.Settings  # of the counted run
    warmup: int
    step_size: float
    target: float
    backend: str

    @property
    def a_row(self) -> int:
        """Values that a row takes at once, about."""
        of_chains = self.chains * max(self.settings.kept, min(self.warmup, WINDOW_DRAWS))
        return max(of_chains, SCALE_DRAWS) * (self.model.latent_dim + 1)

    def run(self, rows: slice, z: Tensor, step: Tensor, log_scale: Tensor, settings: op.Settings) -> op.Result:
        """z [n, C, L], step [n, C], log_scale [n, L]; all results without the replica dimension."""
        model, x, replicas = self.model, self.x[rows], random.as_replicas(None, self.x.device)
        tensors = (z[None].contiguous(), step[None].contiguous(), log_scale[None].contiguous())
        recognised = recognise_model(model, x)
        if recognised is not None:
            result = op.chains_of_layers(x[None], *tensors, *recognised, self.key, replicas, settings, self.backend)
        else:
            density = log_joint_and_gradient(model, x)
            result = op.chains_of_density(density, *tensors, self.key, replicas, settings, widest_layer(model, x))
        return op.Result(*(part[0] for part in result))

    def start(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Draws of the proposal [n, C, L], and the logarithms of its standard deviations [n, L]."""
        q, count = self.proposal, rows.stop - rows.start
        common: dict[str, Any] = {
            "first_row": self.settings.first_row + rows.start, "dtype": self.x.dtype, "device": self.x.device,
        }  # fmt: skip
        uses: list[dict[str, Any]] = [{"repetition": chain, "stream": Stream.INITIALISATION} for chain in range(self.chains)]
        noise = torch.stack([philox_normal(self.key, count, self.model.latent_dim, **common, **use) for use in uses], 1)
        if isinstance(q, MeanField):
            mean, log_std = q.mean[rows], q.log_std[rows]
            return mean[:, None] + log_std[:, None].exp() * noise, log_std
        uses = [{"repetition": chain, "stream": Stream.MIXTURE} for chain in range(self.chains)]
        uniform = torch.cat([philox_uniform(self.key, count, 1, **common, **use) for use in uses], 1)
        # Its standard deviations from a few draws more: any proposal can do that much.
        more: dict[str, Any] = {"repetition": self.chains, **common}
        extra = philox_normal(self.key, count, SCALE_DRAWS * self.model.latent_dim, stream=Stream.INITIALISATION, **more)
        which = philox_uniform(self.key, count, SCALE_DRAWS, stream=Stream.MIXTURE, **more)
        draws = q.draw(extra.unflatten(1, (SCALE_DRAWS, -1)), which, rows)
        return q.draw(noise, uniform, rows), draws.std(1).log()

    def warm_up(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, step sizes [n] and log scales [n, L] after three windows: in each the chains find their step sizes, and of
        the last the row takes the median; after the first two the draws of all chains give the scales. Chains that have no
        density are left out of both."""
        z, log_scale = self.start(rows)
        step = torch.full(z.shape[:2], self.step_size, dtype=z.dtype, device=z.device)
        first = self.settings.first_transition - self.warmup
        for window in (self.warmup // 4, self.warmup // 4, self.warmup - 2 * (self.warmup // 4)):
            thinning = -(-window // WINDOW_DRAWS) or 1
            settings = self.settings._replace(
                transitions=window // thinning * thinning, thinning=thinning, target=self.target, first_transition=first,
                first_row=self.settings.first_row + rows.start,
            )  # fmt: skip
            if settings.kept == 0:
                continue
            result = self.run(rows, z, step, log_scale, settings)
            z, first = result.z[:, :, -1], first + window
            if first < self.settings.first_transition:
                log_scale = pooled_log_scale(result, log_scale)
            else:
                alive = torch.isfinite(result.log_density[:, :, -1])  # others reject all, and their steps fall to 0
                row_step = torch.where(alive, result.step, math.nan).nanmedian(-1).values
                step = torch.where(row_step.isnan(), self.step_size, row_step)[:, None].expand_as(step)
        return z, step[:, 0], log_scale

    def sample(self, rows: slice) -> dict[str, Tensor]:
        """Counted draws and what is told of them, by the names of PosteriorSamples."""
        z, step, log_scale = self.warm_up(rows)
        settings = self.settings._replace(first_row=self.settings.first_row + rows.start)
        result = self.run(rows, z, step[:, None].expand(-1, self.chains), log_scale, settings)
        draws = result.z.flatten(1, 2)
        mean, covariance = moments(draws)
        return {
            "z": draws, "log_density": result.log_density.flatten(1), "mean": mean, "covariance": covariance,
            "effective_sample_size": effective_sample_size(result.z), "acceptance_rate": result.acceptance.mean(-1),
            "r_hat": r_hat(result.z), "divergences": result.divergences.sum(-1),
            "failed": ~torch.isfinite(result.log_density[:, :, -1]), "step_size": step, "scale": log_scale.exp(),
        }  # fmt: skip


def moments(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n, L] and covariance [n, L, L] (divisor S - 1) of draws [n, S, L]."""
    mean = draws.mean(1)
    centred = draws - mean[:, None]
    return mean, centred.mT @ centred / max(draws.shape[1] - 1, 1)


def pooled_log_scale(result: op.Result, before: Tensor) -> Tensor:
    """Log standard deviations [n, L] of the second half of a window's draws, all chains together, drawn towards their mean over
    latents as if 5 draws more had it (what Stan does towards 1e-3); chains that have no density do not count, and rows whose
    draws do not differ keep theirs."""
    draws = result.z[:, :, result.z.shape[2] // 2 :]
    alive = torch.isfinite(result.log_density[:, :, -1])[:, :, None, None]
    count = (alive.sum((1, 2)) * draws.shape[2]).clamp_min(2)
    mean = torch.where(alive, draws, 0.0).sum((1, 2)) / count
    centred = torch.where(alive, draws - mean[:, None, None], 0.0)
    variance = centred.square().sum((1, 2)) / (count - 1)
    log_scale = 0.5 * variance.log()
    log_scale = (count * log_scale + 5 * log_scale.mean(-1, keepdim=True)) / (count + 5)
    return torch.where(torch.isfinite(log_scale).all(-1, keepdim=True), log_scale, before)


@dataclass(frozen=True)
class _Resampling:
    """Sampling importance resampling of one call, on blocks of rows."""

    model: LatentVariableModel
    x: Tensor
    proposal: Proposal | MeanField
    key: Tensor
    count: int
    settings: importance.Settings

    @property
    def a_row(self) -> int:
        fused = isinstance(self.proposal, MeanField) and recognise_model(self.model, self.x) is not None
        kept = self.count if fused else max(self.count, 4 * self.settings.num_samples)  # these in double, and more than once
        return kept * (self.model.latent_dim + 1) + self.settings.tail

    def sample(self, rows: slice) -> dict[str, Tensor]:
        """Draws and what is told of them, by the names of PosteriorSamples."""
        recognised = recognise_model(self.model, self.x)
        if recognised is not None and isinstance(self.proposal, MeanField):
            replicas = random.as_replicas(None, self.x.device)
            settings = self.settings._replace(first_row=self.settings.first_row + rows.start)
            mean, log_std = self.proposal.mean[rows].contiguous(), self.proposal.log_std[rows].contiguous()
            result = resampling.resampling_of_layers(
                self.x[None, rows], mean[None], log_std[None], *recognised, self.key, replicas, settings, self.count
            )
            found = resampling.Resampling(*(part[0] for part in result))
        else:
            found = self._any(rows)
        names = ("z", "log_density", "mean", "covariance", "effective_sample_size", "log_likelihood")
        return {**{name: getattr(found, name) for name in names}, "pareto_k": pareto_k(found.top)}

    def _any(self, rows: slice) -> resampling.Resampling:
        """Any decoder and proposal: candidates tile after tile, all of a block of rows kept."""
        q = self.proposal
        if isinstance(q, MeanField):
            q = FullCovariance(q.mean, torch.diag_embed(q.log_std.exp()))
        samples, first_row = self.settings.num_samples, self.settings.first_row + rows.start
        sums = reference.Sums.empty((rows.stop - rows.start,), self.settings.tail, self.x)
        kept = []
        for tile in weighted_tiles(self.model, self.x, q, self.key, self.settings, rows):
            sums = sums.merge(tile.log_joint - tile.log_q)
            kept.append(tile)
        z, log_joints, log_q = (torch.cat(part, 1) for part in zip(*kept, strict=True))
        uniforms = resampling.uniforms(
            self.key, random.as_replicas(None, self.x.device), first_row, rows.stop - rows.start, self.count, 0, self.x.dtype
        )  # fmt: skip
        drawn = reference.resample(z[None], (log_joints - log_q)[None], log_q[None], uniforms)
        return resampling.Resampling(*sums.results(samples), *(part[0] for part in drawn))


def sample_posterior(
    model: LatentVariableModel,
    x: Tensor,
    num_samples: int,
    method: str = "hmc",
    proposal: Any = None,
    seed: int | Tensor | None = None,
    *,
    num_candidates: int = 5000,
    variance_inflation: float = 1.0,
    chains: int = 4,
    warmup: int | None = None,
    leapfrogs: int = 8,
    thinning: int = 1,
    step_size: float | None = None,
    target_acceptance: float | None = None,
    jitter: float = 0.5,
    first_row: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
    backend: str | None = None,
) -> PosteriorSamples:
    """Draws from p(z | x_n) for every data point at once.

    Chains run whole inside one kernel where the decoder is a Sequential of Linear and elementwise activations; any other
    decoder runs in batched torch, equal in law. A row's draws depend on the seed, its global index and the number of its chains
    (which share step size and scales), on no other row.

    Args:
        x: [N, D] (or [N, ...], flattened), the model's dtype and device.
        num_samples: S, draws of a data point; of chains a multiple of ``chains``.
        method: 'hmc', 'mala' (one Langevin step a transition), 'random-walk'; or 'sir', which draws with replacement among
            importance-weighted candidates, at the cost of a log-likelihood: right where its ``pareto_k`` is below 0.7.
        proposal: what 'sir' draws its candidates from; where chains start, and their first scales. q(x), a (mean, log_std)
            pair, a torch ``Normal``, a :class:`libi_fast.Proposal`; None: the prior.
        seed: 0 .. 2^64 - 1, an int64 tensor, or None for torch's generator. first_row: global index of x[0], so that a shard
            draws what the whole would.
        num_candidates, variance_inflation: of 'sir', the latter a factor on the proposal's variance. The rest is of chains.
        chains: C, of each data point. warmup: transitions before the counted ones, in which step sizes (dual averaging) and
            scales (the mass matrix's diagonal, of all chains of a data point) are adapted and then frozen; default 300 (hmc),
            1000 (mala), 2000 (random-walk).
        leapfrogs: steps of a transition (hmc). thinning: transitions a draw kept.
        step_size: where adaptation starts, in units of the scales; with warmup=0 it is the step size.
        target_acceptance: default 0.8 (hmc), 0.574 (mala), 0.234 (random-walk).
        jitter: each transition's step size is multiplied by a uniform number in 1 -+ jitter, so that no path is periodic.
        out: a file, 'z.npy', that takes the draws block by block, and 'z.log_density.npy' beside it: both are overwritten, and
            mapped as z and log_density (on the CPU), so that memory does not grow with N x S.
        progress: a bar over blocks of rows.

    Returns:
        PosteriorSamples.

    Warns:
        DivergenceWarning: divergent transitions after warm-up, or chains that started where the density is not finite.
        ParetoWarning: of 'sir', Pareto k above 0.7 for some rows (not with 20 candidates or fewer, which are too few to tell).

    Raises:
        InputError: shapes that do not fit, NaN or infinity in x (the row is named), sizes below 1, num_samples that is no
        multiple of chains, a step size that is not positive, an unknown name. TypeError: wrong types or dtypes.

    Source:
        Neal 2011; Hoffman & Gelman 2014 (dual averaging); Vehtari et al. 2021 (R-hat, effective sample size).
    """
    x = check_rows(model, x)
    with torch.inference_mode(False):
        x = x.clone() if x.is_inference() else x  # else it could not be saved for the codes' gradients
    model.check(x)
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    lib.check_count("num_samples", num_samples, 1)
    lib.check_index("first_row", first_row, random.INDEX_LIMIT)
    if first_row + x.shape[0] > random.INDEX_LIMIT:
        raise InputError("a row index past 2^32 does not fit the random numbers' counter")
    q = as_proposal(proposal, x, model.latent_dim)
    q = MeanField(*(t.detach() for t in q)) if isinstance(q, MeanField) else q
    key, backend = random.as_seed(seed, x.device), lib.current_backend(backend)
    if method == "sir":
        lib.check_count("num_candidates", num_candidates, 1)
        lib.check_index("num_candidates", num_candidates, random.INDEX_LIMIT)
        lib.check_positive("variance_inflation", variance_inflation)
        if isinstance(q, MeanField):
            q = q._replace(log_std=q.log_std + 0.5 * math.log(variance_inflation))
        elif variance_inflation != 1:
            q = q.inflated(variance_inflation)
        tail = min(tail_length(num_candidates) + 1, num_candidates)
        settings = importance.Settings(num_candidates, tail=tail, first_row=first_row, backend=backend)
        importance.check_settings(settings)
        sampler: _Chains | _Resampling = _Resampling(model, x, q, key, num_samples, settings)
    else:
        sampler = _chains_of(
            model, x, q, key, num_samples, method, chains, warmup, leapfrogs, thinning, step_size, target_acceptance, jitter,
            first_row, backend,
        )  # fmt: skip
    with torch.inference_mode(False), torch.no_grad(), evaluation_mode(model):
        samples = _collect(sampler, num_samples, out, progress)
    _warn(samples, num_candidates)
    return samples


def _chains_of(
    model: LatentVariableModel, x: Tensor, q: Proposal | MeanField, key: Tensor, num_samples: int, method: str, chains: int,
    warmup: int | None, leapfrogs: int, thinning: int, step_size: float | None, target: float | None, jitter: float,
    first_row: int, backend: str,
) -> _Chains:  # fmt: skip
    """The arguments of chains, checked, with defaults filled in."""
    default = _DEFAULTS[method]
    warmup = default.warmup if warmup is None else warmup
    target = default.target if target is None else target
    lib.check_count("chains", chains, 1)
    lib.check_count("warmup", warmup, 0)
    lib.check_count("thinning", thinning, 1)
    if num_samples % chains:
        raise InputError(f"num_samples must be a multiple of the {chains} chains, got {num_samples}")
    lib.check_positive("target_acceptance", target)
    step_size = model.latent_dim**-default.power if step_size is None else step_size
    lib.check_positive("step_size", step_size)
    kept = num_samples // chains
    settings = op.Settings(method, kept * thinning, leapfrogs, thinning, jitter, 0.0, warmup, first_row)
    op.check_settings(settings._replace(target=target), model.latent_dim)
    return _Chains(model, x, q, key, chains, settings, warmup, step_size, target, backend)


def _collect(sampler: _Chains | _Resampling, num_samples: int, out: Any, progress: bool) -> PosteriorSamples:
    """Blocks of rows one after another."""
    n = len(sampler.x)
    found = _draws((n, num_samples, sampler.model.latent_dim), sampler.x, out)
    rows_at_once = max(1, VALUES_AT_ONCE // sampler.a_row)
    for rows in tqdm(list(blocks(n, rows_at_once)) or [slice(0, 0)], desc="sampling", disable=not progress):
        for name, part in sampler.sample(rows).items():
            if name not in found:  # whole at once: small tensors kept from every block would pin the memory between them
                found[name] = part.new_empty((n, *part.shape[1:]))
            found[name][rows] = part
    return PosteriorSamples(chains=sampler.chains if isinstance(sampler, _Chains) else None, **found)


def _draws(shape: tuple[int, int, int], like: Tensor, out: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    """z and log_density, all that grows with the number of draws: in memory, or in files where one is named."""
    shapes = {"z": shape, "log_density": shape[:2]}
    if out is None:
        return {name: like.new_empty(size) for name, size in shapes.items()}
    dtype = str(like.dtype).removeprefix("torch.")
    files = {"z": Path(out), "log_density": Path(out).with_suffix(".log_density.npy")}
    return {name: torch.from_numpy(np.lib.format.open_memmap(files[name], "w+", dtype, size)) for name, size in shapes.items()}


def _warn(samples: PosteriorSamples, num_candidates: int) -> None:
    n = len(samples.z)
    if samples.pareto_k is not None:
        warn_where_unreliable(samples.pareto_k, samples.effective_sample_size, num_candidates, stacklevel=3)
    if samples.failed is not None and (failed := int(samples.failed.any(-1).sum())):
        message = (
            f"{failed} of {n} data points have chains that started where log p(x, z) is not finite (.failed): they stay there"
        )
        warnings.warn(message, DivergenceWarning, stacklevel=3)
    if samples.divergences is not None and (divergent := int((samples.divergences > 0).sum())):
        message = (
            f"{divergent} of {n} data points have divergent transitions after warm-up (.divergences): raise target_acceptance "
            "or warmup, or start from a better proposal"
        )
        warnings.warn(message, DivergenceWarning, stacklevel=3)
