"""True and false positives and negatives, of hard masks and of probabilities."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from medseg.errors import ConfigError, GeometryError


class Counts(NamedTuple):
    """Voxel counts of the four outcomes; tensors, arrays or numbers, of one shape.

    Example:
        >>> counts = Counts(tp=3, fp=1, tn=5, fn=0)
        >>> counts.tp + counts.fn
        3
    """

    tp: Any
    fp: Any
    tn: Any
    fn: Any


def confusion_counts(pred: Tensor | np.ndarray, truth: Tensor | np.ndarray, power: int = 1) -> Counts:
    """Count the outcomes of each image and channel.

    Masks of booleans or integers are counted exactly, as int64. Where either is of floating point, the counts are the
    soft ones, differentiable: TP = Σ y ŷ, FP = Σ ŷ − TP, FN = Σ y − TP, summed in float32 at least (half precision
    would overflow at 65504 voxels). float32 itself counts exactly up to 2²⁴ voxels: give large hard masks as
    booleans.

    Args:
        pred: masks or probabilities, shape ``(B, C, *spatial)``; a label map is to be split into channels first.
        truth: of the same shape.
        power: exponent of y and ŷ in the last two sums, for the losses with squares in the denominator. Hard masks do
            not notice.

    Returns:
        Counts of shape ``(B, C)``, tensors for tensors and arrays for arrays.

    Raises:
        GeometryError: where the shapes differ.
        ConfigError: where an integer mask holds anything but 0 and 1.

    Source:
        Definitions 2.3.1 to 2.3.4 and equations 2.63 to 2.65 of Moe 2019.

    Example:
        >>> pred = np.array([[[1, 1, 0, 0]]])
        >>> confusion_counts(pred, np.array([[[1, 0, 1, 0]]]))
        Counts(tp=array([[1]]), fp=array([[1]]), tn=array([[1]]), fn=array([[1]]))
        >>> confusion_counts(pred * 0.75, pred).tp.item()
        1.5
    """
    if pred.shape != truth.shape or pred.ndim < 3:
        raise GeometryError(
            f"prediction of shape {tuple(pred.shape)} against truth of shape {tuple(truth.shape)}: "
            "expected the same (batch, channels, *spatial)"
        )
    arrays = isinstance(pred, np.ndarray)
    a, b = _plain(pred), _plain(truth)
    axes = tuple(range(2, a.ndim))
    if a.is_floating_point() or b.is_floating_point():
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.to(dtype), b.to(dtype)
        tp = (a * b).sum(axes)
        positive, true = (a.pow(power).sum(axes), b.pow(power).sum(axes)) if power != 1 else (a.sum(axes), b.sum(axes))
    else:
        a, b = _mask(a, "prediction"), _mask(b, "truth")
        tp, positive, true = _count(a & b), _count(a), _count(b)
    fp, fn = positive - tp, true - tp
    tn = a[0, 0].numel() - tp - fp - fn
    counts = (tp, fp, tn, fn)
    return Counts(*(c.numpy() for c in counts)) if arrays else Counts(*counts)


def _plain(values: Tensor | np.ndarray) -> Tensor:
    if isinstance(values, np.ndarray):
        # torch knows neither a negative stride nor the other byte order.
        return torch.from_numpy(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")))
    return values if type(values) is Tensor else values.as_subclass(Tensor)


def _count(mask: Tensor) -> Tensor:
    if mask.device.type == "cpu":  # where NumPy counts booleans many times faster than torch sums them
        return torch.as_tensor(np.count_nonzero(mask.numpy(), axis=tuple(range(2, mask.ndim))))
    return mask.flatten(2).sum(-1)


def _mask(values: Tensor, name: str) -> Tensor:
    if values.dtype == torch.bool:
        return values
    mask = values == 1
    if not torch.equal(mask, values != 0):
        raise ConfigError(
            f"{name} holds {values.max().item()}; expected 0 and 1, one channel for each label of a label map"
        )
    return mask
