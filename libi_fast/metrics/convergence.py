"""Whether Markov chains have converged: rank-normalised split R-hat and effective sample sizes, for batches of chains."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.ops import _library as lib

BLOCK_VALUES = 2**18  # draws looked at together; they take about 100 bytes each
KINDS = ("bulk", "tail", "mean")
LEAST_DRAWS = 4  # two for each half of a chain
TAILS = (0.05, 0.95)
NO_SPREAD = 1e-15  # ArviZ's, an absolute one: draws no further apart count as equal


def _by_blocks(draws: Tensor, least_chains: int, measure: Callable[[Tensor], Tensor]) -> Tensor:
    """[..., C, T, L] -> [..., L], where ``measure`` takes a contiguous float64 [n, C, T] to [n]."""
    members = draws.movedim(-1, -3)
    *outer, chains, length = members.shape
    result = draws.new_full((math.prod(outer),), math.nan)
    if chains >= least_chains and length >= LEAST_DRAWS:
        step = max(1, BLOCK_VALUES // (chains * length))
        for start in range(0, len(result), step):
            some = torch.arange(start, min(start + step, len(result)), device=draws.device)
            block = members[torch.unravel_index(some, outer)].double().contiguous()  # a reshape would copy everything
            result[start : start + step] = measure(block).masked_fill_(block.flatten(1).amax(1).isnan(), math.nan)
    return result.view(outer)


def _halves(x: Tensor) -> Tensor:
    """[n, C, T] -> [n, 2 C, T // 2]; the middle draw of an odd T is left out."""
    half = x.shape[2] // 2
    return torch.stack((x[..., :half], x[..., -half:]), 2).flatten(1, 2)


def _normal_quantiles(count: int, device: torch.device) -> Tensor:
    """Blom's normal scores of the ranks 1, 1.5, 2 ... count: average ranks are multiples of a half."""
    rank = torch.arange(2, 2 * max(count, 1) + 1, dtype=torch.float64, device=device) / 2
    return torch.special.ndtri((rank - 0.375) / (count + 0.25))


def _normal_scores(ordered: Tensor, place: Tensor, table: Tensor) -> Tensor:
    """Normal scores [n, count] of ranks, equal values sharing their average rank, from values in order and their places."""
    members, count = ordered.shape
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=fresh[:, 1:])
    first = fresh.view(-1).nonzero().squeeze(1)  # of each run of equal values, over all members
    equal = torch.diff(first, append=first.new_tensor([members * count]))
    scores = table[2 * (first % count) + equal - 1].repeat_interleave(equal, output_size=members * count)
    z = torch.empty_like(ordered).scatter_(1, place, scores.view(members, count))
    z[ordered[:, -1].isnan()] = math.nan  # infinity minus an infinite median
    return z


def _variance(x: Tensor) -> Tensor:
    """Of the last dimension. torch.var takes ten times as long."""
    return (x - x.mean(-1, keepdim=True)).square_().sum(-1) / (x.shape[-1] - 1)


def _plain_r_hat(chains: Tensor) -> Tensor:
    length = chains.shape[2]
    start = chains[..., :1]
    moved = chains - start  # a chain that stands still has variance 0, whatever the rounding
    between_over_within = length * _variance(moved.mean(2) + start.squeeze(2)) / _variance(moved).mean(1)
    return ((between_over_within + length - 1) / length).sqrt()


