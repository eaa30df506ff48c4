"""Likelihoods p(x | z): what the decoder's output means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from libi_fast.errors import InputError
from libi_fast.ops import _library as lib
from libi_fast.ops.importance import bernoulli, gaussian


class Likelihood(nn.Module):
    """Base of all likelihoods. ``name`` is its word in configurations and kernels."""

    name = ""
    reparameterized = True  # a draw is a differentiable function of standard normal noise; else of uniforms

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log p(x | decoder output), x and output [..., D] (broadcasting) -> [...], in nats."""
        raise NotImplementedError

    def sample(self, output: Tensor, noise: Tensor) -> Tensor:
        """A draw [..., D] from the decoder's output; noise is standard normal [..., D] (Gaussian) or uniform (Bernoulli)."""
        raise NotImplementedError

    def mean(self, output: Tensor) -> Tensor:
        """E[x | z], [..., D]."""
        return output

    def score(self, x: Tensor, output: Tensor) -> Tensor:
        """d log p(x | output) / d output, [..., D]."""
        return torch.func.grad(lambda o: self.log_prob(x, o).sum())(output)

    def information(self, output: Tensor) -> Tensor:
        """Fisher's information on each of the decoder's outputs, [..., D]: the mean square of the score."""
        raise NotImplementedError(f"{type(self).__name__} does not say its Fisher information: define information(output)")

    def check(self, x: Tensor) -> None:
        """Raise InputError where data x [N, D] lies outside the support."""

    def check_width(self, output_dim: int, data_dim: int) -> None:
        """Raise InputError where the decoder's output does not have a value for every column."""
        if output_dim != data_dim:
            widths = f"the decoder's output has {output_dim} values a row but the data has {data_dim} columns"
            raise InputError(f"x does not fit the model: {widths}")

    def config(self) -> dict[str, Any]:
        return {"name": self.name}


class DiagonalGaussian(Likelihood):
    """x | z = decoder(z) + noise, noise ~ N(0, diag(variance)).

    Args:
        variance: [D] (or [] for one value everywhere), in squared units of x.
        learned: train the variance (as its logarithm) with the decoder.
        least: floor of a learned variance; keeps a pixel that is reconstructed exactly from an infinite likelihood.

    Raises:
        InputError: a variance that is not positive and finite.
    """

    name = "gaussian"
    fixed_variance: Tensor

    def __init__(self, variance: Tensor | float, learned: bool = False, least: float = 1e-6):
        super().__init__()
        # Numbers stay in float64 until the model gives its dtype: 0.1 rounded to float32 is another variance in float64.
        value = variance if isinstance(variance, Tensor) else torch.tensor(variance, dtype=torch.float64)
        if not value.is_floating_point():
            value = value.double()
        if value.dim() > 1:
            raise InputError(f"variance must have shape [] or [D], got {tuple(value.shape)}")
        if not bool((torch.isfinite(value) & (value > 0)).all()):
            raise InputError(f"variance must be positive and finite, got {value.detach().flatten().tolist()[:5]}")
        self.learned, self.least = learned, least
        if learned:
            self._start = (value - least).clamp_min(least).log().reshape(-1)
            self.log_variance = nn.Parameter(self._start.clone())
        else:
            # Kept as it is, not as a logarithm: exp(log(1e-5)) in float32 would cost 0.01 nats at log-weights of 1e4.
            self.register_buffer("fixed_variance", value.reshape(-1))

    def reset_parameters(self) -> None:
        """A restart begins from the variance given."""
        if self.learned:
            with torch.no_grad():
                self.log_variance.copy_(self._start)

    @property
    def variance(self) -> Tensor:
        """[D] or [1]."""
        return self.log_variance.exp() + self.least if self.learned else self.fixed_variance

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        return gaussian(x, output, self.variance)

    def sample(self, output: Tensor, noise: Tensor) -> Tensor:
        return output + self.variance.sqrt() * noise

    def information(self, output: Tensor) -> Tensor:
        return (1 / self.variance).expand_as(output)

    def check(self, x: Tensor) -> None:
        size = self.variance.shape[-1]
        if size not in (1, x.shape[-1]):
            raise InputError(f"variance has {size} values but the data has {x.shape[-1]} columns")

    def config(self) -> dict[str, Any]:
        values = self.variance.detach().double().tolist()
        if self.learned:  # the values live with the weights
            return {"name": self.name, "learned": True, "least": self.least, "size": len(values)}
        return {"name": self.name, "learned": False, "variance": values}


class Gaussian(DiagonalGaussian):
    """x | z = decoder(z) + noise, noise ~ N(0, variance I): one variance for every column.

    Args, Raises: as for :class:`DiagonalGaussian`, with one number.
    """

    def __init__(self, variance: float, learned: bool = False, least: float = 1e-6):
        if torch.as_tensor(variance).numel() != 1:
            raise InputError("Gaussian takes one variance; DiagonalGaussian takes one a column")
        super().__init__(variance.reshape(()) if isinstance(variance, Tensor) else float(variance), learned, least)


class Bernoulli(Likelihood):
    """x | z ~ Bernoulli(sigmoid(decoder(z))); x may lie anywhere in [0, 1] (the cross entropy)."""

    name = "bernoulli"
    reparameterized = False

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        return bernoulli(x, output)

    def sample(self, output: Tensor, noise: Tensor) -> Tensor:
        return (noise < torch.sigmoid(output)).to(output.dtype)

    def information(self, output: Tensor) -> Tensor:
        return torch.sigmoid(output) * torch.sigmoid(-output)

    def mean(self, output: Tensor) -> Tensor:
        return torch.sigmoid(output)

    def check(self, x: Tensor) -> None:
        if not lib.values_known(x):
            return
        outside = ~((x >= 0) & (x <= 1))
        if bool(outside.any()):
            row, column = outside.nonzero()[0].tolist()
            raise InputError(
                f"a Bernoulli likelihood needs data in [0, 1]: row {row}, column {column} (counted from 0) holds "
                f"{x[row, column].item():g}"
            )


LIKELIHOODS = (Gaussian, DiagonalGaussian, Bernoulli)  # a subclass of one may have a density of its own


def likelihood_from_config(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Likelihood:
    """The inverse of ``config()``; a learned variance is filled when the weights are loaded."""
    if config["name"] == "bernoulli":
        return Bernoulli()
    if config["name"] != "gaussian":
        raise InputError(f"unknown likelihood {config['name']!r}; known: bernoulli, gaussian")
    if config["learned"]:
        return DiagonalGaussian(torch.ones(config["size"], dtype=dtype), True, config["least"])
    return DiagonalGaussian(torch.tensor(config["variance"], dtype=torch.float64))
