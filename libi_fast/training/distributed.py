"""Rows that are spread over processes (torch.distributed), and statistics of all of them; the identity in a single process.

A term of an objective is this process's share: the shares of all processes add up to the term, and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def processes() -> int:
    return dist.get_world_size() if active() else 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return not active() or dist.get_rank() == 0


def shard(rows: int) -> slice:
    """This process's part of rows 0 .. rows - 1, in the order of ranks."""
    if not active():
        return slice(0, rows)
    rank, count = dist.get_rank(), dist.get_world_size()
    return slice(rows * rank // count, rows * (rank + 1) // count)


class Rows(NamedTuple):
    """Rows of a batch that this process has.

    values [n, D], or [R, n, D] where replicas have data of their own; first: the batch's index of the first; total: rows of the
    whole batch; spread: other processes have the rest; places [n]: which rows of the training data they are, None where all
    are in the batch, or that is not known.
    """

    values: Tensor
    first: int
    total: int
    spread: bool = False
    places: Tensor | None = None

    @staticmethod
    def whole(values: Tensor) -> Rows:
        return Rows(values, 0, values.shape[-2])

    @staticmethod
    def part_of(values: Tensor) -> Rows:
        """This process's part of a batch that all processes have."""
        part = shard(values.shape[-2])
        return Rows(values[..., part, :], part.start, values.shape[-2], active())

    @staticmethod
    def own(values: Tensor) -> Rows:
        """A batch that each process has a part of."""
        if not active():
            return Rows.whole(values)
        counts = _counts(values)
        return Rows(values, sum(counts[: dist.get_rank()]), sum(counts), True)

    def mean(self, per_row: Tensor) -> Tensor:
        """This process's share of the mean over rows: [..., n] -> [...]."""
        return per_row.sum(-1) / self.total

    def gather(self, z: Tensor) -> Tensor:
        """[..., n, L] of these rows -> [..., total, L]; to be followed by `share`, with which its gradient fits."""
        return _GatherRows.apply(z) if self.spread else z

    def share(self, statistic: Tensor) -> Tensor:
        """This process's share of a statistic of gathered rows."""
        return statistic / processes() if self.spread else statistic


def _counts(values: Tensor) -> list[int]:
    """Rows of each process."""
    counts = [torch.zeros((), dtype=torch.int64, device=values.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(values.shape[-2], device=values.device))
    return [int(c) for c in counts]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        sizes = _counts(z)
        # all_gather wants equal shapes: rows are padded to the largest shard and cut again.
        padded = z.new_zeros((*z.shape[:-2], max(sizes), z.shape[-1]))
        padded[..., : z.shape[-2], :] = z
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        start = sum(sizes[: dist.get_rank()])
        ctx.own = slice(start, start + z.shape[-2])
        return torch.cat([p[..., :n, :] for p, n in zip(parts, sizes, strict=True)], -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        # Every process has the gradient of its share of the same statistic; that of the whole, for the own rows:
        return grad[..., ctx.own, :] * dist.get_world_size()


def gather_rows(z: Tensor) -> Tensor:
    """[..., n, L] of this process -> [..., sum of n, L] of all, in the order of ranks; not differentiable."""
    with torch.no_grad():
        return _GatherRows.apply(z) if active() else z


def total(shares: Tensor) -> Tensor:
    """The sum over processes."""
    if not active():
        return shares
    shares = shares.detach().clone()
    dist.all_reduce(shares)
    return shares


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of all processes, in place, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None] if active() else []
    if gradients:
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, new in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(new.view_as(g))


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return total(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return total(grad)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over processes, differentiable; to be followed by `Rows.share`, with which its gradient fits.

    Every process gets the sum and may use it in its own way: backward adds up what all of them ask for. So each process's
    objective must be its share, as a whole objective on each of P processes would count P times; and every process must run
    the same backward passes in the same order.
    """
    return _SumOverProcesses.apply(tensor) if active() else tensor
