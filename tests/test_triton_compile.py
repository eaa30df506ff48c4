"""The kernels compiled, not run, for four GPUs: nothing spills, and shared memory fits each card."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from offline import TARGETS, Key, Resources, key_of, resources
from training_problems import fresh, problem

from libi_fast.kernels import gpu
from libi_fast.kernels.annealing import gpu as annealing
from libi_fast.kernels.chains import gpu as chains
from libi_fast.kernels.chains.reference import Noise, Settings, reference_uniform
from libi_fast.kernels.henze_zirkler import gpu as henze_zirkler
from libi_fast.kernels.henze_zirkler import gpu_characteristic as characteristic
from libi_fast.kernels.henze_zirkler.characteristic import Factor
from libi_fast.kernels.henze_zirkler.gpu_whitening import whiten
from libi_fast.kernels.importance import gpu as importance
from libi_fast.kernels.importance import gpu_resampling as resampling
from libi_fast.kernels.importance.reference import Decoder, Draws, reference_normal
from libi_fast.kernels.log_mean_exp import gpu as log_mean_exp
from libi_fast.kernels.random import gpu as random
from libi_fast.kernels.smooth_knn import gpu as smooth_knn
from libi_fast.kernels.training import gpu as training
from libi_fast.ops.importance import PRECISIONS

META = torch.device("meta")


def decoder(widths: list[int], activation: str, likelihood: str, output: str = "identity", shared: int = 1) -> Decoder:
    pairs = list(itertools.pairwise(widths))
    return Decoder(
        [torch.empty(shared, out, into, device=META) for into, out in pairs],
        [torch.empty(shared, out, device=META) for _, out in pairs],
        [activation] * (len(pairs) - 1) + [output],
        likelihood,
        torch.empty(shared, 1 if likelihood == "gaussian" else 0, device=META),
    )


def importance_launches(
    model: Decoder, rows: int, samples: int, backward: bool, precision: str = "ieee", kind: str = "reparameterized",
    tail: int = 0, wanted: tuple[bool, bool] = (False, False),
) -> list[gpu.Launch]:  # fmt: skip
    """What one call launches; what a backward does besides is the forward's."""
    latent_dim, outputs = model.weights[0].shape[-1], model.weights[-1].shape[-2]
    x, mean = torch.empty(1, rows, outputs, device=META), torch.empty(1, rows, latent_dim, device=META)
    draws = Draws(torch.empty((), dtype=torch.int64, device=META), torch.empty(1, dtype=torch.int64, device=META), 0, 0, 0,
                  reference_normal)  # fmt: skip
    with gpu.recorded() as launches:
        if backward:
            grad = mean[..., 0].contiguous()
            importance.backward(grad, grad, x, mean, mean, model, draws, samples, kind, precision, list(wanted))
        else:
            importance.forward(x, mean, mean, model, draws, samples, tail, precision)
    return launches


def noise_launches(kind: str, rows: int, first_draw: int, draws: int) -> list[gpu.Launch]:
    seed, replicas = torch.empty((), dtype=torch.int64, device=META), torch.empty(1, dtype=torch.int64, device=META)
    with gpu.recorded() as launches:
        random.draws(kind, seed, replicas, 0, rows, first_draw, draws, 0, 0)
    return launches


def log_mean_exp_launches(rows: int, samples: int) -> list[gpu.Launch]:
    x = torch.empty(rows, samples, device=META)
    with gpu.recorded() as launches:
        out = log_mean_exp.forward(x)
        log_mean_exp.backward(out, x, out)
    return launches


def chains_launches(model: Decoder, rows: int, count: int, method: str = "hmc", target: float = 0.0) -> list[gpu.Launch]:
    latent_dim, outputs = model.weights[0].shape[-1], model.weights[-1].shape[-2]
    x, log_scale = torch.empty(1, rows, outputs, device=META), torch.empty(1, rows, latent_dim, device=META)
    z, step = torch.empty(1, rows, count, latent_dim, device=META), torch.empty(1, rows, count, device=META)
    seed, replicas = torch.empty((), dtype=torch.int64, device=META), torch.empty(1, dtype=torch.int64, device=META)
    noise = Noise(seed, replicas, (1, 2), reference_normal, reference_uniform)
    with gpu.recorded() as launches:
        chains.run(x, z, step, log_scale, model, noise, Settings(method, 1000, 8, target=target))
    return launches


