"""One call of ``fit``: a program of stages, what they share, and going on after a crash."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from libi_fast.errors import InputError
from libi_fast.models.model import evaluation_mode
from libi_fast.ops.random import Stream, philox_normal
from libi_fast.training import distributed
from libi_fast.training.batches import Batches
from libi_fast.training.checkpoint import Checkpoint
from libi_fast.training.distributed import Rows
from libi_fast.training.replicas import Replicas, chosen
from libi_fast.training.schedule import Schedule

REPORTS = 50  # history records a phase
KEPT = ("position", "step", "history", "ids", "alive", "objective", "judged", "best", "scores")  # of a Run in a checkpoint
VALIDATION_SAMPLES = 16
VALIDATION_DRAWS = 2**32 - 1  # the repetition whose draws every look at the held-out rows takes

Terms = dict[str, Tensor]
"""Named terms of an objective, each [R]."""


Loss = Callable[[Rows, int], Terms]
"""(rows, step) -> this process's share of the terms"""


class Phase(NamedTuple):
    """Minimise the sum of ``loss(rows, step)`` over the parameters whose names begin with one of ``train``, all others held,
    for at most ``epochs`` epochs; ``validate`` gives the terms on held-out rows; ``rate`` multiplies the learning rate."""

    name: str
    epochs: int
    train: tuple[str, ...]
    loss: Loss
    validate: Callable[[], Terms] | None = None
    decay: bool = True
    rate: float = 1.0


Stage = Phase | Callable[["Run"], None]


def total(terms: Terms) -> Tensor:
    return torch.stack(list(terms.values())).sum(0)


class Run:
    """Replicas, data, random numbers, and the state that a checkpoint keeps.

    ``go`` works through the stages. A stage that is not a Phase must change nothing but this object and its replicas.

    Attributes:
        objective: [R], the sum of the held-out terms as the last phase ended (the training objective where it has none).
        judged: [R], the objective by which the present parameters are judged (see ``judge``).
        best, scores: the best parameters of every replica so far and what they were judged by.
        alive: [R], False where the objective became NaN or infinite. fraction: of the present phase's epochs.
    """

    def __init__(
        self, replicas: Replicas, batches: Batches, validation: Tensor, seed: Tensor, ids: Tensor, options: dict[str, Any],
        checkpoint: Checkpoint, bar: tqdm,
    ):  # fmt: skip
        self.replicas, self.batches, self.validation, self.seed = replicas, batches, Rows.whole(validation), seed
        self.options, self.checkpoint, self.bar = options, checkpoint, bar
        self.restarts: int = options["restarts"]
        self.history: list[dict[str, Any]] = []
        self.position = self.step = 0
        self.fraction = 0.0
        self.ids = ids
        self.alive = torch.ones(replicas.count, dtype=torch.bool)
        self.objective = torch.full((replicas.count,), math.inf, dtype=replicas.dtype)
        self.best: dict[str, Tensor] = {}
        self.scores = self.judged = self.objective
        self._inside: dict[str, Any] | None = None  # state of the phase that a checkpoint was taken in

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
                self.checkpoint.write(self._state(None))

    def _train(self, phase: Phase) -> None:
        o, replicas = self.options, self.replicas
        before = {k: v.requires_grad for k, v in replicas.parameters.items()}
        for name, value in replicas.parameters.items():
            value.requires_grad_(before[name] and name.startswith(phase.train))
        parameters = replicas.group("")
        try:
            if phase.epochs >= 1 and parameters:
                schedule = Schedule(phase.epochs, phase.rate * o["learning_rate"], o["tolerance"], o["patience"], phase.decay)
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
            return total(phase.validate())

    # --- what stages use ---

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
        self.ids, self.alive, self.objective = self.ids[index], self.alive[index.cpu()], self.objective[index]

    def keep_best(self, groups: int, count: int) -> None:
        """Of each of ``groups`` equal groups of replicas keep the ``count`` with the lowest objectives, in their order."""
        objective = torch.where(torch.isfinite(self.objective), self.objective, math.inf).view(groups, -1)
        best = objective.sort(dim=1, stable=True).indices[:, :count].sort(dim=1).values
        self.keep((best + objective.shape[1] * torch.arange(groups, device=best.device)[:, None]).flatten())

    def noise(self, rows: Rows, samples: int, repetition: int) -> Callable[[], Tensor]:
        """Draws standard normal [R, n, samples, L] for one step; independent between steps and replicas."""

        def draw() -> Tensor:
            latent_dim = self.replicas.template.model.latent_dim
            draws = philox_normal(
                self.seed, rows.values.shape[-2], samples * latent_dim, replicas=self.ids, first_row=rows.first,
                repetition=repetition, stream=Stream.TRAINING, dtype=self.replicas.dtype,
            )  # fmt: skip
            return draws.unflatten(-1, (samples, latent_dim))

        return draw

    def validation_noise(self) -> Callable[[], Tensor]:
        """The same draws at every look, so that looks differ by the parameters alone."""
        return self.noise(self.validation, VALIDATION_SAMPLES, VALIDATION_DRAWS)

    def note(self, **record: Any) -> None:
        self.history.append({k: v.tolist() if isinstance(v, Tensor) else v for k, v in record.items()})

    # --- checkpoints ---

    def save_if_due(self, progress: _Progress) -> None:
        """Write a checkpoint, if it is time."""
        if self.checkpoint.due():
            self.checkpoint.write(self._state(progress.state()))

    def _state(self, inside: dict[str, Any] | None) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state(self.seed.device) if self.seed.is_cuda else None
        return {
            **{name: getattr(self, name) for name in KEPT}, "parameters": self.replicas.snapshot(), "inside": inside,
            "bar": self.bar.n, "batches": self.batches.state(), "torch": torch.get_rng_state(), "cuda": cuda,
        }  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        self.replicas.load(state["parameters"])
        for name in KEPT:
            setattr(self, name, state[name])
        self._inside = state["inside"]
        self.batches.load(state["batches"])
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.seed.device)
        self.bar.update(state["bar"])


