"""The pictures of what was measured on the CPU: ratios to every form of a peer, and sweeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.report import fastest_of_kinds

OURS, PEER, OTHER = "#b02a30", "#1f5a94", "#9db8d2"
LINES = ["#1f5a94", "#d08a1d", "#5b8c5a", "#7a5195"]


def caption(machine: dict[str, Any], dates: set[str]) -> str:
    when = " and ".join(sorted({min(dates), max(dates)}))
    versions = f"torch {machine['torch']}" + (f", jax {machine['jax']}" if machine.get("jax") else "")
    return f"{machine['processor']}, {machine['threads']} threads, {machine['compiled library']}; {versions}; {when}"


def measured_on(folder: Path, names: tuple[str, ...], machine: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """What lies in the folder of these workloads, from this machine with these versions: {case: measured}, and the dates."""
    found: dict[str, Any] = {}
    dates: set[str] = set()
    for name in names:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        if all(content["machine"].get(k) == v for k, v in machine.items() if k != "date"):
            dates.add(content["machine"]["date"])
            found |= content["results"]
    return found, dates


def cpu(measured: dict[str, Any], about: str, path: Path) -> Path | None:
    """A panel a workload, a line a kind: each form's time in units of ours, the fastest of the kind with its number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {n: m for n, m in measured.items() if "refused" not in m and any("best ms" in f for f in m["forms"].values())}
    if not shown:
        return None
    ratios = {n: by_kind(m) for n, m in shown.items()}
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    heights = [max(len(r) for r in list(ratios.values())[i * columns : (i + 1) * columns]) for i in range(lines)]
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(max(7.0, 5.2 * columns), sum(0.3 * h + 1.0 for h in heights) + 0.5), squeeze=False,
        layout="constrained", gridspec_kw={"height_ratios": [h + 2.2 for h in heights]},
    )  # fmt: skip
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, (name, kinds) in zip(axes.flat, ratios.items(), strict=False):
        kinds = dict(sorted(kinds.items(), key=lambda pair: -min(pair[1])))
        for y, values in enumerate(kinds.values()):
            best = min(values)
            axis.scatter(values, [y] * len(values), s=14, color=OTHER, zorder=2)
            axis.scatter([best], [y], s=36, color=PEER, zorder=3)
            axis.annotate(f"{best:.3g}x", (best, y), (0, 5), textcoords="offset points", ha="center", fontsize=8, color=PEER)
        axis.axvline(1, color=OURS, linewidth=1.5, zorder=1)
        axis.set_xscale("log")
        most, least = max(max(v) for v in kinds.values()), min(min(v) for v in kinds.values())
        axis.set_xlim(min(0.8, least / 1.5), max(most * 1.5, 2))
        plain_ticks(axis.xaxis)
        axis.set_yticks(range(len(kinds)), list(kinds), fontsize=8)
        axis.set_ylim(-0.6, len(kinds) - 0.2)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_title(f"{name}: ours {shown[name]['ours']['best ms']:.3g} ms", fontsize=10, loc="left")
    figure.suptitle(f"Time of each peer in units of ours (best of each; red: ours; every dot a form)\n{about}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def by_kind(measured: dict[str, Any]) -> dict[str, list[float]]:
    ours = measured["ours"]["best ms"]
    kinds: dict[str, list[float]] = {}
    for n, form in measured["forms"].items():
        if "best ms" in form:
            kinds.setdefault(n.split(",")[0], []).append(form["best ms"] / ours)
    return kinds


def plain_ticks(axis: Any) -> None:
    """1, 10, 100 instead of powers, and 2 and 5 between them where there is room."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=7))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def sweep(found: dict[str, Any], about: str, path: Path, x: str = "", y: str = "ms, best") -> Path:
    """Small multiples: a row a workload, a column a factor, milliseconds of ours and of the fastest form of each kind; x, y:
    what stands at the axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def form_of(kind: str, point: dict[str, Any]) -> dict[str, Any]:
        return point["ours"] if kind == "libi_fast" else fastest_of_kinds(point["forms"]).get(kind, {})

    columns = list(dict.fromkeys(factor for factors in found.values() for factor in factors))
    figure, axes = pyplot.subplots(
        len(found), len(columns), figsize=(3.0 * len(columns), 2.6 * len(found) + 0.8), squeeze=False, layout="constrained"
    )
    points = [p for factors in found.values() for points in factors.values() for p in points]
    kinds = list(dict.fromkeys(kind for p in points for kind in fastest_of_kinds(p["forms"])))
    colours = {"libi_fast": OURS} | dict(zip(kinds, LINES * len(kinds), strict=False))
    seen: dict[str, Any] = {}
    for line, (name, factors) in zip(axes, found.items(), strict=True):
        for axis, factor in zip(line, columns, strict=True):
            if factor not in factors:
                axis.remove()
                continue
            for kind, colour in colours.items():
                forms = {p["value"]: form_of(kind, p) for p in factors[factor]}
                known = {value: form["best ms"] for value, form in forms.items() if "best ms" in form}
                if known:
                    values, times = list(known), list(known.values())
                    (seen[kind],) = axis.plot(values, times, "o-", color=colour, markersize=4, linewidth=1.4)
            axis.set_xscale("log")
            axis.set_yscale("log")
            values = [p["value"] for p in factors[factor]]
            axis.set_xticks(values, [f"{v:,}" for v in values], fontsize=8)
            axis.set_xticks([], minor=True)
            plain_ticks(axis.yaxis)
            axis.tick_params(labelsize=8)
            axis.grid(color="#e4e4e4", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{name}, {factor}", fontsize=9, loc="left")
            axis.set_xlabel(x, fontsize=8)
        line[0].set_ylabel(y, fontsize=8)
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=len(seen), fontsize=8, frameon=False)
    figure.suptitle(about, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
