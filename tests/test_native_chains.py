"""The C++ chain kernels: step by step against the reference, the same bits whatever shares the work."""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import pytest
import torch
from common import assert_results_close, check_same_bits_for_any_number_of_threads, check_same_bits_for_instruction_set
from problems import problem
from torch import Tensor

from libi_fast.kernels import cpu
from libi_fast.kernels.chains import reference
from libi_fast.kernels.chains.reference import METHODS, Noise, Result, Settings, reference_normal, reference_uniform
from libi_fast.kernels.importance.reference import ACTIVATIONS, Decoder

if not cpu.available():
    pytest.skip(f"no compiled library: {cpu.why_unavailable()}", allow_module_level=True)

F32, F64 = torch.float32, torch.float64
SEED = torch.tensor(2**61 + 99)


class Chains(NamedTuple):
    """The arguments of a call."""

    x: Tensor
    z: Tensor
    step: Tensor
    log_scale: Tensor
    decoder: Decoder
    replicas: Tensor

    def to(self, dtype: torch.dtype) -> Chains:
        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(dtype) if value.is_floating_point() else value
            return [moved(v) for v in value] if isinstance(value, list) else value

        return Chains(
            *(moved(t) for t in self[:4]), Decoder(*(moved(part) for part in self.decoder)), self.replicas
        )  # fmt: skip

    def rows(self, rows: slice) -> Chains:
        x = self.x[:, rows]
        return self._replace(x=x, z=self.z[:, rows], step=self.step[:, rows], log_scale=self.log_scale[:, rows])


def chains(widths: list[int], activation: str = "tanh", likelihood: str = "gaussian", *, rows: int = 3, chains: int = 5,
           step: float = 0.4, replicas: int = 1, **settings: Any) -> Chains:  # fmt: skip
    p = problem(widths, activation, likelihood, rows=rows, num_samples=1, replicas=replicas, **settings)
    z = p.mean[:, :, None] + 0.5 * torch.randn(replicas, rows, chains, widths[0])
    steps = step * (0.5 + torch.rand(replicas, rows, chains))
    return Chains(p.x, z, steps, p.log_scale, p.decoder, p.replicas)


def noise(c: Chains) -> Noise:
    return Noise(SEED, c.replicas, (2, 3), reference_normal, reference_uniform)


def native(c: Chains, settings: Settings) -> Result:
    result = cpu.chains(c.x, c.z.contiguous(), c.step.contiguous(), c.log_scale, c.decoder, noise(c), settings)
    return result


def exact(c: Chains, settings: Settings) -> Result:
    def density(rows: slice, z: Tensor) -> tuple[Tensor, Tensor]:
        return reference.log_joint(c.decoder, c.x[:, rows, None], z)

    return reference.run(density, c.z, c.step, c.log_scale, noise(c), settings, c.decoder.widest)


def assert_close(found: Result, expected: Result, tolerance: float = 1e-9) -> None:
    assert_results_close(found, expected, tolerance)


CASES = [
    ([2, 50, 2], "tanh", "gaussian"),
    ([1, 7, 3], "softplus", "gaussian"),
    ([3, 5], "tanh", "bernoulli"),
    ([5, 40, 31, 30], "silu", "bernoulli"),
    ([4, 20, 7], "gelu", "gaussian"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("widths", "activation", "likelihood"), CASES, ids=str)
def test_float64_follows_the_reference(widths: list[int], activation: str, likelihood: str, method: str) -> None:
    """With adaptation, thinning and replicas of their own. Steps near the edge of stability multiply roundings, hence 1e-5."""
    c = chains(widths, activation, likelihood, replicas=2, own=2).to(F64)
    settings = Settings(method, 24, 3, 2, jitter=0.3, target=0.7, first_transition=5, first_row=9)
    found = native(c, settings)
    assert_close(found, exact(c, settings), 1e-5)
    moves = found.z.diff(dim=3).abs().amax((0, 1, 2, 4)) > 0
    assert moves.float().mean() > 0.8 and 0.05 < found.acceptance.mean() < 0.999


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    for output in ("identity", activation):
        c = chains([2, 9, 3], activation, output=output, step=0.2).to(F64)
        settings = Settings("hmc", 5, 2)
        assert_close(native(c, settings), exact(c, settings), 1e-7 if activation == "softplus" else 1e-9)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 21, 32, 33, 64, 65, 130])
