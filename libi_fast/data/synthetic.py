"""What the synthetic data sets share, and those of Yacoby, Pan and Doshi-Velez (2020) whose truth is in closed form."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from libi_fast.data.dataset import Dataset
from libi_fast.errors import InputError
from libi_fast.models.likelihoods import DiagonalGaussian
from libi_fast.models.model import LatentVariableModel, MeanFieldGaussian
from libi_fast.models.networks import JTExMap
from libi_fast.ops.random import Stream, philox_normal

# The first row of each split in the data set's one sequence of draws: any split may grow and keep its first rows.
FIRST_ROW = {"train": 0, "validation": 1 << 30, "test": 1 << 31}
LARGEST_SPLIT = 1 << 30


class Truth(Protocol):
    """The generating model of a synthetic set; all in float64."""

    @property
    def noise_variance(self) -> Tensor: ...  # [D]
    def decode(self, z: Tensor) -> Tensor: ...
    def sample(self, n: int, seed: int) -> Tensor: ...
    def log_likelihood(self, x: Tensor) -> Tensor: ...
    def entropy_bound(self) -> float: ...


def rows_of(truth: Truth, latent_dim: int, n: int, seed: int, first_row: int, stream: Stream) -> tuple[Tensor, Tensor]:
    """Rows [n, D] and their codes [n, L] in float64; row r takes its codes and then its noises from one row of normals."""
    variance = truth.noise_variance
    draws = philox_normal(seed, n, latent_dim + len(variance), first_row=first_row, stream=stream, dtype=torch.float64)
    codes, noise = draws[:, :latent_dim], draws[:, latent_dim:]
    return truth.decode(codes) + noise * variance.sqrt(), codes


def sample(truth: Truth, latent_dim: int, n: int, seed: int) -> Tensor:
    """n draws of p(x), [n, D] float64; row i the same for every n."""
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    return rows_of(truth, latent_dim, n, seed, 0, Stream.MODEL_SAMPLE)[0]


class GaussianTruth:
    """The model x = weight z + eps, z ~ N(0, I), eps ~ N(0, diag(noise_variance)): p(x) = N(0, covariance).

    Everything here is float64, whatever the data's dtype.

    Attributes:
        weight: [D, L], data units per latent unit.
        noise_variance: [D].
        covariance: [D, D] = weight weight' + diag(noise_variance).
    """

    def __init__(self, weight: Tensor, noise_variance: Tensor) -> None:
        self.weight = weight.double()
        self.noise_variance = noise_variance.double()
        self.covariance = self.weight @ self.weight.T + torch.diag(self.noise_variance)

    def decode(self, z: Tensor) -> Tensor:
        """[N, L] to [N, D], without noise."""
        return z @ self.weight.T

    def sample(self, n: int, seed: int) -> Tensor:
        """n draws of p(x), [n, D] float64."""
        return sample(self, self.weight.shape[1], n, seed)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log p(x) in nats, exactly: [N, D] to [N] float64."""
        if x.ndim != 2 or x.shape[1] != len(self.weight):
            raise InputError(f"x: expected [N, {len(self.weight)}], got shape {tuple(x.shape)}")
        factor = torch.linalg.cholesky(self.covariance)
        y = torch.linalg.solve_triangular(factor, x.double().T, upper=False)
        return -0.5 * (y.square().sum(0) + len(factor) * math.log(2 * math.pi)) - factor.diagonal().log().sum()

    def expected_log_likelihood(self, mean: Tensor, covariance: Tensor) -> float:
        """E_{p(x)} log N(x; mean, covariance) in nats: what a Gaussian model would score on endless test data.

        Args:
            mean: [D]; covariance: [D, D], symmetric positive definite.
        """
        dim = len(self.weight)
        mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
        if mean.shape != (dim,) or covariance.shape != (dim, dim):
            raise InputError(
                f"expected mean [{dim}] and covariance [{dim}, {dim}], "
                f"got shapes {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info):
            raise InputError("covariance: expected a positive definite matrix")
        second_moment = self.covariance + torch.outer(mean, mean)  # of x - mean: the truth's own mean is zero
        trace = torch.cholesky_solve(second_moment, factor).trace()
        return float(-0.5 * (trace + dim * math.log(2 * math.pi)) - factor.diagonal().log().sum())

    def entropy_bound(self) -> float:
        """The negative entropy of p(x), in nats: the most that any model can expect on test data."""
        return self.expected_log_likelihood(torch.zeros(len(self.weight)), self.covariance)


class SyntheticDataset(Dataset):
    """Draws from a known truth, split into train, validation and test.

    Row r of a split takes its L codes and then its D noises from one row of Philox normals (stream DATA), in float64
    before rounding to dtype. So a seed means the same data on every machine, no row is in two splits, and a larger
    split begins with the rows of a smaller one.

    Args:
        seed: of the draws; train, validation, test: rows of each split; dtype: of the tensors.

    Attributes beyond :class:`Dataset`'s:
        truth: the generating model. latent_dim: L.
        train_codes, validation_codes, test_codes: the true z [N, L] of each row.
        noise_variance: [D], in the data's dtype.
    """

    label: str
    truth: Truth
    latent_dim = 2

    def __init__(
        self,
        seed: int = 0,
        train: int = 500,
        validation: int = 500,
        test: int = 500,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        truth, splits = self._truth(), {}
        self.dtype, self._codes = dtype, {}
        for (split, first_row), size in zip(FIRST_ROW.items(), (train, validation, test), strict=True):
            if not 1 <= size <= LARGEST_SPLIT:
                raise InputError(f"{split}: expected between 1 and 2^30 rows, got {size}")
            rows, codes = rows_of(truth, self.latent_dim, size, seed, first_row, Stream.DATA)
            splits[split], self._codes[split] = rows.to(dtype), codes.to(dtype)
        self.noise_variance = truth.noise_variance.to(dtype)
        super().__init__(self.label, [f"x{d + 1}" for d in range(len(truth.noise_variance))], **splits, truth=truth)

    @property
    def train_codes(self) -> Tensor:
        return self._codes["train"]

    @property
    def validation_codes(self) -> Tensor:
        return self._codes["validation"]

    @property
    def test_codes(self) -> Tensor:
        return self._codes["test"]

    def model(self) -> LatentVariableModel:
        """A model of the ground truth's architecture with fresh parameters, its noise known."""
        return LatentVariableModel(self._decoder(), DiagonalGaussian(self.noise_variance), self.latent_dim).to(self.dtype)

    def inference(self) -> MeanFieldGaussian:
        """The paper's inference model for this set, with fresh parameters."""
        return MeanFieldGaussian(self._network()).to(self.dtype)

    def _truth(self) -> Truth:
        raise NotImplementedError

    def _decoder(self) -> nn.Module:
        raise NotImplementedError

    def _network(self) -> nn.Module:
        return nn.Linear(len(self.columns), 2 * self.latent_dim)


JTEX_B = (0.006, 0.006)
JTEX_NOISE = 0.01  # noise and B together


def jtex_weight() -> Tensor:
    """chol(A A' + B), [2, 2] float64."""
    a = torch.tensor([[0.75, 0.25], [1.5, -1.0]], dtype=torch.float64)
    return torch.linalg.cholesky(a @ a.T + torch.diag(torch.tensor(JTEX_B, dtype=torch.float64)))


def jtex_noise_variance() -> Tensor:
    return JTEX_NOISE - torch.tensor(JTEX_B, dtype=torch.float64)


class LinearJTEx(SyntheticDataset):
    """x = chol(A A' + B) z + eps, eps ~ N(0, 0.01 I - B), B = 0.006 I; two latent and two data dimensions.

    p(x) = N(0, A A' + 0.01 I) for every B: the likelihood cannot tell B, and a VAE prefers a wrong theta.
    """

    label = "LinearJTEx"
    truth: GaussianTruth

    def _truth(self) -> GaussianTruth:
        return GaussianTruth(jtex_weight(), jtex_noise_variance())

    def _decoder(self) -> nn.Module:
        return JTExMap(JTEX_B)


class GaussianExample(SyntheticDataset):
    """The paper's data set "Gaussian": x = z'A + eps, eps ~ N(0, 1e-6 I); two latent and four data dimensions."""

    label = "Gaussian"
    truth: GaussianTruth

    def _truth(self) -> GaussianTruth:
        a = torch.tensor([[-0.7074, 0.0995, 0.0286, 0.1240], [0.7074, 0.9948, -0.9995, 0.9920]], dtype=torch.float64)
        return GaussianTruth(a.T, 1e-6 * torch.ones(4, dtype=torch.float64))

    def _decoder(self) -> nn.Module:
        return nn.Linear(2, 4, bias=False)
