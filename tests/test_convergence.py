"""R-hat and effective sample sizes: against ArviZ, what they see in chains, bad members, blocks and memory."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import pytest
import torch
from torch import Tensor

from libi_fast.errors import InputError
from libi_fast.metrics import convergence
from libi_fast.metrics.convergence import KINDS, effective_sample_size, r_hat

MEASURES = ("r_hat", *KINDS)
FAMILIES = (
    "independent", "autoregressive", "antithetic", "means", "scales", "drifting", "heavy", "rejections", "integers", "coins",
)  # fmt: skip


def chains(family: str, batch: tuple[int, ...] = (), count: int = 4, length: int = 200, quantities: int = 2) -> Tensor:
    """[*batch, count, length, quantities] in float64."""
    z = torch.randn(*batch, count, length, quantities, dtype=torch.float64)
    if family in ("autoregressive", "antithetic"):
        keep = {"autoregressive": 0.8, "antithetic": -0.5}[family]
        for t in range(1, length):
            z[..., t, :] = keep * z[..., t - 1, :] + math.sqrt(1 - keep**2) * z[..., t, :]
    ramp = torch.linspace(-1, 1, max(count, 2), dtype=torch.float64)[:count, None, None]
    return {
        "means": lambda: z + ramp,
        "scales": lambda: z * (1.5 * ramp).exp(),
        "drifting": lambda: z + torch.linspace(0, 2, length, dtype=torch.float64)[:, None],
        "heavy": lambda: z / torch.randn_like(z),  # Cauchy
        "rejections": lambda: z[..., torch.sort(torch.randint(0, max(1, length // 3), (length,))).values, :],
        "integers": lambda: (2 * z).round(),
        "coins": lambda: (z > 0).double(),
    }.get(family, lambda: z)()


def measure(name: str, draws: Tensor) -> Tensor:
    return r_hat(draws) if name == "r_hat" else effective_sample_size(draws, kind=name)


def of_arviz(name: str, draws: Tensor) -> Tensor:
    def one(x: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            return float(arviz.rhat(x, method="rank") if name == "r_hat" else arviz.ess(x, method=name))

    flat = draws.double().movedim(-1, -3).reshape(-1, *draws.shape[-3:-1]).numpy()
    return torch.tensor([one(x) for x in flat], dtype=torch.float64).reshape(*draws.shape[:-3], draws.shape[-1])


def assert_same(found: Tensor, expected: Tensor) -> None:
    """But for rounding: MKL's Fourier transforms on several threads depend on how many there are at once."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, equal_nan=True)


