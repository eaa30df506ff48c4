"""The C++ kernel of annealed importance sampling: against the reference, the same bits whatever shares the work."""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import pytest
import torch
from common import assert_results_close, check_same_bits_for_any_number_of_threads, check_same_bits_for_instruction_set
from problems import problem
from torch import Tensor

from libi_fast.annealed import power_betas
from libi_fast.kernels import cpu
from libi_fast.kernels.annealing import reference
from libi_fast.kernels.annealing.reference import Result, Settings
from libi_fast.kernels.chains.reference import Noise, log_joint, reference_normal, reference_uniform
from libi_fast.kernels.importance.reference import Decoder

if not cpu.available():
    pytest.skip(f"no compiled library: {cpu.why_unavailable()}", allow_module_level=True)

F32, F64 = torch.float32, torch.float64
SEED = torch.tensor(2**61 + 99)
PER_ROW = ("step", "scale_tril", "mean", "log_scale")
FROZEN = Settings(3, jitter=0.3, first_transition=5, first_row=9)
ADAPTING = FROZEN._replace(rate=0.1, target=0.7)


class Annealing(NamedTuple):
    """The arguments of a call."""

    x: Tensor
    z: Tensor
    betas: Tensor
    step: Tensor
    scale_tril: Tensor
    mean: Tensor
    log_scale: Tensor
    decoder: Decoder
    replicas: Tensor

    def to(self, dtype: torch.dtype) -> Annealing:
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype) if value.is_floating_point() else value
            return [moved(v) for v in value] if isinstance(value, list) else value

        tensors = {name: moved(getattr(self, name)) for name in ("x", "z", *PER_ROW)}
        return self._replace(**tensors, decoder=Decoder(*(moved(part) for part in self.decoder)))

    def rows(self, rows: slice) -> Annealing:
        return self._replace(**{name: getattr(self, name)[:, rows] for name in ("x", "z", *PER_ROW)})

    def temperatures(self, some: slice) -> Annealing:
        """Some of them, within one window of scales."""
        return self._replace(betas=self.betas[:, some.start : some.stop + 1], step=self.step[:, :, some])


def annealing(widths: list[int], activation: str = "tanh", likelihood: str = "gaussian", *, rows: int = 3, chains: int = 5,
              temperatures: int = 12, step: float = 0.3, replicas: int = 1, windows: int = 5,
              **settings: Any) -> Annealing:  # fmt: skip
    p = problem(widths, activation, likelihood, rows=rows, num_samples=1, replicas=replicas, **settings)
    z = p.mean[:, :, None] + 0.5 * torch.randn(replicas, rows, chains, widths[0])
    steps = step * (0.5 + torch.rand(replicas, rows, temperatures))
    scale_tril = 0.3 * torch.randn(replicas, rows, windows, widths[0], widths[0]) + torch.eye(widths[0])
    return Annealing(p.x, z, power_betas(temperatures)[None], steps, scale_tril, p.mean, p.log_scale, p.decoder, p.replicas)


def noise(c: Annealing) -> Noise:
    return Noise(SEED, c.replicas, (12, 13), reference_normal, reference_uniform)


def native(c: Annealing, settings: Settings) -> Result:
    tensors = (c.x, c.z.contiguous(), c.betas, c.step.contiguous(), c.scale_tril, c.mean, c.log_scale)
    return cpu.annealing(*tensors, c.decoder, noise(c), settings)


def exact(c: Annealing, settings: Settings) -> Result:
    def density(rows: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        return log_joint(c.decoder, c.x[:, rows, None], z)

    tensors = (c.z, c.betas, c.step, c.scale_tril, c.mean, c.log_scale)
    return reference.run(density, *tensors, noise(c), settings, c.decoder.widest)


def assert_close(found: Result, expected: Result, tolerance: float = 1e-10) -> None:
    assert_results_close(found, expected, tolerance)


CASES = [
    ([2, 50, 2], "tanh", "gaussian"),
    ([1, 7, 3], "silu", "gaussian"),
    ([3, 5], "tanh", "bernoulli"),
    ([5, 40, 31, 30], "silu", "bernoulli"),
    ([4, 20, 7], "gelu", "gaussian"),
]


@pytest.mark.parametrize("settings", [FROZEN, ADAPTING], ids=["frozen", "adapting"])
@pytest.mark.parametrize(("widths", "activation", "likelihood"), CASES, ids=str)
def test_float64_follows_the_reference(widths: list[int], activation: str, likelihood: str, settings: Settings) -> None:
    """From a q of its own for each row, with replicas of their own; down the temperatures too."""
    c = annealing(widths, activation, likelihood, replicas=2, own=2).to(F64)
    for way in (c, c._replace(betas=c.betas.flip(-1))):
        found = native(way, settings)
        assert_close(found, exact(way, settings))
        assert 0.2 < found.acceptance.mean() < 1 and (found.z != c.z).any(-1).float().mean() > 0.9
        assert found.steps.shape[-1] == (12 if settings.rate else 0)
        if settings.rate:
            assert torch.equal(found.path[:, :, :, -1], found.z)
        assert found.log_weights.std() > 0.1


def test_adaptation_moves_each_chain_by_its_acceptance() -> None:
    """From steps far too large they fall by rate x target each time, from tiny ones they rise by rate (1 - target)."""
    for step, by in ((1e4, -0.1 * 0.7), (1e-6, 0.1 * 0.3)):
        c = annealing([2, 6, 2], step=step).to(F64)
        found = native(c, ADAPTING)
        expected = c.step[:, :, None] * (by * torch.arange(12.0, dtype=F64)).exp()
        torch.testing.assert_close(found.steps, expected.expand_as(found.steps), rtol=1e-3, atol=0)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 21, 32, 33, 64, 65, 130])
