"""Figures draw what they are given."""

import matplotlib
import matplotlib.colors
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from medseg.report import (
    Pictures,
    case_dice_plot,
    dice_histogram,
    distribution_plot,
    patient_box_plot,
    slice_pictures,
    training_curves,
)
from medseg.report.figures import BLUE, ORANGE, PREDICTION_COLOR, STYLE, TRUTH_COLOR
from medseg.report.page import embed


def metrics(train: NDArray[np.float64], name: str = "loss", val: dict[int, float] | None = None) -> pd.DataFrame:
    rows = [(i, "train", name, value) for i, value in enumerate(train, 1)]
    rows += [(i, "val", name, value) for i, value in (val or {}).items()]
    return pd.DataFrame(rows, columns=["iteration", "phase", "name", "value"])


def lines(axes: Axes, color: str) -> list[Line2D]:
    return [line for line in axes.lines if matplotlib.colors.same_color(line.get_color(), color)]


def test_training_curve_is_a_rolling_mean_over_51_iterations() -> None:
    values = np.exp(np.random.default_rng(0).standard_normal(400))
    figure = training_curves({"run": metrics(values, val={200: 0.5})})
    loss = figure.axes[0]
    assert loss.get_yscale() == "log"
    (mean,) = lines(loss, BLUE)
    assert mean.get_ydata()[199] == pytest.approx(values[199 - 25 : 199 + 26].mean())
    (points,) = lines(loss, ORANGE)
    assert list(points.get_xydata()[0]) == [200, 0.5]
    inner = loss.collections[-1].get_paths()[0].vertices
    window = values[199 - 25 : 199 + 26]
    at = inner[inner[:, 0] == 200][:, 1]
    assert at.max() == pytest.approx(window.mean() + window.std())


def test_window_counts_iterations_where_only_every_tenth_was_logged() -> None:
    table = metrics(np.arange(1.0, 101.0))
    table["iteration"] *= 10
    (mean,) = lines(training_curves({"run": table}).axes[0], BLUE)
    assert mean.get_ydata()[49] == pytest.approx(50.0)  # five points around the fiftieth
    assert mean.get_ydata()[0] == pytest.approx(2.0)  # at the edge three are left


def test_losses_below_zero_have_no_logarithm() -> None:
    figure = training_curves({"run": metrics(np.linspace(0.5, -0.5, 60))})
    assert figure.axes[0].get_yscale() == "linear"


def test_one_loss_below_zero_makes_the_axis_of_all_runs_linear() -> None:
    figure = training_curves({"above": metrics(np.linspace(2, 1, 60)), "below": metrics(np.linspace(0.5, -0.5, 60))})
    assert {axes.get_yscale() for axes in figure.axes} == {"linear"}
    assert {axes.get_ylabel() for axes in figure.axes[::2]} == {"Loss"}


def test_a_run_without_dice_leaves_the_others_their_ticks() -> None:
    dice = pd.concat([metrics(np.ones(5)), metrics(np.full(5, 0.5), "dice")])
    figure = training_curves({"with": dice, "without": metrics(np.ones(5))})
    figure.draw_without_rendering()
    labels = [[tick.label1 for tick in axes.yaxis.get_major_ticks()] for axes in figure.axes[1::2]]
    assert any(label.get_visible() and label.get_text() for label in labels[0])
    assert not any(label.get_visible() for label in labels[1])


def test_dice_curve_is_not_the_dice_loss() -> None:
    table = pd.concat([metrics(np.full(10, 0.3), "dice_loss"), metrics(np.full(10, 0.8), "mean_dice")])
    loss, dice = training_curves({"run": table}).axes[:2]
    assert list(lines(loss, BLUE)[0].get_ydata()) == pytest.approx([0.3] * 10)
    assert list(lines(dice, BLUE)[0].get_ydata()) == pytest.approx([0.8] * 10)


def test_a_curve_that_was_not_recorded_is_said() -> None:
    dice = training_curves({"run": metrics(np.ones(5))}).axes[1]
    assert [text.get_text() for text in dice.texts] == ["not recorded"]


