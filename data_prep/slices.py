"""`data_prep slices`: the slices of a dataset in one HDF5 file."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.progress import progress_bar
from medseg.data import SliceDataset, write_slices


def slice_dataset(
    dataset: Path,
    *,
    keep: Mapping[str, str],
    axis: int = 2,
    size: tuple[int, int] | None = None,
    fold: int = 0,
    compression: str | None = None,
    out: Path | None = None,
) -> None:
    """Write the slice store of a dataset and print what is in it; arguments as for :func:`medseg.data.write_slices`."""
    with progress_bar("slices") as progress:
        path = write_slices(
            dataset,
            keep=keep,
            axis=axis,
            size=size,
            fold=fold,
            compression=compression,
            out=out,
            progress=progress,
        )
    console = Console()
    console.print(f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB")
    table = Table()
    for column in ("part", "cases", "slices", "size", "channels", "masks"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in ("train", "val", "test"):
        slices = SliceDataset(path, part)
        shape = "x".join(map(str, slices[0]["image"].shape[1:])) if len(slices) else ""
        labels = ", ".join(name for name, value in slices.labels.items() if value)
        table.add_row(part, str(len(slices.cases)), str(len(slices)), shape, ", ".join(slices.channel_names), labels)
    console.print(table)
