"""One call of ``fit``: a program of stages, what they share, and going on after a crash."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from libi_fast.errors import InputError
from libi_fast.models.model import evaluation_mode
from libi_fast.ops import training as op
from libi_fast.ops.random import Stream, philox_normal
from libi_fast.training import distributed
from libi_fast.training.batches import Batches
from libi_fast.training.checkpoint import Checkpoint
from libi_fast.training.distributed import Rows
from libi_fast.training.fused import MOST_STEPS, Objective, adam_of, problem_of
from libi_fast.training.options import FitOptions, Log
from libi_fast.training.replicas import Replicas, chosen
from libi_fast.training.schedule import Schedule

SMALLEST_BLOCK = 16  # replicas: the numbers in the widest vector register
PROGRESS = ("epoch", "steps", "usual", "best", "scores", "width", "places", "rungs")  # the same of a phase under way
REPORTS = 50  # history records a phase
KEPT = ("position", "step", "epochs", "histories", "alive", "objective", "judged", "best", "scores")  # of a Run in a checkpoint
VALIDATION_SAMPLES = 16
VALIDATION_DRAWS = 2**32 - 1  # the repetition whose draws every look at the held-out rows takes

Terms = dict[str, Tensor]
"""Named terms of an objective, each [R]."""


Loss = Callable[[Rows, int], Terms]
"""(rows, step) -> this process's share of the terms"""


