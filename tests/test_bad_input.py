"""Bad input to the public operators, on either backend: an error that names the argument, or the right answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import libi_fast as lf
from libi_fast.kernels import cpu

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not cpu.available(), reason=f"no compiled library: {cpu.why_unavailable()}")),
]
METHODS = ("exact", "quadrature", "random", "sliced")


def good(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def likelihood(x: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = lf.LatentVariableModel(lf.mlp(2, [5], 3), lf.Gaussian(0.3), 2)
    return lf.log_likelihood(model, x, **{"num_samples": 5, "seed": 0, **options}).log_likelihood


def henze_zirkler(method: str) -> Callable[..., Any]:
    return lambda z, **options: lf.henze_zirkler(z, method=method, **options).statistic


MEAN = good(4, 2)
# name of the argument, what is called with it, its good shape
CALLS: dict[str, tuple[str, Callable[..., Any], tuple[int, ...]]] = {
    "log_mean_exp": ("log_weights", lf.log_mean_exp, (6, 4)),
    **{f"henze_zirkler-{m}": ("z", henze_zirkler(m), (20, 3)) for m in METHODS},
    "smooth_knn-a": ("a", lambda z, **o: lf.smooth_knn(z, good(5, 3), 3, **o), (20, 3)),
    "smooth_knn-b": ("b", lambda z, **o: lf.smooth_knn(good(5, 3), z, 3, **o), (20, 3)),
    "log_likelihood": ("x", likelihood, (4, 3)),
    "log_likelihood-mean": ("proposal mean", lambda z, **o: likelihood(good(4, 3), proposal=(z, MEAN), **o), (4, 2)),
    "log_likelihood-log_std": ("proposal log_std", lambda z, **o: likelihood(good(4, 3), proposal=(MEAN, z), **o), (4, 2)),
}  # fmt: skip
WRONG: dict[str, Callable[[Tensor], Any]] = {
    **{str(t): lambda z, t=t: z.to(t) for t in (torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.complex64)},
    "sparse": Tensor.to_sparse,
    "numpy": Tensor.numpy,
    "list": Tensor.tolist,
    "None": lambda z: None,
    "0-d": lambda z: z[0, 0],
    "no columns": lambda z: z[:, :0],
}
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda z: torch.stack((z, z + 1), -1).flatten(1).repeat_interleave(2, 0)[::2, ::2],
    "transposed": lambda z: z.T.contiguous().T,
    "sliced": lambda z: torch.nn.functional.pad(z, (1, 2, 3, 4), value=math.nan)[3:-4, 1:-2],
    "one row expanded": lambda z: z[:1].expand(z.shape),
    "one column expanded": lambda z: z[:, :1].expand(z.shape),
    "not aligned": lambda z: torch.cat((torch.zeros(1), z.flatten()))[1:].view(z.shape),
    "negative view": lambda z: torch._neg_view(-z),
    "with a gradient": lambda z: z.clone().requires_grad_(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_such_tensor(call: str, wrong: str, backend: str) -> None:
    name, function, shape = CALLS[call]
    value = WRONG[wrong](good(*shape))
    if call.startswith("log_likelihood-") and wrong == "None":
        pytest.skip("a pair of None is told apart by its type")
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        function(value, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("call", CALLS)
def test_memory_of_any_form(call: str, form: str, backend: str) -> None:
    _, function, shape = CALLS[call]
    value = FORMS[form](good(*shape))
    plain = value.detach().clone(memory_format=torch.contiguous_format).resolve_neg()
    found, expected = (function(z, backend=backend).detach() for z in (value, plain))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_another_device(call: str, backend: str) -> None:
    """A meta tensor has no memory to read: a meta result, or an error."""
    name, function, shape = CALLS[call]
    try:
        assert function(good(*shape).to("meta"), backend=backend).is_meta
    except lf.InputError as error:
        assert name in str(error) and "meta" in str(error)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_nan_and_infinity(call: str, backend: str, value: float) -> None:
    """Named, or, where a row's value is the row's alone, kept to that row."""
    name, function, shape = CALLS[call]
    z = good(*shape)
    z[2, 1] = value
    if call == "log_mean_exp" or call.startswith("log_likelihood-"):
        found = function(z, backend=backend).detach()
        others = [i for i in range(len(z)) if i != 2]
        torch.testing.assert_close(found[others], function(good(*shape), backend=backend).detach()[others])
        if call == "log_mean_exp":
            finite = found[2] < math.inf and value == -math.inf  # a weight of zero
            assert finite or found[2].isnan() == math.isnan(value)
        return
    with pytest.raises(lf.InputError, match=f"{name} holds {value} at row 2, column 1"):
        function(z, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_rows(backend: str) -> None:
    assert lf.log_mean_exp(good(0, 4), backend=backend).shape == (0,)
    torch.testing.assert_close(lf.log_mean_exp(good(1, 1), backend=backend), good(1, 1)[0])
    assert likelihood(good(0, 3), backend=backend).shape == (0,)
    assert likelihood(good(1, 3), backend=backend).shape == (1,)
    for rows in (0, 1):
        for method in METHODS:
            with pytest.raises(lf.InputError, match="z must hold at least 2 points"):
                lf.henze_zirkler(good(rows, 2), method=method, backend=backend)
        with pytest.raises(lf.InputError, match="a must hold at least 2 points"):
            lf.smooth_knn(good(rows, 2), good(5, 2), 3, backend=backend)
        with pytest.raises(lf.InputError, match="b must hold at least 2 points"):
            lf.smooth_knn(good(5, 2), good(rows, 2), 3, backend=backend)
    for call in ("henze_zirkler-exact", "henze_zirkler-quadrature", "henze_zirkler-random", "henze_zirkler-sliced"):
        assert CALLS[call][1](good(0, 5, 2), backend=backend).shape == (0,)
    assert lf.smooth_knn(good(0, 5, 2), good(5, 2), 3, backend=backend).shape == (0,)


SEEDED: dict[str, Callable[..., Any]] = {
    "uniform": lambda **o: lf.philox_uniform(rows=2, draws=3, **o),
    "normal": lambda **o: lf.philox_normal(rows=2, draws=3, **o),
    "henze_zirkler-random": lambda **o: lf.henze_zirkler(good(20, 3), method="random", **o).statistic,
    "henze_zirkler-sliced": lambda **o: lf.henze_zirkler(good(20, 3), method="sliced", **o).statistic,
    "log_likelihood": lambda **o: likelihood(good(4, 3), **o),
}
BAD_SEEDS = [
    -1, 2**64, 1.0, True, "1", [1], torch.tensor(1.0), torch.tensor([1]), torch.tensor(1, dtype=torch.int32), np.float64(1),
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", SEEDED)
def test_seeds(call: str, backend: str) -> None:
    function = SEEDED[call]
    for seed in BAD_SEEDS:
        with pytest.raises((TypeError, ValueError), match=r"\bseed\b"):
            function(seed=seed, backend=backend)
    for seed in (0, 2**63, 2**64 - 1):
        same = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
        assert torch.equal(function(seed=seed, backend=backend), function(seed=same, backend=backend))
    try:
        assert function(seed=torch.tensor(1, device="meta"), backend=backend).is_meta
    except lf.InputError as error:
        assert "seed" in str(error)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *[("draw", {n: value}) for n in ("rows", "draws", "first_row", "first_draw") for value in (-1, 2**35, 2.0, True, "1")],
    *[("draw", {"repetition": value}) for value in (-1, 2**32, 0.5)],
    *[("draw", {"stream": value}) for value in (-1, 256, 1.5, "a", None)],
    *[("draw", {"replicas": value}) for value in (-1, 2**24 + 1, 1.5, [0])],
    *[("draw", {"replicas": torch.tensor(value)}) for value in (1, [0.5], [-1])],
    *[("draw", {"dtype": value}) for value in (torch.float16, torch.int64, torch.complex64, "float32")],
    ("draw", {"replicas": 2**24, "rows": 2**32, "draws": 2**34 - 1}),
    ("draw", {"rows": 2**32, "draws": 2**33}),
    *[("knn", {"k": value}) for value in (0, -1, 40, 2**63, 1.5, True, "3")],
    *[("knn", {"alphas": value}) for value in (0, -1.0, math.nan, math.inf, [], "1", None, 1j, [1.0, "a"], torch.tensor(1.0))],
    *[("hz", {"beta": value}) for value in (0, -1.0, math.nan, math.inf, 1e300, 1e-300, "1", 1j, [1.0], torch.ones(2))],
    *[("hz", {"method": value}) for value in ("x", None, ["exact"])],
    *[("hz", {"num_frequencies": value}) for value in (0, -1, 2**32, 1.5, True, None)],
    *[("hz", {"num_slices": value}) for value in (0, -1, 2**32, 1.5, True, None)],
    ("hz", {"reduce": 1}),
    *[("ll", {"num_samples": value}) for value in (0, -1, 2**32, 1.5, True, "5", None)],
    *[("ll", {"variance_inflation": value}) for value in (0.0, -1.0, math.nan, math.inf, "1", None, torch.ones(2))],
    *[("ll", {"chunk_size": value}) for value in (0, -1, 1.5, "1")],
    *[("ll", {"first_row": value}) for value in (-1, 2**32, 0.5)],
    *[("ll", {"gradient": value}) for value in ("x", None)],
    *[("ll", {"precision": value}) for value in ("x", None)],
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "option"), OPTIONS, ids=lambda v: str(v)[:60] if isinstance(v, dict) else v)
def test_options(call: str, option: dict[str, Any], backend: str) -> None:
    (name, *_), z = option, good(20, 2)
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b|{name.removeprefix('first_')} index"):
        if call == "draw":
            for draw in (lf.philox_uniform, lf.philox_normal):
                draw(**{"seed": 0, "rows": 2, "draws": 3, **option}, backend=backend)
        elif call == "knn":
            lf.smooth_knn(z, z + 1, **{"k": 3, **option}, backend=backend)
        elif call == "hz":
            for method in METHODS:
                lf.henze_zirkler(z, **{"method": method, **option}, backend=backend)
        else:
            likelihood(good(4, 3), **option, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_that_do_not_fit(backend: str) -> None:
    z = good(20, 2)
    with pytest.raises(TypeError, match=r"b is torch\.float64 but a is torch\.float32"):
        lf.smooth_knn(z, z.double(), 3, backend=backend)
    with pytest.raises(lf.InputError, match="a has points of 2 dimensions but b of 1"):
        lf.smooth_knn(z, z[:, :1], 3, backend=backend)
    with pytest.raises(lf.InputError, match="do not broadcast"):
        lf.smooth_knn(good(2, 5, 2), good(3, 5, 2), 3, backend=backend)
    with pytest.raises(TypeError, match="model must be a LatentVariableModel, got int"):
        lf.log_likelihood(3, z, backend=backend)  # type: ignore[arg-type]


def decoder(*layers: torch.nn.Module) -> torch.nn.Sequential:
    """tanh between the layers."""
    return torch.nn.Sequential(*(part for layer in layers for part in (layer, torch.nn.Tanh())))[:-1]


def with_tensor(layer: torch.nn.Linear, name: str, *shape: int) -> torch.nn.Linear:
    setattr(layer, name, torch.nn.Parameter(torch.zeros(shape)))
    return layer


LINEAR = torch.nn.Linear
# From 2 latents to 3 columns at the ends, and in between what does not fit: how the message goes on after "decoder layer".
BAD_DECODERS: dict[str, tuple[Callable[[], torch.nn.Module], type[Exception], str]] = {
    "more inputs": (lambda: decoder(LINEAR(2, 5), LINEAR(6, 3)), lf.InputError, "2 takes 6 inputs, but layer 1 gives 5"),
    "fewer inputs": (
        lambda: decoder(LINEAR(2, 5), LINEAR(5, 4), LINEAR(3, 3)), lf.InputError, "3 takes 3 inputs, but layer 2 gives 4",
    ),
    "first bias": (
        lambda: decoder(with_tensor(LINEAR(2, 5), "bias", 2), LINEAR(5, 3)), lf.InputError, "1 has 5 units, but its bias",
    ),
    "last bias": (
        lambda: decoder(LINEAR(2, 5), with_tensor(LINEAR(5, 3), "bias", 1)), lf.InputError, "2 has 3 units, but its bias",
    ),
    "bias of two dimensions": (
        lambda: decoder(LINEAR(2, 5), with_tensor(LINEAR(5, 3), "bias", 3, 1)), lf.InputError, "2 has 3 units, but its bias",
    ),
    "weight of one dimension": (
        lambda: decoder(LINEAR(2, 5), with_tensor(LINEAR(5, 5), "weight", 5), LINEAR(5, 3)), lf.InputError, "2's weight must",
    ),
    "another dtype": (lambda: decoder(LINEAR(2, 5), LINEAR(5, 3).double()), TypeError, r"2's weight is torch\.float64"),
    "half": (lambda: decoder(LINEAR(2, 5), LINEAR(5, 3).half()), TypeError, "2's weight must be float32 or float64"),
    "another device": (lambda: decoder(LINEAR(2, 5), LINEAR(5, 3, device="meta")), lf.InputError, "2's weight is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD_DECODERS)
def test_decoders_whose_layers_do_not_fit(case: str, backend: str, backward: bool) -> None:
    make, error, message = BAD_DECODERS[case]
    model = lf.LatentVariableModel(make(), lf.Gaussian(0.3), 2)
    with torch.set_grad_enabled(backward), pytest.raises(error, match=f"decoder layer {message}"):
        lf.log_likelihood(model, good(4, 3), num_samples=5, seed=0, backend=backend)


def test_addresses_of_another_device_are_not_read() -> None:
    """backend="cpu" with a GPU's tensors, of which a meta tensor is the nearest thing that every machine has."""
    if not cpu.available():
        pytest.skip(f"no compiled library: {cpu.why_unavailable()}")
    from libi_fast.ops import _library

    implementations = {"reference": None, "cpu": None}
    assert _library._choose("f", implementations, {}, "", [torch.zeros(2, device="meta")]) == "reference"
    with pytest.raises(lf.InputError, match="takes tensors on the CPU, got meta"):
        _library._choose("f", implementations, {}, "cpu", [[torch.zeros(2, device="meta")]])


