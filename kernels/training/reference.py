r"""Epochs of full-batch training of many small models side by side, in plain torch: the specification of the fused kernels.

Each replica r has an encoder h and a decoder f, both chains of linear maps and elementwise activations, the rows x_n of one of
several data sets, and minimises one of

    reconstruction   -(1/N) sum_n log p(x_n | f(z_n)),  z_n = h(x_n) held
    joint            the same, z_n moving, + w exp(HZ({z_n})) + exp(||Cov - I||_F^2 / s) + exp(||mean||^2 / t)    paper, Eq 42
    elbo             -(1/N) sum_n E_q log p(x_n | f(z)) + beta (1/N) sum_n KL[q(z | x_n) || N(0, I)]              paper, Eq 2

with exp by `safe_exp`, HZ the exact Henze-Zirkler statistic, q = N(mean, diag(exp(log std))^2) of the 2 L outputs of h;
E_q is in closed form for one linear map with Gaussian noise, else the mean over draws z = mean + std eps, new each epoch.

An epoch is one step of Adam (Kingma & Ba 2015) on the gradient g, whose norm is held to CLIP times its running mean:

    g <- g min(1, clip u / |g|),  u <- u + a (min(|g|, clip u) - u),  a = max(least, 1 / steps taken)
    m <- m + (1 - b1)(g - m),  v <- b2 v + (1 - b2) g^2,  theta <- theta - rate / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from libi_fast.kernels.henze_zirkler import reference as henze_zirkler
from libi_fast.kernels.importance import reference as importance
from libi_fast.kernels.importance.reference import Draws, bernoulli, gaussian

OBJECTIVES = {
    "reconstruction": ("reconstruction",),
    "joint": ("reconstruction", "henze_zirkler", "covariance", "mean"),
    "elbo": ("reconstruction", "kl"),
}  # with their terms
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
CLIP = 10.0  # times the usual norm of a gradient
USUAL = 0.02  # least weight of a step in that running mean
LINEAR_FROM = 8.0
ROOT_FLOOR = 1e-6


def safe_exp(exponent: Tensor) -> Tensor:
    """exp up to exponent 8, its tangent beyond: exp(u / 0.2) overflows float32 at u = 17.7, which bad starts reach."""
    capped = exponent.clamp_max(LINEAR_FROM).exp()
    return capped + math.exp(LINEAR_FROM) * (exponent - LINEAR_FROM).clamp_min(0)


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., L] and covariance [..., L, L] (divisor n) of codes z [..., n, L]."""
    mean = z.mean(-2)
    centred = z - mean[..., None, :]
    return mean, centred.mT @ centred / z.shape[-2]


def moment_errors(z: Tensor) -> tuple[Tensor, Tensor]:
    """||mean||^2 and ||Cov - I||_F^2 of codes z [..., n, L]."""
    mean, covariance = moments(z)
    identity = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return mean.square().sum(-1), (covariance - identity).square().sum((-2, -1))


def sigmoid_cube_root(a: Tensor) -> Tensor:
    """The first half of the units through a sigmoid, the others through a cube root, a / (a^2 + 1e-6)^(1/3)."""
    bounded, root = a.chunk(2, -1)
    return torch.cat((bounded.sigmoid(), root / (root.square() + ROOT_FLOOR).pow(1 / 3)), -1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: function for name, (function, _) in importance.ACTIVATIONS.items()}, "sigmoid_cube_root": sigmoid_cube_root,
}  # fmt: skip


def jtex_map(a: Tensor, b: Tensor) -> Tensor:
    """chol(A A' + B) of A [..., D, D] and B's diagonal [D]: the matrix of the paper's joint examples."""
    return torch.linalg.cholesky_ex(a @ a.mT + torch.diag_embed(b.to(a.dtype))).L