def block_size(replicas: Replicas, batches: Batches, held_out: int, memory: int, codes: float) -> int:
    """How many replicas may be worked on at a time so that activations and gradients fit ``memory`` bytes, with so many codes
    of each row at once."""
    widths = {prefix: sum(math.prod(p.shape[1:2]) for p in replicas.group(prefix)) for prefix in ("model.", "")}
    rows = batches.batch_size or batches.rows.shape[-2]
    columns = batches.rows.shape[-1]
    forward_and_back = rows * 3 * (widths[""] + columns + (codes - 1) * (widths["model."] + columns))
    numbers = max(forward_and_back, held_out * max(codes, VALIDATION_SAMPLES) * (widths["model."] + columns))
    size = numbers * torch.finfo(replicas.dtype).bits // 8
    return max(1, int(memory / size) // SMALLEST_BLOCK) * SMALLEST_BLOCK


class Phase(NamedTuple):
    """Minimise the sum of ``loss(rows, step)`` over the parameters whose names begin with one of ``train``, all others held,
    for at most ``epochs`` epochs; ``validate`` gives the terms on held-out rows; ``rate`` multiplies the learning rate;
    ``halving``: restarts may be dropped on the way (``survivors``); ``fixed``: all epochs are gone through, whatever
    ``tolerance`` is; ``objective``: what ``loss`` is, where a compiled kernel may know it."""

    name: str
    epochs: int
    train: tuple[str, ...]
    loss: Loss
    validate: Callable[[], Terms] | None = None
    decay: bool = True
    rate: float = 1.0
    halving: bool = False
    fixed: bool = False
    objective: Objective | None = None


Stage = Phase | Callable[["Run"], None]


def total(terms: Terms) -> Tensor:
    return torch.stack(list(terms.values())).sum(0)


def rungs(restarts: int, survivors: int, epochs: int) -> dict[int, int]:
    """Successive halving (Jamieson & Talwalkar 2016): after which epochs how many restarts go on, the last time after a quarter
    of a phase, and each time before after half as many epochs."""
    counts = []
    while restarts > survivors:
        restarts = max(survivors, -(-restarts // 2))
        counts.append(restarts)
    return {max(1, epochs >> (1 + len(counts) - i)): count for i, count in enumerate(counts)}


class Run:
    """Replicas, data, random numbers, and the state that a checkpoint keeps.

    ``go`` works through the stages. A stage that is not a Phase must change nothing but this object and its replicas.

    Replicas are those of cells (a setting on a data set) one after another, as many restarts in each.

    Attributes:
        objective: [R], the sum of the held-out terms as the last phase ended (the training objective where it has none).
        judged: [R], the objective by which the present parameters are judged (see ``judge``).
        best, scores: the best parameters of every replica so far and what they were judged by.
        alive: [R], False where the objective became NaN or infinite. fraction: of the present phase's epochs.
        histories: the records of each cell.
    """

    def __init__(
        self, replicas: Replicas, cells: int, batches: Batches, validation: Tensor, seed: Tensor, options: FitOptions,
        checkpoint: Checkpoint, bar: tqdm, log: Log, codes: float = 1,
    ):  # fmt: skip
        self.replicas, self.cells, self.batches = replicas, cells, batches
        self.seed = seed.to(replicas.own["ids"].device)  # where random numbers are drawn
        self._validation = Rows.whole(validation)
        self.options, self.checkpoint, self.bar, self.log = options, checkpoint, bar, log
        self.histories: list[list[dict[str, Any]]] = [[] for _ in range(cells)]
        self.position = self.step = self.epochs = 0
        self.fraction = 0.0
        self.alive = torch.ones(replicas.count, dtype=torch.bool)
        self.objective = torch.full((replicas.count,), math.inf, dtype=replicas.dtype, device=replicas.own["ids"].device)
        self.best: dict[str, Tensor] = {}
        self.scores = self.judged = self.objective
        self.ids_a_restart = max(1, self.restarts // options.restarts)  # where a restart begins with candidates
        self._inside: dict[str, Any] | None = None  # state of the phase that a checkpoint was taken in
        self.block = block_size(replicas, batches, validation.shape[-2], options.memory, codes)

    # --- stages ---

    def go(self, stages: Sequence[Stage], resume: bool) -> None:
        state = self.checkpoint.read() if resume else None
        if state is not None:
            self._load(state)
        while self.position < len(stages):
            stage = stages[self.position]
            if isinstance(stage, Phase):
                self._train(stage)
            else:
                stage(self)
            self.position += 1
            if self.checkpoint.due():
                self.checkpoint.write(self.state())

    def _train(self, phase: Phase) -> None:
        o, replicas = self.options, self.replicas
        before = {k: v.requires_grad for k, v in replicas.parameters.items()}
        for name, value in replicas.parameters.items():
            value.requires_grad_(before[name] and name.startswith(phase.train))
        parameters = replicas.group("")
        try:
            if phase.epochs >= 1 and parameters:
                tolerance = None if phase.fixed else o.tolerance
                schedule = Schedule(phase.epochs, phase.rate * o.learning_rate, tolerance, o.patience, phase.decay)
                progress = _Progress(self, phase, schedule, parameters)
                if self._inside is not None:
                    progress.load(self._inside)
                    self._inside = None
                progress.go()
                self.objective = progress.scores if progress.stops_early else self._held_out(phase)
            elif phase.validate is not None:
                self.objective = self._held_out(phase)
        finally:
            for name, value in replicas.parameters.items():
                value.requires_grad_(before[name])

    @torch.no_grad()
    def _held_out(self, phase: Phase) -> Tensor:
        if phase.validate is None:
            return self.objective
        with evaluation_mode(self.replicas.template):
            return total(self.in_blocks(phase.validate))

    # --- what stages use ---

    @property
    def validation(self) -> Rows:
        """The held-out rows of the present replicas."""
        return self.replicas.rows(self._validation)

    @property
    def train(self) -> Rows:
        """The training rows (a look at them, where they come in batches) of the present replicas."""
        return self.replicas.rows(Rows.whole(self.batches.rows))

    def in_blocks(self, terms: Callable[[], Terms], backward: bool = False) -> Terms:
        """``terms()`` of all replicas, as many of them at a time as memory was planned for; ``backward``: and the gradients
        of their sum."""
        count = self.replicas.count
        if count <= SMALLEST_BLOCK:
            found = terms()
            if backward:
                total(found).sum().backward()
            return {k: v.detach() for k, v in found.items()}
        size = min(self.block, -(-count // SMALLEST_BLOCK) * SMALLEST_BLOCK)
        parts = []
        for start in range(0, count, size):
            with self.replicas.block(start, size):
                found = {k: v[: count - start] for k, v in terms().items()}
                if backward:
                    total(found).sum().backward()
            parts.append(found)
        return {k: torch.cat([part[k].detach() for part in parts]) for k in parts[0]}

    def judge(self) -> None:
        """The parameters are judged by the last phase's objective."""
        self.judged = self.objective

    def consider(self) -> None:
        """Keep each replica's parameters where ``judged`` is the lowest so far."""
        if not self.best:
            self.best, self.scores = self.replicas.snapshot(), self.judged
            return
        better = self.judged < self.scores
        self.best = chosen(better, self.replicas.snapshot(), self.best)
        self.scores = torch.where(better, self.judged, self.scores)

    def keep(self, index: Tensor) -> None:
        """Go on with the replicas of ``index`` alone; they keep their random numbers."""
        self.replicas.select(index)
        self.alive, self.objective = self.alive[index.cpu()], self.objective[index]

    def best_of(self, objective: Tensor, group: int, count: int) -> Tensor:
        """Of every ``group`` replicas in turn the ``count`` with the lowest objectives, in their order."""
        lowest = torch.where(torch.isfinite(objective), objective, math.inf).view(-1, group)
        best = lowest.sort(dim=1, stable=True).indices[:, :count].sort(dim=1).values
        return (best + group * torch.arange(len(lowest), device=best.device)[:, None]).flatten()

    @property
    def restarts(self) -> int:
        """Replicas of a cell."""
        return self.replicas.count // self.cells

    def noise(self, rows: Rows, samples: int, repetition: int) -> Callable[[], Tensor]:
        """Draws standard normal [R, n, samples, L] for one step; independent between steps and replicas."""

        def draw() -> Tensor:
            latent_dim = self.replicas.template.model.latent_dim
            draws = philox_normal(
                self.seed, rows.values.shape[-2], samples * latent_dim, replicas=self.replicas.own["ids"], first_row=rows.first,
                repetition=repetition, stream=Stream.TRAINING, dtype=self.replicas.dtype,
            )  # fmt: skip
            return draws.unflatten(-1, (samples, latent_dim))

        return draw

    def validation_noise(self) -> Callable[[], Tensor]:
        """The same draws at every look, so that looks differ by the parameters alone."""
        return self.noise(self.validation, VALIDATION_SAMPLES, VALIDATION_DRAWS)

    def advance(self, epochs: int) -> None:
        self.epochs += epochs
        self.bar.update(epochs)

    def note(self, **record: Any) -> None:
        """A record in each cell's history; tensors [cells * n] are split among them."""
        for cell, history in enumerate(self.histories):
            history.append(
                {k: v.view(self.cells, -1)[cell].tolist() if isinstance(v, Tensor) else v for k, v in record.items()}
            )

    # --- checkpoints ---

    def save_if_due(self, progress: _Progress) -> None:
        """Write a checkpoint, if it is time."""
        if self.checkpoint.due():
            self.checkpoint.write(self.state(progress.state()))

    def state(self, inside: dict[str, Any] | None = None) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state(self.seed.device) if self.seed.is_cuda else None
        return {
            **{name: getattr(self, name) for name in KEPT}, "parameters": self.replicas.snapshot(), "own": self.replicas.own,
            "inside": inside, "batches": self.batches.state(), "torch": torch.get_rng_state(), "cuda": cuda,
        }  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        self.replicas.load(state["parameters"])
        self.replicas.own = state["own"]
        for name in KEPT:
            setattr(self, name, state[name])
        self._inside = state["inside"]
        self.batches.load(state["batches"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.seed.device)
        self.bar.update(self.epochs)


class _Progress:
    """A phase under way: Adam over all replicas at once. With early stopping each replica ends where its held-out objective,
    looked at some 50 times, was lowest."""

    def __init__(self, run: Run, phase: Phase, schedule: Schedule, parameters: list[Tensor]):
        self.run, self.phase, self.schedule = run, phase, schedule
        self._optimise(parameters)
        self.every = max(1, phase.epochs // REPORTS)
        self.epoch = self.steps = 0
        self.usual = torch.zeros_like(run.objective)  # norm of the gradient
        self._fused: tuple[int, op.Problem | None] | None = None  # for so many replicas
        self.stops_early = run.options.early_stopping and phase.validate is not None
        self.best = run.replicas.snapshot() if self.stops_early else {}
        self.scores = torch.full_like(run.objective, math.inf)
        self.width = run.replicas.count  # as the phase began, and where the present replicas stood then
        self.places = torch.arange(self.width, device=run.objective.device)
        survivors = run.options.survivors
        self.rungs = rungs(run.restarts, survivors, phase.epochs) if phase.halving and survivors else {}

    def _optimise(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.optimiser = torch.optim.Adam(
            parameters, lr=self.schedule.rate, fused=all(p.is_floating_point() for p in parameters)
        )

    def state(self) -> dict[str, Any]:
        return {
            "optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state(),
            **{name: getattr(self, name) for name in PROGRESS},
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load(state["schedule"])

    def go(self) -> None:
        run = self.run
        while self.epoch < self.schedule.epochs:
            run.fraction = self.epoch / self.phase.epochs
            problem = self._problem()
            if problem is None:
                self._end_epochs({k: v[None] for k, v in self._one_epoch().items()})
            else:
                self._end_epochs(self._several_epochs(problem))
            run.save_if_due(self)
        run.advance(self.phase.epochs - self.epoch)  # converged early: the bar jumps
        if self.stops_early:
            run.replicas.restore(self.best)

    def _end_epochs(self, told: Terms) -> None:
        """Terms [epochs, R] of epochs that have been gone through; none but the last is one after which something happens."""
        run = self.run
        objectives = total(told)
        finite = bool(torch.isfinite(objectives).all())
        for i, objective in enumerate(objectives):
            means = {k: v[i] for k, v in told.items()} if i + 1 == len(objectives) or not finite else {}
            self.schedule.record(self.epoch, objective)
            if not finite:
                self._judge(objective, means)
            last = self.epoch + 1 >= self.schedule.epochs
            if self.epoch % self.every == 0 or last:
                self._report(means)
                lowest = float(objective[torch.isfinite(objective)].min())
                run.bar.set_postfix_str(f"{self.phase.name} {lowest:.4g}", refresh=False)
            if self.phase.validate is None:
                run.objective = objective
            self.epoch += 1
            if self.epoch in self.rungs:
                self._halve(self.rungs[self.epoch])
            run.advance(1)

    def _problem(self) -> op.Problem | None:
        run = self.run
        if self.phase.objective is None:
            return None
        if self._fused is None or self._fused[0] != run.replicas.count:
            trained = [k for k, v in run.replicas.parameters.items() if v.requires_grad]
            made = problem_of(self.phase.objective, run.replicas, run.batches, trained, run.seed, run.step)
            self._fused = run.replicas.count, made
        return self._fused[1]

    def _several_epochs(self, problem: op.Problem) -> Terms:
        """Up to the next epoch after which something happens, by a kernel: the terms [epochs, R]."""
        run, first = self.run, self.epoch
        report = first if first % self.every == 0 else (first // self.every + 1) * self.every
        most = MOST_STEPS[problem.x.device.type] // max(1, run.replicas.count)
        ends = [self.schedule.epochs, report + 1, first + max(1, most)]
        ends += [rung for rung in self.rungs if rung > first]
        last = min([*ends, self.schedule.next_look(first)])
        assert self.phase.objective is not None
        epochs = range(first, last)
        problem = problem._replace(draws=problem.draws._replace(repetition=run.step))
        adam = adam_of(self.optimiser, problem.parameters, self.usual, self.steps)
        terms = op.train(
            problem, adam, [self.schedule.rate_at(e) for e in epochs],
            [self.phase.objective.rise(e / self.phase.epochs) for e in epochs],
        )  # fmt: skip
        for p in problem.parameters:
            self.optimiser.state[p]["step"] += len(epochs)
        self.steps += len(epochs)
        run.step += len(epochs)
        return dict(zip(problem.terms, terms.unbind(-1), strict=True))

    def _one_epoch(self) -> Terms:
        """The terms' means over the epoch's batches."""
        run, count = self.run, 0
        sums: Terms = {}
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate_at(self.epoch)
        for rows in run.batches.epoch():
            self.optimiser.zero_grad(set_to_none=True)
            terms = run.in_blocks(functools.partial(self._loss, rows), backward=True)
            distributed.sum_gradients(self.parameters)
            self._clip()
            self.optimiser.step()
            run.step += 1
            count += 1
            for name, value in terms.items():
                sums[name] = value + sums.get(name, 0)
        if not count:
            raise InputError(f"no batch of at least {run.batches.least} rows in an epoch")
        return {k: distributed.total(v) / count for k, v in sums.items()}

    def _clip(self) -> None:
        """Cut the gradients of replicas where their norm is out of all proportion."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:
            op.clipped(gradients, self.usual, self.steps)
            self.steps += 1

    def _loss(self, rows: Rows) -> Terms:
        return self.phase.loss(self.run.replicas.rows(rows), self.run.step)

    def _halve(self, count: int) -> None:
        """Go on with each cell's ``count`` restarts of the lowest held-out objectives, Adam's moments with them."""
        run = self.run
        index = run.best_of(run._held_out(self.phase), run.restarts, count)
        moments = [self.optimiser.state[p] for p in self.parameters]
        run.keep(index)
        self._optimise(run.replicas.group(""))
        for parameter, old in zip(self.parameters, moments, strict=True):
            self.optimiser.state[parameter] = {k: v[index] if v.dim() else v for k, v in old.items()}
        self.schedule.select(index)
        self.best = {k: v[index] for k, v in self.best.items()}
        self.usual, self.scores, self.places = self.usual[index], self.scores[index], self.places[index]

    def _judge(self, objective: Tensor, means: Terms) -> None:
        """Name every replica that turned non-finite, and stop where none is left."""
        run = self.run
        finite = torch.isfinite(objective).cpu()
        fallen = (run.alive & ~finite).nonzero().flatten().tolist()
        run.alive &= finite
        where = f"training became non-finite in {self.phase.name}, epoch {self.epoch}: "
        ids = run.replicas.own["ids"]
        for r in fallen:
            terms = [k for k, v in means.items() if not math.isfinite(float(v[r]))] or ["their sum"]
            cell, restart = r // run.restarts, int(ids[r]) // run.ids_a_restart
            record = {"phase": self.phase.name, "epoch": self.epoch, "restart": restart, "non_finite": terms}
            run.histories[cell].append(record)
            where += f"{', '.join(terms)} of restart {restart}{f' of cell {cell}' if run.cells > 1 else ''}; "
        if not bool(finite.any()):
            kept = run.checkpoint.path
            good = "" if kept is None or not kept.exists() else f"; the last good checkpoint is {kept}"
            raise FloatingPointError(f"{where}none of {len(finite)} is left{good}")
        if fallen:
            warnings.warn(f"{where}the others go on", stacklevel=2)

    def _report(self, means: Terms) -> None:
        run = self.run
        entry = dict(means)
        if self.stops_early:
            value = run._held_out(self.phase)
            better = value < self.scores
            self.best = chosen(better, run.replicas.snapshot(), self.best)
            self.scores = torch.where(better, value, self.scores)
            entry["validation"] = value
        # A restart keeps its place in the records of a phase; where it was dropped there is NaN.
        placed = {k: v.new_full((self.width,), math.nan).index_copy_(0, self.places, v) for k, v in entry.items()}
        run.note(phase=self.phase.name, epoch=self.epoch, **placed)
        run.log.write(self.phase.name, run.epochs, run.cells, means)
