"""The smooth k-NN statistic: between p(x) and models of LinearJTEx, as the paper takes it; and W6, what its 20,000 repetitions
take beside plain torch and JAX."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import libi_fast as lf
from benchmarks import peak
from benchmarks.accuracy import LINEAR, mean_and_error
from benchmarks.cases import Case, compared
from benchmarks.workloads import Form
from libi_fast.ops.random import Stream

SEEDS = range(10, 15)
REPETITIONS, POINTS = 20_000, 100  # the paper's numbers
KS = (1, 10)
CHECKED = 200  # repetitions
TOLERANCE = 1e-4  # the statistic's standard deviation is 1
# Repetitions at a time; on a GPU linear-domain takes 3.4 MB for each at k = 10.
BATCHES = {
    "cpu": {"torch": (5, 10, 20, 50, 100), "JAX": (1, 2, 5, 10, 20, 50)},
    "cuda": {"torch": (100, 1000, 5000), "JAX": (20, 100, 200)},
}
TORCH_PART = {"cpu": 500, "cuda": REPETITIONS}  # that torch does when it is timed: the whole takes a CPU minutes
UNROLLED = 10  # points that one compiled piece of the recursion takes
JITTER = 1e-5


def statistic(truth: Any, model: Any, k: int) -> float:
    """The mean over repetitions, each with fresh draws of both."""
    a = truth.sample(REPETITIONS * POINTS, seed=1).float().unflatten(0, (REPETITIONS, POINTS))
    if model is None:
        b = truth.sample(REPETITIONS * POINTS, seed=2).float()
    else:
        b = model.sample(REPETITIONS * POINTS, seed=2)
    return lf.smooth_knn(a, b.unflatten(0, (REPETITIONS, POINTS)), k=k).mean().item()


def run(progress: bool = True) -> dict[str, Any]:
    sets = [lf.data.load("LinearJTEx", seed=s) for s in SEEDS]
    results: dict[str, Any] = {}
    for label, (method, settings, epochs, restarts) in LINEAR["LinearJTEx"].items():
        template = method(sets[0].model(), sets[0].inference(), **settings)
        (row,) = lf.fit_grid([template], sets, epochs=epochs, restarts=restarts, progress=progress)
        results[label] = {
            f"k = {k}, alpha = 1": mean_and_error([statistic(d.truth, m.model, k) for d, m in zip(sets, row, strict=True)])
            for k in KS
        }
    results["two samples of p(x)"] = {f"k = {k}, alpha = 1": statistic(sets[0].truth, None, k) for k in KS}
    return {**results, "repetitions": REPETITIONS}


# --- W6 ---


def cases(repetitions: int = REPETITIONS, device: str = "cpu") -> list[Case]:
    drawn = (lf.philox_normal(s, repetitions, 2 * POINTS, stream=Stream.DATA, device=device) for s in (1, 2))
    a, b = (t.unflatten(1, (POINTS, 2)) for t in drawn)
    return [case(a, b, k) for k in KS]


def case(a: Tensor, b: Tensor, k: int) -> Case:
    some = (a[:CHECKED], b[:CHECKED])
    truth = lf.smooth_knn(*(t.double() for t in some), k=k, backend="reference")
    expected: list[Tensor] = []

    def error(found: tuple[Any, ...]) -> dict[str, Any]:
        return compared(found[0], truth, TOLERANCE)

    def whole(found: tuple[Any, ...]) -> dict[str, Any]:
        """The points are the same here, noise or not."""
        if not expected:
            expected.append(lf.smooth_knn(a, b, k=k).double())
        return compared(found[0], expected[0][: len(found[0])], 2 * TOLERANCE)

    def torch_error() -> dict[str, Any]:
        blocks = zip(*(t.split(10) for t in some), strict=True)
        return error((torch.cat([statistic_of(*block, k, log_domain) for block in blocks]),))

    return Case(
        f"W6, k = {k}", f"{len(a)} x {a.shape[1]} + {b.shape[1]} points in 2-D", lambda: (lf.smooth_knn(a, b, k=k),),
        lambda: error((lf.smooth_knn(*some, k=k),)), torch_error, error, some, lambda: forms(a, b, k), whole,
        lambda: peak.bound(counts(len(a), a.shape[1] + b.shape[1], k)),
    )  # fmt: skip


def counts(repetitions: int, points: int, k: int) -> dict[str, float]:
    """Of each ordered pair a distance (two products and a root) and an exponential, and 3 k multiply-adds where k > 1: k
    coefficients before, k after, and the sum of their products, as the plain recursion has it."""
    pairs = float(repetitions * points * (points - 1))
    return {"multiply-add": pairs * (2 + (3 * k if k > 1 else 0)), "exp2": pairs, "sqrt": pairs}


Inclusion = Callable[[Tensor, int], Tensor]


def statistic_of(a: Tensor, b: Tensor, k: int, inclusion: Inclusion) -> Tensor:
    """a [R, n1, 2], b [R, n2, 2] -> [R] as one would write it: float32, repetitions and rows innermost in the recursions."""
    n1, n2 = a.shape[1], b.shape[1]
    n = n1 + n2
    chi1, chi2 = n1 * n2 / (n * (n - 1)), 4 * (n1 - 1) * (n2 - 1) / ((n - 2) * (n - 3))
    z = torch.cat((a, b), 1)
    square = sum((c[:, :, None] - c[:, None, :]).square() for c in z.unbind(-1))
    own = torch.eye(n, dtype=torch.bool, device=z.device)
    x = (-(JITTER + square).sqrt()).masked_fill(own, -math.inf)
    p = inclusion(x.permute(2, 0, 1).reshape(n, -1), k).reshape(n, -1, n)  # [j, R, i]
    excess = (p - k / (n - 1)).masked_fill(own[:, None], 0.0)
    between = excess[n1:, :, :n1].sum((0, 2)) + excess[:n1, :, n1:].sum((0, 2))
    both = (excess * (excess + excess.transpose(0, 2))).sum((0, 2))
    variance = chi1 * (1 - chi2) * excess.sum(2).square().sum(0) + chi1 * chi2 * both
    return -between / (JITTER + variance).sqrt()


def log_domain(x: Tensor, k: int) -> Tensor:
    """Log-weights x [n, rows] -> Pr(j is among the k chosen): elementary symmetric polynomials by log-add-exp."""
    if k == 1:
        return torch.softmax(x, 0)
    n, rows = x.shape
    first = x.new_full((k, rows), -math.inf)
    first[0] = 0.0
    none = first[1:2]

    def add(e: Tensor, w: Tensor) -> Tensor:
        return torch.logaddexp(e, w + torch.cat((none, e[:-1])))

    before = [first]
    for j in range(n - 1):
        before.append(add(before[-1], x[j]))
    after, joint = first, torch.empty_like(x)
    for j in reversed(range(n)):
        joint[j] = x[j] + (before[j] + after.flip(0)).logsumexp(0)
        after = add(after, x[j])
    return (joint - joint.logsumexp(0)).exp() * k


def linear_domain(x: Tensor, k: int) -> Tensor:
    """The same with odds that sum to k, so that nothing overflows; enough where alpha D is moderate, as here."""
    w = torch.softmax(x, 0)
    if k == 1:
        return w
    w = w * k
    n, rows = x.shape
    before = x.new_zeros(n, k, rows)
    before[0, 0] = 1
    for j in range(n - 1):
        torch.add(before[j, 1:], before[j, :-1] * w[j], out=before[j + 1, 1:])
        before[j + 1, 0] = 1
    after, joint = before[0].clone(), torch.empty_like(x)  # after[m] meets before[j, k - 1 - m]
    after[0], after[k - 1] = 0, 1
    for j in reversed(range(n)):
        torch.sum(before[j] * after, 0, out=joint[j])
        after[:-1] += after[1:] * w[j]
    joint *= w
    return joint * (k / joint.sum(0))


def before_points(e: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Polynomials before each of the points w [m, rows], from e [k, rows] before the first; and after the last."""
    c, found = list(e.unbind()), []
    for one in w.unbind():
        found.append(torch.stack(c))
        c = [c[0], *(high + one * low for low, high in itertools.pairwise(c))]
    return torch.stack(found), torch.stack(c)


