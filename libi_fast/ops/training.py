"""Epochs of training of many small models side by side: one call for all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.kernels import cpu as native
from libi_fast.kernels.importance.reference import Draws
from libi_fast.kernels.training import reference
from libi_fast.kernels.training.reference import (
    Adam,
    Network,
    Problem,
    clipped,
    jtex_map,
    moment_errors,
    safe_exp,
    sigmoid_cube_root,
)
from libi_fast.ops import _library as lib

__all__ = [
    "Adam", "Draws", "Network", "Problem", "clipped", "jtex_map", "moment_errors", "safe_exp", "serves", "sigmoid_cube_root",
    "train",
]  # fmt: skip


def _native(problem: Problem, adam: Adam, rates: Sequence[float], rises: Sequence[float]) -> Tensor:
    return native.train(problem, adam, rates, rises)


def _triton(problem: Problem, adam: Adam, rates: Sequence[float], rises: Sequence[float]) -> Tensor:
    from libi_fast.kernels.training import gpu

    return gpu.run(problem, adam, rates, rises)


def _refusal(problem: Problem) -> str | None:
    from libi_fast.kernels.training import gpu

    return gpu.refusal(problem)


_IMPLEMENTATIONS = {"reference": reference.run, "cpu": _native, "triton": _triton}


def _backend(problem: Problem, backend: str | None = None) -> str:
    limits = {"triton": lambda *_: _refusal(problem)}
    return lib._choose("training", _IMPLEMENTATIONS, limits, lib.current_backend(backend), [problem.x])


def serves(problem: Problem) -> bool:
    """Whether a fused kernel would train here, with the backend asked for."""
    try:
        return _backend(problem) != "reference"
    except InputError:  # the one asked for does not take it
        return False


def train(
    problem: Problem, adam: Adam, rates: Sequence[float], rises: Sequence[float], backend: str | None = None
) -> Tensor:  # fmt: skip
    """As many epochs as there are ``rates`` (the learning rate of each): full batch, Adam, gradients held to their usual norm.

    Args:
        problem: networks, data and objective (see ``kernels.training.reference``); its parameters change in place.
        adam: the optimiser's state, likewise.
        rates: learning rates. rises: what multiplies beta of an 'elbo', one an epoch.
        backend: 'reference', 'cpu' or 'triton' (float32, small networks); by default the fastest that takes the problem.

    Returns:
        The objective's terms before each step, [epochs, R, terms], in nats a row.

    Raises:
        InputError: a backend that does not serve; 'reconstruction' with an encoder that is to be trained.
        ValueError: tensors whose shapes, dtypes or strides do not fit.

    Source:
        Paper, Eqs 2 and 42-46; Kingma & Ba 2015.
    """
    if problem.objective == "reconstruction" and problem.encoder.trained:
        raise InputError("'reconstruction' holds the codes: its encoder is not trained")
    return _IMPLEMENTATIONS[_backend(problem, backend)](problem, adam, rates, rises)