def test_numbers_of_chains(count: int) -> None:
    """Rows that share a tile, rows of a tile and of several; a chain is the same in any company."""
    c = annealing([2, 6, 2], chains=count, rows=5 if count < 40 else 2).to(F64)
    found = native(c, ADAPTING)
    assert_close(found, exact(c, ADAPTING))
    fewer = native(c._replace(z=c.z[:, :, : count // 2 + 1]), ADAPTING)
    for a, b in zip(fewer, found, strict=True):
        assert torch.equal(a, b[:, :, : count // 2 + 1])


def test_float32_is_float64_to_its_accuracy() -> None:
    """All moves are accepted at steps this small, so that the paths are the same."""
    c = annealing([4, 20, 7], "gelu", rows=8, chains=8, temperatures=40, step=0.03)
    found, expected = native(c.to(F32), FROZEN), exact(c.to(F64), FROZEN)
    assert expected.acceptance.min() > 0.95
    assert (found.z - expected.z).abs().median() < 1e-5
    assert (found.log_weights - expected.log_weights).abs().median() < 1e-5 * expected.log_weights.abs().max()


def test_one_call_is_many() -> None:
    c = annealing([2, 20, 3], windows=1).to(F64)
    whole, log_weights, at = native(c, FROZEN), 0.0, c
    for t in range(12):
        part = native(at.temperatures(slice(t, t + 1)), FROZEN._replace(first_transition=5 + t))
        at, log_weights = at._replace(z=part.z), log_weights + part.log_weights
    assert torch.equal(part.z, whole.z)
    torch.testing.assert_close(log_weights, whole.log_weights, rtol=1e-12, atol=1e-12)


def test_rows_alone_and_together() -> None:
    for count in (3, 40):
        c = annealing([3, 20, 3], "relu", "bernoulli", rows=6, chains=count)
        whole = native(c, ADAPTING)
        for row in range(6):
            alone = native(c.rows(slice(row, row + 1)), ADAPTING._replace(first_row=9 + row))
            assert all(torch.equal(a, b[:, row : row + 1]) for a, b in zip(alone, whole, strict=True))


def test_replicas_share_what_they_may() -> None:
    c = annealing([2, 6, 3], replicas=3, own=1)
    c = c._replace(x=c.x[:1])
    found = native(c, FROZEN)
    for r in range(3):
        own = {name: getattr(c, name)[r : r + 1] for name in ("z", *PER_ROW, "replicas")}
        alone = native(c._replace(**own), FROZEN)
        assert torch.equal(alone.log_weights, found.log_weights[r : r + 1])


def test_a_chain_that_starts_at_nan_stays_and_harms_no_other() -> None:
    c = annealing([2, 6, 2], rows=3, chains=4)
    bad = c._replace(z=c.z.clone())
    bad.z[0, 1, 2] = math.nan
    found, clean = native(bad, ADAPTING), native(c, ADAPTING)
    others = torch.ones(1, 3, 4, dtype=torch.bool)
    others[0, 1, 2] = False
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[others], b[others])
    assert found.z[0, 1, 2].isnan().all() and found.log_weights[0, 1, 2].isnan()
    assert found.acceptance[0, 1, 2] == 0 and found.steps[0, 1, 2].isfinite().all()


def test_nothing_to_do() -> None:
    c = annealing([2, 6, 2])
    empty = native(c.rows(slice(0, 0)), ADAPTING)
    assert empty.z.shape == (1, 0, 5, 2) and empty.path.shape == (1, 0, 5, 12, 2)
    assert [t.shape for t in exact(c.rows(slice(0, 0)), ADAPTING)] == [t.shape for t in empty]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FROZEN._replace(leapfrogs=0), "a size is negative"),
        (FROZEN._replace(jitter=1.0), "a size is negative"),
        (FROZEN._replace(rate=math.nan), "a size is negative"),
        (FROZEN._replace(target=1.0), "a size is negative"),
        (FROZEN._replace(first_transition=2**32), "counter's range"),
        (FROZEN._replace(first_row=2**32), "counter's range"),
    ],
)
def test_bad_settings_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native(annealing([2, 6, 2]), settings)


def test_bad_betas_are_refused() -> None:
    c = annealing([2, 6, 2])
    for bad in (-0.1, 1.1, math.nan):
        betas = c.betas.clone()
        betas[0, 3] = bad
        with pytest.raises(ValueError, match="a size is negative"):
            native(c._replace(betas=betas), FROZEN)
    with pytest.raises(ValueError, match="expected float64"):
        native(c._replace(betas=c.betas.float()), FROZEN)
    with pytest.raises(ValueError, match="a size is negative"):
        native(c.temperatures(slice(0, 0)), FROZEN)


@pytest.mark.parametrize("name", ["x", "z", *PER_ROW])
def test_tensors_of_other_rows_are_refused(name: str) -> None:
    """The kernel reads as far as the shapes of others say."""
    c = annealing([2, 6, 2])
    with pytest.raises(ValueError, match="expected"):
        native(c._replace(**{name: getattr(c, name)[:, :2]}), FROZEN)


def digest() -> str:
    torch.manual_seed(3)
    found = []
    for count, dtype in ((5, F32), (70, F32), (5, F64)):
        c = annealing([3, 20, 6], "gelu", chains=count, rows=7).to(dtype)
        found += [t.numpy().tobytes() for t in native(c, ADAPTING)]
    return hashlib.sha256(b"".join(found)).hexdigest()


def test_same_bits_for_any_number_of_threads() -> None:
    check_same_bits_for_any_number_of_threads(digest)


@pytest.mark.parametrize("isa", ["v3", "v4"])
def test_same_bits_for_instruction_sets(isa: str) -> None:
    check_same_bits_for_instruction_set(isa, "test_native_annealing", digest)
