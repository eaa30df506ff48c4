"""Compile recorded launches of Triton kernels for GPUs that are not here, and read what the assembler made of them."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from libi_fast.kernels.gpu import Launch

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
# Shared memory a program may have, bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes that go to local memory and back
    shared: int  # bytes


class Key(NamedTuple):
    """What the compiler sees of a launch: types, values that are specialised, options. It can be sent to another process."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]


def key_of(launch: Launch) -> Key:
    """As Triton's own launcher specialises: integers equal to 1, and those and addresses divisible by 16."""
    names = launch.kernel.arg_names
    plain = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    constants = {name: value for name, value in launch.options.items() if name in names}
    options = {name: value for name, value in launch.options.items() if name not in names}
    signature, aligned = {}, []
    for name, value in zip(names, launch.args, strict=False):
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in plain:
            constants[name] = 1
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in plain:
                aligned.append(name)
    return Key(
        launch.kernel.__module__,
        launch.kernel.__name__,
        tuple(signature.items()),
        tuple(sorted(constants.items())),
        tuple(aligned),
        tuple(sorted(options.items())),
    )


def resources(launch: Launch | Key, target: str) -> Resources:
    """What the launch's kernel needs on ``target``, one of TARGETS."""
    key = launch if isinstance(launch, Key) else key_of(launch)
    kernel = getattr(importlib.import_module(key.module), key.name)
    names, constants = kernel.arg_names, dict(key.constants)
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else dict(key.signature)[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in key.aligned},
    )
    gpu_target = TARGETS[target][0]
    compiled = triton.compile(source, target=gpu_target, options={**dict(key.options), "enable_fp_fusion": True})
    assembly = compiled.asm.get("amdgcn")
    if assembly is not None:
        return Resources(
            _number(r"\.vgpr_count:\s+(\d+)", assembly),
            _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
            compiled.metadata.shared,
        )
    return Resources(*_ptxas(compiled.asm["ptx"]), compiled.metadata.shared)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} not in what the compiler printed"
    return int(found[1])


def _ptxas(ptx: str) -> tuple[int, int]:
    """(registers, bytes spilled), from the assembler that comes with Triton."""
    architecture = re.search(r"\.target\s+(sm_\w+)", ptx)[1]
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    messages = []
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "kernel.ptx")
        source.write_text(ptx)
        for assembler in ("ptxas", "ptxas-blackwell"):  # which one knows the PTX version depends on Triton's release
            command = [str(folder / assembler), "-v", f"-arch={architecture}", str(source), "-o", str(Path(scratch, "out"))]
            result = subprocess.run(command, capture_output=True, text=True)
            messages.append(result.stderr)
            if result.returncode == 0:
                spilled = _number(r"(\d+) bytes spill stores", result.stderr) + _number(
                    r"(\d+) bytes spill loads", result.stderr
                )
                return _number(r"Used (\d+) registers", result.stderr), spilled
    raise RuntimeError("\n".join(messages))
