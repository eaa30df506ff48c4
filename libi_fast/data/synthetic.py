"""The linear-Gaussian data sets of Yacoby, Pan and Doshi-Velez (2020), with their truth in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from libi_fast.data.dataset import Dataset
from libi_fast.errors import InputError
from libi_fast.ops.random import Stream, philox_normal

# The first row of each split in the data set's one sequence of draws: any split may grow and keep its first rows.
FIRST_ROW = {"train": 0, "validation": 1 << 30, "test": 1 << 31}
LARGEST_SPLIT = 1 << 30


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


class LinearGaussianDataset(Dataset):
    """Draws from a :class:`GaussianTruth`, split into train, validation and test.

    Row r of a split takes its L codes and then its D noises from one row of Philox normals (stream DATA), in float64
    before rounding to dtype. So a seed means the same data on every machine, no row is in two splits, and a larger
    split begins with the rows of a smaller one.

    Attributes beyond :class:`Dataset`'s:
        latent_dim: L.
        train_codes, validation_codes, test_codes: the true z [N, L] of each row.
        noise_variance: [D], in the data's dtype.
    """

    truth: GaussianTruth

    def __init__(self, name: str, truth: GaussianTruth, seed: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
        data_dim, self.latent_dim = truth.weight.shape
        splits, self._codes = {}, {}
        for (split, first_row), size in zip(FIRST_ROW.items(), sizes, strict=True):
            if not 1 <= size <= LARGEST_SPLIT:
                raise InputError(f"{split}: expected between 1 and 2^30 rows, got {size}")
            draws = philox_normal(
                seed, size, self.latent_dim + data_dim, first_row=first_row, stream=Stream.DATA, dtype=torch.float64
            )
            codes, noise = draws[:, : self.latent_dim], draws[:, self.latent_dim :]
            splits[split] = (codes @ truth.weight.T + noise * truth.noise_variance.sqrt()).to(dtype)
            self._codes[split] = codes.to(dtype)
        super().__init__(name, [f"x{d + 1}" for d in range(data_dim)], **splits, truth=truth)
        self.noise_variance = truth.noise_variance.to(dtype)

    @property
    def train_codes(self) -> Tensor:
        return self._codes["train"]

    @property
    def validation_codes(self) -> Tensor:
        return self._codes["validation"]

    @property
    def test_codes(self) -> Tensor:
        return self._codes["test"]


class LinearJTEx(LinearGaussianDataset):
    """x = chol(A A' + B) z + eps, eps ~ N(0, 0.01 I - B), B = 0.006 I; two latent and two data dimensions.

    p(x) = N(0, A A' + 0.01 I) for every B: the likelihood cannot tell B, and a VAE prefers a wrong theta.

    Args:
        seed: of the draws; train, validation, test: rows of each split; dtype: of the tensors.
    """

    def __init__(
        self,
        seed: int = 0,
        train: int = 500,
        validation: int = 500,
        test: int = 500,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        a = torch.tensor([[0.75, 0.25], [1.5, -1.0]], dtype=torch.float64)
        b = 0.006 * torch.ones(2, dtype=torch.float64)
        truth = GaussianTruth(torch.linalg.cholesky(a @ a.T + torch.diag(b)), 0.01 - b)
        super().__init__("LinearJTEx", truth, seed, (train, validation, test), dtype)


class GaussianExample(LinearGaussianDataset):
    """The paper's data set "Gaussian": x = z'A + eps, eps ~ N(0, 1e-6 I); two latent and four data dimensions.

    Args:
        seed: of the draws; train, validation, test: rows of each split; dtype: of the tensors.
    """

    def __init__(
        self,
        seed: int = 0,
        train: int = 500,
        validation: int = 500,
        test: int = 500,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        a = torch.tensor([[-0.7074, 0.0995, 0.0286, 0.1240], [0.7074, 0.9948, -0.9995, 0.9920]], dtype=torch.float64)
        truth = GaussianTruth(a.T, 1e-6 * torch.ones(4, dtype=torch.float64))
        super().__init__("Gaussian", truth, seed, (train, validation, test), dtype)
