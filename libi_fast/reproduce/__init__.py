"""``libi-fast reproduce``: the paper's Table 1 and Figures 1 to 5, and what the library adds to them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import Any

from libi_fast.data.files import atomic_path
from libi_fast.errors import InputError

TABLE1, ABLATIONS, ALL = "table1", "ablations", "all"
FIGURES = {  # what each is of: the data set, and the methods that must be trained
    "figure1": ("LinearJTEx", ("VAE",)),
    "figure2": ("LinearJTEx", ("VAE",)),
    "figure3": ("LinearJTEx", ("LiBI", "ours")),
    "figure4": ("CubicJTEx", ("VAE",)),
    "figure5": ("CubicJTEx", ("LiBI", "ours")),
}
WAIT = timedelta(days=1)  # for the other processes


def run(
    what: str = ALL, protocol: str = "quick", out: str | PathLike[str] = "reproduce-run", seconds: float | None = None,
    device: str = "cpu", progress: bool = True, first_seed: int | None = None, methods: Sequence[str] | None = None,
    datasets: Sequence[str] | None = None,
) -> Path | None:  # fmt: skip
    """Train and measure what is wanting, then print Table 1, or write a figure, or write everything into one HTML report.

    What is done lies in ``out``/``protocol`` and is not done again: the same call goes on after an interruption. Under torchrun
    every process takes pieces of its own, and the first one writes.

    Args:
        what: 'table1', 'figure1' to 'figure5', 'ablations' (of LiBI, as paired differences), or 'all'.
        protocol: 'quick', 'paper' or 'smoke'.
        out: the folder. seconds: begin no piece after that many, nor a look at another setting. device: to train on.
        progress: say what is done.
        first_seed: of the data sets, which are of it and the seeds that follow; None for the protocol's own.
        methods: rows of 'table1' that are wanted, such as 'VAE', 'LiBI' and 'ours'; None for all.
        datasets: of 'table1' and 'ablations', such as 'LinearJTEx'; None for all.

    Returns:
        The file that was written: table1.json, figureN.png, ablations.json or report.html; None where pieces are left to do.

    Raises:
        InputError: an unknown name, a seed below 0, a device that is not there, files in ``out`` of other settings or damaged;
        no matplotlib.
    """
    import torch

    from libi_fast import console
    from libi_fast.reproduce import pieces
    from libi_fast.reproduce import protocol as protocols

    console.require_tables()
    if what not in (known := (TABLE1, *FIGURES, ABLATIONS, ALL)):
        raise InputError(f"unknown result {what!r}; known: {', '.join(known)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} is not there: {str(error).splitlines()[0]}") from error
    chosen = protocols.find(protocol, first_seed)
    if methods is not None and (what != TABLE1 or not methods or not set(methods) <= set(protocols.METHODS)):
        raise InputError(f"methods are of table1, a list from {', '.join(protocols.METHODS)}; got {methods} of {what}")
    if datasets is not None:
        if what not in (TABLE1, ABLATIONS) or not datasets or not set(datasets) <= set(chosen.datasets):
            of = ", ".join(chosen.datasets)
            raise InputError(f"datasets are of table1 and ablations, a list from {of}; got {datasets} of {what}")
        chosen = dataclasses.replace(chosen, datasets=tuple(datasets))
    folder = pieces.Folder(out, chosen, device)
    if what in FIGURES:
        dataset, drawn = FIGURES[what]
        wanted = [chosen.piece(dataset, method) for method in drawn]
    elif what == ABLATIONS:
        wanted = [p for d in chosen.datasets for p in (chosen.piece(d, "LiBI"), *chosen.ablations(d))]
    else:
        wanted = [piece for piece in chosen.pieces() if methods is None or piece.method in methods]

    def say(text: str) -> None:
        if progress:
            print(text, flush=True)

    threads = torch.get_num_threads()
    try:
        if device == "cpu":
            torch.set_num_threads(1)  # small tensors wait for more; processes share the cores
        done = pieces.run(folder, wanted, seconds, progress, say)
        _wait_for_others()
        if os.environ.get("RANK", "0") != "0":
            return None
        left = [p.name for p in wanted if pieces.read_result(folder, p) is None]
        if left or not done:
            print(f"{len(wanted) - len(left)} of {len(wanted)} pieces are done; the same command goes on")
            return None
        return _write(what, folder, methods)
    finally:
        torch.set_num_threads(threads)


def _wait_for_others() -> None:
    """Until every process of torchrun has come here. There is no group before: training would share rows among its members."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=WAIT)
    try:
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _write(what: str, folder: Any, methods: Sequence[str] | None) -> Path:
    from libi_fast import console, figures
    from libi_fast.reproduce import pictures, pieces, report, tables

    if what in FIGURES:
        path = folder.path / f"{what}.png"
        figures.save(pictures.DRAWN[what](folder), path)
        print(path)
        return path
    if what == ABLATIONS:
        every: dict[str, Any] = {
            d: {p.method: pieces.result_of(folder, p) for p in folder.protocol.ablations(d)} for d in folder.protocol.datasets
        }
        for dataset, changed in every.items():
            base = pieces.result_of(folder, folder.protocol.piece(dataset, "LiBI"))
            table = tables.ablations(dataset, base, changed)
            console.print_table(table.title, table.header, table.rows, table.caption)
        return _written(folder.path / f"{ABLATIONS}.json", report.summary(folder, every))
    results = report.collect(folder, methods)
    if what == TABLE1:
        for dataset in results:
            for table in (tables.table1(dataset, results[dataset]), tables.codes(dataset, results[dataset])):
                console.print_table(table.title, table.header, table.rows, table.caption)
    path = _written(folder.path / f"{TABLE1}.json", report.summary(folder, results))
    if what == ALL:
        path = report.write(folder, results)
        print(path)
    return path


def _written(path: Path, content: Any) -> Path:
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=1) + "\n")
    print(path)
    return path
