"""The fused importance-weighted log-likelihood in Triton: which kernels a decoder takes.

* gpu_narrow: at most one hidden layer, at most 8 latents and outputs together: one kernel, a sample stays in registers;
* gpu_wide: any other chain: layer after layer over a workspace of fixed size.

The rule looks at the decoder's shape alone, so that it gives the same numbers on every card. kernels/importance/reference.py
has the formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from libi_fast.kernels import gpu
from libi_fast.kernels.importance import gpu_narrow, gpu_wide, gpu_wide_backward
from libi_fast.kernels.importance.reference import Decoder, Draws


def forward(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws, num_samples: int, tail: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes as in reference.forward, float32; ``precision`` is that of the wide kernels' products."""
    top = mean.new_full((*mean.shape[:2], tail), -float("inf"))

    def keep(replicas: slice, rows: slice, first_sample: int, weights: Tensor) -> None:
        here = top[replicas, rows]
        here.copy_(torch.cat((here, weights), -1).topk(tail, -1).values)

    return *weigh(x, mean, log_scale, decoder, draws, num_samples, precision, keep if tail else None), top


def weigh(
    x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws, num_samples: int, precision: str,
    keep: gpu_narrow.Keep | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-likelihood and effective sample size; ``keep`` is given all log-weights, piece by piece, each row's in order."""
    with gpu.device_of(x):
        if gpu_narrow.takes(decoder):
            return gpu_narrow.forward(x, mean, log_scale, decoder, draws, num_samples, keep)
        return gpu_wide.forward(x, mean, log_scale, decoder, draws, num_samples, precision, keep)


def backward(
    grad: Tensor, log_likelihood: Tensor, x: Tensor, mean: Tensor, log_scale: Tensor, decoder: Decoder, draws: Draws,
    num_samples: int, kind: str, precision: str, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """As reference.backward. ``wanted`` (x, variance, ...): a gradient that is not is zero."""
    arguments = (grad, log_likelihood, x, mean, log_scale, decoder, draws, num_samples, kind)
    with gpu.device_of(x):
        if gpu_narrow.takes(decoder):
            return gpu_narrow.backward(*arguments, wanted)
        return gpu_wide_backward.backward(*arguments, precision, wanted)