def test_a_path_that_leads_to_no_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBI_FAST_LIBRARY", "/nowhere/libi_kernels.so")
    assert cpu._load.__wrapped__() == (None, "LIBI_FAST_LIBRARY names /nowhere/libi_kernels.so, which is no file")


# --- more than 2^31 numbers: memory that numpy has not written yet costs nothing to read ---


def unwritten(*shape: int) -> Tensor:
    try:
        return torch.from_numpy(np.zeros(shape, np.float32))
    except MemoryError:
        pytest.skip("this machine promises no memory that it lacks")


@pytest.mark.skipif(not cpu.available(), reason="the reference would copy it")
@pytest.mark.parametrize(("rows", "samples"), [(2**15 + 1, 2**16), (1, 2**31 + 8)])
def test_log_mean_exp_of_more_than_2_to_the_31(rows: int, samples: int) -> None:
    x = unwritten(rows, samples)
    x[-1, -8:] = 30.0
    found = lf.log_mean_exp(x, backend="cpu")
    assert bool((found[:-1] == 0).all())
    assert float(found[-1]) == pytest.approx(math.log1p(8 * math.expm1(30.0) / samples), rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not cpu.available(), reason="the reference would copy it")
def test_smooth_knn_of_more_than_2_to_the_31() -> None:
    z = unwritten(2**18 + 1, 8, 2**10)
    z[-1] = good(8, 2**10)
    with torch.no_grad():
        found = cpu.smooth_knn(z, 4, 2, [1.0])
    assert torch.equal(found[-1:], cpu.smooth_knn(z[-1:], 4, 2, [1.0]))
    assert bool((found[:-1] == found[0]).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_with_a_huge_size(backend: str) -> None:
    huge = 2**31 + 8
    assert lf.philox_normal(0, huge, 0, backend=backend).shape == (huge, 0)
    assert lf.philox_normal(0, 0, huge, backend=backend).shape == (0, huge)
    assert lf.log_mean_exp(torch.zeros(0, 1).expand(0, huge), backend=backend).shape == (0,)
    with pytest.raises(lf.InputError, match="log_weights has no samples"):
        lf.log_mean_exp(torch.zeros(1, 0).expand(huge, 0), backend=backend)
    for method in METHODS:
        with pytest.raises(lf.InputError, match="z must hold"):
            lf.henze_zirkler(torch.zeros(1, 0).expand(huge, 0), method=method, backend=backend)
    with pytest.raises(lf.InputError, match="a must hold"):
        lf.smooth_knn(torch.zeros(1, 0).expand(huge, 0), good(4, 2), 3, backend=backend)


@pytest.mark.skipif(not cpu.available(), reason="of the compiled library")
def test_sizes_whose_products_overflow() -> None:
    """The C ABI itself, which may be called with more than a tensor can hold."""
    most = 2**63 - 1
    number = torch.zeros(8, dtype=torch.int64)  # one address for all arrays: none may be touched
    at = number.data_ptr()
    calls = [
        ("log_mean_exp", (at, 2**40, 2**40, 1, at)),
        ("log_mean_exp", (at, 2, most, 1, at)),
        ("log_mean_exp_backward", (at, at, at, 2**40, 2**40, 1, at)),
        ("henze_zirkler", (at, 2**40, 2**20, 2**20, 1.0, 1, 1, at, at)),
        ("henze_zirkler", (at, 1, most, 1, 1.0, 0, 1, at, at)),
        *[
            ("henze_zirkler_characteristic", (at, at, m, method, *sizes, 1.0, 1, 1, at, at))
            for method in range(3)
            for m, sizes in ((8, (2**40, 2**20, 2**20)), (8, (1, most, 1)), (most, (1, 4, 2)))
            if (method, m) != (0, most)
        ],  # quadrature takes no vectors
        ("smooth_knn", (at, 2**40, 2**20, 2**20, 2**20, 3, at, 1, 1, at)),
        ("smooth_knn", (at, 1, 4, 4, 1, 3, at, most, 1, at)),
        ("philox_normal", (0, at, most, 0, 1, 0, 1, 0, 0, 1, at)),
        ("philox_normal", (0, at, 2**24, 0, 2**32, 0, 2**34, 0, 0, 1, at)),
    ]
    for name, arguments in calls:
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ValueError, match=f"{name}: a size"):
                cpu._call(name, dtype, *arguments)


