"""`data_prep split`: who trains, who validates, who is kept for the test."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.check import write_report
from medseg.data import DatasetFolder, make_splits, split_table
from medseg.errors import DatasetError


def split_dataset(
    dataset: Path,
    *,
    seed: int,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    folds: int | None = None,
    test_fraction: float = 0.0,
    stratify: str | None = None,
    column: str | None = None,
    force: bool = False,
) -> None:
    """Split a dataset by patient, keep the split in it, and print its parts.

    The arguments but ``force`` are those of :func:`medseg.data.make_splits`; ``force`` replaces a split that differs.

    Raises:
        DatasetError: there is another split already and ``force`` is not set; or as for ``make_splits``.
    """
    folder = DatasetFolder(dataset)
    splits = make_splits(
        folder.cases,
        seed=seed,
        fractions=fractions,
        folds=folds,
        test_fraction=test_fraction,
        stratify=stratify,
        column=column,
    )
    path = folder.root / "splits.json"
    if path.exists() and not force:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if before != splits:
            raise DatasetError(
                f"{path}: there is another split already; --force replaces it, and with it the cases that no model "
                "may have seen: train again before you score the test part"
            )
    folder.write_split(splits)
    if (folder.root / "report.html").exists():
        write_report(folder.root)  # it shows the parts, and what the check says of them
    counts = split_table(splits, folder.cases)
    console = Console()
    how = f"by patient with seed {seed}" if column is None else f"as published in the column {column}"
    console.print(f"{folder.root.name}, split {how}")
    table = Table()
    for column in counts.columns:
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in counts.itertuples(index=False):
        table.add_row(*map(str, row))
    console.print(table)