class _Progress:
    """A phase under way: Adam over all replicas at once. With early stopping each replica ends where its held-out objective,
    looked at some 50 times, was lowest."""

    def __init__(self, run: Run, phase: Phase, schedule: Schedule, parameters: list[Tensor]):
        self.run, self.phase, self.schedule, self.parameters = run, phase, schedule, parameters
        self.optimiser = torch.optim.Adam(parameters, lr=schedule.rate, fused=all(p.is_floating_point() for p in parameters))
        self.every = max(1, phase.epochs // REPORTS)
        self.epoch = 0
        self.stops_early = run.options["early_stopping"] and phase.validate is not None
        self.best = run.replicas.snapshot() if self.stops_early else {}
        self.scores = torch.full_like(run.objective, math.inf)

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state(),
            "best": self.best, "scores": self.scores,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.epoch, self.best, self.scores = state["epoch"], state["best"], state["scores"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load(state["schedule"])

    def go(self) -> None:
        run = self.run
        while self.epoch < self.schedule.epochs:
            run.fraction = self.epoch / self.phase.epochs
            means = self._one_epoch()
            objective = total(means)
            self.schedule.record(self.epoch, objective)
            self._judge(objective, means)
            last = self.epoch + 1 >= self.schedule.epochs
            if self.epoch % self.every == 0 or last:
                self._report(means)
                lowest = float(objective[torch.isfinite(objective)].min())
                run.bar.set_postfix_str(f"{self.phase.name} {lowest:.4g}", refresh=False)
            self.epoch += 1
            run.bar.update(1)
            run.save_if_due(self)
        run.bar.update(self.phase.epochs - self.epoch)  # converged early: the bar jumps
        if self.stops_early:
            run.replicas.restore(self.best)
        if self.phase.validate is None:
            run.objective = objective.detach()

    def _one_epoch(self) -> Terms:
        """The terms' means over the epoch's batches."""
        run, count = self.run, 0
        sums: Terms = {}
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate_at(self.epoch)
        for rows in run.batches.epoch():
            terms = self.phase.loss(rows, run.step)
            self.optimiser.zero_grad(set_to_none=True)
            total(terms).sum().backward()
            distributed.sum_gradients(self.parameters)
            self.optimiser.step()
            run.step += 1
            count += 1
            for name, value in terms.items():
                sums[name] = value.detach() + sums.get(name, 0)
        if not count:
            raise InputError(f"no batch of at least {run.batches.least} rows in an epoch")
        return {k: distributed.total(v) / count for k, v in sums.items()}

    def _judge(self, objective: Tensor, means: Terms) -> None:
        """Name every replica that turned non-finite, and stop where none is left."""
        run = self.run
        finite = torch.isfinite(objective).cpu()
        fallen = (run.alive & ~finite).nonzero().flatten().tolist()
        run.alive = finite
        where = f"training became non-finite in {self.phase.name}, epoch {self.epoch}: "
        for r in fallen:
            terms = [k for k, v in means.items() if not math.isfinite(float(v[r]))] or ["their sum"]
            run.note(phase=self.phase.name, epoch=self.epoch, restart=int(run.ids[r]), non_finite=terms)
            where += f"{', '.join(terms)} of restart {int(run.ids[r])}; "
        if not bool(finite.any()):
            kept = run.checkpoint.path
            good = "" if kept is None or not kept.exists() else f"; the last good checkpoint is {kept}"
            raise FloatingPointError(f"{where}none of {len(finite)} is left{good}")
        if fallen:
            warnings.warn(f"{where}the others go on", stacklevel=2)

    def _report(self, means: Terms) -> None:
        run = self.run
        entry = {"phase": self.phase.name, "epoch": self.epoch, **means}
        if self.stops_early:
            value = run._held_out(self.phase)
            better = value < self.scores
            self.best = chosen(better, run.replicas.snapshot(), self.best)
            self.scores = torch.where(better, value, self.scores)
            entry["validation"] = value
        run.note(**entry)