def annealing_launches(model: Decoder, rows: int, count: int, rate: float = 0.0) -> list[gpu.Launch]:
    latent_dim, outputs, temperatures = model.weights[0].shape[-1], model.weights[-1].shape[-2], 1000
    x, mean = torch.empty(1, rows, outputs, device=META), torch.empty(1, rows, latent_dim, device=META)
    z, step = torch.empty(1, rows, count, latent_dim, device=META), torch.empty(1, rows, temperatures, device=META)
    betas = torch.empty(1, temperatures + 1, dtype=torch.float64, device=META)
    scales = torch.empty(1, rows, 20, latent_dim, latent_dim, device=META)
    seed, replicas = torch.empty((), dtype=torch.int64, device=META), torch.empty(1, dtype=torch.int64, device=META)
    noise = Noise(seed, replicas, (1, 2), reference_normal, reference_uniform)
    with gpu.recorded() as launches:
        annealing.run(x, z, betas, step, scales, mean, mean, model, noise, annealing.Settings(10, 0.5, rate, 0.7))
    return launches


def smooth_knn_launches(repetitions: int, points: int, d: int, k: int, alphas: tuple[float, ...] = (1.0,)) -> list[gpu.Launch]:
    a = torch.empty(repetitions, points, d, device=META)
    with gpu.recorded() as launches:
        smooth_knn.forward(a, a, k, alphas)
    return launches


def resampling_launches(model: Decoder, rows: int, samples: int, count: int) -> list[gpu.Launch]:
    """What follows the likelihood's own kernels."""
    latent_dim, outputs = model.weights[0].shape[-1], model.weights[-1].shape[-2]
    x, mean = torch.empty(1, rows, outputs, device=META), torch.empty(1, rows, latent_dim, device=META)
    draws = Draws(torch.empty((), dtype=torch.int64, device=META), torch.empty(1, dtype=torch.int64, device=META), 0, 0, 0,
                  reference_normal)  # fmt: skip

    def uniforms(rows: slice) -> torch.Tensor:
        return torch.empty(1, rows.stop - rows.start, count, device=META)

    with gpu.recorded() as launches:
        resampling.forward_and_resample(x, mean, mean, model, draws, samples, 9, "ieee", uniforms, count)
    return [launch for launch in launches if launch.kernel.__module__ == resampling.__name__]


def pairs_launches(replicas: int, n: int, d: int, beta: float, gradient: bool = True) -> list[gpu.Launch]:
    with gpu.recorded() as launches:
        henze_zirkler.forward(torch.empty(replicas, n, d, device=META), beta, gradient)
    return launches


def training_launches(system: str, objective: str) -> list[gpu.Launch]:
    p = problem(system, objective, torch.float32, replicas=100, rows=500).on(META)
    with gpu.recorded() as launches:
        training.run(p, fresh(p), [0.01] * 10, [1.0] * 10)
    return launches


def waves_launches(n: int, d: int, *factors: tuple[int, int]) -> list[gpu.Launch]:
    """factors: (frequencies, dimensions) each; what whitens the points is in pairs_launches."""
    made = [Factor(torch.empty(m, k, device=META), torch.empty(m, device=META)) for m, k in factors]
    with gpu.recorded() as launches:
        characteristic.statistic(whiten(torch.empty(1, n, d, device=META), 1.0, 0.0), made, True)
    return [launch for launch in launches if launch.kernel.__module__ == characteristic.__name__]