def assert_agrees(draws: Tensor, name: str, rtol: float = 1e-10) -> None:
    expected = of_arviz(name, draws)
    if name == "r_hat":  # where no chain moves, rounding makes its infinity a large number
        expected[expected > 1e6] = math.inf
    torch.testing.assert_close(measure(name, draws), expected, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_against_arviz(family: str, name: str) -> None:
    """Odd numbers of draws, one chain, and the smallest, whose sums of autocorrelations are cut by the length."""
    for count, length in [(4, 200), (3, 101), (1, 250), (1, 4), (2, 5), (2, 6), (3, 7), (2, 9), (2, 10), (5, 13), (2, 18)]:
        assert_agrees(chains(family, (2,), count, length), name)
    assert_agrees(100 + 1e-3 * chains(family, (2, 1)), name, rtol=1e-8)  # an offset costs digits of the draws themselves


@pytest.mark.parametrize("family", ["means", "scales", "drifting"])
def test_r_hat_sees_chains_that_disagree(family: str) -> None:
    assert float(r_hat(chains(family, (20,), length=500)).min()) > 1.01
    assert float(r_hat(chains("independent", (20,), length=2000)).max()) < 1.01


def test_sizes_of_known_processes() -> None:
    """S (1 - a) / (1 + a) for the mean of an autoregressive process; an antithetic one is worth more than S."""
    for family, expected in [("independent", 4000.0), ("autoregressive", 4000 * 0.2 / 1.8), ("antithetic", 4000 * 1.5 / 0.5)]:
        draws = chains(family, (30,), length=1000)
        for name in ("bulk", "mean"):
            assert abs(float(measure(name, draws).mean()) / expected - 1) < 0.1
    assert float(effective_sample_size(chains("means", (5,))).max()) < 40  # chains apart are worth few draws, however many


def test_invariances() -> None:
    draws = chains("autoregressive", (3,), 5, 151)
    for name in MEASURES:
        found = measure(name, draws)
        assert_same(measure(name, draws[:, torch.randperm(5)]), found)
        torch.testing.assert_close(measure(name, -3 * draws + 7), found, rtol=1e-10, atol=0)
    for name in ("bulk", "tail"):  # ranks do not see units
        exact = chains("integers", (3,), 5, 151) if name == "tail" else draws  # whose quantiles are draws
        assert_same(measure(name, exact.exp()), measure(name, exact))


def test_shapes_views_and_dtypes() -> None:
    draws = chains("autoregressive", (2, 3))
    for name in MEASURES:
        found = measure(name, draws)
        assert found.shape == (2, 3, 2)
        assert_same(found[1, 2], measure(name, draws[1, 2]))
        assert_same(found.mT, measure(name, draws.movedim(-1, 1)[..., None]).squeeze(-1))
        view = draws.permute(4, 3, 1, 2, 0).contiguous().permute(4, 2, 3, 1, 0)
        assert_same(found, measure(name, view))
        assert measure(name, draws[:0]).shape == (0, 3, 2)
        assert measure(name, draws[..., :0]).shape == (2, 3, 0)
        single = draws.float().requires_grad_()
        in_single = measure(name, single)
        assert in_single.dtype == torch.float32
        assert not in_single.requires_grad
        assert torch.equal(in_single, measure(name, single.detach().double()).float())


@pytest.mark.parametrize("name", MEASURES)
def test_blocks_move_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = chains("rejections", (7,), 3, 40, 3)
    whole = measure(name, draws)
    for budget in (1, 3 * 40 * 2, 3 * 40 * 3 * 2, 3 * 40 * 3 * 7):
        monkeypatch.setattr(convergence, "BLOCK_VALUES", budget)
        assert_same(measure(name, draws), whole)


def bad_members() -> Tensor:
    """[9, 3, 20, 1]: the first and the last are good."""
    draws = chains("autoregressive", (9,), 3, 20, 1)
    draws[1, 1, 5] = math.nan
    draws[2] = math.nan
    draws[3] = 4.7  # all equal
    draws[4] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)[:, None, None]  # no chain moves
    draws[5, 1] = 0.3  # one chain does not
    draws[6, 0, 3], draws[6, 1, 2] = math.inf, -math.inf
    draws[7, :, 3:] = math.inf  # the median too
    return draws


@pytest.mark.parametrize("name", MEASURES)
def test_bad_members_harm_no_other(name: str) -> None:
    draws = bad_members()
    found = measure(name, draws).squeeze(1)
    assert_same(found[[0, 8]], measure(name, draws[[0, 8]]).squeeze(1))
    assert bool(found[[0, 5, 8]].isfinite().all())
    assert bool(found[[1, 2]].isnan().all())
    if name == "r_hat":
        assert math.isnan(found[3])
        assert math.isinf(found[4])
    else:
        assert float(found[3]) == 60
    assert_agrees(draws, name)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (2, 4, 0, 2), (2, 0, 8, 2)])
def test_too_few_draws(shape: tuple[int, ...], name: str) -> None:
    assert measure(name, torch.zeros(shape)).shape == (2, 2)
    assert bool(measure(name, torch.zeros(shape)).isnan().all())


def test_one_chain() -> None:
    draws = chains("autoregressive", count=1)
    assert bool(r_hat(draws).isnan().all())
    assert all(bool(effective_sample_size(draws, kind=kind).isfinite().all()) for kind in KINDS)


def test_memory_is_that_of_a_block() -> None:
    """4 million draws, whose ranks would take 400 MB all at once."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    program = """
import torch
from libi_fast.metrics.convergence import effective_sample_size, r_hat
torch.set_num_threads(1)
def level(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
base = torch.randn(50, 64, 200, 2)
draws = base.expand(3, 50, 64, 200, 2)  # which a reshape would copy
before = level("VmRSS")
r_hat(draws), effective_sample_size(draws)
print(level("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 150


@pytest.mark.parametrize(
    ("error", "message", "draws", "options"),
    [
        (InputError, "draws must have at least 3 dim", torch.zeros(5, 2), {}),
        (TypeError, "draws must be a torch.Tensor, got ndarray", np.zeros((4, 10, 2)), {}),
        (TypeError, "draws must be float32 or float64, got int64", torch.zeros(4, 10, 2, dtype=torch.int64), {}),
        (TypeError, "draws must be a dense tensor", torch.zeros(4, 10, 2).to_sparse(), {}),
        (InputError, "kind must be one of 'bulk', 'tail', 'mean', got 'median'", torch.zeros(4, 10, 2), {"kind": "median"}),
    ],
)
def test_bad_input(error: type[Exception], message: str, draws: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        effective_sample_size(draws, **options)
    if not options:
        with pytest.raises(error, match=message):
            r_hat(draws)
