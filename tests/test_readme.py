"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest

from benchmarks import __main__ as entry

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(README), "exec"), {})


def test_readme_has_examples_and_names_existing_files():
    assert len(BLOCKS) >= 2
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"\((benchmarks/[^)]+)\)", text):
        assert (README.parent / path).exists(), path


def test_benchmarks_that_are_named_exist():
    asked = re.findall(r"python -m benchmarks ([a-z_ ]+)", README.read_text(encoding="utf-8"))
    names = {name for words in asked for name in words.split()}
    assert len(names) >= 8 and names <= set(entry.KNOWN)
