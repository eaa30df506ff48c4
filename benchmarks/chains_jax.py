"""The peers of W7 in JAX: hand-written samplers (as one would write them, and coordinate by coordinate with chains in lanes),
BlackJAX and NumPyro. Each is a program that scans over transitions, for a chunk of rows at a time.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import Form

if TYPE_CHECKING:
    from benchmarks.chains import Drawn, Task

Program = Callable[..., Any]
"""(params, x [n, D], z [n, C, L], eps [n], scale [n, L], key or noise) -> z [T, n, C, L], or L arrays [T, n, C]; log densities
[T, n, C]; mean acceptance [n, C]; and of libraries that are to tell, the noise that they drew, normal [T, n, C, L] and uniform
[T, n, C, 2]"""


class Variant(NamedTuple):
    """How rows are shared out, where noise comes from, and what the compiler unrolls."""

    rows: int  # of a chunk
    python_loop: bool = False  # chunks are sent off from Python and share the cores; else one loop on the device
    generator: str = "threefry2x32"  # or unsafe_rbg
    unroll: int = 1  # leapfrogs of a turn of the inner loop

    def __str__(self) -> str:
        words = ["Python loop" if self.python_loop else "", self.generator.replace("threefry2x32", "")]
        words.append(f"{self.unroll} leapfrogs unrolled" if self.unroll > 1 else "")
        return f", {self.rows} rows" + "".join(f", {word}" for word in words if word)


# --- densities: log p(x, z) and its gradient ---


def log_joint(params: Any, variance: float, x: Any, z: Any) -> Any:
    """Of one chain, x [D] and z [L], as one would write it."""
    import jax.numpy as jnp

    h = z
    for i, (weight, bias) in enumerate(params):
        h = weight @ h + bias
        h = jnp.tanh(h) if i + 1 < len(params) else h
    return (
        -0.5 * ((x - h) ** 2).sum() / variance - 0.5 * (z**2).sum()
        - 0.5 * (len(x) * math.log(2 * math.pi * variance) + len(z) * math.log(2 * math.pi))
    )  # fmt: skip


def natural(params: Any, variance: float, x: Any, z: Any) -> Any:
    """x ([n, 1, D],), z ([n, C, L],) -> [n, C] and a gradient like z."""
    import jax

    one = jax.value_and_grad(partial(log_joint, params, variance), argnums=1)
    value, gradient = jax.vmap(jax.vmap(one, (None, 0)))(x[0][:, 0], z[0])
    return value, (gradient,)


def value_in_lanes(variance: float, x: Any, outputs: Any, z: Any) -> Any:
    constant = 0.5 * (len(x) * math.log(2 * math.pi * variance) + len(z) * math.log(2 * math.pi))
    misfit = sum((a - o) ** 2 for a, o in zip(x, outputs, strict=True))
    return -0.5 / variance * misfit - 0.5 * sum(a * a for a in z) - constant


def value_by_unit(params: Any, variance: float, x: Any, z: Any) -> Any:
    """x of D numbers or arrays, z of L: hidden units unrolled."""
    import jax.numpy as jnp

    (w, b), (v, c) = params
    units = [jnp.tanh(b[j] + sum(w[j, i] * a for i, a in enumerate(z))) for j in range(w.shape[0])]
    outputs = [c[d] + sum(v[d, j] * h for j, h in enumerate(units)) for d in range(len(x))]
    return value_in_lanes(variance, x, outputs, z)


def pulled(variance: float, x: Any, outputs: Any, slopes: Any, z: Any) -> Any:
    """The gradient from the Jacobian's columns, slopes[i][d]."""
    score = [(a - o) / variance for a, o in zip(x, outputs, strict=True)]
    return tuple(sum(s * t for s, t in zip(score, column, strict=True)) - a for column, a in zip(slopes, z, strict=True))


def by_unit(params: Any, variance: float, x: Any, z: Any) -> Any:
    """x of D arrays [n, 1], z of L arrays [n, C]: hidden units unrolled, the Jacobian carried forward beside the outputs, so
    that nothing is stored."""
    import jax.numpy as jnp

    (w, b), (v, c) = params
    outputs = [c[d] for d in range(len(x))]
    slopes = [[0.0] * len(x) for _ in z]
    for j in range(w.shape[0]):
        h = jnp.tanh(b[j] + sum(w[j, i] * a for i, a in enumerate(z)))
        slope = 1 - h * h
        outputs = [o + v[d, j] * h for d, o in enumerate(outputs)]
        slopes = [[s + w[j, i] * v[d, j] * slope for d, s in enumerate(column)] for i, column in enumerate(slopes)]
    return value_in_lanes(variance, x, outputs, z), pulled(variance, x, outputs, slopes, z)


