"""W8: epochs of LiBI's step 1 for many replicas of a small system at once, Adam included, beside the same in torch and JAX.

All forms begin with the same parameters and return the objective's terms, epoch by epoch, and the parameters. Torch's forms
differ in how the statistic's pairs are taken (those of W5a) and in whether the rest is compiled; Adam is torch's fused one. JAX
scans over the epochs in one call, over all replicas at once or one after another.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import libi_fast as lf
from benchmarks import henze_zirkler, peak
from benchmarks.cases import Case, numbers
from benchmarks.workloads import Form
from libi_fast.kernels.henze_zirkler import reference as statistic
from libi_fast.kernels.training import reference
from libi_fast.ops import training as op
from libi_fast.ops.random import drawing
from libi_fast.training.replicas import Replicas, make_system
from libi_fast.training.start import whiten_codes

REPLICAS = {1: 20, 50: 5, 320: 2}  # and epochs of a call
SWEPT = {1: 20, 32: 6, 320: 2, 1600: 1}
ON_GPU = {1: 200, 32: 200, 320: 50, 1600: 10}
MOST_AT_ONCE = 320  # replicas whose pairs JAX is given together on a CPU: beyond, they would fill its memory
NAMES = ("LinearJTEx", "Mobius")
RATE = 0.01
SPARE = 100  # of so many replicas one more is begun
BEGUN = 400  # epochs before: at the start gradients fall by orders of magnitude in a step, and codes may turn over
TOLERANCE = 2e-3  # of a term before the first step, relative to 1 + its size, as for W5
MOVED = (
    1e-2  # of the parameters' mean difference at the end, relative to how far Adam may have moved them: it takes whole steps
)
# along gradients that are rounding alone
Result = tuple[Tensor, Tensor]


class Task(NamedTuple):
    problem: op.Problem
    epochs: int

    def copy(self, dtype: torch.dtype = torch.float32) -> op.Problem:
        p = self.problem
        encoder, decoder = (n.with_parameters([t.to(dtype, copy=True) for t in n.parameters]) for n in (p.encoder, p.decoder))
        return p._replace(x=p.x.to(dtype), variance=p.variance.to(dtype), encoder=encoder, decoder=decoder)


def task_of(name: str, replicas: int, rows: int, epochs: int) -> Task:
    """Restarts of a system of the paper, begun as LiBI begins them."""
    data = lf.data.load(name, seed=0)
    model, inference = data.model(), data.inference()
    begun_with = replicas + replicas // SPARE
    stacked = Replicas([make_system(model, inference, None, seed, fresh=True) for seed in range(begun_with)])
    whiten_codes(stacked, "inference.", data.train)
    values = {k: v.detach().clone() for k, v in stacked.parameters.items()}
    if name == "LinearJTEx":
        encoder = op.Network(
            [values["inference.network.weight"]], [values["inference.network.bias"]], [None], ["identity"], True
        )
        decoder = op.Network([values["model.decoder.a"]], [None], [model.decoder.b], ["identity"], True)
    else:

        def layers(prefix: str, activation: str) -> op.Network:
            weights, biases = ([values[f"{prefix}.{i}.{kind}"] for i in (0, 2)] for kind in ("weight", "bias"))
            return op.Network(weights, biases, [None, None], [activation, "identity"], True)

        encoder, decoder = layers("inference.network", "relu"), layers("model.decoder", "tanh")
    x = data.train[:rows]
    draws = op.Draws(torch.tensor(0), torch.arange(begun_with), 0, 0, 0, drawing("normal"))
    weights = torch.tensor([1.0, 0.2, 0.2], dtype=torch.float64).expand(begun_with, 3)
    problem = op.Problem(
        "joint", x[None], torch.zeros(begun_with, dtype=torch.int64), encoder, decoder, "gaussian",
        model.likelihood.variance.detach(), model.latent_dim, weights, statistic.default_beta(rows, 2), False, 1, draws,
    )  # fmt: skip
    begun = Task(problem, epochs).copy()
    op.train(begun, adam(begun), [RATE] * BEGUN, [1.0] * BEGUN)
    return Task(regular(begun, replicas), epochs)


def regular(problem: op.Problem, count: int) -> op.Problem:
    """``count`` replicas whose codes have a covariance of full rank in float32, too: the statistic of others is 4 n there."""
    codes = problem.encoder(problem.x[problem.dataset])[..., : problem.latent_dim]
    kept = (~statistic.whiten(codes)[2]).nonzero().flatten()[:count]
    assert len(kept) == count
    return problem.only(kept)


def adam(problem: op.Problem) -> op.Adam:
    zeros = [[torch.zeros_like(p) for p in problem.parameters] for _ in range(2)]
    return op.Adam(*zeros, problem.x.new_zeros(len(problem.dataset)), 0)


def flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten(1) for p in parameters], 1)


def ours(task: Task, backend: str, dtype: torch.dtype = torch.float32) -> Result:
    problem = task.copy(dtype)
    terms = op.train(problem, adam(problem), [RATE] * task.epochs, [1.0] * task.epochs, backend=backend)
    return terms, flat(problem.parameters)


# --- peers ---


class Pairs(torch.autograd.Function):
    """The statistic with its gradient from the forward pass, by one of W5a's sums over pairs."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, beta: float, sums: Any) -> Tensor:
        value, slope = statistic.forward(z, beta, True, sums)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[:, None, None] * ctx.saved_tensors[0], None, None


