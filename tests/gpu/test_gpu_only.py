"""What only a GPU can show: graphs, compilation, memory, addresses beyond 2^31, repeated runs."""

from __future__ import annotations

import pytest
import torch

import libi_fast as lf
from libi_fast.reproduce import pieces
from libi_fast.reproduce.protocol import PROTOCOLS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DECODERS = {"narrow": (2, [50], 2), "wide": (8, [40, 30], 70)}
COMMON = {"num_samples": 300, "gradient": "doubly-reparameterized", "backend": "triton", "pareto": False}


def problem(decoder: str, rows: int = 16) -> tuple[lf.LatentVariableModel, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = lf.LatentVariableModel(lf.mlp(*DECODERS[decoder]), lf.Bernoulli(), latent_dim=DECODERS[decoder][0]).cuda()
    x = torch.rand(rows, DECODERS[decoder][2], device="cuda").round()
    mean = torch.randn(rows, model.latent_dim, device="cuda", requires_grad=True)
    return model, x, mean, torch.full_like(mean, -1.0).detach().requires_grad_()


def solve(model, x, mean, log_std, seed, **changes) -> tuple[torch.Tensor, ...]:
    value = lf.log_likelihood(model, x, proposal=(mean, log_std), seed=seed, **{**COMMON, **changes}).log_likelihood
    return value.detach(), *torch.autograd.grad(value.sum(), [mean, log_std, *model.parameters()])


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_same_bits_twice(decoder):
    p = problem(decoder)
    for a, b in zip(solve(*p, 3), solve(*p, 3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_captured_graph_follows_its_seed(decoder):
    p, seed = problem(decoder), torch.zeros((), dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        solve(*p, seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solve(*p, seed)
    before = None
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        for a, b in zip(found, solve(*p, value), strict=True):
            assert torch.equal(a, b)
        assert before is None or not torch.equal(before, found[0])
        before = found[0].clone()


@pytest.mark.parametrize("decoder", DECODERS)
def test_compiled_whole(decoder):
    model, x, mean, log_std = problem(decoder)

    def loss(x, mean, log_std):
        return lf.log_likelihood(model, x, proposal=(mean, log_std), seed=4, **COMMON).log_likelihood.sum()

    inputs = [mean, log_std, *model.parameters()]
    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(x, mean, log_std), inputs)
    found = torch.autograd.grad(compiled(x, mean, log_std), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
def test_memory_does_not_grow_with_samples(decoder):
    p = problem(decoder, rows=64)

    def peak(samples: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        solve(*p, 1, num_samples=samples)
        return torch.cuda.max_memory_allocated() - before

    full = peak(100_000)
    assert peak(400_000) <= 1.05 * full + 2**20


def free(bytes_: int) -> bool:
    return torch.cuda.mem_get_info()[0] > bytes_


def test_more_than_2_to_the_31_numbers():
    if not free(12 * 2**30):
        pytest.skip("needs 12 GiB free")
    rows, draws = 70_000, 32_768
    assert rows * draws > 2**31
    found = lf.philox_normal(1, rows, draws, device="cuda", backend="triton")
    for row in (0, 65_535, 65_536, rows - 1):
        assert torch.equal(found[row : row + 1], lf.philox_normal(1, 1, draws, first_row=row, device="cuda", backend="triton"))


def test_more_than_2_to_the_31_samples_and_data():
    """Rows beyond 2^31 / D and samples beyond 2^31 / rows, against the last rows alone."""
    if not free(16 * 2**30):
        pytest.skip("needs 16 GiB free")
    rows = 2**31 // 70 + 1000
    torch.manual_seed(0)
    model = lf.LatentVariableModel(lf.mlp(1, [9], 70), lf.Bernoulli(), latent_dim=1).cuda()
    x = torch.zeros(rows, 70, device="cuda")
    x[-5:] = 1
    mean = torch.zeros(rows, 1, device="cuda")
    with torch.no_grad():
        common = {"num_samples": 2, "backend": "triton", "pareto": False, "seed": 2}
        whole = lf.log_likelihood(model, x, proposal=(mean, mean), **common).log_likelihood
        last = lf.log_likelihood(model, x[-5:], proposal=(mean[-5:], mean[-5:]), first_row=rows - 5, **common).log_likelihood
    assert torch.equal(whole[-5:], last)


def test_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, x, mean, log_std = (t.to("cuda:1") for t in problem("narrow"))
    there = solve(model, x, mean.detach().requires_grad_(), log_std.detach().requires_grad_(), 3)
    here = solve(*problem("narrow"), 3)
    assert torch.cuda.current_device() == 0
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dataset", "method"), [("LinearJTEx", "LiBI"), ("LinearJTEx", "ours"), ("CubicJTEx", "VAE")])
def test_a_piece_of_the_reproduction_is_trained_and_looked_at_there(tmp_path, dataset, method):
    """As on the CPU, to what float32 and another order of sums leave of two short runs."""
    found = {}
    for device in ("cpu", "cuda"):
        folder = pieces.Folder(tmp_path / device, PROTOCOLS["smoke"], device)
        content = pieces.result_of(folder, folder.protocol.piece(dataset, method))
        found[device] = torch.tensor(content["validation"]["exact"]).sort(-1).values
    assert found["cuda"].isfinite().all()
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=0.05, atol=0.05)
