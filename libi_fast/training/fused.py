"""Phases that a fused kernel can run, many epochs a call: small networks of known layers, in full batch, in one process.

What is not recognised trains by torch's operators, with the same results to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from libi_fast.models.likelihoods import Bernoulli, DiagonalGaussian, Gaussian
from libi_fast.models.linear_gaussian import is_linear_gaussian
from libi_fast.models.model import LatentVariableModel, MeanFieldGaussian
from libi_fast.models.networks import JTExMap, chain
from libi_fast.ops import training as op
from libi_fast.ops.henze_zirkler import default_beta
from libi_fast.ops.random import Stream, drawing
from libi_fast.training import distributed
from libi_fast.training.batches import Batches
from libi_fast.training.replicas import Replicas

MOST_NUMBERS = 2**18  # of a layer: wider than that, matrix products over many threads win
MOST_STEPS = {"cpu": 20_000, "cuda": 400_000}  # of all replicas in a call: a second or so


class Objective(NamedTuple):
    """A phase's loss in the terms of :class:`libi_fast.ops.training.Problem`.

    Attributes:
        name: 'reconstruction', 'joint' or 'elbo'. weights: numbers, or [R], as there. rise: from the share of the phase's
            epochs that are done to what multiplies beta.
    """

    name: str
    weights: Callable[[], Sequence[float | Tensor]] = lambda: ()
    rise: Callable[[float], float] = lambda fraction: 1.0
    hz_beta: float | None = None
    samples: int = 1


def problem_of(
    objective: Objective, replicas: Replicas, batches: Batches, trained: Sequence[str], seed: Tensor, step: int
) -> op.Problem | None:
    """What the kernel is to solve, or None where it does not serve. ``trained``: names of the parameters that move."""
    system = replicas.template
    model, x = system.model, batches.rows
    whole = batches.loader is None and batches.source is None and batches.batch_size is None
    if not whole or distributed.active() or system.autocast is not None:
        return None
    if type(model) is not LatentVariableModel or type(model.likelihood) not in (Gaussian, DiagonalGaussian, Bernoulli):
        return None
    if system.encoder is not None and objective.name != "elbo":
        encoder = _network(system.encoder, "encoder.", replicas, trained)
    elif type(system.inference) is MeanFieldGaussian:
        encoder = _network(system.inference.network, "inference.network.", replicas, trained)
    else:
        return None
    decoder = _network(model.decoder, "model.decoder.", replicas, trained)
    if encoder is None or decoder is None:
        return None
    moving = {id(p) for network in (encoder, decoder) if network.trained for p in network.parameters}
    if moving != {id(replicas.parameters[name]) for name in trained}:
        return None
    rows, columns = x.shape[-2:]
    if rows * max(*encoder.widths, *decoder.widths) > MOST_NUMBERS or decoder.widths[-1] != columns:
        return None
    variance = x.new_empty(0)
    if isinstance(model.likelihood, DiagonalGaussian):
        if model.likelihood.learned or not _same(replicas.parameters["model.likelihood.fixed_variance"]):
            return None
        variance = replicas.parameters["model.likelihood.fixed_variance"][0]
    weights = torch.ones((replicas.count, 3), dtype=torch.float64)
    for k, value in enumerate(objective.weights()):
        weights[:, k] = value
    beta = default_beta(rows, model.latent_dim) if objective.hz_beta is None else objective.hz_beta
    closed = objective.name == "elbo" and is_linear_gaussian(model)
    if closed and len(decoder.weights) > 1:
        return None
    dataset = replicas.own["dataset"] if x.dim() == 3 else torch.zeros(replicas.count, dtype=torch.int64)
    draws = op.Draws(seed, replicas.own["ids"], 0, step, int(Stream.TRAINING), drawing("normal", ""))
    problem = op.Problem(
        objective.name, x if x.dim() == 3 else x[None], dataset, encoder, decoder, model.likelihood.name, variance,
        model.latent_dim, weights, beta, closed, objective.samples, draws,
    )  # fmt: skip
    return problem if op.serves(problem) else None


def _same(values: Tensor) -> bool:
    return bool((values == values[:1]).all())


def _network(module: nn.Module, prefix: str, replicas: Replicas, trained: Sequence[str]) -> op.Network | None:
    """The parameters of a chain of known layers; all of them move, or none."""
    layers = chain(module, halves=True)
    if layers is None:
        return None
    names = {id(m): name for name, m in module.named_modules()}
    if len({id(layer) for layer, _ in layers}) < len(layers):  # one used twice
        return None
    found: dict[str, list[Any]] = {"weights": [], "biases": [], "diagonals": []}
    moves = set()

    def take(layer: nn.Module, name: str) -> Tensor:
        path = ".".join(part for part in (prefix.rstrip("."), names[id(layer)], name) if part)
        moves.add(path in trained)
        return replicas.parameters[path]

    for layer, _ in layers:
        joint = isinstance(layer, JTExMap)
        if joint and not _same(replicas.parameters[".".join(p for p in (prefix.rstrip("."), names[id(layer)], "b") if p)]):
            return None
        found["weights"].append(take(layer, "a" if joint else "weight"))
        found["biases"].append(None if joint or layer.bias is None else take(layer, "bias"))
        found["diagonals"].append(layer.b if joint else None)
    if len(moves) > 1:
        return None
    return op.Network(**found, activations=[name for _, name in layers], trained=moves == {True})


def adam_of(optimiser: torch.optim.Adam, parameters: Sequence[Tensor], usual: Tensor, steps: int) -> op.Adam:
    """The optimiser's state of these parameters, made where there is none yet."""
    for p in parameters:
        if not optimiser.state[p]:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[p] = {"step": p.new_zeros((), dtype=torch.float32), **moments}
    states = [optimiser.state[p] for p in parameters]
    return op.Adam([s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], usual, steps)