def by_unit_backward(params: Any, variance: float, x: Any, z: Any) -> Any:
    """The same with the score sent back through the units, by hand."""
    import jax.numpy as jnp

    (w, b), (v, c) = params
    units = [jnp.tanh(b[j] + sum(w[j, i] * a for i, a in enumerate(z))) for j in range(w.shape[0])]
    outputs = [c[d] + sum(v[d, j] * h for j, h in enumerate(units)) for d in range(len(x))]
    score = [(a - o) / variance for a, o in zip(x, outputs, strict=True)]
    gradient = [-a for a in z]
    for j, h in enumerate(units):
        back = sum(v[d, j] * s for d, s in enumerate(score)) * (1 - h * h)
        gradient = [g + w[j, i] * back for i, g in enumerate(gradient)]
    return value_in_lanes(variance, x, outputs, z), tuple(gradient)


def by_unit_differentiated(params: Any, variance: float, x: Any, z: Any) -> Any:
    """The same by jax.grad."""
    import jax

    def value(z: Any) -> Any:
        of_chains = value_by_unit(params, variance, x, z)
        return of_chains.sum(), of_chains

    (_, of_chains), gradient = jax.value_and_grad(value, has_aux=True)(z)
    return of_chains, gradient


def scanned_units(params: Any, variance: float, x: Any, z: Any, at_once: int = 10) -> Any:
    """The same in a loop over hidden units, some of them unrolled."""
    import jax
    import jax.numpy as jnp

    (w, b), (v, c) = params
    zero = jnp.zeros_like(z[0])

    def add(sums: Any, unit: Any) -> Any:
        w, b, v = unit
        h = jnp.tanh(b + sum(w[i] * a for i, a in enumerate(z)))
        slope = 1 - h * h
        outputs, slopes = sums
        outputs = tuple(o + v[d] * h for d, o in enumerate(outputs))
        slopes = tuple(tuple(s + w[i] * v[d] * slope for d, s in enumerate(column)) for i, column in enumerate(slopes))
        return (outputs, slopes), None

    first = tuple(zero + c[d] for d in range(len(x))), tuple((zero,) * len(x) for _ in z)
    (outputs, slopes), _ = jax.lax.scan(add, first, (w, b, v.T), unroll=at_once)
    return value_in_lanes(variance, x, outputs, z), pulled(variance, x, outputs, slopes, z)


DENSITIES = {
    "forward": by_unit, "backward": by_unit_backward, "jax.grad": by_unit_differentiated,
    "units in a loop": scanned_units,
}  # fmt: skip


# --- samplers ---


def by_hand(density: Callable[..., Any], task: Task, unroll: int, drawn: bool) -> Program:
    """``drawn``: noise is drawn, from a key; else it is given, ([T, L, n, C], [T, 2, n, C])."""
    import jax
    import jax.numpy as jnp

    lanes = density is not natural
    widen, total = (lambda a: a, lambda a: a) if lanes else (lambda a: a[..., None], lambda a: a.sum(-1))

    def parts(a: Any) -> Any:
        """[n, C, L] -> L arrays [n, C], or one of all."""
        return tuple(a[..., i] for i in range(a.shape[-1])) if lanes else (a,)

    def kinetic(u: Any) -> Any:
        return 0.5 * sum(total(a * a) for a in u)

    def program(params: Any, x: Any, z: Any, eps: Any, scale: Any, source: Any) -> Any:
        *shape, latents = z.shape
        log_joint = partial(density, params, task.variance, parts(x[:, None]))
        steps = parts((eps[:, None] * scale)[:, None])

        def transition(carried: Any, noise: Any) -> Any:
            z, value, gradient, summed = carried
            if drawn:
                key, other = jax.random.split(noise)
                noise = jax.random.normal(key, (latents, *shape)), jax.random.uniform(other, (2, *shape))
            normal, (v, w) = noise
            u = tuple(normal) if lanes else (jnp.moveaxis(normal, 0, -1),)
            h = [s * widen(1 + task.jitter * (2 * w - 1)) for s in steps]

            def leapfrog(moving: Any, _: Any) -> Any:
                z, u, _, gradient = moving
                u = [a + 0.5 * b * g for a, b, g in zip(u, h, gradient, strict=True)]
                z = tuple(a + b * c for a, b, c in zip(z, h, u, strict=True))
                value, gradient = log_joint(z)
                return (z, tuple(a + 0.5 * b * g for a, b, g in zip(u, h, gradient, strict=True)), value, gradient), None

            moved, _ = jax.lax.scan(leapfrog, (z, u, value, gradient), None, task.leapfrogs, unroll=unroll)
            new_z, new_u, new_value, new_gradient = moved
            gain = new_value - value - kinetic(new_u) + kinetic(u)
            accept = jnp.log(v) < gain
            z, gradient = (
                tuple(jnp.where(widen(accept), a, b) for a, b in zip(new, old, strict=True))
                for new, old in ((new_z, z), (new_gradient, gradient))
            )
            value = jnp.where(accept, new_value, value)
            summed = summed + jnp.nan_to_num(jnp.exp(jnp.minimum(gain, 0)))
            return (z, value, gradient, summed), (z if lanes else z[0], value)

        start = parts(z)
        sources = jax.random.split(source, task.transitions) if drawn else source
        last, (kept, values) = jax.lax.scan(transition, (start, *log_joint(start), jnp.zeros(shape)), sources)
        return kept, values, last[-1] / len(values)

    return in_one_dimension(program) if lanes else program


