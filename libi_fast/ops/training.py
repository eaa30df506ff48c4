"""Epochs of training of many small models side by side: one call for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def serves(device: torch.device) -> bool:
    """Whether a compiled kernel would train here, with the backend asked for."""
    return lib.current_backend() in ("", "cpu") and device.type == "cpu" and native.available()


def train(
    problem: Problem, adam: Adam, rates: Sequence[float], rises: Sequence[float], backend: str | None = None
) -> Tensor:  # fmt: skip
    """As many epochs as there are ``rates`` (the learning rate of each): full batch, Adam, gradients held to their usual norm.

    Args:
        problem: networks, data and objective (see ``kernels.training.reference``); its parameters change in place.
        adam: the optimiser's state, likewise.
        rates: learning rates. rises: what multiplies beta of an 'elbo', one an epoch.

    Returns:
        The objective's terms before each step, [epochs, R, terms], in nats a row.

    Raises:
        InputError: a backend that does not serve; ValueError: tensors whose shapes, dtypes or strides do not fit.

    Source:
        Paper, Eqs 2 and 42-46; Kingma & Ba 2015.
    """
    implementations = {"reference": reference.run, "cpu": native.train}
    chosen = lib._choose("training", implementations, {}, lib.current_backend(backend), [problem.x])
    return implementations[chosen](problem, adam, rates, rises)
