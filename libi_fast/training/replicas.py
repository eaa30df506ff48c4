"""Many copies of one system of modules as one batch: parameters stacked in front, every call mapped over them."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from libi_fast.errors import InputError
from libi_fast.models.autocast import Autocast
from libi_fast.models.laplace import Quadrature, follow_frame, local_frame, log_ratios, quadrature
from libi_fast.models.linear_gaussian import is_linear_gaussian
from libi_fast.models.model import InferenceModel, LatentVariableModel, MeanField
from libi_fast.models.networks import fresh_copy
from libi_fast.models.proposals import FullCovariance, GaussianMixture
from libi_fast.training.distributed import Rows

LOG_2PI = math.log(2 * math.pi)


class System(nn.Module):
    """Generative model, inference model and, where it is a network of its own, step 1's encoder."""

    def __init__(self, model: LatentVariableModel, inference: InferenceModel, encoder: nn.Module | None = None):
        super().__init__()
        self.model, self.inference, self.encoder = model, inference, encoder
        self.autocast: torch.dtype | None = None  # of the networks

    def _networks(self) -> contextlib.AbstractContextManager[Any]:
        """Within it networks run in ``autocast``; what they give is to be converted back."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return Autocast(self.autocast)

    def forward(self, what: str, *args: Tensor) -> Any:
        return getattr(self, what)(*args)

    def codes(self, x: Tensor) -> Tensor:
        """z = h(x), [N, L]: the encoder, or the mean of q where it has none."""
        if self.encoder is not None:
            with self._networks():
                return self.encoder(x).to(x.dtype)
        return self.q(x).expectation()

    def q(self, x: Tensor) -> MeanField | FullCovariance | GaussianMixture:
        """q(z | x) of each row."""
        with self._networks():
            q = self.inference(x)
        return MeanField(*(t.to(x.dtype) for t in q)) if isinstance(q, MeanField) else q

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of a mean-field q."""
        q = self.q(x)
        assert isinstance(q, MeanField)
        return q.mean, q.log_std

    def log_q(self, x: Tensor, z: Tensor) -> Tensor:
        """log q(z | x) of codes z [N, S, L], [N, S]."""
        return self.q(x).log_prob(z)

    def elbo_parts(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """E_q log p(x | z) and KL[q || prior] of a q that is not mean-field, [N] each: in closed form where there is one, else
        by draws from noise [N, S, L]. All components take the same noise, so that their weights are differentiated exactly."""
        q = self.q(x)
        assert not isinstance(q, MeanField)
        linear = is_linear_gaussian(self.model)
        reconstruction = kl = torch.zeros_like(x[:, 0])
        for k in range(q.components):
            weight, part = q.component(k)
            z = part.draw(noise)
            fit = self._expected_log_prob(x, part) if linear else self.log_prob(x[:, None], z).mean(-1)
            prior = -0.5 * (z.square() + LOG_2PI).sum(-1)
            excess = part.kl_from_prior() if q.components == 1 else (q.log_prob(z) - prior).mean(-1)
            reconstruction, kl = reconstruction + weight * fit, kl + weight * excess
        return reconstruction, kl

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        if self.autocast is None:
            return self.model.log_prob(x, z)
        with self._networks():
            output = self.model.decode(z)
        return self.model.likelihood.log_prob(x, output.to(x.dtype))

    def decode(self, z: Tensor) -> Tensor:
        return self.model.decode(z)

    def simulate(self, z: Tensor, noise: Tensor) -> Tensor:
        """x ~ p(x | z) [N, D] of codes z [N, L], from noise [N, D] (uniforms, where the likelihood wants them)."""
        return self.model.likelihood.sample(self.decode(z), noise)

    def log_ratios(self, z: Tensor, noise: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        return log_ratios(self.model, z, noise, inner)

    def local_frame(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return local_frame(self.model, x, z)

    def follow_frame(self, x: Tensor, z: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return follow_frame(self.model, x, z, mean, scale)

    def quadrature(self, x: Tensor, mean: Tensor, scale: Tensor) -> Quadrature:
        return quadrature(self.model, x, mean, scale)

    def expected_log_prob(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """E_q log p(x|z), [N], in closed form; for linear-Gaussian models alone."""
        columns, variance = self._columns(mean)
        spread = (columns.square() / variance).sum(-1)
        return self.model.log_prob(x, mean) - 0.5 * ((2 * log_std).exp() * spread).sum(-1)

    def _expected_log_prob(self, x: Tensor, q: FullCovariance) -> Tensor:
        """The same of a q with full covariances."""
        columns, variance = self._columns(q.mean)
        spread = ((q.scale_tril.mT @ columns).square() / variance).sum((-2, -1))
        return self.model.log_prob(x, q.mean) - 0.5 * spread

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Of a linear decoder the matrix's columns, as rows [L, D], and the noise variance [D]."""
        units = torch.eye(self.model.latent_dim, dtype=like.dtype, device=like.device)
        variance = self.model.likelihood.variance
        assert isinstance(variance, Tensor)
        return self.model.decode(units) - self.model.decode(torch.zeros_like(units)), variance


@contextlib.contextmanager
def torch_seed(seed: int):
    """torch's default generator under ``seed`` within the block, restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make_system(model: Any, inference: Any, encoder: Any, seed: int, fresh: bool) -> System:
    """One restart: modules are copied (and, if ``fresh``, drawn anew under ``seed``), factories are called."""

    def make(source: Any, kind: type) -> Any:
        if source is None:
            return None
        if isinstance(source, nn.Module):
            return fresh_copy(source) if fresh else source
        if not callable(source):
            raise TypeError(f"expected a {kind.__name__} or a factory of one, got {type(source).__name__}")
        made = source()
        if not isinstance(made, kind):
            raise TypeError(f"the factory must return a {kind.__name__}, got {type(made).__name__}")
        return made

    with torch_seed(seed):
        return System(make(model, LatentVariableModel), make(inference, InferenceModel), make(encoder, nn.Module))


class Replicas:
    """R systems of one architecture.

    Attributes:
        parameters: leaf tensors [R, ...] by name; buffers are among them, untrained.
        own: what else differs between replicas, [R, ...] each: ``ids`` (of their random numbers), ``dataset`` (which of
            several), settings by name, and what a stage keeps for its steps.
    """

    def __init__(self, systems: list[System]):
        self.template = systems[0]
        self.count = len(systems)
        self.own: dict[str, Tensor] = {"ids": torch.arange(self.count, device=systems[0].model.device)}
        self.parameters: dict[str, Tensor] = {}
        named = [{**dict(s.named_parameters()), **dict(s.named_buffers())} for s in systems]
        for name, value in named[0].items():
            if any(name not in n or n[name].shape != value.shape for n in named):
                raise InputError(f"all restarts must have one architecture, but parameter {name!r} differs between them")
            stacked = torch.stack([n[name].detach() for n in named]).clone()
            self.parameters[name] = stacked.requires_grad_(value.requires_grad)
        self.dtype = self.template.model.dtype
        self._linear = is_linear_gaussian(self.template.model)
        self._mapped = True

    def __call__(self, what: str, *args: Tensor, shared: tuple[bool, ...] | None = None) -> Any:
        """``System.what`` for all replicas; args carry a replica dimension unless ``shared`` says otherwise."""
        in_dims = tuple(None if s else 0 for s in shared or (False,) * len(args))
        return self.with_parameters(self.parameters, what, args, in_dims)

    def with_parameters(self, parameters: dict[str, Tensor], what: str, args: Iterable[Tensor], in_dims: tuple) -> Any:
        def one(own: dict[str, Tensor], *arguments: Tensor) -> Any:
            return functional_call(self.template, own, (what, *arguments))

        if self.count == 1:  # called as it is: no mapping to pay for, and any module works
            own = {k: v[0] for k, v in parameters.items()}
            result = one(own, *(a if d is None else a[0] for a, d in zip(args, in_dims, strict=True)))
            return tuple(r[None] for r in result) if isinstance(result, tuple) else result[None]
        if self._mapped:
            try:
                return torch.vmap(one, in_dims=(0, *in_dims), randomness="different")(parameters, *args)
            except (RuntimeError, NotImplementedError) as error:
                # Some modules cannot be mapped (data-dependent control flow, in-place buffers): those run one by one.
                # If the module itself is at fault, the loop below raises its error.
                self._mapped = False
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(f"restarts run one after another: torch.vmap cannot map this module ({reason})", stacklevel=2)
        results = [
            one(
                {k: v[r] for k, v in parameters.items()},
                *(a if d is None else a[r] for a, d in zip(args, in_dims, strict=True)),
            )
            for r in range(self.count)
        ]
        if isinstance(results[0], tuple):
            return tuple(torch.stack(part) for part in zip(*results, strict=True))
        return torch.stack(results)

    @contextlib.contextmanager
    def block(self, start: int, size: int):
        """Within the block only the replicas start .. start + size - 1 are there, and after the last of all as many copies of
        it as are wanting: vector instructions then treat each replica's elements alike in every block. Gradients reach the
        parameters of all, and what is changed in place of ``own`` stays changed."""
        before = self.count, self.parameters, self.own
        wanting = max(0, start + size - self.count)

        def part(values: Tensor) -> Tensor:
            narrowed = values[start : start + size]
            return torch.cat([narrowed, values[-1:].detach().expand(wanting, *values.shape[1:])]) if wanting else narrowed

        self.parameters = {k: part(v) for k, v in self.parameters.items()}
        self.own = {k: part(v) for k, v in self.own.items()}
        self.count = size
        try:
            yield
        finally:
            inside = self.own
            self.count, self.parameters, self.own = before
            for k in self.own if wanting else ():  # else what is inside are views of it
                self.own[k][start:] = inside[k][: size - wanting]

    @contextlib.contextmanager
    def frozen(self, prefix: str):
        """Within the block no gradient reaches the parameters whose names begin with ``prefix``."""
        before = self.parameters
        self.parameters = {k: v.detach() if k.startswith(prefix) else v for k, v in before.items()}
        try:
            yield
        finally:
            self.parameters = before

    def rows(self, rows: Rows) -> Rows:
        """Rows [n, D] of all replicas as they are, [K, n, D] of K data sets as [R, n, D] of each replica's."""
        return rows if rows.values.dim() == 2 else rows._replace(values=rows.values[self.own["dataset"]])

    # Data x: [N, D] for all replicas, or [R, N, D] of their own.

    def codes(self, x: Tensor) -> Tensor:
        """-> [R, N, L]."""
        return self("codes", x, shared=(x.dim() == 2,))

    def posterior(self, x: Tensor) -> MeanField:
        """Of mean-field models -> mean and log_std [R, N, L]."""
        return MeanField(*self("posterior", x, shared=(x.dim() == 2,)))

    def log_q(self, x: Tensor, z: Tensor) -> Tensor:
        """log q(z | x) of codes z [R, N, S, L] -> [R, N, S]."""
        return self("log_q", x, z, shared=(x.dim() == 2, False))

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """z [R, N, L] -> [R, N], or z [R, N, S, L] -> [R, N, S]."""
        shared = x.dim() == 2
        return self("log_prob", x if z.dim() == 3 else x[..., None, :], z, shared=(shared, False))

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) up to a constant, z [R, N, L] -> [R, N]."""
        return self.log_prob(x, z) - 0.5 * z.square().sum(-1)

    def local_frame(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [R, N, L] and scale [R, N, L, L] of p(z | x) near codes z [R, N, L]."""
        return self("local_frame", x, z, shared=(x.dim() == 2, False))

    def follow_frame(self, x: Tensor, z: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The same of theta that has changed a little since it was mean and scale; codes z [R, N, L] may lead elsewhere."""
        return self("follow_frame", x, z, mean, scale, shared=(x.dim() == 2, False, False, False))

    def quadrature(self, x: Tensor, mean: Tensor, scale: Tensor) -> Quadrature:
        """log p(x) [R, N] by nodes that are placed there, and the frame [R, N, L], [R, N, L, L] that they give."""
        return Quadrature(*self("quadrature", x, mean, scale, shared=(x.dim() == 2, False, False)))

    def expected_log_prob(self, x: Tensor, q: MeanField, noise: Callable[[], Tensor]) -> Tensor:
        """E_q log p(x|z) for q [R, N, L] -> [R, N]: in closed form where the decoder is linear and the noise Gaussian, else
        the mean over the draws z = mean + std * noise() of noise [R, N, S, L]."""
        if self._linear:
            return self("expected_log_prob", x, *q, shared=(x.dim() == 2, False, False))
        z = q.mean[:, :, None] + q.log_std.exp()[:, :, None] * noise()
        return self.log_prob(x, z).mean(-1)

    def group(self, *prefixes: str) -> list[Tensor]:
        """The trainable tensors whose names start with one of the prefixes."""
        return [v for k, v in self.parameters.items() if v.requires_grad and k.startswith(prefixes)]

    def snapshot(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.parameters.items()}

    def load_into(self, system: System, values: dict[str, Tensor], replica: int) -> None:
        """Copy one replica's values into a system's own parameters (a dropped encoder's stay as they are)."""
        with torch.no_grad():
            for name, parameter in (*system.named_parameters(), *system.named_buffers()):
                if name in values:
                    parameter.copy_(values[name][replica])

    def restore(self, values: dict[str, Tensor]) -> None:
        """The inverse of ``snapshot``."""
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def select(self, index: Tensor) -> None:
        """Keep the replicas of ``index`` [R'], in that order."""
        self.own = {k: v[index] for k, v in self.own.items()}
        self.load({k: v[index] for k, v in self.parameters.items()})

    def load(self, values: dict[str, Tensor]) -> None:
        """Take these parameters [R', ...], of any number of replicas; what is not among them is dropped."""
        if not any(k.startswith("encoder.") for k in values):
            self.template.encoder = None
        self.count = len(next(iter(values.values())))
        self.parameters = {k: v.detach().clone().requires_grad_(self.parameters[k].requires_grad) for k, v in values.items()}

    def drop_encoder(self) -> None:
        """From now on h is the mean of q."""
        self.load({k: v for k, v in self.parameters.items() if not k.startswith("encoder.")})


def chosen(better: Tensor, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each replica the new values where ``better`` [R], else the old."""
    return {k: torch.where(better.view(-1, *(1,) * (v.dim() - 1)), v, old[k]) for k, v in new.items()}