def in_one_dimension(program: Program) -> Program:
    """Every chain a row of its own, one chain in each: a compiler's loops over chains then run over all rows of a chunk."""
    import jax.numpy as jnp

    def of_chains(params: Any, x: Any, z: Any, eps: Any, scale: Any, source: Any) -> Any:
        rows, chains, latents = z.shape
        x, eps, scale = (jnp.repeat(a, chains, 0) for a in (x, eps, scale))
        if isinstance(source, tuple):
            source = tuple(t.reshape(*t.shape[:2], -1, 1) for t in source)
        z, value, acceptance = program(params, x, z.reshape(-1, 1, latents), eps, scale, source)
        return tuple(a.reshape(-1, rows, chains) for a in z), value.reshape(-1, rows, chains), acceptance.reshape(rows, chains)

    return of_chains


def one_chain(task: Task, lanes: bool) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """log p(x, z) of one chain for a library to differentiate, and z [..., L] as it is to be given."""
    if not lanes:
        return log_joint, lambda z: z
    return value_by_unit, lambda z: tuple(z[..., i] for i in range(z.shape[-1]))


def of_blackjax(lanes: bool, task: Task, tell: bool) -> Program:
    """``lanes``: a position is a tuple of coordinates, hidden units are unrolled; ``tell``: the noise is returned besides."""
    import blackjax
    import jax
    import jax.numpy as jnp

    kernel = blackjax.hmc.build_kernel()
    density, given = one_chain(task, lanes)

    def program(params: Any, x: Any, z: Any, eps: Any, scale: Any, key: Any) -> Any:
        def of_row(x: Any) -> Callable[[Any], Any]:
            return partial(density, params, task.variance, x)

        def start(x: Any, z: Any) -> Any:
            return blackjax.hmc.init(z, of_row(x))

        def step(x: Any, scale: Any, state: Any, eps: Any, key: Any) -> Any:
            return kernel(key, state, of_row(x), eps, scale**2, task.leapfrogs)

        def transition(carried: Any, key: Any) -> Any:
            state, summed = carried
            key, other = jax.random.split(key)
            keys, w = jax.random.split(key, z.shape[:2]), jax.random.uniform(other, z.shape[:2])
            jittered = eps[:, None] * (1 + task.jitter * (2 * w - 1))
            state, info = jax.vmap(jax.vmap(step, (None, None, 0, 0, 0)))(x, scale, state, jittered, keys)
            kept = (state.position, state.logdensity)
            if tell:
                pair = jax.vmap(jax.vmap(jax.random.split))(keys)
                kept = (*kept, told(pair[..., 0], pair[..., 1], w, z.shape[-1]))
            return (state, summed + info.acceptance_rate), kept

        first = jax.vmap(jax.vmap(start, (None, 0)))(x, given(z))
        keys = jax.random.split(key, task.transitions)
        (_, summed), (kept, values, *noise) = jax.lax.scan(transition, (first, jnp.zeros(z.shape[:2])), keys)
        return kept, values, summed / task.transitions, *(noise[0] if noise else ())

    return program