def test_numbers_of_chains(count: int) -> None:
    """Rows that share a tile, rows of a tile and of several; a chain is the same in any company."""
    c = chains([2, 6, 2], chains=count, rows=5 if count < 40 else 2).to(F64)
    settings = Settings("hmc", 6, 2, jitter=0.2)
    found = native(c, settings)
    assert_close(found, exact(c, settings))
    fewer = native(c._replace(z=c.z[:, :, : count // 2 + 1], step=c.step[:, :, : count // 2 + 1]), settings)
    assert torch.equal(fewer.z, found.z[:, :, : count // 2 + 1])


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 4, 5, 8])
def test_numbers_of_latents(latent_dim: int) -> None:
    c = chains([latent_dim, 6, 2]).to(F64)
    settings = Settings("mala", 9, first_transition=2)
    assert_close(native(c, settings), exact(c, settings))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("widths", "activation", "likelihood"), CASES, ids=str)
def test_float32_decides_as_float64_does(widths: list[int], activation: str, likelihood: str, method: str) -> None:
    """Over 20 transitions: the same decisions except where |log u - log alpha| < 1e-3, and states within 1e-4 posterior
    standard deviations until then (posteriors here are a tenth wide or more)."""
    c = chains(widths, activation, likelihood, rows=8, chains=8, step=0.3)
    narrow, wide = c.to(F32), c.to(F64)
    alive = torch.ones(c.step.shape, dtype=torch.bool)
    for t in range(20):
        settings = Settings(method, 1, 4, first_transition=t)
        found, expected = native(narrow, settings), exact(wide, settings)
        log_u = noise(c).draw(reference_uniform, 3, 2, slice(0, 8), 8, slice(t, t + 1), wide.z)[..., 0, 0].log()
        close_call = (log_u - expected.acceptance.log()).abs() < 1e-3
        moved = [(r.z[:, :, :, 0] != s.z).any(-1) for r, s in ((found, narrow), (expected, wide))]
        assert not (alive & ~close_call & (moved[0] != moved[1])).any()
        alive &= ~close_call
        error = (found.z[:, :, :, 0].double() - expected.z[:, :, :, 0]).abs().amax(-1)
        assert error[alive].max() < 1e-5
        narrow, wide = narrow._replace(z=found.z[:, :, :, 0]), wide._replace(z=expected.z[:, :, :, 0])
    assert alive.float().mean() > 0.9


def test_one_call_is_many() -> None:
    c = chains([2, 20, 3])
    whole = native(c, Settings("hmc", 12, 3, jitter=0.2))
    at, kept = c, []
    for t in range(12):
        part = native(at, Settings("hmc", 1, 3, jitter=0.2, first_transition=t))
        at = at._replace(z=part.z[:, :, :, -1])
        kept.append(part.z)
    assert torch.equal(torch.cat(kept, 3), whole.z)


def test_rows_alone_and_together() -> None:
    for count in (3, 40):
        c = chains([3, 20, 3], "relu", "bernoulli", rows=6, chains=count)
        settings = Settings("hmc", 4, 2, jitter=0.1, target=0.8)
        whole = native(c, settings)
        for row in range(6):
            alone = native(c.rows(slice(row, row + 1)), settings._replace(first_row=row))
            assert all(torch.equal(a, b[:, row : row + 1]) for a, b in zip(alone, whole, strict=True))


def test_replicas_share_what_they_may() -> None:
    c = chains([2, 6, 3], replicas=3, own=1)
    c = c._replace(x=c.x[:1])
    settings = Settings("hmc", 4, 2)
    found = native(c, settings)
    for r in range(3):
        alone = Chains(c.x, c.z[r : r + 1], c.step[r : r + 1], c.log_scale[r : r + 1], c.decoder, c.replicas[r : r + 1])
        assert torch.equal(native(alone, settings).z, found.z[r : r + 1])


def test_a_chain_that_starts_at_nan_stays_and_harms_no_other() -> None:
    c = chains([2, 6, 2], rows=3, chains=4)
    bad = c._replace(z=c.z.clone())
    bad.z[0, 1, 2] = math.nan
    settings = Settings("hmc", 6, 2, target=0.8)
    found, clean = native(bad, settings), native(c, settings)
    others = torch.ones(1, 3, 4, dtype=torch.bool)
    others[0, 1, 2] = False
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[others], b[others])
    assert found.z[0, 1, 2].isnan().all() and found.log_density[0, 1, 2].isnan().all()
    assert found.acceptance[0, 1, 2] == 0 and found.divergences[0, 1, 2] == 6 and found.step[0, 1, 2].isfinite()


def test_divergences() -> None:
    c = chains([2, 6, 2], "relu", step=1e4)
    found, expected = native(c.to(F64), Settings("hmc", 5, 3)), exact(c.to(F64), Settings("hmc", 5, 3))
    assert (found.divergences == 5).all() and torch.equal(found.divergences, expected.divergences)
    assert (found.z == c.to(F64).z[:, :, :, None]).all()


def test_nothing_to_do() -> None:
    c = chains([2, 6, 2])
    none = native(c, Settings("hmc", 0, 2))
    assert none.z.shape == (1, 3, 5, 0, 2) and (none.acceptance == 0).all() and torch.equal(none.step, c.step)
    empty = native(c.rows(slice(0, 0)), Settings("hmc", 3, 2))
    assert empty.z.shape == (1, 0, 5, 3, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings("hmc", 3, 0), "a size is negative"),
        (Settings("hmc", 3, 2, jitter=1.0), "a size is negative"),
        (Settings("hmc", 3, 2, first_transition=2**32), "counter's range"),
        (Settings("hmc", 3, 2, first_row=2**32), "counter's range"),
    ],
)
def test_bad_settings_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native(chains([2, 6, 2]), settings)


@pytest.mark.parametrize("name", ["x", "z", "step", "log_scale"])
def test_tensors_of_other_rows_are_refused(name: str) -> None:
    """The kernel reads as far as the shapes of others say."""
    c = chains([2, 6, 2])
    with pytest.raises(ValueError, match="expected"):
        native(c._replace(**{name: getattr(c, name)[:, :2]}), Settings("hmc", 3, 2))


def digest() -> str:
    torch.manual_seed(3)
    found = []
    for count, dtype in ((5, F32), (70, F32), (5, F64)):
        c = chains([3, 20, 6], "gelu", chains=count, rows=7).to(dtype)
        result = native(c, Settings("hmc", 5, 3, jitter=0.2, target=0.8))
        found += [t.numpy().tobytes() for t in result]
    return hashlib.sha256(b"".join(found)).hexdigest()


def test_same_bits_for_any_number_of_threads() -> None:
    check_same_bits_for_any_number_of_threads(digest)


@pytest.mark.parametrize("isa", ["v3", "v4"])
def test_same_bits_for_instruction_sets(isa: str) -> None:
    check_same_bits_for_instruction_set(isa, "test_native_chains", digest)