class Network(NamedTuple):
    """A chain of maps and activations, its tensors as they are trained."""

    weights: Sequence[Tensor]  # [R, out, in], or A of a `jtex_map`
    biases: Sequence[Tensor | None]  # [R, out]
    diagonals: Sequence[Tensor | None]  # B of a `jtex_map` [D] float64
    activations: Sequence[str]
    trained: bool

    @property
    def widths(self) -> list[int]:
        """From inputs to outputs."""
        return [self.weights[0].shape[-1], *(w.shape[-2] for w in self.weights)]

    @property
    def parameters(self) -> list[Tensor]:
        """Weights and biases, layer by layer."""
        return [t for pair in zip(self.weights, self.biases, strict=True) for t in pair if t is not None]

    def with_parameters(self, parameters: Sequence[Tensor]) -> Network:
        left = list(parameters)
        weights, biases = [], []
        for bias in self.biases:
            weights.append(left.pop(0))
            biases.append(None if bias is None else left.pop(0))
        return self._replace(weights=weights, biases=biases)

    def on(self, device: torch.device | str) -> Network:
        diagonals = [None if d is None else d.to(device) for d in self.diagonals]
        return self.with_parameters([t.to(device) for t in self.parameters])._replace(diagonals=diagonals)

    def only(self, replicas: Tensor) -> Network:
        """A copy of some replicas."""
        return self.with_parameters([t[replicas] for t in self.parameters])

    def maps(self) -> list[Tensor]:
        return [w if b is None else jtex_map(w, b) for w, b in zip(self.weights, self.diagonals, strict=True)]

    def __call__(self, h: Tensor) -> Tensor:
        """[R, n, in] -> [R, n, out]."""
        for weight, bias, name in zip(self.maps(), self.biases, self.activations, strict=True):
            h = h @ weight.mT
            h = ACTIVATIONS[name](h if bias is None else h + bias[:, None])
        return h


class Problem(NamedTuple):
    """What is minimised."""

    objective: str  # of OBJECTIVES
    x: Tensor  # [K, N, D]
    dataset: Tensor  # [R] int64, which of the K
    encoder: Network
    decoder: Network
    likelihood: str  # "gaussian" or "bernoulli"
    variance: Tensor  # [1 or D]; [0] for "bernoulli"
    latent_dim: int
    weights: Tensor  # [R, 3] float64: w, s, t of "joint"; beta first for "elbo"
    hz_beta: float
    closed: bool  # E_q in closed form
    samples: int  # draws of a row
    draws: Draws  # its repetition is that of the first epoch

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [p for network in (self.encoder, self.decoder) if network.trained for p in network.parameters]

    @property
    def terms(self) -> tuple[str, ...]:
        return OBJECTIVES[self.objective]

    def on(self, device: torch.device | str) -> Problem:
        draws = self.draws._replace(seed=self.draws.seed.to(device), replicas=self.draws.replicas.to(device))
        return self._replace(
            x=self.x.to(device), dataset=self.dataset.to(device), encoder=self.encoder.on(device),
            decoder=self.decoder.on(device), variance=self.variance.to(device), weights=self.weights.to(device), draws=draws,
        )  # fmt: skip

    def only(self, replicas: Tensor) -> Problem:
        """A copy of some replicas, with their own random numbers."""
        return self._replace(
            dataset=self.dataset[replicas], encoder=self.encoder.only(replicas), decoder=self.decoder.only(replicas),
            weights=self.weights[replicas], draws=self.draws._replace(replicas=self.draws.replicas[replicas]),
        )  # fmt: skip


class Adam(NamedTuple):
    """The optimiser's state, changed in place."""

    means: Sequence[Tensor]  # of each of the problem's parameters
    squares: Sequence[Tensor]
    usual: Tensor  # [R], the running mean of the gradient's norm
    steps: int  # taken before
    epsilon: float = EPSILON


def log_prob(problem: Problem, x: Tensor, z: Tensor) -> Tensor:
    output = problem.decoder(z)
    return gaussian(x, output, problem.variance) if problem.likelihood == "gaussian" else bernoulli(x, output)


