"""The C++ importance kernels: against the reference in float64 and float32, the same bits whatever shares the work."""

from __future__ import annotations

import hashlib
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import check_same_bits_for_any_number_of_threads, check_same_bits_for_instruction_set, results_of_instruction_sets
from problems import Problem, compare, exact, native, problem
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels import cpu
from libi_fast.kernels.importance.reference import ACTIVATIONS, GRADIENTS

if not cpu.available():
    pytest.skip(f"no compiled library: {cpu.why_unavailable()}", allow_module_level=True)

F32, F64 = torch.float32, torch.float64
# From latents to outputs: one layer, narrow and wide gradients' sums (512 weights part them), blocks of 14 and 6 with rests.
WIDTHS = [[3, 5], [2, 6, 3], [1, 4, 1], [4, 20, 7], [2, 50, 2], [5, 40, 31, 30], [9, 15, 29, 43], [3, 70, 1]]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh results hold NaN, so that a number never written is seen."""
    fresh = Tensor.new_empty

    def filled(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return fresh(self, *arguments, **options).fill_(math.nan)

    monkeypatch.setattr(Tensor, "new_empty", filled)


def close(p: Problem, tolerance: float = 2e-11) -> dict[str, Tensor]:
    """In float64, in units of each result's largest value."""
    found, truth = native(p, F64), exact(p)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert found[name].shape == value.shape, name
        if value.numel():
            error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-300)
            assert error <= tolerance, f"{name}: {error:.1e}"
    return found


def check(p: Problem) -> dict[str, Tensor]:
    close(p)
    return compare(p, native(p, F32), 4.0, 4e-6)  # of few numbers; the next test has the errors of many


@pytest.mark.parametrize(
    ("widths", "activation", "likelihood", "rows"),
    [
        ([2, 50, 2], "tanh", "gaussian", 100),
        ([2, 50, 2], "gelu", "bernoulli", 100),
        ([10, 60, 200], "tanh", "bernoulli", 30),
        ([10, 60, 200], "silu", "gaussian", 30),
    ],
)
def test_float32_errs_at_most_twice_as_much_as_torch(widths: list[int], activation: str, likelihood: str, rows: int) -> None:
    """Root mean square errors against float64, over four problems."""
    squares: dict[str, list[tuple[float, float]]] = {}
    for seed in range(4):
        torch.manual_seed(seed)
        p = problem(widths, activation, likelihood, rows=rows, num_samples=128, diagonal=False)
        found, truth, rounded = native(p, F32), exact(p), exact(p, F32)
        for name, value in truth.items():
            if value.numel():
                both = [float((r[name].double() - value).square().mean() / value.square().mean()) for r in (found, rounded)]
                squares.setdefault(name, []).append((both[0], both[1]))
    for name, pairs in squares.items():
        if truth[name].numel() > 10:  # of fewer numbers, luck decides
            ours, torchs = (math.sqrt(sum(s)) for s in zip(*pairs, strict=True))
            assert ours <= 2 * torchs, f"{name}: {ours:.1e}, torch's {torchs:.1e}"


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_likelihood_and_gradient(activation: str, likelihood: str, kind: str) -> None:
    check(problem([2, 21, 3], activation, likelihood, kind=kind, num_samples=70, tail=2))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_activations(activation: str, likelihood: str) -> None:
    check(problem([2, 4, 2], "tanh", likelihood, output=activation, num_samples=40))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_widths(widths: list[int], likelihood: str) -> None:
    check(problem(widths, "softplus", likelihood, rows=4, num_samples=67, replicas=2, own=2, tail=4, bias=widths[0] != 4))


@pytest.mark.parametrize("latent_dim", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 21, 32, 33, 63, 64, 65, 128, 1023, 1025, 2048])
def test_samples(num_samples: int, latent_dim: int) -> None:
    """Rows that share a tile and rows of many, with every packing of the draws; segments of 1024."""
    rows = 70 if num_samples < 3 else 14 if num_samples < 64 else 2
    check(problem([latent_dim, 6, 2], rows=rows, num_samples=num_samples, tail=min(num_samples, 7)))


