"""The fused importance-weighted log-likelihood of wide decoders against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import check, exact, fused, problem

import libi_fast as lf
from libi_fast.kernels import gpu, tuning
from libi_fast.kernels.importance import gpu_narrow, gpu_wide, gpu_wide_backward
from libi_fast.kernels.importance.reference import ACTIVATIONS, GRADIENTS

ROWS = ("log_likelihood", "effective_sample_size", "top", "to_x", "to_mean", "to_log_scale")


@pytest.fixture
def small_pieces(monkeypatch):
    """Several chunks, merges and pieces of a row, and splits of a weight's gradient, at sizes an interpreter can do."""
    monkeypatch.setattr(gpu_wide, "WORKSPACE", 2**16)
    monkeypatch.setattr(gpu_wide, "MERGED", 128)
    monkeypatch.setattr(gpu_wide_backward, "PIECE", 64)
    monkeypatch.setattr(gpu_wide_backward, "PROGRAMS", 8)


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_every_likelihood_and_gradient(device, likelihood, kind):
    p = problem([5, 20, 30, 70], "tanh", likelihood, kind=kind, num_samples=50, tail=3)
    assert not gpu_narrow.takes(p.decoder)
    check(p, device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(device, activation):
    check(problem([3, 17, 9], activation, "bernoulli", output=activation, num_samples=10), device)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize(
    "widths", [[70, 9], [2, 130], [3, 65, 4, 5, 6], [1, 66, 130], [130, 3, 70, 2]], ids=lambda w: "-".join(map(str, w))
)
def test_shapes(device, widths, likelihood):
    """No hidden layer and several; at least two tiles of columns and of depth in every product, ragged ones too."""
    check(problem(widths, "sigmoid", likelihood, rows=4, num_samples=37, tail=4, bias=widths[0] != 70), device)


@pytest.mark.parametrize(("rows", "num_samples"), [(1, 1), (150, 1), (3, 700), (9, 100)])
def test_few_and_many_samples(device, small_pieces, rows, num_samples):
    """A row over several chunks, and several rows in one."""
    check(problem([5, 20, 9], rows=rows, num_samples=num_samples, tail=min(5, num_samples)), device)


@pytest.mark.parametrize("own", [1, 3])
def test_replicas(device, own):
    """Parameters of each replica, or shared by all; every replica has its own draws."""
    p = problem([2, 40, 8], "elu", "bernoulli", rows=2, replicas=3, own=own)
    found = check(p._replace(x=p.x[:1].expand(3, -1, -1)), device)
    assert found["log_likelihood"].unique().numel() == 6
    check(p._replace(x=p.x[:1]), device)


def test_replicas_that_do_not_fit_the_workspace_together(device, monkeypatch):
    p = problem([2, 40, 8], rows=2, replicas=5, own=5, tail=2)
    whole = fused(p, device)
    monkeypatch.setattr(gpu_wide, "MERGED", 64)
    monkeypatch.setattr(gpu_wide, "WORKSPACE", 2 * 64 * 100)
    parts = gpu_wide.groups(p.decoder, 5, "ieee", False), gpu_wide.groups(p.decoder, 5, "ieee", True)
    assert [len(part) for part in parts] == [3, 5]
    found = check(p, device)
    for name in ("log_likelihood", "effective_sample_size", "top"):
        assert torch.equal(found[name], whole[name]), name


def test_gradients_nobody_reads_are_zero_and_move_no_other(device):
    p = problem([2, 20, 9])
    whole, part = fused(p, device), fused(p._replace(wanted=(False, False, True)), device)
    assert not part["to_x"].any() and not part["to_variance"].any()
    for name in whole.keys() - {"to_x", "to_variance"}:
        assert torch.equal(whole[name], part[name]), name


def test_no_rows(device):
    found = fused(problem([2, 20, 9], rows=0, tail=3), device)
    assert found["log_likelihood"].shape == (1, 0) and found["top"].shape == (1, 0, 3)
    assert found["to_weight_0"].shape == (1, 20, 2) and not found["to_weight_0"].any()


def test_a_row_gives_the_same_bits_in_any_company(device, small_pieces):
    p = problem([3, 20, 9], rows=9, num_samples=70, tail=3)
    whole, part = fused(p, device), fused(p.rows(slice(4, 7)), device)
    for name in ROWS:
        assert torch.equal(whole[name][:, 4:7], part[name]), name


def test_the_size_of_the_workspace_moves_no_bit_of_the_likelihood(device, small_pieces, monkeypatch):
    p = problem([3, 20, 9], rows=3, num_samples=700, tail=3)
    before = fused(p, device)
    monkeypatch.setattr(gpu_wide, "WORKSPACE", 2**20)
    after = fused(p, device)
    assert all(torch.equal(before[name], after[name]) for name in ("log_likelihood", "effective_sample_size", "top"))


def test_strided_inputs(device):
    p = problem([2, 20, 9], rows=4)
    wide = torch.stack((p.mean, p.mean + 1), -1)[..., 0]
    weights = [w.mT.contiguous().mT for w in p.decoder.weights]
    strided = p._replace(
        mean=wide, x=p.x.mT.contiguous().mT, grad=torch.stack((p.grad, p.grad), -1)[..., 0],
        decoder=p.decoder._replace(weights=weights),
    )  # fmt: skip
    a, b = fused(p, device), fused(strided, device)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_rows_that_are_lost_harm_no_other(device):
    """A row that no sample explains has likelihood zero and no gradient; a NaN stays in its row and in what all rows share."""
    p = problem([2, 20, 9], rows=4, num_samples=40)
    truth = exact(p)
    for value in (1e30, float("nan")):
        p.x[0, 1, 3] = value
        found = fused(p, device)
        for name in ("log_likelihood", "effective_sample_size", "to_mean", "to_log_scale", "to_x"):
            rows = [0, 2, 3]
            torch.testing.assert_close(found[name][:, rows].cpu().double(), truth[name][:, rows], rtol=1e-4, atol=1e-5)
        if value == 1e30:
            assert found["log_likelihood"][0, 1] == -float("inf") and found["effective_sample_size"][0, 1] == 0
            assert not found["to_mean"][0, 1].any() and torch.isfinite(found["to_weight_0"]).all()
        else:
            assert found["log_likelihood"][0, 1].isnan() and found["to_mean"][0, 1].isnan().all()
            assert found["to_weight_0"].isnan().all()


def test_far_from_the_data_the_pivot_keeps_the_sum(device):
    """Log-weights near -1e4, where exp alone would give zero."""
    p = problem([2, 20, 9], rows=2, num_samples=100)
    p = p._replace(decoder=p.decoder._replace(variance=torch.full((1, 9), 1e-4)))
    assert exact(p)["log_likelihood"].max() < -1000
    check(p, device)


@pytest.mark.parametrize("value", [-100.0, -20.0, 0.0, 20.0, 100.0])
def test_logits_of_any_size(device, value):
    """Two outputs share a logarithm, whose argument must neither overflow nor lose the small one."""
    p = problem([2, 20, 9], "tanh", "bernoulli", rows=2, num_samples=10)
    biases = [p.decoder.biases[0], torch.linspace(value, -value, 9)[None]]
    check(p._replace(decoder=p.decoder._replace(biases=biases)), device)


# What a product's terms err by, relative; sums of hundreds of them, through three layers, err by a few times that.
PRECISIONS = {"tf32x3": 2e-6, "tf32": 1e-3, "bf16": 8e-3}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(device, precision):
    """The interpreter computes all in float32, and bfloat16 wrongly: only a GPU shows the errors."""
    if precision == "bf16" and gpu.interpreted():
        pytest.skip("Triton's interpreter has no arithmetic in bfloat16")
    p = problem([5, 40, 30, 70], "tanh", "bernoulli", rows=4, num_samples=200, precision=precision, tail=3)
    found, truth = fused(p, device), exact(p)
    for name, value in truth.items():
        if not value.numel():
            continue
        error = (found[name].cpu().double() - value).abs().max() / value.abs().max().clamp_min(1e-30)
        print(f"{precision} {name}: {error:.1e}")
        assert error <= 10 * PRECISIONS[precision], name


def test_tuning_moves_results_by_rounding_alone(device, monkeypatch, tmp_path):
    p = problem([5, 20, 30], num_samples=150, tail=3)
    fixed = check(p, device)
    tiles = [gpu_wide.Tile(64, 64, depth, 4, 2, 255) for depth in (16, 32)]
    monkeypatch.setitem(gpu_wide.TILES, "ieee", tiles)
    monkeypatch.setenv("LIBI_FAST_TUNE", "1")
    monkeypatch.setenv("LIBI_FAST_TUNING_FILE", str(tmp_path / "tuning.json"))
    order = itertools.count()

    def measured(run):
        run()
        return -next(order)

    monkeypatch.setattr(tuning, "_milliseconds", measured)
    tuned = check(p, device)
    assert next(order) == 4, "two kernels, two candidates each, the second taken"
    assert not torch.equal(fixed["to_weight_0"], tuned["to_weight_0"])
    torch.testing.assert_close(fixed["top"], tuned["top"], rtol=1e-5, atol=1e-5)


# --- as a user calls it ---


@pytest.mark.parametrize("noise", [lf.DiagonalGaussian(0.3, learned=True), lf.Bernoulli()], ids=["gaussian", "bernoulli"])
def test_log_likelihood(device, noise):
    def solve(backend: str, where: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = lf.LatentVariableModel(lf.mlp(4, [20, 20], 30), noise, latent_dim=4).to(where, dtype)
        x = torch.rand(5, 30, generator=torch.Generator().manual_seed(1)).to(where, dtype).requires_grad_()
        mean = x[:, :4].sin()
        estimate = lf.log_likelihood(model, x, proposal=(mean, mean.cos() - 1), num_samples=70, seed=3, backend=backend)
        grads = torch.autograd.grad(estimate.log_likelihood.sum(), [x, *model.parameters()])
        return [t.detach().cpu().double() for t in (*estimate, *grads) if isinstance(t, torch.Tensor)]

    found = solve("triton", device, torch.float32)
    truth = solve("reference", torch.device("cpu"), torch.float64)
    assert len(found) == len(truth) > 8
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
