"""One phase of training: Adam over all replicas at once, until convergence or an epoch count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from libi_fast.errors import InputError
from libi_fast.ops._library import check_finite
from libi_fast.training import distributed
from libi_fast.training.replicas import Loss

REPORTS = 50  # history records a phase


class Batches:
    """Training data as batches of rows: a tensor or array (full batch, or shuffled minibatches), a Dataset or a DataLoader."""

    LOOK = 20_000  # rows of a DataLoader that statistics at the start look at

    def __init__(self, data: Any, batch_size: int | None, seed: int, like: Tensor):
        self.like = like
        self.transform: Callable[[Tensor], Tensor] = lambda rows: rows
        self.loader: DataLoader | None = None
        if isinstance(data, DataLoader):
            if batch_size is not None:
                raise InputError("batch_size belongs to the DataLoader that was passed; leave it out")
            self.loader = data
        elif isinstance(data, Dataset):
            generator = torch.Generator().manual_seed(seed)
            size = len(data) if batch_size is None else batch_size  # type: ignore[arg-type]
            self.loader = DataLoader(data, size, shuffle=True, generator=generator)
        if self.loader is not None:
            self.rows = self._look()
        else:
            self.rows = as_rows(data, like, "train")
        if self.rows.shape[0] < 2:
            raise InputError(f"train must hold at least 2 rows, got {self.rows.shape[0]}")
        self.batch_size = batch_size
        if batch_size is not None and not 1 <= batch_size <= len(self.rows):
            raise InputError(f"batch_size must lie in 1 .. {len(self.rows)} (the rows of train), got {batch_size}")
        self.generator = torch.Generator().manual_seed(seed)
        self.least = 1

    def apply(self, transform: Callable[[Tensor], Tensor]) -> None:
        """From now on rows come transformed; once only, before the first epoch."""
        self.transform = transform
        self.rows = transform(self.rows)

    def _look(self) -> Tensor:
        seen, count = [], 0
        for batch in self.loader or ():
            seen.append(as_rows(_first(batch), self.like, "a batch of train"))
            count += len(seen[-1])
            if count >= self.LOOK:
                break
        if not seen:
            raise InputError("train gives no batch")
        return torch.cat(seen)

    def epoch(self) -> Iterator[Tensor]:
        """Batches of one epoch; one smaller than ``least`` (the last of a loader) is left out."""
        if self.loader is not None:
            for batch in self.loader:
                rows = as_rows(_first(batch), self.like, "a batch of train")
                if len(rows) >= self.least:
                    yield self.transform(rows)
        elif self.batch_size is None:
            yield self.rows
        else:
            order = torch.randperm(len(self.rows), generator=self.generator)
            for index in order.split(self.batch_size):
                if len(index) >= self.least:
                    yield self.rows[index]

    def require(self, least: int, why: str) -> None:
        """Raise InputError where a batch would hold fewer than ``least`` rows."""
        loader_size = getattr(self.loader, "batch_size", None)
        size = self.batch_size or loader_size or len(self.rows)
        if min(size, len(self.rows)) < least:
            raise InputError(f"{why} needs batches of at least {least} rows, got {min(size, len(self.rows))}")
        self.least = least


def _first(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


def as_rows(data: Any, like: Tensor, name: str) -> Tensor:
    """Data as a finite tensor [N, D] of the model's dtype and device.

    Raises:
        TypeError: not an array or tensor of numbers; InputError: empty, wrong rank, NaN or infinity (row and column named).
    """
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "fiub":
            raise TypeError(f"{name} must hold numbers, got an array of {data.dtype}")
        data = torch.from_numpy(np.ascontiguousarray(data))
    if hasattr(data, "train") and hasattr(data, "validation"):
        raise TypeError(f"{name} is a whole data set: pass its .train and .validation")
    if not isinstance(data, Tensor):
        raise TypeError(f"{name} must be a tensor, an array, a Dataset or a DataLoader, got {type(data).__name__}")
    if data.dim() < 1 or data.shape[0] == 0:
        raise InputError(f"{name} is empty: shape {tuple(data.shape)}")
    if data.dim() == 1:
        raise InputError(f"{name} must have shape [rows, columns], got {tuple(data.shape)}")
    rows = data.detach().to(device=like.device, dtype=like.dtype).reshape(data.shape[0], -1)
    check_finite(name, rows)
    return rows


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


def optimise(
    parameters: Sequence[Tensor], loss: Loss, batches: Batches, schedule: Schedule, phase: str, step: int,
    report: Callable[[dict[str, Any]], None], tick: Callable[[float], None],
) -> int:  # fmt: skip
    """Minimise the sum of the terms; returns the number of steps done so far, the next phase's first.

    Raises:
        FloatingPointError: every replica's objective is NaN or infinite; the message names epoch and term. A single replica
        that turns non-finite stays so while the others go on.
    """
    optimiser = torch.optim.Adam(parameters, lr=schedule.rate, fused=all(p.is_floating_point() for p in parameters))
    every = max(1, schedule.epochs // REPORTS)
    epoch = 0
    while epoch < schedule.epochs:
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate_at(epoch)
        sums: dict[str, Tensor] = {}
        count = 0
        for batch in batches.epoch():
            terms = loss(batch, step)
            objective = torch.stack(list(terms.values())).sum(0)
            optimiser.zero_grad(set_to_none=True)
            objective.sum().backward()
            distributed.sum_gradients(parameters)
            optimiser.step()
            step += 1
            count += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach()
        if not count:
            raise InputError(f"no batch of at least {batches.least} rows in an epoch")
        means = {k: v / count for k, v in sums.items()}
        objective = torch.stack(list(means.values())).sum(0)
        schedule.record(epoch, objective)
        alive = torch.isfinite(objective)
        if not bool(alive.any()):
            bad = [k for k, v in means.items() if not bool(torch.isfinite(v).any())] or list(means)
            raise FloatingPointError(
                f"training became non-finite in {phase}, epoch {epoch}: {', '.join(bad)} of all {len(objective)} restarts"
            )
        if epoch % every == 0 or epoch + 1 >= schedule.epochs:
            report({"phase": phase, "epoch": epoch, **{k: v.tolist() for k, v in means.items()}})
        tick(float(objective[alive].min()) if epoch % every == 0 else math.nan)
        epoch += 1
    return step
