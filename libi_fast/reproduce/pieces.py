"""Training and measuring the pieces of a protocol, shared out over processes; a run goes on where it stopped.

Of a piece two files are kept, each whole or not at all: every restart's parameters once it is trained, and what was measured;
and on the way there the training's checkpoint and what the settings so far reached on validation rows.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from libi_fast.data.files import atomic_path
from libi_fast.doctor import machine, own_version
from libi_fast.errors import InputError
from libi_fast.reproduce import measure, published, references
from libi_fast.reproduce.protocol import Piece, Protocol
from libi_fast.training.grid import fit_grid

OWN, LIKELIHOOD = "own objective", "validation likelihood"
SELECTIONS = (OWN, LIKELIHOOD)
"""How restarts and settings are chosen, on validation rows: by the first a restart by its method's objective, the setting by
the importance-sampled log-likelihood, as in the paper; by the second both by :func:`references.nearly_exact`."""
TRUTH, VALIDATION = "truth", "validation"
SAMPLED, EXACT = "importance-sampled", "exact"
OTHERS = "is of other settings, or of another version of libi_fast: choose another --out, or remove it"


class Folder:
    """The files of one protocol's run.

    Raises:
        InputError: a file in it is of other settings, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], protocol: Protocol, device: str = "cpu"):
        self.path, self.protocol, self.device = Path(path) / protocol.name, protocol, device
        self.made: dict[str, Any] = {}  # what several figures need

    def file(self, name: str, ending: str) -> Path:
        return self.path / f"{name}.{ending}"

    def read(self, name: str, identity: dict[str, Any]) -> dict[str, Any] | None:
        """What was measured, or None where it was not yet."""
        path = self.file(name, "json")
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            same = content["identity"] == json.loads(json.dumps(identity))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it to measure anew") from error
        if not same:
            raise InputError(f"{path} {OTHERS}")
        return content

    def write(self, name: str, content: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.file(name, "json")) as path:
            Path(path).write_text(json.dumps(content, indent=1) + "\n")


def identity_of(protocol: Protocol, piece: Piece | None, dataset: str) -> dict[str, Any]:
    """What decides the numbers of a piece, or of a data set's truth, between releases."""
    common = {
        "libi_fast": own_version(), "dataset": dataset, "seeds": protocol.seeds, "rows": protocol.rows,
        "repetitions": protocol.repetitions,
    }  # fmt: skip
    if piece is None:
        return common
    own = {"method": piece.method, "grid": piece.grid, "training": piece.training, "samples": protocol.samples}
    return {**common, **own, "seed": protocol.seed}


# --- one piece ---


def truth_of(folder: Folder, dataset: str) -> dict[str, Any]:
    """The ground truth and exact maximum likelihood on every draw of a data set: {"seconds", "sets": one of each draw}."""
    name, identity = f"{dataset}.{TRUTH}", identity_of(folder.protocol, None, dataset)
    content = folder.read(name, identity)
    if content is None:
        start = time.perf_counter()
        found = [measure.of_truth(data, folder.protocol.repetitions) for data in folder.protocol.data(dataset)]
        content = {"identity": identity, "machine": machine(), "seconds": time.perf_counter() - start, "sets": found}
        folder.write(name, content)
    return content