def _plain_size(chains: Tensor) -> Tensor:
    """Geyer's estimate: autocorrelations are summed in pairs, up to the first pair that is not positive, none larger than the
    one before it. [n, chains, draws] -> [n]."""
    _, count, length = chains.shape
    mean = chains.mean(2, keepdim=True)
    padded = 2 ** (2 * length - 2).bit_length()  # so that no lag wraps around
    spectrum = torch.view_as_real(torch.fft.rfft(chains - mean, padded))
    power = spectrum.square_().mean(1).sum(2)  # the chains' mean before the way back, which is linear
    covariance = torch.fft.irfft(power, padded)[:, :length] / length
    within = covariance[:, :1] * (length / (length - 1))
    rho = 1 - (within - covariance) / (covariance[:, :1] + _variance(mean.squeeze(2))[:, None])
    undefined = rho[:, 0].isnan()
    rho[:, 0] = 1
    largest = max(0, (length - 3) // 2)  # past it the lags hold too few products
    pairs = rho[:, : 2 * largest + 2].unflatten(1, (-1, 2))
    sums = pairs.sum(2)
    end = (sums > 0).cumprod(1).sum(1, keepdim=True).clamp_max_(largest)
    full = (sums.cummin(1).values * (torch.arange(largest + 1, device=end.device) < end)).sum(1)
    # Of the pair it ends at, the even lag alone, and once: not in Geyer, but in the paper's code and in ArviZ.
    even, total = pairs[..., 0].gather(1, end).squeeze(1), sums.gather(1, end).squeeze(1)
    tau = 2 * full - 1 + torch.where((even > 0) | (total >= 0), even, 0)
    size = count * length / tau.clamp_min(1 / math.log10(count * length))
    spread = chains.amax((1, 2)) - chains.amin((1, 2))
    return size.masked_fill_(undefined, math.nan).masked_fill_(spread < NO_SPREAD, count * length)


def _quantile(x: Tensor, level: float) -> Tensor:
    """Linear between order statistics, [n, count] -> [n]. Not torch.quantile: its rounding would move draws across."""
    count = x.shape[1]
    at = count * level + (1 - level)  # counted from 1
    below = math.floor(at)
    part = at - below
    if level < 0.5:
        lower, upper = x.topk(below + 1, largest=False).values[:, -2:].unbind(1)
    else:
        upper, lower = x.topk(count - below + 1).values[:, -2:].unbind(1)
    return (1 - part) * lower + part * upper


@torch.no_grad()
def r_hat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat: 1 for chains that agree, above 1.01 where they have not converged.

    Each chain is cut in half, and the draws are replaced by normal scores of their ranks. The larger of two values: of the
    draws, which sees chains at different places, and of their distances from the median, which sees different scales.

    As in ArviZ: NaN for a quantity with a NaN draw, where all draws are equal, for fewer than 2 chains or 4 draws a chain;
    infinity where no half of a chain moves and they differ. An odd number of draws loses the middle one. A quantity depends
    on its own draws alone. Beside input and result, memory is that of BLOCK_VALUES draws at a time, or of one quantity's.

    Args:
        draws: [..., C, T, L] float32 or float64: C chains of T draws each, of L quantities. Computed in float64.

    Returns:
        [..., L] of draws' dtype; not differentiable.

    Raises:
        InputError: fewer than 3 dimensions.
        TypeError: not a dense tensor of float32 or float64.

    Source:
        Vehtari, Gelman, Simpson, Carpenter & Buerkner 2021; arviz.rhat(method="rank") agrees.
    """
    lib.check_tensor("draws", draws, least_dims=3)
    table = _normal_quantiles(draws.shape[-3] * (draws.shape[-2] // 2) * 2, draws.device)

    def measure(x: Tensor) -> Tensor:
        halves = _halves(x)
        ordered, place = halves.flatten(1).sort(1)
        bulk = _plain_r_hat(_normal_scores(ordered, place, table).view(halves.shape))
        middle = ordered.shape[1] // 2
        median = (ordered[:, middle - 1] + ordered[:, middle]) / 2
        outwards = (ordered - median[:, None]).abs_()
        for t in (outwards, place):  # two rising runs, which a stable sort merges several times as fast as it sorts draws
            t[:, :middle] = t[:, :middle].flip(1)
        distance, again = outwards.sort(dim=1, stable=True)
        tail = _plain_r_hat(_normal_scores(distance, place.gather(1, again), table).view(halves.shape))
        return torch.where(tail > bulk, tail, bulk)  # draws of two values have distances all equal, and no tail

    return _by_blocks(draws, 2, measure)


@torch.no_grad()
def effective_sample_size(draws: Tensor, kind: str = "bulk") -> Tensor:
    """How many independent draws would do as well as these of Markov chains, from the autocorrelations within half chains and
    the differences between them.

    As in ArviZ: NaN for a quantity with a NaN draw (for "mean" also infinity) and for fewer than 4 draws a chain; S, the
    number of draws, where all are equal; never above S log10(S). Odd T, blocks and memory as in :func:`r_hat`.

    Args:
        draws: [..., C, T, L] float32 or float64: C chains (one will do) of T draws each, of L quantities. Computed in float64.
        kind: "bulk", of the ranks' normal scores; "tail", the smaller of those for the 5% and the 95% quantile; "mean", for
            the mean, of the draws as they are.

    Returns:
        [..., L] of draws' dtype; not differentiable.

    Raises:
        InputError: fewer than 3 dimensions, an unknown kind.
        TypeError: not a dense tensor of float32 or float64.

    Source:
        Vehtari et al. 2021; Geyer 1992, the initial monotone sequence; arviz.ess(method=kind) agrees.
    """
    lib.check_tensor("draws", draws, least_dims=3)
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    table = _normal_quantiles(draws.shape[-3] * (draws.shape[-2] // 2) * 2 if kind == "bulk" else 0, draws.device)

    def measure(x: Tensor) -> Tensor:
        if kind == "bulk":
            halves = _halves(x)
            return _plain_size(_normal_scores(*halves.flatten(1).sort(1), table).view(halves.shape))
        if kind == "mean":
            return _plain_size(_halves(x))
        low, high = (_plain_size(_halves((x <= _quantile(x.flatten(1), p)[:, None, None]).double())) for p in TAILS)
        return torch.minimum(low, high)

    return _by_blocks(draws, 1, measure)