def test_histogram_counts() -> None:
    figure = dice_histogram({"a": [0.0, 0.04, 0.1 + 0.2, 1.0, np.nan], "b": [0.5]})
    first, second = figure.axes[:2]
    heights = [bar.get_height() for bar in first.patches]
    assert (heights[0], heights[6], heights[19], sum(heights)) == (2, 1, 1, 4)
    assert sum(bar.get_height() for bar in second.patches) == 1
    assert first.get_ylim() == second.get_ylim()


def test_boxes_stand_in_the_given_order_with_quartiles_and_diamonds() -> None:
    dice = {"run": {"bad": [0.1, 0.2, 0.3, 0.4, 0.5], "good": [0.8, 0.81, 0.82, 0.83, 0.1]}}
    axes = patient_box_plot(dice).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["bad", "good"]
    box = axes.patches[0].get_path().vertices[:, 1]
    assert (box.min(), box.max()) == pytest.approx((0.2, 0.4))
    diamonds = [line for line in axes.lines if line.get_marker() == "D"]
    assert [list(line.get_ydata()) for line in diamonds] == [[], [0.1]]
    named = patient_box_plot(dice, ["good", "bad"]).axes[0]
    assert [tick.get_text() for tick in named.get_xticklabels()] == ["good", "bad"]


def test_long_names_that_differ_at_their_end_stay_apart() -> None:
    patients = [f"hippocampus_{n:03d}" for n in range(12)]
    axes = patient_box_plot({"run": {patient: [0.5, 0.6] for patient in patients}}).axes[0]
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert len(set(names)) == 12
    assert all(len(name) <= 14 and name.endswith(patient[-4:]) for name, patient in zip(names, patients, strict=True))


def test_many_patients_are_shared_among_rows() -> None:
    figure = patient_box_plot({"run": {f"P{n:03d}": [n / 70, n / 71] for n in range(70)}}, per_row=30)
    names = [tick.get_text() for axes in figure.axes for tick in axes.get_xticklabels()]
    assert len(figure.axes) == 3
    assert names == [f"P{n:03d}" for n in range(70)]


def test_case_plot_shows_every_case() -> None:
    axes = case_dice_plot({"a": {"x": [0.5, 0.6, np.nan], "y": [0.7]}, "b": {"x": [0.1], "y": []}}).axes[0]
    points = [c.get_offsets() for c in axes.collections if isinstance(c, PathCollection)]
    assert [sorted(np.asarray(p)[:, 1]) for p in points] == [[0.5, 0.6], [0.7], [0.1], []]


def test_distribution_marks_what_is_flagged() -> None:
    figure = distribution_plot({"gtv": [1.0, 2.0, 0.0, 300.0]}, {"gtv": [False, False, False, True]}, "ml", log=True)
    plain, flagged = (c.get_offsets() for c in figure.axes[0].collections if isinstance(c, PathCollection))
    assert list(np.asarray(plain)[:, 0]) == [1.0, 2.0]  # 0 has no place on a logarithmic axis
    assert list(np.asarray(flagged)[:, 0]) == [300.0]


@pytest.fixture
def pictures() -> Pictures:
    """Three slices of 20 x 30 pixels, 1 x 2 mm each: truth (at the edge) and prediction, truth alone, nothing."""
    label, pred = np.zeros((3, 20, 30), np.uint8), np.zeros((3, 20, 30), np.uint8)
    label[0, 0:6, 10:20] = 1
    pred[0, 3:9, 10:20] = 1
    label[1, 8:12, 4:8] = 2
    image = np.stack([np.linspace(0, 1, 1800).reshape(3, 20, 30), np.zeros((3, 20, 30))]).astype(np.float32)
    return Pictures("c", "p", image, label, pred, np.array([3, 5, 7]), (1.0, 2.0), ("CT", "PET"))


