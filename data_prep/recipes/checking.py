"""What recipes check alike: options, tables, and files that cannot be read."""

import csv
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.recipes.base import Unpaired
from medseg.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from medseg.io import Series


def check_choice(flag: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse the value of an option that is none of those it may have.

    Raises:
        ConfigError: it names ``flag``.

    Example:
        >>> check_choice("--fov", "zero", ("leave", "channel"))
        Traceback (most recent call last):
        medseg.errors.ConfigError: --fov: 'zero' given, leave or channel expected
    """
    if value not in allowed:
        *others, last = allowed
        raise ConfigError(f"{flag}: {value!r} given, {', '.join(others)} or {last} expected")


def check_millimeters(flag: str, sizes: Sequence[float] | None) -> None:
    """Refuse millimeters that are not above 0; None is an option that was not given.

    Raises:
        ConfigError: it names ``flag``.
    """
    if sizes is not None and not 0 < min(sizes) <= max(sizes) < float("inf"):
        raise ConfigError(f"{flag}: {' '.join(f'{size:g}' for size in sizes)} given, positive mm expected")


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a CSV file as text without spaces around; empty rows are passed over.

    Cells are parted by what parts the titles: commas, semicolons (as spreadsheets write where the comma is the decimal
    point) or tabs. A byte order mark, any line ends and further columns will do.

    Args:
        path: of the file.
        columns: that it must have.

    Returns:
        a dictionary per row, by title, and its line in the file as ``"line"``.

    Raises:
        DatasetError: no such file, no CSV file in UTF-8, one of the columns is missing or stands there twice, or a row
            has more cells than there are titles.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), skipinitialspace=True, strict=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}: expected a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    titles = rows[0][1] if rows else []
    for column in columns:
        if (count := titles.count(column)) != 1:
            number = f"{count} columns" if count else "no column"
            raise DatasetError(f"{path}: {number} {column!r}; it has {', '.join(titles) or 'none'}")
    for line, cells in rows[1:]:
        if any(cells[len(titles) :]):
            raise DatasetError(f"{path}: line {line}: {len(cells)} cells, {len(titles)} expected as there are titles")
    return [
        dict(zip_longest(titles, cells[: len(titles)], fillvalue="")) | {"line": str(line)}
        for line, cells in rows[1:]
        if any(cells)
    ]


def unreadable(found: "Sequence[Series]") -> list[Unpaired]:
    """What :func:`medseg.io.find_series` could not open: folders, and files that claim to be an image and are none."""
    return [
        Unpaired(series.files, series.problems[0].removeprefix(f"{series.files[0]}: "))
        for series in found
        if series.problems and not series.is_image
    ]


def instance_numbers(files: Sequence[Path]) -> list[int | None]:
    """InstanceNumber of each DICOM file, None where it has none that is a whole number."""
    import pydicom

    tag = "InstanceNumber"
    values = (pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[tag]).get(tag) for file in files)
    return [int(value) if isinstance(value, int) else None for value in values]