@pytest.mark.parametrize("rows", [1, 2, 17, 130])
def test_rows(rows: int) -> None:
    """One part, several, as many as there may be."""
    check(problem([2, 5, 3], rows=rows, num_samples=130))


@pytest.mark.parametrize("own", [1, 3])
def test_replicas(own: int) -> None:
    p = problem([2, 4, 2], "elu", "bernoulli", rows=2, replicas=3, own=own, diagonal=False)
    found = check(p._replace(x=p.x[:1].expand(3, -1, -1)))
    assert found["log_likelihood"].unique().numel() == 6


def test_many_replicas() -> None:
    check(problem([2, 9, 2], rows=5, num_samples=20, replicas=50, own=50))


def test_data_shared_by_replicas() -> None:
    p = problem([2, 4, 2], rows=3, replicas=2)
    check(p._replace(x=p.x[:1]))


SHARED = ("x", "variance", "weight_0", "bias_0", "weight_1", "bias_1")


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(
    "shared",
    [("variance",), ("weight_0", "bias_0"), ("weight_0",), ("bias_1",), SHARED[:1] + SHARED[2:], ("x",), ("x", "variance")],
    ids="-".join,
)
def test_replicas_that_share_some_tensors(shared: tuple[str, ...], kind: str) -> None:
    p = problem([2, 6, 3], rows=4, num_samples=40, replicas=3, own=3, kind=kind, tail=2)
    tensors = {
        name: t[:1] if name in shared else t for name, t in zip(SHARED, (p.x, p.decoder.variance, *flat(p)), strict=True)
    }
    assert all(t.shape[0] == (1 if name in shared else 3) for name, t in tensors.items())
    decoder = p.decoder._replace(
        weights=[tensors["weight_0"], tensors["weight_1"]], biases=[tensors["bias_0"], tensors["bias_1"]],
        variance=tensors["variance"],
    )  # fmt: skip
    check(p._replace(x=tensors["x"], decoder=decoder))


def flat(p: Problem) -> list[Tensor]:
    return [t for pair in zip(p.decoder.weights, p.decoder.biases, strict=True) for t in pair if t is not None]


@pytest.mark.parametrize("diagonal", [True, False])
def test_variance(diagonal: bool) -> None:
    check(problem([2, 4, 5], rows=9, diagonal=diagonal, num_samples=100))


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3)))
def test_only_what_is_wanted(wanted: tuple[bool, bool, bool]) -> None:
    p = problem([2, 4, 3], rows=3)
    found, truth = native(p._replace(wanted=wanted), F64), exact(p)
    asked = dict(zip(("to_x", "to_variance", "to_weight", "to_bias"), (*wanted, wanted[2]), strict=True))
    for name, value in truth.items():
        there = next((a for start, a in asked.items() if name.startswith(start)), True)
        assert torch.allclose(found[name], value if there else torch.zeros_like(value)), name


def test_no_replicas() -> None:
    p = problem([2, 6, 3], replicas=2, tail=2)
    none = p._replace(**{n: getattr(p, n)[:0] for n in ("x", "mean", "log_scale", "grad", "replicas")})
    found = native(none, F32)
    assert found["log_likelihood"].shape == (0, 3) and found["to_weight_0"].shape == (0, 6, 2)


def test_a_frozen_decoder_asks_for_no_gradient_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    genuine = cpu.importance_backward
    monkeypatch.setattr(cpu, "importance_backward", lambda *a: asked.append(a[-1]) or genuine(*a))
    model = lf.LatentVariableModel(lf.mlp(2, [5], 3), lf.Gaussian(0.1), 2).requires_grad_(False)
    mean = torch.zeros(4, 2, requires_grad=True)
    lf.log_likelihood(model, torch.randn(4, 3), (mean, mean.detach()), 8, seed=0).log_likelihood.sum().backward()
    assert asked == [[False, False, False]] and bool((mean.grad != 0).any())


