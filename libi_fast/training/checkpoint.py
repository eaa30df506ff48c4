"""Checkpoints of a run of training: one file, replaced at once, from which it goes on to the same bits."""

from __future__ import annotations

import hashlib
import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError

FORMAT = "libi_fast checkpoint 1"


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' values."""
    total = hashlib.sha256()
    for t in tensors:
        total.update(f"{t.dtype}{tuple(t.shape)}".encode())
        total.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Checkpoint:
    """A file that holds the state of a run, and what the run is of.

    Args:
        path: the file; None keeps nothing. seconds: least time between two writes.
        identity: what must be the same for a run to go on: settings, data, versions.
        writes: False in all processes but the first.
    """

    def __init__(self, path: str | os.PathLike[str] | None, seconds: float, identity: dict[str, Any], writes: bool = True):
        self.path = None if path is None else Path(path)
        self.seconds, self.identity, self.writes = seconds, identity, writes
        self.last = time.monotonic()

    def due(self) -> bool:
        return self.path is not None and self.writes and time.monotonic() - self.last >= self.seconds

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file: after a crash at any moment there is the old one or the new one, whole."""
        if self.path is None or not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}-new")
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "identity": self.identity, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self.last = time.monotonic()

    def delete(self) -> None:
        if self.path is not None and self.writes:
            self.path.unlink(missing_ok=True)

    def check(self, resume: bool) -> None:
        """Raise InputError for a file that a new run would overwrite."""
        if self.path is not None and self.path.exists() and not resume:
            raise InputError(f"{self.path} holds a run that has not ended: go on with resume=True, or delete the file")

    def read(self) -> dict[str, Any] | None:
        """The state in the file, None where there is none.

        Raises:
            InputError: not a checkpoint, a damaged one, or one of another run (what differs is named).
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            found = torch.load(self.path, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
            raise InputError(f"{self.path}: not a checkpoint, or a damaged one ({type(error).__name__})") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InputError(f"{self.path}: not a checkpoint of this version of libi_fast")
        for name, value in self.identity.items():
            if found["identity"].get(name) != value:
                was = found["identity"].get(name)
                raise InputError(f"{self.path}: cannot go on from there: {name} is {value!r} now, but was {was!r}")
        return found["state"]
