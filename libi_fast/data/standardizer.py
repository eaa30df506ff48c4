"""Centring and scaling of columns, and what it does to a log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError


class Standardizer:
    """y = (x - mean) / scale, column by column.

    A density of y gives one of x by the change of variables log p_x(x) = log p_y(y) - sum_d log scale_d, so a
    log-likelihood in the data's own units is the standardised one minus :attr:`log_abs_det`.

    Args:
        mean: [D], in the data's units.
        scale: [D], in the data's units, positive.

    Both are kept in float64, and differences are taken in it: a float32 column with a large offset keeps its digits.

    Raises:
        InputError: shapes that differ, numbers that are not finite, or a scale that is not positive.
    """

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        mean, scale = torch.as_tensor(mean).detach().double(), torch.as_tensor(scale).detach().double()
        if mean.ndim != 1 or mean.shape != scale.shape:
            raise InputError(
                f"mean and scale: expected two vectors [D], got shapes {tuple(mean.shape)} and {tuple(scale.shape)}"
            )
        if not bool(torch.isfinite(mean).all() and torch.isfinite(scale).all() and (scale > 0).all()):
            raise InputError("mean and scale: expected finite numbers, and scale above zero")
        self.mean = mean
        self.scale = scale

    @classmethod
    def fit(cls, x: Tensor, columns: Sequence[str] | None = None) -> Standardizer:
        """The mean and the standard deviation (divisor N) of each column of x [N, D].

        Args:
            x: [N, D] floating point, finite, at least two rows.
            columns: D names, for messages only.

        Raises:
            InputError: fewer than two rows, a number that is not finite, or constant columns (all are named).
        """
        if x.ndim != 2:
            raise InputError(f"x: expected [rows, columns], got shape {tuple(x.shape)}")
        if x.shape[0] < 2:
            raise InputError(f"x: {x.shape[0]} row(s); standardising needs at least 2")
        names = list(columns) if columns is not None else [f"x{j + 1}" for j in range(x.shape[1])]
        if len(names) != x.shape[1]:
            raise InputError(f"columns: {len(names)} names for {x.shape[1]} columns of x")
        values = x.detach().double()
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise InputError(f"x: row {row + 1}, column {names[column]!r} is {values[row, column].item()}")
        # Equality, not a small standard deviation: the mean of equal numbers is not always that number.
        constant = [names[j] for j in (values == values[0]).all(0).nonzero().flatten().tolist()]
        if constant:
            shown = ", ".join(repr(c) for c in constant[:8]) + (", ..." if len(constant) > 8 else "")
            raise InputError(
                f"{len(constant)} constant column(s) in the training rows: {shown}; remove them (or do not standardise)"
            )
        return cls(values.mean(0), values.std(0, correction=0))

    @property
    def log_abs_det(self) -> float:
        """sum_d log scale_d, in nats: the log-volume that standardising divides out."""
        return float(self.scale.log().sum())

    def transform(self, x: Tensor) -> Tensor:
        """x [..., D] in the data's units to standardised units; dtype and device as x."""
        self._check(x)
        return ((x.double() - self.mean.to(x.device)) / self.scale.to(x.device)).to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        """y [..., D] in standardised units to the data's own; dtype and device as y."""
        self._check(y)
        return (y.double() * self.scale.to(y.device) + self.mean.to(y.device)).to(y.dtype)

    def to_config(self) -> dict[str, list[float]]:
        """Plain lists, exact in JSON: ``{"mean": [...], "scale": [...]}``."""
        return {"mean": self.mean.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Standardizer:
        """The inverse of :meth:`to_config`. Raises InputError where a field is missing or holds no numbers."""
        try:
            mean, scale = (torch.tensor(config[key], dtype=torch.float64) for key in ("mean", "scale"))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"standardisation: expected lists of numbers 'mean' and 'scale' ({error!r})") from error
        return cls(mean, scale)

    def _check(self, x: Tensor) -> None:
        if x.ndim < 1 or x.shape[-1] != len(self.mean):
            raise InputError(f"expected {len(self.mean)} columns, as in training, got shape {tuple(x.shape)}")

    def __repr__(self) -> str:
        return f"Standardizer({len(self.mean)} columns)"