def test_memory_does_not_grow_with_the_samples_of_one_row() -> None:
    program = (
        "import resource, torch, libi_fast as lf\n"
        "model = lf.LatentVariableModel(lf.mlp(2, [3], 2), lf.Gaussian(0.1), 2)\n"
        "x, q = torch.zeros(1, 2), (torch.zeros(1, 2), torch.zeros(1, 2))\n"
        "def peak(samples):\n"
        "    with torch.no_grad():\n"
        "        lf.log_likelihood(model, x, q, samples, seed=0, backend='cpu')\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(100_000)\n"
        "print(peak(4_000_000) - before)\n"
    )
    grown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300).stdout
    assert int(grown) < 20_000  # KiB; the log-weights alone would be 16 MB, all their largest of each segment 94


@pytest.mark.parametrize("field", ["x", "mean", "log_scale", "grad", "replicas", "weight", "bias", "variance", "dtype"])
def test_tensors_that_do_not_fit_are_refused(field: str) -> None:
    """The last defence before addresses are all that is left."""
    p = problem([2, 6, 3], rows=4, replicas=2, own=2)
    d = p.decoder
    wrong = {
        "weight": {"decoder": d._replace(weights=[d.weights[0], d.weights[1][..., :4]])},
        "bias": {"decoder": d._replace(biases=[d.biases[0][:, :2], d.biases[1]])},
        "variance": {"decoder": d._replace(variance=d.variance[:, :2])},
        "dtype": {"decoder": d._replace(weights=[d.weights[0].double(), d.weights[1]])},
    }.get(field)
    if wrong is None:
        wrong = {field: getattr(p, field)[:1] if field != "x" else p.x[:, :3]}
    q = p._replace(**wrong)
    arguments = (q.x, q.mean, q.log_scale, q.decoder, q.draws(), q.num_samples)
    with pytest.raises(ValueError, match="weight" if field == "dtype" else field if field != "mean" else "x|log_scale"):
        cpu.importance_backward(q.grad, torch.zeros(2, 4), *arguments, q.kind, list(q.wanted))


def test_strided_arguments() -> None:
    p = problem([2, 6, 3], rows=4, replicas=2, own=2).to("cpu", F64)
    turned = p._replace(
        x=p.x.mT.contiguous().mT, mean=p.mean.expand(2, 4, 2), grad=p.grad.T.contiguous().T,
        decoder=p.decoder._replace(weights=[w.mT.contiguous().mT for w in p.decoder.weights]),
    )  # fmt: skip
    assert not turned.x.is_contiguous()
    a, b = native(p, F64), native(turned, F64)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_rows() -> None:
    p = problem([2, 6, 3], rows=3, replicas=2, tail=2)
    empty = p._replace(x=p.x[:, :0], mean=p.mean[:, :0], log_scale=p.log_scale[:, :0], grad=p.grad[:, :0])
    for dtype in (F32, F64):
        found = native(empty, dtype)
        assert found["log_likelihood"].shape == found["effective_sample_size"].shape == (2, 0)
        assert found["top"].shape == (2, 0, 2) and found["to_mean"].shape == found["to_log_scale"].shape == (2, 0, 2)
        for name in ("weight_0", "weight_1", "bias_0", "bias_1", "variance"):
            assert bool((found[f"to_{name}"] == 0).all()), name


# --- values that meet a limit ---


def peaked(variance: float, rows: int = 20, num_samples: int = 200) -> Problem:
    p = problem([2, 50, 2], rows=rows, num_samples=num_samples, diagonal=False)
    return p._replace(decoder=p.decoder._replace(variance=torch.full((1, 1), variance)))


@pytest.mark.parametrize("variance", [1e-5, 1e-9, 1e9])
def test_peaked_and_flat_likelihoods(variance: float) -> None:
    """Log-weights of -1e4, -1e8, and all alike; in float32 no worse than torch."""
    check(peaked(variance))


def test_saturated_units_and_probabilities() -> None:
    for activation in set(ACTIVATIONS) - {"cube"}:
        p = problem([2, 6, 3], activation, "bernoulli", num_samples=64)
        weights = [p.decoder.weights[0] * 40, p.decoder.weights[1]]
        close(p._replace(decoder=p.decoder._replace(weights=weights)), 1e-8)  # torch's softplus leaves out e^-20


