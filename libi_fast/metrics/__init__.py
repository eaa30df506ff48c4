"""Distances between samples, and other measures of a fitted model."""

from libi_fast.metrics.energy import energy_distance

__all__ = ["energy_distance"]