def by_torch(task: Task, sums: Any, rest: Callable[..., Any]) -> Result:
    problem = task.copy()
    leaves = [p.requires_grad_() for p in problem.parameters]
    optimiser = torch.optim.Adam(leaves, lr=RATE, fused=True)
    told, usual = [], adam(problem).usual
    for epoch in range(task.epochs):
        optimiser.zero_grad(set_to_none=True)
        z, reconstruction, covariance, mean = rest(problem)
        normality = reference.safe_exp(Pairs.apply(z.contiguous(), problem.hz_beta, sums))
        terms = [reconstruction, normality, covariance, mean]
        torch.stack(terms).sum().backward()
        reference.clipped([p.grad for p in leaves], usual, epoch)
        optimiser.step()
        told.append(torch.stack([t.detach() for t in terms], -1))
    return torch.stack(told), flat(leaves)


def all_but_pairs(problem: op.Problem) -> tuple[Tensor, ...]:
    x = problem.x[0].expand(len(problem.dataset), -1, -1)
    z = problem.encoder(x)[..., : problem.latent_dim]
    off_mean, off_covariance = reference.moment_errors(z)
    reconstruction = -reference.log_prob(problem, x, z).mean(-1)
    # The weights are 1, 0.2 and 0.2 of every replica.
    return z, reconstruction, reference.safe_exp(off_covariance / 0.2), reference.safe_exp(off_mean / 0.2)


def by_jax(task: Task, mapped: bool) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    p = task.problem
    n, d, beta = p.x.shape[1], p.latent_dim, p.hz_beta
    b2 = beta * beta
    x, variance = jnp.asarray(p.x[0].cpu().numpy()), jnp.asarray(p.variance.cpu().numpy())
    constant = float(p.variance.double().log().expand(p.x.shape[-1]).sum()) + p.x.shape[-1] * reference.importance.LOG_2PI
    functions = {"identity": lambda a: a, "relu": jax.nn.relu, "tanh": jnp.tanh}

    def network(of: op.Network, parameters: list[Any], h: Any) -> Any:
        left = list(parameters)
        for bias, diagonal, name in zip(of.biases, of.diagonals, of.activations, strict=True):
            w = left.pop(0)
            if diagonal is not None:
                w = jnp.linalg.cholesky(w @ w.T + jnp.diag(jnp.asarray(diagonal.float().cpu().numpy())))
            h = h @ w.T
            h = functions[name](h if bias is None else h + left.pop(0))
        return h

    def safe_exp(u: Any) -> Any:
        high = reference.LINEAR_FROM
        return jnp.exp(jnp.minimum(u, high)) + jnp.exp(high) * jnp.maximum(u - high, 0)

    def henze_zirkler(z: Any, covariance: Any, centred: Any) -> Any:
        y = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(covariance), centred.T, lower=True)
        square = sum((c[:, None] - c[None, :]) ** 2 for c in y)
        single = jnp.exp(-b2 / (2 * (1 + b2)) * (y**2).sum(0)).sum()
        pairs = jnp.exp(-0.5 * b2 * square).sum() / n
        return pairs - 2 * (1 + b2) ** (-d / 2) * single + n * (1 + 2 * b2) ** (-d / 2)

    def loss(parameters: list[Any]) -> tuple[Any, Any]:
        of_encoder = len(p.encoder.parameters)
        z = network(p.encoder, parameters[:of_encoder], x)[:, :d]
        output = network(p.decoder, parameters[of_encoder:], z)
        mean = z.mean(0)
        centred = z - mean
        covariance = centred.T @ centred / n
        terms = jnp.stack([
            0.5 * (((output - x) ** 2 / variance).sum(-1) + constant).mean(), safe_exp(henze_zirkler(z, covariance, centred)),
            safe_exp(((covariance - jnp.eye(d)) ** 2).sum() / 0.2), safe_exp((mean**2).sum() / 0.2),
        ])  # fmt: skip
        return terms.sum(), terms

    one = jax.grad(loss, has_aux=True)

    def epoch(carry: Any, step: Any) -> Any:
        parameters, means, squares, usual = carry
        gradients, terms = jax.lax.map(one, parameters) if mapped else jax.vmap(one)(parameters)
        tree = jax.tree.map
        norm = jnp.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(1) for g in gradients))
        usual = jnp.where(step == 1, norm, usual)
        limit = jnp.where(usual > 0, reference.CLIP * usual, jnp.inf)
        factor = jnp.minimum(limit / norm, 1)
        gradients = tree(lambda g: g * factor.reshape(-1, *(1,) * (g.ndim - 1)), gradients)
        usual += jnp.maximum(reference.USUAL, 1 / step) * (jnp.minimum(norm, limit) - usual)
        means = tree(lambda m, g: m + (1 - reference.BETA1) * (g - m), means, gradients)
        squares = tree(lambda v, g: reference.BETA2 * v + (1 - reference.BETA2) * g * g, squares, gradients)
        size, root = RATE / (1 - reference.BETA1**step), jnp.sqrt(1 - reference.BETA2**step)
        parameters = tree(
            lambda a, m, v: a - size * m / (jnp.sqrt(v) / root + reference.EPSILON), parameters, means, squares
        )  # fmt: skip
        return (parameters, means, squares, usual), terms

    start = [jnp.asarray(t.cpu().numpy()) for t in p.parameters]

    @jax.jit
    def program(parameters: list[Any]) -> Any:
        zeros = [jnp.zeros_like(a) for a in parameters]
        (parameters, *_), terms = jax.lax.scan(
            epoch, (parameters, zeros, zeros, jnp.zeros(len(start[0]))), jnp.arange(1.0, task.epochs + 1)
        )
        return terms, jnp.concatenate([a.reshape(len(a), -1) for a in parameters], 1)

    def run() -> Any:
        with jax.default_matmul_precision("highest"):
            return program(start)

    return run