def of_numpyro(lanes: bool, task: Task, tell: bool) -> Program:
    """The same; with a number of steps and no length of a path, its kernel takes each transition's step size as it is."""
    import jax
    from numpyro.infer.hmc import HMCState, hmc

    density, given = one_chain(task, lanes)

    def program(params: Any, x: Any, z: Any, eps: Any, scale: Any, key: Any) -> Any:
        init, sample = hmc(potential_fn_gen=lambda x: lambda z: -density(params, task.variance, x, z), algo="HMC")

        def start(x: Any, scale: Any, eps: Any, z: Any, key: Any) -> Any:
            return init(
                z, 0, eps, scale**2, adapt_step_size=False, adapt_mass_matrix=False, num_steps=task.leapfrogs,
                trajectory_length=None, model_args=(x,), rng_key=key,
            )  # fmt: skip

        # The number of the transition is the same in all chains: said so, what only warm-up needs is skipped, not masked.
        axes: Any = HMCState(**{name: None if name == "i" else 0 for name in HMCState._fields})

        def transition(state: Any, key: Any) -> Any:
            w = jax.random.uniform(key, z.shape[:2])
            jittered = eps[:, None] * (1 + task.jitter * (2 * w - 1))
            before = state._replace(adapt_state=state.adapt_state._replace(step_size=jittered))
            over_chains = jax.vmap(lambda state, x: sample(state, (x,)), (axes, None), axes)
            state = jax.vmap(over_chains, (axes, 0), axes)(before, x)
            kept = (state.z, -state.potential_energy)
            if tell:
                parts = jax.vmap(jax.vmap(lambda key: jax.random.split(key, 3)))(before.rng_key)
                kept = (*kept, told(parts[..., 1], parts[..., 2], w, z.shape[-1]))
            return state, kept

        of_chains, of_jitter = jax.random.split(key)
        over_chains = jax.vmap(start, (None, None, None, 0, 0), axes)
        first = jax.vmap(over_chains, out_axes=axes)(x, scale, eps, given(z), jax.random.split(of_chains, z.shape[:2]))
        last, (kept, values, *noise) = jax.lax.scan(transition, first, jax.random.split(of_jitter, task.transitions))
        return kept, values, last.mean_accept_prob, *(noise[0] if noise else ())

    return program


def told(of_momentum: Any, of_acceptance: Any, w: Any, latents: int) -> Any:
    """What a library draws from these keys [n, C]: normal [n, C, L] and, beside our jitter's w, uniform [n, C, 2]."""
    import jax
    import jax.numpy as jnp

    normal = jax.vmap(jax.vmap(lambda key: jax.random.normal(key, (latents,))))(of_momentum)
    v = jax.vmap(jax.vmap(jax.random.uniform))(of_acceptance)
    return normal, jnp.stack((v, w), -1)


LIBRARIES = {"BlackJAX": of_blackjax, "NumPyro": of_numpyro}


# --- forms ---

EVERY = (5, 10, 25, 50, 100)
SWEPT: dict[tuple[str, str], list[Variant]] = {
    ("JAX natural", ""): [
        *(Variant(n) for n in EVERY), *(Variant(n, True) for n in (5, 10, 25)),
        Variant(10, False, "unsafe_rbg"), Variant(10, unroll=2), Variant(10, unroll=8),
    ],
    ("JAX by coordinate", "forward"): [
        *(Variant(n) for n in EVERY), *(Variant(n, True, unroll=2) for n in (10, 25, 50)),
        *(Variant(n, unroll=k) for n in (25, 50, 100) for k in (2, 4)), Variant(100, unroll=8),
        *(Variant(n, loop, "unsafe_rbg", 2) for n, loop in ((50, True), (100, False))),
    ],
    ("JAX by coordinate", "jax.grad"): [*(Variant(n) for n in (25, 50, 100)), Variant(50, True), Variant(100, unroll=2)],
    ("JAX by coordinate", "backward"): [Variant(50), Variant(100), Variant(100, unroll=2)],
    ("JAX by coordinate", "units in a loop"): [
        *(Variant(n) for n in (10, 25, 50, 100)), Variant(50, True), Variant(50, unroll=2), Variant(100, unroll=2),
    ],
    **{
        (library, detail): [*(Variant(n) for n in EVERY), *(Variant(n, True) for n in (10, 50))]
        for library in LIBRARIES for detail in ("", "by coordinate")
    },
}  # fmt: skip
QUICK = {("JAX natural", ""): [Variant(4, True)], ("JAX by coordinate", "units in a loop"): [Variant(4)],
         ("BlackJAX", ""): [Variant(8)], ("NumPyro", ""): [Variant(8)]}  # fmt: skip


