"""The workloads W1 to W4b: the problem, our call, and the peers, each a function of the noise so that it can be checked.

A peer gets its own fast random numbers when it is timed. Before that it gets ours for a few rows and must return our numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import libi_fast as lf

Pairs = list[tuple[Tensor, Tensor]]  # weight [out, in] and bias [out] of each layer


class Workload(NamedTuple):
    widths: tuple[int, ...]  # of the decoder, tanh between layers; () is W1, log_mean_exp alone
    likelihood: str
    variance: float
    rows: int
    samples: int
    backward: bool
    quick: tuple[int, int]  # rows and samples of a trial

    def tried(self) -> Workload:
        return self._replace(rows=self.quick[0], samples=self.quick[1])

    @staticmethod
    def on_cpu(name: str) -> Workload:
        rows, samples = CPU_SIZES[name]
        return WORKLOADS[name]._replace(rows=rows, samples=samples)

    @property
    def narrow(self) -> bool:
        return len(self.widths) == 3 and self.widths[0] + self.widths[-1] <= 8

    @property
    def flops(self) -> float:
        """Of the products alone: twice the multiplications, and in backward thrice (the second pass over them not counted)."""
        once = 2.0 * sum(a * b for a, b in zip(self.widths, self.widths[1:], strict=False)) * self.rows * self.samples
        return 3 * once if self.backward else once


NARROW, WIDE = (2, 50, 2), (50, 200, 200, 784)
WORKLOADS = {
    "W1": Workload((), "", 0.0, 65_536, 5000, False, (512, 5000)),
    "W2": Workload(NARROW, "gaussian", 1e-5, 50_000, 5000, False, (200, 500)),
    "W3": Workload(WIDE, "bernoulli", 0.0, 10_000, 5000, False, (8, 300)),
    "W4a": Workload(NARROW, "gaussian", 1e-5, 10_000, 512, True, (200, 128)),
    "W4b": Workload(WIDE, "bernoulli", 0.0, 1024, 512, True, (16, 64)),
}
CPU_SIZES = {"W1": (2048, 5000), "W2": (500, 5000), "W3": (20, 5000), "W4a": (500, 512), "W4b": (64, 64)}  # rows and samples

# A result's largest error against float64, in units of the largest log-weight, or of a gradient's largest entry. In W2 and W4a
# log-weights reach -1e4 and their gradients divide by 1e-5, so rounding is larger there than in W3.
TOLERANCE = {"ieee": 2e-5, "tf32x3": 1e-4, "tf32": 1e-2, "bf16": 6e-2}
GRADIENT_TOLERANCE = {"ieee": 1e-3, "tf32x3": 1e-3, "tf32": 2e-2, "bf16": 5e-2}


class Problem(NamedTuple):
    workload: Workload
    x: Tensor  # [N, D]
    mean: Tensor  # [N, L]
    log_std: Tensor
    pairs: Pairs

    @staticmethod
    def of(workload: Workload, device: str, seed: int = 0) -> Problem:
        """Data drawn from the decoder; the proposal is near the codes that they came from."""
        generator = torch.Generator().manual_seed(seed)
        pairs = []
        for into, out in zip(workload.widths, workload.widths[1:], strict=False):
            weight = torch.randn(out, into, generator=generator) / into**0.5
            pairs.append((weight.to(device), 0.1 * torch.randn(out, generator=generator).to(device)))
        z = torch.randn(workload.rows, workload.widths[0], generator=generator).to(device)
        output = decode(pairs, z)
        if workload.likelihood == "gaussian":
            x = output + math.sqrt(workload.variance) * torch.randn(output.shape, generator=generator).to(device)
        else:
            x = (torch.rand(output.shape, generator=generator).to(device) < output.sigmoid()).to(z.dtype)
        noise = torch.randn(z.shape, generator=generator).to(device)
        return Problem(workload, x, z + 0.02 * noise, torch.full_like(z, -3.5), pairs)

    def first(self, rows: int) -> Problem:
        return self._replace(x=self.x[:rows], mean=self.mean[:rows], log_std=self.log_std[:rows])

    def double(self) -> Problem:
        tensors = (t.double() for t in (self.x, self.mean, self.log_std))
        return Problem(self.workload, *tensors, [(w.double(), b.double()) for w, b in self.pairs])

    def leaves(self) -> list[Tensor]:
        """What backward differentiates by: mean, log_std, then each layer's weight and bias."""
        return [self.mean, self.log_std, *(t for pair in self.pairs for t in pair)]


