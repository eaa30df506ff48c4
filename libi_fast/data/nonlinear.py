"""The nonlinear data sets of Yacoby, Pan and Doshi-Velez (2020), with exact likelihoods by quadrature."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import torch
from safetensors.torch import load
from torch import Tensor, nn

from libi_fast.data.synthetic import JTEX_B, SyntheticDataset, jtex_noise_variance, jtex_weight, sample
from libi_fast.models.likelihoods import DiagonalGaussian
from libi_fast.models.model import LatentVariableModel
from libi_fast.models.networks import Cube, JTExMap, SigmoidCubeRoot, mlp
from libi_fast.models.quadrature import quadrature_log_likelihood


class QuadratureTruth:
    """A generating model whose likelihood is an integral over two latent dimensions.

    Attributes:
        model: a LatentVariableModel in float64. noise_variance: [D] float64.
    """

    def __init__(self, decoder: nn.Module, noise_variance: Tensor, entropy_bound: float) -> None:
        self.noise_variance = noise_variance
        self.model = LatentVariableModel(decoder.double(), DiagonalGaussian(noise_variance), 2).requires_grad_(False)
        self._entropy_bound = entropy_bound

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """[N, L] to [N, D], without noise."""
        return self.model.decode(z.double())

    def sample(self, n: int, seed: int) -> Tensor:
        """n draws of p(x), [n, D] float64."""
        return sample(self, self.model.latent_dim, n, seed)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x) in nats, to 1e-6: [N, D] to [N] float64."""
        return quadrature_log_likelihood(self.model, x.double())

    def entropy_bound(self) -> float:
        """The negative entropy of p(x), in nats: the most that any model can expect on test data. To 0.003, from
        benchmarks/results/exact_likelihood.json (``python -m benchmarks exact_likelihood``)."""
        return self._entropy_bound


class CubicJTEx(SyntheticDataset):
    """x = (chol(A A' + B) z)^3 + eps elementwise, eps ~ N(0, 0.01 I - B), with LinearJTEx's A and B."""

    label = "CubicJTEx"
    truth: QuadratureTruth

    def _truth(self) -> QuadratureTruth:
        linear = nn.Linear(2, 2, bias=False)
        linear.weight = nn.Parameter(jtex_weight())
        return QuadratureTruth(nn.Sequential(linear, Cube()), jtex_noise_variance(), CUBIC_ENTROPY_BOUND)

    def _decoder(self) -> nn.Module:
        return nn.Sequential(JTExMap(JTEX_B), Cube())

    def _network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), SigmoidCubeRoot(), nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 4))


class Mobius(SyntheticDataset):
    """x = f(z) + eps, eps ~ N(0, 1e-5 I), f a network 2-50(tanh)-2 that stands for the complex map (z + 1 + 4i) / (z + 7 + 4i).

    Its weights are in mobius.safetensors, fitted by benchmarks/fit_mobius.py (seed 0) to a root mean squared error of 3.6e-4 a
    coordinate under N(0, I), a ninth of the noise's standard deviation.
    """

    label = "Mobius"
    truth: QuadratureTruth

    def _truth(self) -> QuadratureTruth:
        decoder = self._decoder().double()
        decoder.load_state_dict(_mobius())
        return QuadratureTruth(decoder, torch.full((2,), 1e-5, dtype=torch.float64), MOBIUS_ENTROPY_BOUND)

    def _decoder(self) -> nn.Module:
        return mlp(2, [50], 2, "tanh")

    def _network(self) -> nn.Module:
        return mlp(2, [50], 4, "relu")


@cache
def _mobius() -> dict[str, Tensor]:
    return load((files("libi_fast.data") / "mobius.safetensors").read_bytes())


CUBIC_ENTROPY_BOUND = -4.053
MOBIUS_ENTROPY_BOUND = 1.926