def test_outlines_enclose_the_masks(pictures: Pictures) -> None:
    axes = slice_pictures(pictures, {1: "gtv", 2: "node"}).axes[0]
    truth, pred = lines(axes, TRUTH_COLOR), lines(axes, PREDICTION_COLOR)
    # Two channels: the outlines of truth in slices 0 and 1, of the prediction in slice 0.
    assert (len(truth), len(pred)) == (4, 2)
    tile = axes.images[0].get_extent()  # left, right, bottom, top
    x = (np.asarray(truth[0].get_xdata()) - tile[0]) / (tile[1] - tile[0]) * 20
    y = (np.asarray(truth[0].get_ydata()) - tile[3]) / (tile[2] - tile[3]) * 30
    assert (x.min(), x.max(), y.min(), y.max()) == pytest.approx((0, 6, 10, 20))
    assert (tile[2] - tile[3]) / (tile[1] - tile[0]) == pytest.approx(30 * 2.0 / (20 * 1.0))
    # The image has its first axis from left to right.
    np.testing.assert_array_equal(axes.images[0].get_array(), pictures.image[0, 0].T)


def test_edges_of_the_patient_are_named_once(pictures: Pictures) -> None:
    axes = slice_pictures(Pictures(**(vars(pictures) | {"edges": ("R", "A")}))).axes[0]
    left, right, bottom, top = axes.images[0].get_extent()
    places = {text.get_text(): text.get_position() for text in axes.texts if text.get_text() in ("R", "A")}
    assert places["R"][0] < left + 0.1 < places["A"][0] < right - 0.1
    assert places["A"][1] < top + 0.1 < places["R"][1] < bottom - 0.1
    assert len([text for text in axes.texts if text.get_text() in ("R", "A")]) == 2


def test_titles_tell_dice_of_each_slice(pictures: Pictures) -> None:
    texts = [text.get_text() for text in slice_pictures(pictures).axes[0].texts]
    assert texts == ["slice 3: Dice 0.50", "CT", "PET", "slice 5: Dice 0.00", "slice 7: no label"]
    swapped = Pictures(**(vars(pictures) | {"label": pictures.pred, "pred": pictures.label}))
    assert "slice 5: false alarm" in [text.get_text() for text in slice_pictures(swapped).axes[0].texts]


def test_labels_differ_in_line_and_are_named(pictures: Pictures) -> None:
    axes = slice_pictures(pictures, {1: "gtv", 2: "node"}).axes[0]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["Truth", "Prediction", "gtv", "node"]
    assert len({line.get_linestyle() for line in lines(axes, TRUTH_COLOR)}) == 2


def test_pet_is_shown_to_its_limit_as_a_square_root(pictures: Pictures) -> None:
    image = pictures.image.copy()
    image[1, 0, 0, 0], image[1, 0, 1, 0] = 2.5, 40.0
    shown = slice_pictures(Pictures(**(vars(pictures) | {"image": image})), limits={"PET": (0.0, 10.0)})
    pet = shown.axes[0].images[1].get_array()
    assert pet is not None
    assert (pet[0, 0], pet[0, 1]) == (0.5, 1.0)


@pytest.mark.parametrize("vector", [False, True])
def test_the_same_figure_is_the_same_bytes(vector: bool) -> None:
    def figure() -> Figure:
        return dice_histogram({"a $x_1$": [0.1, 0.5, 0.5, 0.9]})

    assert embed(figure(), vector) == embed(figure(), vector)


def test_style_does_not_leak() -> None:
    before = dict(matplotlib.rcParams)
    dice_histogram({"a": [0.5]})
    assert dict(matplotlib.rcParams) == before
    assert before["svg.hashsalt"] != STYLE["svg.hashsalt"]


def test_nothing_to_draw_is_no_error() -> None:
    nothing = [
        training_curves({}),
        dice_histogram({}),
        dice_histogram({"a": []}),
        patient_box_plot({}),
        patient_box_plot({"a": {"p": []}}),
        case_dice_plot({}),
        distribution_plot({}),
        distribution_plot({"x": [np.nan]}, log=True),
    ]
    for figure in nothing:
        assert embed(figure).startswith("data:image/png;base64,")
