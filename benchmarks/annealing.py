"""W9: annealed importance sampling of W2's model, from the prior to the posterior and back, beside the same schedule in
torch and JAX.

Data are simulated, so that the way back starts at exact draws from the posterior. All forms get the same temperatures and the
step sizes that a pilot run found; both directions are one batch, N rows forward and the same N backward. The noise of its
likelihood, 1e-5, makes a posterior's width a thousandth of the prior's.

A form is checked temperature by temperature: its weights and states from given noise against the reference in float64, up to
the first close call of a chain. Of a whole run the log-weights' means must agree, row by row, in standard errors of both.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import libi_fast as lf
from benchmarks import chains, peak, workloads
from benchmarks.cases import Case, numbers
from benchmarks.chains import KINDS, evaluated
from benchmarks.workloads import Form, Pairs, Problem
from libi_fast.kernels.annealing import reference
from libi_fast.kernels.chains.reference import Noise, log_joint
from libi_fast.models.networks import recognise
from libi_fast.ops import annealing as op
from libi_fast.ops.random import Stream, as_replicas, as_seed

ROWS, CHAINS, TEMPERATURES, LEAPFROGS, JITTER = 20, 16, 1000, 10, 0.5
CHECKED = 10  # temperatures
TOLERANCE = 5e-3  # of z, of the prior's width; of log-weights, relative to 1 + their size
CLOSE_CALL = 1e-2  # nats, as in W7
STANDARD_ERRORS = 6


class Task(NamedTuple):
    """What every form is given; M rows, of which each has a direction of its own."""

    pairs: Pairs
    variance: float
    x: Tensor  # [M, D]
    z: Tensor  # [M, C, L], where chains start
    betas: Tensor  # [M, T + 1], float64
    steps: Tensor  # [M, T]
    leapfrogs: int = LEAPFROGS
    jitter: float = JITTER

    @property
    def temperatures(self) -> int:
        return self.steps.shape[1]

    @property
    def count(self) -> int:
        """Leapfrogs of all chains."""
        return self.z.shape[0] * self.z.shape[1] * self.temperatures * self.leapfrogs

    def rows(self, rows: slice) -> Task:
        return Task(self.pairs, self.variance, *(t[rows] for t in self[2:6]), *self[6:])

    def first(self, temperatures: int) -> Task:
        return self._replace(betas=self.betas[:, : temperatures + 1], steps=self.steps[:, :temperatures])


class Annealed(NamedTuple):
    """log_weight [M, C], and where chains end, z [M, C, L]; tensors or arrays."""

    log_weight: Any
    z: Any


def cases(quick: bool) -> list[Case]:
    return [case(task_of(4, 4, 40), quick) if quick else case(task_of(ROWS, CHAINS, TEMPERATURES))]


def task_of(rows: int, chains_: int, temperatures: int, device: str = "cpu") -> Task:
    """Rows forward, then the same rows back, with the step sizes that pilot runs found."""
    p = Problem.of(workloads.WORKLOADS["W2"]._replace(rows=rows, samples=1), device)
    model = workloads.model_of(p)
    x, exact = model.sample_joint(rows, 1)
    start = lf.philox_normal(2, rows * chains_, p.mean.shape[1], device=device).unflatten(0, (rows, chains_))
    betas = lf.annealed.power_betas(temperatures).expand(rows, -1)
    task = Task(
        p.pairs, p.workload.variance, torch.cat((x, x)), torch.cat((start, exact[:, None].expand_as(start))),
        torch.cat((betas, betas.flip(1))), x.new_full((2 * rows, temperatures), 0.5),
    )  # fmt: skip
    adapting = op.Settings(LEAPFROGS, JITTER, rate=0.1, target=0.9, first_transition=temperatures)
    step = annealed(task, adapting).steps[0].log().mean(1).exp()
    return task._replace(steps=torch.cat((step, step.flip(1))))


# --- ours, and what is right ---


def arguments(task: Task) -> tuple[Any, ...]:
    """Of the operator and of the reference: the two directions are replicas that share their data."""
    half = len(task.x) // 2

    def both(t: Tensor) -> Tensor:
        return t.unflatten(0, (2, half)).contiguous()

    z = both(task.z)
    zeros = z.new_zeros((2, half, z.shape[-1]))
    scales = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).expand(2, half, 1, -1, -1).contiguous()
    return task.x[None, :half].contiguous(), z, both(task.betas)[:, 0].contiguous(), both(task.steps), scales, zeros, zeros


def annealed(task: Task, settings: op.Settings) -> reference.Result:
    model = chains.model_of(task)
    recognised = recognise(model.decoder, model.likelihood.name)
    assert recognised is not None
    variance, seed, replicas = model.likelihood.variance[None], as_seed(0, task.x.device), as_replicas(2, task.x.device)
    return op.annealing_of_layers(*arguments(task), *recognised, variance, seed, replicas, settings)


def ours(task: Task) -> Callable[[], Annealed]:
    def call() -> Annealed:
        found = annealed(task, op.Settings(task.leapfrogs, task.jitter))
        return Annealed(found.log_weights.flatten(0, 1), found.z.flatten(0, 1))

    return call


def our_noise(task: Task) -> tuple[Tensor, Tensor]:
    """The noise that our call draws: normal [M, C, T, L], uniform [M, C, T, 2]."""
    half, (_, chains_, latents) = len(task.x) // 2, task.z.shape
    kinds = ((lf.philox_normal, latents, Stream.ANNEALING_MOMENTUM), (lf.philox_uniform, 2, Stream.ANNEALING_ACCEPTANCE))
    found = []
    for draw, each, stream in kinds:
        of_chains = [draw(0, half, task.temperatures * each, replicas=2, repetition=c, stream=stream) for c in range(chains_)]
        found.append(torch.stack(of_chains, 2).unflatten(-1, (-1, each)).flatten(0, 1))
    normal, uniform = found
    return normal, uniform


class Truth(NamedTuple):
    """In float64; ``followed`` [M, C]: no decision was a close call."""

    log_weight: Tensor
    z: Tensor
    followed: Tensor


@torch.no_grad()
def truth_of(task: Task, normal: Tensor, uniform: Tensor) -> Truth:
    """The reference one temperature after another, as it tells acceptance in a call's mean alone."""
    model = chains.model_of(task).to("cpu", torch.float64)
    recognised = recognise(model.decoder, model.likelihood.name)
    assert recognised is not None
    layers, parameters = recognised
    decoder = layers.decoder(parameters, model.likelihood.variance[None])
    x, z, betas, steps, scales, mean, log_scale = (t.to("cpu", torch.float64) for t in arguments(task))
    half = x.shape[1]

    def density(rows: slice, at: Tensor) -> tuple[Tensor, Tensor]:
        return log_joint(decoder, x[:, rows, None], at)

    def source(noise: Tensor) -> Callable[..., Tensor]:
        noise = noise.double().flatten(2).unflatten(0, (2, half))

        def draw(seed: Any, replicas: Any, first: int, rows: int, at: int, draws: int, chain: int, *rest: Any) -> Tensor:
            return noise[:, first : first + rows, chain, at : at + draws]

        return draw

    noise = Noise(torch.tensor(0), torch.tensor([0, 1]), (0, 0), source(normal), source(uniform))
    accept = uniform[..., 0].double().log().unflatten(0, (2, half))
    log_weights, followed = torch.zeros_like(z[..., 0]), torch.ones_like(z[..., 0], dtype=torch.bool)
    for t in range(task.temperatures):
        settings = reference.Settings(task.leapfrogs, task.jitter, first_transition=t)
        found = reference.run(
            density, z, betas[:, t : t + 2], steps[..., t : t + 1], scales, mean, log_scale, noise, settings, decoder.widest
        )
        z, log_weights = found.z, log_weights + found.log_weights
        followed &= (accept[..., t] - found.acceptance.log()).abs() > CLOSE_CALL
    return Truth(*(t.flatten(0, 1) for t in (log_weights, z, followed)))


