"""The `medseg` command: thin, no logic; heavy imports stay inside the functions."""

from pathlib import Path

import click

from medseg.command_line import Group

_PATH = click.Path(path_type=Path)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="medseg")
def main() -> None:
    """From raw clinical images to a validated, reproducible segmentation model."""


@main.command()
@click.option("--out", type=_PATH, default=Path("medseg-demo"), help="The folder that everything goes to.")
def demo(out: Path) -> None:
    """Go the whole way on a generated PET/CT cohort: DICOM, dataset, training, report, a mask for a new study."""
    from medseg.demo import run_demo

    run_demo(out)


@main.command()
@click.argument("name", required=False)
@click.option("--copy", "to", type=_PATH, help="Copy the bundle NAME into this folder, to change it.")
def bundles(name: str | None, to: Path | None) -> None:
    """List the bundles that came with medseg, or copy one."""
    from medseg.experiments import bundle_path, bundle_table, copy_bundle

    if to is not None:
        if name is None:
            raise click.UsageError("--copy needs the NAME of a bundle")
        click.echo(copy_bundle(name, to))
    else:
        if name is not None:
            bundle_path(name)  # refuses a misspelt one
        for row in bundle_table():
            if name in (None, row.name):
                click.echo(f"{row.name}  {row.version}  {row.task}\n    {row.path}")


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("bundle")
@click.argument("workflow")
@click.pass_context
def run(ctx: click.Context, bundle: str, workflow: str) -> None:
    """Run a workflow of a bundle, with every override checked: medseg run BUNDLE train --batch_size 8.

    BUNDLE is a name from `medseg bundles`, or a bundle's folder. WORKFLOW is train, multi_gpu_train, evaluate,
    inference or another that the bundle has (choose_threshold). A MONAI config is code: run bundles that you trust.
    """
    from medseg.experiments import run_bundle

    run_bundle(bundle, workflow, ctx.args)


@main.command("lr-range", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("bundle")
@click.option("--from", "start", default=1e-6, help="The first learning rate.")
@click.option("--to", "end", default=1.0, help="The last learning rate.")
@click.option("--iterations", default=150, help="Iterations, each at a higher rate.")
@click.option("--out", type=_PATH, default=Path("lr-range"), help="The folder for learning_rates.csv and .png.")
@click.pass_context
def lr_range(ctx: click.Context, bundle: str, start: float, end: float, iterations: int, out: Path) -> None:
    """Find a learning rate: train a bundle while the rate rises, and see where the loss falls and where it breaks.

    BUNDLE and overrides (--ID VALUE) are those of `medseg run BUNDLE train`. No run folder is made and nothing is kept
    but a table and a figure.
    """
    from medseg.experiments import bundle_learning_rate_range

    found, own = bundle_learning_rate_range(bundle, out, ctx.args, start, end, iterations)
    if found.steepest is None:
        more = "--iterations" if found.diverged else "--to or --iterations"
        click.echo(f"no suggestion: the loss fell by less than three times its scatter; raise {more}")
    else:
        click.echo(f"suggested learning rate: {found.steepest:.1e} (the loss falls fastest there)")
        click.echo(f"highest that still trains: {found.highest:.1e} (the loss stops falling there)")
    if found.diverged:
        click.echo(f"the loss broke out after {found.rates[-1]:.1e}, and the test ended there")
    click.echo(f"the bundle's: {own:.1e}")
    click.echo(f"{out / 'learning_rates.csv'}\n{out / 'learning_rates.png'}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_PATH, default=Path("report.html"), help="The HTML file.")
@click.option("--title", default=None, help="Heading of the report.")
@click.option("--split", default=None, help="Whose scores are shown; test, where every run has scored it.")
def report(runs: tuple[Path, ...], out: Path, title: str | None, split: str | None) -> None:
    """Write one HTML report of one run folder, or of several side by side."""
    from medseg.report import run_report

    click.echo(run_report(list(runs), out, title, split))
