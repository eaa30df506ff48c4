"""The paper's Figures 1 to 5, in the style of :mod:`libi_fast.figures`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import libi_fast as lf
from libi_fast import figures
from libi_fast.data.synthetic import SyntheticDataset
from libi_fast.figures import LEARNED_COLOUR, TRUE_COLOUR
from libi_fast.models.linear_gaussian import exact_posterior, is_linear_gaussian
from libi_fast.ops.random import Stream, philox_normal
from libi_fast.reproduce import closed_forms, published, references
from libi_fast.reproduce.pieces import OWN, Folder, result_of, trained
from libi_fast.reproduce.published import LABELS
from libi_fast.training.inference import fit_inference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAW = 0  # of a data set's draws the one that is shown
EPOCHS = 3000  # of the q that is fitted to the true model
DRAWS = 512  # of each row's posterior
LEVELS = (0.25, 0.5, 0.75, 0.95)  # of the points within a density contour
KDE_POINTS = 81
REACH = 3.6  # of codes shown


class Means(NamedTuple):
    """Of one model: means of q(z | x) and of p(z | x), [N, 2] each."""

    name: str
    q: Tensor
    posterior: Tensor


def fitted_in(folder: Folder, dataset: str, method: str) -> tuple[Any, SyntheticDataset]:
    """The fitted method of a piece on the draw that is shown, and the data."""
    piece = folder.protocol.piece(dataset, method)
    chosen = result_of(folder, piece)["selections"][OWN]
    data = folder.protocol.data(dataset)[DRAW]
    fitted = piece.methods(data)[chosen["setting"]]
    fitted.load_state(trained(folder, piece, progress=False)[chosen["setting"]][DRAW][chosen["restarts"][DRAW]])
    fitted.system.double()
    return fitted, data


def posterior_means(model: lf.LatentVariableModel, x: Tensor) -> Tensor:
    """Of p(z | x), [N, L] float64: in closed form, or resampled from Laplace's approximations with a tenth of the prior."""
    model, x = references.in_double(model), x.double()
    if is_linear_gaussian(model):
        return exact_posterior(model, x)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lf.ParetoWarning)  # a mean is drawn as a point
        proposal = lf.Defensive(lf.laplace_mixture(model, x).inflated(published.INFLATION))
        return lf.sample_posterior(model, x, DRAWS, "sir", proposal=proposal, seed=0).mean


def q_of_truth(folder: Folder, data: SyntheticDataset) -> lf.MeanFieldGaussian:
    """The paper's phi at the true theta: q by the ELBO with the true decoder, from a q fitted to the true codes."""
    if data.name in folder.made:
        return folder.made[data.name]
    torch.manual_seed(0)
    q, model = data.inference(), true_model(data).to(data.dtype)
    last = [m for m in q.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.bias[data.latent_dim :] = math.log(0.05)  # the posterior's size; wide draws of a narrow likelihood diverge
    fit_inference(model, q, data.train, epochs=EPOCHS, method="posterior", sampler="simulated", progress=False)
    fit_inference(model, q, data.train, epochs=EPOCHS, method="elbo", progress=False)
    folder.made[data.name] = q.double()
    return q


def true_model(data: SyntheticDataset) -> lf.LatentVariableModel:
    """The ground truth as a model, in float64."""
    if hasattr(data.truth, "model"):
        return references.in_double(data.truth.model)
    linear = torch.nn.Linear(data.latent_dim, len(data.columns), bias=False).double()
    linear.weight = torch.nn.Parameter(data.truth.weight.clone())  # type: ignore[attr-defined]
    return lf.LatentVariableModel(linear, lf.DiagonalGaussian(data.truth.noise_variance), data.latent_dim).requires_grad_(False)


@torch.no_grad()
def means_of(model: Any, q: Any, name: str, x: Tensor) -> Means:
    return Means(name, q(x.double()).mean, posterior_means(model, x))


def draw_of_q(q: Any, x: Tensor) -> Tensor:
    """One draw a row."""
    with torch.no_grad():
        mean, log_std = q(x.double())
        noise = philox_normal(0, *mean.shape, stream=Stream.MODEL_SAMPLE, repetition=2, dtype=torch.float64)
        return mean + log_std.exp() * noise


# --- density contours ---


def density(points: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, list[float]]:
    """A Gaussian kernel estimate on the grid of x and y, [len(y), len(x)], and its heights at the points below which the shares
    LEVELS of them lie outside (Silverman's rule for the width)."""
    centred = points - points.mean(0)
    covariance = centred.T @ centred / max(1, len(points) - 1) * len(points) ** (-1 / 3)
    factor = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(2, dtype=points.dtype))

    def at(where: Tensor) -> Tensor:
        scaled = torch.linalg.solve_triangular(factor, (where[:, None] - points).flatten(0, 1).T, upper=False)
        return torch.exp(-0.5 * scaled.square().sum(0)).view(len(where), len(points)).mean(1)

    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    heights = at(points).quantile(1 - torch.tensor(LEVELS, dtype=points.dtype))
    return at(grid.flatten(0, 1)).view(len(y), len(x)), sorted(set(heights.tolist()))


def _contours(axis: Axes, points: Tensor, colour: str, style: str) -> None:
    line = torch.linspace(-REACH, REACH, KDE_POINTS, dtype=torch.float64)
    heights, levels = density(points, line, line)
    axis.contour(line, line, heights, levels=levels, colors=colour, linestyles=style, linewidths=1.3)


# --- figures ---