def test_rows_of_no_weight_and_nan() -> None:
    """A row whose weights are all 0 has log-likelihood -infinity and effective size 0; NaN stays in its row. Where x itself is
    infinite or NaN the slopes are so too, and 0 times infinity is NaN: such a row's gradients, and those of what it shares with
    other rows (weights, biases, variance), are NaN, in the reference as well."""
    p = problem([2, 6, 3], rows=5, num_samples=80, tail=3)
    x = p.x.clone()
    x[0, 1], x[0, 3] = math.inf, math.nan
    p, clean = p._replace(x=x), native(p, F32)
    found, reference = native(p, F32), exact(p, F32)
    assert found["log_likelihood"][0, 1] == -math.inf and found["effective_sample_size"][0, 1] == 0
    assert bool(found["log_likelihood"][0, 3].isnan()) and bool(found["top"][0, 3].isnan().all())
    for name in ("log_likelihood", "effective_sample_size", "top", "to_mean", "to_log_scale"):
        assert torch.equal(found[name][0, ::2], clean[name][0, ::2]), name
    for name in ("to_mean", "to_weight_0", "to_bias_1", "to_variance"):
        assert torch.equal(found[name].isnan(), reference[name].isnan()) and bool(found[name].isnan().any()), name


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("far", [1e20, 1e30])
def test_a_row_of_no_weight_and_finite_slopes_has_no_gradient(far: float, kind: str) -> None:
    """So far away that squares overflow float32, but no slope: zeros for the row, and for others what they have without it."""
    p = problem([2, 6, 3], rows=5, num_samples=80, kind=kind, wanted=(True, False, True))
    x = p.x.clone()
    x[0, 1] = far
    p, without = p._replace(x=x), p.grad.clone()
    without[0, 1] = 0
    found, reference, clean = native(p, F32), exact(p, F32), native(p._replace(x=p.x.clamp(-9, 9), grad=without), F32)
    assert found["log_likelihood"][0, 1] == reference["log_likelihood"][0, 1] == -math.inf
    for name in ("to_x", "to_mean", "to_log_scale"):
        assert bool((found[name][0, 1] == 0).all()) and bool((reference[name][0, 1] == 0).all()), name
    for name in ("to_x", "to_mean", "to_log_scale", "to_weight_0", "to_bias_0", "to_weight_1", "to_bias_1"):
        assert torch.equal(found[name], clean[name]), name


@pytest.mark.parametrize("tail", [1, 60, 200, 300])
@pytest.mark.parametrize("num_samples", [300, 2100])
def test_largest_log_weights(num_samples: int, tail: int) -> None:
    p = problem([2, 6, 3], rows=2, num_samples=num_samples, tail=tail)
    found = close(p)["top"]
    assert bool((found.diff(dim=-1) <= 0).all())


# --- the same bits ---


def cases() -> list[Problem]:
    """Rows that share tiles, few rows of many samples (cut into segments), wide layers, many replicas."""
    torch.manual_seed(11)
    return [
        problem([2, 50, 2], rows=37, num_samples=7, tail=3),
        problem([2, 50, 2], "gelu", rows=1, num_samples=3000, tail=40),
        problem([5, 60, 71, 43], "silu", "bernoulli", rows=70, num_samples=66),
        problem([3, 9, 2], "sigmoid", rows=6, replicas=9, own=9, num_samples=90),
    ]


