"""Run folders: a fitted method on disk, readable without this package.

    config.json          what was fitted, with which settings, on which columns, and by which version
    weights.safetensors  every parameter
    metrics.jsonl        the training history, one JSON record a line
    figures/             training.png, where matplotlib is installed

A folder appears whole or not at all: it is written beside its place and then renamed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from libi_fast import figures
from libi_fast.doctor import own_version
from libi_fast.errors import InputError

FORMAT = "libi_fast run"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, METRICS, FIGURES = "config.json", "weights.safetensors", "metrics.jsonl", "figures"
OURS = frozenset({CONFIG, WEIGHTS, METRICS, FIGURES})


def save(
    method: Any,
    folder: str | PathLike[str],
    force: bool = False,
    *,
    data: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a fitted method to a run folder.

    Args:
        method: a LiBI, VAE or IWAE that was fitted.
        folder: where to; missing parents are made.
        force: replace a run folder that is there. Files in it that are not ours are kept; a folder that is not a
            run folder is never touched.
        data: notes on the data (name, rows, seed of the split), kept in config.json as they are; None keeps the
            method's own (of the run it was loaded from).

    Returns:
        The folder.

    Raises:
        InputError: something is there already (see ``force``). OSError: the disk refused; nothing is left behind.
    """
    with replacing(folder, OURS, is_run, force=force) as temporary:
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "libi_fast": own_version() or "unknown",
            "torch": torch.__version__,
            "data": dict(method.data if data is None else data),
            "training": method.training,
            "method": method.config(),
        }
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, default=_plain) + "\n", encoding="utf-8")
        # safetensors refuses shared memory and strides; clones of contiguous tensors have neither.
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in method.state().items()}
        (temporary / WEIGHTS).write_bytes(to_bytes(state, metadata={"format": FORMAT}))
        with open(temporary / METRICS, "w", encoding="utf-8") as file:
            for record in method.history:
                file.write(json.dumps(_finite_or_none(record), default=_plain, allow_nan=False) + "\n")
        (temporary / FIGURES).mkdir()
        if method.history and importlib.util.find_spec("matplotlib") is not None:
            figures.save(figures.training_curves(method.history), temporary / FIGURES / "training.png")
    return Path(folder)


def load(folder: str | PathLike[str], decoder: nn.Module | None = None, network: nn.Module | None = None) -> Any:
    """Reads a run folder back into the method that :func:`save` wrote; its log-likelihoods are bit-identical.

    Args:
        folder: the run folder.
        decoder, network: the modules, needed where they were a user's own (not built by :func:`libi_fast.mlp`).

    Raises:
        InputError: no such folder, not a run folder, one of a newer version, or a damaged one; the message names the
            file and what is wrong with it.
    """
    from libi_fast import training

    folder = Path(folder)
    config = read_config(folder)
    state = _read_weights(folder / WEIGHTS)
    history = _read_metrics(folder / METRICS)
    try:
        method = training.from_config(config["method"], decoder=decoder, network=network)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder / CONFIG}: damaged settings ({type(error).__name__}: {error})") from error
    _check_state(folder / WEIGHTS, method.state(), state)
    method.load_state(state)
    method.history, method.data, method.training = history, config.get("data", {}), config.get("training", {})
    return method


def read_config(folder: str | PathLike[str]) -> dict[str, Any]:
    """config.json of a run folder, as a dict. Raises InputError where it is missing, damaged or of a newer version."""
    folder = Path(folder)
    path = folder / CONFIG
    if not folder.exists():
        raise InputError(f"run folder not found: {folder}")
    if not folder.is_dir():
        raise InputError(f"{folder}: not a run folder, but a file")
    if not path.is_file():
        raise InputError(f"{folder}: not a run folder ({CONFIG} is missing)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{path}: not the configuration of a libi_fast run")
    version = config.get("format_version")
    if not isinstance(version, int):
        raise InputError(f"{path}: format_version is missing")
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path}: written by a newer libi_fast ({config.get('libi_fast')}; format {version}, this one reads up to "
            f"{FORMAT_VERSION}); upgrade libi-fast"
        )
    if not isinstance(config.get("method"), dict):
        raise InputError(f"{path}: 'method' is missing")
    return config


def is_run(folder: Path) -> bool:
    """Whether a folder holds a config.json of ours (its other files may be damaged)."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def check_target(folder: str | PathLike[str], is_ours: Callable[[Path], bool] = is_run, *, force: bool = False) -> None:
    """Refuses, before any work is done, a folder that :func:`save` could not write.

    Raises:
        InputError: it exists and ``force`` is not given, or it is not ours to replace, or it cannot be made there.
    """
    target = Path(folder)
    if target.is_symlink() or target.exists():
        if not target.is_dir():
            raise InputError(f"{target} exists and is not a folder")
        if not any(target.iterdir()):
            return  # an empty folder holds nothing to lose
        if not is_ours(target):
            raise InputError(f"{target} exists and was not written by libi_fast; it is left alone, choose another folder")
        if not force:
            raise InputError(f"{target} exists; pass --force (force=True from Python) to replace it")
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{target}: cannot make a folder in {parent}")


@contextmanager
def replacing(
    folder: str | PathLike[str], ours: frozenset[str], is_ours: Callable[[Path], bool], *, force: bool = False
) -> Iterator[Path]:
    """A temporary folder to fill; at the end it takes the place of ``folder``, on any exception it is removed.

    Args:
        folder: the place. ours: the names that may be replaced in an existing folder; all others move over.
        is_ours: tells an existing folder that may be replaced. force: replace one.
    """
    check_target(folder, is_ours, force=force)
    target = Path(folder).resolve()  # through a link: the folder is replaced, the link stays
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-new-", dir=target.parent))
    try:
        yield temporary
        umask = os.umask(0)  # mkdtemp's folders are private; a result should be as readable as any other new folder
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        check_target(target, is_ours, force=force)  # again: someone may have been quicker
        if target.exists():
            _swap(temporary, target, ours)
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap(new: Path, target: Path, ours: frozenset[str]) -> None:
    """Puts ``new`` in the place of ``target``; the old folder comes back if that fails."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent)) / target.name
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    finally:
        if not old.exists():
            old.parent.rmdir()
    for entry in old.iterdir():
        if entry.name not in ours and not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(old.parent)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path.parent}: damaged run folder ({path.name} is missing)")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error})") from error


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path.parent}: damaged run folder ({path.name} is missing)")
    records = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            record = json.loads(line)
            if not isinstance(record, dict):
                raise InputError(f"{path}: line {number} is not a record")
            records.append(record)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {number} is not readable JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not readable text ({error.reason})") from error
    return records


def _check_state(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise InputError(f"{path}: {name!r} is missing")
        if found[name].shape != tensor.shape:
            raise InputError(
                f"{path}: {name!r} has shape {tuple(found[name].shape)}, but {CONFIG} describes {tuple(tensor.shape)}"
            )
        if not bool(torch.isfinite(found[name]).all()):
            raise InputError(f"{path}: {name!r} holds numbers that are not finite")
    unexpected = sorted(set(found) - set(expected))
    if unexpected:
        raise InputError(f"{path}: {unexpected[0]!r} is not part of the method that {CONFIG} describes")


def _plain(value: Any) -> Any:
    """Tensors, numpy numbers and paths as JSON knows them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, tuple)):
        return list(value)
    return str(value)


def _finite_or_none(value: Any) -> Any:
    """NaN and infinity have no JSON: null stands for them, so that every JSON reader takes metrics.jsonl."""
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite_or_none(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite_or_none(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