W2 = decoder([2, 50, 2], "tanh", "gaussian")
WIDEST_NARROW = decoder([7, 256, 1], "gelu", "bernoulli")  # the most registers of all that the narrow kernels take
WIDEST_JACOBIAN = decoder([4, 100, 4], "gelu", "gaussian")
WIDE = decoder([8, 100, 30], "gelu", "gaussian", output="sigmoid")  # the dearest activation, every gradient
W3 = decoder([50, 200, 200, 784], "tanh", "bernoulli")
# The workloads on which speed is quoted, at the sizes of a GPU.
WORKLOADS: dict[str, Callable[[], list[gpu.Launch]]] = {
    "W1": lambda: [*log_mean_exp_launches(65_536, 5000), *log_mean_exp_launches(8, 1_000_000)],
    "W2": lambda: importance_launches(W2, 50_000, 5000, backward=False),
    "noise": lambda: [
        *noise_launches("normal", 50_000, 0, 10_000),
        *noise_launches("normal", 500, 3, 2),
        *noise_launches("uniform", 50_000, 0, 10_000),
    ],
    "W4a": lambda: importance_launches(W2, 10_000, 512, backward=True),
    **{f"W3 {p}": functools.partial(importance_launches, W3, 10_000, 5000, False, p) for p in PRECISIONS},
    **{f"W4b {p}": functools.partial(importance_launches, W3, 1024, 512, True, p) for p in PRECISIONS},
    "W5a": lambda: [
        *pairs_launches(1, 65_536, 2, 4.7),
        *pairs_launches(1, 65_536, 2, 4.7, gradient=False),
        *pairs_launches(1, 65_536, 8, 2.0),
        *pairs_launches(1600, 500, 2, 2.1),
    ],
    "W5b, W5c": lambda: [
        *waves_launches(10**6, 2, (104, 1), (104, 1)),
        *waves_launches(10**6, 1, (104, 1)),
        *waves_launches(10**6, 16, (1024, 16)),
    ],
    "Henze-Zirkler, most registers": lambda: [
        *pairs_launches(1, 65_536, 4, 2.0),
        *pairs_launches(1, 65_536, 16, 1.2),
        *pairs_launches(1, 65_536, 16, 5.0),
        *waves_launches(10**6, 4, (1024, 4)),
    ],
    "W6": lambda: [*smooth_knn_launches(20_000, 100, 2, 1), *smooth_knn_launches(20_000, 100, 2, 10)],
    "W7": lambda: [  # few chains and many; as they warm up, and after
        *chains_launches(W2, 100, 64, target=0.8),
        *chains_launches(W2, 10_000, 64, target=0.8),
        *chains_launches(W2, 10_000, 64),
        *chains_launches(W2, 10_000, 64, "random-walk"),
    ],
    "W8": lambda: [*training_launches("LinearJTEx", "joint"), *training_launches("Mobius", "joint")],
    "training, most registers": lambda: [
        *training_launches("widest", "joint"),
        *training_launches("LinearJTEx", "closed elbo"),
        *training_launches("deep", "elbo of three draws"),
    ],
    "W9": lambda: [*annealing_launches(W2, 20, 16), *annealing_launches(W2, 10_000, 16), *annealing_launches(W2, 20, 16, 0.1)],
    "annealing, most registers": lambda: [
        *annealing_launches(WIDEST_NARROW, 100, 16, 0.1),
        *annealing_launches(WIDEST_JACOBIAN, 10_000, 16, 0.1),
    ],
    "resampling": lambda: [
        *resampling_launches(W2, 50_000, 5000, 1000),
        *resampling_launches(decoder([8, 50, 9], "tanh", "gaussian"), 50, 5000, 1000),  # the most registers
        *resampling_launches(decoder([50, 100, 20], "tanh", "gaussian"), 50, 5000, 1000),
    ],
    "smooth k-NN, most registers": lambda: [
        *smooth_knn_launches(100, 500, 8, 16, (1.0, 2.0)),
        *smooth_knn_launches(100, 5, 8, 6),  # a program of one warp; three are not chosen
    ],
    "chains, most registers": lambda: [
        *chains_launches(WIDEST_NARROW, 100, 64, target=0.8),
        *chains_launches(WIDEST_JACOBIAN, 1000, 64, target=0.8),
    ],
    "wide, everything": lambda: [
        *importance_launches(WIDE, 1000, 512, backward=False, tail=9),
        *importance_launches(WIDE, 1000, 512, backward=True, kind="doubly-reparameterized", wanted=(True, True)),
    ],
    "narrow, most registers": lambda: [
        *importance_launches(WIDEST_NARROW, 1000, 512, backward=False, tail=9),
        *importance_launches(WIDEST_NARROW, 1000, 512, backward=True, kind="doubly-reparameterized", wanted=(True, True)),
    ],
}


@functools.cache
def keys_of(workload: str, target: str) -> list[Key]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "amd", lambda: target.startswith("gfx"))
        return list(dict.fromkeys(map(key_of, WORKLOADS[workload]())))


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[tuple[Key, str], Future[Resources]]]:
    """What the chosen tests compile, once each and two at a time: compilers run on one core, and take most of the time."""
    chosen = [
        item.callspec.params for item in request.session.items if item.originalname == test_workloads_spill_nothing.__name__
    ]
    wanted = dict.fromkeys((key, params["target"]) for params in chosen for key in keys_of(**params))
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    yield {pair: pool.submit(resources, *pair) for pair in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_workloads_spill_nothing(workload, target, compiled):
    assert keys_of(workload, target)
    for key in keys_of(workload, target):
        found = compiled[key, target].result()
        print(workload, target, key.name, dict(key.constants), dict(key.options), found)
        assert found.spilled == 0
        assert 0 < found.registers <= 512 and found.shared <= TARGETS[target][1]
