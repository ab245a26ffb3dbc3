"""Where a point of a table lies in an image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def is_picture(shape: Sequence[int], affine: NDArray[np.float64]) -> bool:
    """Whether an image in a dataset is a picture, or a part of one: a slice whose pixels are in no patient.

    Example:
        >>> is_picture((20, 20, 1), np.eye(4)), is_picture((20, 20, 1), np.diag([-0.5, -0.5, 3, 1]))
        (True, False)
    """
    return shape[2] == 1 and np.array_equal(np.abs(affine[:3, :3]), np.eye(3))


def position_index(text: str, shape: Sequence[int], affine: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Give a position of ``cases.csv`` as an index into its image; None where it is none.

    Args:
        text: three numbers, RAS mm, with blanks or commas between them; of a picture its column and row, from 0, and
            nothing or 0 besides.
        shape: of the image.
        affine: of the image.

    Example:
        >>> position_index("10 -4 9", (20, 20, 5), np.diag([2.0, 2.0, 3.0, 1.0]))
        array([ 5., -2.,  3.])
        >>> position_index("12, 7", (20, 20, 1), np.eye(4))
        array([12.,  7.,  0.])
    """
    try:
        numbers = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        return None
    if len(numbers) == 2 and is_picture(shape, affine):
        numbers.append(0.0)
    if len(numbers) != 3 or not np.isfinite(numbers).all():
        return None
    return (np.linalg.inv(affine) @ [*numbers, 1.0])[:3]