def digest() -> str:
    hashed = hashlib.sha256()
    for p in cases():
        for dtype in (F32, F64):
            for name, value in native(p, dtype).items():
                hashed.update(name.encode() + value.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def test_same_bits_for_any_number_of_threads() -> None:
    check_same_bits_for_any_number_of_threads(digest)


def test_same_bits_with_avx2_and_avx512() -> None:
    check_same_bits_for_instruction_set("v3", "test_native_importance", digest)


@pytest.mark.parametrize("num_samples", [5, 70, 3000])
def test_a_shard_of_the_rows_has_the_bits_of_the_whole(num_samples: int) -> None:
    p = problem([2, 7, 3], rows=23, num_samples=num_samples, tail=4)
    whole = native(p, F32)
    for rows in (slice(0, 1), slice(3, 4), slice(4, 23)):
        part = native(p.rows(rows), F32)
        for name in ("log_likelihood", "effective_sample_size", "top", "to_mean", "to_log_scale", "to_x"):
            assert torch.equal(part[name], whole[name][:, rows]), name


def test_chunk_size_moves_no_bit() -> None:
    model = lf.LatentVariableModel(lf.mlp(2, [9], 3), lf.Gaussian(0.1), 2)
    x = torch.randn(4, 3)
    options = {"num_samples": 500, "seed": 1, "backend": "cpu"}
    first, *rest = (lf.log_likelihood(model, x, chunk_size=c, **options).log_likelihood for c in (1, 64, 10**6))
    assert all(torch.equal(f, first) for f in rest)


def test_other_instruction_sets_agree(tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n" + (
        "import torch, test_native_importance as t\n"
        "found = [t.native(p, t.F64) for p in t.cases()]\n"
        "torch.save((t.cpu.isa(), found), sys.argv[1])\n"
    )
    results = results_of_instruction_sets(program, tmp_path)
    assert "generic" in results
    for found in results.values():
        for p, values in zip(cases(), found, strict=True):
            for name, true in exact(p).items():
                if true.numel():
                    assert (values[name] - true).abs().max() <= 2e-11 * true.abs().max(), name


# --- gradients and memory, through the operator ---


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_gradcheck(likelihood: str) -> None:
    learned = lf.DiagonalGaussian(torch.linspace(0.2, 0.9, 3, dtype=F64), learned=True)
    noise = learned if likelihood == "gaussian" else lf.Bernoulli()
    model = lf.LatentVariableModel(lf.mlp(2, [5], 3, "tanh"), noise, 2).double()
    names, parameters = zip(*Caller(model).named_parameters(), strict=True)

    def value(x: Tensor, mean: Tensor, log_std: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(Caller(model), dict(zip(names, values, strict=True)), (x, mean, log_std))

    inputs = [torch.rand(3, 3, dtype=F64), torch.randn(3, 2, dtype=F64), 0.1 * torch.randn(3, 2, dtype=F64)]
    leaves = [t.detach().clone().requires_grad_() for t in (*inputs, *parameters)]
    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


class Caller(torch.nn.Module):
    def __init__(self, model: lf.LatentVariableModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        return lf.log_likelihood(self.model, x, (mean, log_std), num_samples=12, seed=3, backend="cpu").log_likelihood


def test_it_serves_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    genuine = cpu.importance
    monkeypatch.setattr(cpu, "importance", lambda *a: called.append(1) or genuine(*a))
    model = lf.LatentVariableModel(lf.mlp(2, [5], 3), lf.Gaussian(0.1), 2)
    lf.log_likelihood(model, torch.randn(4, 3), num_samples=8, seed=0)
    assert called == [1]


# --- calls that the operators would not let through ---


def call(p: Problem, **fields: Any) -> None:
    arguments = (p.x, p.mean, p.log_scale, p.decoder, p.draws(), p.num_samples)
    made = cpu._ImportanceCall(*arguments, p.tail)
    for name, value in fields.items():
        setattr(made._struct, name, value)
    made.run("importance", log_likelihood=torch.empty(1, 3), effective=torch.empty(1, 3), top=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "size"), ({"replicas": -1}, "size"), ({"rows": -1}, "size"), ({"layers": 0}, "size"),
        ({"tail": -1}, "size"), ({"variances": 2}, "size"),
        ({"first_row": 2**32 - 2}, "counter"), ({"first_row": -1}, "counter"),
        ({"repetition": 2**32}, "counter"), ({"stream": 256}, "counter"), ({"samples": 2**34}, "counter"),
    ],
)  # fmt: skip
def test_bad_calls(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(problem([2, 6, 3]), **fields)


def test_bad_replicas_and_layers() -> None:
    p = problem([2, 6, 3])
    with pytest.raises(ValueError, match="counter"):
        call(p._replace(replicas=torch.tensor([2**24])))
    made = cpu._ImportanceCall(p.x, p.mean, p.log_scale, p.decoder, p.draws(), p.num_samples, 0)
    made._struct.activations = made._integers([99, 0])
    with pytest.raises(ValueError, match="size"):
        made.run("importance")
