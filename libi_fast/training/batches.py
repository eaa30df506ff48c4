"""Training data as batches of rows."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from libi_fast.errors import InputError
from libi_fast.ops._library import check_finite
from libi_fast.training import distributed
from libi_fast.training.distributed import Rows


class Batches:
    """Training data as batches of rows: a tensor or array (full batch, or shuffled minibatches), a Dataset or a DataLoader."""

    LOOK = 20_000  # rows of a DataLoader that statistics at the start look at

    def __init__(self, data: Any, batch_size: int | None, seed: int, like: Tensor):
        self.like = like
        self.transform: Callable[[Tensor], Tensor] = lambda rows: rows
        self.loader: DataLoader | None = None
        self.spread = True  # over processes: each has a loader of its own part
        self.source: np.memmap | None = None
        if isinstance(data, DataLoader):
            if batch_size is not None:
                raise InputError("batch_size belongs to the DataLoader that was passed; leave it out")
            self.loader = data
        elif isinstance(data, Dataset):
            generator = torch.Generator().manual_seed(seed)
            size = len(data) if batch_size is None else batch_size  # type: ignore[arg-type]
            self.loader, self.spread = DataLoader(data, size, shuffle=True, generator=generator), False
        if self.loader is not None:
            self.rows = self._look()
        elif isinstance(data, np.memmap) and batch_size is not None:
            as_rows(data[:1].copy(), like, "train")  # its type and shape
            self.source = data
            self.rows = self._read(np.linspace(0, len(data) - 1, min(len(data), self.LOOK), dtype=np.int64))
        else:
            self.rows = as_rows(data, like, "train")
        if self.rows.shape[0] < 2:
            raise InputError(f"train must hold at least 2 rows, got {self.rows.shape[0]}")
        self.batch_size = batch_size
        if batch_size is not None and not 1 <= batch_size <= self.count:
            raise InputError(f"batch_size must lie in 1 .. {self.count} (the rows of train), got {batch_size}")
        self.generator = torch.Generator().manual_seed(seed)
        self.least = 1

    def apply(self, transform: Callable[[Tensor], Tensor]) -> None:
        """From now on rows come transformed; once only, before the first epoch."""
        self.transform = transform
        self.rows = transform(self.rows)

    @property
    def count(self) -> int:
        """Rows of an epoch (of a loader: those looked at)."""
        return self.rows.shape[-2] if self.source is None else len(self.source)

    @classmethod
    def stacked(cls, sets: list[Batches]) -> Batches:
        """One of K data sets of equal shape: rows [K, N, D], in the same order in all of them."""
        first = sets[0]
        if len(sets) > 1:
            if any(b.loader is not None or b.source is not None for b in sets):
                raise InputError("several data sets train as one batch from tensors or arrays in memory alone")
            shapes = [tuple(b.rows.shape) for b in sets]
            if len(set(shapes)) > 1:
                raise InputError(f"data sets that train as one batch must have equal shapes, got {shapes}")
            first.rows = torch.stack([b.rows for b in sets])
        return first

    def _read(self, index: np.ndarray) -> Tensor:
        """These rows of a memory-mapped array."""
        assert self.source is not None
        rows = torch.from_numpy(self.source[index]).to(self.like.device, self.like.dtype).flatten(1)
        forget_pages(self.source)
        bad = ~torch.isfinite(rows).all(1)
        if bool(bad.any()):
            raise InputError(f"train holds NaN or infinity at row {index[int(bad.int().argmax())]} (counted from 0)")
        return rows

    def _look(self) -> Tensor:
        seen, count = [], 0
        for batch in self.loader or ():
            seen.append(as_rows(_first(batch), self.like, "a batch of train"))
            count += len(seen[-1])
            if count >= self.LOOK:
                break
        if not seen:
            raise InputError("train gives no batch")
        return distributed.gather_rows(torch.cat(seen)) if self.spread else torch.cat(seen)

    def epoch(self) -> Iterator[Rows]:
        """Batches of one epoch; one smaller than ``least`` (the last of a loader) is left out."""
        if self.loader is not None:
            for batch in self.loader:
                values = self.transform(as_rows(_first(batch), self.like, "a batch of train"))
                rows = Rows.own(values) if self.spread else Rows.part_of(values)
                if rows.total >= self.least:
                    yield rows
        elif self.batch_size is None:
            yield Rows.part_of(self.rows)
        else:
            order = torch.randperm(self.count, generator=self.generator)
            for index in order.split(self.batch_size):
                if len(index) < self.least:
                    continue
                if self.source is None:
                    part = distributed.shard(len(index))
                    yield Rows.part_of(self.rows[..., index, :])._replace(places=index[part])
                    continue
                part = distributed.shard(len(index))
                own = self.transform(self._read(index[part].numpy()))
                yield Rows(own, part.start, len(index), distributed.active())

    def state(self) -> list[Tensor]:
        """Of every generator that orders the rows."""
        return [g.get_state() for g in self._generators()]

    def load(self, state: list[Tensor]) -> None:
        for generator, value in zip(self._generators(), state, strict=True):
            generator.set_state(value)

    def _generators(self) -> list[torch.Generator]:
        loader = self.loader
        sources = [self, loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
        found = [g for s in sources if (g := getattr(s, "generator", None)) is not None]
        return list({id(g): g for g in found}.values())

    def require(self, least: int, why: str) -> None:
        """Raise InputError where a batch would hold fewer than ``least`` rows."""
        loader_size = getattr(self.loader, "batch_size", None)
        size = self.batch_size or loader_size or self.count
        if min(size, self.count) < least:
            raise InputError(f"{why} needs batches of at least {least} rows, got {min(size, self.count)}")
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
        kind = data.dtype.newbyteorder("=") if data.dtype.itemsize <= 8 else np.float64  # torch knows no other
        data = torch.from_numpy(data.astype(kind, order="C", copy=not data.flags.writeable))
    if hasattr(data, "train") and hasattr(data, "validation"):
        raise TypeError(f"{name} is a whole data set: pass its .train and .validation")
    if not isinstance(data, Tensor):
        raise TypeError(f"{name} must be a tensor, an array, a Dataset or a DataLoader, got {type(data).__name__}")
    if data.is_meta or data.layout != torch.strided or data.is_complex():
        raise TypeError(f"{name} must be a dense tensor of real numbers, got {data.layout}, {data.dtype} on {data.device}")
    if data.dim() < 1:
        raise InputError(f"{name} must have shape [rows, columns], got one number")
    if data.shape[0] == 0:
        raise InputError(f"{name} is empty: shape {tuple(data.shape)}")
    if data.dim() == 1:
        raise InputError(f"{name} must have shape [rows, columns], got {tuple(data.shape)}")
    rows = data.detach().to(device=like.device, dtype=like.dtype).reshape(data.shape[0], -1)
    check_finite(name, rows)
    return rows


def forget_pages(data: Any) -> None:
    """Let go of the pages of a memory-mapped array that were read: they count as this process's memory until then."""
    pages = getattr(data, "_mmap", None)
    if pages is not None and hasattr(pages, "madvise") and data.mode in ("r", "r+"):
        pages.madvise(mmap.MADV_DONTNEED)
