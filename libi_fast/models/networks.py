"""Building networks, and recognising those that the fused kernels take."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from libi_fast.errors import InputError
from libi_fast.models.likelihoods import LIKELIHOODS, DiagonalGaussian
from libi_fast.models.model import LatentVariableModel
from libi_fast.ops.importance import Layers
from libi_fast.ops.training import jtex_map, sigmoid_cube_root


class Cube(nn.Module):
    """a^3 elementwise (the paper's CubicJTEx)."""

    def forward(self, a: Tensor) -> Tensor:
        return a * a * a


class SigmoidCubeRoot(nn.Module):
    """The first half of the units through a sigmoid, the others through a cube root (the paper's CubicJTEx inference network).

    The root is a / (a^2 + 1e-6)^(1/3): a's cube root beyond 0.01, of finite slope at 0.
    """

    def forward(self, a: Tensor) -> Tensor:
        return sigmoid_cube_root(a)


class JTExMap(nn.Module):
    """z -> chol(A A' + B) z, the paper's LinearJTEx decoder; A [D, L] is learned, B diagonal and known.

    Args:
        b: [D], the diagonal of B, in squared units of x.
    """

    b: Tensor

    def __init__(self, b: Sequence[float] | Tensor):
        super().__init__()
        diagonal = b.double() if isinstance(b, Tensor) else torch.tensor(b, dtype=torch.float64)
        self.register_buffer("b", diagonal)
        self.a = nn.Parameter(torch.empty(len(diagonal), len(diagonal)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    @property
    def weight(self) -> Tensor:
        """[D, L], lower triangular."""
        return jtex_map(self.a, self.b)

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight.mT


ACTIVATIONS: dict[str, Any] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "cube": Cube,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
}
_DEFAULTS: dict[type, dict[str, Any]] = {
    nn.Softplus: {"beta": 1.0, "threshold": 20.0},
    nn.GELU: {"approximate": "none"},
    nn.LeakyReLU: {"negative_slope": 0.01},
    nn.ELU: {"alpha": 1.0},
}


def mlp(inputs: int, hidden: Sequence[int], outputs: int, activation: str = "tanh", bias: bool = True) -> nn.Sequential:
    """Linear layers with ``activation`` between them and none at the end.

    Raises:
        InputError: an unknown activation or a width below 1.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    widths = [inputs, *hidden, outputs]
    if min(widths) < 1:
        raise InputError(f"every width must be at least 1, got {widths}")
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(fan_in, fan_out, bias=bias)]
        if i < len(widths) - 2:
            layers += [ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


def _activation_name(module: nn.Module) -> str | None:
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind:
            wanted = _DEFAULTS.get(kind, {})
            return name if all(getattr(module, k) == v for k, v in wanted.items()) else None
    return None


def _flatten(module: nn.Module) -> list[nn.Module]:
    """Parts of nested Sequentials in order; one that is used twice comes twice (``modules()`` would give it once)."""
    return [part for child in module for part in _flatten(child)] if type(module) is nn.Sequential else [module]


def chain(module: nn.Module, halves: bool = False) -> list[tuple[nn.Linear | JTExMap, str]] | None:
    """(linear map, activation) pairs of a Sequential of linear maps and elementwise activations, or None for any other.
    ``halves``: also of SigmoidCubeRoot, "sigmoid_cube_root"."""
    if _hooked(module):
        return None
    pairs: list[tuple[nn.Linear | JTExMap, str]] = []
    for part in _flatten(module):
        if type(part) is nn.Linear or type(part) is JTExMap:
            pairs.append((part, "identity"))
            continue
        name = "sigmoid_cube_root" if halves and type(part) is SigmoidCubeRoot else _activation_name(part)
        if name is None or not pairs:
            return None
        if name != "identity":
            if pairs[-1][1] != "identity":
                return None
            pairs[-1] = (pairs[-1][0], name)
    return pairs or None


def recognise(module: nn.Module, likelihood: str) -> tuple[Layers, list[Tensor]] | None:
    """What ``torch.ops.libi_fast.importance`` needs of a decoder, tensors with a replica dimension of 1 in front."""
    pairs = chain(module)
    if pairs is None:
        return None
    tensors: list[Tensor] = []
    has_bias = []
    for linear, _ in pairs:
        bias = getattr(linear, "bias", None)
        tensors += [linear.weight[None]] if bias is None else [linear.weight[None], bias[None]]
        has_bias.append(bias is not None)
    return Layers(tuple(name for _, name in pairs), tuple(has_bias), likelihood), tensors


def recognise_model(model: LatentVariableModel, x: Tensor) -> tuple[Layers, list[Tensor], Tensor] | None:
    """What the operators of recognised decoders need of a model for rows x [N, D]: layers, parameters, and the variance."""
    likelihood = model.likelihood
    found = recognise(model.decoder, likelihood.name) if type(likelihood) in LIKELIHOODS else None
    if found is None:
        return None
    return *found, likelihood.variance[None] if isinstance(likelihood, DiagonalGaussian) else x.new_empty((1, 0))


def _hooked(module: nn.Module) -> bool:
    """Hooks and parametrizations run in ``forward`` only, so a module that carries them must be called."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations") for m in module.modules()
    )  # fmt: skip


Description = dict[str, Any] | list["Description"]


def describe(module: nn.Module) -> Description | None:
    """A JSON-able account from which :func:`build` makes the same architecture, its tensors under the same names: a list for
    a Sequential, a dictionary for a layer. None where that is not possible."""
    if _hooked(module):
        return None
    if type(module) is nn.Sequential:
        parts = [describe(m) for m in module]
        return None if any(p is None for p in parts) else [p for p in parts if p is not None]
    if type(module) is nn.Linear:
        return {"layer": "linear", "in": module.in_features, "out": module.out_features, "bias": module.bias is not None}
    if type(module) is JTExMap:
        return {"layer": "jtex", "b": module.b.double().tolist()}
    if type(module) is SigmoidCubeRoot:
        return {"layer": "sigmoid_cube_root"}
    name = _activation_name(module)
    return None if name is None else {"layer": name}


def build(description: Description) -> nn.Module:
    """The inverse of :func:`describe`, with fresh weights.

    Raises:
        InputError: a layer that is not known.
    """
    if isinstance(description, list):
        return nn.Sequential(*(build(part) for part in description))
    kind = description["layer"]
    if kind == "linear":
        return nn.Linear(description["in"], description["out"], bias=description["bias"])
    if kind == "jtex":
        return JTExMap(description["b"])
    if kind == "sigmoid_cube_root":
        return SigmoidCubeRoot()
    if kind in ACTIVATIONS:
        return ACTIVATIONS[kind]()
    raise InputError(f"unknown layer {kind!r}")


def fresh_copy(module: nn.Module) -> nn.Module:
    """A copy with newly drawn parameters.

    Raises:
        InputError: a layer that owns parameters has no ``reset_parameters()``.
    """
    clone = copy.deepcopy(module)
    for name, part in clone.named_modules():
        owns = any(True for _ in part.parameters(recurse=False))
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()  # type: ignore[operator]
        elif owns:
            raise InputError(
                f"restarts need fresh parameters, but {type(part).__name__} ({name or 'the module itself'}) has no "
                "reset_parameters(); give it one, or pass a factory"
            )
    return clone
