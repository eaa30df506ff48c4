"""The arguments of ``fit``, checked, and where its scalars go."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.ops._library import check_positive
from libi_fast.training import distributed


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The keyword arguments of :meth:`Method.fit`, which says what they mean. Raises as it does."""

    epochs: int = 30_000
    restarts: int = 1
    survivors: int | None = None
    seed: int = 0
    batch_size: int | None = None
    learning_rate: float = 0.01
    tolerance: float | None = None
    patience: int = 200
    standardize: bool = False
    columns: list[str] | None = None
    early_stopping: bool = False
    warm_start: bool = False
    autocast: str | None = None
    memory: int = 2**30
    keep_restarts: bool = False
    checkpoint: str | PathLike[str] | None = None
    checkpoint_seconds: float = 30.0
    resume: bool = False
    log_dir: str | PathLike[str] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for label in ("epochs", "restarts", "survivors", "patience", "memory", "batch_size"):
            value = getattr(self, label)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{label} must be an integer, got {type(value).__name__}")
            if value is not None and value < 1 and label != "batch_size":  # whose range is that of the rows
                raise InputError(f"{label} must be at least 1, got {value}")
        if self.survivors is not None and self.survivors > self.restarts:
            raise InputError(f"survivors must be at most restarts ({self.restarts}), got {self.survivors}")
        check_positive("learning_rate", self.learning_rate)
        if self.tolerance is not None and not self.tolerance >= 0:
            raise InputError(f"tolerance must not be negative, got {self.tolerance}")
        if self.warm_start and self.restarts != 1:
            raise InputError("warm_start trains the modules as they are: restarts must be 1")
        if self.autocast not in (None, "bfloat16"):  # float16 would need its gradients scaled
            raise InputError(f"autocast must be None or 'bfloat16', got {self.autocast!r}")
        if not self.checkpoint_seconds >= 0:
            raise InputError(f"checkpoint_seconds must not be negative, got {self.checkpoint_seconds}")
        if self.resume and self.checkpoint is None:
            raise InputError("resume=True goes on from a checkpoint: name its file")

    def of_the_result(self) -> dict[str, Any]:
        """Those that decide what comes out, and so what a checkpoint must agree with."""
        elsewhere = ("memory", "keep_restarts", "checkpoint", "checkpoint_seconds", "resume", "log_dir", "progress")
        return {k: v for k, v in asdict(self).items() if k not in elsewhere}


class Log:
    """Scalars for TensorBoard: of each cell the terms of the restart whose objective is lowest. ``folder`` None keeps none.

    Raises:
        InputError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | PathLike[str] | None):
        self.folder = folder
        self.writer: Any = None
        self.batch = ""  # before every tag, where a grid has several
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise InputError(f"log_dir: {folder} is not a folder")
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise InputError("log_dir needs tensorboard: pip install tensorboard") from error
            self._open = SummaryWriter

    def write(self, phase: str, step: int, cells: int, terms: dict[str, Tensor]) -> None:
        if self.folder is None or not distributed.first():
            return
        if self.writer is None:  # what an interrupted run wrote after its last checkpoint is purged
            self.writer = self._open(str(self.folder), purge_step=step)
        every = {**terms, "objective": torch.stack(list(terms.values())).sum(0)}
        split = {name: value.view(cells, -1) for name, value in every.items()}
        objective = split["objective"]
        best = torch.where(torch.isfinite(objective), objective, math.inf).argmin(1)
        for cell, restart in enumerate(best.tolist()):
            suffix = f"/{cell}" if cells > 1 else ""
            for name, value in split.items():
                self.writer.add_scalar(f"{self.batch}{phase}/{name}{suffix}", float(value[cell, restart]), step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