def trained(folder: Folder, piece: Piece, progress: bool) -> list[list[list[dict[str, Tensor]]]]:
    """States of [setting][draw][restart], the one that its method prefers first, without those that became non-finite; from a
    file once they were trained."""
    path = folder.file(piece.name, "safetensors")
    protocol = folder.protocol
    identity = json.dumps(identity_of(protocol, piece, piece.dataset))
    if not path.exists():
        start = time.perf_counter()
        sets = protocol.data(piece.dataset)
        path.parent.mkdir(parents=True, exist_ok=True)
        grid = fit_grid(
            piece.methods(sets[0], folder.device), sets, **piece.training, seed=protocol.seed, keep_restarts=True,
            checkpoint=folder.file(piece.name, "checkpoint"), resume=True, progress=progress,
        )  # fmt: skip
        tensors: dict[str, Tensor] = {}
        for s, row in enumerate(grid):
            for k, fitted in enumerate(row):
                objectives = fitted.history[-1]["objective"]
                finite = [r for r, value in enumerate(objectives) if math.isfinite(value)]
                for place, restart in enumerate(sorted(finite, key=objectives.__getitem__)):
                    state = fitted.restart_states[restart]
                    tensors |= {f"{s}/{k}/{place}/{name}": value.cpu() for name, value in state.items()}
        seconds = time.perf_counter() - start
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, {"identity": identity, "seconds": str(seconds)})
    return _read_states(path, identity, len(piece.grid), len(protocol.seeds))


def _read_states(path: Path, identity: str, settings: int, draws: int) -> list[list[list[dict[str, Tensor]]]]:
    if _notes(path).get("identity") != identity:
        raise InputError(f"{path} {OTHERS}")
    states: list[list[list[dict[str, Tensor]]]] = [[[] for _ in range(draws)] for _ in range(settings)]
    for key, value in load_file(path).items():
        s, k, place, name = key.split("/", 3)
        cell = states[int(s)][int(k)]
        cell.extend({} for _ in range(int(place) + 1 - len(cell)))
        cell[int(place)][name] = value
    return states


def _notes(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path}: damaged ({error}); remove it to train anew") from error


def read_result(folder: Folder, piece: Piece) -> dict[str, Any] | None:
    """What was measured of a piece, or None where it was not yet."""
    return folder.read(piece.name, identity_of(folder.protocol, piece, piece.dataset))


def result_of(folder: Folder, piece: Piece, progress: bool = False) -> dict[str, Any]:
    """What was measured of a piece; trained and measured first where it was not yet."""
    content = _result(folder, piece, progress, lambda: False)
    assert content is not None
    return content


def _result(folder: Folder, piece: Piece, progress: bool, late: Callable[[], bool]) -> dict[str, Any] | None:
    """The same, or None where it was ``late()`` before all settings were looked at; the chosen ones are then measured whole."""
    content = read_result(folder, piece)
    if content is not None:
        return content
    protocol, identity = folder.protocol, identity_of(folder.protocol, piece, piece.dataset)
    states = trained(folder, piece, progress)
    validation = _validation(folder, piece, states, late)
    if validation is None:
        return None
    truth = truth_of(folder, piece.dataset)["sets"]
    start = time.perf_counter()
    sets = protocol.data(piece.dataset)
    methods = piece.methods(sets[0])
    found: dict[tuple[int, int, int], dict[str, Any] | None] = {}
    selections: dict[str, Any] = {}
    for selection, (setting, restarts) in choose(validation[SAMPLED], validation[EXACT]).items():
        for k, restart in enumerate(restarts):
            key = (setting, k, restart)
            if not states[setting][k]:
                found[key] = None  # every restart became non-finite
            if key not in found:
                methods[setting].load_state(states[setting][k][restart])
                found[key] = measure.of_method(methods[setting], sets[k], truth[k], protocol.samples, protocol.repetitions)
        sets_found = [found[setting, k, restart] for k, restart in enumerate(restarts)]
        selections[selection] = {
            "setting": setting, "settings": piece.grid[setting], "restarts": restarts, "sets": sets_found,
        }  # fmt: skip
    content = {
        "identity": identity, "machine": machine(), "selections": selections,
        "validation": {name: validation[name] for name in (SAMPLED, EXACT)},
        "seconds": {
            "training": float(_notes(folder.file(piece.name, "safetensors"))["seconds"]),
            "measuring": validation["seconds"] + time.perf_counter() - start,
        },
    }  # fmt: skip
    folder.file(f"{piece.name}.{VALIDATION}", "json").unlink(missing_ok=True)  # first: none is ever left behind
    folder.write(piece.name, content)
    return content


