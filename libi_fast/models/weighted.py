"""Weighted samples of any model and any proposal, in plain torch, tile after tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from libi_fast.kernels.importance import reference
from libi_fast.models.laplace import log_joint
from libi_fast.models.model import LatentVariableModel
from libi_fast.models.proposals import Proposal, widest_layer
from libi_fast.ops.importance import Settings
from libi_fast.ops.random import Stream, philox_normal, philox_uniform


class WeightedTile(NamedTuple):
    """Codes z [n, s, L] of a block of rows, with log p(x, z) and log q(z) [n, s]."""

    z: Tensor
    log_joint: Tensor
    log_q: Tensor


def rows_at_once(model: LatentVariableModel, x: Tensor, q: Proposal) -> int:
    """Of one sample each, so that no layer holds more than the reference's TILE_VALUES."""
    return max(1, reference.TILE_VALUES // max(widest_layer(model, x), q.components * model.latent_dim))


def weighted_tiles(
    model: LatentVariableModel, x: Tensor, q: Proposal, key: Tensor, settings: Settings, rows: slice,
    chunk_size: int | None = None,
) -> Iterator[WeightedTile]:  # fmt: skip
    """The samples of these rows in order, with the draws of a mean-field proposal: number sample * L + latent of a row; and, of
    stream MIXTURE, number sample for the choice of a component."""
    latent_dim, count = model.latent_dim, rows.stop - rows.start
    common: dict[str, Any] = {
        "first_row": settings.first_row + rows.start, "dtype": x.dtype, "device": x.device, "backend": settings.backend,
    }  # fmt: skip
    step = chunk_size or max(1, rows_at_once(model, x, q) // max(count, 1))
    for samples in reference.blocks(settings.num_samples, step):
        first, size = samples.start, samples.stop - samples.start
        noise = philox_normal(
            key, count, size * latent_dim, first_draw=first * latent_dim, stream=settings.stream, **common
        ).unflatten(-1, (size, latent_dim))  # fmt: skip
        uniform = None
        if q.needs_uniform:
            uniform = philox_uniform(key, count, size, first_draw=first, stream=Stream.MIXTURE, **common)
        z = q.draw(noise, uniform, rows)
        yield WeightedTile(z, log_joint(model, x[rows], z), q.log_prob(z, rows))
