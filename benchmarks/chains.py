"""W7: Hamiltonian Monte Carlo on W2's posteriors, 64 chains a row, beside hand-written samplers, BlackJAX and NumPyro.

The same algorithm in all forms: step sizes and scales that were adapted once, the states that warm-up ended in, 8 leapfrogs,
and the jitter of sample_posterior, without which paths are nearly periodic. Every draw is kept, with its log density.

A form is checked transition by transition: its first states from given noise against the reference in float64 (libraries draw
their own, and tell it). Of a whole run the means must agree: chain c of every form starts where ours does, so that the
differences of the chains' means are independent with mean 0, whether or not the chains have converged.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import libi_fast as lf
from benchmarks import peak, report, workloads
from benchmarks.cases import Case, numbers
from benchmarks.workloads import Form, Pairs, Problem
from libi_fast.kernels.chains import reference
from libi_fast.models.networks import recognise
from libi_fast.ops import chains as op
from libi_fast.ops.random import Stream, as_replicas, as_seed

ROWS, CHAINS, TRANSITIONS, LEAPFROGS, JITTER = 100, 64, 200, 8, 0.5
CHECKED, FEW = 10, 4  # transitions, and rows of a peer
CLOSE_CALL = 1e-2  # nats: below it float32 may decide otherwise, and the chain is not followed further
TOLERANCE, OF_OURS = 5e-3, 5e-2  # of z in posterior standard deviations, of log densities in nats; ours on rows that fold, too
STANDARD_ERRORS = 6
CONVERGED = 1.01  # R-hat


class Task(NamedTuple):
    """What every form is given."""

    pairs: Pairs
    variance: float
    x: Tensor  # [N, D]
    z: Tensor  # [N, C, L], where chains start
    step: Tensor  # [N], in units of scale
    scale: Tensor  # [N, L]
    transitions: int
    leapfrogs: int = LEAPFROGS
    jitter: float = JITTER

    @property
    def rows(self) -> int:
        return len(self.x)

    @property
    def count(self) -> int:
        """Leapfrogs of all chains."""
        return self.z.shape[0] * self.z.shape[1] * self.transitions * self.leapfrogs

    def slice(self, rows: slice) -> Task:
        return self._replace(x=self.x[rows], z=self.z[rows], step=self.step[rows], scale=self.scale[rows])

    def to(self, *where: Any) -> Task:
        """Of another dtype, or on another device."""
        pairs = [(weight.to(*where), bias.to(*where)) for weight, bias in self.pairs]
        return Task(pairs, self.variance, *(t.to(*where) for t in self[2:6]), *self[6:])


def model_of(task: Any) -> lf.LatentVariableModel:
    """Of a task of W7 or W9."""
    widths = (task.z.shape[-1], *(len(bias) for _, bias in task.pairs))
    workload = workloads.WORKLOADS["W2"]._replace(widths=widths, variance=task.variance, rows=len(task.x))
    return workloads.model_of(Problem(workload, task.x, task.x, task.x, task.pairs))


class Drawn(NamedTuple):
    """What a form leaves, as it lies: chunks of (z, log density, mean acceptance [n, C]). ``axes`` of z: t transitions, n rows,
    c chains, l latents, where there is no l in one array for each; k, before all others, chunks. The log density's are those
    without l. ``noise``: of a library that was checked, what it drew."""

    chunks: list[tuple[Any, ...]]
    axes: str
    noise: tuple[Tensor, Tensor] | None = None

    def standard(self) -> tuple[Tensor, Tensor, Tensor]:
        """z [N, C, T, L], log density [N, C, T], acceptance [N, C]."""
        parts = [self._of_chunk(*chunk) for chunk in self.chunks]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]

    def _of_chunk(self, z: Any, value: Any, acceptance: Any) -> tuple[Tensor, Tensor, Tensor]:
        alone = "l" not in self.axes
        z = torch.stack([numbers(coordinate) for coordinate in z], -1) if alone else numbers(z)
        value, acceptance = numbers(value), numbers(acceptance)
        axes = self.axes + "l" if alone else self.axes
        if "k" not in axes:
            axes, z, value, acceptance = f"k{axes}", z[None], value[None], acceptance[None]
        z = z.permute([axes.index(a) for a in "knctl"]).flatten(0, 1)
        axes = axes.replace("l", "")
        return z, value.permute([axes.index(a) for a in "knct"]).flatten(0, 1), acceptance.flatten(0, 1)


def cases(quick: bool) -> list[Case]:
    return [case(task_of(8, CHAINS, 40), quick) if quick else case(task_of(ROWS, CHAINS, TRANSITIONS))]


def task_of(rows: int, chains: int, transitions: int, device: str = "cpu") -> Task:
    """Warm-up from the proposal, whose step sizes, scales and last states are kept for all forms."""
    p = Problem.of(workloads.WORKLOADS["W2"]._replace(rows=rows, samples=1), device)
    shared: dict[str, Any] = {"chains": chains, "leapfrogs": LEAPFROGS, "jitter": JITTER}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lf.DivergenceWarning)  # where a posterior is folded, in all forms alike
        found = lf.sample_posterior(workloads.model_of(p), p.x, chains, proposal=(p.mean, p.log_std), seed=1, **shared)
    assert found.step_size is not None and found.scale is not None
    return Task(p.pairs, p.workload.variance, p.x, found.z, found.step_size, found.scale, transitions)


# --- ours ---


def ours(task: Task) -> Callable[[], Drawn]:
    model, shape = model_of(task), task.z.shape
    recognised = recognise(model.decoder, model.likelihood.name)
    assert recognised is not None
    settings = op.Settings("hmc", task.transitions, task.leapfrogs, jitter=task.jitter)
    step = task.step[None, :, None].expand(1, *shape[:2]).contiguous()
    tensors = (task.x[None], task.z[None].contiguous(), step, task.scale.log()[None])
    variance, seed = model.likelihood.variance[None], as_seed(0, task.x.device)
    replicas = as_replicas(None, task.x.device)

    def call() -> Drawn:
        result = op.chains_of_layers(*tensors, *recognised, variance, seed, replicas, settings)
        return Drawn([(result.z[0], result.log_density[0], result.acceptance[0])], "nctl")

    return call


def our_noise(task: Task) -> tuple[Tensor, Tensor]:
    """The noise that our call draws: normal [n, C, T, L], uniform [n, C, T, 2]."""
    rows, chains, latents = task.z.shape
    kinds = ((lf.philox_normal, latents, Stream.MOMENTUM), (lf.philox_uniform, 2, Stream.ACCEPTANCE))
    normal, uniform = (
        torch.stack([draw(0, rows, task.transitions * each, repetition=c, stream=s) for c in range(chains)], 1)
        .unflatten(-1, (-1, each)) for draw, each, s in kinds
    )  # fmt: skip
    return normal, uniform


# --- what is right ---


class Truth(NamedTuple):
    """In float64, z [n, C, T, L] and log density [n, C, T]; ``followed`` [n, C, T]: no decision so far was a close call."""

    z: Tensor
    log_density: Tensor
    followed: Tensor


@torch.no_grad()
def truth_of(task: Task, normal: Tensor, uniform: Tensor) -> Truth:
    """The reference one transition after another, as it tells acceptance in a call's mean alone."""
    task, kinds = task.to("cpu", torch.float64), [t.double().flatten(2) for t in (normal, uniform)]
    model = model_of(task)
    recognised = recognise(model.decoder, model.likelihood.name)
    assert recognised is not None
    layers, parameters = recognised
    decoder = layers.decoder(parameters, model.likelihood.variance[None])

    def density(rows: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        return reference.log_joint(decoder, task.x[None, rows, None], z)

    def given(noise: Tensor) -> Callable[..., Tensor]:
        def draw(
            seed: Any, replicas: Any, first: int, rows: int, first_draw: int, draws: int, chain: int, *rest: Any
        ) -> Tensor:
            return noise[None, first : first + rows, chain, first_draw : first_draw + draws]

        return draw

    noise = reference.Noise(torch.tensor(0), torch.tensor([0]), (0, 0), *(given(k) for k in kinds))
    z, step = task.z[None], task.step[None, :, None].expand(1, *task.z.shape[:2])
    followed, kept = torch.ones_like(step[0], dtype=torch.bool), []
    for t in range(task.transitions):
        settings = reference.Settings("hmc", 1, task.leapfrogs, jitter=task.jitter, first_transition=t)
        result = reference.run(density, z, step, task.scale.log()[None], noise, settings, decoder.widest)
        z = result.z[:, :, :, 0]
        followed = followed & ((uniform[:, :, t, 0].double().log() - result.acceptance[0].log()).abs() > CLOSE_CALL)
        kept.append((z[0], result.log_density[0, :, :, 0], followed))
    return Truth(*(torch.stack(part, 2) for part in zip(*kept, strict=True)))


def error(found: Drawn, truth: Truth, scale: Tensor, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Of z in posterior standard deviations, over the states of chains that are still followed."""
    z, log_density = (t.cpu() for t in found.standard()[:2])
    off = (z.double() - truth.z).abs().div_(scale.cpu()[:, None, None]).amax(-1)[truth.followed]
    of_density = (log_density.double() - truth.log_density).abs()[truth.followed]
    largest, density = (float(t.max()) for t in (off, of_density))
    return {
        "value": largest, "mean value": float(off.square().mean().sqrt()), "log density": density, "rows": len(z),
        "followed to the end": float(truth.followed[..., -1].float().mean()),
        "allowed": largest <= tolerance and density <= tolerance,
    }  # fmt: skip


def means(found: Drawn) -> Tensor:
    """Of each chain, [N, C, L + 2]: of its latents, its log density and its acceptance."""
    z, log_density, acceptance = found.standard()
    of_density = log_density.mean(2, dtype=torch.float64)
    return torch.cat((z.mean(2, dtype=torch.float64), torch.stack((of_density, acceptance.double()), -1)), -1)


def agree(found: Drawn, expected: Tensor) -> dict[str, Any]:
    """Chain by chain with ours, in standard errors: the largest of the rows', and of their sums over rows."""
    found_means = means(found)
    difference = found_means - expected
    chains = difference.shape[1]
    errors = difference.mean(1) / (difference.std(1) / math.sqrt(chains)).clamp_min(1e-12)
    largest, summed = float(errors.abs().max()), float((errors.sum(0) / math.sqrt(len(errors))).abs().max())
    return {
        "standard errors, largest of rows": largest, "of all rows": summed,
        "mean acceptance": float(found_means[..., -1].mean()),
        "allowed": largest <= STANDARD_ERRORS and summed <= STANDARD_ERRORS,
    }  # fmt: skip


def case(task: Task, quick: bool = False) -> Case:
    short = task.slice(slice(0, ROWS))._replace(transitions=min(CHECKED, task.transitions))
    few, noise = short.slice(slice(0, FEW)), our_noise(short)
    some = tuple(t[:FEW] for t in noise)
    kept: dict[str, Any] = {}  # made when first asked for
    call = ours(task)

    def judge(found: Drawn) -> dict[str, Any]:
        if "truth" not in kept:
            kept["truth"] = truth_of(short, *noise)
        return error(found, kept["truth"], short.scale, OF_OURS)

    def judge_few(found: Any) -> dict[str, Any]:
        if found.noise is not None:
            return error(found, truth_of(few, *found.noise), few.scale)
        if "few" not in kept:
            kept["few"] = truth_of(few, *some)
        return error(found, kept["few"], few.scale)

    def whole(found: Any) -> dict[str, Any]:
        if "means" not in kept:
            kept["means"] = means(call())
        return agree(found, kept["means"])

    rows, chains, _ = task.z.shape
    size = f"{rows} x {chains} chains x {task.transitions} transitions of {task.leapfrogs} leapfrogs"
    return Case(
        "W7", size, call, lambda: judge(ours(short)()), lambda: judge(torch_check("torch eager")(short, *noise)), judge_few,
        (few, *some), lambda: forms(task, quick), whole, lambda: peak.bound(counts(task)),
        lambda runs, milliseconds: effective(task, runs, milliseconds),
    )  # fmt: skip


def counts(task: Any) -> dict[str, float]:
    """Of each leapfrog of a task of W7 or W9: the products forward and backward, tanh of each hidden unit and its slope. The
    noise, two normals and two uniforms a transition, is left out, and so is what moves z and its momentum."""
    hidden, latents = task.pairs[0][0].shape
    products = hidden * (latents + len(task.pairs[1][0]))
    return {"multiply-add": float(task.count * (2 * products + hidden)), "tanh": float(task.count * hidden)}


def effective(task: Task, runs: dict[str, Callable[[], Any]], milliseconds: dict[str, float]) -> dict[str, dict[str, Any]]:
    """What the draws of each form's run are worth. Effective samples (bulk, of a row's worst latent) are summed over the rows
    that have converged in every run, but the time is that of all: a folded posterior takes more transitions than these."""
    found = {}
    for name, run in runs.items():
        z = run().standard()[0]
        found[name] = (lf.r_hat(z).amax(-1), lf.effective_sample_size(z).amin(-1))
    converged = torch.stack([r_hat < CONVERGED for r_hat, _ in found.values()]).all(0)
    results = {}
    for name, (r_hat, size) in found.items():
        total, seconds = float(size[converged].sum()), milliseconds[name] / 1e3
        results[name] = {
            "leapfrogs a second": task.count / seconds, "effective samples a second": total / seconds,
            "effective samples": total, "rows that converged in every run": int(converged.sum()),
            "rows that converged": int((r_hat < CONVERGED).sum()), "r-hat of all rows": float(r_hat.max()),
            "r-hat": float(r_hat[converged].max()) if converged.any() else None,
        }  # fmt: skip
    header = ["", "leapfrogs a second", "effective samples a second", "r-hat", "rows that converged", "r-hat of all rows"]
    rows = [
        [name, *(report.number(r[key], form) for key, form in zip(header[1:], (".3g", ".3g", ".4f", "d", ".3f"), strict=True))]
        for name, r in results.items()
    ]
    table = f"\nW7: effective samples of the {int(converged.sum())} of {task.rows} rows that converged in every run"
    report.table(table, header, rows)
    return results


# --- peers in torch ---

Density = Callable[..., Any]
"""(pairs, variance, x, z) -> log p(x, z) [n, C] and its gradient, by hand. x [n, 1, D] and z [n, C, L], or lists of their
coordinates."""


def constant(variance: float, outputs: int, latents: int) -> float:
    return 0.5 * (outputs * math.log(2 * math.pi * variance) + latents * math.log(2 * math.pi))


def natural(pairs: Pairs, variance: float, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    (w, b), (v, c) = pairs
    h = F.linear(z, w, b).tanh()
    score = (x - F.linear(h, v, c)) / variance
    value = -0.5 * variance * score.square().sum(-1) - 0.5 * z.square().sum(-1) - constant(variance, x.shape[-1], z.shape[-1])
    return value, (score @ v * (1 - h * h)) @ w - z


def by_autograd(pairs: Pairs, variance: float, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        misfit = (x - workloads.decode(pairs, leaf)).square().sum(-1)
        value = -0.5 * (misfit / variance + leaf.square().sum(-1)) - constant(variance, x.shape[-1], z.shape[-1])
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def in_lanes(variance: float, x: list[Tensor], outputs: list[Tensor], slopes: list[list[Tensor]], z: list[Tensor]) -> Any:
    """From outputs and the Jacobian's columns, slopes[i][d]."""
    score = [(a - o) / variance for a, o in zip(x, outputs, strict=True)]
    gradient = [sum(s * t for s, t in zip(score, column, strict=True)) - a for column, a in zip(slopes, z, strict=True)]
    squares = variance * sum(s * s for s in score) + sum(a * a for a in z)
    return -0.5 * squares - constant(variance, len(x), len(z)), gradient


def by_coordinate(pairs: Pairs, variance: float, x: list[Tensor], z: list[Tensor]) -> Any:
    """Hidden units as the last dimension, summed over by what a compiler makes one loop of."""
    (w, b), (v, c) = pairs
    h = (b + sum(w[:, i] * a[..., None] for i, a in enumerate(z))).tanh()
    slope = 1 - h * h
    outputs = [c[d] + (v[d] * h).sum(-1) for d in range(len(x))]
    slopes = [[(w[:, i] * v[d] * slope).sum(-1) for d in range(len(x))] for i in range(len(z))]
    return in_lanes(variance, x, outputs, slopes, z)


def unrolled(pairs: Pairs, variance: float, x: list[Tensor], z: list[Tensor]) -> Any:
    """Hidden unit by hidden unit: every number in flight is [n, C]."""
    (w, b), (v, c) = pairs
    outputs = [c[d] for d in range(len(x))]
    slopes: list[list[Any]] = [[0.0] * len(x) for _ in z]
    for j in range(len(w)):
        h = (b[j] + sum(w[j, i] * a for i, a in enumerate(z))).tanh()
        slope = 1 - h * h
        outputs = [o + v[d, j] * h for d, o in enumerate(outputs)]
        slopes = [[s + w[j, i] * v[d, j] * slope for d, s in enumerate(column)] for i, column in enumerate(slopes)]
    return in_lanes(variance, x, outputs, slopes, z)


class Kind(NamedTuple):
    density: Density
    lanes: bool = False  # coordinates are arrays of their own
    compiled: str = ""  # "transition", or where its eight densities would take minutes to compile, "leapfrog"


KINDS = {
    "torch eager": Kind(natural),
    "torch eager, autograd": Kind(by_autograd),
    "torch.compile": Kind(natural, compiled="transition"),
    "torch.compile by coordinate": Kind(by_coordinate, True, "transition"),
    "torch.compile unrolled": Kind(unrolled, True, "leapfrog"),
}
TORCH_ROWS = {
    "": (5, 10, 25, 50, 100),
    "torch eager, autograd": (25, 100), "torch.compile unrolled": (25, 100),
}  # fmt: skip


def leapfrog(density: Density, pairs: Pairs, variance: float, x: Any, z: list[Tensor], u: list[Tensor], gradient: list[Tensor],
             h: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
    """All but the first argument: lists of coordinates [n, C], or of one array [n, C, L]."""
    u = [a + 0.5 * b * g for a, b, g in zip(u, h, gradient, strict=True)]
    z = [a + b * c for a, b, c in zip(z, h, u, strict=True)]
    value, gradient = evaluated(density, pairs, variance, x, z)
    return z, [a + 0.5 * b * g for a, b, g in zip(u, h, gradient, strict=True)], value, gradient


def evaluated(density: Density, pairs: Pairs, variance: float, x: Any, z: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    if len(x) > 1:
        return density(pairs, variance, x, z)
    value, gradient = density(pairs, variance, x[0], z[0])
    return value, [gradient]


def transition(move: Callable[..., Any], leapfrogs: int, jitter: float, pairs: Pairs, variance: float, x: Any, z: list[Tensor],
               value: Tensor, gradient: list[Tensor], summed: Tensor, u: list[Tensor], v: Tensor, w: Tensor,
               steps: list[Tensor]) -> Any:  # fmt: skip
    """-> z, value, gradient and the sum of acceptance probabilities after it; v and w uniform [n, C]."""
    widen = (lambda t: t) if len(z) > 1 else (lambda t: t[..., None])

    def kinetic(u: list[Tensor]) -> Tensor:
        return 0.5 * (sum(a * a for a in u) if len(u) > 1 else u[0].square().sum(-1))  # type: ignore[return-value]

    factor = widen(1 + jitter * (2 * w - 1))
    h = [s * factor for s in steps]
    new_z, new_u, new_value, new_gradient = z, u, value, gradient
    for _ in range(leapfrogs):
        new_z, new_u, new_value, new_gradient = move(pairs, variance, x, new_z, new_u, new_gradient, h)
    gain = new_value - value - kinetic(new_u) + kinetic(u)
    accept = v.log() < gain
    wide = widen(accept)
    z, gradient = (
        [torch.where(wide, a, b) for a, b in zip(new, old, strict=True)] for new, old in ((new_z, z), (new_gradient, gradient))
    )
    return z, torch.where(accept, new_value, value), gradient, summed + gain.clamp_max(0).exp().nan_to_num(0.0)


class Sampler:
    """A peer in torch: a Python loop over transitions."""

    def __init__(self, kind: str):
        self.density, self.lanes, compiled = KINDS[kind]

        def move(*arguments: Any) -> Any:
            return leapfrog(self.density, *arguments)

        self.move = torch.compile(move, dynamic=False) if compiled == "leapfrog" else move

        def step(*arguments: Any) -> Any:
            return transition(self.move, *arguments)

        self.step = torch.compile(step, dynamic=False) if compiled == "transition" else step

    def parts(self, t: Tensor) -> list[Tensor]:
        return [c.contiguous() for c in t.unbind(-1)] if self.lanes else [t]

    @torch.no_grad()
    def __call__(self, task: Task, noise: Callable[[int], tuple[Any, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """``noise``: of transition t, u as z has it, v and w. -> z [T, L, n, C] or [T, n, C, L]; [T, n, C]; [n, C]."""
        x, z, steps = self.parts(task.x[:, None]), self.parts(task.z), self.parts((task.step[:, None] * task.scale)[:, None])
        shape = task.z.shape[:2]
        value, gradient = evaluated(self.density, task.pairs, task.variance, x, z)
        summed = value.new_zeros(shape)
        kept = value.new_empty(task.transitions, len(z), *z[0].shape)
        values = value.new_empty(task.transitions, *shape)
        for t in range(task.transitions):
            u, v, w = noise(t)
            z, value, gradient, summed = self.step(
                task.leapfrogs, task.jitter, task.pairs, task.variance, x, z, value, gradient, summed, u, v, w, steps
            )
            for i, coordinate in enumerate(z):
                kept[t, i] = coordinate
            values[t] = value
        return kept if self.lanes else kept[:, 0], values, summed / task.transitions

    @property
    def axes(self) -> str:
        return "tlnc" if self.lanes else "tncl"

    def drawing(self, task: Task) -> Callable[[int], tuple[Any, Tensor, Tensor]]:
        rows, chains, latents = task.z.shape
        device = task.z.device

        def draw(t: int) -> tuple[Any, Tensor, Tensor]:
            shape = (latents, rows, chains) if self.lanes else (rows, chains, latents)
            u = torch.randn(shape, device=device)
            return list(u) if self.lanes else [u], *torch.rand(2, rows, chains, device=device)

        return draw


def torch_check(kind: str, sampler: Sampler | None = None) -> Callable[[Task, Tensor, Tensor], Drawn]:
    sampler = Sampler(kind) if sampler is None else sampler

    def check(task: Task, normal: Tensor, uniform: Tensor) -> Drawn:
        def given(t: int) -> tuple[Any, Tensor, Tensor]:
            u, v, w = (noise.to(task.z.device) for noise in (normal[:, :, t], *uniform[:, :, t].unbind(-1)))
            return sampler.parts(u), v.contiguous(), w.contiguous()

        return Drawn([sampler(task, given)], sampler.axes)

    return check


def forms(task: Task, quick: bool) -> Iterator[Form]:
    """A GPU is given all rows at once: it has the memory, and fewer would not fill it."""
    whole = quick or task.x.is_cuda
    for kind in KINDS if not quick else ("torch eager", "torch.compile"):
        sampler = Sampler(kind)
        for rows in (task.rows,) if whole else TORCH_ROWS.get(kind, TORCH_ROWS[""]):
            chunks = [task.slice(slice(start, start + rows)) for start in range(0, task.rows, rows)]

            def run(chunks: list[Task] = chunks, sampler: Sampler = sampler) -> Drawn:
                return Drawn([sampler(chunk, sampler.drawing(chunk)) for chunk in chunks], sampler.axes)

            yield Form(f"{kind}, {rows} rows", "ieee", run, torch_check(kind, sampler))
    if importlib.util.find_spec("jax") is not None:
        from benchmarks import chains_jax

        if task.x.is_cuda and not chains_jax.on_gpu():
            return
        swept = chains_jax.QUICK if quick else chains_jax.SWEPT
        yield from chains_jax.forms(task, chains_jax.of_all_rows(swept, task.rows) if whole else swept)