def _validation(
    folder: Folder, piece: Piece, states: list[list[list[dict[str, Tensor]]]], late: Callable[[], bool]
) -> dict[str, Any] | None:
    """Log-likelihoods of the validation rows, by which restarts and settings are chosen: importance-sampled of the first
    restart of [setting][draw], exact of [setting][draw][restart]. They are kept setting by setting, because those of the
    paper's grids may take longer than a command has; None where it became late, after one setting at least."""
    name, identity = f"{piece.name}.{VALIDATION}", identity_of(folder.protocol, piece, piece.dataset)
    content = folder.read(name, identity) or {"identity": identity, SAMPLED: [], EXACT: [], "seconds": 0.0}
    done = len(content[EXACT])
    sets = folder.protocol.data(piece.dataset)
    rows = [data.validation.to(folder.device) for data in sets]
    for s, method in enumerate(piece.methods(sets[0], folder.device)):
        if s < done:
            continue
        if s > done and late():
            return None
        start = time.perf_counter()
        sampled, exact = [], []
        for x, restarts in zip(rows, states[s], strict=True):
            values = []
            for state in restarts:
                method.load_state(state)
                values.append(references.nearly_exact(method.model, x))
            exact.append(values)
            sampled.append(-math.inf)
            if restarts:
                method.load_state(restarts[0])
                estimate = method.log_likelihood(x, folder.protocol.samples, published.INFLATION, pareto=False)
                sampled[-1] = float(estimate.log_likelihood.double().mean())
        content[SAMPLED].append(sampled)
        content[EXACT].append(exact)
        content["seconds"] += time.perf_counter() - start
        folder.write(name, content)
    return content


def choose(sampled: list[list[float]], exact: list[list[list[float]]]) -> dict[str, tuple[int, list[int]]]:
    """{selection: (setting, the restart of each draw)} by the validation rows' log-likelihoods, see :func:`_validation`."""
    by_sampled = _best([math.fsum(row) for row in sampled])
    best = [[_best(restarts) for restarts in row] for row in exact]
    by_exact = _best([math.fsum(max(restarts, default=-math.inf) for restarts in row) for row in exact])
    return {OWN: (by_sampled, [0] * len(sampled[0])), LIKELIHOOD: (by_exact, best[by_exact])}


def _best(values: Sequence[float]) -> int:
    """Where the largest is; NaN is never."""
    return max(range(len(values)), key=lambda i: (not math.isnan(values[i]), values[i]), default=0)


# --- all of them ---


def shares(pieces: Sequence[Piece], processes: int) -> list[list[Piece]]:
    """The pieces of each process, the longest first, each to the process that has least to do."""
    parts: list[list[Piece]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for piece in sorted(pieces, key=lambda p: -p.cost):
        least = loads.index(min(loads))
        parts[least].append(piece)
        loads[least] += piece.cost
    return parts


def run(
    folder: Folder, pieces: Sequence[Piece], seconds: float | None = None, progress: bool = True,
    say: Callable[[str], None] = print,
) -> bool:  # fmt: skip
    """Do this process's share of the pieces that are not done; True once all its pieces are. After ``seconds`` none is begun,
    nor the measuring of another setting.

    Processes are those of torchrun (RANK and WORLD_SIZE); they share nothing but the folder.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = shares(pieces, processes)[rank]
    start = time.perf_counter()

    def late() -> bool:
        return seconds is not None and time.perf_counter() - start > seconds

    for i, piece in enumerate(own):
        if read_result(folder, piece) is not None:
            continue
        if late():
            return False
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # restarts that diverged are in the histories; Pareto k in the results
            if _result(folder, piece, progress, late) is None:
                return False
        say(f"{piece.name} ({i + 1} of {len(own)}): {time.perf_counter() - begun:.0f} s")
    return True