def figure1(folder: Folder) -> Figure:
    fitted, data = fitted_in(folder, "LinearJTEx", "VAE")
    q = q_of_truth(folder, data)
    grids = closed_forms.grids()
    figure = figures._figure(width=8.0, height=10.2)
    axes = figure.subplots(3, 2)
    labels = ("A: $\\min_q$ KL$[q\\,\\|\\,p(z\\,|\\,x)]$, nats", "B: $I(X;Z)$, nats")
    for axis, name, label in zip(axes[0], ("gap", "information"), labels, strict=True):
        b = grids["b"] * 1000
        image = axis.pcolormesh(b, b, grids[name].T, cmap="cividis", shading="nearest")
        figure.colorbar(image, ax=axis, shrink=0.9)
        lines = axis.contour(b, b, grids[name].T, levels=LINES[name], colors="white", linewidths=1.0)
        axis.clabel(lines, fmt="%g", fontsize=8.5)
        axis.plot([6], [6], marker="*", color="white", markeredgecolor="black", markersize=13)
        axis.annotate("true $B$", (6, 6), (9, -14), textcoords="offset points", color="white", fontsize=9.5)
        axis.set(title=label, xlabel="$B_{11}\\cdot 10^3$", ylabel="$B_{22}\\cdot 10^3$", aspect="equal")
    mean, covariance = lf.linear_gaussian_marginal(fitted.model)
    zero, identity = torch.zeros(2), torch.eye(2)
    true_covariance = data.truth.covariance  # type: ignore[attr-defined]
    samples = (data.test, fitted.sample(len(data.test), seed=1))
    for axis, x, title, colour in zip(axes[1], samples, ("C: data of the truth", "D: data of the VAE"), PAIR, strict=True):
        figures._points(axis, x, colour, "o" if colour == TRUE_COLOUR else "x", "")
        figures._ellipses(axis, zero, true_covariance, TRUE_COLOUR, "-", "true density")
        figures._ellipses(axis, mean, covariance, LEARNED_COLOUR, "--", "learned density")
        axis.set(title=title, xlabel="$x_1$", ylabel="$x_2$")
    drawn = (draw_of_q(q, data.test), draw_of_q(fitted.system.inference, data.test))
    titles = ("E: $q(z\\,|\\,x)$ under the truth", "F: $q(z\\,|\\,x)$ of the VAE")
    for axis, z, title, colour in zip(axes[2], drawn, titles, PAIR, strict=True):
        figures._points(axis, z, colour, "o" if colour == TRUE_COLOUR else "x", "")
        figures._ellipses(axis, zero, identity, TRUE_COLOUR, "-", "prior")
        moment = torch.cov(z.T)
        figures._ellipses(axis, z.mean(0), moment, LEARNED_COLOUR, "--", "Gaussian fit of the draws")
        axis.set(title=title, xlabel="$z_1$", ylabel="$z_2$", aspect="equal", xlim=(-REACH, REACH), ylim=(-REACH, REACH))
    for row in axes[1:]:
        limits = [max(abs(v) for axis in row for v in get(axis)) for get in (_x_limits, _y_limits)]
        for axis in row:
            axis.set(xlim=(-limits[0], limits[0]), ylim=(-limits[1], limits[1]))
        row[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9.5, frameon=False)
    return figure


def _x_limits(axis: Axes) -> tuple[float, float]:
    return axis.get_xlim()


def _y_limits(axis: Axes) -> tuple[float, float]:
    return axis.get_ylim()


LINES = {"gap": (0.1, 0.2, 0.4, 0.8, 1.6), "information": (5.0, 5.5, 6.0, 6.5, 7.0)}
PAIR = (TRUE_COLOUR, LEARNED_COLOUR)


def posteriors(dataset: str, methods: tuple[str, ...]) -> Callable[[Folder], Figure]:
    """A row a model, the truth first: means of q on the left, of the true posterior on the right."""

    def draw(folder: Folder) -> Figure:
        rows: list[Means] = []
        for method in methods:
            fitted, data = fitted_in(folder, dataset, method)
            if not rows:
                rows.append(means_of(true_model(data), q_of_truth(folder, data), "ground truth", data.test))
            rows.append(means_of(fitted.model, fitted.system.inference, LABELS[method], data.test))
        figure = figures._figure(width=8.0, height=3.7 * len(rows) + 0.5)
        axes = figure.subplots(len(rows), 2, squeeze=False, sharex=True, sharey=True)
        for row, means in zip(axes, rows, strict=True):
            colour = TRUE_COLOUR if means.name == "ground truth" else LEARNED_COLOUR
            for axis, points, what in zip(row, (means.q, means.posterior), ("$q(z\\,|\\,x)$", "$p(z\\,|\\,x)$"), strict=True):
                figures._points(axis, points, colour, "o" if colour == TRUE_COLOUR else "x", "means, one a test row")
                _contours(axis, points, "#0072B2", "-")
                figures._ellipses(axis, torch.zeros(2), torch.eye(2), "0.45", ":", "prior, 1 to 3 standard deviations")
                axis.plot([], [], color="#0072B2", linewidth=1.3, label="their density (25, 50, 75, 95% inside)")
                axis.set(title=f"{means.name}: means of {what}", aspect="equal", xlim=(-REACH, REACH), ylim=(-REACH, REACH))
            row[0].set_ylabel("$z_2$")
        for axis in axes[-1]:
            axis.set_xlabel("$z_1$")
        handles, labels = axes[-1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9.5, frameon=False, markerscale=2)
        return figure

    return draw


DRAWN: dict[str, Callable[[Folder], Figure]] = {
    "figure1": figure1,
    "figure2": posteriors("LinearJTEx", ("VAE",)),
    "figure3": posteriors("LinearJTEx", ("LiBI", "ours")),
    "figure4": posteriors("CubicJTEx", ("VAE",)),
    "figure5": posteriors("CubicJTEx", ("LiBI", "ours")),
}
