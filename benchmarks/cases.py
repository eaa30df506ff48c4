"""What the CPU runner needs to know of a workload, and the workloads W2 to W4b in these terms."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import peak, workloads
from benchmarks.workloads import Form, Problem, Workload

ULP = 2.0**-23
CHECKED, CHECKED_OF_OURS = 4, 500  # rows: few dominate a root mean square
Found = tuple[Any, ...]  # tensors of torch or arrays of JAX


class Case(NamedTuple):
    """One problem. Errors are dictionaries with a ``value``, maybe ``gradients``, and whether they are ``allowed``."""

    name: str
    size: str
    ours: Callable[[], Found]
    right: Callable[[], dict[str, Any]]  # our error against float64
    torch_error: Callable[[], dict[str, Any]]  # torch's own in float32 on the same
    error: Callable[[Found], dict[str, Any]]  # a peer's, of what its ``check`` returned
    few: tuple[Any, ...]  # what ``check`` is given
    forms: Callable[[], Iterator[Form]]
    whole: Callable[[Found], dict[str, Any]] | None  # whether a whole run of a peer, with its own noise, agrees with ours
    bound: Callable[[], dict[str, Any]]
    # More than the time of a run: (the runs of ours and of the fastest form of each kind, their best ms) -> by form.
    worth: Callable[[dict[str, Callable[[], Found]], dict[str, float]], dict[str, dict[str, Any]]] | None = None


def numbers(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_dlpack(value)


def compared(found: Any, truth: Tensor, tolerance: float, scale: float = 1.0) -> dict[str, Any]:
    off = (numbers(found).double() - truth).abs() / scale
    largest = float(off.max())
    return {"value": largest, "mean value": float(off.square().mean().sqrt()), "allowed": largest <= tolerance}


def error(found: Found, truth: tuple[Tensor, ...], p: Problem) -> dict[str, Any]:
    """As workloads.error, but where the noise's variance is small the value is judged row by row: log-weights are sums of
    squares that reach far above the log-likelihood, and rounding grows with the residual over the variance."""
    found = tuple(numbers(f) for f in found)
    result = workloads.error(found, truth, p, "ieee")
    if p.workload.likelihood == "gaussian":
        near = 1e-4 + 1e-6 * (2 * truth[0].abs() / p.workload.variance).sqrt()
        fine = bool(((found[0].double() - truth[0]).abs() <= near).all())  # a NaN is not near
        gradients = result["gradients"]
        result["allowed"] = fine and (gradients is None or gradients <= workloads.GRADIENT_TOLERANCE["ieee"])
    return result


# Rows and samples of the chunks that peers are swept over, (rows, into how many chunks a row's samples are cut): torch runs
# best where a chunk's hidden layer stays in cache, JAX where its loop over chunks is short. A compiled form of a new shape
# costs seconds, the unrolled one up to a minute.
CHUNKS = {
    "W2": [(1, 1), (5, 1), (10, 1), (20, 1), (50, 1), (100, 1), (250, 1), (500, 1)],
    "W3": [(1, 20), (1, 10), (1, 5), (1, 2), (1, 1), (2, 1), (5, 1), (20, 1)],
    "W4a": [(5, 1), (10, 1), (20, 1), (50, 1), (100, 1), (250, 1), (500, 1)],
    "W4b": [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (64, 1)],
}
UNROLLED = {"W2": [(5, 1), (20, 1), (100, 1)], "W4a": [(20, 1), (100, 1)]}
JAX_UNROLLED = {"W4a": [(20, 1), (100, 1)]}  # XLA takes half a minute of a core for each
QUICK = {"W2": [(100, 1)], "W3": [(1, 3), (4, 1)], "W4a": [(100, 1)], "W4b": [(8, 1)]}


def importance(name: str, w: Workload, chunks: dict[str, list[tuple[int, int]]] | None = None, few: bool = False) -> Case:
    """``chunks`` of each kind of peer ("" for the others) instead of the tables above; ``few``: one variant of JAX."""
    p = Problem.of(w, "cpu")
    some, more = p.first(CHECKED), p.first(CHECKED_OF_OURS)
    noise = workloads.noise_of(some)
    truth = workloads.ours(some.double(), backend="reference")()  # the same draws, in float64
    sizes = chunks or {
        "": CHUNKS[name], "torch.compile unrolled": UNROLLED.get(name, []),
        "JAX by coordinate": JAX_UNROLLED.get(name, CHUNKS[name]),
    }  # fmt: skip
    ours = workloads.ours(p)
    kept: list[Found] = []  # a whole run of ours, and the truth of more rows, when first asked for

    def judge(found: Found) -> dict[str, Any]:
        if not kept:
            kept.append(workloads.ours(more.double(), backend="reference")())
        return error(found, kept[0], more)

    def torch_error() -> dict[str, Any]:
        (form,) = workloads.torch_forms(more, "ieee", "torch eager", [more.workload.samples])
        return judge(form.check(more, workloads.noise_of(more)))

    expected: list[Tensor] = []

    def whole(found: Found) -> dict[str, Any]:
        if not expected:
            expected.append(ours()[0])
        if w.rows < 2:  # no spread to judge a difference by
            return {"allowed": bool(numbers(found[0]).isfinite().all())}
        return workloads.agree(numbers(found[0]), expected[0], "ieee")

    return Case(
        name, f"{w.rows} x {w.samples}, {'-'.join(map(str, w.widths))}" + (", forward + backward" if w.backward else ""),
        ours, lambda: judge(workloads.ours(more)()), torch_error, lambda found: error(found, truth, some),
        (some, noise), lambda: peers(p, sizes, few), whole, lambda: peak.bound(counts(w)),
    )  # fmt: skip


def peers(p: Problem, sizes: dict[str, list[tuple[int, int]]], few: bool) -> Iterator[Form]:
    w = p.workload
    kinds = ["torch eager", "torch.compile"]
    if w.narrow:
        kinds += ["torch.compile by coordinate", "torch.compile unrolled"]
    for kind in kinds:
        chunks = sizes.get(kind, sizes[""])
        yield from in_chunks(p, chunks, lambda q, lines, kind=kind: workloads.torch_forms(q, "ieee", kind, lines))
    if importlib.util.find_spec("jax") is not None:
        from benchmarks import jax_forms
        from benchmarks.jax_forms import Variant

        threefry = [Variant(latents_first=first, python_loop=loop) for loop in (False, True) for first in (True, False)]
        every = [*threefry, Variant("rbg", True), Variant("unsafe_rbg", True)]
        for kind in ["JAX natural", *(["JAX by coordinate"] if w.narrow else [])]:
            slow = w.backward and kind == "JAX by coordinate"
            variants = tuple(threefry[:1] if few else threefry[:2] if slow else every)

            def forms(
                q: Problem, lines: list[int], kind: str = kind, variants: tuple[Variant, ...] = variants
            ) -> Iterator[Form]:
                return (f for f in jax_forms.forms(q, "ieee", lines, variants) if f.name.startswith(kind))

            yield from in_chunks(p, sizes.get(kind, sizes[""]), forms)


def in_chunks(p: Problem, chunks: list[tuple[int, int]], forms: Callable[..., Iterator[Form]]) -> Iterator[Form]:
    for parts in dict.fromkeys(parts for _, parts in chunks):
        part = p if parts == 1 else workloads.split(p, parts)
        lines = [rows * part.workload.samples for rows, n in chunks if n == parts]
        for form in forms(part, lines):
            yield form if parts == 1 else workloads.joined(form, parts)


def counts(w: Workload) -> dict[str, float]:
    """Multiply-adds of the products (thrice with backward; what is computed anew is not counted) and special functions: tanh of
    the hidden units, one a draw (a pair takes a logarithm, and a sine beside a cosine), one for each binary output, one for the
    weight. Random words, the prior and the products with the noise are left out."""
    special = w.widths[0] + 1 + (w.widths[-1] if w.likelihood == "bernoulli" else 0)
    each = w.rows * w.samples
    return {"multiply-add": w.flops / 2, "tanh": float(each * sum(w.widths[1:-1])), "exp2": float(each * special)}
