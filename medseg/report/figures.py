"""Figures of runs and datasets, one function each; every function returns a `matplotlib.figure.Figure`.

Colors are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which color-blind readers tell apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray
from skimage.measure import find_contours

from ..io.channel_names import is_pet
from .runs import Pictures

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
RUN_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
TRUTH_COLOR, PREDICTION_COLOR = SKY, ORANGE
INK, FAINT = "#222222", "#8a8a8a"
LINE_STYLES = ("-", "--", ":", "-.")

STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # names of cases and labels are text, even where they hold dollar signs
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "medseg",  # the same figure is the same bytes
}


def training_curves(metrics: Mapping[str, pd.DataFrame], window: int = 51) -> Figure:
    """Loss (logarithmic) and Dice over the iterations, a row of two panels per run.

    Training is a mean rolling over ``window`` iterations, with bands of one (dark) and two (light) standard deviations;
    validation is a point per validation.

    Args:
        metrics: ``metrics.csv`` by run name: columns iteration, phase (train or val), name, value.
        window: iterations to roll over.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.9 * max(len(metrics), 1)), layout="constrained")
        grid = figure.subplots(max(len(metrics), 1), 2, squeeze=False, sharex="row", sharey="col")
        for column, word in zip(grid.T, ("loss", "dice"), strict=True):
            series = [[_series(table, phase, word) for phase in ("train", "val")] for table in metrics.values()]
            # The runs share the axis: one loss below zero, and none is logarithmic.
            log = word == "loss" and all((values > 0).all() for pair in series for values in pair)
            for axes, run, (train, val) in zip(column, metrics, series, strict=False):
                _curve(axes, train, val, word, window, log)
                axes.set_title(f"{_shortened(run, 40)}: {'loss' if word == 'loss' else 'Dice'}", loc="left")
                axes.set_xlabel("Iteration")
                axes.set_ylabel("Loss (log scale)" if log else word.capitalize())
            if log and metrics:
                column[0].set_yscale("log")
                _log_ticks(column[0].yaxis)
            elif word == "dice":
                column[0].set_ylim(0, 1.05)
        handles = [
            Line2D([], [], color=BLUE, lw=1.5, label=f"Training, mean over {window} iterations"),
            Patch(color=BLUE, alpha=0.32, lw=0, label="± 1 SD"),
            Patch(color=BLUE, alpha=0.14, lw=0, label="± 2 SD"),
            Line2D([], [], color=ORANGE, marker="o", ms=4, lw=1, label="Validation"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=4)
        return figure


def _curve(axes: Axes, train: "pd.Series[float]", val: "pd.Series[float]", word: str, window: int, log: bool) -> None:
    axes.grid(True)
    if train.empty and val.empty:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", color=FAINT, transform=axes.transAxes)
        axes.tick_params(left=False, labelleft=False)
        return
    if not train.empty:
        steps = np.diff(train.index.to_numpy())
        points = max(1, round(window / (float(np.median(steps)) if len(steps) else 1.0)))
        rolling = train.rolling(points, center=True, min_periods=1)
        mean, sd = rolling.mean(), rolling.std(ddof=0)
        floor = float(train.min()) / 2 if log else (0.0 if word == "dice" else -np.inf)
        ceiling = 1.0 if word == "dice" else np.inf
        for width, alpha in ((2, 0.14), (1, 0.22)):  # the inner band lies on the outer one
            low, high = (mean - width * sd).clip(lower=floor), (mean + width * sd).clip(upper=ceiling)
            axes.fill_between(train.index, low, high, color=BLUE, alpha=alpha, lw=0)
        axes.plot(train.index, mean, color=BLUE, lw=1.5)
    if not val.empty:
        axes.plot(val.index, val, color=ORANGE, lw=0.8, marker="o", ms=4, mec="white", mew=0.5, zorder=4)
        if word == "dice":
            place = int(val.to_numpy().argmax())
            best = val.index.to_numpy(float)[place]
            axes.annotate(
                f"best {val.iloc[place]:.3f} at {best:.0f}",
                (best, val.iloc[place]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="right" if best > sum(axes.get_xlim()) / 2 else "left",
                fontsize=8,
                path_effects=[Stroke(linewidth=2.5, foreground="white"), Normal()],
            )


def _series(table: pd.DataFrame, phase: str, word: str) -> "pd.Series[float]":
    """The metric that ``word`` means, by iteration: of that name, or ``mean_…``, or else the first that holds it."""
    rows = table[(table["phase"] == phase) & table["value"].notna()]
    other = "dice" if word == "loss" else "loss"
    names = [name for name in dict.fromkeys(rows["name"]) if word in name.lower()]
    names.sort(key=lambda name: (name.lower() != word, name.lower() != f"mean_{word}", other in name.lower()))
    if not names or (word == "dice" and "loss" in names[0].lower()):
        return pd.Series(dtype=float)
    return rows[rows["name"] == names[0]].set_index("iteration")["value"].sort_index()


def dice_histogram(dice: Mapping[str, ArrayLike], bins: int = 20, xlabel: str = "Dice per slice") -> Figure:
    """Histogram of Dice, runs side by side on the same axes, with mean (line) and median (dashed).

    Args:
        dice: values from 0 to 1 by run name; NaN is left out.
        bins: number of bars from 0 to 1.
        xlabel: what a value is.
    """
    with matplotlib.rc_context(STYLE):
        columns = min(max(len(dice), 1), 3)
        rows = -(-max(len(dice), 1) // columns)
        figure = Figure(figsize=(10 if columns > 1 else 5.6, 2.8 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(dice) :]:
            axes.set_visible(False)
        for number, (axes, (run, values)) in enumerate(zip(grid.flat, dice.items(), strict=False)):
            finite = _finite(values)
            color = RUN_COLORS[number % len(RUN_COLORS)]
            axes.grid(True, axis="y")
            # Rounded, so that 0.1 + 0.2 falls into the bar that begins at 0.3.
            axes.hist(
                np.round(finite, 9),
                bins=np.round(np.linspace(0, 1, bins + 1), 9),
                color=color,
                alpha=0.75,
                edgecolor="white",
                lw=0.6,
            )
            if len(finite):
                axes.axvline(float(finite.mean()), color=INK, lw=1.2)
                axes.axvline(float(np.median(finite)), color=INK, lw=1.2, ls="--")
            told = f", mean {finite.mean():.2f}, median {np.median(finite):.2f}" if len(finite) else ""
            axes.set_title(f"{_shortened(run, 40)}\nn = {len(finite)}{told}", loc="left")
            axes.set_xlim(0, 1)
            axes.set_xlabel(xlabel)
        grid[0, 0].yaxis.get_major_locator().set_params(integer=True)
        for row in grid:
            row[0].set_ylabel("Number")
        return figure


def patient_box_plot(
    dice: Mapping[str, Mapping[str, ArrayLike]],
    order: Sequence[str] | None = None,
    ylabel: str = "Dice per slice",
    per_row: int = 30,
) -> Figure:
    """Box plot of Dice for each patient, a box per run.

    Line: median. Box: first to third quartile. Whiskers: the last values within 1.5 times the box's length. Diamonds:
    the values beyond.

    Args:
        dice: values by run name, then by patient; NaN is left out.
        order: patients from left to right; by the first run's median, lowest first, when not given.
        ylabel: what a value is.
        per_row: boxes' patients in one row of axes.
    """
    with matplotlib.rc_context(STYLE):
        first = next(iter(dice.values()), {})
        if order is None:
            known = dict.fromkeys(patient for run in dice.values() for patient in run)
            order = sorted(known, key=lambda patient: (_median(first.get(patient, [])), patient))
        chunks = _chunks(order, per_row) or [[]]
        figure = Figure(figsize=(10, 0.3 + 2.6 * len(chunks)), layout="constrained")
        width = 0.72 / max(len(dice), 1)
        columns = max(len(chunk) for chunk in chunks)
        for axes, chunk in zip(figure.subplots(len(chunks), 1, squeeze=False).flat, chunks, strict=True):
            axes.grid(True, axis="y")
            for number, (_, run) in enumerate(dice.items()):
                positions = np.arange(len(chunk)) + (number - (len(dice) - 1) / 2) * width
                values = [_finite(run.get(patient, [])) for patient in chunk]
                _boxes(axes, values, positions, width * 0.86, RUN_COLORS[number % len(RUN_COLORS)])
            axes.set_xlim(-0.6, max(columns, 6) - 0.4)
            axes.set_ylim(-0.04, 1.04)
            axes.set_xticks(range(len(chunk)), [_shortened(patient) for patient in chunk])
            axes.tick_params(axis="x", length=0)
            if any(len(patient) > 4 for patient in chunk) and columns > 8:
                axes.tick_params(axis="x", rotation=90)
            axes.set_ylabel(ylabel)
        axes.set_xlabel("Patient")
        if len(dice) > 1:
            _run_legend(figure, dice)
        return figure


def case_dice_plot(dice: Mapping[str, Mapping[str, ArrayLike]], ylabel: str = "Dice per case") -> Figure:
    """Every case's Dice as a point over a box, a group per label and a box per run.

    Args:
        dice: values by run name, then by label; NaN is left out.
        ylabel: what a value is.
    """
    with matplotlib.rc_context(STYLE):
        labels = list(dict.fromkeys(label for run in dice.values() for label in run))
        boxes = max(len(labels) * len(dice), 1)
        figure = Figure(figsize=(min(10.0, 2.4 + 1.3 * boxes), 3.4), layout="constrained")
        axes = figure.subplots()
        axes.grid(True, axis="y")
        width = 0.72 / max(len(dice), 1)
        for number, run in enumerate(dice.values()):
            color = RUN_COLORS[number % len(RUN_COLORS)]
            positions = np.arange(len(labels)) + (number - (len(dice) - 1) / 2) * width
            values = [_finite(run.get(label, [])) for label in labels]
            _boxes(axes, values, positions, width * 0.7, color, outliers=False)
            for position, points in zip(positions, values, strict=True):
                spread = _spread(len(points)) * width * 0.28
                axes.scatter(position + spread, points, s=13, color=color, alpha=0.75, lw=0, zorder=4)
        axes.set_xlim(-0.6, max(len(labels), 1) - 0.4)
        axes.set_xticks(range(len(labels)), [_shortened(label, 30) for label in labels])
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(-0.04, 1.04)
        axes.set_ylabel(ylabel)
        axes.set_xlabel("Label")
        if len(dice) > 1:
            _run_legend(figure, dice)
        return figure


def distribution_plot(
    values: Mapping[str, ArrayLike], flagged: Mapping[str, ArrayLike] | None = None, xlabel: str = "", log: bool = False
) -> Figure:
    """A row of points over a box for each quantity; the flagged ones are orange diamonds.

    Args:
        values: numbers by name of the row; NaN is left out, and so is what a logarithmic axis cannot show (0 and less).
        flagged: for each row, which of its values are flagged.
        xlabel: the quantity with its unit.
        log: a logarithmic axis.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.9 + 0.62 * max(len(values), 1)), layout="constrained")
        axes = figure.subplots()
        axes.grid(True, axis="x")
        for row, (name, numbers) in enumerate(values.items()):
            array = np.asarray(numbers, float)
            flags = np.asarray((flagged or {}).get(name, np.zeros(len(array))), bool)
            shown = np.isfinite(array) & ((array > 0) if log else True)
            array, flags = array[shown], flags[shown]
            if not len(array):
                continue
            axes.boxplot(
                [array],
                positions=[row],
                orientation="horizontal",
                widths=0.52,
                whis=(0, 100),
                manage_ticks=False,
                patch_artist=True,
                boxprops={"facecolor": "#e3edf5", "edgecolor": "#9db8cc", "linewidth": 0.8},
                medianprops={"color": INK, "linewidth": 1.4},
                whiskerprops={"color": "#9db8cc", "linewidth": 0.8},
                capprops={"color": "#9db8cc", "linewidth": 0.8},
            )
            height = row + 0.2 * _spread(len(array))
            axes.scatter(array[~flags], height[~flags], s=9, color=BLUE, alpha=0.55, lw=0, zorder=3)
            axes.scatter(array[flags], height[flags], s=26, marker="D", color=ORANGE, edgecolor=INK, lw=0.5, zorder=4)
        if log:
            axes.set_xscale("log")
            _log_ticks(axes.xaxis)
        axes.set_yticks(range(len(values)), [_shortened(name, 30) for name in values])
        axes.set_ylim(max(len(values), 1) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(xlabel)
        return figure


def slice_pictures(
    pictures: Pictures,
    labels: Mapping[int, str] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
    columns: int = 6,
) -> Figure:
    """The slices of one case with both outlines (truth blue, prediction orange), a row per channel in each block.

    A channel whose values lie within 0 and 1 (a windowed CT) is shown from 0 to 1. PET is shown from 0 to its limit
    with a square-root gray scale: as an exponent of 1/10 would, it keeps faint uptake visible, but it still tells hot
    from warm. Any other channel is shown between its first and 99th percentile. Several labels differ in line style.

    Args:
        pictures: the slices, see `read_pictures`.
        labels: label names by mask value, for the legend.
        limits: lowest and highest value shown, by channel name, in place of the rules above.
        columns: slices side by side.
    """
    with matplotlib.rc_context(STYLE):
        count, channels = len(pictures.slices), len(pictures.image)
        columns = max(1, min(columns, count))
        blocks = -(-count // columns)
        # One pair of axes in inches, tiles laid out by hand: twenty times faster than axes for each tile.
        left, top, title, gap = 0.24, 0.3, 0.19, 0.03
        width = (10.0 - left) / max(columns, 4) - gap
        height = width * pictures.image.shape[3] * pictures.spacing[1] / (pictures.image.shape[2] * pictures.spacing[0])
        block_height = title + channels * (height + gap) + 0.04
        size = (max(left + columns * (width + gap), 4.5), top + blocks * block_height)
        figure = Figure(figsize=size)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        values = [int(value) for value in np.union1d(pictures.label, pictures.pred) if value > 0]
        styles = {value: LINE_STYLES[(value - 1) % len(LINE_STYLES)] for value in values}
        shown = [_shown(pictures.image[channel], name, limits) for channel, name in enumerate(pictures.channel_names)]
        for position in range(count):
            block, column = divmod(position, columns)
            x, y = left + column * (width + gap), top + block * block_height + title
            text = _slice_title(pictures, position, values)
            axes.text(x + width / 2, y - 0.035, text, ha="center", va="bottom", fontsize=7.5)
            for channel, name in enumerate(pictures.channel_names):
                tile = (x, x + width, y + height, y)
                axes.imshow(
                    shown[channel][position].T, cmap="gray", vmin=0, vmax=1, extent=tile, interpolation="nearest"
                )
                for value, style in styles.items():
                    _outline(axes, pictures.label[position] == value, tile, color=TRUTH_COLOR, ls=style, lw=1.8)
                    _outline(axes, pictures.pred[position] == value, tile, color=PREDICTION_COLOR, ls=style, lw=1.1)
                if position == channel == 0 and pictures.edges:
                    _edges(axes, pictures.edges, tile)
                if column == 0:
                    axes.text(
                        left - 0.05, y + height / 2, _shortened(name), rotation=90, ha="right", va="center", fontsize=8
                    )
                y += height + gap
        axes.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
        handles = [
            Line2D([], [], color=TRUTH_COLOR, lw=2.2, label="Truth"),
            Line2D([], [], color=PREDICTION_COLOR, lw=2.2, label="Prediction"),
        ]
        if len(values) > 1:
            names = labels or {}
            handles += [
                Line2D([], [], color=INK, lw=1.2, ls=style, label=_shortened(names.get(value, f"label {value}"), 30))
                for value, style in styles.items()
            ]
        # In axes' fractions: the legend's left edge stands over the first tile's.
        axes.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(left / size[0], 1),
            ncols=len(handles),
            borderpad=0.3,
            borderaxespad=0.0,
        )
        return figure


def _shown(
    image: NDArray[np.float32], name: str, limits: Mapping[str, tuple[float, float]] | None
) -> NDArray[np.float32]:
    if limits and name in limits:
        low, high = limits[name]
    elif is_pet(name):
        low, high = 0.0, float(np.percentile(image, 99.9))
    elif image.min() >= 0 and image.max() <= 1:
        low, high = 0.0, 1.0
    else:
        low, high = (float(value) for value in np.percentile(image, (1, 99)))
    scaled = np.clip((image - low) / max(high - low, 1e-6), 0, 1)
    return np.sqrt(scaled) if is_pet(name) else scaled


def _outline(axes: Axes, mask: NDArray[np.bool_], tile: tuple[float, float, float, float], **line: Any) -> None:
    """Draw the outline of a mask [X, Y] that is shown between left, right, bottom and top."""
    left, right, bottom, top = tile
    if not mask.any():
        return
    # A frame of background closes the outlines of what touches the edge; pixel i reaches from i to i + 1.
    for contour in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
        x, y = ((contour - 0.5) / mask.shape).T
        axes.plot(left + x * (right - left), top + y * (bottom - top), solid_joinstyle="round", **line)


def _edges(axes: Axes, edges: tuple[str, str], tile: tuple[float, float, float, float]) -> None:
    """Name what of the patient lies at the left and at the upper edge of a picture."""
    left, right, bottom, top = tile
    halo = [Stroke(linewidth=2, foreground="black"), Normal()]
    style: Any = {"color": "white", "fontsize": 8, "fontweight": "bold", "path_effects": halo}
    axes.text(left + 0.04, (bottom + top) / 2, edges[0], ha="left", va="center", **style)
    axes.text((left + right) / 2, top + 0.04, edges[1], ha="center", va="top", **style)


def _slice_title(pictures: Pictures, position: int, values: Sequence[int]) -> str:
    truth, pred = pictures.label[position], pictures.pred[position]
    dice = []
    for value in values:
        total = np.count_nonzero(truth == value) + np.count_nonzero(pred == value)
        if np.any(truth == value):
            dice.append(2 * np.count_nonzero((truth == value) & (pred == value)) / total)
    text = f"Dice {np.mean(dice):.2f}" if dice else ("false alarm" if pred.any() else "no label")
    return f"slice {pictures.slices[position]}: {text}"


def _boxes(
    axes: Axes,
    values: Sequence[NDArray[np.float64]],
    positions: NDArray[Any],
    width: float,
    color: str,
    outliers: bool = True,
) -> None:
    kept = [(position, array) for position, array in zip(positions, values, strict=True) if len(array)]
    if not kept:
        return
    axes.boxplot(
        [array for _, array in kept],
        positions=[position for position, _ in kept],
        widths=width,
        manage_ticks=False,
        patch_artist=True,
        showfliers=outliers,
        boxprops={"facecolor": matplotlib.colors.to_rgba(color, 0.3), "edgecolor": color, "linewidth": 0.9},
        medianprops={"color": color, "linewidth": 1.8},
        whiskerprops={"color": color, "linewidth": 0.9},
        capprops={"color": color, "linewidth": 0.9},
        flierprops={"marker": "D", "markersize": 3, "markerfacecolor": color, "markeredgecolor": "none", "alpha": 0.8},
    )


def _run_legend(figure: Figure, runs: Mapping[str, object]) -> None:
    handles = [
        Patch(facecolor=matplotlib.colors.to_rgba(color, 0.3), edgecolor=color, label=_shortened(run, 40))
        for run, color in zip(runs, RUN_COLORS * len(runs), strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4))


def _spread(count: int) -> NDArray[np.float64]:
    """Offsets in [-1, 1] that keep points apart, the same every time (the golden ratio's multiples)."""
    return np.mod(np.arange(count) * 0.6180339887, 1.0) * 2 - 1


def _log_ticks(axis: Axis) -> None:
    """Plain numbers (0.05, 20) on a logarithmic axis, also where it spans less than a decade."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(6))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, float).reshape(-1)
    return array[np.isfinite(array)]


def _median(values: ArrayLike) -> float:
    array = _finite(values)
    return float(np.median(array)) if len(array) else np.inf


def _chunks(items: Sequence[str], size: int) -> list[list[str]]:
    """Rows of nearly equal length, none above ``size``."""
    rows = -(-len(items) // size)
    return [list(chunk) for chunk in np.array_split(np.asarray(items, dtype=object), rows)] if rows else []


def _shortened(text: str, length: int = 14) -> str:
    """Text of at most ``length`` characters; the end stays, because that is where the names of patients differ."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= length else f"{text[: (length - 1) // 2]}…{text[-(length // 2) :]}"