def meet_points(before: Tensor, e: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Of the points w, last to first, each odds times the others' polynomial, e [k, rows] being that of those after them."""
    c, found = list(e.unbind()), []
    for f, one in zip(reversed(before.unbind()), reversed(w.unbind()), strict=True):
        found.append(one * sum(p * q for p, q in zip(f.unbind(), reversed(c), strict=True)))
        c = [c[0], *(high + one * low for low, high in itertools.pairwise(c))]
    return torch.stack(found[::-1]), torch.stack(c)


def in_pieces() -> Inclusion:
    """linear_domain with each coefficient apart, compiled for UNROLLED points at a time: whole it is too long a program."""
    forward, backward = (torch.compile(f, dynamic=False) for f in (before_points, meet_points))

    def inclusion(x: Tensor, k: int) -> Tensor:
        w = torch.softmax(x, 0) * k
        e = x.new_zeros(k, x.shape[1])
        e[0] = 1
        first, pieces, joint = e, w.split(UNROLLED), []
        before = []
        for piece in pieces:
            found, e = forward(e, piece)
            before.append(found)
        e = first
        for f, piece in zip(reversed(before), reversed(pieces), strict=True):
            found, e = backward(f, e, piece)
            joint.append(found)
        whole = torch.cat(joint[::-1])
        return whole * (k / whole.sum(0))

    return inclusion


def forms(a: Tensor, b: Tensor, k: int) -> Iterator[Form]:
    functions: dict[str, Inclusion] = {"torch eager log-domain": log_domain, "torch eager linear-domain": linear_domain}
    if k == 1:  # one softmax in both
        functions = {"torch eager": linear_domain, "torch.compile": linear_domain}
    elif a.is_cuda:
        functions["torch.compile in pieces"] = in_pieces()
    part = min(len(a), TORCH_PART[a.device.type])
    for name, inclusion in functions.items():
        one = statistic_of if name != "torch.compile" else torch.compile(statistic_of, dynamic=False)
        for batch in (size for size in BATCHES[a.device.type]["torch"] if part % size == 0):

            def check(a: Tensor, b: Tensor, one=one, inclusion=inclusion, batch=batch) -> tuple[Tensor]:
                return (torch.cat([one(*block, k, inclusion) for block in zip(a.split(batch), b.split(batch), strict=True)]),)

            def run(check=check) -> tuple[Tensor]:
                return check(a[:part], b[:part])

            yield Form(f"{name}, {batch} repetitions", "ieee", run, check, part / len(a))
    if importlib.util.find_spec("jax") is not None:
        yield from jax_forms(a, b, k)


def jax_forms(a: Tensor, b: Tensor, k: int) -> Iterator[Form]:
    """One repetition written down, vmap over a batch, one loop over batches on the device."""
    import jax
    import jax.numpy as jnp

    n1, n2 = a.shape[1], b.shape[1]
    n = n1 + n2
    chi1, chi2 = n1 * n2 / (n * (n - 1)), 4 * (n1 - 1) * (n2 - 1) / ((n - 2) * (n - 3))
    own = jnp.eye(n, dtype=bool)

    def stacked(w: Any) -> Any:
        """Odds [n, rows] -> w_j times the polynomial of the others, coefficients as one array."""

        def add(e: Any, w: Any) -> Any:
            return e + w * jnp.concatenate([jnp.zeros_like(e[:1]), e[:-1]])

        def back(after: Any, part: Any) -> Any:
            w, before = part
            return add(after, w), (before * after[::-1]).sum(0) * w

        first = jnp.zeros((k, w.shape[1])).at[0].set(1)
        _, before = jax.lax.scan(lambda e, w: (add(e, w), e), first, w)
        return jax.lax.scan(back, first, (w, before), reverse=True)[1]

    def apart(w: Any) -> Any:
        """The same, each coefficient an array of its own."""

        def add(e: Any, w: Any) -> Any:
            return (e[0], *(e[m] + w * e[m - 1] for m in range(1, k)))

        def back(after: Any, part: Any) -> Any:
            w, before = part
            return add(after, w), sum(before[m] * after[k - 1 - m] for m in range(k)) * w

        first = (jnp.ones_like(w[0]), *[jnp.zeros_like(w[0])] * (k - 1))
        _, before = jax.lax.scan(lambda e, w: (add(e, w), e), first, w)
        return jax.lax.scan(back, first, (w, before), reverse=True)[1]

    def statistic(a: Any, b: Any, polynomials: Any) -> Any:
        """a [n1, 2], b [n2, 2] -> one number."""
        z = jnp.concatenate([a, b])
        square = sum((z[:, None, i] - z[None, :, i]) ** 2 for i in range(2))
        p = jax.nn.softmax(jnp.where(own, -jnp.inf, -jnp.sqrt(JITTER + square)), 0)  # [j, i]: distances are symmetric
        if k > 1:
            p = polynomials(k * p)
            p = p * (k / p.sum(0))
        excess = jnp.where(own, 0, p - k / (n - 1))
        between = excess[n1:, :n1].sum() + excess[:n1, n1:].sum()
        both = (excess * (excess + excess.T)).sum()
        variance = chi1 * (1 - chi2) * (excess.sum(1) ** 2).sum() + chi1 * chi2 * both
        return -between / jnp.sqrt(JITTER + variance)

    functions = {"JAX": stacked} if k == 1 else {"JAX, coefficients stacked": stacked, "JAX, coefficients apart": apart}
    whole_a, whole_b = (jnp.asarray(t.cpu().numpy()) for t in (a, b))  # on JAX's own device
    for name, polynomials in functions.items():
        for batch in (size for size in BATCHES[a.device.type]["JAX"] if CHECKED % size == 0 and len(a) % size == 0):

            def all_of(a: Any, b: Any, batch=batch, polynomials=polynomials) -> Any:
                many = jax.vmap(lambda a, b: statistic(a, b, polynomials))
                blocks = (t.reshape(-1, batch, *t.shape[1:]) for t in (a, b))
                return jax.lax.map(lambda block: many(*block), tuple(blocks)).reshape(-1)

            jitted = jax.jit(all_of)

            def run(jitted=jitted) -> tuple[Any]:
                return (jitted(whole_a, whole_b),)

            def check(a: Tensor, b: Tensor, jitted=jitted) -> tuple[Any]:
                return (jitted(jnp.asarray(a.cpu().numpy()), jnp.asarray(b.cpu().numpy())),)

            yield Form(f"{name}, {batch} repetitions", "ieee", run, check)
