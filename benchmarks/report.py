"""Where results go, what is said about the machine, and the tables in the terminal."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from libi_fast.doctor import machine

RESULTS = Path(__file__).parent / "results"


def write(name: str, results: Any, folder: Path = RESULTS) -> Path:
    """Write ``<folder>/<name>.json`` and return its path."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return path


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """By rich where it is installed; the first column is text, the others are aligned to the right."""
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(header):
            made.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            made.add_row(*row)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 160  # not folded in files
        console.print(made)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(title)
    for row in [header, *rows]:
        print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip())


def number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


def megabytes(value: int | None) -> str:
    return "" if value is None else format(value / 1e6, ".0f")


HEADER = ["form", "best ms", "median ms", "calls", "MB", "ours is faster by", "error: value", "gradients", ""]


def print_case(name: str, measured: dict[str, Any]) -> None:
    """Ours and the finalists in a table; the other forms were printed as they were tried."""
    ours, forms = measured["ours"], measured["forms"]
    if "refused" in measured:
        print(f"{name}: {measured['refused']}, so no speed is quoted. {ours.get('error', '')}")
        return
    rows = [row("libi_fast", ours, ours, share(ours.get("share of the bound")))]
    finalists = sorted((n for n in forms if forms[n].get("interleaved")), key=lambda n: forms[n]["best ms"])
    rows += [row(n, forms[n], ours, scaled(forms[n])) for n in finalists]
    table(f"\n{name}: {measured['size']}", HEADER, rows)
    error = ours.get("error", {})
    if "of torch in float32" in error:
        print(f"error of torch's own float32: {error['of torch in float32']}")
    for n, why in measured["absent"].items():
        print(f"absent: {n}: {why}")


def print_tried(name: str, entry: dict[str, Any]) -> None:
    """A line, at once: trying takes minutes."""
    took = f"   (tried in {entry['seconds of trying']:.1f} s)" if "seconds of trying" in entry else ""
    for what in ("refused", "failed", "left out", "absent"):
        if what in entry:
            errors = f" {entry['error']}" if what == "refused" and "error" in entry else ""
            print(f"  {name}: {what}: {entry[what]}{errors}{took}", flush=True)
            return
    print(f"  {name}: {entry['best ms']:.4g} ms{took}", flush=True)


def row(name: str, form: dict[str, Any], ours: dict[str, Any], note: str) -> list[str]:
    error = form.get("error") or {}
    times = [number(form["best ms"]), number(form.get("median ms")), str(form.get("calls", ""))]
    errors = [number(error.get(k), ".1e") for k in ("value", "gradients")]
    return [name, *times, megabytes(form.get("peak bytes")), number(form["best ms"] / ours["best ms"], ".2f"), *errors, note]


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%} of the bound"


def scaled(form: dict[str, Any]) -> str:
    part = form.get("scaled from this share")
    return "" if part is None else f"scaled from {part:.1%}"


def print_summary(measured: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, m in measured.items():
        if "refused" in m:
            rows.append([name, "refused", "", "", "", "", "", ""])
            continue
        ours, peer = m["ours"], m["forms"].get(m["peer"], {})
        rows.append([
            name, number(ours["best ms"]), megabytes(ours.get("peak bytes")), number(ours.get("share of the bound"), ".0%"),
            m["peer"] or "", number(peer.get("best ms")), megabytes(peer.get("peak bytes")), number(m["ratio"], ".2f"),
        ])  # fmt: skip
    header = ["workload", "ours, best ms", "MB", "of the bound", "fastest peer", "its best ms", "its MB", "ratio"]
    table("\nours beside the fastest peer", header, rows)


def print_sweep(found: dict[str, Any]) -> None:
    for name, factors in found.items():
        rows = []
        for factor, points in factors.items():
            for point in points:
                ours = point["ours"].get("best ms")
                peers = fastest_of_kinds(point["forms"])
                cells = "; ".join(f"{kind} {form['best ms']:.4g} ms" for kind, form in peers.items())
                said = number(point.get("ratio"), ".2f") if "refused" not in point else "refused"
                rows.append([f"{factor} = {point['value']}", number(ours), cells, said])
        table(f"\n{name}, one factor at a time", ["", "ours, best ms", "peers", "ratio"], rows)


def fastest_of_kinds(forms: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Kind -> its fastest form."""
    best: dict[str, dict[str, Any]] = {}
    for n, form in forms.items():
        kind = n.split(",")[0]
        if "best ms" in form and form["best ms"] < best.get(kind, {"best ms": float("inf")})["best ms"]:
            best[kind] = form
    return dict(sorted(best.items(), key=lambda pair: pair[1]["best ms"]))
