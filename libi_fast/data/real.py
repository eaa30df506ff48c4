"""Two real data sets that ship with scikit-learn: nothing is downloaded."""

from __future__ import annotations

import torch

from libi_fast.data.dataset import Dataset, Split
from libi_fast.errors import InputError
from libi_fast.ops.random import Stream, philox_uniform

DEQUANTISATION_SEED = 0


def digits(seed: int = 0, dtype: torch.dtype = torch.float32) -> Dataset:
    """Handwritten digits, 1797 images of 8 x 8, as (pixel + uniform) / 17: continuous, in (0, 1), D = 64.

    The uniforms have a seed of their own, and row r's depend on r alone; ``seed`` only shuffles the 60/20/20 split.
    Source: sklearn.datasets.load_digits. Raises InputError where scikit-learn is missing.
    """
    bunch = _sklearn_datasets().load_digits()
    pixels = torch.from_numpy(bunch.data).double()
    noise = philox_uniform(DEQUANTISATION_SEED, *pixels.shape, stream=Stream.DATA, dtype=torch.float64)
    return Split(seed=seed).apply("digits", (pixels + noise) / 17, list(bunch.feature_names), dtype)


def wine(seed: int = 0, dtype: torch.dtype = torch.float32) -> Dataset:
    """Thirteen chemical measurements of 178 wines, in their own units; ``seed`` shuffles the 60/20/20 split.

    Source: sklearn.datasets.load_wine. Raises InputError where scikit-learn is missing.
    """
    bunch = _sklearn_datasets().load_wine()
    return Split(seed=seed).apply("wine", torch.from_numpy(bunch.data).double(), list(bunch.feature_names), dtype)


def _sklearn_datasets():  # type: ignore[no-untyped-def]
    try:
        from sklearn import datasets
    except ImportError as error:
        raise InputError("this data set needs scikit-learn: pip install 'libi-fast[full]'") from error
    return datasets
