"""Data: synthetic sets with a known truth, real sets that ship with scikit-learn, and users' own files."""

from libi_fast.data.dataset import Dataset, Split, find_name, known_names, load
from libi_fast.data.files import READABLE, Table, check_output, default_columns, load_table, map_rows, save_table
from libi_fast.data.nonlinear import CubicJTEx, Mobius, QuadratureTruth
from libi_fast.data.real import digits, wine
from libi_fast.data.standardizer import Standardizer
from libi_fast.data.synthetic import GaussianExample, GaussianTruth, LinearJTEx, SyntheticDataset

__all__ = [
    "READABLE",
    "CubicJTEx",
    "Dataset",
    "GaussianExample",
    "GaussianTruth",
    "LinearJTEx",
    "Mobius",
    "QuadratureTruth",
    "Split",
    "Standardizer",
    "SyntheticDataset",
    "Table",
    "check_output",
    "default_columns",
    "digits",
    "find_name",
    "known_names",
    "load",
    "load_table",
    "map_rows",
    "save_table",
    "wine",
]
