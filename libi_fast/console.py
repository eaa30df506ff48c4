"""Tables on the terminal."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from libi_fast.errors import InputError

WIDE = 160  # columns of a file, which has no width of its own


def require_tables() -> None:
    """Raises InputError where rich is missing: before the work whose result it would print."""
    if importlib.util.find_spec("rich") is None:
        raise InputError("tables on the terminal need rich: pip install 'libi-fast[full]'")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> None:
    """Prints a table to stdout: the first column to the left, the others to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    def text(cell: str) -> Text:  # Text: a column called "[red]" is not markup
        return Text(cell if console.encoding.startswith("utf") else cell.replace("±", "+-"))

    table = Table(box=box.SIMPLE)
    for i, name in enumerate(header):
        table.add_column(text(name), justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(text, row))
    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    if caption is not None:
        console.print(text(caption), soft_wrap=True)