def objective(problem: Problem, rise: float, epoch: int) -> list[Tensor]:
    """The terms, [R] each. ``rise`` multiplies beta."""
    x, weights = problem.x[problem.dataset], problem.weights.to(problem.x.dtype)
    outputs = problem.encoder(x)
    latent_dim = problem.latent_dim
    if problem.objective == "elbo":
        mean, log_std = outputs[..., :latent_dim], outputs[..., latent_dim : 2 * latent_dim]
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1).mean(-1)
        return [-expected_log_prob(problem, x, mean, log_std, epoch).mean(-1), weights[:, 0] * rise * kl]
    z = outputs[..., :latent_dim]
    reconstruction = -log_prob(problem, x, z).mean(-1)
    if problem.objective == "reconstruction":
        return [reconstruction]
    off_mean, off_covariance = moment_errors(z)
    statistic, slope = henze_zirkler.forward(z.detach(), problem.hz_beta, True)
    statistic = statistic + (slope * (z - z.detach())).sum((-2, -1))
    return [
        reconstruction, weights[:, 0] * safe_exp(statistic), safe_exp(off_covariance / weights[:, 1]),
        safe_exp(off_mean / weights[:, 2]),
    ]  # fmt: skip


def expected_log_prob(problem: Problem, x: Tensor, mean: Tensor, log_std: Tensor, epoch: int) -> Tensor:
    """E_q log p(x | f(z)) of each row, [R, N]."""
    if problem.closed:
        (matrix,) = problem.decoder.maps()
        spread = (matrix.square() / problem.variance[..., None]).sum(-2)  # [R, L]
        return log_prob(problem, x, mean) - 0.5 * ((2 * log_std).exp() * spread[:, None]).sum(-1)
    rows, draws = slice(0, x.shape[1]), problem.draws._replace(repetition=problem.draws.repetition + epoch)
    noise = draws.noise(rows, slice(0, problem.samples), problem.latent_dim, x.dtype)
    total = torch.zeros_like(x[..., 0])
    for s in range(problem.samples):
        total = total + log_prob(problem, x, mean + log_std.exp() * noise[:, :, s])
    return total / problem.samples


def run(problem: Problem, adam: Adam, rates: Sequence[float], rises: Sequence[float]) -> Tensor:
    """As many epochs as there are rates: parameters and ``adam`` are changed in place; the terms before each step come back,
    [epochs, R, terms]."""
    told = []
    for epoch, (rate, rise) in enumerate(zip(rates, rises, strict=True)):
        leaves = [p.detach().requires_grad_() for p in problem.parameters]
        of_encoder = len(problem.encoder.parameters) * problem.encoder.trained
        moving = problem
        if problem.encoder.trained:
            moving = moving._replace(encoder=problem.encoder.with_parameters(leaves[:of_encoder]))
        if problem.decoder.trained:
            moving = moving._replace(decoder=problem.decoder.with_parameters(leaves[of_encoder:]))
        with torch.enable_grad():
            terms = objective(moving, rise, epoch)
            gradients = torch.autograd.grad(torch.stack(terms).sum(), leaves)
        told.append(torch.stack([t.detach() for t in terms], -1))
        step(problem.parameters, clipped(list(gradients), adam.usual, adam.steps + epoch), adam, adam.steps + epoch + 1, rate)
    return torch.stack(told) if told else problem.x.new_empty((0, len(problem.dataset), len(problem.terms)))


def clipped(gradients: list[Tensor], usual: Tensor, steps: int) -> list[Tensor]:
    """Gradients [R, ...], in place cut where their norm is out of all proportion; ``usual`` [R] is brought up to date. Without
    it one step too long may end in the far tails of a density, where gradients are a million times as large; what they leave
    in Adam's second moments keeps a replica there."""
    norm = torch.cat([g.flatten(1) for g in gradients], 1).norm(dim=1)
    if not steps:
        usual.copy_(norm)
    limit = torch.where(usual > 0, CLIP * usual, math.inf)
    factor = (limit / norm).clamp(max=1.0)
    torch._foreach_mul_(gradients, [factor.view(-1, *(1,) * (g.dim() - 1)) for g in gradients])
    usual.lerp_(torch.minimum(norm, limit), max(USUAL, 1 / (steps + 1)))
    return gradients


@torch.no_grad()
def step(parameters: list[Tensor], gradients: list[Tensor], adam: Adam, count: int, rate: float) -> None:
    root = math.sqrt(1 - BETA2**count)
    for p, g, mean, square in zip(parameters, gradients, adam.means, adam.squares, strict=True):
        mean.lerp_(g, 1 - BETA1)
        square.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
        p.addcdiv_(mean, square.sqrt() / root + adam.epsilon, value=-rate / (1 - BETA1**count))