# --- data and settings of a fit ---


def fit(train: Any, settings: dict[str, Any] | None = None, **options: Any) -> lf.VAE:
    method = lf.VAE(lf.LatentVariableModel(lf.mlp(1, [3], 2), lf.Gaussian(0.1), 1), lf.MeanFieldGaussian(lf.mlp(2, [3], 2)),
                    **(settings or {}))  # fmt: skip
    return method.fit(train, **{"epochs": 1, "seed": 0, "progress": False, **options})


def parameters(train: Any) -> Tensor:
    torch.manual_seed(0)
    return torch.cat([p.detach().flatten() for p in fit(train).model.parameters()])


@pytest.mark.parametrize("dtype", [">f4", ">f8", "<f8", ">i2", "longdouble", "float16"])
def test_fit_takes_numbers_of_any_layout(dtype: str) -> None:
    data = (8 * good(30, 2)).round().numpy()
    assert torch.equal(parameters(data.astype(dtype)), parameters(data))


@pytest.mark.parametrize(
    "data",
    [np.float32(1), np.array(1.0), torch.tensor(1.0), np.zeros((3, 2), complex), np.zeros((3, 2), object), np.full((3, 2), "1"),
     torch.zeros(3, 2, device="meta"), torch.zeros(3, 2).to_sparse(), torch.zeros(3, 2, dtype=torch.complex64),
     np.zeros((0, 2)), np.zeros(3), np.full((3, 2), np.nan), [[1.0, 2.0]], None],
    ids=lambda v: f"{type(v).__name__} {getattr(v, 'dtype', '')} {getattr(v, 'layout', '')}",
)  # fmt: skip
def test_fit_names_bad_data(data: Any) -> None:
    with pytest.raises((TypeError, lf.InputError), match=r"\btrain\b"):
        fit(data)
    if data is None:  # no validation set, which is fine
        return
    with pytest.raises((TypeError, lf.InputError), match=r"\bvalidation\b"):
        fit(good(30, 2), validation=data)