def error(found: Annealed, truth: Truth) -> dict[str, Any]:
    """Over the chains that are followed to the end, of their log-weights and states."""
    log_weight, z = (numbers(t).cpu().double() for t in found)
    off = ((log_weight - truth.log_weight).abs() / (1 + truth.log_weight.abs()))[truth.followed]
    of_z = (z - truth.z).abs().amax(-1)[truth.followed]
    return {
        "value": float(off.max()), "mean value": float(off.square().mean().sqrt()), "z": float(of_z.max()), "rows": len(z),
        "followed to the end": float(truth.followed.double().mean()),
        "allowed": bool(off.max() <= TOLERANCE and of_z.max() <= TOLERANCE),
    }  # fmt: skip


def agree(found: Annealed, ours: Annealed) -> dict[str, Any]:
    """The mean log-weight of each row, in standard errors of the difference (chains of both are independent): the largest, and
    of all rows of a direction together."""
    first, second = (numbers(f.log_weight).double() for f in (found, ours))
    off = first.mean(1) - second.mean(1)
    errors = off / ((first.var(1) + second.var(1)) / first.shape[1]).sqrt().clamp_min(1e-12)
    together = errors.unflatten(0, (2, -1)).sum(1).abs() / math.sqrt(len(errors) // 2)
    largest, summed = float(errors.abs().max()), float(together.max())
    return {
        "standard errors, largest of rows": largest, "of all rows": summed,
        "allowed": largest <= 2 * STANDARD_ERRORS and summed <= STANDARD_ERRORS,  # 16 chains a row: t has heavy tails
    }  # fmt: skip


def case(task: Task, quick: bool = False) -> Case:
    short = task.first(min(CHECKED, task.temperatures))
    noise = our_noise(short)
    kept: dict[str, Any] = {}  # made when first asked for
    call = ours(task)

    def judge(found: Annealed) -> dict[str, Any]:
        if "truth" not in kept:
            kept["truth"] = truth_of(short, *noise)
        return error(found, kept["truth"])

    def whole(found: Annealed) -> dict[str, Any]:
        if "ours" not in kept:
            kept["ours"] = call()
        return agree(found, kept["ours"])

    rows, chains_, _ = task.z.shape
    size = f"{rows // 2} x {chains_} chains x {task.temperatures} temperatures of {task.leapfrogs} leapfrogs, there and back"
    return Case(
        "W9", size, call, lambda: judge(ours(short)()),
        lambda: judge(Annealer("torch eager")(short, given(short, *noise))), judge, (short, *noise),
        lambda: forms(task, quick), whole, lambda: peak.bound(chains.counts(task)),
    )  # fmt: skip


# --- the schedule in torch ---


def log_prior(z: list[Tensor]) -> Tensor:
    latents = len(z) if len(z) > 1 else z[0].shape[-1]
    squares = sum(a * a for a in z) if len(z) > 1 else z[0].square().sum(-1)
    return -0.5 * squares - 0.5 * latents * math.log(2 * math.pi)


def temperature(
    density: chains.Density, leapfrogs: int, jitter: float, pairs: Pairs, variance: float, x: list[Tensor], z: list[Tensor],
    value: Tensor, gradient: list[Tensor], log_weight: Tensor, before: Tensor, beta: Tensor, step: Tensor, u: list[Tensor],
    v: Tensor, w: Tensor,
) -> Any:  # fmt: skip
    """One weight and one transition; value and gradient are log p(x, z)'s. before, beta and step [M, 1]; v and w uniform."""
    lanes = len(z) > 1
    wide = (lambda t: t) if lanes else (lambda t: t[..., None])

    def kinetic(u: list[Tensor]) -> Tensor:
        return 0.5 * (sum(a * a for a in u) if lanes else u[0].square().sum(-1))  # type: ignore[return-value]

    def slope(gradient: list[Tensor], z: list[Tensor]) -> list[Tensor]:
        return [wide(beta) * (g + a) - a for g, a in zip(gradient, z, strict=True)]

    def log_target(value: Tensor, z: list[Tensor]) -> Tensor:
        return beta * value + (1 - beta) * log_prior(z)

    log_weight = log_weight + (beta - before) * (value - log_prior(z))
    h = wide(step * (1 + jitter * (2 * w - 1)))
    new_z, new_value, new_gradient = z, value, gradient
    new_u = u
    for _ in range(leapfrogs):
        new_u = [a + 0.5 * h * s for a, s in zip(new_u, slope(new_gradient, new_z), strict=True)]
        new_z = [a + h * b for a, b in zip(new_z, new_u, strict=True)]
        new_value, new_gradient = evaluated(density, pairs, variance, x, new_z)
        new_u = [a + 0.5 * h * s for a, s in zip(new_u, slope(new_gradient, new_z), strict=True)]
    gain = log_target(new_value, new_z) - log_target(value, z) - kinetic(new_u) + kinetic(u)
    accept = v.log() < gain
    z, gradient = (
        [torch.where(wide(accept), a, b) for a, b in zip(new, old, strict=True)]
        for new, old in ((new_z, z), (new_gradient, gradient))
    )
    return z, torch.where(accept, new_value, value), gradient, log_weight


class Annealer:
    """A peer in torch: a Python loop over temperatures."""

    def __init__(self, kind: str):
        density, self.lanes, compiled = KINDS[kind]
        self.density = torch.compile(density, dynamic=False) if compiled == "leapfrog" else density

        def step(*arguments: Any) -> Any:
            return temperature(self.density, *arguments)

        self.step = torch.compile(step, dynamic=False) if compiled == "transition" else step

    def parts(self, t: Tensor) -> list[Tensor]:
        return [c.contiguous() for c in t.unbind(-1)] if self.lanes else [t]

    @torch.no_grad()
    def __call__(self, task: Task, noise: Callable[[int], tuple[Tensor, Tensor, Tensor]]) -> Annealed:
        """``noise``: of temperature t, u [M, C, L], v and w [M, C]."""
        x, z = self.parts(task.x[:, None]), self.parts(task.z)
        value, gradient = evaluated(self.density, task.pairs, task.variance, x, z)
        log_weight = torch.zeros_like(value)
        betas, steps = (t.to(value.dtype).T.contiguous()[..., None] for t in (task.betas, task.steps))
        for t in range(task.temperatures):
            u, v, w = noise(t)
            z, value, gradient, log_weight = self.step(
                task.leapfrogs, task.jitter, task.pairs, task.variance, x, z, value, gradient, log_weight, betas[t],
                betas[t + 1], steps[t], self.parts(u), v, w,
            )  # fmt: skip
        return Annealed(log_weight, torch.stack(z, -1) if self.lanes else z[0])


def drawing(task: Task) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    shape, device = task.z.shape, task.z.device
    return lambda t: (torch.randn(shape, device=device), *torch.rand(2, *shape[:2], device=device))


def given(task: Task, normal: Tensor, uniform: Tensor) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """normal [M, C, T, L], uniform [M, C, T, 2]."""
    device = task.z.device
    return lambda t: tuple(n.contiguous().to(device) for n in (normal[:, :, t], *uniform[:, :, t].unbind(-1)))  # type: ignore


# --- the schedule in JAX ---


def program_of(density: Callable[..., Any], task: Task, unroll: int, drawn: bool) -> Callable[..., Any]:
    """(params, x [M, D], z [M, C, L], betas [M, T + 1], steps [M, T], key or noise ([T, L, M, C], [T, 2, M, C])) -> log weights
    [M, C], z [M, C, L]. By coordinate every chain is a row of its own, as in W7."""
    import jax
    import jax.numpy as jnp

    from benchmarks import chains_jax

    lanes = density is not chains_jax.natural
    widen, total = (lambda a: a, lambda a: a) if lanes else (lambda a: a[..., None], lambda a: a.sum(-1))

    def parts(a: Any) -> Any:
        return tuple(a[..., i] for i in range(a.shape[-1])) if lanes else (a,)

    def program(params: Any, x: Any, z: Any, betas: Any, steps: Any, source: Any) -> Any:
        rows, chains_, latents = z.shape
        if lanes:
            x, betas, steps, z = (*(jnp.repeat(a, chains_, 0) for a in (x, betas, steps)), z.reshape(-1, 1, latents))
            source = source if drawn else tuple(t.reshape(*t.shape[:2], -1, 1) for t in source)
        shape = z.shape[:2]
        log_joint = partial(density, params, task.variance, parts(x[:, None]))

        def log_prior(z: Any) -> Any:
            return -0.5 * sum(total(a * a) for a in z) - 0.5 * latents * math.log(2 * math.pi)

        def kinetic(u: Any) -> Any:
            return 0.5 * sum(total(a * a) for a in u)

        def temperature(carried: Any, at: Any) -> Any:
            z, value, gradient, log_weight = carried
            before, beta, step, noise = at
            if drawn:
                key, other = jax.random.split(noise)
                noise = jax.random.normal(key, (latents, *shape)), jax.random.uniform(other, (2, *shape))
            normal, (v, w) = noise
            before, beta, step = before[:, None], beta[:, None], step[:, None]
            u = tuple(normal) if lanes else (jnp.moveaxis(normal, 0, -1),)
            h = widen(step * (1 + task.jitter * (2 * w - 1)))
            log_weight = log_weight + (beta - before) * (value - log_prior(z))

            def kick(u: Any, gradient: Any, z: Any) -> Any:
                return tuple(a + 0.5 * h * (widen(beta) * (g + b) - b) for a, g, b in zip(u, gradient, z, strict=True))

            def leapfrog(moving: Any, _: Any) -> Any:
                z, u, _, gradient = moving
                u = kick(u, gradient, z)
                z = tuple(a + h * b for a, b in zip(z, u, strict=True))
                value, gradient = log_joint(z)
                return (z, kick(u, gradient, z), value, gradient), None

            moved, _ = jax.lax.scan(leapfrog, (z, u, value, gradient), None, task.leapfrogs, unroll=unroll)
            new_z, new_u, new_value, new_gradient = moved
            gain = beta * (new_value - value) + (1 - beta) * (log_prior(new_z) - log_prior(z)) - kinetic(new_u) + kinetic(u)
            accept = jnp.log(v) < gain
            z, gradient = (
                tuple(jnp.where(widen(accept), a, b) for a, b in zip(new, old, strict=True))
                for new, old in ((new_z, z), (new_gradient, gradient))
            )
            return (z, jnp.where(accept, new_value, value), gradient, log_weight), None

        start = parts(z)
        sources = jax.random.split(source, task.temperatures) if drawn else source
        schedule = (betas.T[:-1], betas.T[1:], steps.T, sources)
        (z, _, _, log_weight), _ = jax.lax.scan(temperature, (start, *log_joint(start), jnp.zeros(shape)), schedule)
        z = jnp.stack(z, -1) if lanes else z[0]
        return log_weight.reshape(rows, chains_), z.reshape(rows, chains_, latents)

    return program


def jax_forms(task: Task, quick: bool) -> Iterator[Form]:
    """All rows in one program: with 16 chains a row there are too few to share out."""
    import jax
    import jax.numpy as jnp

    from benchmarks import chains_jax

    kinds = {"JAX natural": [("", 1), ("", 2)]}
    kinds["JAX by coordinate"] = [(d, u) for d in chains_jax.DENSITIES for u in ((1, 2) if d == "forward" else (1,))]
    for kind, variants in kinds.items():
        for detail, unroll in variants[-1:] if quick else variants:
            density = chains_jax.DENSITIES.get(detail, chains_jax.natural)

            def arrays(task: Task) -> tuple[Any, ...]:
                params = [tuple(jnp.asarray(t.cpu().numpy()) for t in pair) for pair in task.pairs]
                return params, *(jnp.asarray(t.cpu().numpy()) for t in (task.x, task.z, task.betas.float(), task.steps))

            compiled, mine = jax.jit(program_of(density, task, unroll, True)), arrays(task)

            def run(compiled: Any = compiled, mine: Any = mine) -> Annealed:
                return Annealed(*jax.block_until_ready(compiled(*mine, jax.random.key(0))))

            def check(
                part: Task, normal: Tensor, uniform: Tensor, density: Any = density, unroll: int = unroll, arrays: Any = arrays
            ) -> Annealed:
                noise = tuple(jnp.asarray(t.permute(2, 3, 0, 1).numpy()) for t in (normal, uniform))
                return Annealed(*jax.jit(program_of(density, part, unroll, False))(*arrays(part), noise))

            name = f"{kind}{detail and ', '}{detail}" + (f", {unroll} leapfrogs unrolled" if unroll > 1 else "")
            yield Form(name, "ieee", run, check)


def forms(task: Task, quick: bool) -> Iterator[Form]:
    for kind in KINDS if not quick else ("torch eager", "torch.compile"):
        annealer = Annealer(kind)

        def check(part: Task, normal: Tensor, uniform: Tensor, annealer: Annealer = annealer) -> Annealed:
            return annealer(part, given(part, normal, uniform))

        yield Form(kind, "ieee", partial(lambda annealer: annealer(task, drawing(task)), annealer), check)
    if importlib.util.find_spec("jax") is not None:
        from benchmarks import chains_jax

        if not task.x.is_cuda or chains_jax.on_gpu():
            yield from jax_forms(task, quick)
