"""Likelihoods of latent-variable models: fused kernels, and LiBI.

>>> import libi_fast as lf
"""

from libi_fast import data
from libi_fast.annealed import AnnealedLogLikelihood, BidirectionalGap, annealed_log_likelihood, bidirectional_gap
from libi_fast.errors import DivergenceWarning, InputError, ParetoWarning
from libi_fast.estimators import LogLikelihood, log_likelihood, pareto_k
from libi_fast.metrics import AggregatedPosterior, aggregated_posterior, energy_distance
from libi_fast.metrics.convergence import effective_sample_size, r_hat
from libi_fast.models.laplace import mutual_information
from libi_fast.models.likelihoods import Bernoulli, DiagonalGaussian, Gaussian, Likelihood
from libi_fast.models.linear_gaussian import (
    closest_mean_field,
    exact_log_likelihood,
    exact_mutual_information,
    exact_posterior,
    linear_gaussian_marginal,
    mean_field_gap,
)
from libi_fast.models.model import LatentVariableModel, MeanField, MeanFieldGaussian
from libi_fast.models.networks import Cube, JTExMap, mlp
from libi_fast.models.proposals import (
    Defensive,
    FullCovariance,
    FullCovarianceGaussian,
    GaussianMixture,
    MixtureGaussian,
    Proposal,
    laplace_mixture,
    laplace_proposal,
)
from libi_fast.models.quadrature import quadrature_log_likelihood
from libi_fast.ops._library import use_backend
from libi_fast.ops.henze_zirkler import HenzeZirkler, henze_zirkler
from libi_fast.ops.log_mean_exp import log_mean_exp
from libi_fast.ops.random import Stream, philox_normal, philox_uniform
from libi_fast.ops.smooth_knn import smooth_knn
from libi_fast.posterior import PosteriorSamples, sample_posterior
from libi_fast.runs import load
from libi_fast.training import IWAE, METHODS, VAE, LaggingVAE, LiBI, Method, fit_grid, fit_inference
from libi_fast.training.constraints import Constraint, MutualInformation

__all__ = [
    "IWAE",
    "METHODS",
    "VAE",
    "AggregatedPosterior",
    "AnnealedLogLikelihood",
    "Bernoulli",
    "BidirectionalGap",
    "Constraint",
    "Cube",
    "Defensive",
    "DiagonalGaussian",
    "DivergenceWarning",
    "FullCovariance",
    "FullCovarianceGaussian",
    "Gaussian",
    "GaussianMixture",
    "HenzeZirkler",
    "InputError",
    "JTExMap",
    "LaggingVAE",
    "LatentVariableModel",
    "LiBI",
    "Likelihood",
    "LogLikelihood",
    "MeanField",
    "MeanFieldGaussian",
    "Method",
    "MixtureGaussian",
    "MutualInformation",
    "ParetoWarning",
    "PosteriorSamples",
    "Proposal",
    "Stream",
    "aggregated_posterior",
    "annealed_log_likelihood",
    "bidirectional_gap",
    "closest_mean_field",
    "data",
    "effective_sample_size",
    "energy_distance",
    "exact_log_likelihood",
    "exact_mutual_information",
    "exact_posterior",
    "fit_grid",
    "fit_inference",
    "henze_zirkler",
    "laplace_mixture",
    "laplace_proposal",
    "linear_gaussian_marginal",
    "load",
    "log_likelihood",
    "log_mean_exp",
    "mean_field_gap",
    "mlp",
    "mutual_information",
    "pareto_k",
    "philox_normal",
    "philox_uniform",
    "quadrature_log_likelihood",
    "r_hat",
    "sample_posterior",
    "smooth_knn",
    "use_backend",
]
