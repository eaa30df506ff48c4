"""What this installation has and lacks, one line each."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REQUIRED = ("numpy", "safetensors", "tqdm")
OPTIONAL = {
    "pandas": ".csv and .parquet files",
    "pyarrow": ".parquet files",
    "scikit-learn": "the data sets digits and wine",
    "matplotlib": "figures, demo",
    "rich": "tables on the terminal",
}
ISA = {"v4": "x86-64-v4 (AVX-512)", "v3": "x86-64-v3 (AVX2)", "generic": "generic"}


def report() -> Iterator[str]:
    """The lines that ``libi-fast doctor`` prints. Nothing here raises: a thing that is broken is a line too."""
    yield _line("libi_fast", True, own_version() or "not installed, run from its source tree")
    yield _line("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield _line("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield _compiled_library()
    yield _triton()
    yield _gpu()
    for name in REQUIRED:
        yield _package(name, "required: pip install libi-fast")
    for name, use in OPTIONAL.items():
        yield _package(name, f"for {use}: pip install 'libi-fast[full]'")


def own_version() -> str | None:
    """None for a source tree that was never installed."""
    return _version("libi-fast")


def machine() -> dict[str, Any]:
    """Date, processor, threads and versions, for files of results."""
    from libi_fast.kernels import cpu as native

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = f"{names[0]} x {len(names)}" if names else processor
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jax": _version("jax"),
        "compiled library": native.isa() if native.available() else native.why_unavailable(),
    }


def _compiled_library() -> str:
    from libi_fast.kernels import cpu

    if not cpu.available():
        return _line("compiled library", False, f"{cpu.why_unavailable()}; the reference serves, slower")
    threads = "OpenMP" if cpu.openmp() else "one thread: built without OpenMP"
    return _line("compiled library", True, f"{ISA.get(cpu.isa(), cpu.isa())}, {threads}")


def _triton() -> str:
    from libi_fast.kernels import gpu

    reason = gpu.why_unavailable()
    text = reason or ("interpreted, on CPU tensors" if gpu.interpreted() else "they serve tensors on the GPU")
    release = _version("triton")
    return _line("triton kernels", reason is None, f"{release}, {text}" if release else text)


def _gpu() -> str:
    if not torch.cuda.is_available():
        return _line("GPU", False, "none that torch can use; everything runs on the CPU")
    return _line("GPU", True, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))


def _package(name: str, hint: str) -> str:
    found = _version(name)
    return _line(name, found is not None, found or hint)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _line(name: str, ok: bool, text: str) -> str:
    return f"{'ok' if ok else 'missing':<8}{name:<18}{text}"
