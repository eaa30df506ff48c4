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
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9.5, markerscale=2, frameon=False
        )
    return figure


def training_curves(history: Sequence[Mapping[str, Any]], x: str, names: Sequence[str]) -> Figure:
    """Every ``names[i]`` of the records against their ``x``, one panel each. Records without a value are left out."""
    if not history:
        raise InputError("history: no records to draw")
    figure = _figure(width=8.0, height=2.2 * len(names) + 0.6)
    axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for axis, name, colour in zip(axes, names, CURVE_COLOURS * len(names), strict=False):
        points = [(r[x], r[name]) for r in history if r.get(name) is not None and r.get(x) is not None]
        axis.plot([p[0] for p in points], [p[1] for p in points], color=colour, linewidth=1.5)
        axis.set_ylabel(name.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel(x)
    return figure


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