def decode(pairs: Pairs, z: Tensor) -> Tensor:
    h = z
    for i, (weight, bias) in enumerate(pairs):
        h = F.linear(h, weight, bias)
        h = h.tanh() if i + 1 < len(pairs) else h
    return h


# --- ours ---


def model_of(p: Problem) -> lf.LatentVariableModel:
    w = p.workload
    noise = lf.Gaussian(w.variance) if w.likelihood == "gaussian" else lf.Bernoulli()
    decoder = lf.mlp(w.widths[0], list(w.widths[1:-1]), w.widths[-1])
    layers = [layer for layer in decoder if isinstance(layer, torch.nn.Linear)]
    for layer, (weight, bias) in zip(layers, p.pairs, strict=True):
        layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    return lf.LatentVariableModel(decoder.to(p.x), noise, latent_dim=w.widths[0]).to(p.x)


def ours(p: Problem, precision: str = "ieee", seed: Any = 0, backend: str | None = None) -> Callable[[], tuple[Tensor, ...]]:
    """-> () -> log-likelihood [N], and in backward the gradients of its sum to `Problem.leaves`."""
    model, w = model_of(p), p.workload
    mean, log_std = p.mean.clone(), p.log_std.clone()

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(w.backward):
            value = lf.log_likelihood(
                model, p.x, proposal=(mean, log_std), num_samples=w.samples, precision=precision, seed=seed, backend=backend,
                pareto=False,
            ).log_likelihood  # fmt: skip
        if not w.backward:
            return (value,)
        return value.detach(), *torch.autograd.grad(value.sum(), [mean, log_std, *model.decoder.parameters()])

    if w.backward:
        mean.requires_grad_()
        log_std.requires_grad_()
    return call


def noise_of(p: Problem, seed: int = 0) -> Tensor:
    """The noise that our call draws, [N, S, L]."""
    rows, latents = p.mean.shape
    device = p.x.device
    return lf.philox_normal(seed, rows, p.workload.samples * latents, device=device).view(rows, -1, latents)


# --- torch ---


def log_likelihood(
    pairs: Pairs, x: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor, likelihood: str, variance: float
) -> Tensor:
    """x [n, D], mean and log_std [n, L], noise [n, S, L] -> [n], as one would write it."""
    z = mean[:, None] + log_std.exp()[:, None] * noise
    output = decode(pairs, z).to(x.dtype)
    if likelihood == "gaussian":
        log_prob = -0.5 * ((output - x[:, None]).square() / variance + math.log(2 * math.pi * variance)).sum(-1)
    else:
        log_prob = (x[:, None] * output - F.softplus(output)).sum(-1)
    log_weights = log_prob + (0.5 * (noise.square() - z.square()) + log_std[:, None]).sum(-1)
    return log_weights.logsumexp(-1) - math.log(noise.shape[1])


def by_lanes(pairs: Pairs, x: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor, likelihood: str, variance: float) -> Tensor:
    """The same for one hidden layer, coordinate by coordinate: a compiler fuses it where it would call a library's product."""
    (w, b), (v, c) = pairs
    eps = noise.unbind(-1)
    z = [mean[:, i, None] + log_std[:, i, None].exp() * e for i, e in enumerate(eps)]
    h = b + sum(w[:, i] * code[..., None] for i, code in enumerate(z))  # [n, S, H]
    h = h.tanh()
    log_weights = sum(
        0.5 * (e.square() - code.square()) + log_std[:, i, None] for i, (e, code) in enumerate(zip(eps, z, strict=True))
    )
    for d in range(x.shape[1]):
        output = c[d] + (v[d] * h).sum(-1)
        if likelihood == "gaussian":
            log_weights = log_weights + -0.5 * ((output - x[:, d, None]).square() / variance + math.log(2 * math.pi * variance))
        else:
            log_weights = log_weights + x[:, d, None] * output - F.softplus(output)
    return log_weights.logsumexp(-1) - math.log(noise.shape[1])


