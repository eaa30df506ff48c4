"""Figures: data and codes, true and learned; training curves. Matplotlib's objects only, no global state.

Colours are Okabe and Ito's (2008), told apart by every kind of colour vision; markers and line styles differ as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from libi_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE_COLOUR, LEARNED_COLOUR = "#000000", "#D55E00"
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
CONTOURS = (1.0, 2.0, 3.0)  # in standard deviations


@dataclass
class Panel:
    """One row of :func:`data_and_codes`: what one method learned, in two dimensions.

    Attributes:
        name: of the method. samples: [N, 2] draws of the learned p(x). mean [2], covariance [2, 2]: of that p(x).
        codes: [N, 2] draws of q(z | x), one a data point.
    """

    name: str
    samples: Tensor
    mean: Tensor
    covariance: Tensor
    codes: Tensor


def data_and_codes(data: Tensor, codes: Tensor, covariance: Tensor, panels: Sequence[Panel]) -> Figure:
    """One row a method: data on the left, codes on the right, true (black) and learned (orange).

    Args:
        data: [N, 2] held-out points; codes: [N, 2] their true codes; covariance: [2, 2] of the true p(x), mean 0.
        panels: one a row.
    """
    figure = _figure(width=8.0, height=3.5 * len(panels) + 0.5)
    axes = figure.subplots(len(panels), 2, squeeze=False, sharex="col", sharey="col")
    zero, identity = torch.zeros(2), torch.eye(2)
    for (left, right), panel in zip(axes, panels, strict=True):
        _points(left, data, TRUE_COLOUR, "o", "held-out data")
        _points(left, panel.samples, LEARNED_COLOUR, "x", "samples of the model")
        _ellipses(left, zero, covariance, TRUE_COLOUR, "-", "true density")
        _ellipses(left, panel.mean, panel.covariance, LEARNED_COLOUR, "--", "learned density")
        left.set(title=f"{panel.name}: data", ylabel="$x_2$")
        _points(right, codes, TRUE_COLOUR, "o", "true codes")
        _points(right, panel.codes, LEARNED_COLOUR, "x", "$z \\sim q(z \\mid x)$")
        _ellipses(right, zero, identity, TRUE_COLOUR, "-", "prior $\\mathcal{N}(0, I)$")
        moment = torch.cov(panel.codes.double().T)
        _ellipses(right, panel.codes.double().mean(0), moment, LEARNED_COLOUR, "--", "their Gaussian fit")
        right.set(title=f"{panel.name}: codes", ylabel="$z_2$", aspect="equal")
    axes[-1][0].set_xlabel("$x_1$")
    axes[-1][1].set_xlabel("$z_1$")
    reach = 1.05 * max(max(CONTOURS), *(float(c.abs().max()) for c in (codes, *(p.codes for p in panels))))
    axes[0][1].set(xlim=(-reach, reach), ylim=(-reach, reach))
    for axis in axes[-1]:  # below the panels, where no point is covered
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9.5, markerscale=2, frameon=False)
    return figure


def training_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """The objective (the sum of its terms, nats a row) over epochs, a panel a phase.

    The chosen restart is in colour (a colour a repeat) with its held-out objective dashed, the other restarts are grey.

    Args:
        history: ``Method.history``: records of a phase, an epoch and terms [restarts]; one names the restart.
    """
    none: Mapping[str, Any] = {"restart": 0, "objective": [0]}
    selection = next((r for r in reversed(history) if r.get("restart") is not None), none)
    networks: list[float | None] = next((r["objective"] for r in history if r.get("phase") == "networks"), [])
    phases: dict[str, list[list[Mapping[str, Any]]]] = {}  # name, repeats, records
    for record in history:
        if record.get("epoch") is None:
            continue
        repeats = phases.setdefault(record["phase"], [])
        if not repeats or record["epoch"] <= repeats[-1][-1]["epoch"]:
            repeats.append([])  # the epochs start again
        repeats[-1].append(record)
    figure = _figure(width=8.0, height=2.4 * max(1, len(phases)) + 1.0)
    axes = figure.subplots(max(1, len(phases)), 1, squeeze=False)[:, 0]
    for axis, (name, repeats) in zip(axes, phases.items(), strict=False):
        settled: list[float] = []
        for i, records in enumerate(repeats):
            epochs = [r["epoch"] for r in records]
            objectives = list(zip(*map(_objectives, records), strict=True))
            chosen = _chosen(name, len(objectives), selection, networks)
            for restart, values in enumerate(objectives):
                if restart != chosen:
                    axis.plot(epochs, values, color="0.75", linewidth=1.0, zorder=1)
                settled += [v for v in values[len(values) // 5 :] if math.isfinite(v)]
            if chosen >= 0:
                colour = CURVE_COLOURS[i % len(CURVE_COLOURS)]
                axis.plot(epochs, objectives[chosen], color=colour, linewidth=1.4)
                if records[0].get("validation") is not None:
                    held_out = [_number(r["validation"][chosen]) for r in records]
                    settled += [v for v in held_out[len(held_out) // 5 :] if math.isfinite(v)]
                    axis.plot(epochs, held_out, color=colour, linewidth=1.4, linestyle="--")
        if settled:  # the first epochs' heights would flatten the rest
            margin = 0.05 * (max(settled) - min(settled)) or 1.0
            axis.set_ylim(min(settled) - margin, max(settled) + margin)
        axis.set(title=name, xlabel="epoch", ylabel="objective (nats)")
        axis.grid(alpha=0.3)
    has_held_out = any("validation" in record for record in history)
    _training_legend(figure, max(map(len, phases.values()), default=1), has_held_out)
    return figure


def _chosen(phase: str, width: int, selection: Mapping[str, Any], networks: Sequence[float | None]) -> int:
    """The place of the restart that was kept among the ``width`` of a phase; -1 where it is not known yet, as of candidates."""
    restart, restarts = selection["restart"], len(selection["objective"])
    if width == restarts:
        return restart
    if phase.startswith("step 2") and width == len(networks):  # several a restart, of which the best is kept
        own = range(restart * width // restarts, (restart + 1) * width // restarts)
        return min(own, key=lambda i: math.inf if math.isnan(_number(networks[i])) else _number(networks[i]))
    return -1


def _training_legend(figure: Figure, repeats: int, held_out: bool) -> None:
    """What styles and colours mean, under all panels."""
    from matplotlib.lines import Line2D

    colour = "0.2" if repeats > 1 else CURVE_COLOURS[0]  # with repeats the colours tell them apart
    entries: list[tuple[str, str, Any]] = [("training rows", colour, "-")]
    if held_out:
        entries.append(("held-out rows", colour, "--"))
    entries.append(("other restarts, candidates, networks", "0.75", "-"))
    if repeats > 1:
        entries += [(f"repeat {i + 1}", CURVE_COLOURS[i % len(CURVE_COLOURS)], "-") for i in range(repeats)]
    handles = [Line2D([], [], color=colour, linestyle=style, label=label) for label, colour, style in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def _objectives(record: Mapping[str, Any]) -> list[float]:
    """The sum of a record's terms, for every restart."""
    known = ("phase", "epoch", "validation")
    terms = [value for name, value in record.items() if name not in known and isinstance(value, list)]
    return [sum(map(_number, values)) for values in zip(*terms, strict=True)]


def _number(value: float | None) -> float:
    """Null stands for what is not finite in metrics.jsonl."""
    return math.nan if value is None else float(value)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure; the ending names the format."""
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, with matplotlib's own defaults: it has the Agg canvas and no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("figures need matplotlib: pip install 'libi-fast[full]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _points(axis: Axes, x: Tensor, colour: str, marker: str, label: str) -> None:
    size = 7 if marker == "o" else 12
    x = x.detach().cpu()
    axis.scatter(x[:, 0], x[:, 1], s=size, c=colour, marker=marker, linewidths=0.7, alpha=0.45, label=label)


def _ellipses(axis: Axes, mean: Tensor, covariance: Tensor, colour: str, style: str, label: str) -> None:
    """The contours of N(mean, covariance) at 1, 2 and 3 standard deviations."""
    mean, covariance = mean.detach().cpu().double(), covariance.detach().cpu().double()
    angle = torch.linspace(0, 2 * math.pi, 181, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()])
    for radius in CONTOURS:
        x, y = mean[:, None] + radius * torch.linalg.cholesky(covariance) @ circle
        axis.plot(x, y, color=colour, linestyle=style, linewidth=1.6, label=label if radius == CONTOURS[0] else None)
