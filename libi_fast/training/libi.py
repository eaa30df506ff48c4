"""LiBI: Likelihood Before Inference (Yacoby, Pan and Doshi-Velez 2020, Eqs 6-7 and 42-46)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.models.laplace import NODES
from libi_fast.ops import _library as lib
from libi_fast.ops.henze_zirkler import METHODS, henze_zirkler_statistic
from libi_fast.ops.training import moment_errors, safe_exp
from libi_fast.training import distributed
from libi_fast.training.batches import Batches
from libi_fast.training.constraints import Constraint, MutualInformation, Step1
from libi_fast.training.distributed import Rows
from libi_fast.training.fused import Objective
from libi_fast.training.inference import (
    A_STEP,
    PAIRS,
    SAMPLER,
    check_batches,
    check_mean_field,
    check_objective,
    forget,
    inference_stages,
    keep_frames,
    places_of,
)
from libi_fast.training.method import Method, elbo_at_start, fit_decoder
from libi_fast.training.objectives import importance_terms
from libi_fast.training.replicas import Replicas, System, chosen, make_system
from libi_fast.training.run import VALIDATION_DRAWS, VALIDATION_SAMPLES, Phase, Run, Stage, Terms
from libi_fast.training.start import copy_encoder, mirror_codes, start_std, use_one_component, whiten_codes

STEP1 = ("joint", "importance", "quadrature")
MEANS, SCALES, HELD_OUT_MEANS = "means", "scales", "held-out means"


class LiBI(Method):
    """Learn the generative model first, under constraints on its codes, then the inference model; repeat, keep the best.

    Step 1 minimises, over the decoder and the encoder z_n = h(x_n),
    ``-(1/N) sum log p(x_n | z_n) + hz_weight exp(HZ({z_n})) + exp(||Cov - I||_F^2 / covariance_tolerance)
    + exp(||mean||^2 / mean_tolerance)`` and exp(violation / tolerance) of further constraints. Step 2 minimises -ELBO over the
    inference network, the decoder fixed. Step 3 begins the next repeat with h = the mean of q.

    Args:
        model, inference: see :class:`Method`.
        encoder: a network of its own for h in the first step 1, of the inference network's architecture up to the last
            layer (L outputs); None uses the mean of q throughout, which is what the repeats do anyway.
        hz_weight, covariance_tolerance, mean_tolerance: the paper's eps_HZ, eps_Sigma, eps_mu.
        repeats: R. step1_share: of a repeat's epochs, those of step 1.
        step1: what step 1 maximises beside its constraints, and so what restarts are judged by:
            'joint', log p(x_n | z_n), as published;
            'importance', log (1/S) sum_s p(x_n, z_s) / q(z_s | x_n) over q as well, the constraints on a draw of q each row;
            'quadrature', log p(x_n) itself (latent_dim 1 or 2), while h follows the modes of p(z_n | x_n). It is integrated
            where p(z_n | x_n) has its mass, which is searched for as these epochs begin and then followed; around z_n in
            later repeats, under warm_start, of minibatches and of several processes. Its optimum's codes have the prior's law,
            so hz_weight and the tolerances play no part in it.
            The last two begin, in the first repeat, with 'joint'.
        likelihood_share: of the first step 1's epochs, those of 'importance' or 'quadrature', an epoch of which takes a hundred
            times as long. likelihood_rate: of those, their learning rate in units of fit's: at noise variances of 1e-5 Adam's
            first steps at the full rate undo what the joint part reached.
        decoder_precision: of a normal prior of mean 0 on the decoder's matrices (not its biases) in those epochs. Where these
            have more weights than the rows can tell, the likelihood's own optimum bends the decoder to suit the outermost rows,
            and rows beyond them pay for it.
        finalists: restarts that go on to those epochs, or with 'joint' to step 2: the best on held-out rows by what step 1
            maximises; None lets all go on.
        step2: what step 2 maximises: 'elbo', as published; 'importance', the importance-weighted bound; 'posterior',
            log q(z | x) at draws from p(z | x), of which q then covers all; 'elbo+posterior', half the epochs each.
        sampler: where those draws come from: 'simulated', z ~ p(z) and x ~ p(x | z), new in every step; 'sir' or 'hmc', draws
            of the training rows, taken once a step 2; 'simulated+sir', 'simulated+hmc' (see :func:`libi_fast.fit_inference`).
        simulated_std: standard deviation of the codes that 'simulated' draws (see :func:`libi_fast.fit_inference`).
        num_samples: S of 'importance'.
        inference_restarts: networks q that the first step 2 begins with, for every restart's theta: the one that step 1 leaves,
            and others drawn anew. The best by what step 2 maximises goes on: the codes of step 1 may be a start from which q
            never becomes good.
        constraints: :class:`Constraint` objects, such as ``lf.MutualInformation(at_least=2.0)``.
        hz_method, hz_beta: how the Henze-Zirkler statistic is taken (see ``lf.henze_zirkler``), and its kernel's width.
        whiten: start with an encoder whose codes have mean 0 and covariance I (its last layer is rescaled).
        warm_up: epochs of the first step 1 in which the decoder alone learns, on frozen codes.
        candidates: short runs each restart begins with; the one whose held-out objective is best after ``warm_up`` epochs of
            step 1 goes on. They come in pairs whose codes mirror each other: codes of covariance I fall into two classes, of
            either orientation, that no path of full-rank codes joins, and a decoder may be able to serve only one.
        initial_std: q's standard deviation as step 2 begins (the paper leaves it open); None takes each restart's best of a
            geometric grid, because 0.05 is far too wide where the noise variance is 1e-6.

    Raises:
        InputError: a weight or tolerance that is not positive, a setting that would be ignored, repeats below 1, fewer rows a
        batch than the statistics need.
    """

    name = "libi"
    weights = ("hz_weight", "covariance_tolerance", "mean_tolerance")

    def __init__(
        self, model: Any, inference: Any, encoder: Any = None, hz_weight: float = 1.0, covariance_tolerance: float = 0.2,
        mean_tolerance: float = 0.2, repeats: int = 6, step1_share: float = 2 / 3, whiten: bool = True, warm_up: int = 300,
        candidates: int = 4, initial_std: float | None = None, step1: str = "joint", likelihood_share: float = 0.5,
        likelihood_rate: float = 1.0, decoder_precision: float = 0.0, finalists: int | None = None, step2: str = "elbo",
        sampler: str = SAMPLER, simulated_std: float = 1.0, num_samples: int = 8, inference_restarts: int = 1,
        constraints: Sequence[Constraint] = (), hz_method: str = "exact", hz_beta: float | None = None,
    ):  # fmt: skip
        for label, value in {
            "hz_weight": hz_weight,
            "covariance_tolerance": covariance_tolerance,
            "mean_tolerance": mean_tolerance,
            "likelihood_rate": likelihood_rate,
        }.items():
            lib.check_positive(label, value)
        for label, optional in {"initial_std": initial_std, "hz_beta": hz_beta}.items():
            if optional is not None:
                lib.check_positive(label, optional)
        for label, value, least in (
            ("repeats", repeats, 1), ("warm_up", warm_up, 0), ("candidates", candidates, 1), ("num_samples", num_samples, 1),
            ("inference_restarts", inference_restarts, 1),
        ):  # fmt: skip
            lib.check_count(label, value, least)
        for label, choice, known in (("step1", step1, STEP1), ("hz_method", hz_method, METHODS)):
            if choice not in known:
                raise InputError(f"{label} must be one of {', '.join(map(repr, known))}, got {choice!r}")
        check_objective("step2", step2, sampler, simulated_std)
        for label, share in {"step1_share": step1_share, "likelihood_share": likelihood_share}.items():
            if not 0 < share < 1:
                raise InputError(f"{label} must lie between 0 and 1, got {share}")
        if not 0 <= decoder_precision < math.inf:
            raise InputError(f"decoder_precision must be 0 or positive, got {decoder_precision}")
        if decoder_precision and step1 == "joint":
            raise InputError("decoder_precision is of step1='importance' and 'quadrature'; step1='joint' would ignore it")
        if finalists is not None:
            lib.check_count("finalists", finalists, 1)
        if isinstance(constraints, Constraint):
            raise TypeError("constraints must be a list of lf.Constraint objects, got one of them")
        for constraint in constraints:
            if not isinstance(constraint, Constraint):
                raise TypeError(f"constraints must hold lf.Constraint objects, got {type(constraint).__name__}")
            if not constraint.tolerance > 0:
                raise InputError(f"{type(constraint).__name__}.tolerance must be positive, got {constraint.tolerance}")
        if step1 == "importance" and encoder is not None:
            raise InputError("step1='importance' learns q, whose mean is the encoder: leave encoder=None")
        super().__init__(
            model, inference, encoder, hz_weight=hz_weight, covariance_tolerance=covariance_tolerance,
            mean_tolerance=mean_tolerance, repeats=repeats, step1_share=step1_share, whiten=whiten, warm_up=warm_up,
            candidates=candidates, initial_std=initial_std, step1=step1, likelihood_share=likelihood_share,
            likelihood_rate=likelihood_rate, decoder_precision=decoder_precision, finalists=finalists, step2=step2,
            sampler=sampler, simulated_std=simulated_std, num_samples=num_samples, inference_restarts=inference_restarts,
            constraints=tuple(constraints), hz_method=hz_method, hz_beta=hz_beta,
        )  # fmt: skip
        for label, choice in (("step1", step1), ("step2", step2)):
            if choice == "importance":
                check_mean_field(self.system.inference, f"{label}='importance'")
        if step1 == "quadrature" and self.model.latent_dim > 2:
            raise InputError(f"step1='quadrature' is over 1 or 2 latent dimensions, but latent_dim is {self.model.latent_dim}")

    def _check_epochs(self, epochs: int) -> None:
        repeats = self.settings["repeats"]
        if epochs < 3 * repeats:
            raise InputError(f"{repeats} repeats of two steps need at least {3 * repeats} epochs, got {epochs}")

    def _check_batches(self, batches: Batches) -> None:
        # Below twice the codes' size the whitened points are all but determined by the whitening.
        least = 2 * self.model.latent_dim + 2
        batches.require(least, f"LiBI's statistics of {self.model.latent_dim}-dimensional codes")
        check_batches(batches, self.settings["step2"], self.settings["sampler"])
        if self.settings["decoder_precision"] and batches.loader is not None:
            raise InputError("decoder_precision needs to know how many rows there are: pass train as a tensor or array")

    def codes_a_row(self, rows: int) -> float:
        s = self.settings
        nodes = NODES**self.model.latent_dim if s["step1"] == "quadrature" else 1
        simulated = sum(c.num_points * (1 + c.num_samples) for c in s["constraints"] if isinstance(c, MutualInformation))
        posterior = A_STEP + PAIRS / rows if "posterior" in s["step2"] else 0
        return nodes + simulated / rows + posterior

    def _systems(self, restarts: int, seed: int) -> list[System]:
        if not self._candidates_train:
            return super()._systems(restarts, seed)
        count = self.settings["candidates"]  # one seed a mirrored pair
        pairs = super()._systems(restarts * -(-count // 2), seed)
        return [pairs[r * -(-count // 2) + c // 2] for r in range(restarts) for c in range(count)]

    @property
    def _candidates_train(self) -> bool:
        return self.settings["warm_up"] > 0 and self.settings["candidates"] > 1

    # --- step 1 ---

    def step1_terms(self, replicas: Replicas, rows: Rows, step: int = 0) -> Terms:
        """The terms of step 1's objective as published on rows of x, each [R]: this process's shares."""
        return self._published_terms(replicas, rows, replicas.codes(rows.values), step)

    def _published_terms(self, replicas: Replicas, rows: Rows, z: Tensor, step: int) -> Terms:
        return {"reconstruction": -rows.mean(replicas.log_prob(rows.values, z)), **self._code_terms(replicas, rows, z, step)}

    def _code_terms(self, replicas: Replicas, rows: Rows, z: Tensor, step: int) -> Terms:
        """The penalties that keep codes z [R, n, L] of these rows to the prior."""
        hz_weight, covariance_tolerance, mean_tolerance = (self.weight(name, replicas) for name in self.weights)
        every = rows.gather(z)
        off_mean, off_covariance = moment_errors(every)
        # Frequencies and directions are new in every step: codes would fit a fixed few of them.
        form = {"method": self.settings["hz_method"], "beta": self.settings["hz_beta"], "seed": step}
        if rows.spread and form["method"] == "random":
            statistic = henze_zirkler_statistic(z, reduce=distributed.sum_over_processes, **form)
        else:
            statistic = henze_zirkler_statistic(every, **form)
        return {
            "henze_zirkler": rows.share(hz_weight * safe_exp(statistic)),
            "covariance": rows.share(safe_exp(off_covariance / covariance_tolerance)),
            "mean": rows.share(safe_exp(off_mean / mean_tolerance)),
        }

    def _constrained(self, terms: Terms, run: Run, rows: Rows, z: Tensor, step: int) -> Terms:
        """The terms, and the penalties of ``constraints``; one whose name is taken is told apart by its number."""
        if not self.settings["constraints"]:
            return terms
        context = Step1(run.replicas, rows, z, run.seed, step)
        for i, constraint in enumerate(self.settings["constraints"]):
            violation = constraint.violation(context)
            if not isinstance(violation, Tensor) or violation.shape != (run.replicas.count,):
                found = tuple(violation.shape) if isinstance(violation, Tensor) else type(violation).__name__
                raise InputError(f"{type(constraint).__name__}.violation must be [R] = ({run.replicas.count},), got {found}")
            name = constraint.name if constraint.name not in terms else f"{constraint.name} {i}"
            terms[name] = rows.share(safe_exp(violation / constraint.tolerance))
        return terms

    def _joint(self, run: Run, rows: Rows, step: int) -> Terms:
        z = run.replicas.codes(rows.values)
        return self._constrained(self._published_terms(run.replicas, rows, z, step), run, rows, z, step)

    def _importance(self, run: Run, rows: Rows, step: int) -> Terms:
        samples = self.settings["num_samples"] if step != VALIDATION_DRAWS else VALIDATION_SAMPLES
        terms = importance_terms(run, rows, samples, "doubly-reparameterized", step)
        q = run.replicas.posterior(rows.values)
        z = q.mean + q.log_std.exp() * run.noise(rows, 1, step)()[:, :, 0]
        terms |= self._code_terms(run.replicas, rows, z, step)
        return self._constrained({**terms, **self._prior(run, rows, step)}, run, rows, z, step)

    def _quadrature(self, run: Run, rows: Rows, step: int) -> Terms:
        replicas = run.replicas
        z = replicas.codes(rows.values)
        likelihood = self._integrals(replicas, rows, z.detach(), step == VALIDATION_DRAWS)
        terms = {"likelihood": -rows.mean(likelihood)}
        if step != VALIDATION_DRAWS:  # h follows the modes; theta does not follow h
            with replicas.frozen("model."):
                joint = replicas.log_joint(rows.values, z)
            terms["mode"] = -rows.mean(joint - joint.detach())
        return self._constrained({**terms, **self._prior(run, rows, step)}, run, rows, z, step)

    def _prior(self, run: Run, rows: Rows, step: int) -> Terms:
        """A training row's share of the decoder's prior; restarts are judged without."""
        precision = self.settings["decoder_precision"]
        matrices = [w for w in run.replicas.group("model.decoder.") if w.dim() > 2]  # [R, ...]
        if not precision or not matrices or step == VALIDATION_DRAWS:
            return {}
        squares = torch.stack([w.square().flatten(1).sum(1) for w in matrices]).sum(0)
        return {"prior": rows.share(0.5 * precision / run.batches.count * squares)}

    @staticmethod
    def _integrals(replicas: Replicas, rows: Rows, z: Tensor, held_out: bool) -> Tensor:
        """log p(x) [R, n], integrated around the codes z; or, where means of p(z | x) are kept, around these, which follow
        theta: the few rows whose codes are poor would pull it towards themselves."""
        x, own, places = rows.values, replicas.own, places_of(rows)
        kept = own.get(HELD_OUT_MEANS if held_out else MEANS)
        if kept is None:
            return replicas.quadrature(x, *replicas.local_frame(x, z)).value
        before = kept[:, places]
        if not held_out:
            found = replicas.quadrature(x, *replicas.follow_frame(x, z, before, own[SCALES][:, places]))
            kept[:, places], own[SCALES][:, places] = found.mean, found.scale
            return found.value
        higher = replicas.log_joint(x, before) > replicas.log_joint(x, z)
        mean, scale = replicas.local_frame(x, torch.where(higher[..., None], before, z))  # looks may lie many steps apart
        kept[:, places] = mean
        return replicas.quadrature(x, mean, scale).value

    def _weights(self, run: Run) -> Callable[[], list[Any]]:
        return lambda: [self.weight(name, run.replicas) for name in self.weights]

    def _step1(self, run: Run, epochs: int, first: bool) -> list[Stage]:
        s = self.settings
        prefix = "encoder." if first and run.replicas.template.encoder is not None else "inference."

        def phase(
            name: str, epochs: int, kind: str = "joint", decay: bool = True, halving: bool = False, rate: float = 1.0
        ) -> Phase:  # fmt: skip
            terms = {"joint": self._joint, "importance": self._importance, "quadrature": self._quadrature}[kind]
            known = kind == "joint" and s["hz_method"] == "exact" and not s["constraints"]
            return Phase(
                name, epochs, ("model.", prefix), lambda rows, step: terms(run, rows, step),
                lambda: terms(run, run.validation, VALIDATION_DRAWS), decay, rate, halving, fixed=name == "candidates",
                objective=Objective("joint", self._weights(run), hz_beta=s["hz_beta"]) if known else None,
            )  # fmt: skip

        if not first or run.options.warm_start:
            return [phase("step 1", epochs, s["step1"])]
        warm_up, stages = min(s["warm_up"], epochs // 6), list[Stage]()
        if prefix == "inference." and run.replicas.template.inference.components > 1:
            stages += [lambda run: use_one_component(run.replicas)]
        if s["whiten"]:
            stages += [lambda run: whiten_codes(run.replicas, prefix, run.train.values)]
        if self._candidates_train:
            stages += [lambda run: mirror_codes(run.replicas, prefix, s["candidates"])]
        stages += [fit_decoder(run, warm_up)]
        epochs -= warm_up
        if self._candidates_train:
            stages += [phase("candidates", warm_up, decay=False)]
            stages += [lambda run: run.keep(run.best_of(run.objective, s["candidates"], 1))]
            epochs -= warm_up

        def finalists(run: Run) -> None:
            if (count := s["finalists"]) is not None:
                run.keep(run.best_of(run.objective, run.restarts, min(count, run.restarts)))

        if s["step1"] == "joint":
            return [*stages, phase("step 1", epochs, halving=True), finalists]
        joint = int(epochs * (1 - s["likelihood_share"]))
        stages += [phase("step 1, joint", joint, halving=True)]
        if s["step1"] == "importance":
            stages += [self._start_std()]
        whole = run.options.batch_size is None and run.batches.loader is None and run.batches.source is None
        keep = s["step1"] == "quadrature" and whole and not distributed.active()
        if keep:
            stages += [lambda run: keep_frames(run, run.validation, HELD_OUT_MEANS)]
        if s["finalists"] is not None:
            stages += [phase("finalists", 0, s["step1"]), finalists]  # no epochs: held-out rows alone
        if keep:
            stages += [lambda run: keep_frames(run, run.train, MEANS, SCALES)]
        stages += [phase("step 1", epochs - joint, s["step1"], rate=s["likelihood_rate"])]
        if keep:  # modes of held-out rows may be others by now
            stages += [lambda run: keep_frames(run, run.validation, HELD_OUT_MEANS), phase("step 1", 0, s["step1"])]
            stages += [lambda run: forget(run, MEANS, SCALES, HELD_OUT_MEANS)]
        return stages

    # --- step 2 ---

    def _start_std(self) -> Stage:
        return lambda run: start_std(run.replicas, lambda: elbo_at_start(run), self.settings["initial_std"])

    def _step2(self, run: Run, epochs: int, first: bool) -> list[Stage]:
        s = self.settings
        stages: list[Stage] = []
        if first and run.replicas.template.encoder is not None:
            stages += [lambda run: copy_encoder(run.replicas, self.model.latent_dim)]
        fresh = first and not run.options.warm_start
        count = s["inference_restarts"] if fresh else 1

        learned = s["step1"] == "importance"  # q with its spread

        def start(run: Run, value: Callable[[], Tensor]) -> None:
            if count > 1:
                self._draw_inference(run, count)
            if not fresh or (learned and count == 1):
                return
            before = run.replicas.snapshot()
            start_std(run.replicas, value, s["initial_std"])
            if learned:
                old = torch.arange(run.replicas.count, device=run.objective.device) % count == 0
                run.replicas.restore(chosen(old, before, run.replicas.snapshot()))

        def end(run: Run, value: Tensor) -> None:
            run.note(phase="networks", objective=value)  # of each restart's the lowest is taken
            run.keep(run.best_of(value, count, 1))

        return stages + inference_stages(
            run, epochs, s["step2"], s["sampler"], s["num_samples"], copies=count, simulated_std=s["simulated_std"],
            start=start, end=end if count > 1 else None,
        )  # fmt: skip

    @torch.no_grad()
    def _draw_inference(self, run: Run, count: int) -> None:
        """Of every replica ``count`` with the same theta, side by side; q of all but the first of them is drawn anew."""
        replicas = run.replicas
        run.keep(torch.arange(replicas.count, device=run.objective.device).repeat_interleave(count))
        for r, restart in enumerate(replicas.own["ids"].tolist()):
            if r % count:
                seed = (int(run.seed) + 1_000_003 * restart + 7919 * (r % count)) % 2**63
                drawn = make_system(None, self._sources[1], None, seed, fresh=True)
                for name, value in (*drawn.named_parameters(), *drawn.named_buffers()):
                    replicas.parameters[name][r] = value

    def _stages(self, run: Run, epochs: int) -> list[Stage]:
        repeats = self.settings["repeats"]
        stages: list[Stage] = []
        for repeat in range(repeats):
            share = epochs * (repeat + 1) // repeats - epochs * repeat // repeats
            step1 = min(max(1, round(share * self.settings["step1_share"])), share - 1)
            stages += self._step1(run, step1, repeat == 0)
            stages += [Run.judge]  # theta is judged by step 1's objective, whatever step 2 makes of q
            stages += self._step2(run, share - step1, repeat == 0)
            stages += [_end_repeat(repeat)]
        return stages


def _end_repeat(repeat: int) -> Stage:
    def stage(run: Run) -> None:
        run.note(phase="repeat", repeat=repeat, objective=run.judged)
        run.replicas.drop_encoder()  # step 3: h is the mean of q from here on
        run.consider()

    return stage
