"""Where results go and what is said about the machine."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch

from libi_fast.kernels import cpu as native

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
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
        "compiled library": native.isa() if native.available() else native.why_unavailable(),
    }


def write(name: str, results: Any) -> Path:
    """Write ``results/<name>.json`` and return its path."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return path
