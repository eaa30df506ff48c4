"""LiBI's constraints on step 1, as penalties that cannot overflow."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.ops.henze_zirkler import whiten
from libi_fast.ops.random import Stream, philox_normal, philox_uniform
from libi_fast.training import distributed
from libi_fast.training.distributed import Rows
from libi_fast.training.replicas import Replicas


class Step1:
    """What a constraint sees of an epoch of step 1: R models side by side, and their codes.

    Attributes:
        x: the batch's rows [n, D], or [R, n, D] where models have data sets of their own.
        z: their codes [R, n, L]. Over several processes both are gathered: every process sees the whole batch.
        seed, step: of ``draws``.
    """

    def __init__(self, replicas: Replicas, rows: Rows, z: Tensor, seed: Tensor, step: int):
        self.replicas, self.rows, self.seed, self.step = replicas, rows, seed, step
        self.z = rows.gather(z)

    @property
    def x(self) -> Tensor:
        return distributed.gather_rows(self.rows.values) if self.rows.spread else self.rows.values

    def decode(self, z: Tensor) -> Tensor:
        """The decoders' outputs [R, n, D] for codes [R, n, L]."""
        return self.replicas("decode", z)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) [R, n], x as ``self.x``, z [R, n, L]."""
        return self.replicas.log_prob(x, z)

    def draws(self, rows: int, columns: int, kind: str = "normal", use: int = 0) -> Tensor:
        """Random numbers [R, rows, columns], 'normal' or 'uniform'; anew in every step, and another set for every ``use``."""
        draw = philox_normal if kind == "normal" else philox_uniform
        return draw(
            self.seed, rows, columns, replicas=self.replicas.own["ids"], repetition=self.step,
            stream=Stream.CONSTRAINTS + 16 * use, dtype=self.replicas.dtype,
        )  # fmt: skip


class Constraint:
    """A condition on step 1's model or codes. It enters the objective as exp(violation / tolerance) (paper, Eq 43).

    Subclass it and define ``violation``::

        class Small(lf.Constraint):
            name, tolerance = "size", 0.1

            def violation(self, step):  # codes within 3 of the origin
                return (step.z.norm(dim=-1).amax(-1) - 3).clamp_min(0)

    Attributes:
        name: of its term in the history. tolerance: in the violation's units.
    """

    name = "constraint"
    tolerance = 1.0

    def violation(self, step: Step1) -> Tensor:
        """[R], at most 0 where the constraint holds; differentiable, and the same in every process."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """An account for run folders, and for a resumed run to know a changed constraint by."""
        return {"custom": type(self).__name__, "name": self.name, "tolerance": self.tolerance, "attributes": repr(vars(self))}


@dataclass(frozen=True)
class MutualInformation(Constraint):
    """I(X; Z) of the model >= ``at_least`` nats, against codes that carry nothing.

    I is estimated in every step by simulation (see :func:`libi_fast.mutual_information`), with a bias upwards of about
    1 / (2 effective sample size); simulated codes are matched to mean 0 and covariance I, and noise with them where there are
    enough points, which leaves no sampling error for linear models. The penalty's slope jumps from 0 to 1 / tolerance where I
    falls below the bound, so a bound above the optimum is met, not just leant against.

    Args:
        at_least: nats. tolerance: nats. num_points: simulated pairs a step. num_samples: importance samples of each.

    Raises:
        InputError: a bound or tolerance that is not positive, fewer than 2 points or 1 sample.
    """

    at_least: float
    tolerance: float = 0.1
    num_points: int = 256
    num_samples: int = 8

    name = "mutual_information"

    def __post_init__(self) -> None:
        for label in ("at_least", "tolerance"):
            value = getattr(self, label)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{label} must be positive and finite, got {value}")
        if self.num_points < 2 or self.num_samples < 1:
            raise InputError(f"at least 2 points and 1 sample are needed, got {self.num_points} and {self.num_samples}")

    def violation(self, step: Step1) -> Tensor:
        model = step.replicas.template.model
        latent_dim, columns = model.latent_dim, step.rows.values.shape[-1]
        normal = model.likelihood.reparameterized
        z = step.draws(self.num_points, latent_dim)
        noise = step.draws(self.num_points, columns, "normal" if normal else "uniform", use=1)
        inner = step.draws(self.num_points, self.num_samples * latent_dim, use=2)
        if normal and self.num_points >= 4 * (latent_dim + columns):
            z, noise = whiten(torch.cat((z, noise), -1))[0].split([latent_dim, columns], -1)
        elif self.num_points >= 4 * latent_dim:
            z = whiten(z)[0]
        ratios, _ = step.replicas("log_ratios", z, noise, inner.unflatten(-1, (self.num_samples, latent_dim)))
        return (self.at_least - ratios.mean(-1)).clamp_min(0)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)} if type(self) is MutualInformation else Constraint.config(self)


def constraint_from_config(config: dict[str, Any]) -> Constraint | None:
    """The inverse of ``config()``; None for a constraint of a user's own."""
    wanted = {f.name for f in fields(MutualInformation)}
    if config.get("name") != MutualInformation.name or set(config) != {"name", *wanted}:
        return None
    return MutualInformation(**{name: config[name] for name in wanted})