def peers(task: Task, few: bool) -> Iterator[Form]:
    """``few``: of torch's pairs by products alone."""
    replicas, rows = len(task.problem.dataset), task.problem.x.shape[1]
    compiled = torch.compile(all_but_pairs, dynamic=False)
    for name, sums in henze_zirkler.pair_forms(replicas, rows).items():
        kind, variant = name.split(", ", 1)
        if few and "products" not in variant:
            continue
        rest = compiled if kind == "torch.compile" else all_but_pairs

        def run(sums: Any = sums, rest: Any = rest) -> Result:
            return by_torch(task, sums, rest)

        yield Form(f"{kind}, pairs by {variant}", "ieee", run, run)
    if importlib.util.find_spec("jax") is not None:
        together = task.problem.x.is_cuda or replicas <= MOST_AT_ONCE
        for mapped in [*([False] if together else []), *([True] if replicas > 1 else [])]:
            run = by_jax(task, mapped)
            yield Form(f"JAX, {'one after another' if mapped else 'all replicas'}", "ieee", run, run)


# --- the case ---


def compared(found: tuple[Any, ...], truth: Result, epochs: int) -> dict[str, Any]:
    """The first terms relative to 1 + their size, the last parameters relative to what Adam's steps may move them by."""
    terms, parameters = (numbers(f).double() for f in found)
    off = (terms[0] - truth[0][0]).abs() / (1 + truth[0][0].abs())
    moved = (parameters - truth[1]).abs().mean() / (RATE * epochs)
    largest, of_parameters = float(off.max()), float(moved)
    return {
        "value": largest, "gradients": of_parameters, "mean value": float(off.square().mean().sqrt()),
        "allowed": largest <= TOLERANCE and of_parameters <= MOVED,
    }  # fmt: skip


def case(name: str, replicas: int, rows: int, epochs: int, device: str = "cpu", few: bool = False) -> Case:
    task, backend = task_of(name, replicas, rows, epochs), "cpu" if device == "cpu" else "triton"
    task = task._replace(problem=task.problem.on(device))
    kept: list[Result] = []

    def error(found: tuple[Any, ...]) -> dict[str, Any]:
        if not kept:
            kept.append(ours(task, "reference", torch.float64))
        return compared(found, kept[0], epochs)

    return Case(
        f"W8, {name}, R = {replicas}", f"{replicas} x {rows} points, {epochs} epochs of step 1 with Adam",
        lambda: ours(task, backend), lambda: error(ours(task, backend)), lambda: error(ours(task, "reference")), error, (),
        lambda: peers(task, few), None, lambda: peak.bound(counts(task)),
    )  # fmt: skip


def cases(quick: bool = False) -> list[Case]:
    sizes = {2: 2} if quick else REPLICAS
    return [case(name, r, 60 if quick else 500, e) for name in NAMES for r, e in sizes.items()]


def on_gpu(quick: bool) -> Iterator[tuple[str, Case, float]]:
    """(name, case, cycles of a multiprocessor: one for 16 exponentials, of each ordered pair as in W5)."""
    rows = 60 if quick else 500
    for name in NAMES:
        for r, e in ({2: 2} if quick else ON_GPU).items():
            yield f"{name} {r}", case(name, r, rows, e, "cuda", few=r > 32), r * e * rows * rows / 16


def counts(task: Task) -> dict[str, float]:
    """Of each unordered pair of points an exponential and six multiply-adds; of each weight and point one forward and two back;
    a tanh of each hidden unit of the decoder."""
    p = task.problem
    each = float(task.epochs * len(p.dataset) * p.x.shape[1])
    pairs = each * (p.x.shape[1] - 1) / 2
    weights = sum(w.shape[1] * w.shape[2] for n in (p.encoder, p.decoder) for w in n.weights)
    hidden = sum(w.shape[1] for w, a in zip(p.decoder.weights, p.decoder.activations, strict=True) if a == "tanh")
    return {"multiply-add": 6 * pairs + 3 * each * weights, "exp2": pairs, "tanh": each * hidden}
