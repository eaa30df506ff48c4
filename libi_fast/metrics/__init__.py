"""Distances between samples, and other measures of a fitted model."""

from libi_fast.metrics.aggregate import AggregatedPosterior, aggregated_posterior
from libi_fast.metrics.energy import energy_distance

__all__ = ["AggregatedPosterior", "aggregated_posterior", "energy_distance"]
