"""The learning rate over a phase, and when it has converged."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Schedule:
    """Constant rate, then cosine decay over as many epochs: half the budget each, or less once the objective stands still.

    The rate rises linearly over the first 2% of the budget: Adam's first steps have the size of the rate in every parameter,
    which on a large network throws white codes far from covariance I.

    Converged: over the last ``patience`` epochs no live replica's mean objective fell by more than ``tolerance`` nats against
    the ``patience`` epochs before.
    """

    def __init__(self, epochs: int, rate: float, tolerance: float | None, patience: int, decay: bool = True):
        self.epochs, self.rate, self.tolerance, self.patience = epochs, rate, tolerance, patience
        self.decay = decay
        self.decay_from = math.ceil(epochs / 2) if decay else epochs
        self.ramp = max(1, epochs // 50)
        self.window: list[Tensor] = []
        self.before: Tensor | None = None

    def rate_at(self, epoch: int) -> float:
        if epoch < self.decay_from:
            return self.rate * min(1.0, (epoch + 1) / self.ramp)
        return 0.5 * self.rate * (1 + math.cos(math.pi * (epoch - self.decay_from) / max(1, self.epochs - self.decay_from)))

    def record(self, epoch: int, objective: Tensor) -> None:
        if self.tolerance is None or epoch + 1 >= self.decay_from:
            return
        self.window.append(objective)
        if len(self.window) < self.patience:
            return
        now, self.window = torch.stack(self.window).mean(0), []
        if self.before is not None and bool((~((self.before - now) > self.tolerance)).all()):
            self.decay_from = epoch + 1
            self.epochs = min(self.epochs, 2 * (epoch + 1)) if self.decay else epoch + 1
        self.before = now

    def next_look(self, epoch: int) -> int:
        """The first epoch from ``epoch`` on before which ``record`` may have changed what follows."""
        if self.tolerance is None or epoch + 1 >= self.decay_from:
            return self.epochs
        return epoch + self.patience - len(self.window)

    def select(self, index: Tensor) -> None:
        """Of the replicas these are left."""
        self.window = [w[index] for w in self.window]
        self.before = None if self.before is None else self.before[index]

    def state(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "decay_from": self.decay_from, "window": self.window, "before": self.before}

    def load(self, state: dict[str, Any]) -> None:
        self.epochs, self.decay_from = state["epochs"], state["decay_from"]
        self.window, self.before = list(state["window"]), state["before"]
