"""Rows of scores, one per case and label or one per slice and label: what a run writes to ``scores.csv``."""

from collections.abc import Mapping, Sequence
from math import inf, nan
from typing import Any

import numpy as np
from monai.metrics.utils import get_mask_edges, get_surface_distance
from scipy.ndimage import find_objects
from torch import Tensor

from medseg.errors import ConfigError, GeometryError

from .counts import Counts, confusion_counts, plain
from .scores import dice, f_beta, ppv, sensitivity, specificity

Row = dict[str, Any]


def case_scores(
    pred: Tensor | np.ndarray,
    truth: Tensor | np.ndarray,
    spacing: Sequence[float],
    labels: Mapping[str, int],
    *,
    beta: float = 2.0,
    tolerance_mm: float = 2.0,
) -> list[Row]:
    """Score the segmentation of one case, each label against all else.

    Args:
        pred: label map of shape ``(*spatial)`` or ``(1, *spatial)``, 2D or 3D.
        truth: label map on the same grid.
        spacing: voxel size in mm along each axis, in the order of the axes.
        labels: name and value of each label to score; the background is scored only if it is named.
        beta: of the column ``f_beta``.
        tolerance_mm: distance up to which ``surface_dice`` accepts a surface as right.

    Returns:
        A row per label with ``label, tp, fp, tn, fn, dice, f_beta, sensitivity, specificity, ppv, hd95_mm,
        surface_dice, truth_empty, pred_empty``. ``hd95_mm`` is the larger of the two directed 95th percentiles of the
        distance between the surfaces. For empty masks see :doc:`/explanation/conventions`.

    Raises:
        GeometryError: where shapes or spacing do not fit together.
        ConfigError: where a label map holds fractions, or the tolerance is negative.

    Source:
        MONAI's distances between surfaces; Nikolov et al. 2021, Clinically applicable segmentation of head and neck
        anatomy, for the surface Dice, here by the number of surface voxels.

    Example:
        >>> truth = np.zeros((8, 8, 4), np.uint8)
        >>> truth[2:6, 2:6, 1:3] = 1
        >>> [row] = case_scores(np.roll(truth, 1, axis=0), truth, (2.0, 1.0, 3.0), {"tumor": 1})
        >>> row["label"], row["tp"], row["fp"], float(row["dice"]), row["hd95_mm"], row["surface_dice"]
        ('tumor', 24, 8, 0.75, 2.0, 1.0)
    """
    pred_map, truth_map = _label_maps(pred, truth, spacing)
    if not 0 <= tolerance_mm < inf:
        raise ConfigError(f"tolerance_mm is {tolerance_mm}; expected a number from 0")
    rows = []
    for name, value in labels.items():
        p, t = (pred_map == value)[None, None], (truth_map == value)[None, None]
        row = _row(name, Counts(*(int(c.item()) for c in confusion_counts(p, t))), beta)
        row["hd95_mm"], row["surface_dice"] = _surface(p, t, spacing, tolerance_mm)
        rows.append({**row, **_emptiness(row)})
    return rows


def slice_scores(
    pred: Tensor | np.ndarray,
    truth: Tensor | np.ndarray,
    labels: Mapping[str, int],
    *,
    axis: int = -1,
    beta: float = 2.0,
) -> list[Row]:
    """Score each slice of one case by itself.

    Args:
        pred: label map of shape ``(X, Y, Z)`` or ``(1, X, Y, Z)``.
        truth: label map on the same grid.
        labels: name and value of each label to score.
        axis: the spatial axis that is cut, 0, 1 or 2 (or counted from the end).
        beta: of the column ``f_beta``.

    Returns:
        A row per label and slice, slices within labels, with ``slice`` (its index along the axis) and the columns of
        :func:`case_scores` without the surface distances.

    Raises:
        GeometryError: where the shapes do not fit together.
        ConfigError: where a label map holds fractions, or there is no such axis.

    Example:
        >>> truth = np.zeros((4, 4, 3), np.uint8)
        >>> truth[:2, :2, 1] = 1
        >>> rows = slice_scores(np.zeros_like(truth), truth, {"tumor": 1})
        >>> [(row["slice"], float(row["dice"]), row["truth_empty"]) for row in rows]
        [(0, 1.0, True), (1, 0.0, False), (2, 1.0, True)]
    """
    pred_map, truth_map = _label_maps(pred, truth, (1.0,) * 3)
    if not -3 <= axis < 3:
        raise ConfigError(f"axis is {axis}; expected 0, 1 or 2")
    p, t = (values.movedim(axis, 0)[:, None] for values in (pred_map, truth_map))
    rows = []
    for name, value in labels.items():
        per_slice = zip(*(c.flatten().tolist() for c in confusion_counts(p == value, t == value)), strict=True)
        for index, counts in enumerate(per_slice):
            row = _row(name, Counts(*counts), beta)
            rows.append({"slice": index, **row, **_emptiness(row)})
    return rows


def _label_maps(pred: Any, truth: Any, spacing: Sequence[float]) -> tuple[Tensor, Tensor]:
    maps = []
    for name, values in (("prediction", pred), ("truth", truth)):
        values = plain(values).detach().cpu()
        if values.ndim == len(spacing) + 1 and values.shape[0] == 1:
            values = values[0]
        if values.is_floating_point() and (values % 1 != 0).any():  # of infinity, the rest is no number
            raise ConfigError(
                f"{name} holds fractions or what is no finite number; expected a label map, so threshold or argmax it"
            )
        maps.append(values)
    shapes = [tuple(values.shape) for values in maps]
    if shapes[0] != shapes[1] or len(shapes[0]) != len(spacing):
        raise GeometryError(
            f"prediction of shape {shapes[0]} against truth of shape {shapes[1]}: expected the same, "
            f"with {len(spacing)} spatial axes"
        )
    if not all(0 < s < inf for s in spacing):
        raise GeometryError(f"spacing {tuple(spacing)} mm; expected positive numbers")
    return maps[0], maps[1]


def _row(name: str, counts: Counts, beta: float) -> Row:
    return {
        "label": name,
        **counts._asdict(),
        "dice": float(dice(counts)),
        "f_beta": float(f_beta(counts, beta)),
        "sensitivity": float(sensitivity(counts)),
        "specificity": float(specificity(counts)),
        "ppv": float(ppv(counts)),
    }


def _emptiness(row: Row) -> Row:
    return {"truth_empty": row["tp"] + row["fn"] == 0, "pred_empty": row["tp"] + row["fp"] == 0}


def _surface(pred: Tensor, truth: Tensor, spacing: Sequence[float], tolerance_mm: float) -> tuple[float, float]:
    if not pred.any() or not truth.any():
        return nan, 1.0 if pred.any() == truth.any() else 0.0
    masks = [mask[0, 0].numpy() for mask in (pred, truth)]
    box = find_objects((masks[0] | masks[1]).astype(np.uint8))[0]  # beyond it there is no surface
    edges = get_mask_edges(masks[0][box], masks[1][box], crop=False)
    mm = [float(s) for s in spacing]
    there, back = (get_surface_distance(*pair, spacing=mm) for pair in (edges, edges[::-1]))
    right = np.count_nonzero(there <= tolerance_mm) + np.count_nonzero(back <= tolerance_mm)
    # Not torch's quantile, by which MONAI has its Hausdorff distance: it refuses more than 2^24 voxels of surface.
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(hd95), float(right / (len(there) + len(back)))