def on_gpu() -> bool:
    import jax

    return jax.default_backend() == "gpu"


def of_all_rows(swept: dict[tuple[str, str], list[Variant]], rows: int) -> dict[tuple[str, str], list[Variant]]:
    return {kind: [Variant(rows)] for kind in swept}


def available(kind: str) -> bool:
    needed = {"BlackJAX": "blackjax", "NumPyro": "numpyro"}.get(kind, "jax")
    return importlib.util.find_spec("jax") is not None and importlib.util.find_spec(needed) is not None


def forms(task: Task, swept: dict[tuple[str, str], list[Variant]]) -> Iterator[Form]:
    for (kind, detail), variants in swept.items():
        if not available(kind):
            continue
        checks: dict[int, Callable[..., Drawn]] = {}  # a compilation each
        for variant in variants:
            if task.rows % variant.rows:
                continue
            check = checks.setdefault(variant.unroll, checker(kind, detail, variant.unroll))
            yield Form(f"{kind}{detail and ', '}{detail}{variant}", "ieee", runner(kind, detail, variant, task), check)


def make(kind: str, detail: str, unroll: int, task: Task, checked: bool) -> Program:
    """``checked``: with noise that is given, or from a library told."""
    if kind in LIBRARIES:
        return LIBRARIES[kind](detail == "by coordinate", task, checked)
    return by_hand(DENSITIES.get(detail, natural), task, unroll, not checked)


def runner(kind: str, detail: str, variant: Variant, task: Task) -> Callable[[], Drawn]:
    import jax

    from benchmarks.chains import Drawn

    program = make(kind, detail, variant.unroll, task, False)
    params, *arrays = arrays_of(task)
    chunks = [a.reshape(-1, variant.rows, *a.shape[1:]) for a in arrays]
    count, axes = len(chunks[0]), axes_of(kind, detail)
    if variant.python_loop:
        jitted = jax.jit(program)
        parts = list(zip(*(list(c) for c in chunks), strict=True))

        def run() -> Drawn:
            keys = jax.random.split(jax.random.key(0, impl=variant.generator), count)
            return Drawn(jax.block_until_ready([jitted(params, *p, key) for p, key in zip(parts, keys, strict=True)]), axes)

        return run

    def whole(params: Any, chunks: Any, key: Any) -> Any:
        keys = jax.random.split(key, count)
        return jax.lax.map(lambda part: program(params, *part), (*chunks, keys))

    looped = jax.jit(whole)
    return lambda: Drawn(jax.block_until_ready([looped(params, chunks, jax.random.key(0, impl=variant.generator))]), f"k{axes}")


def checker(kind: str, detail: str, unroll: int) -> Callable[[Task, Tensor, Tensor], Drawn]:
    compiled: list[Any] = []

    def check(task: Task, normal: Tensor, uniform: Tensor) -> Drawn:
        """The noise [n, C, T, L] and [n, C, T, 2] is not for libraries: they draw their own, and tell."""
        import jax
        import jax.numpy as jnp

        from benchmarks.chains import Drawn

        if not compiled:
            compiled.append(jax.jit(make(kind, detail, unroll, task, True)))
        library = kind in LIBRARIES
        noise = tuple(jnp.asarray(t.permute(2, 3, 0, 1).numpy()) for t in (normal, uniform))
        *found, normals, uniforms = (
            *compiled[0](*arrays_of(task), jax.random.key(0) if library else noise), *(() if library else (None, None))
        )  # fmt: skip
        used = tuple(torch.from_numpy(np.array(t)).permute(1, 2, 0, 3) for t in (normals, uniforms)) if library else None
        return Drawn([tuple(found)], axes_of(kind, detail), used)

    return check


def axes_of(kind: str, detail: str) -> str:
    return "tnc" if kind == "JAX by coordinate" or detail == "by coordinate" else "tncl"


def arrays_of(task: Task) -> tuple[Any, ...]:
    import jax.numpy as jnp

    params = [tuple(jnp.asarray(t.cpu().numpy()) for t in pair) for pair in task.pairs]
    return params, *(jnp.asarray(t.cpu().numpy()) for t in (task.x, task.z, task.step, task.scale))
