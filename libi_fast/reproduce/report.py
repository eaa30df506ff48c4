"""Everything in one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from libi_fast import figures
from libi_fast.data.files import atomic_path
from libi_fast.doctor import machine
from libi_fast.reproduce import pictures, texts
from libi_fast.reproduce.pieces import TRUTH, Folder, read_result, truth_of
from libi_fast.reproduce.protocol import METHODS
from libi_fast.reproduce.tables import Results, Table, all_tables, times

UNBROKEN = "&nbsp;±&nbsp;"  # a value and its error stay on one line
PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font-family: sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; line-height: 1.45; color: #111 }
table { border-collapse: collapse; margin: 0.5em 0; font-size: 85% }
th, td { padding: 0.25em 0.7em; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left } th { border-bottom: 2px solid #555; vertical-align: bottom }
caption, figcaption { text-align: left; color: #444; font-size: 90%; margin: 0.3em 0 } caption { caption-side: bottom }
img { max-width: 100% } figure { margin: 1em 0 } div { overflow-x: auto }
</style></head><body>
$body
</body></html>
""")


def collect(folder: Folder, methods: Sequence[str] | None = None) -> dict[str, Results]:
    """{data set: {method: result}} of what is done, of these methods or all; under TRUTH the ground truth's."""
    found: dict[str, Results] = {}
    for dataset in folder.protocol.datasets:
        read = {m: read_result(folder, folder.protocol.piece(dataset, m)) for m in methods or METHODS}
        results = {m: r for m, r in read.items() if r is not None}
        if results:
            found[dataset] = {**results, TRUTH: truth_of(folder, dataset)}
    return found


def summary(folder: Folder, results: dict[str, Results]) -> dict[str, Any]:
    """Every number of the tables, with the machine and the settings."""
    kept = {
        dataset: {m: _without_rows(r) for m, r in of_methods.items()} for dataset, of_methods in results.items()
    }  # fmt: skip
    protocol = folder.protocol
    notes = {
        "protocol": protocol.name,
        "seeds": protocol.seeds,
        "repetitions": protocol.repetitions,
        "samples": protocol.samples,
    }
    return {"machine": machine(), "results": {**notes, **kept}}


def _without_rows(result: Any) -> dict[str, Any]:
    if "sets" not in result:
        return dict(result)
    return {**result, "sets": [{k: v for k, v in one.items() if k != "of rows"} for one in result["sets"]]}


def write(folder: Folder, results: dict[str, Results]) -> Path:
    """report.html, and figure1.png to figure5.png beside it."""
    parts = [f"<h1>{texts.TITLE}</h1>", *_paragraphs(texts.introduction(folder.protocol))]
    parts += ["<h2>Table 1</h2>", *map(table, all_tables(results))]
    parts += ["<h2>Closed forms</h2>", *_paragraphs(texts.closed_forms_text())]
    for name, draw in pictures.DRAWN.items():
        drawn = draw(folder)
        figures.save(drawn, folder.path / f"{name}.png")
        data = io.BytesIO()
        drawn.savefig(data, dpi=130, format="png")
        source = base64.b64encode(data.getvalue()).decode()
        words = html.escape(texts.FIGURES[name])
        parts += [f'<figure><img alt="{words}" src="data:image/png;base64,{source}"><figcaption>{words}</figcaption></figure>']
    parts += ["<h2>What the paper's claims look like</h2>", *_paragraphs(texts.claims()), table(times(results))]
    about = ", ".join(f"{k}: {v}" for k, v in machine().items())
    parts += [f"<p>{html.escape(about)}</p>"]
    path = folder.path / "report.html"
    with atomic_path(path) as temporary:
        Path(temporary).write_text(PAGE.substitute(title=texts.TITLE, body="\n".join(parts)), encoding="utf-8")
    return path


def _paragraphs(text: str) -> list[str]:
    return [f"<p>{html.escape(part)}</p>" for part in text.strip().split("\n\n")]


def table(t: Table) -> str:
    def row(cells: list[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(c).replace('±', UNBROKEN)}</{kind}>" for c in cells) + "</tr>"

    body = "".join(row(r, "td") for r in t.rows)
    return (
        f"<h3>{html.escape(t.title)}</h3><div><table><caption>{html.escape(t.caption)}</caption>"
        f"<thead>{row(t.header, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )
