"""What the build must never do: fast-math flags, or kernels imported by their bare name."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "pyproject.toml").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)


def sources(*folders: str, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for folder in folders:
        yield from (p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes and "__pycache__" not in p.parts)


def test_kernels_are_imported_inside_the_package_only() -> None:
    """An editable install puts the root on sys.path, where a bare `kernels` would be a second copy of the modules."""
    bare = re.compile(r"^\s*(import\s+kernels\b|from\s+kernels\b)", re.MULTILINE)
    for path in sources("libi_fast", "kernels", "tests", "benchmarks", suffixes=(".py",)):
        assert not bare.search(path.read_text()), f"{path.relative_to(ROOT)} imports the kernels by a bare name"


def test_an_import_never_points_up() -> None:
    upper = re.compile(r"^\s*(from|import)\s+libi_fast(?!\.kernels\b)\b", re.MULTILINE)
    for path in sources("kernels", suffixes=(".py",)):
        assert not upper.search(path.read_text()), f"{path.relative_to(ROOT)} imports from a floor above"


def test_no_fast_math() -> None:
    """Linking with it turns subnormal numbers off for the whole process."""
    forbidden = re.compile(r"-f?fast-?math|-Ofast|-funsafe-math|/fp:fast", re.IGNORECASE)
    build_files = [ROOT / "CMakeLists.txt", ROOT / "Makefile", ROOT / "pyproject.toml"]
    for path in [*build_files, *sources("kernels", suffixes=(".cpp", ".hpp", ".cu", ".h"))]:
        assert not forbidden.search(path.read_text()), f"{path.relative_to(ROOT)} asks for fast math"


def test_every_kernel_source_is_built() -> None:
    """dispatch.cpp apart, which is compiled once and not for each instruction set."""
    (listed,) = re.findall(r"set\(kernel_sources\s+([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    found = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").rglob("*.cpp")} - {"kernels/dispatch.cpp"}
    assert sorted(listed.split()) == sorted(found)


@pytest.mark.slow
def test_the_build_does_not_become_long(tmp_path: Path) -> None:
    """The two sources that take longest, for one of its instruction sets, in processor time, which other programs on the
    machine hardly move, and in units of what the compiler takes there for a page that matches regular expressions (1 to 7
    seconds): 2.6 to 3.3 when this was written, 30% of the whole set, for which 13 were the bound."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    page = tmp_path / "page.cpp"
    page.write_text(PAGE)
    unit = min(processor_time("c++", "-O3", "-std=c++17", "-c", str(page), "-o", str(tmp_path / "page.o")) for _ in range(2))
    build = tmp_path / "build"
    processor_time("cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    commands = [c["command"] for c in json.loads((build / "compile_commands.json").read_text())]
    chosen = [c for c in commands if "kernels_generic" in c and c.endswith(LONGEST)]
    assert len(chosen) == len(LONGEST)
    assert sum(processor_time(*shlex.split(c), cwd=build) for c in chosen) < MOST * unit


LONGEST = ("training/cpu.cpp", "importance/cpu_backward.cpp")
MOST = 3.9


def processor_time(*command: str, cwd: Path | None = None) -> float:
    before = os.times()
    subprocess.run(command, check=True, capture_output=True, cwd=cwd)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


PAGE = """
#include <algorithm>
#include <functional>
#include <map>
#include <regex>
#include <string>
#include <vector>
bool matches(const std::string& text, const std::vector<std::string>& patterns) {
    std::map<std::string, std::function<bool(const std::string&)>> found;
    for (const auto& p : patterns) found[p] = [p](const std::string& t) { return std::regex_search(t, std::regex(p)); };
    return std::all_of(found.begin(), found.end(), [&](const auto& f) { return f.second(text); });
}
"""


def test_torch_is_no_build_requirement() -> None:
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not any(r.startswith("torch") for r in requires)
