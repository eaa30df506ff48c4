"""One type for every data set, the seeded split of a table, and ``load`` by name or by path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from libi_fast.data.files import READABLE, load_table
from libi_fast.errors import InputError
from libi_fast.ops.random import Stream, philox_uniform

if TYPE_CHECKING:
    from libi_fast.data.synthetic import Truth


@dataclass
class Dataset:
    """Rows of data in three parts.

    Attributes:
        name: the registered name, or the file's.
        columns: D names.
        train, validation, test: [N, D] each, in the data's own units.
        truth: the generating model where it is known (synthetic sets), else None.
    """

    name: str
    columns: list[str]
    train: Tensor
    validation: Tensor
    test: Tensor
    truth: Truth | None = None


@dataclass(frozen=True)
class Split:
    """A seeded shuffle of a table's rows into train, validation and test.

    The order comes from Philox, so a seed means the same split on every machine.

    Args:
        validation, test: shares of the rows, each above 0, below 1 together; train takes the rest.
        seed: of the shuffle.
    """

    validation: float = 0.2
    test: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 1):
            raise InputError(
                "split: expected shares above 0 that leave some rows for training, "
                f"got validation {self.validation}, test {self.test}"
            )

    def indices(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row numbers of train, validation and test: disjoint, none empty, together all ``rows``.

        Raises:
            InputError: fewer than 4 rows (2 to train on, 1 to choose by, 1 to test on).
        """
        if rows < 4:
            raise InputError(f"{rows} row(s) cannot be split: at least 4 are needed (2 train, 1 validation, 1 test)")
        # A stable sort, so that two equal uniforms (24 bits each) still give one answer.
        uniforms = philox_uniform(self.seed, rows, 1, repetition=1, stream=Stream.DATA, dtype=torch.float64)
        order = uniforms.flatten().argsort(stable=True)
        validation, test = (max(1, round(rows * share)) for share in (self.validation, self.test))
        train, validation_rows, test_rows = order.split([rows - validation - test, validation, test])
        return train, validation_rows, test_rows

    def apply(self, name: str, values: Tensor, columns: list[str], dtype: torch.dtype) -> Dataset:
        """The Dataset of the rows of ``values`` [N, D], converted to ``dtype``."""
        train, validation, test = (values[rows].to(dtype) for rows in self.indices(len(values)))
        return Dataset(name, columns, train, validation, test)


def _registry() -> dict[str, Callable[[int, torch.dtype], Dataset]]:
    # Imported late: those modules build on Dataset.
    from libi_fast.data import nonlinear, real, synthetic

    return {
        "LinearJTEx": lambda seed, dtype: synthetic.LinearJTEx(seed, dtype=dtype),
        "CubicJTEx": lambda seed, dtype: nonlinear.CubicJTEx(seed, dtype=dtype),
        "Gaussian": lambda seed, dtype: synthetic.GaussianExample(seed, dtype=dtype),
        "Mobius": lambda seed, dtype: nonlinear.Mobius(seed, dtype=dtype),
        "digits": real.digits,
        "wine": real.wine,
    }


def known_names() -> list[str]:
    """The names that :func:`load` knows."""
    return list(_registry())


def find_name(source: str | PathLike[str]) -> str | None:
    """The registered name that ``source`` spells (case does not matter), or None where it does not spell one.

    Raises:
        InputError: ``source`` is neither a name nor an existing path; the message lists the names.
    """
    text = fspath(source)
    for name in known_names():
        if text.lower() == name.lower():
            return name
    path = Path(text)
    if path.exists():
        return None
    if path.suffix or len(path.parts) > 1:
        raise InputError(f"file not found: {text}")
    raise InputError(f"unknown data set {text!r}; known: {', '.join(known_names())}; or give a file ({', '.join(READABLE)})")


def load(
    source: str | PathLike[str],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    validation: float = 0.2,
    test: float = 0.2,
    key: str | None = None,
    bounds: tuple[float, float] | None = None,
) -> Dataset:
    """A data set by its name, or the rows of a file, split.

    Args:
        source: one of :func:`known_names`, or a path that :func:`load_table` reads.
        seed: draws a synthetic set, or shuffles the split of a real one.
        dtype: of the tensors.
        validation, test: shares of a file's rows (the named sets have their own).
        key: the array to take from an .npz file.
        bounds: refuse a file with a number outside (least, greatest), for likelihoods that need it.

    Raises:
        InputError: an unknown name (the known ones are listed), and whatever :func:`load_table` refuses.
    """
    name = find_name(source)
    if name is not None:
        return _registry()[name](seed, dtype)
    table = load_table(source, key=key)
    try:
        if bounds is not None:
            table.check_bounds(*bounds)
        return Split(validation, test, seed).apply(str(source), table.to_tensor(dtype), table.columns, dtype)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