@pytest.mark.parametrize(
    "option",
    [{name: value} for name in ("epochs", "restarts", "patience", "memory", "batch_size") for value in (0, -1, 1.5, True, "1")]
    + [{"learning_rate": value} for value in (0, -1.0, math.nan, "a", torch.ones(2))]
    + [{"seed": value} for value in (-1, 2**64, 0.5)],
    ids=str,
)
def test_fit_names_bad_options(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises((TypeError, lf.InputError), match=rf"\b{name}\b"):
        fit(good(30, 2), **option)


@pytest.mark.parametrize(
    ("make", "setting"),
    [(lf.VAE, {"beta": value}) for value in (0, math.inf, "1")]
    + [(lf.VAE, {"num_samples": value}) for value in (0, 1.5, True)]
    + [(lf.LiBI, {"hz_weight": "1"}), (lf.LiBI, {"hz_beta": [1.0]}), (lf.LiBI, {"initial_std": math.nan})]
    + [(lf.LiBI, {name: 1.5}) for name in ("repeats", "warm_up", "candidates", "num_samples")],
    ids=lambda v: str(v) if isinstance(v, dict) else v.__name__,
)
def test_methods_name_bad_settings(make: Any, setting: dict[str, Any]) -> None:
    (name,) = setting
    model = lf.LatentVariableModel(lf.mlp(1, [3], 2), lf.Gaussian(0.1), 1)
    with pytest.raises((TypeError, lf.InputError), match=rf"\b{name}\b"):
        make(model, lf.MeanFieldGaussian(lf.mlp(2, [3], 2)), **setting)
