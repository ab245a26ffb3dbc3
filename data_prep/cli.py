"""The `data_prep` command: thin, no logic; heavy imports stay inside the functions."""

import errno
from pathlib import Path
from typing import Any

import click

from medseg.errors import MedsegError


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["data_prep.debug"] = True


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=_remember_debug,
        help="Show the traceback of an error.",
    )


class Command(click.Command):
    """A command that takes ``--debug``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())


class Group(click.Group):
    """A group whose commands end bad input with one line on stderr and status 1 (bad usage: 2, as click does)."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(_debug_option())

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn an error that was foreseen into its one line."""
        try:
            return super().invoke(ctx)
        except MedsegError as error:
            message = str(error)
            if ctx.meta.get("data_prep.debug"):
                raise
        except OSError as error:
            if ctx.meta.get("data_prep.debug") or error.errno == errno.EPIPE:
                raise
            message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        click.echo(f"error: {' '.join(message.split())}", err=True)
        ctx.exit(1)


Group.group_class = Group

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
@click.option("--out", type=_FILE, help="Write the JSON or CSV to this file instead of to the terminal.")
def inspect(root: Path, as_json: bool, as_csv: bool, out: Path | None) -> None:
    """List the patients, studies and series under ROOT, and what is wrong with each."""
    from data_prep.inspect import show

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    if out is not None and not (as_json or as_csv):
        raise click.UsageError("--out needs --json or --csv")
    show(root, form="json" if as_json else "csv" if as_csv else "table", out=out)


@main.command()
@click.argument("out", type=_PATH)
@click.option("--patients", type=click.IntRange(1, 999), default=24, help="How many patients.")
@click.option("--seed", type=click.IntRange(0), default=0, help="The same seed writes the same bytes.")
@click.option("--image-size", type=click.IntRange(32, 512), default=96, help="Columns and rows of a CT slice.")
@click.option("--slices", type=click.IntRange(8, 256), default=40, help="CT slices of a patient, on average.")
def phantom(out: Path, patients: int, seed: int, image_size: int, slices: int) -> None:
    """Write a made-up head-and-neck PET/CT cohort as DICOM to OUT."""
    from data_prep.phantom import write_cohort

    write_cohort(out, patients=patients, seed=seed, image_size=image_size, slices=slices)


@main.command()
def build() -> None:
    """Build a dataset from source images by a recipe."""
    raise click.UsageError("no recipe is installed")


@main.command()
@click.argument("dataset", type=_PATH)
def split(dataset: Path) -> None:
    """Split DATASET by patient into train, val and test, or into folds."""
    raise click.UsageError("not built yet")


@main.command()
@click.argument("dataset", type=_PATH)
def slices(dataset: Path) -> None:
    """Write the slices of DATASET to DATASET/slices.h5."""
    raise click.UsageError("not built yet")


@main.command()
@click.argument("dataset", type=_PATH)
def check(dataset: Path) -> None:
    """Check DATASET for what would spoil a training; exit 1 when something is wrong."""
    raise click.UsageError("not built yet")
