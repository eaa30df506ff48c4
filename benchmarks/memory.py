"""``python -m benchmarks.memory WORKLOAD CASE FORM``: the peak of resident memory of one call, above what there was before it.

Before: imports, inputs, and for a form that is compiled its first call, as compiling takes more than most calls. Ours and torch
eager keep nothing back that way: theirs is the first call. Linux alone says so (the high-water mark of /proc/self/status).
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def known() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


def kept(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, key
    return 1024 * int(found[1])


def peak_of(run: Callable[[], Any], compiled: bool) -> int:
    from benchmarks.timing import finish

    if compiled:
        finish(run())
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark falls to what is resident now
    before = kept("VmRSS")
    finish(run())
    return kept("VmHWM") - before


def main(workload: str, case: str, form: str) -> None:
    from benchmarks import cpu

    (found,) = (c for c in cpu.cases_of(workload, False) if c.name == case)
    run = found.ours if form == "libi_fast" else next(f for f in found.forms() if f.name == form).run
    compiled = form.startswith(("torch.compile", "JAX", "BlackJAX", "NumPyro"))
    print(json.dumps({"peak bytes": peak_of(run, compiled)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
