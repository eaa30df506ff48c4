"""Grids: settings, data sets and restarts that train side by side, as one batch of replicas wherever their programs agree."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from libi_fast.data import Standardizer
from libi_fast.errors import InputError
from libi_fast.models.likelihoods import LIKELIHOODS
from libi_fast.models.model import LatentVariableModel
from libi_fast.models.networks import describe
from libi_fast.models.proposals import INFERENCE_MODELS
from libi_fast.ops.random import as_seed
from libi_fast.training import distributed
from libi_fast.training.batches import Batches, as_rows
from libi_fast.training.checkpoint import Checkpoint, digest
from libi_fast.training.method import Method
from libi_fast.training.options import FitOptions, Log
from libi_fast.training.replicas import Replicas, System, torch_seed
from libi_fast.training.run import Run


def fit_grid(methods: Sequence[Method], data: Sequence[Any], **options: Any) -> list[list[Method]]:
    """Fit every method to every data set, with the results of fitting each alone (to rounding), in far less time.

    Methods whose settings differ in numbers of the objective alone (LiBI's weight and tolerances, beta) train as one batch with
    all their restarts and data sets; other methods follow one another. So a comparison is a list::

        grid = lf.fit_grid([lf.LiBI(model, q, hz_weight=w) for w in (1, 10, 20)], data=[lf.data.Mobius(s) for s in range(5)],
                           epochs=5000, restarts=10)
        grid[1][0].log_likelihood(x)  # hz_weight 10, the first data set

    Args:
        methods: any mix; their modules are copied, not trained.
        data: data sets with ``.train`` and ``.validation`` (:mod:`libi_fast.data`), or (train, validation) pairs; all of one
            shape.
        options: as of :meth:`Method.fit`. A ``checkpoint`` keeps the whole grid (one file a batch); the bar shows the whole.

    Returns:
        fitted methods, [methods][data sets]. One none of whose restarts stayed finite is warned about and keeps the parameters
        that it came with. The last record of a ``history`` names the ``restarts`` that were left, their objectives, and which
        of them (``restart``, counted from 0) was taken.

    Raises:
        As :meth:`Method.fit`; InputError: no methods, no data, unequal shapes.
    """
    if not methods or not data:
        raise InputError(f"a grid needs methods and data, got {len(methods)} and {len(data)}")
    if hasattr(data, "validation") or isinstance(methods, Method):
        raise TypeError("methods and data must be lists")
    for m in methods:
        if not isinstance(m, Method):
            raise TypeError(f"methods must hold LiBI, VAE and so on, got {type(m).__name__}")
    sets = [(d.train, d.validation) if hasattr(d, "validation") else tuple(d) for d in data]
    if any(len(s) != 2 for s in sets):
        raise InputError("data must be data sets, or (train, validation) pairs")
    grid = [[copy.deepcopy(m) for _ in sets] for m in methods]
    batches: dict[str, list[list[Method]]] = {}
    for method, row in zip(methods, grid, strict=True):
        batches.setdefault(_program(method), []).append(row)
    train_batches(list(batches.values()), sets, FitOptions(**options))
    return grid


def train_batches(batches: list[list[list[Method]]], sets: list[tuple[Any, Any]], options: FitOptions) -> None:
    """Train batch after batch: rows of methods of one program, row[k] on sets[k]."""
    path, log = options.checkpoint, Log(options.log_dir)
    paths = [path if path is None or len(batches) == 1 else Path(f"{path}.{i}") for i in range(len(batches))]
    prepared = [_Batch(rows, sets, options, own) for rows, own in zip(batches, paths, strict=True)]  # every mistake is found
    label = batches[0][0][0].label if len(batches) == 1 else f"{len(batches)} batches"
    with tqdm(total=options.epochs * len(batches), desc=label, unit="epoch", disable=not options.progress) as bar:
        for i, batch in enumerate(prepared):
            log.batch = f"batch {i}/" if len(batches) > 1 else ""
            try:
                batch.train(bar, log)
            except FloatingPointError as error:
                if len(batches) == 1:
                    raise
                warnings.warn(f"{batch.rows[0][0].label}: {error}; the grid's other batches go on", stacklevel=2)
                continue
            if len(batches) > 1:  # what has ended is not trained again when a later batch is resumed
                batch.keeper.write(batch.run.state())
    for batch in prepared:
        batch.keeper.delete()
    log.close()


def _program(method: Method) -> str:
    """What methods must have in common to train as one batch."""

    def account(source: Any) -> Any:
        """Equal where two modules are the same function of the same trained tensors; of a user's own: the object itself."""
        if isinstance(source, nn.Module) and not all(p.requires_grad for p in source.parameters()):
            return [(name, p.requires_grad) for name, p in source.named_parameters()], id(source)
        if type(source) is LatentVariableModel:
            return account(source.decoder), account(source.likelihood), source.latent_dim, source.dtype
        if type(source) in INFERENCE_MODELS.values():
            return source.config(), account(source.network)
        if type(source) in LIKELIHOODS:
            return type(source), source.config()
        described = describe(source) if isinstance(source, nn.Module) else None
        return id(source) if described is None else described

    fixed = {k: v for k, v in method.settings.items() if k not in method.weights}
    return repr((type(method), [account(source) for source in method._sources], fixed))


class _Batch:
    """Methods of one program, rows[i][k] for sets[k], and their data as they see them."""

    run: Run

    def __init__(self, rows: list[list[Method]], sets: list[tuple[Any, Any]], options: FitOptions, path: Any):
        self.rows, self.options, self.key = rows, options, as_seed(options.seed)
        method = rows[0][0]
        if options.autocast is not None and method.model.dtype != torch.float32:
            raise InputError(f"autocast is for float32 models, and this one is {method.model.dtype}")
        method._check_epochs(options.epochs)
        self.batches, self.held_out, self.standardizers = _prepared(method, sets, options, int(self.key))
        every = self.batches.rows.flatten(0, -2)
        method.model.check(every)
        method.model.likelihood.check(self.held_out.flatten(0, -2))
        method._check_inference(every[:2])
        method._check_batches(self.batches)
        identity = {
            "method": json.dumps([row[0].config() for row in rows], sort_keys=True, default=str),
            "torch": str(torch.__version__), "the data": digest(self.batches.rows, self.held_out), **options.of_the_result(),
        }  # fmt: skip
        self.keeper = Checkpoint(path, options.checkpoint_seconds, identity, writes=distributed.first())
        self.keeper.check(options.resume)

    def train(self, bar: tqdm, log: Log) -> None:
        """The modules of each method end up with its best restart's parameters."""
        options, method = self.options, self.rows[0][0]
        replicas = _replicas(self.rows, options, int(self.key))
        replicas.template.autocast = None if options.autocast is None else getattr(torch, options.autocast)
        cells, codes = len(self.rows) * len(self.rows[0]), method.codes_a_row(self.batches.rows.shape[-2])
        # Dropout and the like draw from torch's generator, which the seed governs within training.
        with torch_seed(int(self.key)):
            self.run = Run(
                replicas, cells, self.batches, self.held_out, self.key, options, self.keeper, bar, log, codes
            )  # fmt: skip
            self.run.go(method._stages(self.run, options.epochs), options.resume)
        self._select()

    def _select(self) -> None:
        run, cells = self.run, [method for row in self.rows for method in row]
        scores = torch.where(torch.isfinite(run.scores), run.scores, math.inf).view(len(cells), -1)
        for c, cell in enumerate(cells):
            winner = int(scores[c].argmin())
            record = {
                "phase": "selection", "objective": run.scores.view(len(cells), -1)[c].tolist(), "restart": winner,
                "restarts": (run.replicas.own["ids"].view(len(cells), -1)[c] // run.ids_a_restart).tolist(),
            }  # fmt: skip
            cell.history = [*run.histories[c], record]
            if not math.isfinite(float(scores[c, winner])):
                message = f"{cell.label}: no restart ended with a finite validation objective"
                if len(cells) == 1:
                    raise FloatingPointError(message)
                warnings.warn(f"{message} (cell {c})", stacklevel=2)
                continue
            if self.options.keep_restarts:
                cell.restart_states = [self._state_of(cell, c * scores.shape[1] + r) for r in range(scores.shape[1])]
            run.replicas.load_into(cell.system, run.best, c * scores.shape[1] + winner)
            cell.system.encoder = None  # h is the mean of q from here on, as in every repeat
            cell.standardizer = self.standardizers[c % len(self.standardizers)]
            cell.columns, cell.training = self.options.columns, self.options.of_the_result()

    def _state_of(self, cell: Method, replica: int) -> dict[str, Tensor]:
        self.run.replicas.load_into(cell.system, self.run.best, replica)
        return {name: value.clone() for name, value in cell.state().items()}


def _replicas(rows: list[list[Method]], options: FitOptions, seed: int) -> Replicas:
    """The replicas of all cells, their random numbers those of each cell alone."""
    systems, sizes = [], []
    for row in rows:
        own = [row[0].system] if options.warm_start else row[0]._systems(options.restarts, seed)
        for cell in row:
            systems += [cell.system] if options.warm_start else own
            sizes.append(len(own))
    systems[0] = System(systems[0].model, systems[0].inference, systems[0].encoder)  # the template, which training changes
    replicas = Replicas(systems)
    device, dtype = replicas.own["ids"].device, replicas.dtype
    replicas.own["ids"] = torch.arange(sizes[0], device=device).repeat(len(sizes))
    replicas.own["dataset"] = torch.arange(len(rows[0]), device=device).repeat_interleave(sizes[0]).repeat(len(rows))
    if len(rows) > 1:
        for name in rows[0][0].weights:
            values = torch.tensor([row[0].settings[name] for row in rows], dtype=dtype, device=device)
            replicas.own[name] = values.repeat_interleave(sizes[0] * len(rows[0]))
    return replicas


def _prepared(
    method: Method, sets: list[tuple[Any, Any]], options: FitOptions, seed: int
) -> tuple[Batches, Tensor, list[Standardizer | None]]:
    """Batches and held-out rows as the model sees them, [N, D] or [K, N, D], and each data set's standardizer."""
    like = torch.empty(0, dtype=method.model.dtype, device=method.model.device)
    # Columns are standardised before they lose digits to the model's dtype.
    as_given = like.double() if options.standardize else like
    every, held_out, standardizers = [], [], list[Standardizer | None]()
    for train, validation in sets:
        batches = Batches(train, options.batch_size, seed & (2**63 - 1), as_given)
        standardizer = Standardizer.fit(batches.rows, options.columns) if options.standardize else None

        def inward(x: Tensor, standardizer: Standardizer | None = standardizer) -> Tensor:
            return method._inward(x, standardizer)

        batches.apply(inward)
        rows = batches.rows if validation is None else inward(as_rows(validation, as_given, "validation"))
        if rows.shape[1] != batches.rows.shape[1]:
            raise InputError(f"validation has {rows.shape[1]} columns but train has {batches.rows.shape[1]}")
        every.append(batches)
        held_out.append(rows)
        standardizers.append(standardizer)
    shapes = [tuple(v.shape) for v in held_out]
    if len(set(shapes)) > 1:
        raise InputError(f"data sets that train as one batch must have equal shapes, got validation rows of {shapes}")
    return Batches.stacked(every), held_out[0] if len(held_out) == 1 else torch.stack(held_out), standardizers
