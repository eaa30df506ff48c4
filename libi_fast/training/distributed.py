"""Global statistics of rows that are spread over processes (torch.distributed); the identity in a single process.

Every process adds up its own rows' terms and the whole of any term on gathered rows, whose gradient it takes for its own rows
alone; summed over processes that is the gradient of the objective on all rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, torch.tensor(z.shape[-2]))
        sizes = [int(c) for c in counts]
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
        return grad[..., ctx.own, :]


def gather_rows(z: Tensor) -> Tensor:
    """[..., n, L] of this process -> [..., sum of n, L] of all, in the order of ranks; gradients go to the own rows."""
    return _GatherRows.apply(z) if active() else z


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up the gradients of all processes, in place."""
    if active():
        for p in parameters:
            if p.grad is not None:
                dist.all_reduce(p.grad)
