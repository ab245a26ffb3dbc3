"""The `medseg` command: thin, no logic; heavy imports stay inside the functions."""

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="medseg")
def main() -> None:
    """From raw clinical images to a validated, reproducible segmentation model."""
