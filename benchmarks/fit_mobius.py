"""Fits the network that stands for the Mobius map in the data set "Mobius"; writes libi_fast/data/mobius.safetensors.

python -m benchmarks.fit_mobius
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import libi_fast as lf
from libi_fast.reproduce.references import MobiusMap

SEED = 0
DRAWS = 4096
STEPS = 3000
FILE = Path(__file__).parent.parent / "libi_fast" / "data" / "mobius.safetensors"


def errors(network: torch.nn.Module, z: Tensor) -> Tensor:
    with torch.no_grad():
        return (network(z) - MobiusMap()(z)).square().sum(1).sqrt()


def main() -> None:
    torch.manual_seed(SEED)
    network = lf.mlp(2, [50], 2, "tanh").double()
    # Twice as wide as the prior for a part of the points: the network must hold in the tails, too.
    z = lf.philox_normal(SEED, DRAWS, 2, stream=lf.Stream.INITIALISATION, dtype=torch.float64)
    z = torch.cat([z, 2 * z[: DRAWS // 4]])
    target = MobiusMap()(z).detach()
    optimiser = torch.optim.LBFGS(
        network.parameters(), max_iter=STEPS, max_eval=2 * STEPS, history_size=100, tolerance_grad=1e-12,
        tolerance_change=1e-16, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (network(z) - target).square().sum(1).mean()
        value.backward()
        return value

    optimiser.step(loss)
    fresh = lf.philox_normal(SEED + 1, 2**20, 2, stream=lf.Stream.INITIALISATION, dtype=torch.float64)
    error = errors(network, fresh)
    radius = fresh.square().sum(1).sqrt()
    facts = {
        "seed": str(SEED),
        "rmse per coordinate under N(0, I)": f"{error.square().mean().div(2).sqrt():.2e}",
        "largest error within 4.5 standard deviations": f"{error[radius < 4.5].max():.2e}",
    }
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, FILE, metadata=facts)
    print(facts)


if __name__ == "__main__":
    main()
