"""Tables of numbers in users' files: .csv, .npy, .npz and .parquet. Nothing is ever unpickled."""

from __future__ import annotations

import csv
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from libi_fast.errors import InputError

LARGEST = 1e18  # its square still fits float32
READABLE = (".csv", ".npy", ".npz", ".parquet")


@dataclass
class Table:
    """Rows of finite numbers.

    Attributes:
        values: [N, D] float64.
        columns: D names; x1 ... xD where the file gives none.
        named: whether the file gave the names.
    """

    values: np.ndarray
    columns: list[str]
    named: bool

    def to_tensor(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as a tensor [N, D]."""
        return torch.from_numpy(self.values).to(dtype)

    def check_bounds(self, least: float, greatest: float) -> None:
        """Raises InputError naming the first cell outside [least, greatest]."""
        outside = (self.values < least) | (self.values > greatest)
        if outside.any():
            row, column = divmod(int(outside.argmax()), self.values.shape[1])
            raise InputError(
                f"row {row + 1}, column {self.columns[column]!r} is {self.values[row, column]:g}, "
                f"outside [{least:g}, {greatest:g}]"
            )

    def select(self, columns: Sequence[str]) -> Table:
        """This table with the columns a model was trained on, in that order.

        Names decide where both sides have them, positions otherwise.

        Raises:
            InputError: another number of columns (both are said), or names that do not match.
        """
        wanted = list(columns)
        if len(self.columns) != len(wanted):
            missing = [c for c in wanted if c not in self.columns] if self.named else []
            note = f"; missing: {_quoted(missing)}" if missing else ""
            raise InputError(f"{len(self.columns)} column(s), but the model was trained on {len(wanted)}{note}")
        if not self.named or wanted == self.columns or wanted == default_columns(len(wanted)):
            return Table(self.values, wanted, self.named)
        missing = [c for c in wanted if c not in self.columns]
        if missing:
            unknown = [c for c in self.columns if c not in wanted]
            raise InputError(f"column(s) {_quoted(missing)} of the training data are missing; found {_quoted(unknown)}")
        return Table(self.values[:, [self.columns.index(c) for c in wanted]], wanted, True)


def default_columns(count: int) -> list[str]:
    """x1 ... x<count>: names for columns that have none."""
    return [f"x{j + 1}" for j in range(count)]


def load_table(path: str | PathLike[str], *, key: str | None = None, min_rows: int = 2) -> Table:
    """Reads a table of numbers.

    Args:
        path: a .csv (a first row that is all numbers is data, any other one names the columns), .npy, .npz (its one
            array, the one named ``x``, or ``key``) or .parquet file.
        key: which array of an .npz file.
        min_rows: the fewest rows to accept.

    Returns:
        Table with values [N, D] float64, all finite.

    Raises:
        InputError: the file is missing, empty, damaged or of another kind; an array is not [rows, columns] of numbers;
            a cell holds text, NaN, infinity or nothing (row, counted from 1 below the header, and column are named);
            too few rows; or the package that reads this kind of file is not installed.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], tuple[np.ndarray, list[str] | None]]] = {
        ".csv": _read_csv,
        ".npy": _read_npy,
        ".npz": lambda p: _read_npz(p, key),
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: cannot read {path.suffix or 'a file without ending'}; supported: {_listed(READABLE)}")
    if not path.exists():
        raise InputError(f"file not found: {path}")
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    if key is not None and path.suffix.lower() != ".npz":
        raise InputError(f"{path}: a key chooses an array of an .npz file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    try:
        values, names = readers[path.suffix.lower()](path)
        if values.ndim != 2:
            raise InputError(f"expected an array [rows, columns], got shape {tuple(values.shape)}")
        if values.shape[0] == 0 or values.shape[1] == 0:
            raise InputError(f"no data: {values.shape[0]} rows, {values.shape[1]} columns")
        columns = names if names is not None else default_columns(values.shape[1])
        values = np.ascontiguousarray(values, dtype=np.float64)
        _check_finite(values, columns)
        if len(values) < min_rows:
            raise InputError(f"{len(values)} row(s); at least {min_rows} are needed")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Table(values, columns, names is not None)


def map_rows(path: str | PathLike[str], columns: int) -> np.ndarray:
    """A .npy file of numbers [N, columns], memory-mapped: values are read, and looked at, as they are used.

    Raises:
        InputError: not such a file; the message names it.
    """
    try:
        with _array_errors(".npy"):
            array = _numeric(np.load(path, mmap_mode="r", allow_pickle=False))
        if array.ndim != 2 or array.shape[1] != columns:
            raise InputError(f"shape {array.shape}, but the model was trained on {columns} column(s)")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return array


def save_table(path: str | PathLike[str], values: Tensor | np.ndarray, columns: Sequence[str], *, force: bool = False) -> None:
    """Writes values [N, D] with column names, in the format that the ending names (.npy keeps no names).

    The file appears whole or not at all, and an existing one stays unless ``force``.

    Raises:
        InputError: an unknown ending, an existing file, or a missing package. OSError: the disk refused.
    """
    path = check_output(path, force=force)
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".npy":
            np.save(temporary, array)
        elif path.suffix.lower() == ".npz":
            np.savez(temporary, x=array, columns=np.asarray(list(columns), dtype=np.str_))
        else:
            frame = _require("pandas").DataFrame(array, columns=list(columns))
            if path.suffix.lower() == ".csv":
                frame.to_csv(temporary, index=False)
            else:
                _require("pyarrow")
                frame.to_parquet(temporary, index=False)


def check_output(path: str | PathLike[str], *, force: bool = False) -> Path:
    """Refuses, before any work is done, an output that :func:`save_table` could not write."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise InputError(f"{path}: cannot write {suffix or 'a file without ending'}; supported: {_listed(READABLE)}")
    if path.is_dir():
        raise InputError(f"{path}: is a folder")
    if path.exists() and not force:
        raise InputError(f"{path} exists; pass --force to replace it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if suffix in (".csv", ".parquet"):
        _require("pandas")
    return path


@contextmanager
def atomic_path(path: Path) -> Iterator[str]:
    """A temporary name beside ``path`` to write to; renamed onto it at the end, removed on any exception."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield temporary
        umask = os.umask(0)  # mkstemp's files are private; a result should be as readable as any other new file
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_csv(path: Path) -> tuple[np.ndarray, list[str] | None]:
    pandas = _require("pandas")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = next((row for row in csv.reader(file) if any(cell.strip() for cell in row)), None)
        if first is None:
            raise InputError("no data: the file holds blank lines only")
        named = not all(cell.strip() == "" or _is_number(cell) for cell in first)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # rows longer than the header
            frame = pandas.read_csv(
                path,
                header=0 if named else None,
                index_col=False,
                encoding="utf-8-sig",
                skipinitialspace=True,
                low_memory=False,
                **_exact_floats(pandas),
            )
    except (UnicodeDecodeError, csv.Error, pandas.errors.ParserError, pandas.errors.ParserWarning) as error:
        raise InputError(f"not a table of comma-separated values ({_one_line(error)})") from error
    except pandas.errors.EmptyDataError as error:
        raise InputError("no data") from error
    if named:
        nameless = [j + 1 for j, cell in enumerate(first) if not cell.strip()]
        if nameless:
            raise InputError(f"column {nameless[0]} has no name in the header (a row index, saved by accident?)")
    columns = [str(c).strip() for c in frame.columns] if named else default_columns(frame.shape[1])
    return _frame_values(frame, columns), columns if named else None


def _exact_floats(pandas: ModuleType) -> dict[str, str]:
    """The option that makes read_csv round to the nearest float64: the default, and deprecated, from pandas 3.1 on."""
    version = tuple(int(part) for part in pandas.__version__.split(".")[:2])
    return {} if version >= (3, 1) else {"float_precision": "round_trip"}


def _read_parquet(path: Path) -> tuple[np.ndarray, list[str] | None]:
    pandas = _require("pandas")
    pyarrow = _require("pyarrow")
    try:
        frame = pandas.read_parquet(path, engine="pyarrow")
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"not a readable .parquet file ({_one_line(error)})") from error
    columns = [str(c) for c in frame.columns]
    return _frame_values(frame, columns), columns


def _frame_values(frame: Any, columns: list[str]) -> np.ndarray:
    """A data frame's cells as float64, missing ones as NaN. Raises InputError naming the first cell that is text."""
    pandas = _require("pandas")
    values = np.empty(frame.shape)
    for j, name in enumerate(columns):
        column = frame.iloc[:, j]
        kind = pandas.api.types
        if kind.is_bool_dtype(column.dtype) or kind.is_numeric_dtype(column.dtype):
            if kind.is_complex_dtype(column.dtype):
                raise InputError(f"column {name!r} holds complex numbers")
            values[:, j] = column.to_numpy(dtype=np.float64, na_value=np.nan)
            continue
        if not (kind.is_object_dtype(column.dtype) or kind.is_string_dtype(column.dtype)):
            raise InputError(f"column {name!r} holds {column.dtype}, not numbers")
        numbers = pandas.to_numeric(column, errors="coerce")
        text = (numbers.isna() & column.notna()).to_numpy().nonzero()[0]
        if len(text):
            raise InputError(f"row {text[0] + 1}, column {name!r}: {_shortened(column.iloc[text[0]])} is not a number")
        values[:, j] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    return values


def _read_npy(path: Path) -> tuple[np.ndarray, list[str] | None]:
    with _array_errors(".npy"):
        array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise InputError("not a .npy file: it holds an archive")
    return _numeric(array), None


def _read_npz(path: Path, key: str | None) -> tuple[np.ndarray, list[str] | None]:
    with _array_errors(".npz"):
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise InputError("not an .npz file: it holds a single .npy array")
        with archive:
            names = archive.files
            if key is None:
                key = names[0] if len(names) == 1 else "x"
                if key not in names:
                    raise InputError(f"{len(names)} arrays ({_listed(names)}) and none is named x: choose one with --key")
            if key not in names:
                raise InputError(f"no array named {key!r}; it holds: {_listed(names)}")
            array = archive[key]
            columns = archive["columns"] if "columns" in names and key != "columns" else None
    array = _numeric(array)
    # What save_table wrote; any other array of that name is not ours to interpret.
    if columns is not None and columns.dtype.kind == "U" and array.ndim == 2 and columns.shape == array.shape[1:]:
        return array, [str(c) for c in columns]
    return array, None


@contextmanager
def _array_errors(kind: str) -> Iterator[None]:
    """numpy's many ways to say that a file is damaged, or would have to be unpickled, as one InputError."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError, EOFError, MemoryError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise InputError(
                f"not a readable {kind} file of numbers: it holds Python objects, which are never unpickled"
            ) from error
        raise InputError(f"not a readable {kind} file ({_one_line(error)})") from error


def _numeric(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise InputError(f"expected an array of real numbers, got dtype {array.dtype}")
    return array


def _check_finite(values: np.ndarray, columns: Sequence[str]) -> None:
    bad = ~(np.abs(values) <= LARGEST)
    if bad.any():
        row, column = divmod(int(bad.argmax()), values.shape[1])
        value = values[row, column]
        named = {np.inf: "infinite", -np.inf: "minus infinity"}
        beyond = named.get(value, f"{value:g}, beyond {LARGEST:g}: rescale the column")
        shown = "NaN or missing" if np.isnan(value) else beyond
        more = int(bad.sum()) - 1
        raise InputError(f"row {row + 1}, column {columns[column]!r} is {shown}" + (f" ({more} more)" if more else ""))


def _require(package: str) -> ModuleType:
    """Imports an optional package, or says how to get it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"this needs {package}: pip install 'libi-fast[full]'") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:36] + "...'"


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(n) for n in names[:8]) + (", ..." if len(names) > 8 else "")
