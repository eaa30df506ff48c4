"""Log-likelihoods by annealed importance sampling, which holds where importance sampling cannot; and bounds from both sides."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from libi_fast.errors import DivergenceWarning, InputError
from libi_fast.kernels.importance.reference import blocks
from libi_fast.models.laplace import log_joint_and_gradient
from libi_fast.models.model import InferenceModel, LatentVariableModel, MeanField, evaluation_mode
from libi_fast.models.networks import recognise_model
from libi_fast.models.proposals import as_mean_field, check_rows, widest_layer
from libi_fast.ops import _library as lib
from libi_fast.ops import annealing as op
from libi_fast.ops import importance, random
from libi_fast.ops.log_mean_exp import log_mean_exp
from libi_fast.ops.random import Stream, philox_normal

VALUES_AT_ONCE = 2**24  # of chains: rows are taken in blocks of so many
POWER = 4  # inverse temperatures are evenly spaced numbers to this power
PILOTS, PILOT_CHAINS = 3, 8  # runs that adapt scales and step sizes before the counted one, and their chains, at most
RATE = 0.1  # of the adaptation
SMOOTHED = 40  # step sizes are averaged over a window of temperatures of one part in so many to each side
WINDOWS = 20  # of temperatures with scales of their own, at most, and
DRAWS = 50  # how many draws each of them must have for each latent
LEAST_VARIANCE = 1e-6  # of a window in any direction, in units of the mean over latents


class AnnealedLogLikelihood(NamedTuple):
    """Estimates for each of N rows.

    log_likelihood: log of the mean weight [N], whose expectation is at most log p(x); standard_error: of it [N] (delta method
    over chains), in nats; log_weights: of each chain [N, C]; acceptance_rate: [N], mean acceptance probability; z: where chains
    end [N, C, L], draws from p(z | x) once weighted; step_size: of each transition [N, T], along the narrowest direction
    of the density at its temperature.
    """

    log_likelihood: Tensor
    standard_error: Tensor
    log_weights: Tensor
    acceptance_rate: Tensor
    z: Tensor
    step_size: Tensor


class BidirectionalGap(NamedTuple):
    """Bounds on log p(x) of N rows, and the data they are of.

    x [N, D] with z [N, L], exact draws from p(z | x); lower and upper [N], in expectation at most and at least log p(x);
    lower_error, upper_error: standard errors [N] (delta method over chains; the reverse chains of a row share their z, so
    that upper's is too small for one row alone); gap: upper - lower [N].
    """

    x: Tensor
    z: Tensor
    lower: Tensor
    lower_error: Tensor
    upper: Tensor
    upper_error: Tensor
    gap: Tensor


def power_betas(temperatures: int) -> Tensor:
    """Inverse temperatures from 0 to 1, [temperatures + 1] float64, (t / T)^4 (Friel & Pettitt 2008): each a constant factor
    over the one before, nearly, as the widths of densities that narrow from prior to posterior want it. A sigmoid (Wu et al.
    2017) is as good where the data have much noise, and far from it where they have little."""
    return torch.linspace(0, 1, temperatures + 1, dtype=torch.float64) ** POWER


@dataclass(frozen=True)
class _Annealing:
    """The chains of one call, on blocks of rows."""

    model: LatentVariableModel
    x: Tensor
    proposal: MeanField
    key: Tensor
    chains: int
    betas: Tensor
    settings: op.Settings  # of the counted run
    target: float
    step_size: float
    backend: str

    @property
    def temperatures(self) -> int:
        return len(self.betas) - 1

    @property
    def a_row(self) -> int:
        """Values that a row takes at once."""
        pilot = min(self.chains, PILOT_CHAINS)
        latents = self.model.latent_dim
        return pilot * self.temperatures * (3 * latents + 2) + WINDOWS * latents**2 + self.chains * (2 * latents + 2)

    def blocks(self, progress: bool) -> Any:
        found = list(blocks(len(self.x), max(1, VALUES_AT_ONCE // self.a_row))) or [slice(0, 0)]
        return tqdm(found, desc="annealing", disable=not progress)

    def run(
        self, rows: slice, z: Tensor, betas: Tensor, step: Tensor, scale_tril: Tensor, number: int, **settings: Any
    ) -> op.Result:
        """The call's run of this number, pilots first: z [n, C, L], step [n, T], scale_tril [n, W, L, L]; results without the
        replica dimension."""
        model, x, replicas = self.model, self.x[rows], random.as_replicas(None, self.x.device)
        start = self.settings._replace(
            first_transition=number * self.temperatures, first_row=self.settings.first_row + rows.start, **settings
        )  # fmt: skip
        mean, log_scale = (t[rows][None].contiguous() for t in self.proposal)
        tensors = (z[None].contiguous(), betas[None], step[None].contiguous(), scale_tril[None].contiguous(), mean, log_scale)
        recognised = recognise_model(model, x)
        if recognised is not None:
            result = op.annealing_of_layers(x[None], *tensors, *recognised, self.key, replicas, start, self.backend)
        else:
            density = log_joint_and_gradient(model, x)
            result = op.annealing_of_density(density, *tensors, self.key, replicas, start, widest_layer(model, x))
        return op.Result(*(part[0] for part in result))

    def start(self, rows: slice, chains: int, number: int) -> Tensor:
        """Draws of the proposal, [n, C, L]."""
        mean, log_std = (t[rows][:, None] for t in self.proposal)
        latent_dim = self.model.latent_dim
        common: dict[str, Any] = {
            "first_row": self.settings.first_row + rows.start, "first_draw": number * latent_dim,
            "stream": Stream.ANNEALING_START, "dtype": self.x.dtype, "device": self.x.device,
        }  # fmt: skip
        noise = [philox_normal(self.key, len(mean), latent_dim, repetition=chain, **common) for chain in range(chains)]
        return mean + log_std.exp() * torch.stack(noise, 1)

    def tune(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Step sizes [n, T] and scales [n, W, L, L] by pilot runs, each of which improves them for the next.

        log eps is averaged over chains, and over temperatures nearby. Scales have the smallest singular value 1, so that steps
        are smooth over temperatures where scales jump: acceptance depends on the steps along the narrowest direction."""
        chains, width = min(self.chains, PILOT_CHAINS), self.temperatures // SMOOTHED
        scale = self.proposal.log_std[rows].exp()
        least = scale.amin(-1, keepdim=True)
        step = (self.step_size * least).expand(-1, self.temperatures)
        scale_tril = torch.diag_embed(scale / least)[:, None]
        for number in range(PILOTS):
            z = self.start(rows, chains, number)
            found = self.run(rows, z, self.betas, step, scale_tril, number, rate=RATE, target=self.target)
            # One chain after another: the order of a sum must not depend on the rows beside it.
            log_step = functools.reduce(torch.add, found.steps.log().unbind(1)) / chains
            step = F.avg_pool1d(log_step[:, None], 2 * width + 1, 1, width, count_include_pad=False)[:, 0].exp()
            if number + 1 < PILOTS:
                scale_tril = scales(found.path, scale_tril)
        return step, scale_tril

    def forward(self, rows: slice, step: Tensor, scale_tril: Tensor) -> op.Result:
        return self.run(rows, self.start(rows, self.chains, PILOTS), self.betas, step, scale_tril, PILOTS)

    def reverse(self, rows: slice, step: Tensor, scale_tril: Tensor, z: Tensor) -> op.Result:
        """From exact draws z [n, L], with the step size and scales that each temperature has on the way forward."""
        step = torch.cat((step.flip(-1)[:, 1:], step[:, :1]), -1)
        at = z[:, None].expand(-1, self.chains, -1)
        return self.run(rows, at, self.betas.flip(0), step, scale_tril.flip(1), PILOTS + 1)


def scales(path: Tensor, before: Tensor) -> Tensor:
    """Square roots [n, W, L, L] of the covariances of z within each chain and window of temperatures, from a path [n, C, T, L],
    over their smallest singular values; where too few draws are there, or they do not move, those ``before``."""
    _, chains, temperatures, latents = path.shape
    windows = min(WINDOWS, temperatures * chains // (DRAWS * latents), temperatures)
    if windows == 0:
        return before
    parts = []
    for w in range(windows):
        # Transition t is of window floor(t W / T). In float64: narrow posteriors have variances of 1e-6 beside 1.
        some = path[:, :, -(-w * temperatures // windows) : -(-(w + 1) * temperatures // windows)].double()
        centred = (some - some.mean(2, keepdim=True)).flatten(1, 2)
        covariance = centred.mT @ centred / centred.shape[1]
        least = LEAST_VARIANCE * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
        covariance = covariance + torch.diag_embed(least[:, None].expand(-1, latents))
        known = torch.isfinite(covariance).all(-1).all(-1)[:, None, None]
        smallest = torch.linalg.eigvalsh(torch.where(known, covariance, 0.0))[:, 0]
        factor, failed = torch.linalg.cholesky_ex(covariance / smallest[:, None, None])
        good = (failed == 0) & (smallest > 0) & torch.isfinite(factor).all(-1).all(-1)
        old = before[:, w * before.shape[1] // windows]
        parts.append(torch.where(good[:, None, None], factor.to(path.dtype), old))
    return torch.stack(parts, 1)


def _log_mean_weight(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """log mean w of log w [n, C], and its standard error, [n]."""
    value = log_mean_exp(log_weights)
    relative = log_weights - value[:, None]
    effective = log_weights.shape[1] * (-log_mean_exp(2 * relative)).exp()
    return value, importance.standard_error(effective, log_weights.shape[1])


def _annealing_of(
    model: LatentVariableModel, x: Tensor, proposal: Any, chains: int, temperatures: int | Tensor, leapfrogs: int,
    seed: int | Tensor | None, target: float, jitter: float, step_size: float | None, first_row: int, backend: str | None,
) -> _Annealing:  # fmt: skip
    """The arguments of a call, checked, with defaults filled in."""
    model.check(x)
    lib.check_count("chains", chains, 1)
    lib.check_index("chains", chains, random.INDEX_LIMIT)
    lib.check_positive("target_acceptance", target)
    step_size = model.latent_dim**-0.25 if step_size is None else step_size
    lib.check_positive("step_size", step_size)
    settings = op.Settings(leapfrogs, jitter, 0.0, 0.0, 0, first_row)
    count = _count(temperatures)
    op.check_settings(settings._replace(target=target, first_transition=(PILOTS + 1) * count), count, model.latent_dim)
    betas = (temperatures.detach().double() if isinstance(temperatures, Tensor) else power_betas(count)).to(x.device)
    if first_row + len(x) > random.INDEX_LIMIT:
        raise InputError("a row index past 2^32 does not fit the random numbers' counter")
    if isinstance(proposal, InferenceModel):
        with evaluation_mode(proposal):
            proposal = proposal(x)
    q = MeanField(*(t.detach() for t in as_mean_field(proposal, x, model.latent_dim)))
    for name, value in zip(("proposal mean", "proposal log_std"), q, strict=True):
        lib.check_finite(name, value)
    key = random.as_seed(seed, x.device)
    return _Annealing(model, x, q, key, chains, betas, settings, target, step_size, lib.current_backend(backend))


def _count(temperatures: Any) -> int:
    """T, of a number or of inverse temperatures [T + 1]."""
    if not isinstance(temperatures, Tensor):
        lib.check_count("temperatures", temperatures, 1)
        return temperatures
    lib.check_tensor("temperatures", temperatures)
    if temperatures.dim() != 1 or len(temperatures) < 2:
        raise InputError(f"temperatures must be a number or have shape [T + 1], got shape {tuple(temperatures.shape)}")
    if not (temperatures[0] == 0 and temperatures[-1] == 1 and bool((temperatures.diff() > 0).all())):
        ends = f"{temperatures[:3].tolist()} .. {temperatures[-3:].tolist()}"
        raise InputError(f"temperatures as a tensor must rise from 0 to 1, got {ends}")
    return len(temperatures) - 1


def _weightless(log_weights: Tensor) -> Tensor:
    """Chains that began where the density is not a number have no weight: a lower bound all the same."""
    return torch.where(log_weights.isnan(), -math.inf, log_weights)


def annealed_log_likelihood(
    model: LatentVariableModel,
    x: Tensor,
    proposal: Any = None,
    chains: int = 16,
    temperatures: int | Tensor = 1000,
    leapfrogs: int = 10,
    seed: int | Tensor | None = None,
    *,
    target_acceptance: float = 0.9,
    jitter: float = 0.5,
    step_size: float | None = None,
    first_row: int = 0,
    backend: str | None = None,
    progress: bool = False,
) -> AnnealedLogLikelihood:
    """log p(x) of every row by annealed importance sampling: chains pass from the proposal to the posterior in many small
    steps, and their weights are unbiased for p(x). The estimate is low by about half the square of its standard error, and high
    only by chance; :func:`bidirectional_gap` says how low, on data of the model's own.

    Chains of a recognised decoder run whole in one kernel; any other decoder runs in batched torch. Memory does not grow
    with the number of rows beyond the results: rows go in blocks.

    Args:
        x: [N, D] (or [N, ...], flattened), the model's dtype and device.
        proposal: where chains begin: a ``MeanFieldGaussian``, its q(x), a (mean, log_std) pair of [N, L], a torch ``Normal``,
            or None for the prior.
        chains: C, of each row. temperatures: T, or the inverse temperatures themselves, [T + 1], rising from 0 to 1.
        leapfrogs: of the one HMC transition at each temperature.
        seed: 0 .. 2^64 - 1, an int64 tensor, or None for torch's generator. first_row: global index of x[0], so that a shard
            draws what the whole would.
        target_acceptance: what the step sizes of each row and temperature are adapted to. Three pilot runs of at most 8 chains
            find them, and scales (a mass matrix for each of up to 20 windows of temperatures); both are frozen before the
            counted run. step_size: where adaptation starts, in units of the proposal's smallest standard deviation.
        jitter: each transition's step size is multiplied by a uniform number in 1 -+ jitter, so that no path is periodic.
        progress: a bar over blocks of rows.

    Returns:
        AnnealedLogLikelihood; not differentiable.

    Warns:
        DivergenceWarning: chains that started where log p(x, z) is not a number; they count as of no weight.

    Raises:
        InputError: shapes that do not fit, NaN or infinity in x (the row is named), sizes below 1, temperatures that do not
        rise from 0 to 1, an unknown name. TypeError: wrong types or dtypes.

    Source:
        Neal 2001; Wu, Burda, Salakhutdinov & Grosse 2017 (decoders); Friel & Pettitt 2008 (spacing of the temperatures).
    """
    x = check_rows(model, x)
    with torch.no_grad(), evaluation_mode(model):
        annealing = _annealing_of(
            model, x, proposal, chains, temperatures, leapfrogs, seed, target_acceptance, jitter, step_size, first_row, backend
        )
        parts = []
        for rows in annealing.blocks(progress):
            step, scale_tril = annealing.tune(rows)
            found = annealing.forward(rows, step, scale_tril)
            parts.append((found.log_weights, found.acceptance.mean(-1), found.z, step))
        raw, acceptance, z, step = (torch.cat(part) for part in zip(*parts, strict=True))
        log_weights = _weightless(raw)
        value, error = _log_mean_weight(log_weights)
    if failed := int(raw.isnan().any(-1).sum()):
        message = (
            f"{failed} of {len(x)} data points have chains that started where log p(x, z) is not a number: they have no weight"
        )
        warnings.warn(message, DivergenceWarning, stacklevel=2)
    return AnnealedLogLikelihood(value, error, log_weights, acceptance, z, step)


def bidirectional_gap(
    model: LatentVariableModel,
    num_data: int | None = None,
    x: Tensor | None = None,
    z: Tensor | None = None,
    *,
    proposal: Any = None,
    chains: int = 16,
    temperatures: int | Tensor = 1000,
    leapfrogs: int = 10,
    seed: int | Tensor | None = None,
    target_acceptance: float = 0.9,
    jitter: float = 0.5,
    step_size: float | None = None,
    first_row: int = 0,
    backend: str | None = None,
    progress: bool = False,
) -> BidirectionalGap:
    """How far annealed importance sampling may be off: bounds on log p(x) from both sides, on data whose exact posterior draws
    are known because the model made them (bidirectional Monte Carlo).

    The lower bound is :func:`annealed_log_likelihood`. The upper one anneals from z, an exact draw from p(z | x), to the
    proposal: the mean weight is unbiased for 1 / p(x). So the gap bounds the error of both, in expectation.

    Args:
        num_data: N rows to simulate: ``model.sample_joint(num_data, seed)``. Or, in its place, x [N, D] and z [N, L]: rows with
            one exact draw each from p(z | x).
        proposal: as of :func:`annealed_log_likelihood`; for simulated rows None or an inference model.
        All others as of :func:`annealed_log_likelihood`, which gives the same lower bound for x and these.

    Returns:
        BidirectionalGap; not differentiable.

    Raises:
        As :func:`annealed_log_likelihood`; InputError: num_data together with x or z, or one of x and z alone.

    Source:
        Grosse, Ghahramani & Adams 2015; Wu, Burda, Salakhutdinov & Grosse 2017.
    """
    if (num_data is None) == (x is None and z is None) or (x is None) != (z is None):
        given = [name for name, value in {"num_data": num_data, "x": x, "z": z}.items() if value is not None]
        raise InputError(f"pass num_data, or x and z, exact draws from p(z | x); got {' and '.join(given) or 'none of them'}")
    if not isinstance(model, LatentVariableModel):
        raise TypeError(f"model must be a LatentVariableModel, got {type(model).__name__}")
    key = random.as_seed(seed, model.device)
    with torch.no_grad(), evaluation_mode(model):
        if num_data is not None:
            lib.check_count("num_data", num_data, 1)
            x, z = model.sample_joint(num_data, key)
        assert x is not None
        x = check_rows(model, x)
        lib.check_tensor("z", z)
        assert z is not None
        lib.check_like("z", z, "x", x)
        if z.shape != (len(x), model.latent_dim):
            raise InputError(f"z must have shape {(len(x), model.latent_dim)}, got {tuple(z.shape)}")
        lib.check_finite("z", z)
        annealing = _annealing_of(
            model, x, proposal, chains, temperatures, leapfrogs, key, target_acceptance, jitter, step_size, first_row, backend
        )
        parts = []
        for rows in annealing.blocks(progress):
            tuned = annealing.tune(rows)
            forward, reverse = annealing.forward(rows, *tuned), annealing.reverse(rows, *tuned, z[rows])
            parts.append((*_log_mean_weight(_weightless(forward.log_weights)), *_log_mean_weight(reverse.log_weights)))
        lower, lower_error, below, upper_error = (torch.cat(part) for part in zip(*parts, strict=True))
    return BidirectionalGap(x, z, lower, lower_error, -below, upper_error, -below - lower)
