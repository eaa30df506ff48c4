"""Generative and inference models."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from libi_fast.errors import InputError
from libi_fast.models.likelihoods import Likelihood
from libi_fast.ops.random import Stream, as_seed, philox_normal, philox_uniform


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every submodule has the mode it had."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in before:
            m.training = mode


class MeanField(NamedTuple):
    """A Gaussian with diagonal covariance for each row: mean and log standard deviation, [..., N, L]."""

    mean: Tensor
    log_std: Tensor

    def kl_from_prior(self) -> Tensor:
        """KL[q || N(0, I)] of each row, [..., N], in nats."""
        return 0.5 * (self.mean.square() + (2 * self.log_std).exp() - 1 - 2 * self.log_std).sum(-1)

    def expectation(self) -> Tensor:
        """E[z] of each row, [..., N, L], as of a :class:`libi_fast.Proposal`."""
        return self.mean

    def standard_deviations(self) -> Tensor:
        """Of each latent of each row, [..., N, L]."""
        return self.log_std.exp()

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z) of codes z [..., N, s, L], [..., N, s], in nats."""
        whitened = (z - self.mean[..., None, :]) * (-self.log_std).exp()[..., None, :]
        return -0.5 * (whitened.square() + math.log(2 * math.pi)).sum(-1) - self.log_std.sum(-1)[..., None]


class LatentVariableModel(nn.Module):
    """p(x) = integral of p(x | decoder(z)) N(z; 0, I) over codes z in R^L.

    Args:
        decoder: any module from z [batch, L] to the likelihood's parameters [batch, D]. A ``Sequential`` of ``Linear`` and
            elementwise activations is recognised and runs in the fused kernels.
        likelihood: ``Gaussian``, ``DiagonalGaussian``, ``Bernoulli``.
        latent_dim: L.

    Raises:
        InputError: latent_dim below 1, a decoder that cannot take codes of that size.
    """

    def __init__(self, decoder: nn.Module, likelihood: Likelihood, latent_dim: int):
        super().__init__()
        if not isinstance(decoder, nn.Module):
            raise TypeError(f"decoder must be a torch.nn.Module, got {type(decoder).__name__}")
        if not isinstance(likelihood, Likelihood):
            raise TypeError(f"likelihood must be a libi_fast likelihood, got {type(likelihood).__name__}")
        if latent_dim < 1:
            raise InputError(f"latent_dim must be at least 1, got {latent_dim}")
        self.decoder, self.likelihood, self.latent_dim = decoder, likelihood, latent_dim
        likelihood.to(self.dtype)  # a variance in another precision would change that of the log-weights

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), x [..., D] and z [..., L] (leading dimensions broadcast) -> [...], in nats.

        Raises:
            InputError: the decoder's output and x differ in width.
        """
        output = self.decode(z)
        self.likelihood.check_width(output.shape[-1], x.shape[-1])
        return self.likelihood.log_prob(x, output)

    def decode(self, z: Tensor) -> Tensor:
        """The decoder over any leading dimensions, its output flattened to [..., D]."""
        output = self.decoder(z.reshape(-1, z.shape[-1]))
        return output.reshape(*z.shape[:-1], math.prod(output.shape[1:]))  # which is told, as no rows have no width to infer

    def check_decoder(self, inputs: int, outputs: int, columns: int) -> None:
        """Raise InputError where a decoder of known widths does not fit the codes or the data."""
        if inputs != self.latent_dim:
            raise InputError(f"the decoder does not take codes [batch, {self.latent_dim}]: it wants {inputs} values a row")
        self.likelihood.check_width(outputs, columns)

    @torch.no_grad()
    def check(self, x: Tensor) -> None:
        """Raise InputError unless decoder, likelihood and data x [N, D] fit together."""
        probe = torch.zeros(2, self.latent_dim, dtype=self.dtype, device=self.device)
        try:
            # In evaluation mode: a look must not move running statistics or draw random numbers.
            with evaluation_mode(self.decoder):
                output = self.decoder(probe)
        except RuntimeError as error:
            raise InputError(f"the decoder does not take codes [batch, {self.latent_dim}]: {error}") from error
        if output.shape[0] != 2:
            raise InputError(f"the decoder maps [2, {self.latent_dim}] to {tuple(output.shape)}: the batch must come first")
        self.likelihood.check_width(output[0].numel(), x.shape[-1])
        self.likelihood.check(x)

    @torch.no_grad()
    def sample(self, n: int, seed: int | Tensor | None = None) -> Tensor:
        """n draws from p(x), [n, D]: ancestral, row i the same for every n.

        Raises:
            InputError: n below 1, a seed outside 64 bits.
        """
        return self.sample_joint(n, seed)[0]

    @torch.no_grad()
    def sample_joint(self, n: int, seed: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The draws x [n, D] of :meth:`sample` with their codes z [n, L]: each z is a draw from p(z | x). Raises likewise."""
        if n < 1:
            raise InputError(f"n must be at least 1, got {n}")

        key = as_seed(seed, self.device)
        common: dict[str, Any] = {"stream": Stream.MODEL_SAMPLE, "dtype": self.dtype, "device": self.device}
        z = philox_normal(key, n, self.latent_dim, **common)
        output = self.decode(z)
        draw = philox_normal if self.likelihood.reparameterized else philox_uniform
        return self.likelihood.sample(output, draw(key, n, output.shape[-1], repetition=1, **common)), z

    def config(self) -> dict[str, Any]:
        from libi_fast.models.networks import describe

        return {
            "latent_dim": self.latent_dim,
            "likelihood": self.likelihood.config(),
            "decoder": describe(self.decoder) or {"custom": type(self.decoder).__name__},
        }


class InferenceModel(nn.Module):
    """q(z | x) by a network. Raises TypeError where the network is no module.

    Attributes:
        name: its word in configurations. components: K, Gaussians in each distribution.
    """

    name = ""
    components = 1

    def __init__(self, network: nn.Module):
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        self.network = network

    def width(self, latent_dim: int) -> int:
        """How many values the network gives a row."""
        raise NotImplementedError(f"{type(self).__name__} does not say how wide its network is: define width(latent_dim)")

    def places(self, latent_dim: int) -> tuple[Tensor, Tensor]:
        """Which of those values are the components' means, and which their log standard deviations, [K, L] each."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its network gives: define places(latent_dim)")

    def config(self) -> dict[str, Any]:
        """Everything but the network."""
        return {"name": self.name}


class MeanFieldGaussian(InferenceModel):
    """q(z | x) = N(mean(x), diag(exp(log_std(x)))^2).

    Args:
        network: a module from x [batch, D] to [batch, 2L] (mean, then log standard deviation), or to a pair of [batch, L].
    """

    name = "mean-field"
    LEAST_LOG_STD, LARGEST_LOG_STD = math.log(1e-8), math.log(1e4)

    def forward(self, x: Tensor) -> MeanField:
        output = self.network(x)
        if isinstance(output, tuple | list):
            mean, log_std = output
        else:
            if output.shape[-1] % 2:
                raise InputError(f"the inference network must give mean and log_std, an even width, got {output.shape[-1]}")
            mean, log_std = output.chunk(2, -1)
        # Far outside any use; keeps exp and its square finite in float32 while a bad start recovers.
        return MeanField(mean, log_std.clamp(self.LEAST_LOG_STD, self.LARGEST_LOG_STD))

    def width(self, latent_dim: int) -> int:
        return 2 * latent_dim

    def places(self, latent_dim: int) -> tuple[Tensor, Tensor]:
        means = torch.arange(latent_dim)[None]
        return means, latent_dim + means
