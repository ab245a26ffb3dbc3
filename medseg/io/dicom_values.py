"""Single values of a DICOM header, None where they are absent or unusable."""

import math
from collections.abc import Sequence
from typing import Any

from pydicom.dataset import Dataset


def integer(ds: Dataset, keyword: str) -> int | None:
    """Return an attribute as a whole number, None where it is absent or is none."""
    value = ds.get(keyword)
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def numbers(ds: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return an attribute of ``count`` finite numbers, None where it is absent or is something else."""
    value = ds.get(keyword)
    if value is None or value == "":
        return None
    try:
        numbers = tuple(float(number) for number in (value if is_list(value) else [value]))
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def first_number(ds: Dataset, keyword: str) -> float | None:
    """Return the first of the numbers of an attribute to six digits, None where there is none.

    Scanners write 4.92 and 4.9200001 for the same.

    Example:
        >>> ds = Dataset()
        >>> ds.EchoTime = "4.9200001"
        >>> first_number(ds, "EchoTime")
        4.92
    """
    value = first(ds.get(keyword))
    if value is None or value == "":
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{found:.6g}") if math.isfinite(found) else None


def first(value: Any) -> Any:
    """Return the first of several values, or the one."""
    return (value[0] if len(value) else None) if is_list(value) else value


def is_list(value: Any) -> bool:
    """Whether an attribute has several values."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def first_item(group: Dataset, shared: Dataset, keyword: str) -> Dataset:
    """Return the first item of a functional group, per frame before shared."""
    for place in (group, shared):
        if items := place.get(keyword):
            return items[0]
    return Dataset()
