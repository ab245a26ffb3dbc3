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

    BUNDLE is a name from `medseg bundles`, or a bundle's folder. WORKFLOW is train, multi_gpu_train, evaluate or
    inference. A MONAI config is code: run bundles that you trust.
    """
    from medseg.experiments import run_bundle

    run_bundle(bundle, workflow, ctx.args)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_PATH, default=Path("report.html"), help="The HTML file.")
@click.option("--title", default=None, help="Heading of the report.")
def report(runs: tuple[Path, ...], out: Path, title: str | None) -> None:
    """Write one HTML report of one run folder, or of several side by side."""
    from medseg.report import run_report

    click.echo(run_report(list(runs), out, title=title) if title else run_report(list(runs), out))
