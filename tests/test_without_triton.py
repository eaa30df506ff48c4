"""Where Triton is missing the CPU works as ever, and asking for Triton says what is missing."""

import subprocess
import sys

SCRIPT = """
import importlib.util, sys

class Missing:  # what a machine without Triton answers
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)

import torch
import libi_fast as lf
from libi_fast import doctor

x = torch.rand(4, 6).round()
model = lf.LatentVariableModel(lf.mlp(2, [5], 6), lf.Bernoulli(), latent_dim=2)
estimate = lf.log_likelihood(model, x, num_samples=20, seed=0)
estimate.log_likelihood.sum().backward()
assert all(p.grad.isfinite().all() for p in model.parameters())
weights = torch.randn(3, 7, requires_grad=True)
lf.log_mean_exp(weights).sum().backward()
assert lf.philox_normal(0, 2, 3).shape == (2, 3)
lines = [line for line in doctor.report() if "triton" in line]
assert len(lines) == 1 and "triton is not installed" in lines[0], lines
for call in (
    lambda: lf.log_likelihood(model, x, num_samples=20, seed=0, backend="triton"),
    lambda: lf.log_mean_exp(weights, backend="triton"),
    lambda: lf.philox_normal(0, 2, 3, backend="triton"),
):
    try:
        call()
    except lf.InputError as error:
        assert "triton is not installed" in str(error), error
    else:
        raise AssertionError("no error")
assert "triton" not in sys.modules
print("fine")
"""


def test_without_triton():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert result.stdout == "fine\n" and result.returncode == 0, result.stderr