def unrolled(pairs: Pairs, x: Tensor, mean: Tensor, log_std: Tensor, noise: Tensor, likelihood: str, variance: float) -> Tensor:
    """The same, hidden unit by hidden unit as well: every number that is in flight is [n, S], and samples lie in lanes."""
    (w, b), (v, c) = pairs
    eps = noise.unbind(-1)
    z = [mean[:, i, None] + log_std[:, i, None].exp() * e for i, e in enumerate(eps)]
    log_weights = sum(
        0.5 * (e.square() - code.square()) + log_std[:, i, None] for i, (e, code) in enumerate(zip(eps, z, strict=True))
    )
    outputs = [c[d] for d in range(x.shape[1])]
    for j in range(w.shape[0]):
        h = (b[j] + sum(w[j, i] * code for i, code in enumerate(z))).tanh()
        outputs = [output + v[d, j] * h for d, output in enumerate(outputs)]
    for d, output in enumerate(outputs):
        if likelihood == "gaussian":
            log_weights = log_weights + -0.5 * ((output - x[:, d, None]).square() / variance + math.log(2 * math.pi * variance))
        else:
            log_weights = log_weights + x[:, d, None] * output - F.softplus(output)
    return log_weights.logsumexp(-1) - math.log(noise.shape[1])


def rows_of(lines: int, w: Workload) -> int:
    """Rows of a chunk of at most ``lines`` samples: a divisor of all rows, so that a compiler sees one shape."""
    most = max(1, min(w.rows, lines // w.samples))
    return next(step for step in range(most, 0, -1) if w.rows % step == 0)


class Form(NamedTuple):
    """A peer: ``run`` does the whole workload; ``check`` does the problem it is given, with the noise it is given."""

    name: str
    precision: str
    run: Callable[[], Any]
    check: Callable[..., tuple[Tensor, ...]]  # (Problem, Tensor) in W2 to W4b
    share: float = 1.0  # of the workload that ``run`` does, where the whole would take minutes: its time is divided by it


def chunked(p: Problem, function: Callable[..., Tensor], step: int, draw: Callable[[int], Tensor]) -> tuple[Tensor, ...]:
    """``step`` rows after another; gradients of parameters are added up."""
    w = p.workload
    values, to_rows, to_pairs = [], [], None
    for start in range(0, p.x.shape[0], step):
        part = p.first(start + step)
        x, mean, log_std = (t[start:] for t in (part.x, part.mean, part.log_std))
        noise = draw(start)[: x.shape[0]]
        if not w.backward:
            with torch.no_grad():
                values.append(function(p.pairs, x, mean, log_std, noise, w.likelihood, w.variance))
            continue
        mean, log_std = mean.detach().requires_grad_(), log_std.detach().requires_grad_()
        pairs = [(a.detach().requires_grad_(), b.detach().requires_grad_()) for a, b in p.pairs]
        value = function(pairs, x, mean, log_std, noise, w.likelihood, w.variance)
        inputs = [mean, log_std, *(t for pair in pairs for t in pair)]
        to_mean, to_log_std, *grads = torch.autograd.grad(value.sum(), inputs)
        values.append(value.detach())
        to_rows.append((to_mean, to_log_std))
        to_pairs = grads if to_pairs is None else [a + b for a, b in zip(to_pairs, grads, strict=True)]
    value = torch.cat(values)
    if to_pairs is None:
        return (value,)
    return value, *(torch.cat(g) for g in zip(*to_rows, strict=True)), *to_pairs


def torch_forms(p: Problem, precision: str, name: str, lines: list[int]) -> Iterator[Form]:
    """``name`` is "torch eager", "torch.compile" or, for narrow decoders, "torch.compile by coordinate" or "... unrolled".

    Compiled ones come a second time (but for "... unrolled", which compiles for up to a minute) with noise that is drawn inside
    the compiled function, by the compiler's own random numbers; when they are checked it is given to them.
    """
    function = {"torch.compile by coordinate": by_lanes, "torch.compile unrolled": unrolled}.get(name, log_likelihood)
    lanes = function is not log_likelihood and p.x.device.type == "cpu"  # there a coordinate is faster read without strides
    latents, samples = p.mean.shape[1], p.workload.samples
    plain = function

    def noise_of_chunk(rows: int) -> Tensor:
        if lanes:
            return torch.randn(latents, rows, samples).permute(1, 2, 0)
        return torch.randn(rows, samples, latents, device=p.x.device)

    def noise_inside(pairs: Pairs, x: Tensor, mean: Tensor, log_std: Tensor, unused: Tensor, *rest: Any) -> Tensor:
        return plain(pairs, x, mean, log_std, noise_of_chunk(x.shape[0]), *rest)

    drawing = None
    if name != "torch eager":
        function = torch.compile(function, dynamic=False)
        drawing = torch.compile(noise_inside, dynamic=False) if plain is not unrolled else None
    steps = sorted({rows_of(size, p.workload) for size in lines})

    def form(step: int, inside: bool) -> Form:
        def run() -> tuple[Tensor, ...]:
            with autocast(precision, p.x.device):
                if inside:
                    return chunked(p, drawing, step, lambda start: p.x[:step])
                return chunked(p, function, step, lambda start: noise_of_chunk(step))

        def check(part: Problem, noise: Tensor) -> tuple[Tensor, ...]:
            with autocast(precision, p.x.device):
                return chunked(part, function, step, lambda start: noise[start:])

        return Form(f"{name}, {step} rows" + (", noise inside" if inside else ""), precision, run, check)

    yield from (form(step, False) for step in steps)
    if drawing is not None:
        yield from (form(step, True) for step in steps)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# --- chunks of less than a row ---


def split(p: Problem, parts: int) -> Problem:
    """Each row ``parts`` times, with that share of its samples. `joined` makes one row of them again; not for gradients."""
    w = p.workload._replace(rows=p.workload.rows * parts, samples=p.workload.samples // parts)
    return Problem(w, *(t.repeat_interleave(parts, 0) for t in (p.x, p.mean, p.log_std)), p.pairs)


def joined(form: Form, parts: int) -> Form:
    def join(found: tuple[Any, ...]) -> tuple[Tensor, ...]:
        (value,) = found
        value = value if isinstance(value, Tensor) else torch.from_dlpack(value)
        return (value.view(-1, parts).logsumexp(1) - math.log(parts),)

    def check(p: Problem, noise: Tensor) -> tuple[Tensor, ...]:
        part = split(p, parts)
        return join(form.check(part, noise.reshape(len(part.x), -1, noise.shape[-1])))

    return form._replace(name=f"{form.name}, 1/{parts} of the samples", run=lambda: join(form.run()), check=check)


# --- agreement ---


def error(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], p: Problem, precision: str) -> dict[str, Any]:
    """Errors of the value and of the gradients, each in units of the largest entry: the largest one (of a gradient: of all
    gradients), its root mean square, and whether the largest are allowed."""
    largest, mean = [], []
    for a, b in zip(found, truth, strict=True):
        scale = b.abs().max().clamp_min(1.0 if not largest else 1e-30).cpu()
        off = (a.double().cpu() - b.cpu()) / scale
        largest.append(float(off.abs().max()))
        mean.append(float(off.square().mean().sqrt()))
    allowed = largest[0] <= TOLERANCE[precision] and all(e <= GRADIENT_TOLERANCE[precision] for e in largest[1:])
    return {
        "value": largest[0], "gradients": max(largest[1:], default=None),
        "mean value": mean[0], "mean gradients": max(mean[1:], default=None), "rows": truth[0].numel(), "allowed": allowed,
    }  # fmt: skip


def agree(found: Tensor, expected: Tensor, precision: str) -> dict[str, Any]:
    """Whole runs with different noise: the mean difference a row in its standard errors (bias of a biased form excepted)."""
    difference = found.double() - expected.double()
    spread = float(difference.std() / math.sqrt(difference.numel()))
    mean = float(difference.mean())
    scale = float(expected.double().abs().mean())
    return {
        "mean difference": mean,
        "standard error": spread,
        "allowed": abs(mean) <= 6 * spread + TOLERANCE[precision] * scale,
    }
