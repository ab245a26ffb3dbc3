"""The `data_prep` command: thin, no logic; heavy imports stay inside the functions."""

from pathlib import Path
from typing import Literal

import click

from medseg.command_line import Command, Group
from medseg.errors import ConfigError

_FILE = click.Path(dir_okay=False, path_type=Path)
_PATH = click.Path(path_type=Path)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="medseg")
def main() -> None:
    """Turn a heap of clinical images into a checked dataset."""


@main.command()
@click.argument("root", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of a table.")
@click.option("--csv", "as_csv", is_flag=True, help="Write CSV, a row per series, instead of a table.")
@click.option("--html", type=_FILE, help="Write a page with a picture of every series to this file.")
@click.option("--out", type=_FILE, help="Write the JSON or CSV to this file instead of to the terminal.")
@click.option("--jobs", type=click.IntRange(1), default=None, help="Files at once.  [default: one per core]")
@click.option(
    "--cache",
    type=_FILE,
    default=None,
    help="Keep headers for the next time here; it holds PatientIDs.  [default: ~/.cache/medseg/headers.sqlite]",
)
@click.option("--no-cache", is_flag=True, help="Read every file, and keep nothing.")
def inspect(
    root: Path,
    as_json: bool,
    as_csv: bool,
    html: Path | None,
    out: Path | None,
    jobs: int | None,
    cache: Path | None,
    no_cache: bool,
) -> None:
    """List the patients, studies and series under ROOT, and what is wrong with each.

    ROOT is a folder, a file, or a DICOMDIR. A file is read again when its size or time of change is another.
    """
    from data_prep.inspect import show
    from medseg.io.header_cache import default_cache

    if as_json + as_csv + (html is not None) > 1:
        raise click.UsageError("--json, --csv and --html exclude each other")
    if out is not None and not (as_json or as_csv):
        raise click.UsageError("--out needs --json or --csv")
    if cache is not None and no_cache:
        raise click.UsageError("--cache and --no-cache exclude each other")
    show(
        root,
        form="json" if as_json else "csv" if as_csv else "html" if html is not None else "table",
        out=out or html,
        jobs=jobs,
        cache=None if no_cache else cache or default_cache(),
    )


@main.command()
@click.argument("out", type=_PATH)
@click.option("--patients", type=click.IntRange(1, 999), default=24, help="How many patients.")
@click.option("--seed", type=click.IntRange(0), default=0, help="The same seed writes the same bytes.")
@click.option("--image-size", type=click.IntRange(32, 512), default=96, help="Columns and rows of a CT slice.")
@click.option("--slices", type=click.IntRange(8, 256), default=40, help="CT slices of a patient, on average.")
def phantom(out: Path, patients: int, seed: int, image_size: int, slices: int) -> None:
    """Write a made-up head-and-neck PET/CT cohort as DICOM to OUT."""
    from data_prep.phantom import write_cohort
    from data_prep.progress import progress_bar

    with progress_bar("Writing patients") as progress:
        write_cohort(out, patients=patients, seed=seed, image_size=image_size, slices=slices, progress=progress)


@main.command()
@click.argument("root", type=_PATH)
@click.option("--out", type=_PATH, default=None, help="Folder for the pictures.  [default: beside their sources]")
@click.option(
    "--axis",
    type=click.Choice(["slices", "x", "y", "z"]),
    default="slices",
    help="Slices as stored, or volumes cut along the patient's axis: x sagittal, y coronal, z axial pictures.",
)
@click.option(
    "--window",
    type=float,
    nargs=2,
    metavar="CENTER WIDTH",
    default=None,
    help="In HU, SUV or what the image holds.  [default: that of the DICOM tags, else minimum to maximum]",
)
@click.option(
    "--percentiles",
    type=click.FloatRange(0, 100),
    nargs=2,
    metavar="LOW HIGH",
    default=None,
    help="From this percentile of the image to that, instead of a window; 0 100 is minimum to maximum.",
)
@click.option("--labels", is_flag=True, help="Write the values as they are, for label images.")
@click.option("--bits", type=click.Choice(["8", "16"]), default="8", help="Of a gray pixel.")
@click.option(
    "--as-stored", is_flag=True, help="Pixel for pixel: neither turned upright nor stretched to square pixels."
)
@click.option("--jobs", type=click.IntRange(1), default=None, help="Images at once.  [default: one per core]")
@click.option("--force", is_flag=True, help="Replace pictures that are up to date, and files that medseg did not make.")
@click.pass_context
def png(
    ctx: click.Context,
    root: Path,
    out: Path | None,
    axis: Literal["slices", "x", "y", "z"],
    window: tuple[float, float] | None,
    percentiles: tuple[float, float] | None,
    labels: bool,
    bits: str,
    as_stored: bool,
    jobs: int | None,
    force: bool,
) -> None:
    """Write PNG pictures of every DICOM, NIfTI, MHD and NRRD file below ROOT."""
    from data_prep.png import Look, show_written

    if (window is not None) + (percentiles is not None) + labels > 1:
        raise click.UsageError("--window, --percentiles and --labels exclude each other")
    look = Look(axis, window, percentiles, 16 if bits == "16" else 8, labels, as_stored)
    if not show_written(root, out=out, look=look, jobs=jobs, force=force, debug=bool(ctx.meta.get("debug"))):
        ctx.exit(1)


class _Recipes(Group):
    """The recipes as subcommands, each read when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from data_prep.recipes import RECIPES

        return list(RECIPES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        from data_prep.build_command import recipe_command
        from data_prep.recipes.from_file import names_a_file

        try:
            return recipe_command(cmd_name, Command)
        except ConfigError as error:
            if names_a_file(cmd_name):
                raise
            message = str(error)
        raise click.UsageError(message, ctx)


@main.group(cls=_Recipes)
def build() -> None:
    """Build a dataset from source images by a recipe: build RECIPE SOURCE OUT.

    RECIPE is one of those below, or the path of a recipe of your own: my.yaml, my.py or my.py:MyRecipe. A recipe of
    your own may name code, and that is run.
    """


@main.command("recipes")
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of a table.")
def list_recipes(as_json: bool) -> None:
    """List the recipes: what each makes, where its source comes from and under which license."""
    from data_prep.catalog import show_recipes

    show_recipes(as_json)


@main.command()
@click.argument("name", required=False)
@click.argument("dest", type=_PATH, required=False)
@click.option("--only", "parts", multiple=True, metavar="PART", help="A part, such as Task04_Hippocampus; repeat.")
@click.option("--all", "every", is_flag=True, help="All of its parts.")
@click.option("--list", "listing", is_flag=True, help="List what can be fetched, and how to get the rest.")
def fetch(name: str | None, dest: Path | None, parts: tuple[str, ...], every: bool, listing: bool) -> None:
    """Download the public dataset of the recipe NAME to the folder DEST.

    Run it again to go on after an interruption. Files are compared with their published hash; of those that have none
    the hash is recorded in DEST/fetched.json.
    """
    from data_prep.fetch import show_fetched, show_parts

    if listing:
        show_parts()
        return
    if name is None or dest is None:
        raise click.UsageError("NAME and DEST expected, or --list")
    if every and parts:
        raise click.UsageError("--only and --all exclude each other")
    show_fetched(name, dest, parts, every)


@main.command()
@click.argument("dataset", type=_PATH)
@click.option(
    "--fractions",
    type=click.FloatRange(0, 1),
    nargs=3,
    metavar="TRAIN VAL TEST",
    default=None,
    help="Shares of the patients.  [default: 0.7 0.1 0.2]",
)
@click.option("--folds", type=click.IntRange(2), default=None, help="Make this many folds instead.")
@click.option(
    "--test-fraction", type=click.FloatRange(0, 1, max_open=True), default=None, help="Kept out of all folds."
)
@click.option("--stratify", metavar="COLUMN", default=None, help="Column of cases.csv to spread evenly (stratum).")
@click.option(
    "--column",
    metavar="COLUMN",
    default=None,
    help="Column of cases.csv with the published part of a case (train or training, val, test), which is kept.",
)
@click.option("--seed", type=int, default=0, help="Another seed, another split.")
@click.option("--force", is_flag=True, help="Replace a split that is there already.")
def split(
    dataset: Path,
    fractions: tuple[float, float, float] | None,
    folds: int | None,
    test_fraction: float | None,
    stratify: str | None,
    column: str | None,
    seed: int,
    force: bool,
) -> None:
    """Split DATASET by patient into train, val and test, or into folds.

    With --column the test part is that of the column; so is the val part, or, where there is none, the training part is
    divided as --fractions or --folds say.
    """
    from data_prep.split import split_dataset

    if folds is not None and fractions is not None:
        raise click.UsageError("--folds and --fractions exclude each other")
    if test_fraction is not None and folds is None:
        raise click.UsageError("--test-fraction needs --folds; without folds the third of --fractions is the test's")
    if test_fraction is not None and column is not None:
        raise click.UsageError("--column and --test-fraction exclude each other: the column has the test part")
    split_dataset(
        dataset,
        seed=seed,
        fractions=fractions or (0.7, 0.1, 0.2),
        folds=folds,
        test_fraction=test_fraction or 0.0,
        stratify=stratify,
        column=column,
        force=force,
    )


_KEEP = click.Choice(["foreground", "all"])


@main.command()
@click.argument("dataset", type=_PATH)
@click.option("--keep", type=_KEEP, default=None, help="Slices to keep of every part; the three below say more.")
@click.option("--keep-train", type=_KEEP, default=None, help="Of the train part.  [default: foreground]")
@click.option("--keep-val", type=_KEEP, default=None, help="Of the val part.  [default: all]")
@click.option("--keep-test", type=_KEEP, default=None, help="Of the test part.  [default: all]")
@click.option(
    "--size",
    type=click.IntRange(1),
    nargs=2,
    metavar="X Y",
    default=None,
    help="Crop or pad slices about their center to this size; CT is padded with -1024 HU.",
)
@click.option("--axis", type=click.IntRange(0, 2), default=2, help="Array axis to cut along.")
@click.option("--fold", type=click.IntRange(0), default=0, help="Which fold of splits.json.")
@click.option("--compression", type=click.Choice(["lzf", "gzip"]), default=None, help="Smaller, and slower to read.")
@click.option("--out", type=_FILE, default=None, help="The file.  [default: DATASET/slices.h5]")
def slices(
    dataset: Path,
    keep: str | None,
    keep_train: str | None,
    keep_val: str | None,
    keep_test: str | None,
    size: tuple[int, int] | None,
    axis: int,
    fold: int,
    compression: str | None,
    out: Path | None,
) -> None:
    """Write the slices of DATASET to one HDF5 file, to train 2D models from."""
    from data_prep.slices import slice_dataset

    chosen = {"train": keep_train or keep, "val": keep_val or keep, "test": keep_test or keep}
    slice_dataset(
        dataset,
        keep={part: kept for part, kept in chosen.items() if kept},
        axis=axis,
        size=size,
        fold=fold,
        compression=compression,
        out=out,
    )


@main.command()
@click.argument("dataset", type=_PATH)
@click.option("--jobs", type=click.IntRange(1), default=None, help="Cases at once.  [default: one per core]")
@click.option("--report", is_flag=True, help="Write report.html anew, with the findings in it.")
@click.option("--json", "as_json", is_flag=True, help="Print all findings as JSON.")
@click.pass_context
def check(ctx: click.Context, dataset: Path, jobs: int | None, report: bool, as_json: bool) -> None:
    """Check DATASET for what would spoil a training; exit 1 when there is an error, 0 when there are warnings only."""
    from data_prep.check import show_problems

    if not show_problems(dataset, workers=jobs, report=report, as_json=as_json):
        ctx.exit(1)
