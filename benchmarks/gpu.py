"""``python -m benchmarks.gpu``: everything that needs a GPU, in one command that survives a time-out.

Steps: install (offline, without build isolation), each file of tests/gpu, sanitize (compute-sanitizer on a small case of each
kernel), then the workloads W1 to W8 against their peers. Each step runs in a process of its own and writes
``benchmarks/results/<gpu>/<step>.json`` as it goes; a step that is complete, and was made from the same sources, is skipped.

Exit code: 0 everything is there, 1 a step failed, 2 time ran out before the last step (call again), 3 there is no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SOURCES = ("kernels", "libi_fast", "benchmarks", "tests/gpu")
FORMS_LIMIT = 60.0  # seconds that one form may take at most, its compilation included, before sizes above it are left out


class Step(NamedTuple):
    name: str
    command: tuple[str, ...]  # {python}, {out} (the JSON to write), {quick} ("--quick" or nothing)
    limit: float  # seconds
    counts: bool = True  # a failure is a failure of the whole


def steps() -> list[Step]:
    here = ("{python}", "-m", "benchmarks.gpu", "--step")
    # Most of a test's time goes to compilers, one a kernel and configuration: side by side where pytest-xdist is installed.
    pytest = ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider", *(("-n", "8") if find_spec("xdist") else ()))
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    tests = [Step(path.stem, (*pytest, path.relative_to(ROOT).as_posix()), 540) for path in files]
    names = ("W1", "W2", "W3", "W4a", "W4b", "W5", "W6", "W7", "W8")
    workloads = [Step(name, (*here, name, "--json", "{out}", "{quick}"), 540) for name in names]
    return [
        Step("install", ("{python}", "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."), 240),
        *tests,
        Step("sanitize", (*here, "sanitize", "--json", "{out}", "{quick}"), 300, counts=False),
        *workloads,
    ]


def digest(root: Path = ROOT) -> str:
    """Of the sources that results depend on."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in {".py", ".cpp", ".hpp"}:
                total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:16]


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
        json.dump(content, scratch, indent=1)
        scratch.write("\n")
    os.replace(scratch.name, path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


# --- the runner ---


def run_step(step: Step, path: Path, quick: bool, seconds: float) -> dict[str, Any]:
    """Run it, and add to what it wrote itself how it ended."""
    words = {"{python}": sys.executable, "{out}": str(path), "{quick}": "--quick" if quick else ""}
    command = [words.get(word, word) for word in step.command]
    start = time.monotonic()
    log = path.with_suffix(".log")
    with log.open("w") as output:
        try:
            code: int | str = subprocess.run(
                [word for word in command if word], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds,
                env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ},  # or cuBLAS warns where tests ask for determinism
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = "cut off"
    tail = log.read_text(errors="replace")[-4000:]
    log.unlink()
    status = {0: "complete", "cut off": "cut off"}.get(code, "failed")
    ended = {"step": step.name, "status": status, "exit code": code, "seconds": time.monotonic() - start, "quick": quick}
    return {**read(path), **ended, "sources": digest(), "output": tail}


def run_all(chosen: Sequence[Step], folder: Path, budget: float, quick: bool, force: bool) -> int:
    start, failed = time.monotonic(), []
    sources = digest()
    for step in chosen:
        path = folder / f"{step.name}.json"
        known = read(path)
        done = known.get("status") == "complete" and known.get("sources") == sources and known.get("quick") == quick
        if done and not force and step.name != "install":  # a bare machine has the files, not the installation
            print(f"{step.name}: already complete", flush=True)
            continue
        left = budget - (time.monotonic() - start)
        if left < 30 and left < step.limit:
            print(f"{step.name}: no time left; call again", flush=True)
            return 2
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        result = run_step(step, path, quick, min(step.limit, left))
        write(path, result)
        print(f"{step.name}: {result['status']}, {result['seconds']:.0f} s", flush=True)
        if result["status"] == "cut off" and left < step.limit:
            return 2
        if result["status"] != "complete":
            print(result["output"], flush=True)
            failed += [step.name] if step.counts else []
        if step.name == "install" and failed:
            break
    return 1 if failed else 0


def table(folder: Path) -> str:
    """Ours against the fastest peer of the same precision, from all results in the folder."""
    lines = [f"{'':6}{'precision':10}{'ms':>10}{'ratio':>8}{'of bound':>9}{'peak MB':>9}   fastest peer"]
    for path in sorted(folder.glob("W*.json")):
        for row in read(path).get("summary", []):
            ratio, share = row["ratio"], row["share of bound"]
            lines.append(
                f"{path.stem:6}{row['precision']:10}{row['median ms']:10.3f}{'-' if ratio is None else f'{ratio:.2f}':>8}"
                f"{'-' if share is None else f'{100 * share:.0f}%':>9}{row['peak bytes'] / 1e6:9.0f}   {row['peer'] or 'none'}"
            )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", help="steps, with commas between")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all (default 540)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that everything runs")
    parser.add_argument("--force", action="store_true", help="again, though results are there")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = {step.name for step in steps()}
    unknown = set(options.only.split(",")) - known if options.only else set()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(step.name for step in steps())}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        print("no GPU that torch can use")
        return 3
    if options.step:
        from benchmarks import gpu_steps

        return gpu_steps.run(options.step, options.json, options.quick)
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = options.out or ROOT / "benchmarks" / "results" / name
    wanted = options.only.split(",") if options.only else [step.name for step in steps()]
    chosen = [step for step in steps() if step.name in wanted or step.name == "install"]
    code = run_all(chosen, folder, options.budget, options.quick, options.force)
    print(table(folder))
    return code


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        iter(map(str, Path("/usr/local/cuda/bin").glob("compute-sanitizer"))), None
    )


if __name__ == "__main__":
    sys.exit(main())
